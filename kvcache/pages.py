"""Pages for the torch executor: one tensor for all keys, one for all values, and a count of holders a page."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tokenswift_py.kernels.base import on_device
from tokenswift_py.kvcache.base import PAGE_SIZE, Bytes, IntArray

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
    def pages(self) -> int:
        """How many pages there are."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many caches hold this page."""
        return int(self._holders[page])

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


class BoundedPages(Holders):
    """Pages whose key bounds are computed when first asked for, and kept while the page is held: a full page of
    committed rows does not change until then. They take a 32nd of the memory of bf16 pages.

    shape: (layers, kv_heads, pages, head_dim).
    """

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device):
        super().__init__(shape[2])
        self._shape, self._device = shape, device
        self._bounded = np.zeros(shape[2], np.bool_)
        self._bounds: tuple[torch.Tensor, torch.Tensor] | None = None

    def allocate(self) -> int:
        page = super().allocate()
        self._bounded[page] = False
        return page

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

    def _bound_keys(self, pages: IntArray, low: torch.Tensor, high: torch.Tensor) -> None:
        """Write the bounds of these pages at their numbers in low and high, [layers, kv_heads, pages, head_dim]."""
        raise NotImplementedError


def index(pages: np.ndarray, device: torch.device) -> slice | torch.Tensor:
    """What picks these pages, or rows, from a tensor: a view without copies where they follow one another, and nothing
    for the host to wait for."""
    if not len(pages):
        return slice(0)
    if (np.diff(pages) == 1).all():
        return slice(int(pages[0]), int(pages[-1]) + 1)
    return on_device(pages.astype(np.int64), device)


def grouped(queries: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[layers, heads, head_dim] queries summed over each KV head's group: a sum of products is a product of sums."""
    sums: torch.Tensor = queries.float().unflatten(1, (kv_heads, -1)).sum(2)
    return sums


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values and each head's fp32 scale, as the native engine has them: the largest magnitude becomes 127, others
    the nearest whole number, ties to even. Values too small for that are zero; where one is infinite or NaN, the scale
    is too, and with it everything that is computed from them.

    x: [..., head_dim]. Returns [..., head_dim] and [...].
    """
    limits = torch.finfo(torch.float32)
    scale = x.float().abs().amax(-1) / 127
    usable = (scale >= limits.tiny) & (scale <= limits.max)
    whole = (x.float() / torch.where(usable, scale, 1)[..., None]).round()
    values = torch.where(usable[..., None], whole, 0).to(torch.int8)
    return values, torch.where(scale < limits.tiny, 0, scale)


class TorchPagePool(BoundedPages):
    """keys, values: [layers, kv_heads, pages, PAGE_SIZE, head_dim]; of int8 also key_scales and value_scales, the same
    without head_dim, fp32.

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
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        self.page_bytes = sum(tensor.nbytes for tensor in tensors) // pages

    def scales_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """[kv_heads, pages, PAGE_SIZE] fp32 of a layer's keys and values; None unless they are int8."""
        return (self.key_scales[layer], self.value_scales[layer]) if self.scaled else None

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [R, kv_heads, head_dim] into slots [R] of one layer."""
        parts = ((self.keys, self.key_scales, k), (self.values, self.value_scales, v))
        for pool, scales, rows in parts:
            rows = rows.transpose(0, 1)
            if self.scaled:
                rows, scales[layer].flatten(1, 2)[:, slots] = quantise(rows)
            pool[layer].flatten(1, 2)[:, slots] = rows

    def move(self, source: IntArray, target: IntArray) -> None:
        slots = on_device(np.stack([source, target]).astype(np.int64), self.keys.device)
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
    def _stored(self) -> tuple[torch.Tensor, ...]:
        """All that a page is made of."""
        scales = (self.key_scales, self.value_scales) if self.scaled else ()
        return (self.keys, self.values, *scales)

    def key_scores(self, pages: IntArray, queries: torch.Tensor) -> torch.Tensor:
        query = grouped(queries, self.kv_heads).to(self.keys.device)[..., None]  # [layers, kv_heads, head_dim, 1]
        best = []
        for layer, q in enumerate(query):
            products = self._wide_keys(layer, pages).flatten(1, 2) @ q  # [kv_heads, n * PAGE_SIZE, 1]
            best.append(products.view(self.kv_heads, len(pages), PAGE_SIZE).amax(2))
        return torch.stack(best)

    def _bound_keys(self, pages: IntArray, low: torch.Tensor, high: torch.Tensor) -> None:
        chosen = index(pages, self.keys.device)
        for layer in range(self.layers):
            low[layer][:, chosen], high[layer][:, chosen] = self._wide_keys(layer, pages).aminmax(dim=2)

    def _wide_keys(self, layer: int, pages: IntArray) -> torch.Tensor:
        """[kv_heads, n, PAGE_SIZE, head_dim] fp32."""
        chosen = index(pages, self.keys.device)
        keys = self.keys[layer][:, chosen].float()
        return keys * self.key_scales[layer][:, chosen, :, None] if self.scaled else keys
