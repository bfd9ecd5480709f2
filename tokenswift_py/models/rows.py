"""Lays the segments of a pass out row after row: tokens, positions, slots, and the keys that each row attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tokenswift_py.core import Segment
from tokenswift_py.kernels.base import AttentionSegment
from tokenswift_py.kvcache.base import PAGE_SIZE, IntArray
from tokenswift_py.kvcache.memories.base import Memory


@dataclass(frozen=True)
class Rows:
    """The R rows of a pass. tokens, positions, slots: [R]. Each row's keys and values go to its slot in the pool."""

    tokens: IntArray
    positions: IntArray
    slots: IntArray
    segments: tuple[AttentionSegment, ...]

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """Returns tokens, positions and slots, [3, R] int64, which torch needs for indices."""
        return np.stack([self.tokens, self.positions, self.slots]).astype(np.int64)

    @property
    def pages(self) -> int:
        """Returns the number of absolute pages up to that of the last row."""
        return int(self.positions.max()) // PAGE_SIZE + 1

    def part(self, start: int, stop: int) -> Rows:
        """Returns some of the rows as a pass of their own. Rows of the same pass that they attend to must be computed
        before."""
        within = []
        for segment in self.segments:
            first, last = max(start, segment.rows.start), min(stop, segment.rows.stop)
            if first < last:
                own = slice(first - segment.rows.start, last - segment.rows.start)
                tail = segment.tail[own]
                if segment.causal:
                    tail = segment.tail[:, : segment.tail.shape[1] - (segment.rows.stop - last)]
                place = slice(first - start, last - start)
                within.append(replace(segment, rows=place, positions=segment.positions[own], tail=tail))
        chosen = slice(start, stop)
        return Rows(self.tokens[chosen], self.positions[chosen], self.slots[chosen], tuple(within))


@dataclass(frozen=True)
class Passed:
    """The result of some layers for R rows.

    stream:  [n, R, hidden_size] the state with which the next layer begins: the residual stream, and what is still to
             be added to it where n is 2.
    mass, queries: see `Output`, of these layers alone.
    """

    stream: torch.Tensor
    mass: torch.Tensor | None
    queries: torch.Tensor | None


Pool = TypeVar("Pool")


def shared_pool(segments: Sequence[Segment], kind: type[Pool]) -> Pool:
    """Returns the pool that the sequences of a pass share. Raises ValueError for several, or another executor's."""
    pools = {id(segment.cache.pool): segment.cache.pool for segment in segments}
    if len(pools) != 1:
        raise ValueError(f"the sequences of one pass share one pool; these are in {len(pools)}")
    pool = next(iter(pools.values()))
    if not isinstance(pool, kind):
        raise ValueError(f"this executor reads a {kind.__name__}, not a {type(pool).__name__}")
    return pool


def lay_out(segments: Sequence[Segment], target_weights: bool = True, views_there: bool = False) -> Rows:
    """Makes room in the caches for the rows of one pass, and returns where everything is.

    target_weights: false for a pass with draft weights, whose rows may never be committed.
    views_there: whether views that were chosen on a device may stay there.
    Raises ValueError for rows past the context or tail rows that do not exist, and MemoryError when the pool is full.
    Each leaves all the caches as they were.
    """
    if not segments:
        raise ValueError("a pass needs at least one segment")
    placed: list[IntArray] = []
    positions: list[IntArray] = []
    tails = [(segment.cache, segment.cache.tail_length) for segment in segments]
    try:
        place(segments, target_weights, placed, positions)
        attention, start = [], 0
        for segment, own, slots in zip(segments, positions, placed, strict=True):
            rows = slice(start, start + len(own))
            attention.append(attention_segment(segment, rows, own, slots, views_there))
            start = rows.stop
    except (ValueError, MemoryError):
        for cache, rows_before in reversed(tails):
            cache.drop_tail(rows_before)
        raise
    tokens = np.concatenate([segment.tree.tokens for segment in segments])
    return Rows(tokens, np.concatenate(positions), np.concatenate(placed), tuple(attention))


