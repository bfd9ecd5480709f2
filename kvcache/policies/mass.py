"""The attention that verification computes anyway, averaged over the latest rows."""

from __future__ import annotations

from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import Committed, FloatArray, PageStats
from tokenswift_py.kvcache.policies.base import PerPage

SWEEP = 256  # rows from one sweep to the next
NEGLIGIBLE = 1e-200  # decayed further, it would end as a denormal number, which some CPUs are slow with


class Mass:
    """The decayed mean of the attention probability that committed rows put on a page: a row weighs `decay` times
    what the next one weighs.

    The weights are divided by their sum, so the rows seen first are a mean like any later one; there is no start to
    grow out of. Sums are float64: sums = decay * sums + mass, row by row.

    decay: per committed row, above 0 and at most 1 (all rows weigh the same).
    """

    name = "mass"
    needs = frozenset({"mass"})

    def __init__(self, decay: float = 0.9):
        check(0 < decay <= 1, "decay", decay, "above 0 and at most 1")
        self.decay = decay
        self._rows, self._weight = 0, 0.0
        self._sums = PerPage()

    def observe(self, committed: Committed) -> None:
        mass = committed.mass
        assert mass is not None
        layers, rows, kv_heads, pages = mass.shape
        sums = self._sums.window(layers, kv_heads, pages)
        for row in range(rows):
            self._weight = self.decay * self._weight + 1
            sums *= self.decay
            sums += mass[:, row]
            self._rows += 1
            if self._rows % SWEEP == 0:
                sums[sums < NEGLIGIBLE] = 0

    def score(self, stats: PageStats) -> FloatArray:
        sums: FloatArray = self._sums.window(stats.layers, stats.kv_heads, stats.pages)
        return sums / (self._weight or 1)


POLICY = Mass
