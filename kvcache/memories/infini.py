"""Infini-attention's compressive memory (arXiv 2404.07143, section 2.1.1), with its delta rule."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch

from tokenswift_py.kernels.base import rotate
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.memories.base import Memory, Shape

I = TypeVar("I", bound="Infini")  # noqa: E741


class Infini(Memory):
    """A matrix M and a vector z for each KV head, with sigma = elu + 1 over keys and queries before RoPE.

    A row recalls sigma(q) M / sigma(q) z. A page of keys K and values V adds sigma(K)^T V to M, or by the delta rule
    sigma(K)^T (V - sigma(K) M / sigma(K) z), and the sum of sigma(K) to z. So what is known already is not added again,
    and the order of pages counts. The first page finds nothing there to take away.

    A head's output is g recalled + (1 - g) attended with g = sigmoid(beta), one learnt number a head. While nothing was
    evicted it is what was attended. Keys in the cache are rotated: they are turned back by their positions.

    gates: [layers, heads] beta. label: names the gates, in the numerics contract.
    """

    gated = True
    delta = True
    name = "infini"

    def __init__(self, shape: Shape, gates: torch.Tensor, label: str = ""):
        super().__init__(shape)
        size = (len(shape.keeps), shape.kv_heads, shape.head_dim)
        self.gates, self.label = gates.to(shape.device, shape.dtype), f"{self.name}-{label}"
        self.matrix = torch.zeros(*size, shape.head_dim, dtype=shape.dtype, device=shape.device)  # M
        self.sum = torch.zeros(size, dtype=shape.dtype, device=shape.device)  # z

    @property
    def states(self) -> tuple[torch.Tensor, ...]:
        return self.matrix, self.sum

    def _fold_page(self, layer: int, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        if (tables := self.shape.tables[layer]) is not None:
            cos, sin = (table[start : start + PAGE_SIZE].to(keys.dtype) for table in tables)
            size = cos * cos + sin * sin  # divides the attention factor out, too
            keys = rotate(keys, cos / size, -sin / size)
        features = sigma(keys)
        if self.delta and self._holds(layer):
            values = values - self._recall(layer, features)
        self.matrix[layer] = self.matrix[layer] + features.mT @ values
        self.sum[layer] = self.sum[layer] + features.sum(1)

    def _holds(self, layer: int) -> bool:
        return bool(self.sum[layer].any())

    def _recall(self, layer: int, features: torch.Tensor) -> torch.Tensor:
        return features @ self.matrix[layer] / (features @ self.sum[layer][..., None])

    def read(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        recalled = self._recall(layer, sigma(self.grouped(q)))
        return self.ungrouped(recalled), self.gates[layer].sigmoid().expand(q.shape[:2])

    def copy(self: I) -> I:
        other = copy.copy(self)
        other.matrix, other.sum = (state.clone() for state in self.states)
        return other


def sigma(x: torch.Tensor) -> torch.Tensor:
    """Returns elu(x) + 1, without the cancellation that makes it 0 far below 0."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


MEMORY = Infini
