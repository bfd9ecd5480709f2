"""TokenSwift's importance of a token, query x key (arXiv 2502.18890, section 3.3), of a page's best token."""

from __future__ import annotations

import torch

from tokenswift_py.kvcache.base import IntArray, PagePool
from tokenswift_py.kvcache.policies.base import LastQueries


class Importance(LastQueries):
    """The largest q.k of a page's keys, summed over the query heads of the KV head's group.

    The query is that of the last row that was committed (the authors' code takes the last row of the tree, most often
    a draft that was rejected). Every key is read, and no softmax weighs how sure a head is: an expensive policy.
    """

    name = "importance"

    def worth(self, pool: PagePool, pages: IntArray, queries: torch.Tensor) -> torch.Tensor:
        return pool.key_scores(pages, queries)


POLICY = Importance
