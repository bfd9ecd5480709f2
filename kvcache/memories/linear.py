"""Linear attention's feature map, elu + 1 ("Transformers are RNNs", arXiv 2006.16236, section 3.2)."""

from __future__ import annotations

import numpy as np
import torch

from tokenswift_py.kvcache.base import PAGE_SIZE, Committed, FloatArray
from tokenswift_py.kvcache.memories._sums import Sums
from tokenswift_py.kvcache.memories.base import Shape


class Linear(Sums):
    """Stands for exp(q.k / sqrt(d)) with a phi(q).phi(k), phi = elu + 1, where a number a sets the scale.

    phi knows nothing of the softmax's scale: of keys that a head hardly looks at, phi(q).phi(k) is still about d. With
    a = 1 a few thousand such keys would outweigh the pages kept. So each page gets an a of its own for each KV head
    when it is folded, and keeps it: the one with which, in the geometric mean over the queries of the latest PAGE_SIZE
    rows and the heads of the group, its mass a sum_j phi(q).phi(k_j) is the true one, sum_j exp(q.k_j / sqrt(d)).
    """

    needs = frozenset({"queries"})
    label = "linear"

    def __init__(self, shape: Shape):
        super().__init__(shape, shape.head_dim)
        self.queries: FloatArray = np.zeros((0, len(shape.keeps), shape.heads, shape.head_dim), np.float32)

    @property
    def held_bytes(self) -> int:
        return self.nbytes + self.queries.nbytes

    def observe(self, committed: Committed) -> None:
        assert committed.queries is not None
        self.queries = np.concatenate([self.queries, committed.queries[-PAGE_SIZE:]])[-PAGE_SIZE:]

    def _fold_page(self, layer: int, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        queries = self.grouped(torch.from_numpy(self.queries[:, layer]).to(keys.device))
        self.add(layer, log_features(keys) + page_scale(queries, keys)[:, None, None], values)

    def read(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, lse = self.recall(layer, log_features(self.grouped(q)))
        return self.ungrouped(values), self.ungrouped(lse)

    def clear(self) -> None:
        super().clear()
        self.queries = self.queries[:0]


def page_scale(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Returns the logarithm of the number that gives a page its true mass, [kv_heads].

    queries: [kv_heads, n, head_dim]. keys: [kv_heads, PAGE_SIZE, head_dim].
    """
    true = (queries @ keys.mT * keys.shape[-1] ** -0.5).logsumexp(-1)
    plain = (log_features(queries) + log_features(keys).logsumexp(1)[:, None]).logsumexp(-1)
    scale: torch.Tensor = (true - plain).mean(1)
    return scale


def log_features(x: torch.Tensor) -> torch.Tensor:
    """Returns the logarithm of elu(x) + 1, which is exp(x) below 0 and x + 1 above."""
    return torch.where(x > 0, x.clamp(min=0).log1p(), x)


MEMORY = Linear
