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
    layers: of the model.
    """

    rows: int
    pages: int
    viewed: int | None
    layers: int

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
    `scales=(of keys, of values)`, each [kv_heads, pages, PAGE_SIZE] fp32.
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
