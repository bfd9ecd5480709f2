"""A text in the engine. Programs wait for it in threads or in an event loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from tokenswift_py.runs.result import Piece, Result
from tokenswift_py.runs.stream import Stream
from tokenswift_py.serving.scheduler import Seat

logger = logging.getLogger("tokenswift")


class Text:
    """A text in the engine. Its pieces come from the engine's thread as they are written.

    stream: the stream that writes the text. Its counts may be read from any thread.
    before: the text that a resumed run found in its journal. The pieces follow it.
    """

    def __init__(self, number: int, stream: Stream):
        self.number, self.stream, self.run = number, stream, stream.run
        self.prompt = self.run.prompt
        self.before = stream.text
        self.seat: Seat | None = None
        self.error: BaseException | None = None
        self._pieces: list[Piece] = []
        self._listeners: list[Callable[[Piece | None], None]] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._result: Callable[[], Result] | None = None
        self.cancel: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        return self._over.is_set()

    def listen(self, tell: Callable[[Piece | None], None]) -> None:
        """Calls `tell` with each piece, those so far first, and with None after the last. The calls come from the
        engine's thread, which waits meanwhile, or from this one."""
        with self._lock:
            for piece in self._pieces:
                tell(piece)
            if self.done:
                tell(None)
            else:
                self._listeners.append(tell)

    def __iter__(self) -> Iterator[Piece]:
        """Yields the pieces as they come. If an error ended the text, raises it."""
        pieces: SimpleQueue[Piece | None] = SimpleQueue()
        self.listen(pieces.put)
        while (piece := pieces.get()) is not None:
            yield piece
        if self.error is not None:
            raise self.error

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the end of the text, at most this many seconds. Raises TimeoutError. If an error ended the text,
        raises it."""
        if not self._over.wait(timeout):
            raise TimeoutError(f"the text is not over after {timeout} s")
        if self.error is not None:
            raise self.error
        assert self._result is not None
        return self._result()

    def tell(self, piece: Piece) -> None:
        with self._lock:
            self._pieces.append(piece)
            self._tell(piece)

    def end(self, error: BaseException | None, result: Callable[[], Result]) -> None:
        with self._lock:
            self.error, self._result = error, result
            self._over.set()
            self._tell(None)

    def _tell(self, piece: Piece | None) -> None:
        """Tells all who listen. A listener that raises is not told again, and ends no text."""
        for listener in list(self._listeners):
            try:
                listener(piece)
            except Exception:
                logger.exception("a listener of text %d failed, and hears no more", self.number)
                self._listeners.remove(listener)
