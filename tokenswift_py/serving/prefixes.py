"""Full pages of earlier texts, which are found again by their tokens. A prompt that begins alike shares them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import takewhile

import numpy as np

from tokenswift_py.core import IntArray
from tokenswift_py.kvcache.base import PAGE_SIZE, PagePool
from tokenswift_py.kvcache.cache import KVCache


@dataclass
class Prefix:
    """The full pages of one text, and the hashes by which they are known.

    digests: the hash of all tokens up to the end of each page.
    told:    the number of pages that were told to `Prefixes.keep`.
    """

    digests: list[bytes] = field(default_factory=list)
    told: int = 0

    def cover(self, tokens: IntArray) -> None:
        """Hashes the full pages of these tokens that were not hashed before. The tokens are the first ones of the
        text."""
        last = self.digests[-1] if self.digests else b""
        for start in range(len(self.digests) * PAGE_SIZE, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
            last = hashlib.sha256(last + tokens[start : start + PAGE_SIZE].tobytes()).digest()
            self.digests.append(last)


@dataclass
class KnownPage:
    """A page that is known.

    page:  the page's number in the pool.
    depth: the number of pages before it in its text.
    used:  the time when it was last of use.
    """

    page: int
    depth: int
    digest: bytes
    used: int = 0

    @property
    def rank(self) -> tuple[int, int, bytes]:
        """Returns the rank of the page. The page of lowest rank is given back first."""
        return self.used, -self.depth, self.digest


class Prefixes:
    """Holds the committed full pages of texts, so that they stay while other texts do not need the memory.

    A page is known by a hash of all tokens up to its end. Under one numerics contract these tokens determine the page's
    keys and values (law 1), whoever computed them. All caches must be in `pool`, which has no other keeper, and must
    belong to one model.
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        self.hits = 0  # the number of tokens that were not computed again
        self.wanted: Prefix | None = None  # the prefix of a text that will soon begin: its pages are given back last
        self._known: dict[bytes, KnownPage] = {}
        self._by_page: dict[int, KnownPage] = {}
        self._time = 0
        # The ranks of idle pages. A rank is out of date if its page is gone, was used since, or is held again.
        self._line: list[tuple[int, int, bytes]] = []
        pool.on_idle = lambda page: self._stand_in_line(self._by_page[page])

    def find(self, prefix: Prefix) -> list[int]:
        """Returns the known pages of a text, up to the first that is not known."""
        return [known.page for known in takewhile(bool, map(self._known.get, prefix.digests)) if known]

    def attach(self, cache: KVCache, pages: Sequence[int], prefix: Prefix) -> None:
        """Lets an empty cache begin with the pages that `find` returned. The row of the last token has to be computed,
        so the prefix does not cover this token."""
        cache.attach(pages)
        self._touch(prefix.digests[: len(pages)])

    def keep(self, cache: KVCache, tokens: IntArray, prefix: Prefix) -> None:
        """Makes the full pages of a cache known."""
        if cache.full_pages <= prefix.told:
            return
        prefix.cover(tokens[: cache.full_pages * PAGE_SIZE])
        for depth in range(prefix.told, cache.full_pages):
            page, digest = int(cache.pages[depth]), prefix.digests[depth]
            if page >= 0 and digest not in self._known:
                self.pool.keep(page)
                self._known[digest] = self._by_page[page] = KnownPage(page, depth, digest)
        prefix.told = cache.full_pages
        self._touch(prefix.digests[: cache.full_pages])

    @property
    def idle(self) -> int:
        """Returns how many pages are held only for later texts."""
        return self.pool.idle

    def freed(self, caches: Sequence[KVCache]) -> int:
        """Returns how many pages are held by these caches and by no other. They are free, or idle, when all of these
        caches have given them back."""
        held = [cache.pages[cache.pages >= 0] for cache in caches]
        pages, holders = np.unique(np.concatenate([np.empty(0, np.int32), *held]), return_counts=True)
        counts = zip(pages.tolist(), holders.tolist(), strict=True)
        return sum(self.pool.holders(page) == count + (page in self._by_page) for page, count in counts)

    def make_room(self, pages: int) -> None:
        """Gives back this many idle pages, or all there are. The longest unused ones go first. Of one text, the last
        pages go first."""
        self._time += 1
        while pages > 0 and self._line:
            rank = heappop(self._line)
            known = self._known.get(rank[-1])
            if known is None or known.rank != rank or self.pool.holders(known.page) > 1:
                continue
            if known.used < self._time and self._is_wanted(known):
                known.used = self._time
                self._stand_in_line(known)
                continue
            del self._known[known.digest], self._by_page[known.page]
            self.pool.give_up(known.page)
            pages -= 1

    def _is_wanted(self, known: KnownPage) -> bool:
        wanted = self.wanted.digests if self.wanted else ()
        return known.depth < len(wanted) and wanted[known.depth] == known.digest

    def _touch(self, digests: Sequence[bytes]) -> None:
        """Notes that these pages are of use now."""
        self._time += 1
        for digest in digests:
            if (known := self._known.get(digest)) is not None:
                known.used = self._time
                if self.pool.holders(known.page) == 1:
                    self._stand_in_line(known)

    def _stand_in_line(self, known: KnownPage) -> None:
        heappush(self._line, known.rank)
        if len(self._line) > 2 * len(self._known) + 64:  # most of it is out of date
            self._line = [each.rank for each in self._known.values() if self.pool.holders(each.page) == 1]
            heapify(self._line)
