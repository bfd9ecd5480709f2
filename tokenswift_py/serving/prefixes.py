"""Full pages of earlier texts, found again by their tokens: a prompt that begins alike shares them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tokenswift_py.core import IntArray
from tokenswift_py.kvcache.base import PAGE_SIZE, PagePool
from tokenswift_py.kvcache.cache import KVCache


@dataclass
class KnownPage:
    """page: of the pool. depth: how many pages stand before it in its text. used: when it was last of use."""

    page: int
    depth: int
    used: int = 0


class Prefixes:
    """Holds the committed full pages of texts, so that they stay while memory is not needed for others.

    A page is known by a hash of all tokens up to its end: under one numerics contract these determine its keys and
    values (law 1), whoever computed them. All caches must lie in `pool` and belong to one model.
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        self.hits = 0  # tokens that were not computed again
        self._known: dict[bytes, KnownPage] = {}
        self._time = 0

    def attach(self, cache: KVCache, tokens: IntArray) -> None:
        """Lets an empty cache begin with the pages that are known of these tokens; the last token is left out, since
        the row before the pending token has to be computed."""
        self._time += 1
        found = []
        for digest in self._digests(tokens[: len(tokens) - 1]):
            known = self._known.get(digest)
            if known is None:
                break
            known.used = self._time
            found.append(known.page)
        cache.attach(found)
        self.hits += len(found) * PAGE_SIZE

    def keep(self, cache: KVCache, tokens: IntArray, digests: list[bytes]) -> None:
        """Makes the full pages of a cache known.

        digests: of the pages that were told before; those of the others are appended.
        """
        if cache.full_pages <= len(digests):
            return
        self._time += 1
        for depth, digest in enumerate(self._digests(tokens[: cache.full_pages * PAGE_SIZE], digests), len(digests)):
            digests.append(digest)
            page = int(cache.pages[depth])
            if page >= 0 and digest not in self._known:
                self.pool.share(page)
                self._known[digest] = KnownPage(page, depth)
        for digest in digests:
            if digest in self._known:
                self._known[digest].used = self._time

    @property
    def idle(self) -> int:
        """How many pages are held for nobody but later texts."""
        return sum(self.pool.holders(known.page) == 1 for known in self._known.values())

    def make_room(self, pages: int) -> None:
        """Gives back so many idle pages, or all there are: the longest unused first, of a text its last pages first."""
        idle = [(known.used, -known.depth, digest) for digest, known in self._known.items()
                if self.pool.holders(known.page) == 1]  # fmt: skip
        for _, _, digest in sorted(idle)[:pages]:
            self.pool.release(self._known.pop(digest).page)

    @staticmethod
    def _digests(tokens: IntArray, known: Sequence[bytes] = ()) -> list[bytes]:
        """One for each full page of the tokens but the first `len(known)`, whose digests these are."""
        found: list[bytes] = []
        last = known[-1] if known else b""
        for start in range(len(known) * PAGE_SIZE, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
            last = hashlib.sha256(last + tokens[start : start + PAGE_SIZE].tobytes()).digest()
            found.append(last)
        return found
