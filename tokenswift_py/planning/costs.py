"""The milliseconds that a pass costs, fitted to the passes that were timed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


LOAD_PASSES = 5
LOAD_TRUST = 0.85
LOAD_MOST = 4.0  # a pass that took longer still tells no more


class Load:
    """How many times as long passes take now as they usually do, because others use the machine as well.

    It is the median of what the latest passes took over what they usually take, which one slow pass does not move. All
    passes of one machine share it: those of the target tell what those of the draft will take, which have perhaps not
    been made for a while.

    What passes usually take is measured by the load, too, and both could drift apart for ever. So the median counts a
    little less, and usual times follow a load that stays.

    passes: how many passes of a text are the latest; 0 takes no load into account.
    """

    def __init__(self, passes: int = LOAD_PASSES) -> None:
        self._passes = passes
        self._ratios: deque[float] = deque([1.0], maxlen=passes)
        self.factor = 1.0

    def among(self, texts: int) -> None:
        """Takes in how many texts tell of each pass that they share."""
        if self._ratios.maxlen != texts * self._passes:
            self._ratios = deque(self._ratios, maxlen=texts * self._passes)

    def observe(self, ratio: float) -> None:
        """Takes in what a pass took over what it usually takes."""
        self._ratios.append(min(LOAD_MOST, max(1 / LOAD_MOST, ratio)))
        self.factor = median(self._ratios or [1.0]) ** LOAD_TRUST


class PassCost:
    """A model of a pass's milliseconds: a + b rows + c extra + g several + context (d + e rows + f extra + h several).

    extra counts the rows beyond KNEE, and several is 1 for more rows than one. The coefficients are at least 0, so more
    rows never cost less, and from the third on each costs no less than the one before: a few rows hide behind the
    memory that any pass reads, many are bound by arithmetic. The second row alone may cost more than the third: one row
    of attention on AVX2 waits for memory, two are bound by arithmetic (13, 22, 27 and 33 ms for 1 to 4 rows after
    22 831 tokens, int8 KV). The coefficients are fitted to the latest passes by least absolute relative deviations.

    What is fitted is the time of a pass over the machine's load when it was made, and what is told is the fit times the
    load now. Passes of few rows may come hundreds of rounds apart. Where they had been slow because of what others did
    just then, drafting was weighed against a plain decoding that was long fast again: a story was drafted on for 1 000
    tokens at 0.64 of plain decoding's speed.

    shapes:  numbers of rows that passes are padded to, ascending: a row costs nothing until it takes the next of them.
        Passes that are larger than all of these are not padded.
    load:    of the machine, see `Load`.
    largest: rows of the largest pass measured. The cost of far larger ones is a guess, and not to be trusted.
    octaves: whether the latest passes are kept for each octave of the context. Draft passes see views of a few sizes,
        one for a long time. What the others cost is forgotten otherwise, and that a larger view costs more is, too.
    """

    def __init__(self, shapes: Sequence[int] = (), load: Load | None = None) -> None:
        self.shapes = tuple(shapes)
        self.load = load or Load()
        self.octaves = False
        self._samples: dict[tuple[int, int], deque[tuple[int, int, float]]] = {}
        self._coefficients = [0.0] * COEFFICIENTS
        self._count = self._due = 0
        self.largest = 0

    @property
    def measured(self) -> bool:
        """Returns whether any pass was measured."""
        return self._count > 0

    def observe(self, rows: int, context: int, ms: float) -> None:
        """Takes in one pass.

        ms: its milliseconds; NaN for a pass that did work which no later one does, and so tells nothing.
        """
        ms = max(ms, SHORTEST)
        if math.isnan(ms):
            return
        rows = self.padded(rows)
        expected = self._usual(rows, context) if self._count >= FIRST_PASSES else 0.0
        group = rows if rows <= 16 else 16 + (rows - 13) // 4, int(context).bit_length() if self.octaves else 0
        self._samples.setdefault(group, deque(maxlen=SAMPLES)).append((rows, context, ms / self.load.factor))
        if expected:
            self.load.observe(ms / expected)
        if rows > self.largest:
            self.largest, self._due = rows, self._count
        self._count += 1

    def __call__(self, rows: int, context: int) -> float:
        """Returns the expected milliseconds of a pass; 0 before anything was measured."""
        return self._usual(self.padded(rows), context) * self.load.factor

    def _usual(self, rows: int, context: int) -> float:
        """Returns the milliseconds that a pass of so many rows, padding included, usually takes."""
        if self._count > self._due:
            self._fit()
            self._due = self._count + min(REFIT, self._count // 4)
        # These are scalars, because this is asked for each candidate of each round.
        a, b, c, d, e, f, g, h = self._coefficients
        extra, several = max(0, rows - KNEE), rows > 1
        return a + b * rows + c * extra + g * several + context * (d + e * rows + f * extra + h * several)

    def row_ms(self, rows: int, context: int) -> float:
        """Returns what one more row costs in a pass of `rows`."""
        return self(rows + 1, context) - self(rows, context)

    def padded(self, rows: int) -> int:
        """Returns how many rows a pass of `rows` computes."""
        return next((shape for shape in self.shapes if shape >= rows), rows)

    def fitting(self, rows: int) -> int:
        """Returns the rows of the largest pass that computes no more than `rows`."""
        return max((shape for shape in self.shapes if shape <= rows), default=rows)

    def _fit(self) -> None:
        samples = np.array([sample for group in self._samples.values() for sample in group])
        x = features(samples[:, 0], samples[:, 1]) / samples[:, 2:]
        weights = np.ones(len(x))
        for _ in range(3):  # iteratively reweighted least squares, towards least absolute deviations
            coefficients = non_negative(x, weights)
            weights = 1 / np.maximum(np.abs(x @ coefficients - 1), 0.02)
        self._coefficients = coefficients.tolist()


SHORTEST = 1e-6  # milliseconds: a clock that moves in leaps may tell less, or none
KNEE = 4
SAMPLES = 48  # how many passes are kept of each number of rows, and octave
FIRST_PASSES = 8  # the number of passes before which none tells the load
REFIT = 64  # how many passes are between two fits
COEFFICIENTS = 8


def features(rows: Doubles, context: Doubles) -> Doubles:
    """Returns what the coefficients of `PassCost` are multiplied by, [n, COEFFICIENTS]."""
    extra, several = np.maximum(0.0, rows - KNEE), (rows > 1).astype(np.float64)
    own = np.stack([np.ones_like(rows), rows, extra], axis=1)
    more = np.stack([several, context * several], axis=1)  # the last, so that a row explains what either could
    return np.concatenate([own, context[:, None] * own, more], axis=1)


# The sets of coefficients that are not 0, one a line, the smallest first.
SUPPORTS = (np.arange(2**COEFFICIENTS)[:, None] >> np.arange(COEFFICIENTS) & 1).astype(np.float64)
SUPPORTS = SUPPORTS[np.argsort(SUPPORTS.sum(1), kind="stable")]


def non_negative(x: Doubles, weights: Doubles) -> Doubles:
    """Returns the b >= 0 that minimises sum(weights * (x b - 1)^2).

    The minimum is the plain least squares over those coefficients that are not 0 in it. There are few enough sets of
    them that all are solved at once, and the best is taken of those whose solutions are not negative. Where several
    explain the samples alike, as after passes of one size only, the one with the fewest and first coefficients is.

    x: [n, COEFFICIENTS]. weights: [n].
    """
    largest = np.abs(x).max(0)
    scale = np.maximum(largest, 1e-300)
    x = x / scale
    gram, target = (x * weights[:, None]).T @ x, x.T @ weights
    ridge = 1e-9 * weights.sum()
    supports = SUPPORTS[~(SUPPORTS[:, largest == 0] > 0).any(1)]  # after passes of one row alone there are few
    masked = supports[:, :, None] * supports[:, None, :] * gram
    masked += np.eye(COEFFICIENTS) * (1 - supports + ridge)[:, :, None]
    wanted = supports * target
    solutions: Doubles = np.linalg.solve(masked, wanted[:, :, None])[:, :, 0]
    explained = np.where((solutions >= 0).all(1), (solutions * wanted).sum(1), -1.0)
    enough = explained.max() - 1e-6 * weights.sum()
    best: Doubles = solutions[(explained >= enough).argmax()] / scale
    return best
