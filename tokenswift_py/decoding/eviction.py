"""The lossy mode of law 6. The target itself forgets, so that a text of any length is written in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenswift_py.core import Model, Output
from tokenswift_py.drafters.base import committed
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE, EvictionPolicy, FloatArray, best, recent_of
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.memories.base import Memory
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.parallel.ranks import ALONE, Ranks

SMALLEST = 4  # the least pages of a budget: the first, the last, one that the policy chose, and one being written
PERIOD = 4  # how many pages are evicted at a time, if the budget has 16 pages or more
STATISTICS_ROWS = 64  # rows of a prefill pass that reports statistics, which take layers x KV heads x pages for each


class Eviction:
    """Evicts whole pages, for all layers and heads, whenever the cache holds `budget` tokens.

    Evictions are at fixed positions: the budget, and every `period` pages after it. The policy decides which pages go,
    from committed rows alone. Rows before such a position see the cache before the eviction, rows after it the cache
    after it, and no pass spans one. So the text depends on the policy and the budget, but not on the drafter, the tree
    or the chunks of the prefill. A text that fits the budget loses nothing.

    policy: new policy for this sequence alone.
    budget: committed tokens that the cache holds at most, rounded down to whole pages.
    period: pages evicted at a time. None is 4, or a quarter of a small budget.
    ranks:  ranks that hold the model's heads. The scores of all are summed.
    memory: new memory that takes in what is evicted. None lets it go.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        budget: int,
        period: int | None = None,
        ranks: Ranks = ALONE,
        memory: Memory | None = None,
    ):
        pages = budget // PAGE_SIZE
        check(pages >= SMALLEST, "kv_budget", budget, f"at least {SMALLEST * PAGE_SIZE} tokens, {SMALLEST} pages")
        self.policy, self.memory, self._ranks = policy, memory, ranks
        self.needs = policy.needs | (memory.needs if memory else frozenset())
        self.period = min(PERIOD, pages // 4) if period is None else period
        check(1 <= self.period <= pages - 3, "period", self.period, f"between 1 and {pages - 3} pages of {pages}")
        self.budget = pages * PAGE_SIZE
        self.evictions = 0
        self.label = f"kv-{policy.name}-{self.budget}-{self.period * PAGE_SIZE}"
        self.label += f"+{memory.label}" if memory else ""

    def new_cache(self, model: Model, spare: KVCache | None = None) -> KVCache:
        """Makes a cache whose pool has room for the budget and a tree, whatever the context.

        spare: an empty cache that is taken instead.
        """
        cache = spare or KVCache(model.new_pool(pages_for(min(self.budget, model.context))), model.context)
        cache.limit, cache.memory = min(self.budget, cache.context), self.memory
        return cache

    def committed(self, cache: KVCache, rows: Sequence[int], output: Output) -> None:
        """Learns from the rows of a pass that were just committed. If the cache is full, pages go to the memory and are
        evicted."""
        learnt = committed(output, rows, cache.length - len(rows))
        self.policy.observe(learnt)
        if cache.memory is not None:
            cache.memory.observe(learnt)
        if cache.length == cache.limit < cache.context:
            stats = cache.page_stats()
            held = stats.held
            keep = len(held) - self.period
            scores = pooled(np.asarray(self.policy.score(stats), np.float64)[..., held], keep)
            scores = self._ranks.all(scores).sum(0)
            gone = np.delete(held, best(scores, keep))
            if cache.memory is not None:
                cache.memory.fold(cache.pool, gone, cache.pages[gone])
            cache.evict(gone.tolist())
            cache.limit = min(cache.limit + self.period * PAGE_SIZE, cache.context)
            self.evictions += 1

    def figures(self) -> dict[str, Any]:
        """Returns the lossy part of the report, in tokens."""
        period = self.period * PAGE_SIZE
        return {
            "policy": self.policy.name,
            "budget": self.budget,
            "period": period,
            "evictions": self.evictions,
            "evicted_tokens": self.evictions * period,
            "memory": self.memory.label if self.memory else None,
            "memory_bytes": self.memory.nbytes if self.memory else 0,
        }

    def tokens_held(self, position: int) -> float:
        """Returns how many tokens the cache holds at `position`, on average over a period."""
        return min(position, self.budget - self.period * PAGE_SIZE / 2)


def pooled(scores: FloatArray, keep: int) -> FloatArray:
    """Joins scores [layers, kv_heads, n] into one for each page, [n].

    Policies' scores have units of their own, and a head that attends sharply would outvote all others. So each head's
    scores count in standard deviations from their mean over the pages that may go: not the first, nor the last ones.
    """
    last = scores.shape[-1] - recent_of(keep)
    loose = scores[..., 1:last]
    centred = loose - loose.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1, keepdims=True))
    informative = spread > 1e-9 * np.abs(loose).max(-1, keepdims=True)  # else a head's differences are rounding
    total = np.zeros(scores.shape[-1])
    total[1:last] = np.divide(centred, spread, out=np.zeros_like(centred), where=informative).sum((0, 1))
    return total
