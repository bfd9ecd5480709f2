"""The KV cache of one sequence: a page table into a pool, a committed length, and provisional rows after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenswift_py.kvcache.base import PAGE_SIZE, Bytes, IntArray, PagePool, PageStats
from tokenswift_py.kvcache.memories.base import Memory


class KVCache:
    """Holds committed rows at positions 0 .. length - 1, and the provisional rows of the passes since the last commit.

    A committed row at position p lies in logical page p // PAGE_SIZE, lane p % PAGE_SIZE. The page table turns a
    logical page into a page of the pool. Provisional row r lies where position length + r would lie, whatever its own
    position is, because siblings of a tree share a position.

    A full page can be evicted (the lossy mode of law 6). Its logical number stays, its rows are gone for good, and
    later rows attend to the pages that are left.

    limit: first position that cannot be committed. It is the context, or a position before which pages must be evicted.
    memory: what the evicted rows were folded into, which later rows read too. None lets them go.
    """

    def __init__(self, pool: PagePool, context: int):
        self.pool = pool
        self.context = self.limit = context
        self.length = 0
        self._table = np.empty(-(-context // PAGE_SIZE) + 16, np.int32)
        self._held = 0
        self.evicted = 0  # how many pages were evicted
        self.memory: Memory | None = None
        self._tail_positions: list[int] = []
        self._tail_committable: list[bool] = []

    @property
    def tail_length(self) -> int:
        """The number of provisional rows."""
        return len(self._tail_positions)

    @property
    def full_pages(self) -> int:
        """The number of full committed pages."""
        return self.length // PAGE_SIZE

    @property
    def pages(self) -> IntArray:
        """The pool's page for each logical page, [pages], -1 where it was evicted. Valid until the cache changes."""
        return self._table[: self._held]

    @property
    def kept(self) -> IntArray:
        """The full committed pages that were not evicted, [n] ascending."""
        return np.flatnonzero(self.pages[: self.full_pages] >= 0).astype(np.int32)

    @property
    def nbytes(self) -> int:
        """The size of the pages held in bytes, shared ones included."""
        return (self._held - self.evicted) * self.pool.page_bytes

    def page_stats(self) -> PageStats:
        """Returns the facts that a policy may look at when it scores this cache's pages."""
        pool, table = self.pool, self.pages[: self.full_pages].copy()
        return PageStats(len(table), pool.layers, pool.kv_heads, table=table, pool=pool)

    def slots(self, rows: IntArray) -> IntArray:
        """Returns the pool's slots of rows, numbered from position 0 on. Provisional rows begin at `length`."""
        return (self.pages[rows // PAGE_SIZE] * PAGE_SIZE + rows % PAGE_SIZE).astype(np.int32)

    def append(self, positions: IntArray, committable: bool) -> IntArray:
        """Makes room for provisional rows that stand at `positions`, and returns their slots.

        committable: whether a full-view pass with the target's own weights writes the rows. Keys and values computed
        under a view, or on top of such rows, are wrong from the second layer on and must never be committed.
        Raises ValueError past the context and MemoryError when the pool is full. Both leave the cache unchanged.
        """
        if len(positions) and int(positions.max()) >= self.context:
            raise ValueError(f"position {int(positions.max())} is past the context of {self.context} tokens")
        start = self.length + self.tail_length
        self._grow(-(-(start + len(positions)) // PAGE_SIZE))
        self._tail_positions.extend(int(p) for p in positions)
        self._tail_committable.extend([committable] * len(positions))
        return self.slots(np.arange(start, start + len(positions), dtype=np.int32))

    def tail_committable(self, rows: Sequence[int]) -> bool:
        """Returns whether all these provisional rows were written so that they may be committed."""
        return all(self._tail_committable[row] for row in rows)

    def tail_positions(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Returns the positions of these provisional rows."""
        return tuple(self._tail_positions[row] for row in rows)

    def commit(self, path: Sequence[int]) -> None:
        """Keeps these provisional rows, contiguous and in this order, and drops the others.

        Raises ValueError, with nothing changed, for rows that do not continue the committed sequence position by
        position, that were not written by a full-view pass, or that stand past the limit.
        """
        if any(not 0 <= row < self.tail_length for row in path):
            raise ValueError(f"rows {list(path)} are not all among {self.tail_length} provisional ones")
        positions = self.tail_positions(path)
        if positions != tuple(range(self.length, self.length + len(path))):
            raise ValueError(f"rows at positions {list(positions)} do not continue a sequence of length {self.length}")
        if self.length + len(path) > self.limit:
            raise ValueError(f"rows past position {self.limit} cannot be committed before pages are evicted there")
        if not self.tail_committable(path):
            raise ValueError("rows computed under a partial view, or with draft weights, cannot be committed")
        source = np.asarray(path, np.int32) + self.length
        target = np.arange(self.length, self.length + len(path), dtype=np.int32)
        moved = source != target
        if moved.any():
            self.pool.move(self.slots(source[moved]), self.slots(target[moved]))
        self.length += len(path)
        self.drop_tail()

    def adopt(self, pages: Bytes) -> None:
        """Commits full pages that were dumped from a cache of the same tokens and numerics, after the pages there are.

        pages: [n, page_bytes]. Raises ValueError, with nothing changed, where the last page is not full, where there
        are provisional rows, and past the limit.
        """
        if self.tail_length or self.length % PAGE_SIZE or self.length + len(pages) * PAGE_SIZE > self.limit:
            raise ValueError(f"{len(pages)} pages do not continue {self.length} rows below the limit of {self.limit}")
        for data in pages:
            self._grow(self._held + 1)
            self.pool.restore(int(self._table[self._held - 1]), data)
            self.length += PAGE_SIZE

    def attach(self, pages: Sequence[int]) -> None:
        """Commits full pages of the pool that hold the next rows of this sequence. Their holders share them.

        Raises ValueError, with nothing changed, where `adopt` does.
        """
        if self.tail_length or self.length % PAGE_SIZE or self.length + len(pages) * PAGE_SIZE > self.limit:
            raise ValueError(f"{len(pages)} pages do not continue {self.length} rows below the limit of {self.limit}")
        self._reserve_table(self._held + len(pages))
        for page in pages:
            self.pool.share(page)
            self._table[self._held] = page
            self._held += 1
            self.length += PAGE_SIZE

    def evict(self, pages: Sequence[int]) -> None:
        """Gives these full pages back to the pool.

        Raises ValueError, with nothing changed, for a page that is not full or was evicted before. The same error comes
        while there are provisional rows, which were computed from these pages.
        """
        if self.tail_length:
            raise ValueError(f"pages cannot be evicted below {self.tail_length} provisional rows")
        if len(set(pages)) < len(pages) or not set(pages) <= set(self.kept.tolist()):
            raise ValueError(f"pages {list(pages)} are not all full and there")
        for page in pages:
            self.pool.release(int(self._table[page]))
            self._table[page] = -1
        self.evicted += len(pages)

    def drop_tail(self, keep_rows: int = 0) -> None:
        """Forgets the provisional rows but the first `keep_rows`. Pages that only they used go back to the pool."""
        del self._tail_positions[keep_rows:]
        del self._tail_committable[keep_rows:]
        keep = -(-(self.length + self.tail_length) // PAGE_SIZE)
        for page in self._table[keep : self._held]:
            if page >= 0:
                self.pool.release(int(page))
        self._held = min(keep, self._held)

    def fork(self) -> KVCache:
        """Returns a second cache with the same committed rows. Full pages are shared, the partial page is copied.

        Raises MemoryError, with no page taken, when the pool is full.
        """
        other = KVCache(self.pool, self.context)
        other.length, other.limit, other.evicted = self.length, self.limit, self.evicted
        other.memory = self.memory.copy() if self.memory else None
        for page in self.pages[self.kept]:
            self.pool.share(int(page))
        other._table[: self.full_pages] = self.pages[: self.full_pages]
        other._held = self.full_pages
        try:
            other._grow(-(-self.length // PAGE_SIZE))
        except MemoryError:
            other.release()
            raise
        lanes = np.arange(self.full_pages * PAGE_SIZE, self.length, dtype=np.int32)
        if len(lanes):
            self.pool.move(self.slots(lanes), other.slots(lanes))
        return other

    def _reserve_table(self, pages: int) -> None:
        if pages > len(self._table):
            self._table = np.resize(self._table, 2 * pages)

    def _grow(self, pages: int) -> None:
        self._reserve_table(pages)
        before = self._held
        try:
            while self._held < pages:
                self._table[self._held] = self.pool.allocate()
                self._held += 1
        except MemoryError:
            while self._held > before:
                self._held -= 1
                self.pool.release(int(self._table[self._held]))
            raise

    def release(self) -> None:
        """Gives every page back to the pool. The cache is empty afterwards."""
        self.length = 0
        self.drop_tail()
        self.evicted = 0
        if self.memory is not None:
            self.memory.clear()
