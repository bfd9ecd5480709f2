"""The pieces that a stream brings while it is written, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenswift_py.core import Likeliest
from tokenswift_py.decoding.statistics import GenerationStats


@dataclass(frozen=True)
class Piece:
    """The gain of one step of a stream.

    tokens: tokens the model chose. forced: tokens put in before them. text: the text that became certain.
    """

    tokens: tuple[int, ...]
    forced: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[Likeliest, ...] | None = None


@dataclass(frozen=True)
class Result:
    """A finished text.

    text:     the text that the model wrote, with an empty line between chapters.
    tokens:   every token after the prompt, forced ones included.
    forced:   [start, stop) spans of `tokens` that were forced (follow-up turns).
    logprobs: log-probabilities of the chosen tokens, when asked for; top_logprobs: and of the likeliest tokens in the
              place of each.
    prompt_logprobs: log-probabilities of the prompt's tokens, each with the likeliest there. The first is None, because
              no token comes before it.
    ending:   eos, stop, loop, length or interrupted.
    report:   the fields of report.json.
    """

    text: str
    tokens: list[int]
    forced: list[tuple[int, int]]
    logprobs: list[float] | None
    ending: str
    stats: GenerationStats
    report: dict[str, Any]
    top_logprobs: list[Likeliest] | None = None
    prompt_logprobs: list[tuple[float, Likeliest] | None] | None = None

    @property
    def chosen(self) -> list[int]:
        """The tokens without the forced ones."""
        inside = {i for start, stop in self.forced for i in range(start, stop)}
        return [token for i, token in enumerate(self.tokens) if i not in inside]
