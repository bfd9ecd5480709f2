"""Weights in blocks along the input dimension, as GGUF stores them and the C++ engine multiplies them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tokenswift_py.kernels._rounding import quantise
from tokenswift_py.models.spec import ModelSpec, part_of

FP32 = ("router", "shared_gate")  # these matrices are never in blocks
BLOCK = 32  # how many weights share a scale, and how many activations are rounded together


@dataclass(frozen=True)
class BlockFormat:
    """The layout of a type of blocks. The meaning of its numbers is in kernels/cpu/math/formats.h.

    weights: number of weights of a block.
    stored, packed: bytes of a block in a GGUF file and in the engine.
    halves: offsets of its fp16 numbers.
    """

    weights: int
    stored: int
    packed: int
    halves: tuple[int, ...]


FORMATS = {
    "q8": BlockFormat(32, 34, 34, (0,)),
    "q4": BlockFormat(32, 20, 20, (0, 2)),
    "q4_0": BlockFormat(32, 18, 18, (0,)),
    "q5_0": BlockFormat(32, 22, 22, (0,)),
    "q5_1": BlockFormat(32, 24, 24, (0, 2)),
    "q4_k": BlockFormat(256, 144, 148, (0, 2)),
    "q5_k": BlockFormat(256, 176, 180, (0, 2)),
    "q6_k": BlockFormat(256, 210, 210, (208,)),
    "iq4_nl": BlockFormat(32, 18, 18, (0,)),
    "iq4_xs": BlockFormat(256, 136, 138, (0,)),
}


class FewBits(NamedTuple):
    """The bits of a weight, and the bytes that it takes with its share of scale and minimum."""

    bits: int
    nbytes: float


FEW_BITS = {"int8": FewBits(8, FORMATS["q8"].packed / BLOCK), "int4": FewBits(4, FORMATS["q4"].packed / BLOCK)}


@dataclass(frozen=True)
class Blocks:
    """A matrix whose rows are whole blocks, as GGUF stores them: q8 is its Q8_0, q4 its Q4_1, and the others are there
    by their own names.

    data: [rows, blocks of a row * FORMATS[kind].stored] bytes.
    """

    kind: str
    data: npt.NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, int]:
        """Returns [output features, input features] of the matrix."""
        form = FORMATS[self.kind]
        return self.data.shape[0], self.data.shape[1] // form.stored * form.weights

    def finite(self) -> bool:
        """Returns whether all scales and minima are numbers."""
        blocks = self.data.reshape(-1, FORMATS[self.kind].stored)
        return all(
            bool(np.isfinite(blocks[:, at : at + 2].copy().view(np.float16)).all()) for at in FORMATS[self.kind].halves
        )


def in_four_bits(matrix: torch.Tensor) -> Blocks:
    """Rounds a matrix, whose rows are whole blocks, to blocks of q4."""
    found = quantise(matrix, 4)
    halves = torch.stack((found.scales, found.minima), 2).view(torch.uint8)
    low, high = found.quants.chunk(2, 2)
    return Blocks("q4", torch.cat((halves, low | high << 4), 2).flatten(1).numpy())


class FourBits(Mapping[str, torch.Tensor | Blocks]):
    """Tensors of a model, whose matrices are rounded to blocks of 4 bits as they are read. Routers, an embedding of
    which only rows are read, and matrices whose rows are not whole blocks stay."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], spec: ModelSpec):
        self._tensors, self._spec = tensors, spec

    def __getitem__(self, name: str) -> torch.Tensor | Blocks:
        tensor, (part, _) = self._tensors[name], part_of(name, self._spec)
        stays = tensor.ndim == 1 or part in FP32 or (part == "embed" and not self._spec.tied)
        return tensor if stays or tensor.shape[1] % BLOCK else in_four_bits(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
