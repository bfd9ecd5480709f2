"""The lossy mode of law 6: the target itself forgets, so that a text of any length is written in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenswift_py.core import Model, Output
from tokenswift_py.drafters.base import committed
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE, EvictionPolicy, FloatArray, best, recent_of
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.parallel.ranks import ALONE, Ranks

SMALLEST = 4  # pages: the first, the last, one that the policy chose, and one that is being written
PERIOD = 4  # pages, where the budget is 16 of them or more
STATISTICS_ROWS = 64  # of a prefill pass that reports statistics, as large as layers x KV heads x pages a row


class Eviction:
    """Evicts whole pages, all layers and heads of them, whenever the cache holds `budget` tokens.

    That is at fixed positions: the budget, and every `period` pages after it. What goes is decided by the policy, from
    committed rows alone, and the rows on one side of such a position see the pages before, those on the other side the
    pages after: no pass spans one. So the text depends on the policy and the budget, and still not on the drafter, the
    tree or the prefill's chunks. A text that fits the budget loses nothing.

    policy: fresh, and this sequence's alone.
    budget: committed tokens that the cache holds at most; rounded down to whole pages.
    period: pages evicted at a time; None is 4, or a quarter of a small budget.
    ranks:  those that hold the model's heads, all of which have a say.
    """

    def __init__(self, policy: EvictionPolicy, budget: int, period: int | None = None, ranks: Ranks = ALONE):
        pages = budget // PAGE_SIZE
        check(pages >= SMALLEST, "kv_budget", budget, f"at least {SMALLEST * PAGE_SIZE} tokens, {SMALLEST} pages")
        self.policy, self.needs, self._ranks = policy, policy.needs, ranks
        self.period = min(PERIOD, pages // 4) if period is None else period
        check(1 <= self.period <= pages - 3, "period", self.period, f"between 1 and {pages - 3} pages of {pages}")
        self.budget = pages * PAGE_SIZE
        self.evictions = 0
        self.label = f"kv-{policy.name}-{self.budget}-{self.period * PAGE_SIZE}"

    def new_cache(self, model: Model) -> KVCache:
        """A cache whose pool has room for the budget and a tree, whatever the context."""
        cache = KVCache(model.new_pool(pages_for(min(self.budget, model.context))), model.context)
        cache.limit = min(self.budget, cache.context)
        return cache

    def committed(self, cache: KVCache, rows: Sequence[int], output: Output) -> None:
        """Learn from the rows of a pass that were just committed, and evict if the cache is full."""
        self.policy.observe(committed(output, rows, cache.length - len(rows)))
        if cache.length == cache.limit < cache.context:
            stats = cache.page_stats()
            held = stats.held
            keep = len(held) - self.period
            scores = pooled(np.asarray(self.policy.score(stats), np.float64)[..., held], keep)
            scores = self._ranks.all(scores).sum(0)
            cache.evict(np.delete(held, best(scores, keep)).tolist())
            cache.limit = min(cache.limit + self.period * PAGE_SIZE, cache.context)
            self.evictions += 1

    def figures(self) -> dict[str, Any]:
        """The lossy part of the report, in tokens."""
        period = self.period * PAGE_SIZE
        return {
            "policy": self.policy.name,
            "budget": self.budget,
            "period": period,
            "evictions": self.evictions,
            "evicted_tokens": self.evictions * period,
        }

    def tokens_held(self, position: int) -> float:
        """Tokens in the cache where a row stands at `position`, on average over a period."""
        return min(position, self.budget - self.period * PAGE_SIZE / 2)


def pooled(scores: FloatArray, keep: int) -> FloatArray:
    """[n] what all layers and KV heads together think of pages, from scores [layers, kv_heads, n].

    Policies' scores have units of their own, and a head that attends sharply would outvote all others; so each counts
    in standard deviations from its mean over the pages that may go (not the first, and not the last ones).
    """
    last = scores.shape[-1] - recent_of(keep)
    loose = scores[..., 1:last]
    centred = loose - loose.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1, keepdims=True))
    informative = spread > 1e-9 * np.abs(loose).max(-1, keepdims=True)  # else its differences are rounding
    total = np.zeros(scores.shape[-1])
    total[1:last] = np.divide(centred, spread, out=np.zeros_like(centred), where=informative).sum((0, 1))
    return total
