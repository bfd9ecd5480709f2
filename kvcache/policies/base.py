"""Parts that policies share: numbers per page of a text that grows, and the queries of its last row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokenswift_py.kernels.base import QueryTurns
from tokenswift_py.kvcache.base import Committed, FloatArray, IntArray, PagePool, PageStats

Array = npt.NDArray[Any]
ROOM = 64  # the number of pages that an array has room for at first


class PerPage:
    """An array [..., pages] of numbers, zero until they are written. Its length doubles, so growing it costs little.

    device: where it lies, as a tensor of fp64; None is an array of the host.
    """

    def __init__(self, dtype: npt.DTypeLike = np.float64, device: torch.device | None = None):
        self._dtype, self._device = np.dtype(dtype), device
        self._array: Any = None

    def window(self, *shape: int) -> Any:
        """Returns the numbers of the first `shape[-1]` pages, to be read or written in place.

        The other axes must be the same in every call.
        """
        held = self._array
        if held is None or held.shape[-1] < shape[-1]:
            before = 0 if held is None else held.shape[-1]
            room = (*shape[:-1], max(ROOM, shape[-1], 2 * before))
            if self._device is None:
                self._array = np.zeros(room, self._dtype)
            else:
                self._array = torch.zeros(room, dtype=torch.float64, device=self._device)
            if held is not None:
                self._array[..., :before] = held
            held = self._array
        return held[..., : shape[-1]]


class ByPlace:
    """A policy that scores a page by where it stands, and looks at no row. It begins with the first row, as all do."""

    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._began = False

    def observe(self, committed: Committed) -> None:
        self._began = True

    def score(self, stats: PageStats) -> FloatArray:
        pages = np.arange(stats.pages)
        scores = self.worth(pages, strides(pages)) if self._began else np.zeros(stats.pages)
        return np.broadcast_to(scores.astype(np.float32), (stats.layers, stats.kv_heads, stats.pages))

    def worth(self, pages: Array, stride: Array) -> Array:
        """Returns the scores of `pages`, [pages]. stride: what `strides` says of them."""
        raise NotImplementedError


def strides(pages: Array) -> Array:
    """Returns the greatest power of two that divides a page's number, infinite for the first page. [pages] float64.

    The pages whose stride is at least s are every s-th one. The larger it is, the fewer these are, and they are among
    those of every smaller s. So a view stays evenly spread whatever its budget, and hardly changes as the text grows.
    """
    return np.where(pages > 0, pages & -pages, np.inf)


class LastQueries:
    """A policy that scores every page by the queries of the last committed row and the page's keys."""

    needs = frozenset({"queries"})

    def __init__(self) -> None:
        self._queries: torch.Tensor | None = None
        self._position = 0
        self._turns: QueryTurns | None = None

    def observe(self, committed: Committed) -> None:
        assert committed.queries is not None
        self._queries = torch.tensor(committed.queries[-1])  # a copy
        self._position, self._turns = committed.start + committed.rows - 1, committed.turns

    def score(self, stats: PageStats) -> FloatArray:
        scores = np.zeros((stats.layers, stats.kv_heads, stats.pages), np.float32)
        held = stats.held
        if self._queries is not None and len(held):
            assert stats.pool is not None and stats.table is not None
            for pages, queries in self._met(held):
                scores[..., pages] = self.worth(stats.pool, stats.table[pages], queries).cpu().numpy()
        return scores

    def _met(self, pages: IntArray) -> Iterator[tuple[IntArray, torch.Tensor]]:
        """Yields the pages in groups, each with the queries rotated as they meet the keys of that group (law 8)."""
        assert self._queries is not None
        if self._turns is None:
            yield pages, self._queries
            return
        for at, some in self._turns.groups(self._position, pages):
            yield some, self._turns.turned(self._queries, self._position, at)

    def worth(self, pool: PagePool, pages: IntArray, queries: torch.Tensor) -> torch.Tensor:
        """Returns the scores of these pages of the pool, [layers, kv_heads, n]. queries: [layers, heads, head_dim]."""
        raise NotImplementedError
