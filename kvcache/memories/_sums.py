"""Attention by feature maps: sums over evicted keys that estimate their part of the softmax.

With features phi, sum_j phi(q).phi(k_j) v_j = phi(q) S for S = sum_j phi(k_j) v_j^T, and likewise z = sum_j phi(k_j).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch

from tokenswift_py.kvcache.memories.base import Memory, Shape

S = TypeVar("S", bound="Sums")


class Sums(Memory):
    """A memory of S and z. Feature maps are positive and given by their logarithms.

    The state of feature f is kept as exp(scale_f) times sums of terms of at most 1, whose largest is 1 when it joins.
    So nothing overflows, however large a key is, and a row's largest term never vanishes.
    """

    def __init__(self, shape: Shape, features: int):
        super().__init__(shape)
        heads = (len(shape.keeps), shape.kv_heads, features)
        self.values = torch.zeros(*heads, shape.head_dim, dtype=shape.dtype, device=shape.device)  # S
        self.keys = torch.zeros(heads, dtype=shape.dtype, device=shape.device)  # z
        self.scale = torch.full(heads, -torch.inf, dtype=shape.dtype, device=shape.device)

    @property
    def states(self) -> tuple[torch.Tensor, ...]:
        return self.values, self.keys, self.scale

    def add(self, layer: int, features: torch.Tensor, values: torch.Tensor) -> None:
        """Adds a page. features: [kv_heads, T, features] logarithms of phi(k). values: [kv_heads, T, head_dim]."""
        scale = torch.maximum(self.scale[layer], features.amax(1))
        shrunk = (self.scale[layer] - scale).exp()  # 0 for the first page
        terms = (features - scale[:, None]).exp().transpose(1, 2)  # [kv_heads, features, T]
        self.values[layer] = self.values[layer] * shrunk[..., None] + terms @ values
        self.keys[layer] = self.keys[layer] * shrunk + terms.sum(-1)
        self.scale[layer] = scale

    def recall(self, layer: int, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns phi(q) S / phi(q) z, [kv_heads, n, head_dim], and the logarithm of phi(q) z, [kv_heads, n].

        features: [kv_heads, n, features] logarithms of phi(q).
        """
        features = features + self.scale[layer][:, None]
        largest = features.amax(-1, keepdim=True)
        weights = (features - largest).exp()
        mass = (weights @ self.keys[layer][..., None])[..., 0]
        return weights @ self.values[layer] / mass[..., None], mass.log() + largest[..., 0]

    def copy(self: S) -> S:
        other = copy.copy(self)
        other.values, other.keys, other.scale = (x.clone() for x in (self.values, self.keys, self.scale))
        return other

    def clear(self) -> None:
        super().clear()
        self.scale.fill_(-torch.inf)
