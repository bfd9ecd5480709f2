"""Journals of many texts. One thread of their own writes them, so a slow disk holds up no text."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from tokenswift_py.runs.journal import Journal

logger = logging.getLogger("tokenswift")


class Writer:
    """The thread that writes journals. A journal is in its line once at most, so the line is never longer than the
    number of texts."""

    def __init__(self) -> None:
        self._line: SimpleQueue[Behind | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tokenswift-journals", daemon=True)
        self._thread.start()

    def behind(self, journal: Journal) -> Behind:
        """Takes over the writing of a journal."""
        return Behind(journal, self._line.put)

    def close(self) -> None:
        """Writes what was asked for until now, and ends."""
        self._line.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (journal := self._line.get()) is not None:
            try:
                journal.write()
            except Exception:  # an error of a function that was told of the close; the other journals go on
                logger.exception("the end of %s was not taken in", journal.record.path)


class Behind(Journal):
    """A journal whose steps are written later than the text. They are written in their order, by the thread to which
    `ask` hands the journal.

    A kill can lose only what the disk has not taken yet. If a write failed, the next step tells it. If there is no next
    step, `when_closed` tells it.
    """

    def __init__(self, journal: Journal, ask: Callable[[Behind], None]):
        self.record = journal.record
        self._journal, self._ask = journal, ask
        self._lock = threading.Lock()
        self._steps: list[tuple[Sequence[int], Sequence[int]]] = []
        self._count = 0  # the number of their tokens
        self._asked = self._closing = self._closed = False
        self._error: Exception | None = None
        self._tell: Callable[[Exception | None], None] = lambda error: None

    def append(self, tokens: Sequence[int], forced: Sequence[int] = ()) -> None:
        """Takes one step of the text. If an earlier write failed, raises its error, a JournalError."""
        with self._lock:
            if self._error is not None:
                raise self._error
            self._steps.append((tokens, forced))
            self._count += len(tokens) + len(forced)
            due = self._journal.due(self._count)
        if due:
            self.sync()

    def extend(self, count: int) -> None:
        raise NotImplementedError("a text in company is as long as was asked for at its beginning")

    def sync(self) -> None:
        """Asks the thread to put the steps so far on the disk."""
        with self._lock:
            if self._asked:
                return
            self._asked = True
        self._ask(self)

    def close(self) -> None:
        """Asks the thread to put the steps so far on the disk, and then to close the file."""
        with self._lock:
            self._closing = True
        self.sync()

    def when_closed(self, tell: Callable[[Exception | None], None]) -> None:
        """Calls `tell` once when the file is closed, with the error if anything has failed. The thread that closes the
        file calls it. If the file is closed already, this calls it at once."""
        with self._lock:
            closed, self._tell = self._closed, tell
        if closed:
            tell(self._error)

    def write(self) -> None:
        """Puts the steps so far on the disk. Closes the file if that was asked for."""
        with self._lock:
            steps, self._steps, self._count = self._steps, [], 0
            self._asked, closing = False, self._closing
        error = None
        try:
            for tokens, forced in steps:
                self._journal.add(tokens, forced)
            if closing:
                self._journal.close()
            else:
                self._journal.sync()
        except Exception as failure:
            error = failure
        with self._lock:
            self._error = self._error or error
            # `when_closed` finds it open and is told here, or finds it closed and tells by itself.
            first, tell, error = closing and not self._closed, self._tell, self._error
            self._closed |= closing
        if first:
            tell(error)
