"""Attention sinks and the most recent pages (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

import numpy as np

from tokenswift_py.kvcache.base import Committed, FloatArray, PageStats


class Recent:
    """Scores a page by its number, so that the latest are chosen. The first page is in every view anyway."""

    name = "recent"
    needs: frozenset[str] = frozenset()

    def observe(self, committed: Committed) -> None:
        pass

    def score(self, stats: PageStats) -> FloatArray:
        later = np.arange(stats.pages, dtype=np.float32)
        return np.broadcast_to(later, (stats.layers, stats.kv_heads, stats.pages))


POLICY = Recent
