"""The texts of one request. They are handed to the engine together, heard on the event loop, and given up together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.types import Receive

from tokenswift_py.errors import UserError
from tokenswift_py.runs.result import Piece, Result
from tokenswift_py.serving.engine import Busy, Engine
from tokenswift_py.serving.http.asked import Asked
from tokenswift_py.serving.http.metrics import Metrics
from tokenswift_py.serving.http.refusals import RETRY_AFTER, Refusal, of_failure, of_user_error
from tokenswift_py.serving.texts import Text

# a text that was cut ends with length, too
FINISH = {"eos": "stop", "stop": "stop", "loop": "stop", "length": "length"}


@dataclass(frozen=True)
class Said:
    """A piece of text number `index`."""

    index: int
    piece: Piece


@dataclass(frozen=True)
class Ended:
    """The end of text number `index`.

    pieces: all pieces of the text.
    ending: the ending of the result, or "timeout" if the server's time was over.
    """

    index: int
    pieces: Sequence[Piece]
    result: Result
    ending: str

    @property
    def finish_reason(self) -> str:
        return FINISH.get(self.ending, "length")


class Texts:
    """The texts that one request asked for.

    The engine's thread puts pieces into a queue, and waits for nobody. The queue cannot grow without end, since the
    texts cannot.
    """

    def __init__(self, texts: Sequence[Text], timeout: float, metrics: Metrics, began: float):
        self.texts = texts
        self.began = began
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, float, Piece | None]] = asyncio.Queue()
        self._late = False  # whether the time is over
        left = began + timeout - time.monotonic()
        self._alarm = self._loop.call_later(left, self._expire) if timeout else None
        self._pieces: list[list[Piece]] = [[] for _ in texts]
        self._latest: dict[int, float] = {}  # the time when the last tokens of each text came
        for index, text in enumerate(texts):
            text.listen(partial(self._hear, index))

    @classmethod
    async def submit(cls, engine: Engine, asked: Asked, timeout: float, metrics: Metrics, began: float) -> Texts:
        """Hands all texts to the engine, or none. Raises Refusal."""
        handed: list[Text] = []

        def submit() -> None:  # this makes tables of positions, and the like
            for prompt, sample in asked.choices:
                settings = {**asked.settings, "stream": sample}
                handed.append(engine.submit(asked.prompts[prompt], priority=asked.priority, **settings))

        try:
            await run_in_threadpool(submit)
        except BaseException as error:
            for text in handed:
                text.cancel()
            if isinstance(error, UserError):
                raise of_user_error(error, asked.names) from error
            if isinstance(error, Busy):
                raise Refusal(429, f"the server is busy: {error}", None, "queue_full", RETRY_AFTER) from error
            raise
        return cls(handed, timeout, metrics, began)

    async def events(self) -> AsyncIterator[Said | Ended]:
        """Yields pieces and ends as they come. Raises Refusal if a text failed, or if no text had a turn in time. If
        the caller leaves early, the texts are given up."""
        open_texts = set(range(len(self.texts)))
        try:
            while open_texts:
                index, at, piece = await self._queue.get()
                if piece is None:
                    open_texts.discard(index)
                    yield await self._end(index)
                else:
                    self._pieces[index].append(piece)
                    self._measure(index, at, piece)
                    yield Said(index, piece)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Gives the texts up. Texts that are over stay as they are."""
        if self._alarm is not None:
            self._alarm.cancel()
        for text in self.texts:
            text.cancel()

    def _expire(self) -> None:
        self._late = True
        self.cancel()

    async def _end(self, index: int) -> Ended:
        try:
            result = await run_in_threadpool(self.texts[index].result)
        except Exception as error:
            raise of_failure(error) from error
        cut = self._late and result.ending == "interrupted"
        if cut and not result.tokens:
            raise Refusal(503, "the text had no turn in time", None, "timeout", RETRY_AFTER)
        self._metrics.ended(time.monotonic() - self.began)
        return Ended(index, self._pieces[index], result, "timeout" if cut else result.ending)

    def _hear(self, index: int, piece: Piece | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, time.monotonic(), piece))

    def _measure(self, index: int, at: float, piece: Piece) -> None:
        if not piece.tokens:
            return
        before = self._latest.get(index)
        if before is None:
            self._metrics.first_token(at - self.began)
        else:
            self._metrics.more_tokens(at - before, len(piece.tokens))
        self._latest[index] = at


async def finished(texts: Texts, receive: Receive) -> list[Ended] | None:
    """Returns the ends of all texts, in the order of the texts. Returns None if the client left; then the texts are
    given up."""

    async def collect() -> list[Ended]:
        ends = [event async for event in texts.events() if isinstance(event, Ended)]
        return sorted(ends, key=lambda end: end.index)

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    collecting, leaving = asyncio.ensure_future(collect()), asyncio.ensure_future(left())
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else None
    finally:
        texts.cancel()
        for task in (collecting, leaving):
            task.cancel()
        await asyncio.gather(collecting, leaving, return_exceptions=True)
