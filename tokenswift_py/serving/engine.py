"""A thread that writes many texts at once. Programs wait for the texts in threads or in an event loop."""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import ref

from tokenswift_py.decoding.statistics import GenerationStats
from tokenswift_py.drafters.base import kind_of
from tokenswift_py.errors import check, one_line
from tokenswift_py.loaded import LoadedModel
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import AUTO
from tokenswift_py.options import Options
from tokenswift_py.runs import contract
from tokenswift_py.runs.journal import Journal
from tokenswift_py.runs.plan import Run, prepare, recorded_run, without_lost_heads
from tokenswift_py.runs.stream import Stream
from tokenswift_py.serving.company import Company
from tokenswift_py.serving.journals import Behind, Writer
from tokenswift_py.serving.scheduler import Scheduler
from tokenswift_py.serving.sharing import OwnTime
from tokenswift_py.serving.texts import Text
from tokenswift_py.serving.work import StreamWork
from tokenswift_py.text import Prompt

logger = logging.getLogger("tokenswift")
T = TypeVar("T")


class Busy(RuntimeError):
    """The error of a text for which no place to wait is left."""


class Engine:
    """Writes texts for one loaded model.

    Raises UserError for values that are not possible.

    context:      the positions that each text has. None is the trained length.
    drafter:      the drafter of all texts.
    most_running: the number of texts that are in work at a time. The others wait.
    most_waiting: the number of texts that may wait. One more is refused.
    kv_tokens:    the size of the pool, see `Company`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        context: int | None = None,
        *,
        drafter: str = "auto",
        most_running: int = 16,
        most_waiting: int = 64,
        kv_tokens: int | None = None,
        positions: Positions = AUTO,
    ):
        check(most_running >= 1, "most_running", most_running, "at least 1")
        check(most_waiting >= 0, "most_waiting", most_waiting, "at least 0")
        alone = drafter != "auto" and kind_of(drafter).has_second_model
        check(not alone, "drafter", drafter, "a second model drafts for one text alone")
        self.loaded = Company(loaded, context, kv_tokens, most_running, positions)
        self.context = self.loaded.context
        self.drafter, self.most_running, self.most_waiting = drafter, most_running, most_waiting
        self._positions = positions
        self._scheduler = Scheduler(self.loaded.target, self.loaded.pool, time.perf_counter, most_running)
        self._changed = threading.Condition()
        self._orders: deque[Callable[[], None]] = deque()
        self._numbers = itertools.count(1)
        self._live: dict[int, StreamWork] = {}
        self._building = 0  # texts that are taken, but not in line yet
        self._kinds: set[tuple[str | int, ...]] = set()  # the kinds of drafts for which models were made
        self._first_of_kind = threading.Lock()
        self._finished: Counter[str] = Counter()
        self._past = GenerationStats()
        self._prompt_tokens = 0  # the prompt tokens of texts that began and are over
        self._closing = self._closed = False
        self._due = 0.0  # the time when figures are shown again
        self._shown: dict[str, Any] = {"running": 0, "kv_usage": 0.0, "preemptions": 0, "prefix_hits": 0}
        # If this thread computed while the process ends, the process would crash.
        self._at_exit = partial(close_at_exit, ref(self))
        atexit.register(self._at_exit)
        self._journals = Writer()
        self._thread = threading.Thread(target=self._work, name="tokenswift-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: Prompt, *, priority: float = 0.0, out: str | Path | None = None, **settings: Any) -> Text:
        """Takes a text. Raises UserError for settings (fields of `Options`) that are not possible. Raises Busy if too
        many texts wait.

        priority: the urgency of the text. Texts of higher priority are served first.
        out:      a new or empty folder for a journal.
        """

        def record(stream: Stream) -> None:
            if out is not None:
                self._record(stream, Journal.create(Path(out), stream.header()))

        return self._take(self.plan(prompt, **settings), priority, record)

    def plan(self, prompt: Prompt, **settings: Any) -> Run:
        """Makes the run of a text as `submit` does, but does not take the text. Raises UserError."""
        options = Options.of(**{"drafter": self.drafter, **settings, **self._fixed})
        check_alone(options, "kv_budget", "trace", "draft_model")
        check(options.drafter == self.drafter, "drafter", options.drafter, f"the engine's, {self.drafter}")
        run = prepare(self.loaded, prompt, options, in_pool=True)
        self._check_room(run)
        return run

    def resume(self, folder: str | Path, *, priority: float = 0.0) -> Text:
        """Goes on with a recorded run. Raises the errors of `TokenSwift.resume`, and Busy."""
        journal = Journal.open(Path(folder))
        try:
            ours: dict[str, Any] = {"drafter": self.drafter, "draft_model": None}  # no text depends on them
            ours |= without_lost_heads(journal.record)
            run = recorded_run(self.loaded, journal.record, in_pool=True, **ours)
            check_alone(run.options, "kv_budget")
            check(run.context == self.context, "context", run.context, f"the engine's, {self.context}")

            def replay(stream: Stream) -> None:
                contract.check_same(journal.record.header, stream.header())
                with one_line(f"journal: {journal.record.path} does not hold a text of its own parameters"):
                    stream.replay(journal.record.tokens)
                self._record(stream, journal)

            return self._take(run, priority, replay)
        except BaseException:
            journal.close()
            raise

    @property
    def _fixed(self) -> dict[str, Any]:
        where = self._positions
        return {
            "context": self.context,
            "positions": where.scheme,
            "positions_window": where.window,
            "positions_block": where.block,
        }

    def _check_room(self, run: Run) -> None:
        needed = len(run.prompt) + sum(map(len, run.turns)) + run.options.max_new_tokens
        allowed = f"what the KV pool of {self.loaded.pool.pages} pages holds"
        check(self._scheduler.fits(needed), "max_new_tokens", run.options.max_new_tokens, allowed)

    def _record(self, stream: Stream, journal: Journal) -> None:
        stream.record(self._journals.behind(journal), kv_snapshot=False)

    def _take(self, run: Run, priority: float, begin: Callable[[Stream], None]) -> Text:
        self._check_room(run)
        with self._changed:
            self._check_open()
            taken = len(self._live) + self._building
            if taken >= self.most_running + self.most_waiting:
                raise Busy(f"{taken} texts are in work or wait; {self.most_waiting} may wait")
            self._building += 1  # the rest takes time, but holds up nobody; `close` waits for it
        try:
            own = OwnTime(time.perf_counter)
            stream = self._stream(run, own)
            begin(stream)
            text = Text(next(self._numbers), stream)
            work = StreamWork(stream, own, priority, text.tell, lambda error: self._end(work, text, error))
            text.cancel = lambda: self._order(lambda: self._cancel(text))
        except BaseException:
            with self._changed:
                self._building -= 1
                self._changed.notify_all()
            raise
        with self._changed:  # one step: otherwise the text would take two places in line for a moment
            self._building -= 1
            if not self._closed:
                self._live[text.number] = work
                self._orders.append(lambda: self._seat(text, work))
            self._changed.notify_all()
            closed = self._closed
        if closed:  # it took longer than `close` waits
            stream.close()
            raise Busy("the engine is closed")
        return text

    def _stream(self, run: Run, own: OwnTime) -> Stream:
        """Makes the stream that writes a run. The first of a kind makes models that others share: one at a time."""
        kind = run.options.draft_kind
        alone: AbstractContextManager[Any] = nullcontext() if kind in self._kinds else self._first_of_kind
        with alone:
            stream = Stream(self.loaded, run, self.loaded.new_cache(), own)
            self._kinds.add(kind)
        return stream

    def _check_open(self) -> None:
        if self._closing:
            raise Busy("the engine is closing")

    def between(self, work: Callable[[], T]) -> T:
        """Lets the engine's thread do this work between two of its passes, and waits for it. Raises the error of the
        work, and Busy while the engine closes."""
        done: Future[T] = Future()

        def order() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        with self._changed:
            self._check_open()
            self._orders.append(order)
            self._changed.notify()
        return done.result()

    def figures(self) -> dict[str, Any]:
        """Returns the counts since the beginning, and how many texts there are now."""
        with self._changed:
            live, past, finished = list(self._live.values()), self._past, dict(self._finished)
            prompt_tokens = self._prompt_tokens + sum(len(work.prompt) for work in live if work.began)
        stats = [past, *(work.stream.stats for work in live)]
        shown = self._shown
        return {
            **shown,
            "waiting": max(0, len(live) - shown["running"]),
            "prompt_tokens": prompt_tokens,
            "generated_tokens": sum(each.first_tokens + each.step_tokens for each in stats),  # here, not before
            "drafts": sum(each.num_spec_steps for each in stats),
            "draft_tokens": sum(each.num_draft_tokens for each in stats),
            "accepted_draft_tokens": sum(each.num_accepted_draft_tokens for each in stats),
            "finished": finished,
        }

    def close(self, drain_s: float = 0.0) -> None:
        """Takes no more texts, waits up to this many seconds for those there are, and ends the rest as interrupted."""
        deadline = time.monotonic() + drain_s
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._building, max(drain_s, BUILD_SECONDS))
        while self._live and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._changed:
            self._closed = True
        self._order(self._scheduler.close)
        self._order(self._stop)
        self._thread.join()
        self._journals.close()
        atexit.unregister(self._at_exit)

    # These run in the engine's thread.

    def _work(self) -> None:
        self._going, busy = True, False
        while self._going:
            with self._changed:
                while not self._orders and not busy:
                    self._changed.wait()
            try:
                for _ in range(len(self._orders)):
                    self._orders.popleft()()  # if one fails, the others stay
                busy = self._going and self._scheduler.step()
            except Exception as error:  # an error of one text has ended that text; this is a fault of the engine
                logger.exception("the engine failed: all texts end")
                self._scheduler.close(error)
                busy = False
            if not busy or time.monotonic() >= self._due:
                self._show()

    def _show(self) -> None:
        """Shows the scheduler's figures to other threads. They must not look into the scheduler while it works."""
        pool, scheduler = self.loaded.pool, self._scheduler
        used = pool.pages - pool.free - scheduler.idle_pages
        self._shown = {
            "running": scheduler.running,
            "kv_usage": max(0.0, used / pool.pages),
            "preemptions": scheduler.preemptions,
            "prefix_hits": scheduler.prefixes.hits,
        }
        self._due = time.monotonic() + SHOWN_SECONDS

    def _stop(self) -> None:
        self._going = False

    def _order(self, order: Callable[[], None]) -> None:
        with self._changed:
            self._orders.append(order)
            self._changed.notify()

    def _seat(self, text: Text, work: StreamWork) -> None:
        text.seat = self._scheduler.add(work)

    def _cancel(self, text: Text) -> None:
        if text.seat is not None:
            self._scheduler.cancel(text.seat)

    def _end(self, work: StreamWork, text: Text, error: BaseException | None) -> None:
        """Ends a text whose last piece was told. Its end is told when its journal is closed."""
        stream = work.stream
        with suppress(Exception):
            stream.close()
        if isinstance(stream.journal, Behind):
            stream.journal.when_closed(lambda failure: self._over(work, text, error, failure))
        else:
            self._over(work, text, error, None)

    def _over(self, work: StreamWork, text: Text, error: BaseException | None, failure: Exception | None) -> None:
        """Tells the end of a text. A text that somebody ended has this end even if its journal failed.

        failure: the error of the journal.
        """
        if work.stream.ending != "interrupted":
            error = error or failure
        elif failure is not None:
            logger.error("the journal of an interrupted text is not whole: %s", failure)
        with self._changed:
            self._live.pop(text.number, None)
            self._prompt_tokens += len(work.prompt) if work.began else 0
            self._finished[work.stream.ending if error is None else "error"] += 1
            mine = work.stream.stats
            self._past = replace(
                self._past,
                step_tokens=self._past.step_tokens + mine.step_tokens,
                first_tokens=self._past.first_tokens + mine.first_tokens,
                num_spec_steps=self._past.num_spec_steps + mine.num_spec_steps,
                num_draft_tokens=self._past.num_draft_tokens + mine.num_draft_tokens,
                num_accepted_draft_tokens=self._past.num_accepted_draft_tokens + mine.num_accepted_draft_tokens,
            )
        text.end(error, work.stream.result)


def check_alone(options: Options, *names: str) -> None:
    """Raises UserError for options that only a text alone can have. Nobody may share the pages of one that evicts."""
    for name in names:
        check(getattr(options, name) is None, name, getattr(options, name), "not among many texts")


def close_at_exit(engine: ref[Engine]) -> None:
    if (found := engine()) is not None:
        found.close()


SHOWN_SECONDS = 0.1
BUILD_SECONDS = 30.0  # a text that is not in line by then is refused when the engine closes
