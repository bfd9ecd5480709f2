"""Draft heads with random weights."""

from __future__ import annotations

import torch

from tokenswift_py.drafters.head_weights import HeadWeights

E, V, K = 48, 61, 3


def random_heads(form: str, own_head: bool = False, hidden: int = E, vocab: int = V, seed: int = 0) -> HeadWeights:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    if form == "medusa":
        tensors = {"weight": normal(K, 2, hidden, hidden) / 7, "bias": normal(K, 2, hidden)}
        if own_head:
            tensors["head"] = normal(K, vocab, hidden)
    else:
        tensors = {"weight": normal(K, hidden, hidden), "norm_in": normal(K, hidden), "norm_out": normal(K, hidden)}
        if form == "recurrent":
            tensors["token"] = normal(K, hidden, hidden)
    return HeadWeights(form, tensors, 1e-5)
