"""The contracts of this folder: where pages are stored, and how a policy picks some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from tokenswift_py.kernels.base import MOST_LINKS as MOST_LINKS
from tokenswift_py.kernels.base import PAGE_SIZE as PAGE_SIZE
from tokenswift_py.kernels.base import QueryTurns, on_device

IntArray = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float64]


class PagePool(Protocol):
    """Storage for pages of `PAGE_SIZE` tokens, all layers and KV heads together. A slot is page * PAGE_SIZE + lane."""

    layers: int
    kv_heads: int
    page_bytes: int
    idle: int  # how many pages are only kept
    on_idle: Callable[[int], None]  # a function that gets each page that becomes one of them

    @property
    def pages(self) -> int:
        """The number of pages."""

    @property
    def free(self) -> int:
        """The number of pages that nobody holds."""

    def holders(self, page: int) -> int:
        """The number of caches that hold this page."""

    def allocate(self) -> int:
        """Returns a page that nobody holds, with one holder. Raises MemoryError when the pool is full."""

    def share(self, page: int) -> None:
        """Counts one more holder of `page`."""

    def release(self, page: int) -> None:
        """Counts one holder of `page` fewer. Without holders the page is free again."""

    def keep(self, page: int) -> None:
        """Counts the page's keeper as one more holder. The page is idle while it has no other."""

    def give_up(self, page: int) -> None:
        """Counts the page's keeper no more."""

    def move(self, source: IntArray, target: IntArray) -> None:
        """Copies rows between slots, with the result of reading all of them before writing any."""

    def dump(self, page: int) -> Bytes:
        """Returns a copy of a full page's keys and values, [page_bytes], in the layout of this pool's numerics."""

    def restore(self, page: int, data: Bytes) -> None:
        """Writes the bytes that `dump` gave into a page that was just allocated.

        They must come from a pool of the same shape and numerics.
        """

    def key_bounds(self, pages: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns each page's least and greatest key by dimension, [layers, kv_heads, n, head_dim] fp32, read-only.

        pages: [n] pages of the pool, full and committed. A page's bounds are computed once, so only new pages cost
        time. The bounds limit any query's product with the page's keys (Quest, arXiv 2406.10774, section 3) to
        q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT.
        """

    def key_scores(self, pages: IntArray, queries: torch.Tensor) -> torch.Tensor:
        """Returns the largest product of a query with a key of each page, [layers, kv_heads, n] fp32.

        pages: [n] pages of the pool, full and committed. queries: [layers, heads, head_dim], as in `Output.queries`.
        A key's products are first summed over the query heads of its KV head (TokenSwift, arXiv 2502.18890, section
        3.3). This reads all keys of the pages: half of what plain decoding reads of the KV cache for one token.
        """

    def page_keys(self, layer: int, pages: IntArray) -> torch.Tensor:
        """Returns a layer's keys of some pages, [kv_heads, n, PAGE_SIZE, head_dim] fp32, to be read only.

        pages: [n] pages of the pool, full and committed.
        """


@dataclass(frozen=True)
class PageStats:
    """The facts that a policy may look at when it scores pages.

    pages: number of full committed pages to choose from. The partial page and the tail are always attended to.
    table: [pages] the pool's page for each of them, -1 where it was evicted from the target's cache and cannot be
           chosen. None is allowed where no page was evicted and the policy reads no keys.
    pool:  the pool that holds their keys.
    """

    pages: int
    layers: int
    kv_heads: int
    table: IntArray | None = None
    pool: PagePool | None = None

    @property
    def held(self) -> IntArray:
        """The pages that can be chosen, [n] ascending."""
        table = np.zeros(self.pages) if self.table is None else self.table
        return np.flatnonzero(table >= 0).astype(np.int32)


@dataclass(frozen=True)
class Committed:
    """The statistics of the rows that a pass has just committed, ordered by position.

    start:   position of the first row. Row i stands at start + i.
    mass:    [layers, rows, kv_heads, pages] attention probability on every absolute page, summed over the query heads
             of a KV head's group. None unless the policy needs it.
    queries: [rows, layers, heads, head_dim] after RoPE. None unless the policy needs them.
    turns:   rule by which these queries meet far keys. None where they meet all keys unchanged.
    """

    start: int
    rows: int
    mass: FloatArray | None = None
    queries: FloatArray | None = None
    turns: QueryTurns | None = None


class EvictionPolicy(Protocol):
    """Scores the pages of one sequence by how much a draft would miss them. It never changes the cache.

    A policy's state is a function of the rows, to the bit. It depends neither on how the rows were grouped into passes
    nor on when scores were asked for. A page to which no row attended that the policy has seen scores 0. Before the
    first row all pages score 0, and `select` keeps the latest.

    needs: "mass" and "queries" name statistics that full-view passes must report to `observe`. "bounds" says that
           `score` asks the pool for bounds of each page's keys, which take memory. "index" says that the policy keeps
           an index of each page's keys itself. Its class tells the size, for each layer and KV head, with
           `index_bytes(head_dim)`.
    """

    name: str
    needs: frozenset[str]

    def observe(self, committed: Committed) -> None:
        """Learns from rows that were committed. Keeps no reference to the arrays, which the next pass may overwrite."""

    def score(self, stats: PageStats) -> FloatArray:
        """Returns a score for each page, [layers, kv_heads, pages]. Pages with higher scores are kept first."""


@runtime_checkable
class OnDevice(Protocol):
    """A policy that scores where the statistics lie, so that of them only the chosen pages come to the host."""

    def observe_there(self, mass: torch.Tensor) -> None:
        """Learns from rows that were committed, as `observe` does. mass: that of `Committed`, on a device."""

    def score_there(self, stats: PageStats) -> torch.Tensor | None:
        """Returns what `score` returns, on the device; None where the policy has seen nothing there."""


def select(policy: EvictionPolicy, stats: PageStats, budget: int) -> IntArray:
    """Chooses the pages of a view of `budget` tokens: [layers, kv_heads, n] absolute pages, ascending.

    The first page, to whose tokens every row attends, and the last ones are always in. The policy's scores choose the
    others, and of equal scores the later page wins. n * PAGE_SIZE <= budget, except that one page is always kept where
    there is one.
    """
    there = select_there(policy, stats, budget)
    if there is not None:
        pages: IntArray = there.cpu().numpy()  # this is the only wait for the device
        return pages
    held, scores = stats.held, policy.score(stats)
    count = chosen_of(budget, len(held))
    if len(held) == stats.pages:
        return best(scores, count)
    chosen: IntArray = held[best(scores[..., held], count)]
    return chosen


def select_there(policy: EvictionPolicy, stats: PageStats, budget: int) -> torch.Tensor | None:
    """Returns what `select` returns, on the device on which the policy scores, and without a wait for it. None where it
    scores on the host."""
    there = policy.score_there(stats) if isinstance(policy, OnDevice) else None
    if there is None:
        return None
    held = stats.held
    if len(held) == stats.pages:
        return best_there(there, chosen_of(budget, len(held)))
    kept = on_device(held, there.device)
    return kept[best_there(there[..., kept.long()], chosen_of(budget, len(held))).long()]


def chosen_of(budget: int, pages: int) -> int:
    """Returns how many of so many pages a view of `budget` tokens has."""
    return min(max(1, budget // PAGE_SIZE), pages)


def best(scores: FloatArray, count: int) -> IntArray:
    """Chooses pages by their scores [..., n]: returns [..., count] indices into the last axis, ascending."""
    pages, recent = scores.shape[-1], recent_of(count)
    if count == 0:
        return np.zeros((*scores.shape[:-1], 0), np.int32)
    worth: npt.NDArray[np.float64] = np.fmax(scores, -np.inf)  # a copy, in which NaN comes last
    worth[..., pages - recent :] = np.inf
    if count > recent:
        worth[..., :1] = np.inf
    edge = np.partition(worth, pages - count, axis=-1)[..., pages - count, None]  # the lowest score that is chosen
    chosen, equal = worth > edge, worth == edge
    wanted = count - chosen.sum(-1, keepdims=True)
    chosen |= equal & (np.cumsum(equal[..., ::-1], axis=-1, dtype=np.int32)[..., ::-1] <= wanted)
    indices: IntArray = (np.flatnonzero(chosen) % pages).reshape(*chosen.shape[:-1], count).astype(np.int32)
    return indices


def best_there(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Does what `best` does, on the device of the scores, and without a wait for it."""
    pages, recent = scores.shape[-1], recent_of(count)
    if count == 0:
        return scores.new_zeros((*scores.shape[:-1], 0), dtype=torch.int32)
    worth = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)  # a copy, in which NaN comes last
    worth[..., pages - recent :] = torch.inf
    if count > recent:
        worth[..., :1] = torch.inf
    edge = worth.topk(count, sorted=False).values.amin(-1, keepdim=True)  # the lowest score that is chosen
    chosen, equal = worth > edge, worth == edge
    wanted = count - chosen.sum(-1, keepdim=True)
    chosen |= equal & (equal.flip(-1).cumsum(-1).flip(-1) <= wanted)
    places = torch.arange(pages, dtype=torch.int32, device=scores.device)
    return torch.where(chosen, places, pages).topk(count, largest=False, sorted=True).values.int()


def recent_of(count: int) -> int:
    """Returns how many of `count` chosen pages are the last ones. They are in whatever their scores are."""
    return min(count, max(1, min(RECENT_PAGES, count // 4)))


RECENT_PAGES = 4
