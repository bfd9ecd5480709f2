"""The milliseconds that a pass costs, fitted to the passes that were timed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


class PassCost:
    """A model of a pass's milliseconds: a + b rows + c extra + context (d + e rows + f extra).

    The coefficients are at least 0, so more rows never cost less, and each costs no less than the one before: a few
    rows hide behind the memory that any pass reads, many are bound by arithmetic. They are fitted to the latest passes
    by least absolute relative deviations, which a burst on a busy machine moves little.

    shapes:  numbers of rows that passes are padded to, ascending: a row costs nothing until it takes the next of them.
        Passes that are larger than all of these are not padded.
    largest: rows of the largest pass measured. The cost of far larger ones is a guess, and not to be trusted.
    """

    def __init__(self, shapes: Sequence[int] = ()) -> None:
        self.shapes = tuple(shapes)
        self._samples: dict[int, deque[tuple[int, int, float]]] = {}
        self._coefficients = np.zeros(len(features(1, 0)))
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
        group = rows if rows <= 16 else 16 + (rows - 13) // 4
        self._samples.setdefault(group, deque(maxlen=SAMPLES)).append((rows, context, ms))
        if rows > self.largest:
            self.largest, self._due = rows, self._count
        self._count += 1

    def __call__(self, rows: int, context: int) -> float:
        """Returns the expected milliseconds of a pass; 0 before anything was measured."""
        if self._count > self._due:
            self._fit()
            self._due = self._count + min(REFIT, self._count // 4)
        return float(features(self.padded(rows), context) @ self._coefficients)

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
        samples = [sample for group in self._samples.values() for sample in group]
        x = np.array([features(rows, context) for rows, context, _ in samples])
        x /= np.array([ms for _, _, ms in samples])[:, None]
        weights = np.ones(len(x))
        for _ in range(3):  # iteratively reweighted least squares, towards least absolute deviations
            self._coefficients = non_negative(x, weights, self._coefficients)
            weights = 1 / np.maximum(np.abs(x @ self._coefficients - 1), 0.02)


SHORTEST = 1e-6  # milliseconds: a clock that moves in leaps may tell less, or none
KNEE = 4
SAMPLES = 12  # a row count
REFIT = 64  # passes between fits


def features(rows: int, context: int) -> Doubles:
    """Returns what the coefficients of `PassCost` are multiplied by."""
    extra = max(0, rows - KNEE)
    return np.array([1.0, rows, extra, context, context * rows, context * extra])


def non_negative(x: Doubles, weights: Doubles, start: Doubles) -> Doubles:
    """Returns the b >= 0 that minimises sum(weights * (x b - 1)^2), found by coordinate descent from `start`.

    x: [n, k]. weights: [n].
    """
    scale = np.maximum(np.abs(x).max(0), 1e-300)
    x = x / scale
    gram, target = (x * weights[:, None]).T @ x, x.T @ weights
    gram[np.diag_indices_from(gram)] += 1e-9 * weights.sum()
    b, size = (start * scale).tolist(), range(len(target))
    rows, wanted = gram.tolist(), target.tolist()
    for _ in range(200):
        moved = 0.0
        for i in size:
            row = rows[i]
            new = max(0.0, b[i] + (wanted[i] - sum(row[j] * b[j] for j in size)) / row[i])
            moved = max(moved, abs(new - b[i]))
            b[i] = new
        if moved < 1e-6:
            break
    solution: Doubles = np.array(b) / scale
    return solution
