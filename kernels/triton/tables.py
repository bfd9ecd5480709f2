"""The tables of a pass that attention's kernels read: work items and the lists they point into, in one device buffer.

A pass of any shape has tables of its own size. A pass of fixed shape, which a CUDA graph can replay, has room for the
longest text that its shape allows, in memory that stays in place. Items that a text does not need are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment, IntArray, Room, on_device, upload

EVERYTHING = 1 << 30  # a window that every position is inside of
WORKSPACE_BYTES = 64 << 20  # for the partial states of a launch; longer passes take several launches
SPLIT_LEVELS = ((16, 4), (16, 8), (16, 16))  # (number of splits, pages of each), from position 0 on
LAST_LEVEL = 32  # pages of each further split
MOST_STATES = 1 << 13  # most rows x splits of a fixed shape, because its partial states stay reserved

# A work item has FIELDS int32 fields: a tile of packed rows (row * group + query head of the KV head), and the pages of
# one split. The first field, `source`, is 0 for committed pages, which `numbers` lists, and 1 for gathered ones. The
# last is the first page of the split. `TableBuilder.add_launch` makes the others.
FIELDS = 11
COMMITTED, GATHERED = 0, 1

LISTS = ("positions", "numbers", "bounds", "pages", "tails", "ranges", "items")


def splits(pages: int, longest: int = LAST_LEVEL) -> IntArray:
    """Returns the first page of each split that begins before `pages`, and of the one behind them: [n + 1].

    The first splits are short, so that a short context has enough of them to fill a GPU. Later ones are longer, so that
    the partial states cost little beside the keys. The edges are a function of absolute pages only.
    longest: most pages of a split, a power of two.
    """
    starts = [0]
    for count, size in SPLIT_LEVELS:
        step = min(size, longest)
        starts.extend(range(starts[-1] + step, starts[-1] + count * size + 1, step))
    step = min(LAST_LEVEL, longest)
    starts.extend(range(starts[-1] + step, max(pages, starts[-1]) + step, step))
    ends = np.array(starts, np.int32)
    return ends[: int(np.searchsorted(ends, max(pages, 1))) + 1]


@dataclass(frozen=True)
class Launch:
    """Rows [first, stop) of a pass and their items. Items [prefix, tail) read committed pages, [tail, end) gather."""

    first: int
    stop: int
    prefix: int
    tail: int
    end: int
    splits: int


@dataclass(frozen=True)
class Tables:
    """The launches of a pass for one window, and their lists in one buffer on the device."""

    launches: tuple[Launch, ...]
    buffer: torch.Tensor
    offsets: dict[str, int]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.buffer[self.offsets[name] :]


def places(lengths: dict[str, int]) -> tuple[dict[str, int], int]:
    """Returns where each list begins, on a multiple of 64 bytes, and the length of all, both in int32s."""
    offsets, length = {}, 0
    for name, count in lengths.items():
        offsets[name] = length
        length += -(-(count + 1) // 16) * 16
    return offsets, length


@dataclass(frozen=True)
class Heads:
    """The properties of a layer that tables depend on, beside the segments.

    group:       query heads of a KV head.
    tile:        packed rows of an item.
    row_bytes:   bytes of a row's state, for all heads of one split.
    split_pages: most pages of a split.
    """

    kv_heads: int
    group: int
    window: int
    tile: int
    row_bytes: int
    split_pages: int = LAST_LEVEL

    def __post_init__(self) -> None:
        if self.group > self.tile:
            raise ValueError(f"{self.group} query heads a KV head do not fit a tile of {self.tile}")


@dataclass
class Plan:
    """The plan of a pass: its segments, and the tables made for each kind of layer."""

    segments: Sequence[AttentionSegment]
    device: torch.device
    tables: dict[Heads, Tables] = field(default_factory=dict)

    def table(self, heads: Heads) -> Tables:
        if heads not in self.tables:
            builder = TableBuilder(heads, WORKSPACE_BYTES)
            for segment in self.segments:
                builder.add(segment)
            self.tables[heads] = builder.build(self.device)
        return self.tables[heads]


@dataclass
class FixedPlan:
    """A `Plan` for passes of one shape. `fill` writes where the next one attends into memory that stays in place."""

    room: Room
    device: torch.device
    segment: AttentionSegment | None = None
    tables: dict[Heads, FixedTables] = field(default_factory=dict)

    def fill(self, segment: AttentionSegment) -> None:
        self.segment = segment
        for tables in self.tables.values():
            tables.fill(segment)

    def table(self, heads: Heads) -> Tables:
        if heads not in self.tables:
            assert self.segment is not None
            self.tables[heads] = FixedTables(self.room, heads, self.device)
            self.tables[heads].fill(self.segment)
        return self.tables[heads].tables


class FixedTables:
    """Tables of one launch, whose grid is that of the fullest pass there is room for.

    Items that a pass does not need have no rows, and rows that it does not need have no splits.
    """

    def __init__(self, room: Room, heads: Heads, device: torch.device):
        edges = splits(room.pages, heads.split_pages)
        count, lists = len(edges) - 1, 1 if room.viewed is None else room.layers * heads.kv_heads
        self.heads = heads
        self.prefix_items = count * -(-room.rows * heads.group // heads.tile)
        tail_items = room.rows * most_splits(edges, -(-room.tail // PAGE_SIZE))
        lengths = {
            "positions": room.rows,
            "numbers": room.pages if room.viewed is None else lists * room.viewed,
            "bounds": lists * len(edges),
            "pages": room.pages,
            "tails": room.rows * room.tail,
            "ranges": 2 * room.rows,
            "items": FIELDS * (self.prefix_items + tail_items),
        }
        offsets, length = places(lengths)
        self.host = np.zeros(length, np.int32)
        launch = Launch(0, room.rows, 0, self.prefix_items, self.prefix_items + tail_items, count)
        self.tables = Tables((launch,), torch.zeros(length, dtype=torch.int32, device=device), offsets)

    def fill(self, segment: AttentionSegment) -> None:
        """Writes the tables of a segment. Raises ValueError where there is no room for it."""
        builder = TableBuilder(self.heads, 1 << 62)
        builder.add(segment)
        (launch,) = builder.launches
        self.host[:] = 0
        self.host[self.tables.offsets["items"] :: FIELDS] = GATHERED  # an empty item has no rows and no pages
        for name, lists in builder.lists.items():
            self.write(name, 0, lists.joined())
        items = np.array(builder.items, np.int32)
        self.write("items", 0, items[: launch.tail])
        self.write("items", self.prefix_items * FIELDS, items[launch.tail :])
        upload(self.tables.buffer, self.host)

    def write(self, name: str, start: int, values: IntArray) -> None:
        starts = [*self.tables.offsets.values(), len(self.host)]
        at = self.tables.offsets[name] + start
        if at + values.size > starts[LISTS.index(name) + 1]:
            raise ValueError(f"{values.size} {name} do not fit a pass of {self.tables.launches[0].stop} rows")
        self.host[at : at + values.size] = values.ravel()


def most_splits(edges: IntArray, pages: int) -> int:
    """Returns how many splits a run of so many pages can touch at most."""
    starts = np.arange(edges[-1])
    last = np.minimum(starts + pages, edges[-1]) - 1
    return int((np.searchsorted(edges, last, "right") - np.searchsorted(edges, starts, "right")).max()) + 1


class Lists:
    """Lists of integers, laid one behind the other."""

    def __init__(self) -> None:
        self.parts: list[IntArray] = []
        self.length = 0

    def add(self, values: np.ndarray) -> int:
        """Appends a list and returns where it begins."""
        start = self.length
        self.parts.append(np.ascontiguousarray(values, np.int32).ravel())
        self.length += values.size
        return start

    def joined(self) -> IntArray:
        return np.concatenate(self.parts) if self.parts else np.zeros(0, np.int32)


class TableBuilder:
    """Turns segments into work items and their lists.

    workspace: bytes for the partial states of a launch. Longer passes take several launches.
    """

    def __init__(self, heads: Heads, workspace: int):
        self.group, self.window, self.tile, self.row_bytes = heads.group, heads.window, heads.tile, heads.row_bytes
        self.workspace, self.split_pages = workspace, heads.split_pages
        self.lists = {name: Lists() for name in LISTS if name != "items"}
        self.items: list[tuple[int, ...]] = []
        self.launches: list[Launch] = []

    def add(self, segment: AttentionSegment) -> None:
        """Adds a segment's rows in as many launches as the workspace makes necessary."""
        edges = splits(int(segment.positions.max()) // PAGE_SIZE + 1, self.split_pages)
        n, at_once = len(segment.positions), max(1, self.workspace // (self.row_bytes * (len(edges) - 1)))
        pages = self.lists["pages"].add(segment.pages)
        chosen = np.arange(len(segment.pages), dtype=np.int32) if segment.view is None else segment.view
        numbers = self.lists["numbers"].add(chosen)
        if segment.causal or is_chain(segment.tail):
            tails = np.full(n, self.lists["tails"].add(segment.tail[-1]), np.int32)
            together = max(1, self.tile // self.group)
        else:
            tails = self.lists["tails"].add(segment.tail) + np.arange(n) * segment.tail.shape[1]
            together = 1
        self.lists["positions"].add(segment.positions)
        for begin in range(0, n, at_once):
            rows = range(begin, min(begin + at_once, n))
            self.add_launch(segment, rows, edges, chosen, numbers, pages, tails, together)

    def add_launch(
        self,
        segment: AttentionSegment,
        rows: range,
        edges: IntArray,
        chosen: IntArray,
        numbers: int,
        pages: int,
        tails: IntArray,
        together: int,
    ) -> None:
        """Adds one launch of some rows of a segment.

        edges: [splits + 1]. chosen: page numbers, [full] or [layers, kv_heads, v]. numbers, pages: where these lists
        begin. tails: [n] where each row's list begins. together: rows that share a tile when they gather.
        """
        full, positions = len(segment.pages), segment.positions[rows.start : rows.stop]
        first_page = max(0, (int(positions.min()) - self.window + 1) // PAGE_SIZE)
        place = segment.rows.start * self.group
        prefix = len(self.items)
        after = first_split = int(np.searchsorted(edges, first_page, "right")) - 1
        if first_page < full:
            after = int(np.searchsorted(edges, full - 1, "right"))
            bounds = self.lists["bounds"].add(find_all(chosen, np.clip(edges, first_page, full)))
            strides = (0, 0) if chosen.ndim == 1 else (chosen.shape[-1], len(edges))
            packed = range(rows.start * self.group, rows.stop * self.group)
            for split in reversed(range(first_split, after)):  # the longest first: programs begin in this order
                for start in packed[:: self.tile]:
                    count = min(self.tile, packed.stop - start)
                    lists = (numbers, strides[0], bounds + split, strides[1], pages)
                    self.items.append((COMMITTED, place + start, count, split, 0, *lists, int(edges[split])))
        tail = len(self.items)
        for start in range(rows.start, rows.stop, together):
            stop = min(start + together, rows.stop)
            last = int(segment.positions[start:stop].max())
            page = max(full, first_page)
            for split in range(int(np.searchsorted(edges, page, "right")) - 1, len(edges) - 1):
                begin, end = max(page, int(edges[split])), min(int(edges[split + 1]), last // PAGE_SIZE + 1)
                if begin < end:
                    resume = int(first_page < full and split < after)
                    tile = (GATHERED, place + start * self.group, (stop - start) * self.group, split, resume)
                    gathered = (int(tails[stop - 1]) - segment.boundary, last + 1, begin, end, 0)
                    self.items.append((*tile, *gathered, int(edges[split])))
        behind = np.searchsorted(edges, positions // PAGE_SIZE, "right")
        self.lists["ranges"].add(np.stack([np.full(len(positions), first_split), behind], 1))
        start = segment.rows.start
        self.launches.append(
            Launch(start + rows.start, start + rows.stop, prefix, tail, len(self.items), len(edges) - 1)
        )

    def build(self, device: torch.device) -> Tables:
        lists = {name: lists.joined() for name, lists in self.lists.items()}
        lists["items"] = np.array(self.items, np.int32).ravel()
        offsets, length = places({name: len(values) for name, values in lists.items()})
        joined = np.zeros(length, np.int32)
        for name, values in lists.items():
            joined[offsets[name] : offsets[name] + len(values)] = values
        return Tables(tuple(self.launches), on_device(joined, device), offsets)


def find_all(chosen: IntArray, limits: IntArray) -> IntArray:
    """Returns the index of the first page in each ascending list that is not below each limit, [lists, limits].

    chosen: [..., pages]. limits: [limits], ascending.
    """
    lists = chosen.reshape(int(np.prod(chosen.shape[:-1])), chosen.shape[-1])
    apart = np.arange(len(lists), dtype=np.int64)[:, None] * (int(limits[-1]) + 1)  # so lists do not overlap
    found = np.searchsorted((np.minimum(lists, limits[-1]) + apart).ravel(), limits + apart)
    return (found - np.arange(len(lists))[:, None] * lists.shape[1]).astype(np.int32)


def is_chain(tail: IntArray) -> bool:
    """Returns whether every row's slots are a beginning of the last row's."""
    return bool(((tail == tail[-1]) | (tail < 0)).all())
