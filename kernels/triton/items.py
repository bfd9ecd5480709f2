"""The work items of a pass say which rows attend to which pages in one go. Lists say where these pages are.

A row's pages are shared out by their absolute numbers. Its own page and the one before it are near: each is a split of
its own. The pages before them are in the splits of `splits`. So which pages are summed together is a matter of the
row's position alone. A split of committed pages is read by a tile of rows together. A split that is gathered is read
by rows that share their tails. No item has to wait for another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment, IntArray, on_device

EVERYTHING = 1 << 30  # a window that holds every position
WORKSPACE_BYTES = 64 << 20  # memory for the partial states of a launch; longer passes take several launches
SPLIT_LEVELS = ((16, 4), (16, 8))  # (number of splits, pages of each), from position 0 on
LAST_LEVEL = 16  # pages of each further split
NEAR = 2  # how many of a row's last pages, its own included, are each a split of their own

# A work item is a piece of packed rows (row * group + query head of the KV head) and the pages of one split. A piece
# that gathers pages is one tile; others may be several. The fields of an item are int32. A "place" is an index into the
# lists of the buffer:
#   0, 1   the first packed row, and how many there are
#   2      where the partial state goes: NEAR + the number of the split; -1 for a page that is near
#   3, 4   the absolute numbers of the committed pages to attend to: place, and how far apart those of two heads are
#   5, 6   the split's first index in them, followed by the end of the split: place, and how far apart those of two
#          heads are; place -1 if the split has none
#   7      the pool's page of each committed page: place
#   8, 9   the list of slots by position: where that of position 0 would be, and the position at which the list ends
#   10, 11 the first gathered page, and the one after the last
#   12, 13 the first page of the split, and how many pages of it there are; items are ordered by this number
FIELDS = 14


def splits(pages: int, longest: int = LAST_LEVEL) -> IntArray:
    """Returns the first page of each split that begins before `pages`, and of the one after them: [n + 1].

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
    """Rows [first, stop) of a pass. states: partial states of a row. items: how many there are, or may be."""

    first: int
    stop: int
    states: int
    items: int


@dataclass(frozen=True)
class Tables:
    """The launches of a pass for one window, and their lists in one buffer on the device.

    The buffer begins with the place and the number of every launch's items, [launches, 2].

    places: where the other parts begin. They are [R] the rows' positions; [R, 3] each row's first split, the one after
            its last, and how many pages are near; and the lists.
    """

    launches: tuple[Launch, ...]
    buffer: torch.Tensor
    places: tuple[int, int, int]


@dataclass(frozen=True)
class Heads:
    """The properties of a layer that tables depend on, beside the segments.

    group:       query heads of a KV head.
    tile:        packed rows of an item that gathers pages.
    row_bytes:   bytes of a row's state, for all heads of one split.
    split_pages: most pages of a split.
    tiles:       most tiles of an item that gathers none.
    """

    kv_heads: int
    group: int
    window: int
    tile: int
    row_bytes: int
    split_pages: int = LAST_LEVEL
    tiles: int = 1

    def __post_init__(self) -> None:
        if self.group > self.tile:
            raise ValueError(f"{self.group} query heads a KV head do not fit a tile of {self.tile}")


def places(launches: int, rows: int) -> tuple[int, int, int]:
    """Returns where the positions, the ranges and the lists of a pass begin, each on a multiple of 64 bytes."""
    positions = aligned(2 * launches)
    ranges = positions + aligned(rows)
    return positions, ranges, ranges + aligned(3 * rows)


