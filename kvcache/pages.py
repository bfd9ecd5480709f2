"""Pages for the torch executor: one tensor for all keys, one for all values, and a count of holders a page."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tokenswift_py.kvcache.base import PAGE_SIZE, IntArray

SPARE_PAGES = 16  # for tree rows that stand beside one another at the very end of the context


def pages_for(context: int) -> int:
    """Pages a pool needs for one sequence of `context` tokens with its provisional rows."""
    return -(-context // PAGE_SIZE) + SPARE_PAGES


class Holders:
    """Which pages are held, and by how many caches. Low pages first, so that a lone sequence stays contiguous."""

    def __init__(self, pages: int):
        self._free = list(range(pages - 1, -1, -1))
        self._holders = np.zeros(pages, np.int32)

    def allocate(self) -> int:
        if not self._free:
            raise MemoryError(f"all {len(self._holders)} KV pages are in use")
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        if self._holders[page] < 1:
            raise ValueError(f"page {page} is free and cannot be shared")
        self._holders[page] += 1

    def release(self, page: int) -> None:
        if self._holders[page] < 1:
            raise ValueError(f"page {page} was released twice")
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    @property
    def in_use(self) -> int:
        return int((self._holders > 0).sum())


MoveRows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def move_rows(keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy rows between slots of all layers and KV heads, as if all were read before any is written.

    keys, values: [layers, kv_heads, pages, PAGE_SIZE, head_dim]. source, target: [n] int64.
    """
    for pool in (keys, values):
        flat = pool.flatten(2, 3)
        flat[:, :, target] = flat[:, :, source]


class TorchPagePool(Holders):
    """keys, values: [layers, kv_heads, pages, PAGE_SIZE, head_dim].

    The memory is reserved at once and, on a CPU, taken from the system page by page as rows are written.
    move_rows: what copies rows, for executors that have a kernel for it.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
        move_rows: MoveRows = move_rows,
    ):
        super().__init__(pages)
        self._move_rows = move_rows
        self.layers, self.kv_heads = layers, kv_heads
        shape = (layers, kv_heads, pages, PAGE_SIZE, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.page_bytes = 2 * layers * kv_heads * PAGE_SIZE * head_dim * dtype.itemsize

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [R, kv_heads, head_dim] into slots [R] of one layer."""
        self.keys[layer].flatten(1, 2)[:, slots] = k.transpose(0, 1)
        self.values[layer].flatten(1, 2)[:, slots] = v.transpose(0, 1)

    def move(self, source: IntArray, target: IntArray) -> None:
        slots = torch.from_numpy(np.stack([source, target]).astype(np.int64)).to(self.keys.device)
        self._move_rows(self.keys, self.values, slots[0], slots[1])
