"""The first stage's end of a pipeline: it tells the later stages what to do, and hears what they found.

Each tensor rank of the first stage has a column of its own, of the processes with its number in the later stages. The
ranks of a stage get the same commands in the same order, because those of the first stage run the same program.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

from tokenswift_py.errors import UserError
from tokenswift_py.parallel.ranks import RanksError
from tokenswift_py.parallel.stages import Place
from tokenswift_py.parallel.wire import ANSWER, COMMAND, Array, Words, wire

T = TypeVar("T")
Answer = tuple[Words, list[Array]]
KINDS: tuple[type[Exception], ...] = (UserError, MemoryError, ValueError)  # of errors that keep their kind


class Column:
    """The later stages for one tensor rank.

    lock: held while commands are sent that belong together, or their answers are awaited.
    """

    def __init__(self, place: Place):
        self.place, self.wire, self.lock = place, wire(), threading.RLock()
        self.others = [place.process(stage) for stage in range(1, place.stages)]
        self._forgotten: list[int] = []
        self._numbers = itertools.count()
        self._ended = False
        atexit.register(self.end)

    def number(self, owner: Any) -> int:
        """Returns a number for what the later stages make for `owner`. They forget it when the owner is gone."""
        number = self.new_number()
        weakref.finalize(owner, self._forgotten.append, number).atexit = False
        return number

    def new_number(self) -> int:
        return next(self._numbers)

    def tell(self, words: Words, arrays: Sequence[Array] = ()) -> None:
        """Sends all stages the same command."""
        self.tell_each([words] * len(self.others), [arrays] * len(self.others))

    def tell_each(self, words: Sequence[Words], arrays: Sequence[Sequence[Array]]) -> None:
        """Sends each stage a command of its own."""
        with self.lock:
            gone = [self._forgotten.pop() for _ in range(len(self._forgotten))]
            for process, own, own_arrays in zip(self.others, words, arrays, strict=True):
                if gone:
                    self.wire.tell(process, COMMAND, {"do": "forget", "numbers": gone})
                self.wire.tell(process, COMMAND, own, own_arrays)

    def answers(self) -> list[Answer]:
        """Waits for every stage's answer to the latest command. Raises the error of the first one that has one."""
        found = [self.wire.hear(process, ANSWER) for process in self.others]
        for stage, (words, _) in enumerate(found, start=1):
            if "error" in words:
                raise as_error(words, stage)
        return found

    def ask(self, words: Words, arrays: Sequence[Array] = ()) -> list[Answer]:
        with self.lock:
            self.tell(words, arrays)
            return self.answers()

    def beside(self, words: Sequence[Words], arrays: Sequence[Sequence[Array]], own: Callable[[], T]) -> tuple[T, Any]:
        """Lets each stage do what it is told while this one does its own part. Returns both results.

        An error of this stage is told rather than that of another. The others' answers are read in any case.
        """
        with self.lock:
            self.tell_each(words, arrays)
            try:
                found = own()
            except BaseException:
                with suppress(Exception):
                    self.answers()
                raise
            return found, self.answers()

    def end(self) -> None:
        """Lets the later stages go, those that are still there."""
        if self._ended:
            return
        self._ended = True
        for process in self.others:
            with suppress(RanksError):
                self.wire.tell(process, COMMAND, {"do": "end"})
        while self.wire.underway:
            with suppress(RanksError):
                self.wire.flush()
        column.cache_clear()


@cache
def column(place: Place) -> Column:
    return Column(place)


def told_error(error: BaseException) -> Words:
    """Returns the words that carry an error to the first stage."""
    kind = next((number for number, kind in enumerate(KINDS) if isinstance(error, kind)), -1)
    name = "" if kind >= 0 else f"{type(error).__name__}: "
    return {"error": kind, "text": name + " ".join(str(error).split())[:2000]}


def as_error(words: Words, stage: int) -> Exception:
    kind = KINDS[words["error"]] if words["error"] >= 0 else RanksError
    return kind(f"{words['text']} (stage {stage})")
