"""Triton's attention in scenes, and a count of the bytes that its kernels read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from interpreter import DEVICE, INTERPRETED
from scenes import Scene
from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment
from tokenswift_py.kernels.naive import visible
from tokenswift_py.kernels.triton.attention import TritonAttention
from tokenswift_py.kvcache.cache import KVCache

TRITON = TritonAttention()


def as_if_committed(scene: Scene, segment: AttentionSegment, index: int) -> Scene:
    """Returns a scene of the row alone, as in plain decoding: all before it is committed, in other pages."""
    pool = scene.pool
    _, slots = visible(segment, 0, 0, index, None)
    cache = KVCache(pool, len(slots))
    fresh = cache.append(np.arange(len(slots), dtype=np.int32), True)
    for part in (pool.keys, pool.values):
        flat = part.flatten(2, 3)
        flat[:, :, torch.from_numpy(fresh.astype(np.int64))] = flat[:, :, torch.from_numpy(slots)]
    cache.commit(range(len(slots) - 1))
    full = cache.full_pages
    tail = fresh[None, full * PAGE_SIZE :]
    position = np.array([len(slots) - 1], np.int32)
    alone = AttentionSegment(
        slice(0, 1), position, fresh[: full * PAGE_SIZE : PAGE_SIZE] // PAGE_SIZE, None, tail, False
    )
    return Scene(pool, (alone,), scene.q[segment.rows.start + index][None])


class Reads:
    """Counts the bytes that interpreted kernels load from some tensors."""

    def __init__(self, *tensors: torch.Tensor):
        self.bytes = 0
        self.spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]

    def count(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        for start, stop in self.spans:
            self.bytes += size * int(((pointers >= start) & (pointers < stop) & mask).sum())


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Gives each test of the file that imports this the same random numbers, made where the kernels run."""
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    from triton.runtime.interpreter import InterpreterBuilder

    if not INTERPRETED:
        pytest.skip("counts loads in the interpreter")
    counter, load = Reads(), InterpreterBuilder.create_masked_load

    def counted(builder, ptrs, mask, *rest):  # type: ignore[no-untyped-def]
        counter.count(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return load(builder, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    return counter
