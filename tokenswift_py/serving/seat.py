"""A text as the scheduler sees it, and its place there."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any, Protocol

from tokenswift_py.core import IntArray, Output
from tokenswift_py.decoding.passes import Pass
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.serving.prefixes import Prefix
from tokenswift_py.serving.sharing import OwnTime


class Work(Protocol):
    """A text as the scheduler sees it.

    cache:    the text's cache in the scheduler's pool.
    priority: the urgency of the text. Texts of higher priority are served first.
    """

    priority: float
    time: OwnTime

    @property
    def cache(self) -> KVCache: ...

    def passes(self) -> Generator[Pass | Any, Output | None, None]:
        """Writes the text. Yields passes, and anything else at the end of each round."""

    def recompute(self) -> Generator[Pass, Output, None]:
        """Computes the rows of the text again, after its pages were taken."""

    def tokens(self) -> IntArray:
        """Returns the text so far, the prompt and the pending token included."""

    def needs_all_rows(self) -> bool:
        """Returns whether it has to compute every row itself, so that no known page can serve it."""

    def finished(self) -> bool:
        """Returns whether it asks for no pass any more."""

    def rows_ahead(self) -> int:
        """Returns how many rows the next round commits at most, beside those of a tree."""

    def tell(self, what: Any) -> None:
        """Takes what the text has brought at the end of a round."""

    def set_aside(self) -> None:
        """Notes that the text has lost its pages and may not go on for a long time."""

    def end(self, error: BaseException | None) -> None:
        """Notes that nothing more comes. The text has ended, was cancelled (None) or failed."""


class Seat:
    """A text's place in the scheduler.

    text:      the text's coroutine. It is None before the first round.
    asked:     the pass that the text waits for. It is None between rounds.
    flies:     whether that pass is under way.
    coroutine: the coroutine that asked.
    running:   whether the text is in work. Otherwise it holds no page.
    since:     the time when it began to wait, in seconds.
    credit:    the urgency that it has gained while it waited.
    prefix:    its full pages, as the prefixes know them.
    """

    def __init__(self, work: Work, number: int, now: float):
        self.work, self.number, self.since, self.credit = work, number, now, 0.0
        self.text: Generator[Any, Any, None] | None = None
        self.running = self.cancelled = self.flies = False
        self.asked: Pass | None = None
        self.coroutine: Generator[Any, Any, None] | None = None
        self.prefix = Prefix()


def is_prefill(seat: Seat) -> bool:
    return seat.asked is not None and seat.asked.segment.causal


def rows_of(seat: Seat) -> int:
    """Returns the number of rows of the pass that it asks for."""
    return len(seat.asked.segment.tree) if seat.asked is not None else 0


def pages_of(tokens: int) -> int:
    return math.ceil(tokens / PAGE_SIZE)
