"""Pages for the torch executor: one tensor for all keys, one for all values, and each page's number of holders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tokenswift_py.kernels.base import AttentionSegment, Copies, on_device
from tokenswift_py.kvcache.base import PAGE_SIZE, Bytes, IntArray

SPARE_PAGES = 16  # for the rows of a tree at the very end of the context, which need slots beyond its positions
ROUND_PAGES = SPARE_PAGES + 1  # the most pages that a round takes for rows that it does not commit


def pages_for(context: int) -> int:
    """Returns how many pages a pool needs for one sequence of `context` tokens and its provisional rows."""
    return -(-context // PAGE_SIZE) + SPARE_PAGES


class Holders:
    """Counts how many caches hold each page. Low pages are given first, so that a lone sequence stays contiguous.

    idle:    how many pages have no holder but a keeper, who holds them for later sequences.
    on_idle: function that gets each page that becomes one of them.
    """

    def __init__(self, pages: int):
        self._free = list(range(pages - 1, -1, -1))
        self._holders = np.zeros(pages, np.int32)
        self._kept: set[int] = set()
        self.idle = 0
        self.on_idle: Callable[[int], None] = lambda page: None

    def allocate(self) -> int:
        if not self._free:
            raise MemoryError(f"all {len(self._holders)} KV pages are in use")
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        if self._holders[page] < 1:
            raise ValueError(f"page {page} is free and cannot be shared")
        self.idle -= page in self._kept and self._holders[page] == 1
        self._holders[page] += 1

    def release(self, page: int) -> None:
        if self._holders[page] < 1:
            raise ValueError(f"page {page} was released twice")
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)
        elif self._holders[page] == 1 and page in self._kept:
            self.idle += 1
            self.on_idle(page)

    def keep(self, page: int) -> None:
        if page in self._kept:
            raise ValueError(f"page {page} is kept already")
        self.share(page)
        self._kept.add(page)

    def give_up(self, page: int) -> None:
        self._kept.remove(page)
        self.idle -= self._holders[page] == 1
        self.release(page)

    @property
    def pages(self) -> int:
        """The number of pages."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """The number of pages that nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """The number of caches that hold this page."""
        return int(self._holders[page])

    @property
    def in_use(self) -> int:
        return int((self._holders > 0).sum())


MoveRows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
CopyPages = Callable[[torch.Tensor, torch.Tensor, Copies, torch.Tensor], None]


