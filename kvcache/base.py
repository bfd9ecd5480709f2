"""The contracts of this folder: where pages are stored, and how a policy picks some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tokenswift_py.kernels.base import PAGE_SIZE as PAGE_SIZE

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float64]


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
    """What a policy may look at when it scores.

    pages:   number of full committed pages to choose from; the partial page and the tail are always attended to.
    queries: [layers, heads, head_dim] of the last committed row; None unless the policy needs them.
    table:   [pages] page of the pool behind each of them, -1 where it was evicted from the target's cache and cannot
             be chosen; None where none was.
    pool:    where their keys lie.
    """

    pages: int
    layers: int
    kv_heads: int
    queries: FloatArray | None = None
    table: IntArray | None = None
    pool: PagePool | None = None

    @property
    def held(self) -> IntArray:
        """[n] the pages that can be chosen, ascending."""
        table = np.zeros(self.pages) if self.table is None else self.table
        return np.flatnonzero(table >= 0).astype(np.int32)


@dataclass(frozen=True)
class Committed:
    """Statistics of the rows that a pass has just committed, in order of position.

    mass:    [layers, rows, kv_heads, pages] attention probability on every absolute page, summed over the query heads
             of a KV head's group; None unless the policy needs it.
    queries: [rows, layers, heads, head_dim] after RoPE; None unless the policy needs them.
    """

    rows: int
    mass: FloatArray | None = None
    queries: FloatArray | None = None


class EvictionPolicy(Protocol):
    """Scores pages by how much a draft would miss them; it never touches the cache.

    needs: of "mass" and "queries", what full-view passes must report to `observe`.
    """

    name: str
    needs: frozenset[str]

    def observe(self, committed: Committed) -> None:
        """Learn from rows that were committed. What it learns may depend on the rows, not on how they were grouped."""

    def score(self, stats: PageStats) -> FloatArray:
        """[layers, kv_heads, pages], higher is kept first."""


def select(policy: EvictionPolicy, stats: PageStats, budget: int) -> IntArray:
    """[layers, kv_heads, n] absolute pages, ascending, for a view of `budget` tokens.

    The first page, whose tokens everything attends to, and the last ones are always in; the policy's scores choose
    the others, of equals the later page. n * PAGE_SIZE <= budget, but one page is kept where there is one.
    """
    held = stats.held
    count = min(max(1, budget // PAGE_SIZE), len(held))
    chosen: IntArray = held[best(np.asarray(policy.score(stats))[..., held], count)]
    return chosen


def best(scores: FloatArray, count: int) -> IntArray:
    """[..., count] indices into the last axis of scores [..., n], ascending: the rule by which pages are chosen."""
    pages = scores.shape[-1]
    recent = recent_of(count)
    scores = np.array(scores, np.float64)
    scores[..., pages - recent :] = np.inf
    if count > recent:
        scores[..., :1] = np.inf
    order = np.argsort(-scores[..., ::-1], axis=-1, kind="stable")
    chosen = pages - 1 - order[..., :count]
    return np.sort(chosen, axis=-1).astype(np.int32)


def recent_of(count: int) -> int:
    """How many of `count` chosen pages are the last ones: the text's own last sentences, whatever a policy thinks."""
    return min(count, max(1, min(RECENT_PAGES, count // 4)))


RECENT_PAGES = 4
