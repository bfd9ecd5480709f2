"""A text while it is written: an iterator over its pieces, with a journal that may record them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tokenswift_py.core import Likeliest, Output
from tokenswift_py.decoding.passes import Pass, Timer, compute
from tokenswift_py.decoding.statistics import GenerationStats
from tokenswift_py.decoding.step import Step
from tokenswift_py.decoding.stopping import ChapterText
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.runs import contract, report, snapshot
from tokenswift_py.runs.assembly import decode_loop
from tokenswift_py.runs.journal import Journal
from tokenswift_py.runs.plan import Run
from tokenswift_py.runs.result import Piece, Result

if TYPE_CHECKING:
    from tokenswift_py.loaded import LoadedModel


class Stream:
    """An iterator over the pieces of a text while it is written.

    Leaving it early (close, or the end of a with block) loses nothing.
    cache: to write into, empty or with rows of the prompt's first tokens. None makes one.
    timer: the time of whoever drives the stream's passes; None is that of a stream alone.
    """

    def __init__(self, loaded: LoadedModel, run: Run, cache: KVCache | None = None, timer: Timer | None = None):
        self.run = run
        self.loaded = loaded
        self.tokens: list[int] = []
        self.journal: Journal | None = None
        self.recorded = 0
        self._cold = False  # whether the KV of a replayed text is not in the cache yet
        with loaded.executor.ranks.same_fate():
            traced = run.options.trace if loaded.executor.ranks.leads else None
            self._trace = report.Trace(traced) if traced else None
        self.loop = decode_loop(loaded, run, self._trace, cache, timer)
        self.after: Step | None = None  # the last step of a replay, after which the text goes on
        self._steps: Iterator[Step] | None = None
        self._joiner = self._new_joiner()
        self._text: list[str] = []
        self.forced: list[tuple[int, int]] = []
        self._logprobs: dict[int, tuple[float, Likeliest]] = {}  # the keys are positions
        self.ending = "interrupted"

    def __iter__(self) -> Iterator[Piece]:
        self.catch_up()
        self._steps = self._steps or self.loop.run(self.run.prompt, self.after)
        for step in self._steps:
            yield self.take(step)
        if rest := self.finish():
            yield Piece((), (), rest)

    def passes(self) -> Generator[Pass | Piece, Output | None, None]:
        """The stream as a coroutine: yields the passes that it needs, to be sent their outputs, and its pieces. A piece
        of tokens ends a round."""
        if self._cold and self.ending == "interrupted" and not self.loop.cache.length:
            self._restore(lambda rows: None)
        text, output = self.loop.text(self.run.prompt, self.after), None
        with closing(text):
            while True:
                try:
                    asked = text.send(output)
                except StopIteration:
                    break
                output = yield asked if isinstance(asked, Pass) else self.take(asked)
        if rest := self.finish():
            yield Piece((), (), rest)

    def replay(self, tokens: Sequence[int]) -> None:
        """Begins after recorded tokens instead of after the prompt. Raises ReplayError."""
        for step in self.loop.replay(self.run.prompt, tokens):
            self.take(step)
            self.after = step
        self.recorded, self._cold = len(tokens), bool(tokens)

    def catch_up(self, progress: Callable[[int], Any] = int) -> None:
        """Computes the KV of a replayed text now rather than with the first piece.

        progress: function that gets the number of rows of each pass.
        """
        if self._cold and self.ending == "interrupted":
            self._cold = False
            self._restore(progress)
            try:
                compute(self.loop.catch_up(progress))
            except BaseException:  # Ctrl-C, for example: what was computed is kept, if that was asked for
                if self.loop.keep is not None:
                    self.loop.keep()
                raise

    def record(self, journal: Journal, kv_snapshot: bool) -> None:
        """Records the text from now on. kv_snapshot: whether to keep the KV cache at the end."""
        self.journal = journal
        if kv_snapshot:
            self.loop.keep = self._snapshot

    def header(self) -> dict[str, Any]:
        """Returns the header of this text's journal."""
        run = self.run
        eos = self.loaded.checkpoint.eos if run.eos is None else run.eos
        return contract.header(self.loaded, run.prompt, run.parameters(), self.numerics, self.guarantee, eos)

    def _snapshot(self) -> None:
        assert self.journal is not None
        self.journal.sync()
        folder, tokens = self.journal.record.path.parent, self.loop.history.tokens
        snapshot.save(folder, self.loop.cache, tokens, self.numerics, self.loop.ranks)

    def _restore(self, progress: Callable[[int], Any]) -> None:
        """Loads a snapshot's rows before the pending token, except one at least, which is left to be computed."""
        loop, stop = self.loop, len(self.loop.history) - 2
        if self.journal is not None and loop.eviction is None and not loop.sampler.stateful and not loop.unknown:
            folder = self.journal.record.path.parent
            tokens = loop.history.tokens
            snapshot.load(folder, loop.cache, tokens, self.numerics, stop, progress, loop.ranks)

    def close(self) -> None:
        """Stops writing. The text so far stays."""
        try:
            if self._steps is not None:
                self._steps.close()  # type: ignore[attr-defined]
        finally:
            self.finish()

    def spare_cache(self, tokens: int) -> KVCache | None:
        """Makes an empty cache of so many tokens in the memory of this stream's own, once the stream has ended.

        Returns None before that.
        Its pages ascend like those of a fresh cache, because rows that follow one another are read faster.
        """
        mine = self.loop.cache
        if mine.nbytes:
            return None
        pages: list[int] = []
        with suppress(MemoryError):  # the lossy mode has fewer
            while len(pages) * PAGE_SIZE < tokens:
                pages.append(mine.pool.allocate())
        for page in sorted(pages, reverse=True):
            mine.pool.release(page)
        return KVCache(mine.pool, mine.context)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def result(self) -> Result:
        """Returns the text so far. Its `ending` is "interrupted" unless something ended it.

        The text of an interrupted run is what is certain: what a resumed run writes stands after it, byte for byte.
        """
        text = self.text + self._rest()
        tokens, forced, stats = list(self.tokens), list(self.forced), copy.deepcopy(self.stats)
        fields = {"logprobs": None, **self.logprobs()}
        result = Result(text, tokens, forced, ending=self.ending, stats=stats, report={}, **fields)
        return replace(
            result,
            report=report.of_run(
                self.loaded, self.run, self.loop, result, self.numerics, self.guarantee, self.recorded
            ),
        )

    def logprobs(self) -> dict[str, Any]:
        """Returns those fields of the result. A text that was only replayed has none."""
        options, start, known = self.run.options, len(self.run.prompt), {**self.loop.known, **self._logprobs}
        fields: dict[str, Any] = {}
        if options.logprobs is not None:
            inside = {start + place for span in self.forced for place in range(*span)}
            chosen = [known.get(p) for p in range(start, start + len(self.tokens)) if p not in inside]
            whole = [found for found in chosen if found is not None]
            if len(whole) == len(chosen):
                fields["logprobs"] = [logprob for logprob, _ in whole]
                fields["top_logprobs"] = [likely for _, likely in whole] if options.logprobs else None
        if options.prompt_logprobs is not None and all(place in known for place in range(1, start)):
            fields["prompt_logprobs"] = [None, *(known[place] for place in range(1, start))]
        return fields

    @property
    def stats(self) -> GenerationStats:
        return self.loop.stats

    @property
    def text(self) -> str:
        """The text that is certain so far."""
        return "".join(self._text)

    @property
    def numerics(self) -> str:
        """The numerics contract under which the text is reproducible."""
        model, eviction = self.loop.model, self.loop.eviction
        return f"{model.numerics}/{eviction.label}" if eviction else model.numerics

    @property
    def guarantee(self) -> str:
        return "lossy" if self.loop.eviction else self.loop.model.guarantee

    def take(self, step: Step) -> Piece:
        """Joins a step to the text, and records it."""
        text = ""
        forced: tuple[int, ...] = ()
        if self.tokens and step.forced:
            forced = step.forced
            text = (self._joiner.finish() if self._joiner else "") + "\n\n"
            self.forced.append((len(self.tokens), len(self.tokens) + len(forced)))
            self.tokens.extend(forced)
            self._joiner = self._new_joiner()
        assert self._joiner is not None
        by_token = step.ending == "stop" and step.tokens[-1] in self.run.stop_tokens
        told = step.tokens[:-1] if by_token and not self.run.options.keep_stop else step.tokens
        text += self._joiner.push(told, stopped=step.ending == "stop" and not by_token)
        self._text.append(text)
        self.tokens.extend(step.tokens)
        if self.journal is not None:
            self.journal.append(step.tokens, forced)
        first = len(self.run.prompt) + len(self.tokens) - len(step.tokens)
        for place, logprob in enumerate(step.logprobs or ()):
            self._logprobs[first + place] = logprob, step.top_logprobs[place] if step.top_logprobs else ()
        self.ending = "interrupted" if step.ending == "eos" and self.loop.goes_on else step.ending or "interrupted"
        return Piece(step.tokens, forced, text, step.logprobs, step.top_logprobs)

    def finish(self) -> str:
        """Closes the journal and the trace. Returns the last characters of the text, which waited for more tokens."""
        try:
            if self.journal is not None:
                self.journal.close()
        finally:
            if self._trace is not None:
                self._trace.close()
        if self._joiner is None:
            return ""
        rest = self._rest()
        self._joiner = None
        self._text.append(rest)
        return rest

    def _rest(self) -> str:
        """Returns the end of an ended text that was held back.

        For an interrupted text it returns nothing. The bytes of a character that is not whole would be told as U+FFFD,
        and the beginning of a stop string as text. But a resumed run writes the character, or ends before the stop
        string.
        """
        return self._joiner.finish() if self._joiner and self.ending != "interrupted" else ""

    def _new_joiner(self) -> ChapterText | None:
        before = [*self.run.prompt, *self.tokens] if self.loaded.goes_on(self.run.options) else ()
        return ChapterText(self.loaded.tokenizer, self.run.options.stop, before, self.run.options.keep_stop)
