"""Random features that estimate the softmax itself (Performer, arXiv 2009.14794, section 2.3: FAVOR+)."""

from __future__ import annotations

import math

import torch

from tokenswift_py.kvcache.memories._sums import Sums
from tokenswift_py.kvcache.memories.base import Shape

FEATURES = 256  # of a KV head: its state has the numbers of as many keys and values
SEED = 0


class Performer(Sums):
    """E[phi(q).phi(k)] = exp(q.k / sqrt(d)) for phi(x)_f = exp(w_f.x' - |x'|^2 / 2) / sqrt(F), x' = x / d^(1/4), with
    rows w_f that are orthogonal in blocks of d and as long as normal vectors of d numbers (lemma 1, theorem 2).

    So the estimate has the softmax's own scale, and merges with the pages kept by its log-sum-exp. All layers and heads
    share one draw of the rows, from a fixed seed, and never change it.

    Keys are taken less their mean over the first page folded, c, and exp(q.c / sqrt(d)) is put back exactly. That is an
    addition to the paper. The estimate stays unbiased, and its variance, which grows with exp(|q' + k'|^2), falls with
    the part that all keys share.

    features: number F of random features. seed: that they are drawn from.
    """

    def __init__(self, shape: Shape, features: int = FEATURES, seed: int = SEED):
        super().__init__(shape, features)
        self.label = f"performer-{features}-{seed}"
        self.rows = orthogonal_rows(features, shape.head_dim, seed).to(shape.device, shape.dtype)
        heads = (len(shape.keeps), shape.kv_heads, shape.head_dim)
        self.centre = torch.zeros(heads, dtype=shape.dtype, device=shape.device)

    @property
    def states(self) -> tuple[torch.Tensor, ...]:
        return *super().states, self.centre

    def _fold_page(self, layer: int, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        if not self.keys[layer].any():  # the first page
            self.centre[layer] = keys.mean(1)
        self.add(layer, self.features(keys - self.centre[layer][:, None]), values)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the logarithms of phi of queries or keys, [..., head_dim] -> [..., features]."""
        x = x * self.shape.head_dim**-0.25
        return x @ self.rows.T - x.square().sum(-1, keepdim=True) / 2 - math.log(len(self.rows)) / 2

    def read(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.grouped(q)
        values, lse = self.recall(layer, self.features(rows))
        shared = (rows @ self.centre[layer][..., None])[..., 0] * self.shape.head_dim**-0.5
        return self.ungrouped(values), self.ungrouped(lse + shared)

    def copy(self) -> Performer:
        other = super().copy()
        other.centre = self.centre.clone()
        return other


def orthogonal_rows(count: int, size: int, seed: int) -> torch.Tensor:
    """Draws `count` rows of `size` numbers, each distributed as a normal vector, orthogonal in blocks of `size`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, size, generator=generator, dtype=torch.float64)

    blocks = []
    for first in range(0, count, size):
        q, r = torch.linalg.qr(normal(size))
        directions = (q * r.diagonal().sign()).T  # the signs make the directions uniform
        blocks.append(directions[: count - first] * normal(size).norm(dim=1)[: count - first, None])
    return torch.cat(blocks)


MEMORY = Performer
