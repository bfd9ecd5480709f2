"""The tables of a pass that attention's kernels read, in one buffer on the device for each kind of layer.

The number of work items, their texts, and the places of their lists are data. So launches of one shape serve any
texts. A pass of any shape has a buffer of its own. A pass of fixed shape, which a CUDA graph can replay, has a buffer
that stays in place. It has room for as many texts as rows, each as long as the shape allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tokenswift_py.kernels.base import MOST_LINKS, PAGE_SIZE, AttentionSegment, Room, upload
from tokenswift_py.kernels.triton.items import FIELDS, NEAR, Heads, Launch, Places, TableBuilder, Tables, places, splits

WORKSPACE_BYTES = 64 << 20  # memory for the partial states of a launch; longer passes take several launches
MOST_STATES = 1 << 14  # most rows x splits of a fixed shape, because its partial states stay reserved


@dataclass
class Masses:
    """The memory in which a plan's layers, one after the other, keep the maximum and the sum of every row and page.

    Maxima are -inf between two layers.
    """

    memory: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, shape: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self.memory is None or self.memory[0].shape != shape:
            tops = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
            self.memory = tops, torch.empty_like(tops)
        return self.memory


@dataclass
class Plan:
    """The plan of a pass: its segments, and the tables made for each kind of layer."""

    segments: Sequence[AttentionSegment]
    device: torch.device
    tables: dict[Heads, Tables] = field(default_factory=dict)
    masses: Masses = field(default_factory=Masses)

    def table(self, heads: Heads) -> Tables:
        if heads not in self.tables:
            builder = TableBuilder(heads, WORKSPACE_BYTES)
            for segment in self.segments:
                builder.add(segment)
            self.tables[heads] = made = builder.build(self.device)
            make_lists(builder.segments, made)
        return self.tables[heads]


@dataclass
class FixedPlan:
    """A `Plan` for passes of one shape. `fill` writes where the next one attends into memory that stays in place.

    link: [1] int64, the number of the next pass of a chain; None for other passes.
    """

    room: Room
    device: torch.device
    segments: Sequence[AttentionSegment] = ()
    tables: dict[Heads, FixedTables] = field(default_factory=dict)
    masses: Masses = field(default_factory=Masses)
    link: torch.Tensor | None = None

    def fill(self, segments: Sequence[AttentionSegment]) -> None:
        self.segments, self.link = segments, None
        for tables in self.tables.values():
            tables.fill(segments)

    def fill_chain(self, segment: AttentionSegment, link: torch.Tensor) -> None:
        self.segments, self.link = (segment,), link
        for tables in self.tables.values():
            tables.fill_chain(segment)

    def move(self) -> None:
        assert self.link is not None
        for tables in self.tables.values():
            tables.move(self.link)

    def table(self, heads: Heads) -> Tables:
        if heads not in self.tables:
            self.tables[heads] = made = FixedTables(self.room, heads, self.device)
            if self.link is None:
                made.fill(self.segments)
            else:
                made.fill_chain(*self.segments)
                made.move(self.link)
        return self.tables[heads].tables


def make_lists(segments: Sequence[Places], tables: Tables) -> None:
    """Makes the lists of views that lie on the device, for which the others have left room."""
    lists = tables.buffer[tables.places[-1] :]
    for segment in segments:
        if segment.there is None:
            continue
        chosen = segment.there.flatten(0, 1)
        lists[segment.numbers : segment.numbers + chosen.numel()] = chosen.flatten()
        for at, count, bounds in segment.limits:
            limits = lists[at : at + count].expand(len(chosen), count).contiguous()
            found = torch.searchsorted(chosen, limits, out_int32=True)
            lists[bounds : bounds + found.numel()] = found.flatten()


class FixedTables:
    """The tables of one launch, for any texts that fit a room. Rows that no text has attend to nothing."""

    def __init__(self, room: Room, heads: Heads, device: torch.device):
        self.heads, edges = heads, len(splits(room.pages, heads.split_pages))
        gathered = -(-room.tail // PAGE_SIZE) + 1  # pages that a row can gather at most
        items = edges + NEAR + gathered
        lists, listed = (1, room.pages) if room.viewed is None else (room.layers * heads.kv_heads, room.viewed)
        row = items * FIELDS + lists * (listed + edges + 2 * gathered) + edges + 2 * gathered + room.pages + room.tail
        at = places(1, room.rows)
        buffer = torch.zeros(at[-1] + room.rows * row, dtype=torch.int32, device=device)
        self.tables = Tables((Launch(0, room.rows, NEAR + edges - 1, room.rows * items),), buffer, at)
        self.own = buffer.new_zeros(MOST_LINKS, at[-1] - at[0])  # position and splits of the row of a chain's passes

    def fill(self, segments: Sequence[AttentionSegment]) -> None:
        """Writes the tables of some texts' rows. Raises ValueError where there is no room for them."""
        builder = TableBuilder(self.heads, 1 << 62)
        for segment in segments:
            builder.add(segment)
        self._write(builder)

    def fill_chain(self, segment: AttentionSegment) -> None:
        """Writes the tables of one row that takes the place of each of a chain's rows in turn, the first one's now."""
        builder = TableBuilder(self.heads, 1 << 62)
        positions, ranges = builder.add_in_turn(segment)
        self._write(builder)
        starts = np.array(self.tables.places) - self.tables.places[0]
        own = np.zeros(self.own.shape, np.int32)
        own[: len(positions), 0] = positions
        own[: len(positions), starts[1] : starts[1] + 3] = ranges
        upload(self.own, own)

    def move(self, link: torch.Tensor) -> None:
        """Goes to the pass of a chain that has this number, [1] int64 on the device."""
        start, _, stop = self.tables.places
        torch.index_select(self.own, 0, link, out=self.tables.buffer[None, start:stop])

    def _write(self, builder: TableBuilder) -> None:
        (launch,), buffer = self.tables.launches, self.tables.buffer
        (used,), values = builder.launches, builder.joined(launch.stop)
        if used.stop > launch.stop or used.states > launch.states or len(values) > len(buffer):
            raise ValueError(f"{used.stop} rows of {used.states} splits do not fit a pass of {launch.stop} rows")
        upload(buffer[: len(values)], values)
        make_lists(builder.segments, self.tables)
