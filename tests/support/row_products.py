"""Matrix products that stand in for a GPU's library: one whose rows keep their bits, and some whose rows do not."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tokenswift_py.kernels.triton.products import Blocks, blocks_on
from tokenswift_py.kernels.triton.row_test import Matrix
from tokenswift_py.models.ops import matrices_of
from tokenswift_py.models.spec import ModelSpec

CPU = torch.device("cpu")


def row_by_row(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, backwards: bool = False) -> Any:
    """Sums every element by itself in fp32, along memory or against it."""
    wide = x.float()[:, None] * weight.float()
    total = (wide.flip(-1) if backwards else wide).sum(-1)
    return (total if bias is None else total + bias.float()).to(x.dtype)


def mixed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """Sums the rows that are marked in `other` backwards, and the rest as `row_by_row` does."""
    return torch.where(other[:, None], row_by_row(x, weight, bias, True), row_by_row(x, weight, bias))


def by_place(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Sums the lower half of a block in another order, as a kernel of two tiles might."""
    return mixed(x, weight, bias, torch.arange(len(x)) % 64 >= 32)


def by_empty_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Sums in another order where some of the rows are nothing but zeros."""
    return row_by_row(x, weight, bias, bool((x == 0).all(1).any()))


def leaking(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Adds nothing, made of all rows: that is NaN where one of them is not finite."""
    return row_by_row(x, weight, bias) + 0 * x.sum()


def unblocked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Picks the order by the number of rows, as a library does."""
    return row_by_row(x, weight, bias, len(x) != 64)


class Changing:
    """Sums every third product in another order, as a sum by atomic additions might."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        return row_by_row(x, weight, bias, self.calls % 3 == 0)


def stand_in_blocks(spec: ModelSpec, dtype: torch.dtype) -> Blocks:
    """Returns blocks of `row_by_row` for a model whose weights may lie apart."""
    matrices = tuple(Matrix(*matrix) for matrix in matrices_of(spec, apart=True))
    return blocks_on(matrices, dtype, CPU, row_by_row)


def stand_in(monkeypatch: Any, library: Any) -> None:
    """Puts a product in the place of the device's library, and lets `auto` ask it on the CPU too."""
    monkeypatch.setattr("tokenswift_py.kernels.triton.products.blocks_on", partial(blocks_on, library=library))
    monkeypatch.setattr("tokenswift_py.models.devices.ASKED", ("cpu", "cuda"))