def move_rows(keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies rows between slots of all layers and KV heads, with the result of reading all before writing any.

    keys, values: [layers, kv_heads, pages, PAGE_SIZE, head_dim]. source, target: [n] int64.
    """
    for pool in (keys, values):
        flat = pool.flatten(2, 3)
        flat[:, :, target] = flat[:, :, source]


class BoundedPages(Holders):
    """Pages whose key bounds are computed when they are first asked for, and kept while the page is held.

    A full page of committed rows does not change while it is held. The bounds take a 32nd of the memory of bf16 pages.

    shape: (layers, kv_heads, pages, head_dim).
    """

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device):
        super().__init__(shape[2])
        self._shape, self._device = shape, device
        self._bounded = np.zeros(shape[2], np.bool_)
        self._bounds: tuple[torch.Tensor, torch.Tensor] | None = None

    def allocate(self) -> int:
        page = super().allocate()
        try:
            self.reserve(page)
        except MemoryError:
            self.release(page)
            raise
        return page

    def reserve(self, page: int) -> None:
        """Makes a page usable that is about to be written. Raises MemoryError where there is no memory for it."""
        self._bounded[page] = False

    def key_bounds(self, pages: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        if self._bounds is None:
            low, high = (torch.empty(self._shape, dtype=torch.float32, device=self._device) for _ in range(2))
            self._bounds = low, high
        low, high = self._bounds
        missing = pages[~self._bounded[pages]]
        if len(missing):
            self._bound_keys(missing, low, high)
            self._bounded[missing] = True
        chosen = index(pages, self._device)
        return low[:, :, chosen], high[:, :, chosen]

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """The bytes of the parts of a dumped page, each of which has an equal share for every layer, in order."""
        raise NotImplementedError

    def _bound_keys(self, pages: IntArray, low: torch.Tensor, high: torch.Tensor) -> None:
        """Writes the bounds of these pages into low and high, [layers, kv_heads, pages, head_dim], at their numbers."""
        raise NotImplementedError


def index(pages: np.ndarray, device: torch.device) -> slice | torch.Tensor:
    """Returns an index that picks these pages, or rows, from a tensor without making the host wait for the device.

    Where they follow one another it is a slice, which copies nothing.
    """
    if not len(pages):
        return slice(0)
    if (np.diff(pages) == 1).all():
        return slice(int(pages[0]), int(pages[-1]) + 1)
    return on_device(pages.astype(np.int64), device)


def grouped(queries: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Sums queries [layers, heads, head_dim] over each KV head's group: [layers, kv_heads, head_dim] fp32.

    A key's product with the sum is the sum of its products.
    """
    sums: torch.Tensor = queries.float().unflatten(1, (kv_heads, -1)).sum(2)
    return sums


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns int8 values and each head's fp32 scale, as the native engine stores them.

    The largest magnitude of a head becomes 127, the others the nearest whole number, ties to even. A head whose scale
    would be denormal becomes zero. Where a value is infinite or NaN, the scale is too, and so is every result
    computed from them.

    x: [..., head_dim]. Shapes of the results: [..., head_dim] and [...].
    """
    limits = torch.finfo(torch.float32)
    most = x.float().abs().amax(-1)
    scale = most / torch.full_like(most, 127)  # CUDA would multiply by the inverse of a plain number
    usable = (scale >= limits.tiny) & (scale <= limits.max)
    whole = (x.float() / torch.where(usable, scale, 1)[..., None]).round()
    values = torch.where(usable[..., None], whole, 0).to(torch.int8)
    return values, torch.where(scale < limits.tiny, 0, scale)


def copy_pages(keys: torch.Tensor, values: torch.Tensor, copies: Copies, pages: torch.Tensor) -> None:
    """Writes int8 copies of some pages of all layers and KV heads.

    keys, values: [layers, kv_heads, pages, PAGE_SIZE, head_dim]. pages: [n] int32.
    """
    for source, target, scales in zip((keys, values), copies[:2], copies[2:], strict=True):
        target[:, :, pages.long()], scales[:, :, pages.long()] = quantise(source[:, :, pages.long()])


class TorchPagePool(BoundedPages):
    """A page pool in torch tensors: keys and values of [layers, kv_heads, pages, PAGE_SIZE, head_dim].

    A pool of int8 has key_scales and value_scales too, fp32, of the same shape without head_dim. The memory is reserved
    at once. On a CPU it is taken from the system page by page as rows are written.
    move_rows: function that copies rows, for executors that have a kernel for it.
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
        super().__init__((layers, kv_heads, pages, head_dim), device)
        self._move_rows = move_rows
        self.layers, self.kv_heads = layers, kv_heads
        shape = (layers, kv_heads, pages, PAGE_SIZE, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.scaled = dtype == torch.int8
        self.key_scales, self.value_scales = (
            torch.empty(shape[:-1] if self.scaled else 0, dtype=torch.float32, device=device) for _ in range(2)
        )
        self._copies: Copies | None = None
        self._copied = np.zeros(pages, np.bool_)
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        self.page_bytes = sum(tensor.nbytes for tensor in tensors) // pages

    def scales_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns the scales of a layer's keys and values, each [kv_heads, pages, PAGE_SIZE] fp32. None unless the pool
        is int8."""
        return (self.key_scales[layer], self.value_scales[layer]) if self.scaled else None

    def reserve(self, page: int) -> None:
        super().reserve(page)
        self._copied[page] = False

    def copy_pages(self, segments: Sequence[AttentionSegment], copy: CopyPages | None) -> None:
        """Makes int8 copies of the segments' full pages that have none yet.

        They lie beside the pages under the same numbers, as long as the pages are held. copy: function that writes
        them. None makes none.
        """
        if copy is None:
            return
        if self._copies is None:
            key_copies, value_copies = (torch.empty_like(part, dtype=torch.int8) for part in (self.keys, self.values))
            key_scales, value_scales = self.keys.new_empty((2, *self.keys.shape[:-1]), dtype=torch.float32)
            self._copies = key_copies, value_copies, key_scales, value_scales
        found = np.unique(np.concatenate([segment.pages for segment in segments]))
        found = found[found >= 0]  # -1 is a page that was evicted
        missing = found[~self._copied[found]]
        if len(missing):
            copy(self.keys, self.values, self._copies, on_device(missing.astype(np.int32), self.keys.device))
            self._copied[missing] = True

    def beside(self, layer: int, copies: bool) -> dict[str, Any]:
        """Returns what attention needs beside a layer's keys and values. copies: whether full pages are read as their
        int8 copies."""
        if copies:
            assert self._copies is not None
            return {"copies": tuple(part[layer] for part in self._copies)}
        return {"scales": self.scales_of(layer)} if self.scaled else {}

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes keys and values [R, kv_heads, head_dim] into slots [R] of one layer, as int8 where the pool is."""
        parts = ((self.keys, self.key_scales, k), (self.values, self.value_scales, v))
        for pool, scales, rows in parts:
            rows = rows.transpose(0, 1)
            if self.scaled:
                rows, scales[layer].flatten(1, 2)[:, slots] = quantise(rows)
            pool[layer].flatten(1, 2)[:, slots] = rows

    def move(self, source: IntArray, target: IntArray) -> None:
        # Both lists begin at a multiple of 16 bytes, or Triton would compile the kernel anew.
        padded = np.zeros((2, -(-len(source) // 2) * 2), np.int64)
        padded[:, : len(source)] = source, target
        slots = on_device(padded, self.keys.device)[:, : len(source)]
        with torch.cuda.device_of(self.keys):
            self._move_rows(self.keys, self.values, slots[0], slots[1])
            if self.scaled:
                self._move_rows(self.key_scales[..., None], self.value_scales[..., None], slots[0], slots[1])

    def dump(self, page: int) -> Bytes:
        parts = (pool[:, :, page].contiguous().cpu().view(torch.uint8).reshape(-1) for pool in self._stored)
        return np.asarray(torch.cat(list(parts)).numpy())

    def restore(self, page: int, data: Bytes) -> None:
        start = 0
        for pool in self._stored:
            stored = pool[:, :, page]
            part = torch.from_numpy(data[start : start + stored.nbytes].copy())
            stored.copy_(part.view(stored.dtype).view(stored.shape))
            start += stored.nbytes

    @property
    def part_bytes(self) -> tuple[int, ...]:
        return tuple(pool[:, :, 0].nbytes for pool in self._stored)

    @property
    def _stored(self) -> tuple[torch.Tensor, ...]:
        """The tensors that a page is part of."""
        scales = (self.key_scales, self.value_scales) if self.scaled else ()
        return (self.keys, self.values, *scales)

    def key_scores(self, pages: IntArray, queries: torch.Tensor) -> torch.Tensor:
        query = grouped(queries, self.kv_heads).to(self.keys.device)[..., None]  # [layers, kv_heads, head_dim, 1]
        best = []
        for layer, q in enumerate(query):
            products = self.page_keys(layer, pages).flatten(1, 2) @ q  # [kv_heads, n * PAGE_SIZE, 1]
            best.append(products.view(self.kv_heads, len(pages), PAGE_SIZE).amax(2))
        return torch.stack(best)

    def _bound_keys(self, pages: IntArray, low: torch.Tensor, high: torch.Tensor) -> None:
        chosen = index(pages, self.keys.device)
        for layer in range(self.layers):
            low[layer][:, chosen], high[layer][:, chosen] = self.page_keys(layer, pages).aminmax(dim=2)

    def page_keys(self, layer: int, pages: IntArray) -> torch.Tensor:
        return self._of_pages(self.keys, self.key_scales, layer, pages)

    def page_values(self, layer: int, pages: IntArray) -> torch.Tensor:
        """Returns a layer's values of some pages, in the form of `page_keys`."""
        return self._of_pages(self.values, self.value_scales, layer, pages)

    def _of_pages(self, rows: torch.Tensor, scales: torch.Tensor, layer: int, pages: IntArray) -> torch.Tensor:
        chosen = index(pages, rows.device)
        wide = rows[layer][:, chosen].float()
        return wide * scales[layer][:, chosen, :, None] if self.scaled else wide
