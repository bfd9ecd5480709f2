"""The work items of attention: every row meets each of its pages once, in a split that its position alone decides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment
from tokenswift_py.kernels.triton.items import EVERYTHING, NEAR, Heads, TableBuilder, places, splits

LAYERS, KV_HEADS = 2, 2


@st.composite
def segments(draw: st.DrawFn, start: int) -> AttentionSegment:
    """Rows of a tree or a chain after committed pages, some of which a view may leave out, and earlier drafts."""
    full, n = draw(st.integers(0, 70)), draw(st.integers(1, 12))
    before = draw(st.integers(0, PAGE_SIZE - 1)) + draw(st.sampled_from((0, 0, 60, 130)))
    causal = draw(st.booleans())
    depth = np.arange(n) if causal else np.minimum(np.arange(n), draw(st.integers(0, n)))
    positions = (full * PAGE_SIZE + before + depth).astype(np.int32)
    length = before + int(depth.max()) + 1
    tail = np.where(np.arange(length) <= (before + depth)[:, None], np.arange(n * length).reshape(n, length), -1)
    view = None
    if draw(st.booleans()) and full:
        count = draw(st.integers(1, full))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        chosen = [[np.sort(rng.permutation(full)[:count]) for _ in range(KV_HEADS)] for _ in range(LAYERS)]
        view = np.array(chosen, np.int32)
    pages = (1000 + np.arange(full)).astype(np.int32)
    return AttentionSegment(
        slice(start, start + n), positions, pages, view, (tail[-1:] if causal else tail).astype(np.int32), causal
    )


@st.composite
def passes(draw: st.DrawFn) -> list[AttentionSegment]:
    made: list[AttentionSegment] = []
    for _ in range(draw(st.integers(1, 3))):
        made.append(draw(segments(made[-1].rows.stop if made else 0)))
    return made


@settings(max_examples=60, deadline=None)
@given(
    passes(), st.sampled_from((EVERYTHING, 1, 70, 700)), st.sampled_from((1, 3)), st.sampled_from((1 << 40, 4000)),
    st.sampled_from((1, 2, 3)),
)  # fmt: skip
def test_every_row_meets_its_pages_once(
    made: list[AttentionSegment], window: int, group: int, workspace: int, tiles: int
) -> None:
    builder = TableBuilder(Heads(KV_HEADS, group, window, 8, 64, tiles=tiles), workspace)
    for segment in made:
        builder.add(segment)
    buffer, rows = builder.joined(), made[-1].rows.stop
    at_positions, at_ranges, at_lists = places(len(builder.launches), rows)
    lists, ranges = buffer[at_lists:], buffer[at_ranges : at_ranges + 3 * rows].reshape(rows, 3)
    positions = buffer[at_positions : at_positions + rows]
    assert (positions == np.concatenate([segment.positions for segment in made])).all()
    for which in range(LAYERS * KV_HEADS):
        met: dict[int, dict[int, int]] = defaultdict(dict)  # of every packed row: the state of each page
        for number, launch in enumerate(builder.launches):
            begin, count = buffer[2 * number : 2 * number + 2]
            written: set[tuple[int, int]] = set()
            for item in lists[begin : begin + count * 14].reshape(count, 14):
                first, packed, split, numbers, apart, bounds, bounds_apart, pages, tail, above, start, stop, page, _ = (
                    item
                )
                assert packed <= 8 * (tiles if start >= stop else 1)
                listed = []
                if bounds >= 0:
                    low, high = lists[bounds + which * bounds_apart :][:2]
                    listed = lists[numbers + which * apart :][low:high].tolist()
                    assert (lists[pages + np.array(listed, int)] == 1000 + np.array(listed, int)).all()
                for row in range(first, first + packed):
                    assert launch.first <= row // group < launch.stop
                    position = positions[row // group]
                    near = position // PAGE_SIZE + 1 - NEAR
                    state = split if split >= 0 else page - near
                    if split >= 0 or 0 <= page - near < NEAR:
                        assert (row, state) not in written and 0 <= state < launch.states
                        written.add((row, state))
                    for absolute in [*listed, *range(start, stop)]:
                        if (absolute >= near) == (split < 0) and absolute * PAGE_SIZE <= position:
                            assert absolute not in met[row]
                            met[row][absolute] = state
                            slots = [at for at in range(absolute * 64, absolute * 64 + 64) if at <= position]
                            if absolute not in listed:
                                assert slots[-1] < above
                                check_gathered(made, row // group, slots, lists[tail + np.array(slots)])
            for row in range(launch.first * group, launch.stop * group):
                first_split, behind, near = ranges[row // group]
                read = {*range(NEAR - near, NEAR), *(NEAR + split for split in range(first_split, behind))}
                assert {(row, state) for state in read} <= written
                assert {
                    state for absolute, state in met[row].items() if seen(absolute, row, positions, group, window)
                } <= read
        for segment in made:
            full = len(segment.pages)
            chosen = (
                np.arange(full) if segment.view is None else segment.view.reshape(-1, segment.view.shape[-1])[which]
            )
            for row in range(segment.rows.start, segment.rows.stop):
                last = positions[row] // PAGE_SIZE
                wanted = {page for page in [*chosen, *range(full, last + 1)] if seen(page, row, positions, 1, window)}
                for packed in range(row * group, (row + 1) * group):
                    assert wanted <= met[packed].keys()
                    for page in wanted:
                        assert met[packed][page] == state_of(page, int(last))


@settings(max_examples=30, deadline=None)
@given(
    segments(0).filter(lambda segment: segment.causal), st.sampled_from((EVERYTHING, 1, 70)), st.sampled_from((1, 3)),
    st.sampled_from((1, 2)),
)  # fmt: skip
def test_a_row_in_turn_meets_what_it_would_meet_alone(
    chain: AttentionSegment, window: int, group: int, tiles: int
) -> None:
    """The items of one row are right for every row of a chain, however many tiles all of them would fill."""
    heads = Heads(KV_HEADS, group, window, 8, 64, tiles=tiles)
    builder = TableBuilder(heads, 1 << 40)
    positions, ranges = builder.add_in_turn(chain)
    assert positions.tolist() == chain.positions.tolist()
    for row, position in enumerate(positions):
        alone, tail = TableBuilder(heads, 1 << 40), chain.tail_of(row)[None]
        alone.add(replace(chain, rows=slice(0, 1), positions=positions[row : row + 1], tail=tail))
        first, behind, near = ranges[row]
        read = {*range(NEAR - near, NEAR), *(NEAR + split for split in range(first, behind))}
        for which in range(LAYERS * KV_HEADS):
            met, own = (
                [meeting for meeting in meetings(made, which, position) if seen(meeting[1], 0, [position], 1, window)]
                for made in (builder, alone)
            )
            assert sorted(met) == sorted(own) and len(own) == len({(packed, page) for packed, page, *_ in own})
            assert {packed for packed, *_ in own} == set(range(group)) and {state for _, _, state, _ in own} <= read


def meetings(builder: TableBuilder, which: int, position: int) -> Iterator[tuple[int, int, int, list[int]]]:
    """Yields every packed row and page of an item, the page's state for this position, and its slots if gathered."""
    lists, near = builder.lists.joined(), position // PAGE_SIZE + 1 - NEAR
    for item in np.concatenate(builder.items[0]):
        first, packed, split, numbers, apart, bounds, bounds_apart, _, tail, above, start, stop, page, _ = item
        assert packed <= 8, "a row alone is one tile"
        low, high = lists[bounds + which * bounds_apart :][:2] if bounds >= 0 else (0, 0)
        listed = lists[numbers + which * apart :][low:high].tolist()
        for absolute in [*listed, *range(start, stop)]:
            if (absolute >= near) == (split < 0) and absolute * PAGE_SIZE <= position:
                slots = np.arange(absolute * PAGE_SIZE, min(absolute * PAGE_SIZE + PAGE_SIZE, position + 1))
                assert absolute in listed or slots[-1] < above
                found = [] if absolute in listed else lists[tail + slots].tolist()
                for row in range(first, first + packed):
                    yield row, absolute, split if split >= 0 else page - near, found


def seen(page: int, row: int, positions: np.ndarray | list[int], group: int, window: int) -> bool:
    """Whether the window of a packed row reaches into a page."""
    return bool((page + 1) * PAGE_SIZE - 1 > positions[row // group] - window)


def state_of(page: int, last: int) -> int:
    """The state of a page for a row whose own page is `last`: a function of both and of nothing else."""
    if page > last - NEAR:
        return page - (last + 1 - NEAR)
    return NEAR + int(np.searchsorted(splits(last + 1), page, "right")) - 1


def check_gathered(made: list[AttentionSegment], row: int, slots: list[int], found: np.ndarray) -> None:
    """The slots of positions in a gathered page are those of the row's own tail."""
    (segment,) = (segment for segment in made if segment.rows.start <= row < segment.rows.stop)
    own = segment.tail_of(row - segment.rows.start)
    assert (own[np.array(slots) - segment.boundary] == found).all()
