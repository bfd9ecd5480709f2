"""The contract of a memory: rows evicted from a cache are folded into a state of fixed size for each layer and KV head.

Pages are folded one after the other, in their order, at the fixed positions of evictions alone. So a memory is a
function of the committed rows, and every row of a pass reads the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from tokenswift_py.kvcache.base import PAGE_SIZE, Committed, IntArray

M = TypeVar("M", bound="Memory")


class Pages(Protocol):
    """The pages of a pool whose keys and values can be read."""

    def page_keys(self, layer: int, pages: IntArray) -> torch.Tensor:
        """Returns a layer's keys of some pages, [kv_heads, n, PAGE_SIZE, head_dim] fp32."""

    def page_values(self, layer: int, pages: IntArray) -> torch.Tensor:
        """Returns a layer's values of some pages, in the same shape."""


@dataclass(frozen=True)
class Shape:
    """The model that a memory belongs to.

    keeps:  [layers] whether a layer has a memory. A layer with a sliding window has none: it forgets by design.
    dtype:  type of the states, fp32 or better.
    tables: cos and sin, [context, head_dim / 2] each, that a layer's keys were rotated by. None where they were not.
    """

    keeps: tuple[bool, ...]
    kv_heads: int
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    tables: Sequence[tuple[torch.Tensor, torch.Tensor] | None] = ()

    @property
    def group(self) -> int:
        """The number of query heads of a KV head."""
        return self.heads // self.kv_heads


class Memory:
    """A memory of one sequence; `kvcache/memories` has a file for each kind.

    needs: "queries" says that full-view passes must report their queries to `observe`.
    gated: whether `read` takes queries before RoPE and gives the share of what it recalled in the output. Else `read`
           takes rotated queries and gives a log-sum-exp, by which it is merged with the softmax over the pages kept.
    label: part of the numerics contract.
    folded: pages so far. While there are none the memory must not be read.
    """

    needs: frozenset[str] = frozenset()
    gated = False
    label: str

    def __init__(self, shape: Shape):
        self.shape, self.folded = shape, 0

    @property
    def states(self) -> tuple[torch.Tensor, ...]:
        """The tensors that folding changes."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """The size of the states, which every row reads."""
        return sum(state.nbytes for state in self.states)

    @property
    def held_bytes(self) -> int:
        """The size of all that it keeps."""
        return self.nbytes

    def observe(self, committed: Committed) -> None:
        """Learns from rows that were committed. Keeps no reference to the arrays."""

    def fold(self, pool: Any, numbers: IntArray, pages: IntArray) -> None:
        """Takes in pages that are about to be evicted.

        pool: the executor's own; here one that can read `Pages`.
        numbers: [n] which pages of the sequence they are, ascending. pages: [n] where they lie in the pool.
        """
        for layer in (layer for layer, kept in enumerate(self.shape.keeps) if kept):
            keys, values = (read(layer, pages).to(self.shape.dtype) for read in (pool.page_keys, pool.page_values))
            for place, number in enumerate(numbers.tolist()):
                self._fold_page(layer, keys[:, place], values[:, place], number * PAGE_SIZE)
        self.folded += len(numbers)

    def _fold_page(self, layer: int, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        """Takes in a page of a layer. keys, values: [kv_heads, PAGE_SIZE, head_dim]. start: position of its first."""
        raise NotImplementedError

    def read(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Recalls values for queries [n, heads, head_dim]. Returns them in that shape, and log-sum-exps or shares
        [n, heads] (see `gated`)."""
        raise NotImplementedError

    def copy(self: M) -> M:
        """Returns a memory of its own that goes on from the same state."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forgets everything."""
        self.folded = 0
        for state in self.states:
            state.zero_()

    def grouped(self, q: torch.Tensor) -> torch.Tensor:
        """Turns queries [n, heads, head_dim] into [kv_heads, n * group, head_dim], in the states' type."""
        rows: torch.Tensor = q.to(self.shape.dtype).unflatten(1, (self.shape.kv_heads, -1))
        return rows.transpose(0, 1).flatten(1, 2)

    def ungrouped(self, x: torch.Tensor) -> torch.Tensor:
        """Turns [kv_heads, n * group, ...] back into [n, heads, ...]."""
        rows: torch.Tensor = x.unflatten(1, (-1, self.shape.group))
        return rows.transpose(0, 1).flatten(1, 2)
