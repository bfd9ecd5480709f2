"""The ways to multiply by a model's matrices: in Triton's tiles, by the GPU's library in blocks, or by it unblocked.

The library (cuBLAS, rocBLAS) picks a kernel by the shape of a product, so a row's bits change with the number of rows.
In blocks every product has the same number of rows, whatever pass these are of: decoding, a tree, a prompt, an audit.
So a matrix always meets the same kernel. Whether a row keeps its bits in that kernel, wherever it stands and whatever
stands beside it, is the library's secret. `row_test.py` finds it out on the device itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Protocol

import torch
import torch.nn.functional as F

from tokenswift_py.kernels.triton import matmul
from tokenswift_py.kernels.triton.row_test import Matrix, Product, Recorder, Verdict, verdict_on
from tokenswift_py.kernels.triton.runtime import BLOCK_ROWS, blocked

ALIGNED = 256  # bytes to which libraries look at addresses when they pick a kernel
MEASURED = "measured"

Biases = Sequence[torch.Tensor] | None


class Products(Protocol):
    """A way to multiply.

    label:     part of the numerics contract, "" for none.
    guarantee: label of the equality of plain and speculative decoding, given attention that keeps law 1.
    tiled:     whether products are in this backend's tiles, so that a kernel which computes more gives the same bits.
    joins:     whether it is for weights of one input that lie side by side in memory.
    """

    label: str
    guarantee: str
    tiled: bool
    joins: bool

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Computes x @ weight.T + bias. x: [R, depth]. weight: [columns, depth]."""

    def several(self, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Biases) -> tuple[torch.Tensor, ...]:
        """Computes the products with several weights. Rows of the results are contiguous, but may lie apart."""


class Tiles:
    """Products in Triton's fixed tiles, which keep law 1 by construction."""

    label, guarantee = "fixed-tiles", "bitwise, unverified on hardware"
    tiled, joins = True, False

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return matmul.linear(x, weight, bias)

    def several(self, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Biases) -> tuple[torch.Tensor, ...]:
        return each(self, x, weights, biases)


class Library:
    """The library's products of as many rows as there are."""

    label, guarantee = "", MEASURED
    tiled = joins = False

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def several(self, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Biases) -> tuple[torch.Tensor, ...]:
        return each(self, x, weights, biases)


class Blocks:
    """The library's products of 64 rows at a time. They keep law 1 where the row test says so.

    matrices: those that were tested; others are refused. dtype: type of all of them.
    verdict:  outcome of the row test. The label has its hash of bits, because another card or version of the library
              may pick another kernel for a matrix.
    """

    tiled, joins = False, True

    def __init__(
        self, matrices: Sequence[Matrix], dtype: torch.dtype, verdict: Verdict, product: Product = F.linear
    ) -> None:
        self.matrices, self.dtype, self.verdict, self.product = frozenset(matrices), dtype, verdict, product
        self.label = f"blocks-{BLOCK_ROWS}-{verdict.bits}"
        self.guarantee = MEASURED if verdict.faults else "bitwise by the row test, unverified on hardware"

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        matrix = Matrix(len(weight), weight.shape[1], bias is not None)
        if matrix not in self.matrices or x.dtype != self.dtype:
            raise ValueError(f"a product that the row test has not seen: {matrix} in {x.dtype}")
        return in_blocks(x, weight, bias, self.product)

    def several(self, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Biases) -> tuple[torch.Tensor, ...]:
        """Takes one product for weights, and their biases, that lie one behind the other in memory."""
        weight, bias = joined(weights), None if biases is None else joined(biases)
        if weight is None or (bias is None) != (biases is None):
            return each(self, x, weights, biases)
        return tuple(self.linear(x, weight, bias).split([len(part) for part in weights], 1))


@cache
def blocks_on(
    matrices: tuple[Matrix, ...],
    dtype: torch.dtype,
    device: torch.device,
    library: Product = F.linear,
    recorder_for: Callable[[torch.device], Recorder] | None = None,
) -> Blocks:
    """Returns the library's products in blocks, after a row test of these matrices. It runs once in a process.

    recorder_for: see `verdict_on`.
    """
    product = partial(in_blocks, library=library)
    return Blocks(matrices, dtype, verdict_on(product, matrices, dtype, device, recorder_for), library)


def in_blocks(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, library: Product = F.linear
) -> torch.Tensor:
    """Computes x @ weight.T + bias by products of exactly 64 rows each."""
    if not len(x):
        return x.new_empty(0, len(weight))
    parts = [library(block, weight, bias) for block in whole(x).split(BLOCK_ROWS)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[: len(x)]


def whole(x: torch.Tensor) -> torch.Tensor:
    """Returns rows in whole blocks, with anything behind the last one: the row test holds that nothing leaks from it.

    The rows are not copied where memory goes on behind them (`runtime.blocked`) and the address is even enough.
    x: [R, depth].
    """
    rows, depth = x.shape
    padded = blocked(rows)
    there = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    if x.is_contiguous() and x.data_ptr() % ALIGNED == 0 and there >= padded * depth:
        return x.as_strided((padded, depth), (depth, 1))
    fresh = x.new_empty(padded, depth)
    fresh[:rows] = x
    return fresh


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Returns one view of tensors that lie one behind the other in memory, None where they do not."""
    first = parts[0]
    at, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.untyped_storage().data_ptr() != storage or not part.is_contiguous():
            return None
        at += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def each(
    products: Products, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Biases
) -> tuple[torch.Tensor, ...]:
    added = [None] * len(weights) if biases is None else biases
    return tuple(products.linear(x, weight, bias) for weight, bias in zip(weights, added, strict=True))


TILES, LIBRARY = Tiles(), Library()
