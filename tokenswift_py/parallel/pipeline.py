"""The model of a pipeline, on its first stage. Whoever computes passes with it sees one model and one pool of pages.

A pass is laid out here. Each stage computes its layers for the rows and hands the residual stream on, and the last one
sends it back to the first, for the final norm and the LM head. A stage does what one process does for the same layers,
in the same order, so the bits are those of one process.

While a pass is with the other stages, the first may begin another (`begin`): passes of other texts, or the rest of a
long one, keep all stages busy. Source: GPipe (arXiv 1811.06965), whose micro-batches are here groups of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from tokenswift_py.core import Output, Segment
from tokenswift_py.errors import check
from tokenswift_py.kernels.base import AttentionSegment
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.models.native import NativeDecoder
from tokenswift_py.models.ops import TorchOps
from tokenswift_py.models.rope import RopeTables, query_turns
from tokenswift_py.models.rows import Passed, Rows, lay_out, shared_pool
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.parallel.column import Column, as_error
from tokenswift_py.parallel.ranks import Ranks
from tokenswift_py.parallel.shards import agree_on_pass
from tokenswift_py.parallel.staged_pool import StagedPool
from tokenswift_py.parallel.wire import STATISTICS, STATUS_BYTES, STREAM, Incoming, packed, unpacked

LEAST_ROWS = 64  # of a part of a pass; below, a pass costs what its weights cost, which every part would read again
FAILED = -1  # the status of activations that the first stage could not compute


@dataclass(frozen=True)
class Part:
    """Some rows of a pass on their way through the stages."""

    rows: int
    own: Passed
    back: Incoming
    statistics: list[Incoming]


class Flight:
    """A pass that has left the first stage. number: by which the others know it."""

    def __init__(
        self,
        model: PipelineModel,
        number: int,
        parts: list[Part],
        logit_rows: Sequence[int] | None,
        pages: int | None,
    ):
        self._model, self._number = model, number
        self._parts, self._logit_rows, self._pages = parts, logit_rows, pages

    def wait(self) -> Output:
        """Returns the output. Raises the error of the first stage that failed."""
        model, parts = self._model, self._parts
        streams, status = [], 0
        for part in parts:
            for incoming in (part.back, *part.statistics):
                incoming.wait()
            stream, own_status = unpacked(part.back.data, model.stream_shape(part.rows), model.own_dtype)
            streams.append(stream)
            status = status or own_status
        if status:
            model.raise_trouble(status, self._number)
        output: Output = model.own.finish(torch.cat(streams, 1), self._logit_rows)
        found = [self._statistics(part) for part in parts]
        masses, queries = (None if side[0] is None else side for side in zip(*found, strict=True))
        return replace(
            output,
            page_mass=None if masses is None else torch.cat(masses, 1),
            queries=None if queries is None else torch.cat(queries),
            turns=model.turns,
        )

    def _statistics(self, part: Part) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns page masses and queries of some rows, of all layers."""
        own = part.own
        masses, queries = [own.mass], [own.queries]
        for stage, incoming in enumerate(part.statistics, start=1):
            mass, query = self._model.statistics_shapes(stage, part.rows, self._pages, own.queries is not None)
            values = incoming.data.view(torch.float32)
            masses.append(values[: mass.numel()].view(mass) if own.mass is not None else None)
            queries.append(values[mass.numel() :].view(query) if own.queries is not None else None)
        whole_mass = None if own.mass is None else torch.cat([m.to(own.mass) for m in masses if m is not None])
        if own.queries is None:
            return whole_mass, None
        return whole_mass, torch.cat([q.to(own.queries) for q in queries if q is not None], 1)


