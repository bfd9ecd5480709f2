"""Attention sinks and the most recent pages (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenswift_py.kvcache.base import PAGE_SIZE, IntArray, PageStats


@dataclass(frozen=True)
class Recent:
    """The first page, whose tokens everything attends to, and as many of the latest pages as the budget holds."""

    name = "recent"

    def select(self, stats: PageStats, budget: int) -> IntArray:
        count = min(max(1, budget // PAGE_SIZE), stats.pages)
        chosen = np.arange(stats.pages - count, stats.pages, dtype=np.int32)
        if count > 1:
            chosen[0] = 0
        return np.broadcast_to(chosen, (stats.layers, stats.kv_heads, count))


POLICY = Recent