def place(segments: Sequence[Segment], target_weights: bool, placed: list[IntArray], positions: list[IntArray]) -> None:
    """Appends each segment's rows to its cache. Their slots and positions join the lists."""
    for segment in segments:
        cache = segment.cache
        if any(not 0 <= row < cache.tail_length for row in segment.tail):
            raise ValueError(f"tail {segment.tail} names rows that are not among {cache.tail_length} provisional ones")
        expected = tuple(range(cache.length, cache.length + len(segment.tail)))
        if cache.tail_positions(segment.tail) != expected:
            raise ValueError(f"tail {segment.tail} is not a path from the committed rows on")
        own = (cache.length + len(segment.tail) + segment.tree.depth).astype(np.int32)
        committable = target_weights and segment.view is None and cache.tail_committable(segment.tail)
        placed.append(cache.append(own, committable))
        positions.append(own)


def attention_segment(
    segment: Segment, rows: slice, positions: IntArray, own: IntArray, views_there: bool = False
) -> AttentionSegment:
    """Lists the keys that the rows of a segment attend to. own: [n] slots of the rows.

    From the last committed page boundary on they are listed by position, in path order (law 1).
    """
    cache, tree = segment.cache, segment.tree
    pages = cache.pages[: cache.full_pages].copy()
    held = pages >= 0
    before = np.concatenate(
        [np.arange(cache.full_pages * PAGE_SIZE, cache.length), np.array(segment.tail) + cache.length]
    )
    common = cache.slots(before.astype(np.int32))
    if segment.causal or tree.is_chain:
        tail = np.concatenate([common, own])[None, :]
        if not segment.causal:
            count = len(common) + 1 + np.arange(len(tree))
            tail = np.where(np.arange(tail.shape[1])[None, :] < count[:, None], tail, -1)
    else:
        tail = np.full((len(tree), len(common) + int(tree.depth.max()) + 1), -1, np.int32)
        tail[:, : len(common)] = common
        for node in range(len(tree)):
            place = len(common) + tree.depth[node]
            if node:
                tail[node, len(common) : place] = tail[tree.parents[node], len(common) : place]
            tail[node, place] = own[node]
    heads = (cache.pool.layers, cache.pool.kv_heads)
    view, there = None, None
    if segment.view is not None:
        if segment.view.shape[:2] != heads:
            raise ValueError(f"the view is for {segment.view.shape[:2]} layers and KV heads")
        there = segment.view.there if views_there else None
    if segment.view is not None and there is None:
        view = segment.view.pages
        if view.size and int(view.max()) >= len(pages):
            raise ValueError(f"the view names page {int(view.max())} of {len(pages)} full pages")
        if not held[view].all():
            raise ValueError(f"the view names page {int(view[~held[view]][0])}, which was evicted")
    elif there is None and not held.all():
        # After an eviction the pages left are the full view. All rows see the same, so they can be committed.
        view = np.broadcast_to(cache.kept, (*heads, len(cache.kept)))
    return AttentionSegment(rows, positions, pages, view, tail.astype(np.int32), segment.causal, there)


Recall = tuple[slice, Memory]  # rows of a pass, and the memory that they read


def recalls_of(segments: Sequence[Segment], rows: Rows) -> list[Recall]:
    """Returns the rows of the sequences whose memory holds something."""
    pairs = zip(rows.segments, (segment.cache.memory for segment in segments), strict=True)
    return [(laid.rows, memory) for laid, memory in pairs if memory is not None and memory.folded]


def taps_of(taps: Sequence[int], states: torch.Tensor | None, layers: int) -> dict[int, torch.Tensor]:
    """Returns where each tapped layer's input is to be written, [R, hidden_size] of `states`, by the layer's number.

    A layer named twice, or one that there is not, would leave states that nobody writes. So both are refused.
    """
    if list(taps) != sorted(set(taps) & set(range(layers))):
        raise ValueError(f"tapped layers {list(taps)} must ascend, from 0 to {layers - 1}")
    return {} if states is None else {layer: states[:, i] for i, layer in enumerate(taps)}


def chosen_rows(logit_rows: Sequence[int] | None, rows: int) -> IntArray:
    """Returns the rows whose logits are wanted, all where none are named."""
    return native_ints(np.arange(rows) if logit_rows is None else np.asarray(logit_rows, np.int32).reshape(-1))


def native_ints(array: np.ndarray) -> IntArray:
    return np.ascontiguousarray(array, np.int32)


def attention_arrays(rows: Rows) -> list[tuple[IntArray, IntArray, IntArray | None, IntArray]]:
    """Returns the segments in the native engine's form: positions, full pages, view, tail."""
    return [
        (
            native_ints(segment.positions),
            native_ints(segment.pages),
            None if segment.view is None else native_ints(segment.view),
            native_ints(segment.tail),
        )
        for segment in rows.segments
    ]
