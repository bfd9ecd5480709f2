"""The pace at which a text is coming, and the time when it will be there."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenswift_py.decoding.statistics import GenerationStats
from tokenswift_py.runs.report import rounded
from tokenswift_py.runs.stream import Stream

SAMPLE_SECONDS = 0.25  # seconds between two looks at the counts
WINDOW_SECONDS = 30.0  # the seconds over which a speed is the mean
CURVE_POINTS = 120  # the most points of the curve; after that, pairs of points become one


@dataclass(frozen=True)
class Sample:
    """The counts at one moment.

    own_ms:     the milliseconds of the text's own rounds.
    own_tokens: the tokens that these rounds brought.
    """

    seconds: float
    tokens: int
    own_ms: float
    own_tokens: int


class Pace:
    """The speed of a text, from the pieces that it brings.

    tokens:   the tokens that the model chose, those of earlier sessions included.
    curve:    the tokens a pass along the text, as [tokens by then, mean of the passes since the point before].
    plain_ms: the milliseconds that a step of plain decoding would take now, by the planner's fit to measured passes. It
              is None before any pass was measured.
    """

    def __init__(self, tokens: int = 0, clock: Callable[[], float] = time.monotonic):
        self.tokens = tokens
        self.curve: list[list[float]] = []
        self.plain_ms: float | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._samples: deque[Sample] = deque()
        self._stride, self._passes, self._gained = 16, 0, 0
        self._first: Sample | None = None

    def hear(self, gained: int, stream: Stream) -> None:
        """Counts a round that brought this many tokens. Call it from the engine's thread, between rounds."""
        with self._lock:
            self.tokens += gained
            self._passes += 1
            self._gained += gained
            if self._gained >= self._stride:
                self._add_point()
            now = self._clock()
            if self._samples and now - self._samples[-1].seconds < SAMPLE_SECONDS:
                return
            stats, planner = stream.stats, stream.loop.planner
            self._samples.append(Sample(now, self.tokens, stats.decode_ms, stats.step_tokens))
            self._first = self._first or self._samples[0]
            while len(self._samples) > 2 and now - self._samples[1].seconds > WINDOW_SECONDS:
                self._samples.popleft()
            if planner.target.measured:
                self.plain_ms = planner.target(1, stream.loop.cache.length)

    def figures(self, wanted: int) -> dict[str, Any]:
        """Returns the fields of a status that say how the text comes now.

        speedup is an estimate from the text's own rounds, which leave out the time of others. It is the milliseconds of
        a step of plain decoding divided by the milliseconds a token. plain_tokens_per_s is the speed divided by
        speedup.

        wanted: the number of tokens that the text may have at most.
        """
        with self._lock:
            rate = self._rate()
            first, last = (self._samples[0], self._samples[-1]) if self._samples else (None, None)
            own = None
            if first and last and last.own_tokens > first.own_tokens:
                own = (last.own_ms - first.own_ms) / (last.own_tokens - first.own_tokens)
            eta = rounded(max(0, wanted - self.tokens) / rate) if rate else None
            return {
                **self._compared(rate, own),
                "tokens_per_pass": self.curve[-1][1] if self.curve else None,
                "eta_s": eta,
            }

    def summary(self, stats: GenerationStats) -> dict[str, Any]:
        """Returns the same fields at the end, for the whole session. The time left is None."""
        with self._lock:
            rate = None
            if self._first and (seconds := self._clock() - self._first.seconds) > 0:
                rate = (self.tokens - self._first.tokens) / seconds
            passes = stats.num_spec_steps
            mean = rounded(stats.step_tokens / passes) if passes else None
            return {**self._compared(rate, stats.ms_per_token), "tokens_per_pass": mean, "eta_s": None}

    def _compared(self, rate: float | None, own_ms: float | None) -> dict[str, Any]:
        """Returns the fields that compare the text with plain decoding.

        own_ms: the milliseconds a token in the text's own rounds.
        """
        speedup = self.plain_ms / own_ms if own_ms and self.plain_ms else None
        return {
            "tokens_per_s": rounded(rate),
            "plain_tokens_per_s": rounded(rate / speedup) if rate and speedup else None,
            "speedup": rounded(speedup),
        }

    def _rate(self) -> float | None:
        """Returns the tokens a second until now. So the speed falls while no text comes."""
        if len(self._samples) < 2:
            return None
        seconds = self._clock() - self._samples[0].seconds
        return (self.tokens - self._samples[0].tokens) / seconds if seconds > 0 else None

    def _add_point(self) -> None:
        self.curve.append([self.tokens, round(self._gained / self._passes, 3)])
        self._passes = self._gained = 0
        if len(self.curve) > CURVE_POINTS:
            self._stride *= 2
            pairs = zip(self.curve[::2], self.curve[1::2], strict=False)
            self.curve = [[late[0], round((early[1] + late[1]) / 2, 3)] for early, late in pairs]
