"""Loops and streams as the scheduler sees them, see `seat.Work`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from tokenswift_py.core import IntArray, Output
from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.passes import Pass
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.runs.result import Piece
from tokenswift_py.runs.stream import Stream
from tokenswift_py.serving.sharing import OwnTime


class LoopWork:
    """The text of a decode loop. A subclass takes what the loop brings, and adds `tell` and `end`."""

    def __init__(self, loop: DecodeLoop, prompt: Sequence[int], time: OwnTime, priority: float = 0.0):
        self.loop, self.prompt, self.time, self.priority = loop, prompt, time, priority

    @cached_property
    def _first(self) -> IntArray:
        """Returns the text before it begins."""
        return np.array(self.prompt, np.int32)

    @property
    def cache(self) -> KVCache:
        return self.loop.cache

    def passes(self) -> Generator[Pass | Any, Output | None, None]:
        return self.loop.text(self.prompt)

    def recompute(self) -> Generator[Pass, Output, None]:
        return self.loop.recompute()

    def tokens(self) -> IntArray:
        return self.loop.history.tokens if len(self.loop.history) else self._first

    def needs_all_rows(self) -> bool:
        return self.loop.needs_all_rows

    def finished(self) -> bool:
        return self.loop.over

    def rows_ahead(self) -> int:
        return self.loop.rows_ahead

    def set_aside(self) -> None:
        """Takes the text out of the company's probes until its next round."""
        self.loop.planner.leave()


class StreamWork(LoopWork):
    """The text of a stream."""

    def __init__(
        self,
        stream: Stream,
        time: OwnTime,
        priority: float,
        tell: Callable[[Piece], None],
        end: Callable[[BaseException | None], None],
    ):
        super().__init__(stream.loop, stream.run.prompt, time, priority)
        self.stream, self.tell, self.end = stream, tell, end
        self.began = False

    def passes(self) -> Generator[Pass | Piece, Output | None, None]:
        self.began = True
        return self.stream.passes()

    def set_aside(self) -> None:
        """Puts on the disk what is told, too, for no next step will do that soon."""
        super().set_aside()
        if self.stream.journal is not None:
            self.stream.journal.sync()
