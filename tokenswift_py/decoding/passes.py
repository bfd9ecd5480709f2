"""Passes that a coroutine asks for, and the driver of one coroutine alone.

A decode loop and the drafters are coroutines: each yields a `Pass` where it needs a model, and is sent its `Output`.
Whoever drives them decides which passes travel together and keeps the time. One text alone is driven by `compute` and
`steps`; a scheduler drives many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from tokenswift_py.core import Chooser, Model, Output, Segment
from tokenswift_py.models.clock import Lap

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class Pass:
    """One forward pass over the rows of one sequence; the parameters are those of `Model.forward`.

    chances: [rows] of being emitted. Where they are given, who computes the pass may leave out rows at the end, down to
             the first: the output has as many as were computed.
    taps:    layers of which the output reports what enters them, ascending.
    chooser: chooses the tokens of a chain after its first, for which those of the tree only hold places; see `Model`.
             Such a pass does not travel with others.
    """

    model: Model
    segment: Segment
    logit_rows: Sequence[int] | None = None
    want_mass: bool = False
    want_queries: bool = False
    chances: Sequence[float] | None = None
    taps: Sequence[int] = ()
    chooser: Chooser | None = None

    def first(self, rows: int) -> Pass:
        """Returns the pass of the first so many rows, of one that may be cut."""
        return replace(self, segment=replace(self.segment, tree=self.segment.tree.first(rows)))

    def compute(self) -> Output:
        if self.chooser is not None:
            model: Any = self.model
            chained: Output = model.forward_chain(self.segment, self.chooser)
            return chained
        return self.model.forward(
            [self.segment], self.logit_rows, want_mass=self.want_mass, want_queries=self.want_queries, taps=self.taps
        )


Passes = Generator[Pass, Output, T]  # a coroutine that yields passes, is sent their outputs, and returns a T


class Timer:
    """Tells what a coroutine's work takes. This is the time of one that runs alone; a driver that runs several side by
    side has its own, which leaves out the others' work.

    alone: whether the passes asked for travel with no others.
    """

    alone = True

    def now(self) -> float:
        """Returns seconds since some moment."""
        return time.perf_counter()

    def start(self, model: Model) -> Lap:
        """Begins a lap around a pass of this model."""
        return model.clock.start()


def compute(passes: Passes[T]) -> T:
    """Drives a coroutine alone: computes every pass it yields, and returns what it returns."""
    output: Any = None
    while True:
        try:
            asked = passes.send(output)
        except StopIteration as end:
            result: T = end.value
            return result
        output = answer(passes, asked)


def steps(text: Generator[Pass | T, Output | None, None]) -> Iterator[T]:
    """Drives the coroutine of a text alone, and yields all that it yields but the passes."""
    output: Output | None = None
    try:
        while True:
            asked = text.send(output)
            if isinstance(asked, Pass):
                output = answer(text, asked)
            else:
                yield asked
                output = None
    except StopIteration:
        return
    finally:
        text.close()


def answer(passes: Generator[Any, Any, Any], asked: Pass) -> Output:
    """Computes a pass. An error of it is raised inside of the coroutine, which may have pages to give back."""
    try:
        return asked.compute()
    except BaseException as error:
        passes.throw(error)
        raise AssertionError("a coroutine went on after a pass that failed") from error


def without_passes(work: Callable[P, T]) -> Callable[P, Passes[T]]:
    """Makes a coroutine of a function that needs no passes."""

    @wraps(work)
    def coroutine(*args: P.args, **kwargs: P.kwargs) -> Passes[T]:
        return work(*args, **kwargs)
        yield  # makes this function a generator

    return coroutine
