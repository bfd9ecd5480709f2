"""The contracts of this folder: where pages are stored, and how a policy picks some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

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

    def key_bounds(self, pages: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the greatest key of each page, [layers, kv_heads, n, head_dim] fp32, not to be written to.

        pages: [n] pages of the pool, full and committed. A page's bounds are computed once, so this is cheap but for
        pages that are new. They bound any query's product with the page's keys (Quest, arXiv 2406.10774, section 3):
        q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT.
        """

    def key_scores(self, pages: IntArray, queries: torch.Tensor) -> torch.Tensor:
        """The largest product of a query with a key of each page, [layers, kv_heads, n] fp32, each key's products
        summed over the query heads of its KV head (TokenSwift, arXiv 2502.18890, section 3.3).

        pages: [n] pages of the pool, full and committed. queries: [layers, heads, head_dim], as in `Output.queries`.
        Reads all their keys: half of what plain decoding reads of the KV cache for one token.
        """


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
