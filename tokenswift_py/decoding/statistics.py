"""Statistics of a run: acceptance by vLLM's names, diversity of the text, loops, and the memory's bandwidth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokenswift_py.core import Acceptance, DraftTree
from tokenswift_py.models.clock import clock_of


@dataclass
class GenerationStats:
    """Counts and milliseconds of one run. A step is one verify pass. Prefill passes are counted apart.

    new_tokens:      tokens the model chose.
    recorded_tokens: those of them that a resumed run found in its journal. Nothing else here counts them.
    first_tokens:    those of them that a prefill pass gave.
    forced_tokens:   tokens of turns put into the text. The prompt is not among them.
    phase_ms:        milliseconds of each phase: draft, verify, accept, commit, learn, prefill.
    latest_ms:       milliseconds of each phase, the last time it ran.
    """

    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    step_tokens: int = 0
    first_tokens: int = 0
    recorded_tokens: int = 0
    forced_tokens: int = 0
    prefill_tokens: int = 0
    acceptance_histogram: Counter[int] = field(default_factory=Counter)
    phase_ms: dict[str, float] = field(default_factory=dict)
    latest_ms: dict[str, float] = field(default_factory=dict)

    def spent(self, phase: str, ms: float) -> None:
        """Counts the milliseconds of one time that a phase was gone through."""
        self.latest_ms[phase] = ms
        self.phase_ms[phase] = self.phase_ms.get(phase, 0.0) + ms

    def settle(self, phase: str, waited: str, ms: float) -> None:
        """Moves milliseconds from phase `waited` to the phase before it, whose work on a device it waited for.

        ms: milliseconds that the work took on the device. NaN is unknown and changes nothing.
        """
        moved = min(ms - self.latest_ms[phase], self.latest_ms[waited])
        if moved == moved:
            for name, by in ((phase, moved), (waited, -moved)):
                self.latest_ms[name] += by
                self.phase_ms[name] += by

    def record(self, tree: DraftTree, taken: Acceptance) -> None:
        accepted = len(taken.path) - 1
        self.num_spec_steps += 1
        self.num_draft_tokens += len(tree) - 1
        self.num_accepted_draft_tokens += accepted
        self.step_tokens += len(taken.tokens)
        self.acceptance_histogram[accepted] += 1

    @property
    def new_tokens(self) -> int:
        return self.recorded_tokens + self.first_tokens + self.step_tokens

    @property
    def decode_ms(self) -> float:
        """The milliseconds of all phases but prefill."""
        return sum(ms for phase, ms in self.phase_ms.items() if phase != "prefill")

    @property
    def ms_per_token(self) -> float | None:
        """The milliseconds of decoding per token that decoding gave, None before the first."""
        return self.decode_ms / self.step_tokens if self.step_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the acceptance part of the report. Mean acceptance length is 1 + accepted draft tokens / steps."""
        steps, drafted = self.num_spec_steps, self.num_draft_tokens
        return {
            "num_spec_steps": steps,
            "num_draft_tokens": drafted,
            "num_accepted_draft_tokens": self.num_accepted_draft_tokens,
            "mean_acceptance_length": 1 + self.num_accepted_draft_tokens / steps if steps else None,
            "draft_acceptance_rate": self.num_accepted_draft_tokens / drafted if drafted else None,
            "acceptance_histogram": {str(k): self.acceptance_histogram[k] for k in sorted(self.acceptance_histogram)},
        }


def distinct_n(tokens: Sequence[int], n: int) -> float | None:
    """Returns different n-grams over all n-grams (Li et al. 2016), None for a text shorter than n."""
    if len(tokens) < n:
        return None
    grams = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, np.int32), n)
    return len(np.unique(grams, axis=0)) / len(grams)


@dataclass(frozen=True)
class Loop:
    """A stretch [start, stop) of the text that repeats itself with this period in tokens."""

    start: int
    stop: int
    period: int


