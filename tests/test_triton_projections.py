"""Kernels that multiply by several weights at once have the bits of one product after the other, and of what follows.

The unfused kernels are held to torch and Hugging Face in test_triton_fused.py and test_triton_decoder.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from interpreter import DEVICE
from scenes import new_pool
from tokenswift_py.kernels.triton import fused, projections
from tokenswift_py.kernels.triton.matmul import linear
from triton_scenes import seeded as seeded

DTYPES = [torch.float32, torch.bfloat16]


def drawn(dtype: torch.dtype, *shape: int) -> Any:
    return torch.randn(shape).to(dtype)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "bias", "activation"), [(1, False, "gelu"), (65, True, "silu")])
def test_the_activation_behind_its_products(dtype: torch.dtype, rows: int, bias: bool, activation: str) -> None:
    x, gate, up = drawn(dtype, rows, 70), drawn(dtype, 43, 70), drawn(dtype, 43, 70)
    biases = (drawn(dtype, 43), drawn(dtype, 43)) if bias else None
    parts = (linear(x, weight, biases and biases[i]) for i, weight in enumerate((gate, up)))
    together = projections.gated(x, gate, up, biases, activation)
    assert torch.equal(together, fused.glu(*parts, activation))
    assert torch.equal(projections.gated(x[-1:], gate, up, biases, activation), together[-1:])
    assert projections.gated(x[:0], gate, up).shape == (0, 43)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("head_dim", "kv_heads"), [(16, 2), (80, 1)])
def test_queries_keys_and_values(dtype: torch.dtype, bias: bool, head_dim: int, kv_heads: int) -> None:
    """They are as such, or rotated and written to the pages. Slot -1 is nowhere, and what nobody writes stays."""
    x, counts = drawn(dtype, 5, 40), (3 * kv_heads, kv_heads, kv_heads)
    weights: Any = tuple(drawn(dtype, count * head_dim, 40) for count in counts)
    biases: Any = tuple(drawn(dtype, count * head_dim) for count in counts) if bias else None
    parts = [linear(x, weight, biases and biases[i]).unflatten(1, (-1, head_dim)) for i, weight in enumerate(weights)]
    for got, expected in zip(projections.qkv(x, weights, biases, head_dim), parts, strict=True):
        assert torch.equal(got, expected)
    angles, slots = torch.rand(5, head_dim // 2), torch.tensor([70, 5, -1, 3071, 64])
    cos, sin = angles.cos(), angles.sin()
    pools = [new_pool(kv_heads, head_dim, dtype, DEVICE) for _ in range(2)]
    rotated = fused.rope_write(*parts, cos, sin, slots, pools[0].keys[1], pools[0].values[1])
    got = projections.qkv_rope_write(x, weights, biases, cos, sin, slots, pools[1].keys[1], pools[1].values[1])
    assert torch.equal(got, rotated)
    assert equal(pools[0].keys, pools[1].keys) and equal(pools[0].values, pools[1].values)
    assert not pools[1].keys[1].flatten(1, 2)[:, slots[slots >= 0]].isnan().any()


@pytest.mark.parametrize(("dtype", "weights"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_norms_of_queries_and_keys_before_the_rotation(dtype: torch.dtype, weights: torch.dtype, head_dim: int) -> None:
    q, k, v = drawn(dtype, 3, 4, head_dim), drawn(dtype, 3, 2, head_dim), drawn(dtype, 3, 2, head_dim)
    norms: Any = drawn(weights, head_dim), drawn(weights, head_dim)
    angles, slots = torch.rand(3, head_dim // 2), torch.tensor([70, -1, 64])
    turns = (angles.cos(), angles.sin(), slots)
    pools = [new_pool(2, head_dim, dtype, DEVICE) for _ in range(2)]
    places = [(pool.keys[0], pool.values[0]) for pool in pools]
    normed = (fused.norm(part, norm, 1e-5) for part, norm in zip((q, k), norms, strict=True))
    expected = fused.rope_write(*normed, v, *turns, *places[0])
    assert torch.equal(fused.rope_write(q, k, v, *turns, *places[1], norms=norms, eps=1e-5), expected)
    assert equal(pools[0].keys, pools[1].keys) and equal(pools[0].values, pools[1].values)
