"""Scenes for attention kernels: pools, caches, trees and views of random keys, compared with the naive backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokenswift_py.core import DraftTree, Segment, TreeBuilder
from tokenswift_py.kernels.base import PAGE_SIZE, AttentionBackend, AttentionSegment
from tokenswift_py.kernels.naive import Naive
from tokenswift_py.kernels.sdpa import SDPA
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import TorchPagePool
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.rows import lay_out

LAYERS, CONTEXT = 2, 512
DEVICE = torch.device("cpu")


def new_pool(
    kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float64, device: torch.device = DEVICE
) -> TorchPagePool:
    """Makes a pool whose lanes are all NaN and whose pages are handed out in random order."""
    pool = TorchPagePool(LAYERS, kv_heads, head_dim, 48, dtype, device)
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    np.random.default_rng(1).shuffle(pool._free)
    return pool


def fill(pool: TorchPagePool, slots: np.ndarray) -> None:
    at = torch.from_numpy(slots.astype(np.int64)).to(pool.keys.device)
    for layer in range(pool.layers):
        shape = (len(slots), pool.kv_heads, pool.keys.shape[-1])
        pool.write(layer, at, torch.randn(shape).to(pool.keys), torch.randn(shape).to(pool.keys))


def prefilled(pool: TorchPagePool, length: int) -> KVCache:
    cache = KVCache(pool, CONTEXT)
    fill(pool, cache.append(np.arange(length, dtype=np.int32), True))
    cache.commit(range(length))
    return cache


def random_tree(rng: np.random.Generator, nodes: int) -> DraftTree:
    builder = TreeBuilder(0)
    while len(builder) < nodes:
        builder.add(int(rng.integers(len(builder))), len(builder))
    return builder.build()


def random_view(rng: np.random.Generator, cache: KVCache, count: int) -> PageView:
    """Makes a view with other pages for each layer and head."""
    pages = np.arange(cache.full_pages)
    chosen = [[np.sort(rng.permutation(pages)[:count]) for _ in range(cache.pool.kv_heads)] for _ in range(LAYERS)]
    return PageView(np.array(chosen, np.int32).reshape(LAYERS, cache.pool.kv_heads, min(count, len(pages))))


@dataclass
class Scene:
    """Segments that are laid out, with keys and values in the pool and random queries."""

    pool: TorchPagePool
    segments: tuple[AttentionSegment, ...]
    q: torch.Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment], group: int) -> Scene:
        rows = lay_out(segments)
        pool = segments[0].cache.pool
        assert isinstance(pool, TorchPagePool)
        fill(pool, rows.slots)
        shape = (len(rows.tokens), pool.kv_heads * group, pool.keys.shape[-1])
        return cls(pool, rows.segments, torch.randn(shape).to(pool.keys))

    def attend(
        self, backend: AttentionBackend, layer: int, window: int | None, cap: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plan = backend.prepare(self.segments, self.q.device)
        last = max(int(segment.positions.max()) for segment in self.segments)
        kind = torch.promote_types(self.q.dtype, torch.float32)
        shape = (len(self.q), self.pool.kv_heads, last // PAGE_SIZE + 1)
        mass = torch.full(shape, torch.nan, dtype=kind, device=self.q.device)
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        options = {"cap": cap} if cap else {}
        out = backend.attend(plan, layer, self.q, keys, values, window, mass, **options)
        if not isinstance(backend, Naive):
            assert torch.equal(out, backend.attend(plan, layer, self.q, keys, values, window, **options))
        return out, mass

    def agree(
        self,
        window: int | None = None,
        tolerance: float = 1e-12,
        backend: AttentionBackend = SDPA(),  # noqa: B008
        layers: Sequence[int] = range(LAYERS),
        cap: float = 0.0,
    ) -> None:
        for layer in layers:
            out, mass = self.attend(backend, layer, window, cap)
            true, true_mass = self.attend(Naive(), layer, window, cap)
            assert out.dtype == self.q.dtype and not true.isnan().any()
            torch.testing.assert_close(out, true, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(mass, true_mass, rtol=tolerance, atol=tolerance)
            group = self.q.shape[1] // self.pool.kv_heads
            torch.testing.assert_close(mass.sum(-1), torch.full_like(mass[..., 0], group))


def ladder(rungs: int) -> DraftTree:
    """Makes a tree with two children at every step, one of which goes on."""
    builder, node = TreeBuilder(0), 0
    for rung in range(rungs):
        builder.add(node, 100 + rung)
        node = builder.add(node, rung) or 0
    return builder.build()
