"""An upper bound of a page's worth, from bounds of its keys and the query (Quest, arXiv 2406.10774)."""

from __future__ import annotations

import torch

from tokenswift_py.kvcache.base import IntArray, PagePool
from tokenswift_py.kvcache.policies.base import LastQueries


class Quest(LastQueries):
    """An upper bound of q.k over a page's keys, for the queries of the last committed row.

    For each dimension the larger of the query's products with the page's lowest and highest key is taken, and these are
    summed. A KV head's score is the maximum over the query heads of its group.

    The products are torch's in fp32. Their last bits may change with the library and its threads, but not with how the
    rows were grouped into passes.
    """

    name = "quest"
    needs = frozenset({"queries", "bounds"})

    def worth(self, pool: PagePool, pages: IntArray, queries: torch.Tensor) -> torch.Tensor:
        low, high = pool.key_bounds(pages)  # [layers, kv_heads, pages, head_dim]
        queries = queries.to(low).unflatten(1, (low.shape[1], -1))  # [layers, kv_heads, group, head_dim]
        bound = high @ queries.clamp(min=0).mT + low @ queries.clamp(max=0).mT  # [layers, kv_heads, pages, group]
        return bound.amax(3)


POLICY = Quest
