"""Rounds weights to blocks of 4 bits: 32 along the input dimension share an fp16 scale and an fp16 minimum.

The numbers are those of the C++ engine's q4 (`quantise_to_four_bits` in kernels/cpu/math/quant.h), which are GGUF's
Q4_1. So weights that came from such blocks, or from Q4_0, get the same numbers again, unless they were rounded to bf16
in between by more than half a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

GROUP = 32  # how many weights share a scale
MOST_QUANT = 15


@dataclass(frozen=True, eq=False)
class FourBits:
    """Rows of weights in groups; a weight is scale * quant + minimum. A short last group was filled with zeros.

    quants: [rows, groups, GROUP] uint8, at most MOST_QUANT. scales, minima: [rows, groups] fp16.
    """

    quants: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor

    def widened(self) -> torch.Tensor:
        """Returns [rows, groups * GROUP] fp32, the weights that the numbers stand for."""
        scales, minima = (part.float()[..., None] for part in (self.scales, self.minima))
        return (self.quants * scales + minima).flatten(1)


def quantise(weights: torch.Tensor) -> FourBits:
    """Rounds each group in 15 steps from its least weight to its greatest. weights: [rows, depth] of any type."""
    rows = F.pad(weights.float(), (0, -weights.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    least, greatest = rows.aminmax(dim=2)
    scales, minima = ((greatest - least) / MOST_QUANT).half(), least.half()
    step = scales.float()[..., None]
    inverse = torch.where(step > 0, 1 / step, 0.0)
    quants = ((rows - minima.float()[..., None]) * inverse).round().clamp(0, MOST_QUANT).to(torch.uint8)
    return FourBits(quants, scales, minima)
