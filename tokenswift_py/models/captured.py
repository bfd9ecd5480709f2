"""Passes of fixed shapes, which a GPU can replay as CUDA graphs.

A verification is a few hundred launches, and each costs the host more time than a short one costs the GPU. So a pass of
trees, of one text or of several, is padded to one of a few shapes. Everything that changes between passes of a shape
(tokens, positions, slots, page tables, ancestors, how many rows and texts there are) is copied to memory that stays in
place, and the launches that were recorded once run again as a whole. Padding rows attend to nothing, and their keys and
values are not written. By laws 1 and 9 neither they nor the rows of other texts change a bit of a row.

A chain of draft passes is recorded too, with the choice of the tokens between them: the device goes from pass to pass
by a number of its own, so the host is asked nothing until it reads all tokens at once.

Shapes are recorded before they are needed: all of them when a tree first has branches, and those that a text had when
it outgrows its room. The time of the pass that causes this says nothing about others, so the executor's clock is
spoiled.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar
from weakref import proxy

import numpy as np
import torch

from tokenswift_py.core import Chooser, Output
from tokenswift_py.kernels.base import MOST_LINKS, PAGE_SIZE, AttentionBackend, BlockShifts, FixedPlan, Room, upload
from tokenswift_py.kvcache.pages import TorchPagePool
from tokenswift_py.models.clock import Clock
from tokenswift_py.models.ops import Ops
from tokenswift_py.models.rows import Rows
from tokenswift_py.models.spec import ModelSpec

logger = logging.getLogger("tokenswift")

ROWS = (1, 2, 4, 8, 16, 32, 64)
LEAST_PAGES, LEAST_VIEWED = 64, 16  # the pages of the smallest shape, and of its view; doubled until they suffice
MOST_DRAFT_ROWS = 8  # the rows of the largest pass under a view that is recorded before it is needed
LINKS = (8, 4, 2, 1)  # the passes of the parts of a chain, each of which is recorded as one graph
WARM_UPS = 3  # the runs before a recording, which compile, load and allocate

T = TypeVar("T")
# Runs a function. Returns its result, and a function that does the same again in the same memory.
Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]


def cuda_graphs(device: torch.device) -> Record:
    """Makes a function that records CUDA graphs.

    The graphs share memory, because only one runs at a time, and its results are copied out before another runs. They
    are captured in a stream of this device. torch's own capture stream is one of the device that was first.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = function()  # records the launches and runs nothing yet
        except BaseException:
            torch.cuda.set_stream(before)  # torch does so only after the capture's end, which raises
            torch.cuda.synchronize(device)
            raise
        graph.replay()
        return result, graph.replay

    return record


class Recorder:
    """Records functions, until one cannot be recorded. Then, or where `record` is None, nothing is recorded."""

    def __init__(self, record: Record | None):
        self.record = record

    def __call__(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]] | None:
        if self.record is None:
            return None
        try:
            return self.record(function)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[0]
            logger.warning("CUDA graphs are off, for one could not be captured, which makes passes slower: %s", reason)
            self.record = None
            return None


def recorder_for(device: torch.device) -> Recorder:
    """Returns a recorder of CUDA graphs for a GPU, unless TOKENSWIFT_GRAPHS is 0. Else one that records nothing."""
    wanted = device.type == "cuda" and os.environ.get("TOKENSWIFT_GRAPHS") != "0"
    return Recorder(cuda_graphs(device) if wanted else None)


class Replayed(Generic[T]):
    """A function over memory that stays in place, with its recording once there is one."""

    def __init__(self, function: Callable[[], T], recorder: Recorder):
        self.function, self.recorder = function, recorder
        self.recorded: tuple[T, Callable[[], None]] | None = None

    def record(self) -> None:
        """Records the function. Its memory must hold values that it can run on."""
        if self.recorder.record is not None:
            for _ in range(WARM_UPS):
                self.function()
            self.recorded = self.recorder(self.function)

    def run(self) -> T:
        """Returns the result. Where the function was recorded, the next run overwrites it."""
        if self.recorded is None:
            return self.function()
        result, replay = self.recorded
        replay()
        return result


@dataclass(frozen=True)
class Shape:
    """The shape of a pass. logits: whether logits of all rows are computed, or of none. taps: layers."""

    room: Room
    logits: bool
    mass: bool
    queries: bool
    taps: tuple[int, ...] = ()

    @property
    def kind(self) -> Shape:
        """The part of the shape that stays while rows and pages of a run's passes change."""
        return replace(self, room=replace(self.room, rows=0, pages=0))


