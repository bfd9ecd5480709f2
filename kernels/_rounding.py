"""Rounds weights to few bits: 32 along the input dimension share an fp16 scale, and those of 4 bits an fp16 minimum.

The numbers are those of the C++ engine's q4 and q8 (kernels/cpu/math/quant.h), which are GGUF's Q4_1 and Q8_0. So fp32
weights from blocks of Q4_1 come back in 4 bits, and those from Q8_0 in 8 bits. Where they were rounded to bf16 in
between, nearly all quants are the same again, but most scales are off by what bf16 is. Others, Q4_0's too, are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

GROUP = 32  # how many weights share a scale
ZERO = {4: 0, 8: 128}  # the stored quant that stands for 0 steps


@dataclass(frozen=True, eq=False)
class Rounded:
    """Rows of weights in groups; a weight is scale * (quant - ZERO) + minimum. A short last group was filled with
    zeros.

    bits:   4 or 8.
    quants: [rows, groups, GROUP] uint8, 0 to 15 in 4 bits and 1 to 255 in 8 bits.
    scales, minima: [rows, groups] fp16. In 8 bits all minima are 0.
    """

    bits: int
    quants: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor

    def widened(self) -> torch.Tensor:
        """Returns [rows, groups * GROUP] fp32, the weights that the numbers stand for."""
        scales, minima = (part.float()[..., None] for part in (self.scales, self.minima))
        return ((self.quants.float() - ZERO[self.bits]) * scales + minima).flatten(1)


def quantise(weights: torch.Tensor, bits: int) -> Rounded:
    """Rounds weights [rows, depth] of any type: 4 bits have 15 steps from a group's least weight to its greatest, 8
    bits 127 steps from 0 to its largest magnitude, on both sides."""
    rows = F.pad(weights.float(), (0, -weights.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    least, greatest = rows.aminmax(dim=2)
    if bits == 4:
        fewest, most, span, minima = 0, 15, greatest - least, least.half()
    else:
        fewest, most, span = -127, 127, torch.maximum(greatest, -least)
        minima = torch.zeros_like(span, dtype=torch.float16)
    scales = (span / most).half()
    step = scales.float()[..., None]
    inverse = torch.where(step > 0, 1 / step, 0.0)
    quants = ((rows - minima.float()[..., None]) * inverse).round().clamp(fewest, most) + ZERO[bits]
    return Rounded(bits, quants.to(torch.uint8), scales, minima)
