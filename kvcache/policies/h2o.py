"""Heavy hitters: pages that later rows attended to all along (H2O, arXiv 2306.14048)."""

from __future__ import annotations

import numpy as np

from tokenswift_py.kvcache.base import PAGE_SIZE, Committed, FloatArray, PageStats
from tokenswift_py.kvcache.policies.base import PerPage


class H2O:
    """The attention probability on a page, summed over its life and divided by the rows that could have attended to it.

    The paper ranks tokens by the plain sum, which favours tokens that have been there longest. Against that it holds
    half of the budget for recent tokens. In a long text some pages have ten times the later rows of others, so here the
    sum is divided by the number of rows: the rate at which a page is hit over its life, where all rows count alike.
    A page's life starts when it is full. Its own 64 rows attend to it because they stand in it, which says nothing
    about later ones. And a page of the prompt, whose own rows no policy is shown, would have nothing to match them.
    Sums are float64, row by row.
    """

    name = "h2o"
    needs = frozenset({"mass"})

    def __init__(self) -> None:
        self._sums = PerPage()
        self._rows = PerPage()

    def observe(self, committed: Committed) -> None:
        mass = committed.mass
        assert mass is not None
        layers, rows, kv_heads, _ = mass.shape
        for row in range(rows):
            full = (committed.start + row) // PAGE_SIZE
            sums = self._sums.window(layers, kv_heads, full)
            sums += mass[:, row, :, :full]
            self._rows.window(full)[:] += 1

    def score(self, stats: PageStats) -> FloatArray:
        sums: FloatArray = self._sums.window(stats.layers, stats.kv_heads, stats.pages)
        rates: FloatArray = sums / np.maximum(self._rows.window(stats.pages), 1)
        return rates


POLICY = H2O
