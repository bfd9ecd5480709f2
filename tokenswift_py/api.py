"""The Python interface: TokenSwift.from_pretrained(...).generate(prompt, ...) and .stream(prompt, ...)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenswift_py import quality, registry
from tokenswift_py.checkpoints.finding import DEFAULT_MODEL
from tokenswift_py.checkpoints.generation_defaults import not_honoured
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.core import is_whole
from tokenswift_py.errors import UserError, check, one_line
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.loaded import LoadedModel
from tokenswift_py.models.devices import KV_DTYPES, WEIGHT_FORMATS, find_device
from tokenswift_py.models.executors import choose_engine
from tokenswift_py.options import Options
from tokenswift_py.parallel.column import column
from tokenswift_py.parallel.pipeline_executor import load_all
from tokenswift_py.parallel.stages import find_place
from tokenswift_py.parallel.worker import serve_stage
from tokenswift_py.runs import contract
from tokenswift_py.runs.assembly import prompt_rows
from tokenswift_py.runs.baseline import baseline
from tokenswift_py.runs.journal import Journal, JournalError, Record, shared
from tokenswift_py.runs.plan import Run, check_snapshot, prepare, recorded_run
from tokenswift_py.runs.result import Result
from tokenswift_py.runs.stream import Stream
from tokenswift_py.sampling.processors import is_pure, name_of
from tokenswift_py.text import Prompt

logger = logging.getLogger("tokenswift")

LOST = {"draft_heads": None, "draft_model": None}  # what names files that no text depends on

MOST_THREADS = 1024  # the most threads of the native engine's team


class TokenSwift(LoadedModel):
    """A model with its tokenizer, ready to write. Make it with `from_pretrained`."""

    @classmethod
    def from_pretrained(
        cls,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        dtype: str = "bf16",
        kv_dtype: str | None = None,
        engine: str = "auto",
        attention: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        deterministic: str = "auto",
        pipeline_parallel_size: int = 1,
    ) -> TokenSwift:
        """Loads a model: the default's name, a folder, a .gguf file or a hub id.

        dtype:     type of the weights: bf16, fp32, int8 (blocks of 32 with an fp16 scale; native) or gguf (the blocks
                   of a .gguf file: those of 4, 5, 6 and 8 bits unchanged, others rounded to 8; native).
        kv_dtype:  type of the KV cache: bf16, fp32 or int8 (with an fp32 scale for each token's key and value of each
                   head; native, and torch with attention triton); None is that of the weights, bf16 beside int8 and
                   gguf.
        engine:    native (C++, CPU), torch (any device) or auto: native on a CPU where it is built.
        attention: auto, or a backend of kernels/, which is torch's. auto is sdpa on a CPU, and on a GPU the first
                   installed of triton, flash, xformers and sdpa.
        device:    auto (cuda where there is one, else cpu) or a torch device.
        threads:   CPU threads; None is the number that the machine gives this process.
        deterministic: with on, a row's bits do not depend on its company (native always; torch with attention triton).
                       With blocks, matrix products are cuBLAS's in blocks of 64 rows: as on where a test at the start
                       finds that rows keep their bits, else measured. With off, they are cuBLAS's as it likes, and the
                       guarantee is measured. auto is blocks on a GPU where the test holds, else on where it can be.
        pipeline_parallel_size: number of stages over which the layers are spread. It must divide the processes.

        Under torchrun (WORLD_SIZE above 1) the processes hold the model together, each its share of heads and weights,
        and must run the same program on the same arguments. With several stages that is so for the processes of the
        first one. Those of later stages never return from here: they compute what the first tells them, and leave by
        SystemExit when it ends. Raises UserError, in one line, for whatever cannot be used. Weights that cannot fit are
        refused before they are read.
        """
        model = os.fspath(model)
        place = find_place(pipeline_parallel_size)
        if place.stage > 0:
            serve_stage(place)
        if place.stages > 1:
            column(place)  # whatever is refused below, the other stages are let go at the end
        ranks = place.ranks
        check(dtype in WEIGHT_FORMATS, "dtype", dtype, f"one of {', '.join(WEIGHT_FORMATS)}")
        check(kv_dtype is None or kv_dtype in KV_DTYPES, "kv_dtype", kv_dtype, f"one of {', '.join(KV_DTYPES)}")
        backends = ["auto", *registry.names("tokenswift_py.kernels")]
        check(attention in backends, "attention", attention, f"one of {', '.join(backends)}")
        check(threads is None or 1 <= threads <= MOST_THREADS, "threads", threads, f"between 1 and {MOST_THREADS}")
        with ranks.same_fate():
            where = find_device(device, place.processes)
            chosen = choose_engine(engine, where, attention, ranks.world)
            checkpoint = open_checkpoint(model, revision, dtype) if ranks.leads else None
        ranks.place(where)
        with ranks.same_fate():  # rank 0 has fetched or converted the files by now
            checkpoint = checkpoint or open_checkpoint(model, revision, dtype)
            settings = {"engine": chosen, "dtype": dtype, "kv_dtype": kv_dtype, "attention": attention,
                        "threads": threads, "deterministic": deterministic}  # fmt: skip
            executor = load_all(
                place, checkpoint, where, {"model": model, "revision": revision, "device": device}, settings
            )
            tokenizer = checkpoint.tokenizer()
        if ranks.leads and (left := not_honoured(checkpoint.folder)):
            logger.warning("generation_config.json: these change nothing here: %s", left)
        there = Path(model).expanduser()
        origin = {
            "model": str(there.resolve()) if there.exists() and model != DEFAULT_MODEL else model,
            "revision": revision,
            "dtype": dtype,
            "kv_dtype": kv_dtype,
            "engine": chosen,
            "attention": attention,
            "device": str(where) if place.processes == 1 else where.type,
            "deterministic": deterministic,
        }
        return cls(checkpoint, tokenizer, executor, origin)

    def generate(self, prompt: Prompt, **settings: Any) -> Result:
        """Writes a text and returns it whole. settings: the fields of `Options`."""
        with self.stream(prompt, **settings) as stream:
            for _ in stream:
                pass
            return stream.result()

    def generate_n(self, prompt: Prompt, n: int, **settings: Any) -> list[Result]:
        """Writes `n` samples of one prompt. Sample i is the text that `generate` writes with the same seed and `stream`
        i."""
        results = []
        for stream in self.streams(prompt, n, **settings):
            with stream:
                for _ in stream:
                    pass
                results.append(stream.result())
        return results

    def streams(
        self, prompt: Prompt, n: int, *, out: str | Path | None = None, kv_snapshot: bool = False, **settings: Any
    ) -> Iterator[Stream]:
        """Yields `n` streams, like `stream`, that share the seed and the prompt's KV. Each is closed when the next is
        asked for. They are numbered from the setting `stream` on.

        out: folder that gets a folder 1, 2 ... for each of them.
        """
        check(is_whole(n) and 1 <= n <= 2**31, "n", n, "a whole number, at least 1")
        run = self._prepared(prompt, Options.of(**settings))
        check(n == 1 or run.options.trace is None, "trace", run.options.trace, "not with n: it is the file of one text")
        stateful = [name_of(processor) for processor in run.options.logits_processors if not is_pure(processor)]
        check(n == 1 or not stateful, "logits_processors", stateful, "pure ones, of which no text leaves a trace")
        first, rows = run.sampling.stream, prompt_rows(self, run)
        try:
            for number in range(n):
                sampling = replace(run.sampling, stream=first + number)
                numbered: dict[str, Any] = {"stream": first + number}
                options = replace(run.options, **numbered)
                folder = None if out is None else Path(out) / str(number + 1)
                cache = None if rows is None else rows.fork()
                with self._begun(
                    replace(run, options=options, sampling=sampling), folder, kv_snapshot, cache
                ) as stream:
                    yield stream
        finally:
            if rows is not None:
                rows.release()

    def stream(
        self, prompt: Prompt, *, out: str | Path | None = None, kv_snapshot: bool = False, **settings: Any
    ) -> Stream:
        """Begins a text and returns an iterator over its pieces. Its `.result()` is the text so far.

        out:         a new or empty folder that gets a journal, from which `resume` goes on, and which an audit proves.
        kv_snapshot: whether full pages of its KV cache go there too when the stream ends or is closed, for `resume`.
        """
        return self._begun(self._prepared(prompt, Options.of(**settings)), out, kv_snapshot)

    def _prepared(self, prompt: Prompt, options: Options) -> Run:
        """Makes a run that every rank agrees on."""
        ranks = self.executor.ranks
        with ranks.same_fate():
            run = prepare(self, prompt, options)
        if run.options.seed is None:  # each rank has drawn one
            seed = int(ranks.first(np.array([run.sampling.seed]))[0])
            run = replace(run, sampling=replace(run.sampling, seed=seed))
        return run

    def _begun(self, run: Run, out: str | Path | None, kv_snapshot: bool, cache: KVCache | None = None) -> Stream:
        """Makes the stream of a run. cache: a cache that has rows of the prompt already."""
        ranks = self.executor.ranks
        ranks.agree("the prompt or the parameters", (run.prompt, run.turns, run.parameters(), kv_snapshot))
        folder = ranks.first_text("" if out is None else str(Path(out)))  # the command line tells rank 0 alone
        with ranks.same_fate():
            check(not kv_snapshot or folder != "", "kv_snapshot", kv_snapshot, "only with out")
            check_snapshot(kv_snapshot, run.options)
        stream = Stream(self, run, cache)
        if folder:
            journal = shared(ranks, lambda: Journal.create(Path(folder), stream.header()))
            stream.record(journal, kv_snapshot)
        return stream

    def resume(
        self, journal: str | Path | Journal, extend: int = 0, kv_snapshot: bool = False, **settings: Any
    ) -> Stream:
        """Goes on with a recorded run. The stream has its text so far, and yields the pieces after it.

        journal:  the run's folder, or its journal opened.
        kv_snapshot: the same as for `stream`. A snapshot that is there is used in any case.
        extend:   number of tokens to write beyond those that were asked for: within the recorded context, or a larger
                  one where that meets positions alike. Only for a run that ended because it had them all.
        settings: fields of `Options`. A journal records only the names of `logits_processors`, so these must be given
                  in the state that they had when the run began: each is called again for every token so far, unless it
                  is pure. A setting that the text depends on must be the recorded one.

        Raises UserError with the difference where model, tokenizer, parameters or numerics are not the recorded ones.
        """
        ranks = self.executor.ranks
        if not isinstance(journal, Journal):
            folder = Path(journal)
            journal = shared(ranks, lambda: Journal.open(folder))
        try:
            record = journal.record
            try:
                stream = self._begun_again(record, extend, kv_snapshot, settings)
            except UserError as error:
                field = str(error).partition(":")[0]
                if field not in LOST or field in settings or ranks.world > 1:
                    raise
                logger.warning("%s; the text goes on by drafter auto, and is the same", error)
                stream = self._begun_again(record, extend, kv_snapshot, {**settings, **LOST, "drafter": "auto"})
            with ranks.same_fate():
                if ranks.leads:
                    contract.check_same(record.header, stream.header())
                with one_line(f"journal: {record.path} does not hold a text of its own parameters"):
                    stream.replay(record.tokens)
                if extend:
                    written = f"{record.chosen} of {record.max_new_tokens} tokens"
                    why = f"the run is not finished ({written}): resume it first"
                    check(stream.ending == "interrupted", "extend", extend, f"the text has ended ({stream.ending})")
                    check(record.chosen >= record.max_new_tokens, "extend", extend, why)
            if extend:
                with ranks.same_fate(JournalError):
                    journal.extend(extend)
        except BaseException:
            journal.close()
            raise
        stream.record(journal, kv_snapshot)
        return stream

    def _begun_again(self, record: Record, extend: int, kv_snapshot: bool, settings: Mapping[str, Any]) -> Stream:
        """Returns the stream of a recorded run, before anything of its text."""
        ranks = self.executor.ranks
        with ranks.same_fate():
            run = recorded_run(self, record, extend, **settings)
            check_snapshot(kv_snapshot, run.options)
        ranks.agree("the parameters", (run.parameters(), kv_snapshot))
        return Stream(self, run)

    def baseline(self, stream: Stream) -> Result:
        """Writes the stream's text again by plain decoding with the same seed. Returns the stream's report with both
        side by side.

        Raises UserError for a resumed stream, because its times are those of a part of its text, and where the stream
        has not ended and there is no room for a second KV cache beside its own.
        """
        return baseline(self, stream)

    def window_perplexity(self, text: Result | Sequence[int], window: int | None = None) -> quality.WindowPerplexity:
        """Returns how the model reads a text, window by window, each on its own at positions that it was trained for.

        text:   a result, of which the tokens that the model chose count, or token ids.
        window: tokens of each window; None is 1000, or the trained positions if these are fewer. A rest is left out,
                but a shorter text is one window.

        `.summary()` of the value returned is the report's `window_perplexity`. Raises UserError for a window longer
        than the trained positions, and for ids that the model does not know.
        """
        return quality.window_perplexity(self, text.chosen if isinstance(text, Result) else text, window)
