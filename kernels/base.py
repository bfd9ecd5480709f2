"""The attention contract that every torch backend keeps. The native CPU engine has attention of its own.

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
MOST_LINKS = 16  # passes of a chain that a device computes at most without the host

IntArray = npt.NDArray[np.int32]
Copies = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # int8 keys and values, and the scales of both


def upload(target: torch.Tensor, values: np.ndarray) -> None:
    """Copies an array of the tensor's shape and type to it. The host does not wait for the device."""
    source = torch.from_numpy(values)
    if target.is_cuda:
        source = source.pin_memory()  # torch keeps it until the copy is over
    target.copy_(source, non_blocking=True)


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array to a device. The host does not wait for the device."""
    target = torch.empty(values.shape, dtype=torch.from_numpy(values).dtype, device=device)
    upload(target, values)
    return target


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies RoPE in the half-split layout of Hugging Face's checkpoints, in fp32 or better.

    x: [..., head_dim]. cos, sin: [..., head_dim / 2], broadcast against half of x. Returns x's shape and type.
    """
    first, second = (x if x.dtype == torch.float64 else x.float()).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Returns cap * tanh(x / cap), a soft cap of scores or logits; x itself where cap is 0."""
    return torch.tanh(x / cap) * cap if cap else x


def architecture(device: torch.device) -> str:
    """Names the architecture that a device's kernels are compiled for: cuda-sm_90, cuda-gfx942, cpu.

    The kernels' bits depend on it.
    """
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return f"cuda-{torch.cuda.get_device_properties(device).gcnArchName.split(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda-sm_{major}{minor}"


@dataclass(frozen=True, eq=False)
class BlockShifts:
    """The rule by which queries meet keys at distances that the model was not trained for.

    It is Self-Extend (arXiv 2401.01325) by the query alone (law 8). Keys stay rotated to their own positions and lie in
    blocks of `block` positions. A row at position p meets the keys of block c with its query rotated to
    p - shifts[p // block - c]. So distances inside a block stay true, and far blocks come nearer to one another. The
    rule knows the row's own position and nothing else.

    block:   positions of a block. It is a power of two of whole pages.
    shifts:  [blocks] int32 by distance in blocks. 0 for the row's own block, never more than the distance in positions.
    trained: number of distances that the model knows. A layer whose sliding window is no wider moves no queries.
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
        """Returns whether queries are moved in a layer with this sliding window. None is no window."""
        return window is None or window > self.trained

    def met(self, positions: IntArray, block: IntArray | int) -> IntArray:
        """Returns the positions to which queries of rows at `positions` are rotated for the keys of these blocks."""
        # A block ahead of its row is never seen, so any shift does for it.
        behind = np.maximum(positions // self.block - block, 0)
        moved: IntArray = positions - self.shifts[behind]
        return moved


@dataclass(frozen=True, eq=False)
class FarQueries:
    """A layer's queries before RoPE, for keys that they meet from other positions than their own.

    q:         [R, heads, head_dim], normed where the model family does so.
    positions: [R] int64.
    cos, sin:  [context, head_dim / 2] fp32.
    table:     [blocks] the rule's shifts, on the device.
    """

    q: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    shifts: BlockShifts
    table: torch.Tensor

    def met(self, rows: slice, block: int) -> torch.Tensor:
        """Returns the queries of these rows as they meet the keys of a block, [n, heads, head_dim]."""
        positions = self.positions[rows]
        behind = (positions // self.shifts.block - block).clamp(min=0)
        at = positions - self.table[behind]
        return rotate(self.q[rows], self.cos[at][:, None], self.sin[at][:, None])


@dataclass(frozen=True, eq=False)
class QueryTurns:
    """Turns queries that are rotated to their own rows' positions, for those who score far keys with them.

    cos, sin: [context, head_dim / 2] fp32. moved: [layers] whether a layer moves queries at all.
    """

    shifts: BlockShifts
    cos: torch.Tensor
    sin: torch.Tensor
    moved: tuple[bool, ...]

    def groups(self, position: int, pages: IntArray) -> list[tuple[int, IntArray]]:
        """Groups pages by the position from which the row at `position` meets them: (that position, its pages)."""
        met = self.shifts.met(np.full(len(pages), position, np.int32), pages * PAGE_SIZE // self.shifts.block)
        return [(int(at), pages[met == at]) for at in np.unique(met)]

    def turned(self, queries: torch.Tensor, position: int, at: int) -> torch.Tensor:
        """Rotates a row's queries [layers, heads, head_dim] from its position to `at`, where far keys are met.

        Layers that move no queries keep theirs.
        """
        served = torch.tensor(self.moved, device=queries.device)
        (c, s), (c0, s0) = ([table[p].to(queries.device) for table in (self.cos, self.sin)] for p in (at, position))
        size = c0 * c0 + s0 * s0  # divides the attention factor out: it is in the tables, and in the queries already
        turned = rotate(queries, (c * c0 + s * s0) / size, (s * c0 - c * s0) / size)
        return torch.where(served[:, None, None], turned, queries)


@dataclass(frozen=True)
class AttentionSegment:
    """The keys and values that n rows of one sequence attend to, the same for every layer.

    rows:      place of the rows in the pass.
    positions: [n] absolute positions.
    pages:     [full] the pool's page for each full committed page, -1 where it was evicted. Only a segment with a view
               has evicted pages, and its view names none of them.
    view:      [layers, kv_heads, v] absolute page numbers to attend to. None is all.
    tail:      [n, t] the pool's slots of positions full * PAGE_SIZE ... positions[i], in this order, then -1.
               A causal segment has the last row's only ([1, t]), and row i attends to its beginning.
    causal:    whether the rows are a chain.
    there:     the view on the device, int32, for a backend whose `views_there` is true; then `view` is None.
    """

    rows: slice
    positions: IntArray
    pages: IntArray
    view: IntArray | None
    tail: IntArray
    causal: bool
    there: torch.Tensor | None = None

    @property
    def viewed(self) -> int | None:
        """The pages of the view of a layer and KV head. None is no view."""
        view = self.there if self.view is None else self.view
        return None if view is None else int(view.shape[-1])

    @property
    def boundary(self) -> int:
        """The first position after the full pages."""
        return len(self.pages) * PAGE_SIZE

    def tail_of(self, row: int) -> IntArray:
        """Returns the slots of the positions from the boundary to the row's own, both included."""
        slots: IntArray = self.tail[0 if self.causal else row]
        return slots[: int(self.positions[row]) - self.boundary + 1]


@dataclass(frozen=True)
class Room:
    """The size of a pass of fixed shape. Its rows are of any sequences and are no prefill.

    rows:        rows at most.
    pages:       pages up to that of a sequence's last row, at most.
    viewed:      pages of a view for each layer and KV head, at most. None is no view.
    layers:      layers of the model.
    block_pages: pages of a block for which queries are moved. None moves none.
    """

    rows: int
    pages: int
    viewed: int | None
    layers: int
    block_pages: int | None = None

    @property
    def tail(self) -> int:
        """The slots that a row can gather at most: a page's committed lanes, as many earlier drafts, its ancestors."""
        return 2 * PAGE_SIZE + self.rows


class FixedPlan(Protocol):
    """A plan for passes of one shape. Its memory stays in place, and its launches are always the same.

    Rows that no segment has attend to nothing and get zeros.
    """

    def fill(self, segments: Sequence[AttentionSegment]) -> None:
        """Prepares the next pass. The segments, one row after another, must fit the room, lengths of tails included."""

    def fill_chain(self, segment: AttentionSegment, link: torch.Tensor) -> None:
        """Prepares passes of one row each, the rows of a chain of up to MOST_LINKS. The last one's must fit the room.

        link: [1] int64 on the device, read by `move`: the number of the next pass.
        """

    def move(self) -> None:
        """Goes to the next pass of the chain."""


class AttentionBackend(Protocol):
    """The attention of one backend, which is one file. `prepare` runs once a pass, `attend` once a layer.

    A backend can do more:
    - `prepare_fixed(room, device) -> FixedPlan | None`, where its launches can serve any text of a shape. None says
      that the room is too large.
    - A true `reads_int8` says that it takes int8 keys and values, with `scales=(of keys, of values)`, each
      [kv_heads, pages, PAGE_SIZE] fp32.
    - A true `views_there` says that it takes views that lie on the device.
    - A true `reads_copies` says that it takes `copies`, which it reads in place of full pages: int8 keys and values of
      the same shape, and the scales of both.
    - A true `moves_queries` says that it takes `far=FarQueries`, whose queries it uses instead of q.
    - A true `reports_lse` says that it takes `lse`, [R, heads] fp32 or better, and fills it with the natural logarithm
      of each row's sum of exp(score), unless `far` is given too.
    - A true `CAPS_SCORES` of its file says that it takes `cap`, a soft cap of the scaled scores: see `capped`.
    """

    name: str

    def prepare(self, segments: Sequence[AttentionSegment], device: torch.device) -> Any:
        """Returns what all layers share, such as masks and page tables on the device."""

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
        """Computes softmax attention of all rows, with scores scaled by head_dim ** -0.5.

        q:            [R, heads, head_dim]. Query head h reads KV head h // (heads // kv_heads).
        keys, values: [kv_heads, pages, PAGE_SIZE, head_dim], this layer's part of the pool. Lanes that no row attends
                      to may hold anything, NaN included.
        window:       sliding window. A row at position p attends to positions in (p - window, p] only.
        mass:         [R, kv_heads, absolute pages], filled with the attention probability on each page, summed
                      over the heads of a group.
        Returns [R, heads, head_dim] in q's type. Does not modify the pool.
        """
