"""Attention over int8 keys and values as kernels/cpu/math/page_bytes.h defines it, written from that definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from native_rows import int8_block, quantised
from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment, FarQueries
from tokenswift_py.kernels.naive import Naive, visible
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import TorchPagePool
from tokenswift_py.models.native import NativeDecoder

BLOCK = 64  # values of a query that share a scale


class Int8Attention(Naive):
    """Takes keys and values that are quants times their token's scale, in fp32."""

    def attend(
        self,
        plan: Sequence[AttentionSegment],
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None = None,
        mass: torch.Tensor | None = None,
        far: FarQueries | None = None,
    ) -> torch.Tensor:
        kv_heads, _, _, head_dim = keys.shape
        group = q.shape[1] // kv_heads
        out = torch.zeros_like(q)
        for segment in plan:
            for index in range(len(segment.positions)):
                row = segment.rows.start + index
                for head in range(kv_heads):
                    positions, slots = (torch.from_numpy(x) for x in visible(segment, layer, head, index, window))
                    k, v = (x[head].reshape(-1, head_dim)[slots] for x in (keys, values))
                    heads = slice(head * group, (head + 1) * group)
                    if far is None:
                        scores = rounded_query(q[row, heads]) @ k.T
                    else:
                        met = [far.met(slice(row, row + 1), int(b))[0, heads] for b in positions // far.shifts.block]
                        scores = (rounded_query(torch.stack(met, 1)) * k).sum(-1)
                    scores = scores * head_dim**-0.5
                    p = (scores - scores.amax(-1, keepdim=True)).exp()
                    pages = positions // PAGE_SIZE
                    for page in pages.unique():
                        here = pages == page
                        out[row, heads] += weighted(p[:, here], positions[here], v[here])
                    out[row, heads] /= p.sum(-1, keepdim=True)
                    if mass is not None:
                        shares = (p / p.sum(-1, keepdim=True)).sum(0).to(mass.dtype)
                        mass[row, head] = mass.new_zeros(mass.shape[-1]).index_add(0, pages, shares)
        return out


def rounded_query(q: torch.Tensor) -> torch.Tensor:
    """Queries [..., head_dim], each block of 64 values rounded to multiples of a scale of its own. In each eight values
    of a block the sizes of 0, 1, 4 and 5, and of 2, 3, 6 and 7, sum up to 126 scales at most."""
    size = q.shape[-1]
    blocks = torch.nn.functional.pad(q, (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    fours = blocks.abs().unflatten(-1, (-1, 2, 2, 2)).sum((-3, -1))  # [..., blocks, eights, halves of a four]
    scale = fours.amax((-2, -1)).unsqueeze(-1) / 126
    return ((blocks / scale).nan_to_num().round() * scale).flatten(-2)[..., :size]


def weighted(p: torch.Tensor, positions: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Sums a page's values [T, head_dim] with weights [group, T]. Weights times the values' scales are rounded to
    multiples of a scale of the page, of which those of lanes t, t + 16, t + 32 and t + 48 sum up to 253 at most."""
    quants, scales = quantised(v)
    p = p * scales.squeeze(-1).nan_to_num()
    fours = p.new_zeros(len(p), 16).index_add(1, positions % 16, p)
    scale = fours.amax(-1, keepdim=True) / 253
    return (p / scale).nan_to_num().round() @ quants.float() * scale


class QuantisedPool(TorchPagePool):
    """What is written is rounded as an int8 cache rounds it."""

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().write(layer, slots, *(quants * scale for quants, scale in map(quantised, (k, v))))


def cached(decoder: NativeDecoder, cache: KVCache, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [tokens, head_dim] as they are read back, from an fp32 or int8 cache."""
    pool: Any = cache.pool
    size = decoder.spec.head_dim
    pages = []
    for block in (pool.native.block(layer, head, page) for page in cache.pages):
        if decoder.kv_dtype == torch.float32:
            keys, values = torch.from_numpy(block).view(torch.float32).view(2, -1)
            pages.append((keys.view(-1, 64).T, values.view(64, -1)))
        else:
            quants, scales = int8_block(block)
            pages.append((quants[0] * scales[0], quants[1] * scales[1]))
    k, v = (torch.cat(parts)[: cache.length, :size] for parts in zip(*pages, strict=True))
    return k, v


def same_cache(decoder: NativeDecoder, cache: KVCache, context: int) -> KVCache:
    """Copies an int8 cache into an fp32 one of the torch engine, which holds quants times scales."""
    spec, length = decoder.spec, cache.length
    pages = -(-context // PAGE_SIZE)
    pool = QuantisedPool(spec.layers, spec.kv_heads, spec.head_dim, pages, torch.float32, torch.device("cpu"))
    copy = KVCache(pool, context)
    slots = torch.from_numpy(copy.append(np.arange(length, dtype=np.int32), True)).long()
    for layer in range(spec.layers):
        heads = [torch.stack(cached(decoder, cache, layer, head)) for head in range(spec.kv_heads)]
        TorchPagePool.write(pool, layer, slots, *torch.stack(heads, 2))
    copy.commit(range(length))
    return copy
