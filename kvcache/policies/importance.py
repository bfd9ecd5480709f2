"""A page's most important token by TokenSwift's measure, query x key (arXiv 2502.18890, section 3.3)."""

from __future__ import annotations

import torch

from tokenswift_py.kvcache.base import IntArray, PagePool
from tokenswift_py.kvcache.policies.base import LastQueries


class Importance(LastQueries):
    """The largest q.k of a page's keys, summed over the query heads of the KV head's group.

    The query is that of the last committed row. (The authors' code takes the last row of the tree, most often a draft
    that was rejected.) The policy is expensive, because it reads every key. It has no softmax, so a head that is sure
    weighs no more than one that is not.
    """

    name = "importance"

    def worth(self, pool: PagePool, pages: IntArray, queries: torch.Tensor) -> torch.Tensor:
        return pool.key_scores(pages, queries)


POLICY = Importance