class Decoder(Protocol):
    """The parts of a decoder that a step needs; see `TorchDecoder`."""

    spec: ModelSpec
    device: torch.device
    attention: AttentionBackend
    ops: Ops
    clock: Clock
    shifts: BlockShifts | None

    def compute(
        self,
        pool: TorchPagePool,
        plan: FixedPlan,
        places: torch.Tensor,
        logit_rows: slice | torch.Tensor,
        mass_pages: int | None,
        want_queries: bool,
        *,
        taps: Sequence[int] = (),
    ) -> Output: ...


class Step:
    """The passes of one shape over one pool."""

    def __init__(self, decoder: Decoder, pool: TorchPagePool, shape: Shape, plan: FixedPlan, recorder: Recorder):
        self.shape, self.plan = shape, plan
        self.places = torch.empty((3, shape.room.rows), dtype=torch.int64, device=decoder.device)
        # The function does not know the step: a cycle would keep a graph's memory on the GPU until Python looks for it.
        places = self.places
        logits, pages = slice(None if shape.logits else 0), shape.room.pages if shape.mass else None
        self.replayed = Replayed(
            lambda: decoder.compute(pool, plan, places, logits, pages, shape.queries, taps=shape.taps), recorder
        )

    def record(self, rows: Rows) -> None:
        """Records the step where that is possible, on the first row of a pass. No keys or values are written."""
        self.fill(first_row(rows))
        self.replayed.record()

    def run(self, rows: Rows) -> Output:
        self.fill(rows)
        return cut(self.replayed.run(), len(rows.tokens), rows.pages)

    def fill(self, rows: Rows) -> None:
        padded = np.zeros((3, self.shape.room.rows), np.int64)
        padded[2] = -1  # padding rows are not written
        padded[:, : len(rows.tokens)] = rows.places
        upload(self.places, padded)
        self.plan.fill(rows.segments)


def first_row(rows: Rows) -> Rows:
    """Returns the first row alone. Its key and value are not written."""
    segment = rows.segments[0]
    alone = replace(segment, rows=slice(0, 1), positions=segment.positions[:1], tail=segment.tail[:1])
    return Rows(rows.tokens[:1], rows.positions[:1], np.full(1, -1, np.int32), (alone,))


def cut(output: Output, rows: int, pages: int) -> Output:
    """Returns a copy without padding rows, and without the mass after the last page."""
    mass, queries, residual = output.page_mass, output.queries, output.residual
    return Output(
        output.hidden[:rows].clone(),
        output.logits[:rows].clone(),
        None if mass is None else mass[:, :rows, :, :pages].clone(),
        None if queries is None else queries[:rows].clone(),
        None if residual is None else residual[:rows].clone(),
        output.turns,
        None if output.taps is None else output.taps[:rows].clone(),
    )


class ChainStep:
    """Chains of draft passes of one row over one pool, and the choice of the token that each of them embeds.

    link: [1] int64 the number of the next pass. places: [3, 1] its token, position and slot. way: [2, MOST_LINKS] the
    positions and slots of all.
    """

    def __init__(self, decoder: Decoder, pool: TorchPagePool, plan: FixedPlan, chooser: Chooser, recorder: Recorder):
        self.decoder, self.pool, self.plan, self.chooser = decoder, pool, plan, chooser
        self.link = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        self.places = self.link.new_zeros(3, 1)
        self.way = self.link.new_zeros(2, MOST_LINKS)
        follow = partial(ChainStep._follow, proxy(self))  # no cycle, as in Step
        self.parts = {links: Replayed(partial(follow, links), recorder) for links in LINKS}

    def record(self, rows: Rows) -> None:
        """Records the parts of chains where that is possible, on a chain whose keys and values are not written."""
        self._fill(replace(rows, slots=np.full_like(rows.slots, -1)))
        for part in self.parts.values():
            part.record()

    def run(self, rows: Rows) -> Output:
        """Computes a chain, of which the host knows the first token and the place of every row. Returns the last row's
        output."""
        self._fill(rows)
        left = len(rows.tokens)
        for links, part in self.parts.items():
            while left >= links:
                output, left = part.run(), left - links
        return cut(output, 1, 0)

    def _fill(self, rows: Rows) -> None:
        way = np.full((2, MOST_LINKS), -1, np.int64)
        way[:, : len(rows.tokens)] = rows.places[1:]
        way[0, len(rows.tokens) :] = way[0, 0]  # a recording comes there too
        upload(self.way, way)
        upload(self.places, rows.places[:, :1].copy())
        self.link.zero_()
        self.plan.fill_chain(rows.segments[0], self.link)
        self.chooser.fill()

    def _follow(self, links: int) -> Output:
        for _ in range(links):
            torch.index_select(self.way, 1, self.link, out=self.places[1:])
            self.plan.move()
            output = self.decoder.compute(self.pool, self.plan, self.places, slice(None), None, False)
            self.places[0] = self.chooser.choose(output.logits, self.link)
            self.link.add_(1).remainder_(MOST_LINKS)
        return output


