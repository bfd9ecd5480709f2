"""The attention contract that every torch backend keeps (the native CPU engine has attention of its own).

Keys and values lie in pages of `PAGE_SIZE` tokens: page = position // PAGE_SIZE, lane = position % PAGE_SIZE. A row
attends to the full committed pages of its sequence (all of them, or those its view names) and then, *by position*,
to everything from the last committed page boundary on: committed lanes first, then its own ancestors in path order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

PAGE_SIZE = 64

IntArray = npt.NDArray[np.int32]


def upload(target: torch.Tensor, values: np.ndarray) -> None:
    """Copy an array of the tensor's shape and type to it; the host does not wait for the device."""
    source = torch.from_numpy(values)
    if target.is_cuda:
        source = source.pin_memory()  # which torch keeps until the copy is over
    target.copy_(source, non_blocking=True)


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of an array on a device; the host does not wait for it."""
    target = torch.empty(values.shape, dtype=torch.from_numpy(values).dtype, device=device)
    upload(target, values)
    return target


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in the half-split layout of Hugging Face's checkpoints, in fp32 or better.

    x: [..., head_dim]. cos, sin: [..., head_dim / 2], which broadcast against a half of x.
    """
    first, second = (x if x.dtype == torch.float64 else x.float()).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def architecture(device: torch.device) -> str:
    """What a device's kernels are compiled for, which their bits depend on: cuda-sm_90, cuda-gfx942, cpu."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return f"cuda-{torch.cuda.get_device_properties(device).gcnArchName.split(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda-sm_{major}{minor}"


@dataclass(frozen=True, eq=False)
class BlockShifts:
    """How queries meet keys at distances that the model was not trained for: Self-Extend (arXiv 2401.01325), by the
    query alone (law 8).

    Keys stay rotated to their own positions and lie in blocks of `block` positions. A row at position p meets the keys
    of block c with its query rotated to p - shifts[p // block - c]: distances inside a block stay true, far blocks come
    nearer to one another. The rule knows the row's own position and nothing else.

    block:   whole pages, a power of two of them.
    shifts:  [blocks] int32, 0 for the row's own block, never more than the distance of the blocks.
    trained: distances that the model knows: a layer whose sliding window is no wider meets all its keys as they are.
    """

    block: int
    shifts: IntArray
    trained: int

    def __post_init__(self) -> None:
        within = (self.shifts >= 0) & (self.shifts <= np.arange(len(self.shifts)) * self.block)
        pages, rest = divmod(self.block, PAGE_SIZE)
        if pages < 1 or rest or pages & (pages - 1) or not within.all():
            raise ValueError("blocks are 1, 2, 4 ... pages, and no shift is larger than the distance of the blocks")

    def serves(self, window: int | None) -> bool:
        """Whether queries are moved in a layer with this sliding window."""
        return window is None or window > self.trained

    def met(self, positions: IntArray, block: IntArray | int) -> IntArray:
        """Where queries of rows at `positions` are rotated to for the keys of these blocks; no block is ahead of its
        row but those that the row does not see."""
        behind = np.maximum(positions // self.block - block, 0)
        moved: IntArray = positions - self.shifts[behind]
        return moved


@dataclass(frozen=True, eq=False)
class FarQueries:
    """A layer's queries before RoPE, for keys that they meet elsewhere than at their own positions.

    q: [R, heads, head_dim], normed where the family does so. positions: [R] int64. cos, sin: [context, head_dim / 2]
    fp32. table: the rule's shifts, on the device.
    """

    q: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    shifts: BlockShifts
    table: torch.Tensor

    def met(self, rows: slice, block: int) -> torch.Tensor:
        """[n, heads, head_dim] the queries of these rows as they meet the keys of a block."""
        positions = self.positions[rows]
        behind = (positions // self.shifts.block - block).clamp(min=0)
        at = positions - self.table[behind]
        return rotate(self.q[rows], self.cos[at][:, None], self.sin[at][:, None])


@dataclass(frozen=True, eq=False)
class QueryTurns:
    """For those who hold queries as their own rows' positions have them, and score far keys with them.

    cos, sin: [context, head_dim / 2] fp32. moved: [layers] whether a layer moves queries at all.
    """

    shifts: BlockShifts
    cos: torch.Tensor
    sin: torch.Tensor
    moved: tuple[bool, ...]

    def groups(self, position: int, pages: IntArray) -> list[tuple[int, IntArray]]:
        """Pages that a row meets from one position, and that position."""
        met = self.shifts.met(np.full(len(pages), position, np.int32), pages * PAGE_SIZE // self.shifts.block)
        return [(int(at), pages[met == at]) for at in np.unique(met)]

    def turned(self, queries: torch.Tensor, position: int, at: int) -> torch.Tensor:
        """[layers, heads, head_dim] queries of a row, rotated on from its position to where far keys are met."""
        served = torch.tensor(self.moved, device=queries.device)
        (c, s), (c0, s0) = ([table[p].to(queries.device) for table in (self.cos, self.sin)] for p in (at, position))
        size = c0 * c0 + s0 * s0  # the tables have the attention factor in them, which the queries have already
        turned = rotate(queries, (c * c0 + s * s0) / size, (s * c0 - c * s0) / size)
        return torch.where(served[:, None, None], turned, queries)


@dataclass(frozen=True)
class AttentionSegment:
    """What n rows of one sequence attend to, the same for every layer.

    rows:      their place in the pass.
    positions: [n] absolute positions.
    pages:     [full] page of the pool for each full committed page; -1 where it was evicted, which only a segment
               with a view has, and no view names.
    view:      [layers, kv_heads, v] absolute page numbers to attend to; None is all.
    tail:      [n, t] slots in the pool of positions full * PAGE_SIZE ... positions[i], by position, -1 behind them.
               A causal segment has the last row's only ([1, t]); row i attends to its beginning.
    causal:    the rows are a chain.
    """

    rows: slice
    positions: IntArray
    pages: IntArray
    view: IntArray | None
    tail: IntArray
    causal: bool

    @property
    def boundary(self) -> int:
        """First position behind the full pages."""
        return len(self.pages) * PAGE_SIZE

    def tail_of(self, row: int) -> IntArray:
        """Slots of the positions from the boundary to the row's own, both included."""
        slots: IntArray = self.tail[0 if self.causal else row]
        return slots[: int(self.positions[row]) - self.boundary + 1]


@dataclass(frozen=True)
class Room:
    """What a pass of fixed shape has room for: rows of one sequence, which are no prefill.

    pages:  up to that of the last row. viewed: of a view, for each layer and KV head; None is no view.
    layers: of the model. block_pages: of the blocks for which queries are moved; None moves none.
    """

    rows: int
    pages: int
    viewed: int | None
    layers: int
    block_pages: int | None = None

    @property
    def tail(self) -> int:
        """Slots by position that a row can gather: a page's committed lanes, as many earlier drafts, its ancestors."""
        return 2 * PAGE_SIZE + self.rows


class FixedPlan(Protocol):
    """What `attend` takes for passes of one shape: its memory stays in place, its launches are always the same. Rows
    that the segment does not have attend to nothing and get zeros."""

    def fill(self, segment: AttentionSegment) -> None:
        """Before each pass. The segment fits the room, the length of its tail included."""


class AttentionBackend(Protocol):
    """One file a backend. `prepare` runs once a pass, `attend` once a layer.

    One whose launches can be those of any text of a shape has `prepare_fixed(room, device) -> FixedPlan` too; None is
    for a room that is too large. One with a true `reads_int8` also takes int8 keys and values, with
    `scales=(of keys, of values)`, each [kv_heads, pages, PAGE_SIZE] fp32. One with a true `moves_queries` also takes
    `far=FarQueries`, whose queries it uses instead of q.
    """

    name: str

    def prepare(self, segments: Sequence[AttentionSegment], device: torch.device) -> Any:
        """Whatever all layers share: masks, page tables on the device."""

    def attend(
        self,
        plan: Any,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None = None,
        mass: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Softmax attention of all rows, scores scaled by head_dim ** -0.5.

        q:            [R, heads, head_dim]; query head h reads KV head h // (heads // kv_heads).
        keys, values: [kv_heads, pages, PAGE_SIZE, head_dim], this layer's part of the pool. Lanes that no row
                      attends to may hold anything, NaN included.
        window:       a row at position p attends to positions in (p - window, p] only.
        mass:         [R, kv_heads, absolute pages], filled with the attention probability on each page, summed
                      over the heads of a group.
        Returns [R, heads, head_dim] in q's type. Does not modify the pool.
        """
