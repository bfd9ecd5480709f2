"""Journals of many texts, written by one thread: each holds its text in order, and hears of its own failures alone."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenswift_py.runs import journal
from tokenswift_py.runs.journal import Journal, JournalError
from tokenswift_py.serving.journals import Behind, Writer

HEADER = {"parameters": {"max_new_tokens": 1000}}


@pytest.fixture
def writer() -> Iterator[Writer]:
    made = Writer()
    yield made
    made.close()


class End:
    """Waits for a journal to be closed."""

    def __init__(self, behind: Behind):
        self.told: list[Exception | None] = []
        self._over = threading.Event()
        behind.when_closed(self._hear)

    def _hear(self, error: Exception | None) -> None:
        self.told.append(error)
        self._over.set()

    def wait(self) -> Exception | None:
        assert self._over.wait(30)
        (error,) = self.told
        return error


def test_each_journal_holds_its_own_steps_in_order(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, put, size = random.Random(1), Journal._put, 20
    monkeypatch.setattr(journal, "SYNC_TOKENS", size)
    monkeypatch.setattr(Journal, "_put", lambda self, frame: (time.sleep(0.0005), put(self, frame)))
    behind = [writer.behind(Journal.create(tmp_path / str(number), HEADER)) for number in range(5)]
    wanted: list[list[tuple[int, bool]]] = [[] for _ in behind]
    for step in range(600):
        number = rng.randrange(5)
        tokens, forced = [step] * rng.randrange(1, 4), [step + 1000] * (rng.random() < 0.1)
        behind[number].append(tokens, forced)
        wanted[number] += [*((token, True) for token in forced), *((token, False) for token in tokens)]
    ends = [End(each) for each in behind]
    for each in behind:
        each.close()
        each.close()  # as a stream may
    assert [end.wait() for end in ends] == [None] * 5
    for number, each in enumerate(wanted):
        record = journal.read(tmp_path / str(number))
        assert list(zip(record.tokens, record.forced, strict=True)) == each
        Journal.open(tmp_path / str(number)).close()  # its lock is free
    late = End(behind[0])
    assert late.wait() is None, "who asks later is told at once"


def test_steps_reach_the_disk_without_an_end(writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SYNC_TOKENS", 4)
    behind = writer.behind(Journal.create(tmp_path, HEADER))
    behind.append([1, 2, 3])
    behind.append([4])
    deadline = time.monotonic() + 30
    while journal.read(tmp_path).tokens != [1, 2, 3, 4] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert journal.read(tmp_path).tokens == [1, 2, 3, 4]
    behind.close()


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_failure_is_told_to_its_own_text(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """At the next step, if there is one, and at the end."""
    put = Journal._put

    def full(self: Any, frame: bytes) -> None:
        if self.record.path.parent.name == "bad" and not frame.startswith(journal.MAGIC):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, frame)

    monkeypatch.setattr(Journal, "_put", full)
    bad, good = (writer.behind(Journal.create(tmp_path / name, HEADER)) for name in ("bad", "good"))
    bad.append([1, 2])
    good.append([3, 4])
    if goes_on:
        bad.sync()
        deadline = time.monotonic() + 30
        while bad._error is None and time.monotonic() < deadline:
            time.sleep(0.001)
        with pytest.raises(JournalError, match="No space left on device: 0 tokens are safe"):
            bad.append([5])
    ends = End(bad), End(good)
    good.close()
    bad.close()
    assert isinstance(ends[0].wait(), JournalError) and ends[1].wait() is None
    assert (journal.read(tmp_path / "bad").tokens, journal.read(tmp_path / "good").tokens) == ([], [3, 4])
    Journal.open(tmp_path / "bad").close()


def test_the_end_is_told_once_whenever_somebody_asks_for_it(tmp_path: Path) -> None:
    """Who asks at the very moment at which the file is closed is told by one of the two threads, not by both."""

    class Lock:
        """Asks as soon as the journal says that it is closed, before its writer can go on."""

        def __init__(self) -> None:
            self._lock, self._asked = threading.Lock(), False

        def __enter__(self) -> None:
            self._lock.acquire()

        def __exit__(self, *error: object) -> None:
            self._lock.release()
            if behind._closed and not self._asked:
                self._asked = True
                behind.when_closed(told.append)

    told: list[Exception | None] = []
    behind = Behind(Journal.create(tmp_path, HEADER), lambda journal: None)
    behind._lock = Lock()  # type: ignore[assignment]
    behind.close()
    behind.write()
    assert told == [None]


def test_a_failure_of_who_is_told_of_an_end_stops_no_other_journal(writer: Writer, tmp_path: Path) -> None:
    bad, good = (writer.behind(Journal.create(tmp_path / name, HEADER)) for name in ("bad", "good"))

    def fail(error: Exception | None) -> None:
        raise ValueError("a fault of whoever listens")

    bad.when_closed(fail)
    end = End(good)
    bad.close()
    good.append([1, 2])
    good.close()
    assert end.wait() is None and journal.read(tmp_path / "good").tokens == [1, 2]
