"""The step that a round of the loop adds to a text, and the error of a replay."""

from __future__ import annotations

from dataclasses import dataclass

from tokenswift_py.core import Likeliest


@dataclass(frozen=True)
class Step:
    """The part of the text that one round added.

    forced: tokens of a turn that were put into the text; they come before `tokens`.
    tokens: tokens that the model chose.
    ending: reason why the text or, with turns left, the chapter ends after them.
    """

    tokens: tuple[int, ...]
    forced: tuple[int, ...] = ()
    ending: str | None = None
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[Likeliest, ...] | None = None


class ReplayError(ValueError):
    """Recorded tokens that no run of these parameters writes. position: place of the first of them after the prompt."""

    def __init__(self, position: int, reason: str):
        super().__init__(f"token {position}: {reason}")
        self.position, self.reason = position, reason