class PipelineModel:
    """A model whose layers are spread over the stages.

    own:    the first stage's layers, with the embedding, the final norm and the LM head.
    number: number of the others' models. specs: layers of each stage. spec: the whole model.
    flights: passes that keep all stages busy.
    """

    def __init__(
        self, column: Column, own: Any, specs: Sequence[ModelSpec], spec: ModelSpec, rope: RopeTables, ranks: Ranks
    ):
        self.column, self.own, self.specs, self.spec, self.ranks = column, own, specs, spec, ranks
        self.number = column.number(self)
        self.numerics, self.guarantee, self.context, self.clock = own.numerics, own.guarantee, own.context, own.clock
        # On torch no recorded passes of fixed shapes are replayed, so nothing is padded.
        self.row_shapes: tuple[int, ...] = own.row_shapes if isinstance(own, NativeDecoder) else ()
        self.turns = query_turns(rope, spec)
        self.flights = len(specs)
        self.own_dtype: torch.dtype = torch.float32 if isinstance(own, NativeDecoder) else own.dtype
        self._splits = own.guarantee != TorchOps.guarantee  # whether a row's bits do not depend on its company
        self._starts = [spec.first_layer for spec in specs] + [spec.layers]

    def new_cache(self) -> KVCache:
        return KVCache(self.new_pool(pages_for(self.context)), self.context)

    def new_pool(self, pages: int) -> StagedPool:
        own = self.own.new_pool(pages)
        pool = StagedPool(self.column, own, self._starts, self.spec.head_dim)
        self.column.ask({"do": "pool", "number": pool.number, "model": self.number, "pages": pages})
        return pool

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.own.project(hidden)
        return logits

    def forward(
        self,
        segments: Sequence[Segment],
        logit_rows: Sequence[int] | None = None,
        want_mass: bool = False,
        want_queries: bool = False,
        taps: Sequence[int] = (),
    ) -> Output:
        return self.begin(segments, logit_rows, want_mass, want_queries, taps).wait()

    def begin(
        self,
        segments: Sequence[Segment],
        logit_rows: Sequence[int] | None = None,
        want_mass: bool = False,
        want_queries: bool = False,
        taps: Sequence[int] = (),
    ) -> Flight:
        """Begins a pass and does not wait for the other stages. Passes end in the order in which they began."""
        check(not taps, "drafter", "eagle or dflash", "a pipeline of stages does not report the layers that it reads")
        agree_on_pass(self.ranks, self.own.draft, segments, logit_rows)
        pool = shared_pool(segments, StagedPool)
        rows = lay_out(segments, target_weights=not self.own.draft)
        pages = rows.pages if want_mass else None
        count = len(rows.tokens)
        pieces = min(2 * len(self.specs), count // LEAST_ROWS) if self._splits else 1
        bounds = [count * piece // max(pieces, 1) for piece in range(max(pieces, 1) + 1)]
        with self.column.lock:
            number = self.column.new_number()
            parts = [
                self._begin_part(number, pool, rows.part(start, stop), pages, want_queries)
                for start, stop in pairwise(bounds)
            ]
        return Flight(self, number, parts, logit_rows, pages)

    def _begin_part(self, number: int, pool: StagedPool, rows: Rows, pages: int | None, want_queries: bool) -> Part:
        column, count = self.column, len(rows.tokens)
        words = pool.words("pass", number=number, model=self.number, mass=pages, queries=want_queries)
        told = [segments_told(self._of_stage(rows, stage)) for stage in range(1, len(self.specs))]
        arrays = [[rows.tokens, rows.positions, rows.slots, *own] for _, own in told]
        column.tell_each([{**words, "segments": segments} for segments, _ in told], arrays)
        size = int(np.prod(self.stream_shape(count))) * self.own_dtype.itemsize
        back = column.wire.receive(column.others[-1], STREAM, size + STATUS_BYTES)
        statistics = []
        if pages is not None or want_queries:
            for stage, process in enumerate(column.others, start=1):
                shapes = self.statistics_shapes(stage, count, pages, want_queries)
                statistics.append(column.wire.receive(process, STATISTICS, 4 * sum(s.numel() for s in shapes)))
        try:
            passed = self.own.advance(pool.own, self._of_stage(rows, 0), None, pages, want_queries)
        except BaseException:
            column.wire.send(column.others[0], STREAM, torch.cat([torch.zeros(size, dtype=torch.uint8), failed()]))
            for incoming in (back, *statistics):
                incoming.wait()
            raise
        column.wire.send(column.others[0], STREAM, packed(passed.stream, 0))
        return Part(count, passed, back, statistics)

    def _of_stage(self, rows: Rows, stage: int) -> Rows:
        """Returns the rows as one stage sees them: views are of its own layers."""
        layers = slice(self._starts[stage], self._starts[stage + 1])
        own = (s if s.view is None else replace(s, view=s.view[layers]) for s in rows.segments)
        return replace(rows, segments=tuple(own))

    def stream_shape(self, rows: int) -> tuple[int, int, int]:
        return self.own.streams, rows, self.spec.hidden_size

    def statistics_shapes(
        self, stage: int, rows: int, pages: int | None, queries: bool
    ) -> tuple[torch.Size, torch.Size]:
        """Returns the shapes of page masses and queries that a stage reports."""
        layers, own = self.specs[stage].layers, self.own.spec
        mass = torch.Size((layers, rows, own.kv_heads, pages or 0))
        return mass, torch.Size((rows if queries else 0, layers, own.heads, own.head_dim))

    def raise_trouble(self, status: int, number: int) -> None:
        """Raises the error of the stage that failed first in a pass. status: that of the activations that came back."""
        if status != FAILED:
            words, _ = self.column.ask({"do": "trouble", "number": number})[status - 1]
            raise as_error({"error": words["kind"], "text": words["text"]}, status)


def failed() -> torch.Tensor:
    return torch.tensor([FAILED], dtype=torch.int64).view(torch.uint8)


def segments_told(rows: Rows) -> tuple[list[list[Any]], list[np.ndarray]]:
    """Returns the segments of a pass in the form of a message."""
    words, arrays = [], []
    for segment in rows.segments:
        words.append([segment.rows.start, segment.rows.stop, segment.causal, segment.view is not None])
        arrays += [segment.positions, segment.pages, segment.tail]
        arrays += [] if segment.view is None else [segment.view]
    return words, arrays


def rows_heard(words: list[list[Any]], arrays: Sequence[np.ndarray]) -> Rows:
    """Returns the rows of a pass that a message tells of."""
    tokens, positions, slots, *rest = arrays
    left, segments = iter(rest), []
    for start, stop, causal, viewed in words:
        own, pages, tail = next(left), next(left), next(left)
        view = next(left) if viewed else None
        segments.append(AttentionSegment(slice(start, stop), own, pages, view, tail, causal))
    return Rows(tokens, positions, slots, tuple(segments))
