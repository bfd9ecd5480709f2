"""Passes on their way: a model in one process ends them at once, a pipeline has as many under way as it has stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenswift_py.core import Model, Output
from tokenswift_py.decoding.passes import Pass
from tokenswift_py.serving.seat import Seat
from tokenswift_py.serving.together import begin_together


def flights_of(model: Model) -> int:
    """Returns how many passes of a model should be under way at a time."""
    return int(getattr(model, "flights", 1))


class Flight:
    """The passes of several texts, computed together.

    passes: those of the texts, in their order. began: the time when it began, by the scheduler's clock.
    """

    def __init__(self, group: list[Seat], passes: Sequence[Pass], clock: Callable[[], float]):
        self.group, self.passes = group, passes
        self.model = passes[0].model
        self._tails = [asked.segment.cache.tail_length for asked in passes]
        self._clock, self.began = clock, 0.0
        self._spoiled = self.model.clock.spoiled
        self._lap: Any = None
        self._wait: Callable[[], list[Output]] | None = None

    def begin(self) -> None:
        self._lap = self.model.clock.start()
        self.began = self._clock()
        self._wait = begin_together(self.model, self.passes)
        for seat in self.group:
            seat.flies = True

    def end(self) -> tuple[list[Output], float, bool]:
        """Waits for the outputs. Returns them with the time, and whether the pass took time that later ones will not
        take."""
        assert self._wait is not None
        outputs = self._wait()
        self._lap.stop()
        # This waits for a device. All texts pay for this time, and not only the first one that looks at its logits.
        _ = self._lap.ms
        return outputs, self._clock(), self.model.clock.spoiled != self._spoiled

    def undo(self) -> None:
        """Forgets the rows of a pass that failed."""
        for asked, rows in zip(self.passes, self._tails, strict=True):
            asked.segment.cache.drop_tail(rows)
