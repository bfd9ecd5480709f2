"""The contracts of this folder: where pages are stored, and how a policy picks some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from tokenswift_py.kernels.base import PAGE_SIZE as PAGE_SIZE
from tokenswift_py.kernels.base import QueryTurns

IntArray = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float64]


class PagePool(Protocol):
    """Storage for pages of `PAGE_SIZE` tokens, all layers and KV heads together. A slot is page * PAGE_SIZE + lane."""

    layers: int
    kv_heads: int
    page_bytes: int

    @property
    def pages(self) -> int:
        """How many pages there are."""

    @property
    def free(self) -> int:
        """How many pages nobody holds."""

    def holders(self, page: int) -> int:
        """How many caches hold this page."""

    def allocate(self) -> int:
        """A page nobody holds; MemoryError when the pool is full."""

    def share(self, page: int) -> None:
        """One more holder of `page`."""

    def release(self, page: int) -> None:
        """One holder fewer; without holders the page is free again."""

    def move(self, source: IntArray, target: IntArray) -> None:
        """Copy rows between slots, as if all were read before any is written."""

    def dump(self, page: int) -> Bytes:
        """[page_bytes] a copy of a full page's keys and values, in the layout of this pool's numerics."""

    def restore(self, page: int, data: Bytes) -> None:
        """Write into a page that was just allocated what `dump` gave, of a pool of the same shape and numerics."""

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
    """What a policy may look at when it scores.

    pages: number of full committed pages to choose from; the partial page and the tail are always attended to.
    table: [pages] page of the pool behind each of them, -1 where it was evicted from the target's cache and cannot be
           chosen; None where none was and the policy reads no keys.
    pool:  where their keys lie.
    """

    pages: int
    layers: int
    kv_heads: int
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

    start:   position of the first row; row i stands at start + i.
    mass:    [layers, rows, kv_heads, pages] attention probability on every absolute page, summed over the query heads
             of a KV head's group; None unless the policy needs it.
    queries: [rows, layers, heads, head_dim] after RoPE; None unless the policy needs them.
    turns:   how these queries meet far keys; None where as they are.
    """

    start: int
    rows: int
    mass: FloatArray | None = None
    queries: FloatArray | None = None
    turns: QueryTurns | None = None


class EvictionPolicy(Protocol):
    """Scores pages by how much a draft would miss them, for one sequence; it never touches the cache.

    What it has learnt is a function of the rows, to the bit: not of how they were grouped into passes, and not of when
    it was asked for scores. A page of which it knows nothing (no row it was shown attended to it) scores 0; before
    the first row all pages do, and `select` keeps the latest.

    needs: of "mass" and "queries", what full-view passes must report to `observe`; and "bounds", where `score` asks the
           pool for bounds of each page's keys, which take memory.
    """

    name: str
    needs: frozenset[str]

    def observe(self, committed: Committed) -> None:
        """Learn from rows that were committed. Keeps nothing of the arrays, which the next pass may overwrite."""

    def score(self, stats: PageStats) -> FloatArray:
        """[layers, kv_heads, pages], higher is kept first."""


def select(policy: EvictionPolicy, stats: PageStats, budget: int) -> IntArray:
    """[layers, kv_heads, n] absolute pages, ascending, for a view of `budget` tokens.

    The first page, whose tokens everything attends to, and the last ones are always in; the policy's scores choose
    the others, of equals the later page. n * PAGE_SIZE <= budget, but one page is kept where there is one.
    """
    held = stats.held
    count = min(max(1, budget // PAGE_SIZE), len(held))
    scores = policy.score(stats)
    if len(held) == stats.pages:
        return best(scores, count)
    chosen: IntArray = held[best(scores[..., held], count)]
    return chosen


def best(scores: FloatArray, count: int) -> IntArray:
    """[..., count] indices into the last axis of scores [..., n], ascending: the rule by which pages are chosen."""
    pages, recent = scores.shape[-1], recent_of(count)
    if count == 0:
        return np.zeros((*scores.shape[:-1], 0), np.int32)
    worth: npt.NDArray[np.float64] = np.fmax(scores, -np.inf)  # a copy; what is no number comes last
    worth[..., pages - recent :] = np.inf
    if count > recent:
        worth[..., :1] = np.inf
    edge = np.partition(worth, pages - count, axis=-1)[..., pages - count, None]  # the worst that is chosen
    chosen, equal = worth > edge, worth == edge
    wanted = count - chosen.sum(-1, keepdims=True)
    chosen |= equal & (np.cumsum(equal[..., ::-1], axis=-1, dtype=np.int32)[..., ::-1] <= wanted)
    indices: IntArray = (np.flatnonzero(chosen) % pages).reshape(*chosen.shape[:-1], count).astype(np.int32)
    return indices


def recent_of(count: int) -> int:
    """How many of `count` chosen pages are the last ones: the text's own last sentences, whatever a policy thinks."""
    return min(count, max(1, min(RECENT_PAGES, count // 4)))


RECENT_PAGES = 4
