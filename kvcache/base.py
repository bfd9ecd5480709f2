"""The contracts of this folder: where pages are stored, and how a policy picks some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tokenswift_py.kernels.base import PAGE_SIZE as PAGE_SIZE

IntArray = npt.NDArray[np.int32]


class PagePool(Protocol):
    """Storage for pages of `PAGE_SIZE` tokens, all layers and KV heads together. A slot is page * PAGE_SIZE + lane."""

    layers: int
    kv_heads: int
    page_bytes: int

    def allocate(self) -> int:
        """A page nobody holds; MemoryError when the pool is full."""

    def share(self, page: int) -> None:
        """One more holder of `page`."""

    def release(self, page: int) -> None:
        """One holder fewer; without holders the page is free again."""

    def move(self, source: IntArray, target: IntArray) -> None:
        """Copy rows between slots, as if all were read before any is written."""


@dataclass(frozen=True)
class PageStats:
    """What a policy may look at.

    pages: number of full committed pages to choose from; the partial page and the tail are always attended to.
    """

    pages: int
    layers: int
    kv_heads: int


class EvictionPolicy(Protocol):
    """Chooses the pages that a draft may see; it only scores, and never touches the cache."""

    def select(self, stats: PageStats, budget: int) -> IntArray:
        """[layers, kv_heads, n] absolute page numbers, ascending, n * PAGE_SIZE <= budget unless budget is
        smaller than one page (one page is always kept when there is one).
        """
