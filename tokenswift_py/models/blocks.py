"""Weights in blocks of 32 along the input dimension, as the C++ engine multiplies them (kernels/cpu/math/quant.h)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK = 32
BLOCK_BYTES = {"q8": 34, "q4": 20}  # d (fp16) and 32 signed bytes; d, m (fp16) and 32 halves of bytes
INT8_BYTES = BLOCK_BYTES["q8"] / BLOCK  # of one weight


@dataclass(frozen=True)
class Blocks:
    """A matrix whose rows are whole blocks, in the layout of GGUF's Q8_0 (q8: d q) or Q4_1 (q4: d q + m).

    data: [rows, columns / 32 * BLOCK_BYTES[kind]] bytes.
    """

    kind: str
    data: npt.NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, int]:
        """[output features, input features] of the matrix."""
        return self.data.shape[0], self.data.shape[1] // BLOCK_BYTES[self.kind] * BLOCK
