"""Shares the milliseconds of a pass among the texts that travelled in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tokenswift_py.core import Model
from tokenswift_py.decoding.passes import Pass, Timer
from tokenswift_py.models.clock import Lap
from tokenswift_py.planning.costs import PassCost


class OwnTime(Timer):
    """The time of one text in company: what the host does for it, and its shares of the passes it was in.

    clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._seconds = 0.0
        self._resumed: float | None = None
        self.spoiled = 0  # how many passes took what no other will

    def now(self) -> float:
        return self._seconds + (0.0 if self._resumed is None else self._clock() - self._resumed)

    def start(self, model: Model) -> Lap:
        return OwnLap(self)

    def resume(self) -> None:
        """From now on the host works for this text."""
        self._resumed = self._clock()

    def suspend(self) -> None:
        """From now on it works for others."""
        self._seconds, self._resumed = self.now(), None

    def charge(self, seconds: float, spoiled: bool) -> None:
        """Adds the text's share of a pass."""
        self._seconds += seconds
        self.spoiled += spoiled


class OwnLap:
    """A lap of a text's own time; not a number where a pass in between took what no other will."""

    def __init__(self, time: OwnTime):
        self._time, self._spoiled, self._began = time, time.spoiled, time.now()
        self.ms = float("nan")

    def stop(self) -> None:
        if self._time.spoiled == self._spoiled:
            self.ms = 1e3 * (self._time.now() - self._began)


class Shares:
    """Splits the time of passes of one model: each text pays what its rows add, and all pay alike for the rest.

    So a row costs a planner what it costs the whole company, and speculation shrinks as the company grows: a pass that
    is bound by arithmetic already charges each row in full.
    """

    def __init__(self) -> None:
        self._cost = PassCost()

    def split(self, passes: Sequence[Pass], ms: float) -> list[float]:
        """The shares of these passes of one forward, which add up to `ms`."""
        rows = np.array([len(asked.segment.tree) for asked in passes])
        keys = np.array([asked.segment.cache.length for asked in passes])
        total = int(rows.sum()), int(keys.sum())
        self._cost.observe(*total, ms)
        if len(passes) == 1:
            return [ms]
        whole = self._cost(*total)
        added = np.array([whole - self._cost(total[0] - r, total[1] - k) for r, k in zip(rows, keys, strict=True)])
        rest = max(0.0, whole - float(added.sum())) / len(passes)
        shares = added + rest
        scaled: list[float] = (shares * (ms / max(float(shares.sum()), 1e-9))).tolist()
        return scaled
