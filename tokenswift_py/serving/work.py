"""A stream as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from tokenswift_py.core import IntArray, Output
from tokenswift_py.decoding.passes import Pass
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.runs.result import Piece
from tokenswift_py.runs.stream import Stream
from tokenswift_py.serving.sharing import OwnTime


class StreamWork:
    """See `scheduler.Work`."""

    def __init__(
        self,
        stream: Stream,
        time: OwnTime,
        priority: float,
        tell: Callable[[Piece], None],
        end: Callable[[BaseException | None], None],
    ):
        self.stream, self.time, self.priority = stream, time, priority
        self._tell, self._end = tell, end

    @property
    def cache(self) -> KVCache:
        return self.stream.loop.cache

    def passes(self) -> Generator[Pass | Piece, Output | None, None]:
        return self.stream.passes()

    def recompute(self) -> Generator[Pass, Output, None]:
        return self.stream.loop.recompute()

    def tokens(self) -> IntArray:
        history = self.stream.loop.history
        return history.tokens if len(history) else np.array(self.stream.run.prompt, np.int32)

    def needs_all_rows(self) -> bool:
        return self.stream.loop.needs_all_rows

    def rows_ahead(self) -> int:
        return self.stream.loop.rows_ahead

    def tell(self, what: Any) -> None:
        self._tell(what)

    def end(self, error: BaseException | None) -> None:
        self._end(error)
