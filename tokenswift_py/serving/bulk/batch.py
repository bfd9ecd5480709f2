"""A batch is many requests that one engine writes at once. They are answered in the order in which they end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from tokenswift_py.errors import UserError
from tokenswift_py.serving.bulk.lines import Line, answer_of
from tokenswift_py.serving.bulk.requests import Answering, Requests
from tokenswift_py.serving.engine import Busy
from tokenswift_py.serving.http.refusals import Refusal, of_user_error

AHEAD = 4  # how many texts wait in the engine, so that none of its places stays empty
LOOK_S = 0.2  # seconds after which the batch looks again whether it shall stop
MOST_READY = 64  # the number of answers that are put on the disk together

Progress = Callable[[int, int], None]


class Sink(Protocol):
    """Takes the answers.

    answered: the keys of the requests that have an answer already.
    """

    answered: set[bytes]

    def write(self, answers: Sequence[dict[str, Any]]) -> None: ...


class Batch:
    """Writes the answers to requests.

    Some failures are the fault of the engine and not of the request. Such a failure is written as an answer only after
    another request has been answered. If all requests fail, the batch stops instead, and a later run tries them again.

    room:     the number of texts in work. No further request is read before there is room for it.
    progress: a function that is called after each look. It gets the number of requests that were answered, and the
              number of those that have an error.
    """

    def __init__(self, requests: Requests, sink: Sink, room: int, progress: Progress = lambda done, failed: None):
        self.requests, self.sink, self.room, self.progress = requests, sink, room, progress
        self.answered = self.failed = 0
        self._over: SimpleQueue[Line] = SimpleQueue()
        self._open: dict[int, Answering] = {}  # by the number of the line
        self._texts = 0
        self._waits: Line | None = None  # a request that waits for room in the engine, which others may use too
        self._ready: list[dict[str, Any]] = []
        self._held: list[tuple[Line, Exception]] = []

    def run(self, lines: Iterable[Line], stop: Callable[[], bool] = lambda: False) -> bool:
        """Answers the lines that have no answer yet. Returns whether all have one; False means that it was stopped.

        Raises OSError if answers cannot be written. Raises the engine's error if the engine fails for all requests.
        """
        left = (line for line in lines if line.key not in self.sink.answered)
        try:
            while not stop():
                more = self._begin_some(left, stop)
                self._collect()
                if not (more or self._open or self._waits):
                    if self._held and not (self.answered or self._ready):
                        self._give_up()
                    self._tell_held()
                    self._write()
                    return True
                self._write()
            return False
        finally:
            for answering in self._open.values():
                answering.cancel()

    def _begin_some(self, left: Iterator[Line], stop: Callable[[], bool]) -> bool:
        """Begins requests while there is room. Returns whether there are more."""
        while self._texts < self.room and len(self._ready) < MOST_READY and not stop():
            line, self._waits = self._waits or next(left, None), None
            if line is None:
                return False
            self._begin(line)
            if self._waits:
                break
        return True

    def _begin(self, line: Line) -> None:
        if line.wrong:
            self._tell(answer_of(line, None, None, line.wrong))
            return
        try:
            answering = self.requests.begin(line.url, line.body, partial(self._over.put, line))
        except Busy:
            if not self._open:
                raise
            self._waits = line
        except Exception as error:
            self._fail(line, error)
        else:
            self._open[line.number] = answering
            self._texts += len(answering.texts)

    def _collect(self) -> None:
        """Takes the answers that are there. Waits a little if there is none."""
        deadline = time.monotonic() + LOOK_S
        while self._open and len(self._ready) < MOST_READY:
            try:
                wait = 0.0 if self._ready else max(0.0, deadline - time.monotonic())
                line = self._over.get(timeout=wait) if wait else self._over.get_nowait()
            except Empty:
                return
            answering = self._open.pop(line.number)
            self._texts -= len(answering.texts)
            try:
                body = answering.body()
            except Exception as error:
                self._fail(line, error)
                continue
            if body is not None:  # otherwise it was interrupted and has no answer
                self._tell_held()
                self._tell(answer_of(line, 200, body))

    def _fail(self, line: Line, error: Exception) -> None:
        if isinstance(error, Refusal | UserError):
            refusal = error if isinstance(error, Refusal) else of_user_error(error)
            self._tell(refused(line, refusal))
            return
        self._held.append((line, error))
        if len(self._held) > 2 * self.room:
            self._give_up()

    def _give_up(self) -> None:
        error = self._held[-1][1]
        told = f"{len(self._held)} requests in a row failed, and are left to be tried again"
        raise RuntimeError(f"{told} ({failure(error)})") from error

    def _tell_held(self) -> None:
        for line, error in self._held:
            self._tell(refused(line, Refusal(500, failure(error), code="internal_error")))
        self._held.clear()

    def _tell(self, answer: dict[str, Any]) -> None:
        self._ready.append(answer)

    def _write(self) -> None:
        if self._ready:
            self.sink.write(self._ready)
            self.answered += len(self._ready)
            self.failed += sum(answer["error"] is not None for answer in self._ready)
            self._ready = []
        self.progress(self.answered, self.failed)


def failure(error: Exception) -> str:
    return f"the text could not be written: {type(error).__name__}: {' '.join(str(error).split())}"


def refused(line: Line, refusal: Refusal) -> dict[str, Any]:
    """Returns the answer to a request that could not be answered. The error is the same as in the server's answers."""
    return answer_of(line, refusal.status, refusal.body(), (refusal.code or "invalid_value", refusal.message))
