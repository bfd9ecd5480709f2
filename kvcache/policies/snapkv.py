"""The observation window: pages that the latest rows attend to alike (SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

import numpy as np

from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import Committed, FloatArray, PageStats
from tokenswift_py.kvcache.policies.base import PerPage


class SnapKV:
    """The mean attention probability that the last `window` committed rows put on a page, pooled over neighbours.

    The rows of the window weigh the same, and earlier rows nothing. Pooling is the mean over `pooling` neighbouring
    pages, where pages that do not exist count as 0.

    The paper looks once, from the end of the prompt. Here the window moves with the text. The paper pools over
    neighbouring tokens, so that the tokens around one that is hit are kept with it. A page does that for its own
    tokens, and the pooling here for those of the pages beside it.
    The rows of the window are kept (window * layers * kv_heads * pages * 4 bytes) and summed oldest first, in float32.

    window:  number of committed rows, at least 1.
    pooling: odd number of pages. 1 pools nothing.
    """

    name = "snapkv"
    needs = frozenset({"mass"})

    def __init__(self, window: int = 32, pooling: int = 3):
        check(window >= 1, "window", window, "at least 1")
        check(pooling >= 1 and pooling % 2 == 1, "pooling", pooling, "an odd number, at least 1")
        self.window, self.pooling = window, pooling
        self._rows = 0
        self._masses = PerPage(np.float32)

    def observe(self, committed: Committed) -> None:
        mass = committed.mass
        assert mass is not None
        layers, rows, kv_heads, pages = mass.shape
        masses = self._masses.window(self.window, layers, kv_heads, pages)
        for row in range(rows):
            masses[self._rows % self.window] = mass[:, row]
            self._rows += 1

    def score(self, stats: PageStats) -> FloatArray:
        masses = self._masses.window(self.window, stats.layers, stats.kv_heads, stats.pages)
        total = np.zeros(masses.shape[1:], np.float32)
        for row in range(max(0, self._rows - self.window), self._rows):
            total += masses[row % self.window]
        return pooled(total, self.pooling) / (min(self._rows, self.window) or 1)


def pooled(x: FloatArray, width: int) -> FloatArray:
    """Returns the mean of each page and its neighbours, `width` pages in all."""
    reach, pages = width // 2, x.shape[-1]
    total = x.copy()
    for distance in range(1, min(reach, pages - 1) + 1):
        total[..., distance:] += x[..., :-distance]
        total[..., :-distance] += x[..., distance:]
    mean: FloatArray = total / width
    return mean


POLICY = SnapKV
