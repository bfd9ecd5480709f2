"""The attention mass of a page, which verification computes anyway, averaged over the latest rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import Committed, FloatArray, PageStats
from tokenswift_py.kvcache.policies.base import PerPage

SWEEP = 256  # the number of rows from one sweep to the next
NEGLIGIBLE = 1e-200  # smaller sums become 0, before they decay to denormal numbers, which are slow on some CPUs


class Mass:
    """The decayed mean of the attention probability that committed rows put on a page.

    A row weighs `decay` times as much as the next one. The weights are divided by their sum, so that the scores are a
    mean from the first row on. Sums are float64: sums = decay * sums + mass, row by row.

    Mass that lies on a device stays there: the sums are made, and pages chosen by them, with the same bits.

    decay: factor for each committed row, above 0 and at most 1, where all rows weigh the same.
    """

    name = "mass"
    needs = frozenset({"mass"})

    def __init__(self, decay: float = 0.9):
        check(0 < decay <= 1, "decay", decay, "above 0 and at most 1")
        self.decay = decay
        self._rows, self._weight = 0, 0.0
        self._sums = PerPage()
        self._there: PerPage | None = None  # the sums, if the mass lies on a device

    def observe(self, committed: Committed) -> None:
        mass = committed.mass
        assert mass is not None
        layers, _, kv_heads, pages = mass.shape
        self._add(mass, self._sums.window(layers, kv_heads, pages))

    def observe_there(self, mass: torch.Tensor) -> None:
        layers, _, kv_heads, pages = mass.shape
        self._there = self._there or PerPage(device=mass.device)
        self._add(mass, self._there.window(layers, kv_heads, pages))

    def _add(self, mass: Any, sums: Any) -> None:
        for row in range(mass.shape[1]):
            self._weight = self.decay * self._weight + 1
            sums *= self.decay
            sums += mass[:, row]
            self._rows += 1
            if self._rows % SWEEP == 0:
                sums[sums < NEGLIGIBLE] = 0

    def score(self, stats: PageStats) -> FloatArray:
        there = self.score_there(stats)
        if there is not None:
            return np.asarray(there.cpu().numpy())
        sums: FloatArray = self._sums.window(stats.layers, stats.kv_heads, stats.pages)
        return sums / (self._weight or 1)

    def score_there(self, stats: PageStats) -> torch.Tensor | None:
        if self._there is None:
            return None
        sums: torch.Tensor = self._there.window(stats.layers, stats.kv_heads, stats.pages)
        # It is a tensor because on a GPU torch multiplies by the reciprocal of a plain number.
        return sums / sums.new_full((1,), self._weight or 1)


POLICY = Mass
