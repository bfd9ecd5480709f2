"""The KV cache keeps exactly the committed rows, leaks no page, and refuses what may not be committed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from tokenswift_py.kernels.base import PAGE_SIZE
from tokenswift_py.kvcache.base import Committed, PageStats, select
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import TorchPagePool
from tokenswift_py.kvcache.policies.recent import Recent
from tokenswift_py.kvcache.view import PageView

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 3
CONTEXT = 3 * PAGE_SIZE - 7


def new_pool(pages: int = 32) -> TorchPagePool:
    pool = TorchPagePool(LAYERS, KV_HEADS, HEAD_DIM, pages, torch.float32, torch.device("cpu"))
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    return pool


def row_of(mark: int) -> torch.Tensor:
    """Returns a tensor [1, kv_heads, head_dim] whose elements all differ."""
    return mark * 100 + torch.arange(KV_HEADS * HEAD_DIM, dtype=torch.float32).view(1, KV_HEADS, HEAD_DIM)


def append(cache: KVCache, positions: Sequence[int], marks: Sequence[int], committable: bool = True) -> None:
    """Appends provisional rows whose keys and values carry a mark."""
    slots = cache.append(np.array(positions, np.int32), committable)
    for slot, mark in zip(slots, marks, strict=True):
        for layer in range(LAYERS):
            row = row_of(mark) + 7 * layer
            cache.pool.write(layer, torch.tensor([slot]), row, -row)


def contents(cache: KVCache) -> list[int]:
    """Returns the marks of the committed rows that were not evicted.

    It checks that every layer, every head, and keys and values agree.
    """
    rows = np.arange(cache.length, dtype=np.int32)
    there = cache.pages[rows // PAGE_SIZE] >= 0
    slots = torch.from_numpy(cache.slots(rows[there]).astype(np.int64))
    marks: list[int] = []
    for layer in range(LAYERS):
        keys = cache.pool.keys[layer].flatten(1, 2)[:, slots].transpose(0, 1)
        values = cache.pool.values[layer].flatten(1, 2)[:, slots].transpose(0, 1)
        assert torch.equal(values, -keys)
        marks = [int((row[0, 0] - 7 * layer) // 100) for row in keys]
        assert torch.equal(keys, torch.cat([row_of(mark) + 7 * layer for mark in marks] or [keys]))
    return marks


def state(cache: KVCache) -> tuple[Any, ...]:
    return cache.length, cache.tail_length, cache.pages.tolist(), cache.nbytes, cache.pool.in_use


def filled(length: int, pool: TorchPagePool | None = None, context: int = CONTEXT) -> KVCache:
    cache = KVCache(pool or new_pool(), context)
    append(cache, range(length), range(length))
    cache.commit(range(length))
    return cache


class CacheAgainstLists(RuleBasedStateMachine):
    """A model of the cache: a list of committed rows and a list of provisional ones."""

    caches: Bundle[int] = Bundle("caches")

    @initialize(target=caches)
    def first(self) -> int:
        self.pool = new_pool(64)
        self.marks = 0
        self.real = [KVCache(self.pool, CONTEXT)]
        self.committed: list[list[int]] = [[]]
        self.tail: list[list[tuple[int, int, int]]] = [[]]  # (position, mark, parent row)
        self.evicted: list[set[int]] = [set()]
        return 0

    def fresh(self, count: int) -> list[int]:
        self.marks += count
        return list(range(self.marks - count, self.marks))

    @rule(cache=caches, count=st.integers(1, 90))
    def prefill(self, cache: int, count: int) -> None:
        self.real[cache].drop_tail()
        self.tail[cache] = []
        start = len(self.committed[cache])
        count = min(count, CONTEXT - start)
        marks = self.fresh(count)
        append(self.real[cache], range(start, start + count), marks)
        self.real[cache].commit(range(count))
        self.committed[cache] += marks

    @rule(cache=caches, shape=st.lists(st.integers(0, 100), min_size=1, max_size=12))
    def tree(self, cache: int, shape: list[int]) -> None:
        """Appends rows, each of which hangs from an earlier one, or from the committed text."""
        tail = self.tail[cache]
        added: list[tuple[int, int, int]] = []
        for number, choice in enumerate(shape):
            parent = choice % (len(tail) + number + 1) - 1
            position = len(self.committed[cache]) if parent < 0 else (tail + added)[parent][0] + 1
            if position < CONTEXT:
                added.append((position, *self.fresh(1), parent))
            else:
                added.append((len(self.committed[cache]), *self.fresh(1), -1))
        if all(position < CONTEXT for position, _, _ in added):
            append(self.real[cache], [row[0] for row in added], [row[1] for row in added])
            self.tail[cache] = tail + added

    @rule(cache=caches, choice=st.integers(0, 1000))
    def commit(self, cache: int, choice: int) -> None:
        tail, path = self.tail[cache], []
        row = choice % (len(tail) + 1) - 1
        while row >= 0:
            path.insert(0, row)
            row = tail[row][2]
        self.real[cache].commit(path)
        self.committed[cache] += [tail[row][1] for row in path]
        self.tail[cache] = []

    @rule(cache=caches)
    def drop_tail(self, cache: int) -> None:
        self.real[cache].drop_tail()
        self.tail[cache] = []

    @rule(target=caches, cache=caches)
    def fork(self, cache: int) -> int:
        if len(self.real) == 4:
            return cache
        self.real.append(self.real[cache].fork())
        self.committed.append(list(self.committed[cache]))
        self.tail.append([])
        self.evicted.append(set(self.evicted[cache]))
        return len(self.real) - 1

    @rule(cache=caches)
    def release(self, cache: int) -> None:
        self.real[cache].release()
        self.committed[cache], self.tail[cache], self.evicted[cache] = [], [], set()

    @rule(cache=caches, choice=st.integers(0, 100))
    def evict(self, cache: int, choice: int) -> None:
        self.drop_tail(cache)
        left = [page for page in range(len(self.committed[cache]) // PAGE_SIZE) if page not in self.evicted[cache]]
        if left:
            page = left[choice % len(left)]
            self.real[cache].evict([page])
            self.evicted[cache].add(page)

    @invariant()
    def agrees(self) -> None:
        held = set()
        for cache, committed, tail, gone in zip(self.real, self.committed, self.tail, self.evicted, strict=True):
            assert contents(cache) == [mark for row, mark in enumerate(committed) if row // PAGE_SIZE not in gone]
            assert cache.tail_length == len(tail)
            assert cache.full_pages == len(committed) // PAGE_SIZE
            assert len(cache.pages) == -(-(len(committed) + len(tail)) // PAGE_SIZE)
            assert cache.evicted == len(gone)
            assert cache.kept.tolist() == [page for page in range(cache.full_pages) if page not in gone]
            assert cache.nbytes == (len(cache.pages) - len(gone)) * 2 * LAYERS * KV_HEADS * PAGE_SIZE * HEAD_DIM * 4
            held |= {page for page in cache.pages.tolist() if page >= 0}
        assert self.pool.in_use == len(held)

    def teardown(self) -> None:
        for cache in self.real:
            cache.release()
        assert self.pool.in_use == 0


TestCacheAgainstLists = CacheAgainstLists.TestCase
TestCacheAgainstLists.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


def test_a_path_through_a_tree_is_committed_across_a_page_boundary() -> None:
    cache = filled(PAGE_SIZE - 2)
    # Two chains are interleaved: even rows are one, odd rows the other.
    positions = [PAGE_SIZE - 2 + row // 2 for row in range(8)]
    append(cache, positions, range(500, 508))
    cache.commit([1, 3, 5, 7])
    assert contents(cache) == [*range(PAGE_SIZE - 2), 501, 503, 505, 507]
    assert cache.full_pages == 1 and cache.tail_length == 0 and len(cache.pages) == 2


def test_a_fork_shares_full_pages_and_copies_the_partial_one() -> None:
    pool = new_pool()
    cache = filled(2 * PAGE_SIZE + 5, pool)
    append(cache, [2 * PAGE_SIZE + 5], [900])
    other = cache.fork()
    assert other.pages[:2].tolist() == cache.pages[:2].tolist()
    assert other.pages[2] != cache.pages[2] and pool.in_use == 4
    assert other.tail_length == 0
    append(other, [2 * PAGE_SIZE + 5], [901])
    other.commit([0])
    cache.commit([0])
    assert contents(cache)[-1] == 900 and contents(other)[-1] == 901
    cache.release()
    assert contents(other) == [*range(2 * PAGE_SIZE + 5), 901]
    other.release()
    assert pool.in_use == 0


def test_a_fork_that_finds_no_room_holds_no_page() -> None:
    pool = new_pool(2)
    cache = filled(PAGE_SIZE + 5, pool)
    with pytest.raises(MemoryError):
        cache.fork()
    cache.release()
    assert pool.in_use == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([0, 2], r"positions \[70, 70\] do not continue a sequence of length 70"),
        ([1], "do not continue"),
        ([1, 0], "do not continue"),
        ([0, 3], "cannot be committed"),
        ([0, 4], "not all among 4"),
    ],
)
def test_a_refused_commit_changes_nothing(path: list[int], message: str) -> None:
    cache = filled(70)
    append(cache, [70, 71, 70], [700, 701, 702])
    append(cache, [71], [703], committable=False)
    before = state(cache)
    with pytest.raises(ValueError, match=message):
        cache.commit(path)
    assert state(cache) == before and contents(cache) == list(range(70))
    cache.commit([0, 1])
    assert contents(cache)[70:] == [700, 701]


def test_the_last_provisional_row_is_not_row_minus_one() -> None:
    cache = filled(70)
    append(cache, [70], [700])
    with pytest.raises(ValueError, match="not all among 1"):
        cache.commit([-1])
    assert cache.length == 70 and cache.tail_length == 1


def test_rows_past_the_context_are_refused_and_leave_the_cache_as_it_was() -> None:
    cache = filled(CONTEXT - 1)
    append(cache, [CONTEXT - 1], [1])
    before = state(cache)
    with pytest.raises(ValueError, match=f"position {CONTEXT} is past the context of {CONTEXT} tokens"):
        cache.append(np.array([CONTEXT - 1, CONTEXT], np.int32), True)
    assert state(cache) == before


def test_many_rows_may_stand_side_by_side_at_the_very_end_of_the_context() -> None:
    cache = filled(CONTEXT - 1)
    append(cache, [CONTEXT - 1] * 300, range(1000, 1300))
    cache.commit([299])
    assert contents(cache) == [*range(CONTEXT - 1), 1299]


def test_a_full_pool_leaves_the_cache_as_it_was() -> None:
    pool = new_pool(3)
    cache = filled(PAGE_SIZE, pool)
    append(cache, [PAGE_SIZE], [640])
    before = state(cache)
    with pytest.raises(MemoryError, match="all 3 KV pages are in use"):
        cache.append(np.full(3 * PAGE_SIZE, PAGE_SIZE + 1, np.int32), True)
    assert state(cache) == before
    append(cache, [PAGE_SIZE + 1], [641])
    cache.commit([0, 1])
    assert contents(cache)[PAGE_SIZE:] == [640, 641]


def test_an_eviction_frees_the_pages_and_moves_nothing() -> None:
    pool = new_pool()
    cache = filled(2 * PAGE_SIZE + 9, pool)
    cache.evict([0])
    assert cache.pages.tolist() == [-1, 1, 2] and cache.kept.tolist() == [1] and pool.in_use == 2
    assert contents(cache) == list(range(PAGE_SIZE, 2 * PAGE_SIZE + 9))
    other = cache.fork()
    cache.release()
    assert contents(other) == list(range(PAGE_SIZE, 2 * PAGE_SIZE + 9))
    other.release()
    assert pool.in_use == 0


@pytest.mark.parametrize("pages", [[2], [0, 2], [0, 0], [-1], [3], [1]])
def test_only_full_pages_that_are_there_are_evicted(pages: list[int]) -> None:
    cache = filled(2 * PAGE_SIZE + 9)
    cache.evict([1])
    before = state(cache)
    with pytest.raises(ValueError, match="not all full and there"):
        cache.evict(pages)
    append(cache, [2 * PAGE_SIZE + 9], [5])
    with pytest.raises(ValueError, match="below 1 provisional rows"):
        cache.evict([0])
    cache.drop_tail()
    assert state(cache) == before


def test_nothing_is_committed_past_the_limit() -> None:
    cache = filled(70)
    cache.limit = 72
    append(cache, [70, 71, 72], [700, 701, 702])
    with pytest.raises(ValueError, match="past position 72 cannot be committed"):
        cache.commit([0, 1, 2])
    cache.commit([0, 1])
    assert contents(cache)[70:] == [700, 701]


def test_evicted_pages_are_not_chosen() -> None:
    class Fond:
        """A policy that likes evicted pages best."""

        name, needs = "fond", frozenset[str]()

        def observe(self, committed: Committed) -> None:
            pass

        def score(self, stats: PageStats) -> np.ndarray:
            scores = np.zeros((stats.layers, stats.kv_heads, stats.pages))
            scores[..., [1, 2]] = [9.0, np.nan]
            return scores

    table = np.array([3, -1, -1, 5, 6, -1, 7], np.int32)
    stats = PageStats(7, LAYERS, KV_HEADS, table=table)
    for budget, chosen in ((9 * PAGE_SIZE, [0, 3, 4, 6]), (3 * PAGE_SIZE, [0, 4, 6]), (PAGE_SIZE, [6])):
        assert (select(Fond(), stats, budget) == np.array(chosen)).all()


def test_a_pool_refuses_to_release_twice_or_share_a_free_page() -> None:
    pool = new_pool()
    page = pool.allocate()
    pool.share(page)
    pool.release(page)
    assert pool.in_use == 1
    pool.release(page)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(page)
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share(page)


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        (np.zeros((2, 3)), "layers, kv_heads, pages"),
        ([[[0, 2, 1]]], "ascending"),
        ([[[0, 0]]], "without repeats"),
        ([[[-1, 0]]], "ascending"),
    ],
)
def test_what_is_no_view_is_refused(pages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PageView(pages)


def test_a_view_is_a_copy_that_cannot_be_changed() -> None:
    pages = np.array([[[0, 3]]], np.int32)
    view = PageView(pages)
    pages[:] = 7
    assert view.pages.tolist() == [[[0, 3]]]
    with pytest.raises(ValueError, match="read-only"):
        view.pages[0, 0, 0] = 1
    assert PageView.all(2, 3, 4).pages.tolist() == [[[0, 1, 2, 3]] * 3] * 2
    assert PageView.all(2, 3, 0).pages.shape == (2, 3, 0)


@pytest.mark.parametrize(
    ("pages", "budget", "chosen"),
    [
        (10, 4 * PAGE_SIZE, [0, 7, 8, 9]),
        (10, 5 * PAGE_SIZE - 1, [0, 7, 8, 9]),
        (10, 2 * PAGE_SIZE, [0, 9]),
        (10, PAGE_SIZE, [9]),
        (10, 1, [9]),
        (3, 100 * PAGE_SIZE, [0, 1, 2]),
        (3, 3 * PAGE_SIZE, [0, 1, 2]),
        (1, 10 * PAGE_SIZE, [0]),
        (0, 10 * PAGE_SIZE, []),
    ],
)
def test_recent_keeps_the_sinks_and_the_latest_pages_within_the_budget(
    pages: int, budget: int, chosen: list[int]
) -> None:
    selected = select(Recent(), PageStats(pages, LAYERS, KV_HEADS), budget)
    assert selected.shape == (LAYERS, KV_HEADS, len(chosen))
    assert (selected == np.array(chosen)).all()
    PageView(selected)