class Steps:
    """The steps for the shapes that passes over one pool have had."""

    def __init__(self, decoder: Decoder, pool: TorchPagePool, recorder: Recorder):
        self.decoder, self.pool, self.recorder = decoder, pool, recorder
        self.steps: dict[Shape, Step | None] = {}
        self.chains: dict[Room, ChainStep] = {}

    def find(self, rows: Rows, logits: bool, mass: bool, queries: bool, taps: tuple[int, ...] = ()) -> Step | None:
        """Returns the step that can run a pass. None for a prefill, or a large pass."""
        count = len(rows.tokens)
        if count > ROWS[-1] or any(segment.causal for segment in rows.segments):
            return None
        room = self.room_for(rows, next(n for n in ROWS if n >= count))
        if any(segment.tail.shape[1] > room.tail for segment in rows.segments):
            return None
        shape = Shape(room, logits, mass, queries, taps)
        if shape not in self.steps:
            self.decoder.clock.spoil()
            self.steps[shape] = self.made(shape)
            for other in self.due(shape):
                step = self.steps[other] = self.steps.get(other) or self.made(other)
                if step is not None and step.replayed.recorded is None:
                    step.record(rows)
        return self.steps[shape]

    def chain(self, rows: Rows, chooser: Chooser) -> ChainStep:
        """Returns what computes chains like this one, whose tokens the chooser chooses."""
        room = self.room_for(rows, 1)
        if room not in self.chains or self.chains[room].chooser is not chooser:
            self.decoder.clock.spoil()
            self.chains = {room: step for room, step in self.chains.items() if step.chooser is chooser}
            attention: Any = self.decoder.attention
            plan = attention.prepare_fixed(room, self.decoder.device)
            self.chains[room] = ChainStep(self.decoder, self.pool, plan, chooser, self.recorder)
            self.chains[room].record(rows)
        return self.chains[room]

    def room_for(self, rows: Rows, count: int) -> Room:
        """Returns the room of passes of so many rows, in which these segments' pages have places."""
        viewed = [segment.viewed for segment in rows.segments if segment.viewed is not None]
        return Room(
            count,
            doubled(LEAST_PAGES, rows.pages),
            doubled(LEAST_VIEWED, max(viewed)) if viewed else None,
            self.decoder.spec.layers,
            None if self.decoder.shifts is None else self.decoder.shifts.block // PAGE_SIZE,
        )

    def due(self, shape: Shape) -> list[Shape]:
        """Returns the shapes to record when a pass first has this shape.

        They are this one, and all numbers of rows that its kind has had in a smaller room, or may have now that a tree
        has branches.
        """
        if self.recorder.record is None:
            return []
        known = {other.room.rows for other in self.steps if other.kind == shape.kind}
        needed, most = shape.room.rows, 1
        if needed > 1:
            most = max(needed, ROWS[-1] if shape.room.viewed is None else MOST_DRAFT_ROWS)
        counts = [count for count in ROWS if count <= most or count in known]
        return [replace(shape, room=replace(shape.room, rows=count)) for count in counts]

    def made(self, shape: Shape) -> Step | None:
        """Makes the step of a shape. Returns None where the attention or the other operations cannot run it."""
        attention: Any = self.decoder.attention
        if not row_shapes(attention, self.decoder.ops):
            return None
        plan = attention.prepare_fixed(shape.room, self.decoder.device)
        return None if plan is None else Step(self.decoder, self.pool, shape, plan, self.recorder)


def row_shapes(attention: AttentionBackend, ops: Ops) -> tuple[int, ...]:
    """Returns the numbers of rows that passes are padded to, none where attention or other operations cannot pad."""
    return ROWS if ops.pads and hasattr(attention, "prepare_fixed") else ()


def doubled(least: int, enough: int) -> int:
    while least < enough:
        least *= 2
    return least
