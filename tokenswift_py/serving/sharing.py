"""Shares the milliseconds of a pass among the texts that travelled in it, and says how many rows each may have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tokenswift_py.core import Model
from tokenswift_py.decoding.passes import Pass, Timer
from tokenswift_py.models.clock import Lap
from tokenswift_py.planning.costs import SHORTEST, Load, PassCost


class OwnTime(Timer):
    """The time of one text in company: the host's work for it, and its shares of the passes it was in.

    clock: the function that returns the time in seconds.
    """

    alone = False

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._seconds = 0.0
        self._resumed: float | None = None
        self.spoiled = 0  # the number of passes whose time later passes will not take

    def now(self) -> float:
        return self._seconds + (0.0 if self._resumed is None else self._clock() - self._resumed)

    def start(self, model: Model) -> Lap:
        return OwnLap(self)

    def resume(self) -> None:
        """Counts the host's time for this text from now on."""
        self._resumed = self._clock()

    def suspend(self) -> None:
        """Stops counting the host's time for this text."""
        self._seconds, self._resumed = self.now(), None

    def charge(self, seconds: float, spoiled: bool) -> None:
        """Adds the text's share of a pass."""
        self._seconds += seconds
        self.spoiled += spoiled


class OwnLap:
    """A lap of a text's own time. It is not a number if a pass in between took time that later passes will not take."""

    def __init__(self, time: OwnTime):
        self._time, self._spoiled, self._began = time, time.spoiled, time.now()
        self.ms = float("nan")

    def stop(self) -> None:
        if self._time.spoiled == self._spoiled:
            self.ms = 1e3 * (self._time.now() - self._began)


class GroupCost:
    """The cost of passes of one model that several texts share. It is a fit, and for each size the distance of its
    passes from the fit.

    Products are made in tiles of rows, so a row may cost nothing, or as much as four rows. A fit alone rises evenly,
    and would fill the wrong tiles. What sets a size apart from the fit is not to be taken for the machine's load.
    """

    def __init__(self) -> None:
        self._cost = PassCost(load=Load(0))
        self._ratios: dict[int, float] = {}  # rows -> measured over fitted milliseconds

    def observe(self, rows: int, keys: int, ms: float) -> None:
        """Takes in one pass.

        keys: the number of keys of all its texts together.
        """
        self._cost.observe(rows, keys, ms)
        fitted = self._cost(rows, keys)
        if fitted > 0:
            old = self._ratios.get(rows, 1.0)
            self._ratios[rows] = old + (min(ms / fitted, 2.0) - old) / RATIO_PASSES

    def __call__(self, rows: int, keys: int) -> float:
        """Returns the expected milliseconds of a pass. It is 0 before anything was measured."""
        return self._cost(rows, keys) * self._ratios.get(rows, 1.0)

    def split(self, passes: Sequence[Pass], ms: float, spoiled: bool = False) -> list[float]:
        """Returns the shares of these passes of one forward. They add up to `ms`. Each text pays for what its rows add,
        and all pay the same part of the rest. So a row costs a planner what it costs the whole company.

        spoiled: whether these milliseconds went to work that no later pass does, and so tell nothing about its cost.
        """
        rows = np.array([len(asked.segment.tree) for asked in passes])
        keys = np.array([asked.segment.cache.length for asked in passes])
        total = int(rows.sum()), int(keys.sum())
        if not spoiled:
            self.observe(*total, ms)
        if len(passes) == 1:
            return [ms]
        whole = self._cost(*total)
        added = np.array([whole - self._cost(total[0] - r, total[1] - k) for r, k in zip(rows, keys, strict=True)])
        rest = max(0.0, whole - float(added.sum())) / len(passes)
        shares = added + rest
        scaled: list[float] = (shares * (ms / max(float(shares.sum()), 1e-9))).tolist()
        return scaled


RATIO_PASSES = 8  # the passes of one size after which a pass counts 1/e


class Width:
    """Leaves out guesses whose rows cost the company more time than they save.

    Every text drafts as if it knew the cost of a row. But only when all trees are there can one see which rows are
    cheap. With tiles of four rows, five texts have three rows for nothing, and eight texts have none. The width that is
    taken is the one for which most tokens a millisecond are expected (see `planning.planner` for why this ratio
    counts).

    cost:    the cost of a pass of the target.
    between: the milliseconds from one such pass to the next, in which drafts are made and the host works.
    """

    def __init__(self, cost: GroupCost) -> None:
        self.cost = cost
        self.between = 0.0
        self._ended = 0.0

    def cut(self, passes: Sequence[Pass]) -> list[Pass]:
        """Returns the passes of one forward, each with the rows it is worth."""
        cuttable = [i for i, asked in enumerate(passes) if asked.chances is not None]
        if not cuttable:
            return list(passes)
        guesses: list[tuple[float, int, float]] = []  # (least chance up to there, text, chance)
        for i in cuttable:
            least, chances = 1.0, passes[i].chances
            assert chances is not None
            for chance in chances[1:]:
                least = min(least, chance)
                guesses.append((least, i, chance))
        guesses.sort(key=lambda guess: -guess[0])  # stable: the guesses of each text stay in their order
        rows = sum(len(asked.segment.tree) for asked in passes) - len(guesses)
        keys = sum(asked.segment.cache.length for asked in passes)
        taken = self._best(guesses, rows, len(cuttable), keys)
        kept = [1] * len(passes)
        for _, i, _ in guesses[:taken]:
            kept[i] += 1
        return [asked if asked.chances is None else asked.first(kept[i]) for i, asked in enumerate(passes)]

    def _best(self, guesses: Sequence[tuple[float, int, float]], rows: int, texts: int, keys: int) -> int:
        """Returns how many guesses to verify, the first of those given.

        rows: the rows that are computed in any case. `texts` of them are one token of each text, the others are of
              prompts.
        """
        tokens = [float(texts)]
        for _, _, chance in guesses:
            tokens.append(tokens[-1] + chance)
        plain = self.cost(rows, keys)
        if not plain:
            return len(guesses)
        # A fit to passes of prompts alone may say that a few rows cost nothing.
        rate = max(count / max(self.cost(texts + i, keys) + self.between, SHORTEST) for i, count in enumerate(tokens))
        gains = [count / rate - self.cost(rows + i, keys) for i, count in enumerate(tokens)]
        return gains.index(max(gains))

    def observe(self, began: float, ended: float, ms: float) -> None:
        """Takes in one pass of the target.

        began, ended: the times of the pass, in milliseconds by some clock.
        """
        waited = began - self._ended
        if self._ended and waited < 4 * ms:  # otherwise nobody had anything to write
            self.between += (waited - self.between) / 32
        self._ended = ended