def find_loop(tokens: Sequence[int], least: int = 64, rounds: int = 4, longest_period: int = 512) -> Loop | None:
    """Finds the longest stretch that repeats one block: at least `least` tokens and `rounds` rounds of it.

    It finds exact periodicity only. distinct-n shows a text that varies a little each round.
    """
    text = np.asarray(tokens, np.int32)
    found: Loop | None = None
    for period in range(1, min(longest_period, len(text) // rounds) + 1):
        same = np.concatenate([[False], text[period:] == text[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1]).reshape(-1, 2)
        for begin, end in edges[edges[:, 1] - edges[:, 0] >= max(least, rounds * period) - period].tolist():
            if found is None or end + period - begin > found.stop - found.start:
                found = Loop(begin, end + period, period)
    return found


class LoopDetector:
    """Does the work of `find_loop` token by token, in about 5 us each.

    following: whether the latest token is in a loop.
    longest:   the longest loop so far. After every token it is the result of `find_loop` for the tokens until then.
    loops:     every loop, in order of discovery. One is followed at a time. It is found at the first token that makes
               it long enough, under its shortest period, and grows until a token breaks it. Loops inside it (the same
               block twice over, a run of one token within the block) are not reported again.
    """

    def __init__(self, least: int = 64, rounds: int = 4, longest_period: int = 512):
        self.longest: Loop | None = None
        self.loops: list[Loop] = []
        self.following = False
        self._length = 0
        self._periods = np.arange(1, longest_period + 1)
        self._needed = np.maximum(least, rounds * self._periods) - self._periods
        self._broken = np.zeros(longest_period, np.int64)  # by period: the number of tokens at the last break
        self._latest = np.full(longest_period, -1, np.int32)  # the last tokens, the newest first

    def push(self, token: int) -> Loop | None:
        """Adds a token and returns the loop that it brings to light, or None."""
        self._length += 1
        np.copyto(self._broken, self._length, where=self._latest != token)
        self._latest[1:] = self._latest[:-1]
        self._latest[0] = token
        run = self._length - self._broken  # by period: how many latest tokens equal the one a period before
        looping = run >= self._needed
        if not looping.any():
            self.following = False
            return None
        self._keep_longest(np.where(looping, run + self._periods, 0))
        if self.following and looping[self.loops[-1].period - 1]:
            self.loops[-1] = replace(self.loops[-1], stop=self._length)
            return None
        self.following = True
        self.loops.append(self._loop(int(looping.argmax()) + 1))
        return self.loops[-1]

    def _keep_longest(self, lengths: npt.NDArray[np.int64]) -> None:
        """Keeps the longest loop. Among equals it keeps the shortest period, then the first, like `find_loop`."""
        loop, best = self._loop(int(lengths.argmax()) + 1), self.longest
        if best is None or (loop.stop - loop.start, -loop.period) > (best.stop - best.start, -best.period):
            self.longest = loop

    def _loop(self, period: int) -> Loop:
        return Loop(int(self._broken[period - 1]) - period, self._length, period)


def memory_bandwidth(
    megabytes: int | None = None, device: torch.device | None = None, threads: int | None = None
) -> float:
    """Measures the bytes per second at which `threads` threads read a device's memory: the best of some reductions.

    megabytes: amount to read. None is 256 on a CPU, and 2048 on a GPU, where a launch takes no time beside the reading.
    A GPU's own clock measures it.
    """
    device = device or torch.device("cpu")
    megabytes = megabytes or (256 if device.type == "cpu" else 2048)
    data = torch.ones(megabytes * 2**20 // 4, dtype=torch.float32, device=device)
    clock, before, best = clock_of(device), torch.get_num_threads(), float("inf")
    torch.set_num_threads(threads or before)
    for read in 4 * (data.sum, data.max):
        lap = clock.start()
        read()
        lap.stop()
        best = min(best, lap.ms)
    torch.set_num_threads(before)
    return 1e3 * data.nbytes / best
