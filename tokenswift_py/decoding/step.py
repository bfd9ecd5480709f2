"""What a round of the loop adds to the text, and what a replay refuses."""

from __future__ import annotations

from dataclasses import dataclass

from tokenswift_py.core import Likeliest


@dataclass(frozen=True)
class Step:
    """What one round added to the text.

    forced: tokens of a turn put into the text; they come before `tokens`.
    tokens: tokens the model chose.
    ending: why the text or, with turns left, the chapter ends after them.
    """

    tokens: tuple[int, ...]
    forced: tuple[int, ...] = ()
    ending: str | None = None
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[Likeliest, ...] | None = None


class ReplayError(ValueError):
    """Recorded tokens that no run of these parameters writes. position: of the first of them, behind the prompt."""

    def __init__(self, position: int, reason: str):
        super().__init__(f"token {position}: {reason}")
        self.position, self.reason = position, reason