def aligned(count: int) -> int:
    return -(-count // 16) * 16


@dataclass(frozen=True)
class Tiles:
    """Rows that are taken together, tile by tile.

    first, count: packed rows. last: place of the last row in its segment. above: its position and 1. least_near, near:
    the first near page, at least and at most. own: the last page.
    """

    first: IntArray
    count: IntArray
    last: IntArray
    above: IntArray
    least_near: IntArray
    near: IntArray
    own: IntArray

    @classmethod
    def of(cls, positions: IntArray, rows: range, start: int, group: int, packed: int) -> Tiles:
        """Makes tiles of up to `packed` packed rows. positions: those of the rows, which begin at `start`."""
        first: IntArray = np.arange(0, len(rows) * group, packed, dtype=np.int32)
        stop: IntArray = np.minimum(first + packed, len(rows) * group).astype(np.int32)
        begin, last = first // group, (stop - 1) // group
        near = np.maximum(positions // PAGE_SIZE + 1 - NEAR, 0)
        # A tile may begin and end inside a row. So reduceat gets pairs of bounds, and every second result is a tile's.
        pairs = np.stack([begin, last + 1], 1).ravel()

        def fold(by: np.ufunc, values: IntArray) -> IntArray:
            folded: IntArray = by.reduceat(np.append(values, values[-1]), pairs)[::2]
            return folded

        above, least, most = fold(np.maximum, positions + 1), fold(np.minimum, near), fold(np.maximum, near)
        own = (above - 1) // PAGE_SIZE
        return cls((start + rows.start) * group + first, stop - first, rows.start + last, above, least, most, own)

    def items(self, used: np.ndarray, *fields: Any) -> IntArray:
        """Returns the items of some tiles. used: [..., tiles]. fields: those from 2 on, broadcast against it."""
        made: IntArray = np.zeros((*used.shape, FIELDS), np.int32)
        for at, values in enumerate((self.first, self.count, *fields)):
            made[..., at] = values
        kept: IntArray = made[used]
        return kept


NOT_LISTED, NOT_GATHERED = (0, 0, -1, 0, 0), (0, 0, 0, 0)


class Lists:
    """Lists of integers, laid one after the other."""

    def __init__(self) -> None:
        self.parts: list[IntArray] = []
        self.length = 0

    def add(self, values: np.ndarray) -> int:
        """Appends a list and returns where it begins."""
        start = self.length
        self.parts.append(np.ascontiguousarray(values, np.int32).ravel())
        self.length += values.size
        return start

    def leave(self, length: int) -> int:
        """Leaves room for a list that is made on the device, and returns where it begins."""
        return self.add(np.zeros(length, np.int32))

    def joined(self) -> IntArray:
        return np.concatenate(self.parts) if self.parts else np.zeros(0, np.int32)


class Places:
    """Where the lists of a segment begin: numbers of its committed pages, pages of the pool, every row's tail.

    there: the view on the device, for whose lists room is left, see `make_lists`. None where the host lists pages.
    limits: place and number of limits of the lists of bounds that were left, and where each begins.
    """

    def __init__(self, segment: AttentionSegment, lists: Lists):
        self.lists, n, self.there = lists, len(segment.positions), segment.there
        self.limits: list[tuple[int, int, int]] = []
        self.chosen = np.arange(len(segment.pages), dtype=np.int32) if segment.view is None else segment.view
        if self.there is not None:
            self.apart, self.numbers = self.there.shape[-1], lists.leave(self.there.numel())
        else:
            self.apart = 0 if self.chosen.ndim == 1 else self.chosen.shape[-1]
            self.numbers = lists.add(self.chosen)
        self.pages = lists.add(segment.pages)
        self.alike = segment.causal or is_chain(segment.tail)
        if self.alike:
            self.tails = np.full(n, lists.add(segment.tail[-1]), np.int32)
        else:
            self.tails = (lists.add(segment.tail) + np.arange(n) * segment.tail.shape[1]).astype(np.int32)
        self.tails -= segment.boundary

    def bounded(self, limits: IntArray) -> tuple[int, int, int, int, int]:
        """Returns fields 3 to 7 for the committed pages between the first two limits. Field 5 and n is of the nth."""
        apart = len(limits) if self.apart else 0
        if self.there is None:
            bounds = self.lists.add(find_all(self.chosen, limits))
        else:
            bounds = self.lists.leave(self.there.shape[0] * self.there.shape[1] * len(limits))
            self.limits.append((self.lists.add(limits), len(limits), bounds))
        return self.numbers, self.apart, bounds, apart, self.pages


class TableBuilder:
    """Turns segments into work items and their lists.

    workspace: bytes for the partial states of a launch. Longer passes take several launches.
    """

    def __init__(self, heads: Heads, workspace: int):
        self.group, self.window, self.tile, self.row_bytes = heads.group, heads.window, heads.tile, heads.row_bytes
        self.workspace, self.split_pages, self.piece = workspace, heads.split_pages, heads.tile * heads.tiles
        self.lists = Lists()
        self.segments: list[Places] = []
        self.positions: list[IntArray] = []
        self.ranges: list[IntArray] = []
        self.items: list[list[IntArray]] = []  # the items of each launch
        self.launches: list[Launch] = []

    def add(self, segment: AttentionSegment) -> None:
        """Adds a segment's rows. They are those after the rows of the segment before it."""
        far = max(0, int(segment.positions.max()) // PAGE_SIZE + 1 - NEAR)
        edges = splits(far, self.split_pages)
        states, begin, n = NEAR + (len(edges) - 1 if far else 0), 0, len(segment.positions)
        at = Places(segment, self.lists)
        self.segments.append(at)
        while begin < n:
            left = self.rows_left(states)
            if not left:
                start = segment.rows.start + begin
                self.launches.append(Launch(start, start, states, 0))
                self.items.append([])
                left = max(1, self.rows_left(states))
            rows = range(begin, min(n, begin + left))
            self.items[-1].append(self.items_of(segment, rows, edges, at))
            last = self.launches[-1]
            self.launches[-1] = Launch(last.first, last.stop + len(rows), max(last.states, states), 0)
            begin = rows.stop

    def add_in_turn(self, segment: AttentionSegment) -> tuple[IntArray, IntArray]:
        """Adds one row, which takes the place of each row of a chain in turn: positions and splits of `joined` are the
        first one's. Returns those of all, [n] and [n, 3], whose items these are."""
        self.tile = self.piece = max(self.piece, len(segment.positions) * self.group)  # one item for all
        self.add(segment)
        for items in self.items[-1]:
            items[:, 1] = self.group
        positions, ranges = self.positions.pop(), self.ranges.pop()
        self.positions.append(positions[:1])
        self.ranges.append(ranges[:1])
        self.launches[-1] = replace(self.launches[-1], stop=self.launches[-1].first + 1)
        return positions, ranges

    def rows_left(self, states: int) -> int:
        """Returns how many rows of so many states the last launch has room for."""
        if not self.launches:
            return 0
        last = self.launches[-1]
        return max(0, self.workspace // (self.row_bytes * max(states, last.states)) - (last.stop - last.first))

    def items_of(self, segment: AttentionSegment, rows: range, edges: IntArray, at: Places) -> IntArray:
        """Returns the items of some rows of a segment, [n, FIELDS], and adds these rows to the lists of rows."""
        positions, full = segment.positions[rows.start : rows.stop], len(segment.pages)
        own = positions // PAGE_SIZE
        near = np.maximum(own + 1 - NEAR, 0)
        first_page, far = max(0, (int(positions.min()) - self.window + 1) // PAGE_SIZE), int(near.max())
        together = max(1, self.tile // self.group) if at.alike else 1
        tiles, apart = (
            Tiles.of(positions, rows, segment.rows.start, self.group, packed)
            for packed in (self.piece, together * self.group)
        )
        tails = at.tails[apart.last]
        first = int(np.searchsorted(edges, first_page, "right")) - 1
        split = np.arange(first, max(first, int(np.searchsorted(edges, far))))[:, None]
        begin, end = np.maximum(edges[split], first_page), np.minimum(edges[split + 1], far)
        numbers, apart_by, bounds, *rest = at.bounded(np.clip(edges, first_page, max(first_page, min(full, far))))
        listed, whole = (numbers, apart_by, bounds + split, *rest), end <= full
        place = (NEAR + split, *listed)
        gathered = (tails, apart.above, np.maximum(begin, full), np.minimum(end, apart.near))
        items = [
            tiles.items((tiles.near > begin) & whole, *place, *NOT_GATHERED, edges[split], end - begin),
            apart.items((apart.near > begin) & ~whole, *place, *gathered, edges[split], end - begin),
        ]
        for page in range(max(first_page, int(near.min())), int(own.max()) + 1):
            fields: tuple[Any, ...]
            if page < full:
                some, fields = tiles, (*at.bounded(np.array([page, page + 1])), *NOT_GATHERED)
            else:
                some, fields = apart, (*NOT_LISTED, tails, apart.above, page, page + 1)
            items.append(some.items((some.least_near <= page) & (some.own >= page), -1, *fields, page, 1))
        behind = np.where(near > first_page, np.searchsorted(edges, near), first)
        shown = np.minimum(NEAR, own + 1 - np.maximum(near, first_page))
        self.positions.append(positions)
        self.ranges.append(np.stack([np.full(len(positions), first), behind, shown], 1).astype(np.int32))
        return np.concatenate(items)

    def joined(self, rows: int | None = None) -> IntArray:
        """Returns the contents of the buffer. rows: how many it has room for, if more than there are."""
        for number, made in enumerate(self.items):
            items = largest_first(np.concatenate(made))
            self.launches[number] = replace(self.launches[number], items=len(items))
            self.items[number] = [items]
        offsets = [self.lists.add(made[0]) for made in self.items]
        at = places(len(self.launches), sum(map(len, self.positions)) if rows is None else rows)
        header = np.zeros(at[-1], np.int32)
        counts = np.array([(offset, len(made[0])) for offset, made in zip(offsets, self.items, strict=True)])
        parts = (counts, np.concatenate(self.positions), np.concatenate(self.ranges))
        for place, values in zip((0, *at[:2]), parts, strict=True):
            header[place : place + values.size] = values.ravel()
        return np.concatenate([header, self.lists.joined()])

    def build(self, device: torch.device) -> Tables:
        buffer = on_device(self.joined(), device)
        return Tables(tuple(self.launches), buffer, places(len(self.launches), sum(map(len, self.positions))))


def largest_first(items: IntArray) -> IntArray:
    """Sorts items by their pages. Programs begin in this order, and all would wait for a long one at the end."""
    return items[np.argsort(-items[:, FIELDS - 1], kind="stable")]


def find_all(chosen: IntArray, limits: IntArray) -> IntArray:
    """Returns the index of the first page in each ascending list that is not below each limit, [lists, limits].

    chosen: [..., pages]. limits: [limits], ascending.
    """
    lists = chosen.reshape(int(np.prod(chosen.shape[:-1])), chosen.shape[-1])
    apart = np.arange(len(lists), dtype=np.int64)[:, None] * (int(limits[-1]) + 1)  # keeps the lists from overlapping
    found = np.searchsorted((np.minimum(lists, limits[-1]) + apart).ravel(), limits + apart)
    return (found - np.arange(len(lists))[:, None] * lists.shape[1]).astype(np.int32)


def is_chain(tail: IntArray) -> bool:
    """Returns whether every row's slots are a beginning of the last row's."""
    return bool(((tail == tail[-1]) | (tail < 0)).all())
