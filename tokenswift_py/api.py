"""The Python interface: TokenSwift.from_pretrained(...).generate(prompt, ...) and .stream(prompt, ...)."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from tokenswift_py import __version__, quality, registry
from tokenswift_py.checkpoints.generation_defaults import not_honoured
from tokenswift_py.checkpoints.loading import (
    DEFAULT_MODEL,
    KV_DTYPES,
    WEIGHTS,
    Checkpoint,
    dtype_name,
    open_checkpoint,
    open_draft_checkpoint,
)
from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.eviction import STATISTICS_ROWS, Eviction
from tokenswift_py.decoding.loop import Engine, Step
from tokenswift_py.decoding.stopping import ChapterText, Stops
from tokenswift_py.drafters.base import VIEWS, create
from tokenswift_py.errors import UserError, about, check, one_line
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.memory import check_memory
from tokenswift_py.models.executors import Executor, choose_engine, load
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.ranks import ALONE, Ranks, join
from tokenswift_py.models.rope import TRAINED, RopeTables, chosen_positions, rope_bytes, rope_tables
from tokenswift_py.options import CHECKPOINT_DEFAULTS, SELF_DRAFTERS, Options
from tokenswift_py.runs import contract, report, snapshot
from tokenswift_py.runs.journal import Journal, JournalError, Record, shared
from tokenswift_py.runs.report import Trace
from tokenswift_py.runs.statistics import GenerationStats, memory_bandwidth
from tokenswift_py.sampling.processors import check_processors, is_pure, name_of
from tokenswift_py.text import Prompt, end_tokens, prompt_tokens, special_ids, turn_tokens

logger = logging.getLogger("tokenswift")

MOST_THREADS = 1024  # of the native engine's team


@dataclass(frozen=True)
class Piece:
    """What one step of a stream brought. tokens: chosen by the model; forced: put in before them; text: joined."""

    tokens: tuple[int, ...]
    forced: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Result:
    """A finished text.

    text:     what the model wrote, chapters set apart by an empty line.
    tokens:   every token behind the prompt, forced ones included.
    forced:   [start, stop) spans of `tokens` that were forced (follow-up turns).
    logprobs: of the chosen tokens, when asked for.
    ending:   eos, stop, loop, length or interrupted.
    report:   the fields of report.json.
    """

    text: str
    tokens: list[int]
    forced: list[tuple[int, int]]
    logprobs: list[float] | None
    ending: str
    stats: GenerationStats
    report: dict[str, Any]

    @property
    def chosen(self) -> list[int]:
        """The tokens without the forced ones."""
        inside = {i for start, stop in self.forced for i in range(start, stop)}
        return [token for i, token in enumerate(self.tokens) if i not in inside]


@dataclass(frozen=True)
class Run:
    """A run that passed every check and has not begun.

    draft_model: what the drafter of this name is made with.
    stop_tokens: ids of the tokens that end the text as stop strings do.
    """

    options: Options
    prompt: list[int]
    turns: list[list[int]]
    sampling: SamplingParams
    context: int
    rope: RopeTables
    draft_model: Mapping[str, Any] = field(default_factory=dict)
    stop_tokens: tuple[int, ...] = ()

    def parameters(self) -> dict[str, Any]:
        """The keyword arguments of `generate` that write this text again, defaults and seed filled in."""
        options = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        options |= {name: list(value) for name, value in options.items() if isinstance(value, tuple)}
        filled = {name: getattr(self.sampling, name) for name in (*CHECKPOINT_DEFAULTS, "seed")}
        filled["ban"] = list(self.sampling.ban if self.options.ban is None else self.options.ban)
        processors = [type(processor).__name__ for processor in self.options.logits_processors]
        bias = {str(token): value for token, value in self.sampling.logit_bias.items()}
        positions = {
            "context": self.context,
            "positions": self.rope.positions.scheme,
            "positions_window": self.rope.positions.window,
            "positions_block": self.rope.positions.block,
        }
        return {**options, **filled, **positions, "logits_processors": processors, "logit_bias": bias}


class TokenSwift:
    """A model with its tokenizer, ready to write. Make it with `from_pretrained`.

    origin: the arguments of `from_pretrained` that load it again, as a journal records them.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, executor: Executor, origin: Mapping[str, Any]):
        self.checkpoint = replace(checkpoint, eos=end_tokens(tokenizer, checkpoint.eos))
        self.tokenizer = tokenizer
        self.executor = executor
        self._draft: tuple[tuple[str, str], TokenSwift] | None = None  # the last one, and how it was asked for
        self.origin = origin

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
    ) -> TokenSwift:
        """Load a model: the default's name, a folder, a .gguf file or a hub id.

        dtype:     of the weights: bf16, fp32, int8 (blocks of 32 with an fp16 scale; native) or gguf (the 4- and 8-bit
                   blocks of a .gguf file as they are; native).
        kv_dtype:  of the KV cache: bf16, fp32 or int8 (with an fp32 scale for each token's key and value of each head;
                   native, and torch with attention triton); None is that of the weights, bf16 beside int8 and gguf.
        engine:    native (C++, CPU), torch (any device) or auto: native on a CPU where it is built.
        attention: auto, or a backend of kernels/, which is torch's. auto is sdpa on a CPU; on a GPU the first installed
                   of triton, flash, xformers and sdpa.
        device:    auto (cuda where there is one, else cpu) or a torch device.
        threads:   CPU threads; None is what the machine gives this process.
        deterministic: on: a row's bits do not depend on its company (native always; torch with attention triton);
                   off: cuBLAS's products, measured; auto: on where it can be.
        Under torchrun (WORLD_SIZE above 1) the processes hold the model together, each its share of heads and weights,
        and must run the same program on the same arguments.
        Raises UserError, in one line, for whatever cannot be used; weights that cannot fit are refused before they
        are read.
        """
        ranks = join()
        check(dtype in WEIGHTS, "dtype", dtype, f"one of {', '.join(WEIGHTS)}")
        check(kv_dtype is None or kv_dtype in KV_DTYPES, "kv_dtype", kv_dtype, f"one of {', '.join(KV_DTYPES)}")
        backends = ["auto", *registry.names("tokenswift_py.kernels")]
        check(attention in backends, "attention", attention, f"one of {', '.join(backends)}")
        check(threads is None or 1 <= threads <= MOST_THREADS, "threads", threads, f"between 1 and {MOST_THREADS}")
        with ranks.same_fate():
            where = find_device(device, ranks)
            chosen = choose_engine(engine, where, attention, ranks.world)
            checkpoint = open_checkpoint(model, revision, dtype) if ranks.leads else None
        ranks.place(where)
        with ranks.same_fate():  # what rank 0 had to fetch or convert is there now
            checkpoint = checkpoint or open_checkpoint(model, revision, dtype)
            needed = checkpoint.weight_bytes(dtype) // ranks.world
            check_memory(needed, where, f"the weights of {model} in {dtype}")
            executor = load(checkpoint, chosen, dtype, kv_dtype, where, attention, threads, deterministic, ranks)
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
            "device": str(where) if ranks.world == 1 else where.type,
            "deterministic": deterministic,
        }
        return cls(checkpoint, tokenizer, executor, origin)

    def generate(self, prompt: Prompt, **settings: Any) -> Result:
        """Write a text and return it whole. Settings: the fields of `Options`."""
        with self.stream(prompt, **settings) as stream:
            for _ in stream:
                pass
            return stream.result()

    def stream(
        self, prompt: Prompt, *, out: str | Path | None = None, kv_snapshot: bool = False, **settings: Any
    ) -> Stream:
        """Begin a text and return an iterator over its pieces; `.result()` of it is the text so far.

        out:         a new or empty folder that gets a journal, from which `resume` goes on, and which an audit proves.
        kv_snapshot: when the stream ends or is closed, full pages of its KV cache go there, too, for `resume`.
        """
        ranks = self.executor.ranks
        with ranks.same_fate():
            run = self.prepare(prompt, Options.of(**settings))
        if run.options.seed is None:  # each rank has drawn one
            seed = int(ranks.first(np.array([run.sampling.seed]))[0])
            run = replace(run, sampling=replace(run.sampling, seed=seed))
        ranks.agree("the prompt or the parameters", (run.prompt, run.turns, run.parameters(), kv_snapshot))
        folder = ranks.first_text("" if out is None else str(Path(out)))  # the command line tells rank 0 alone
        with ranks.same_fate():
            check(not kv_snapshot or folder != "", "kv_snapshot", kv_snapshot, "only with out")
            check_snapshot(kv_snapshot, run.options)
            logprobs = run.options.logprobs
            check(not (folder and logprobs), "logprobs", logprobs, "not with out: a journal holds tokens only")
        stream = Stream(self, run)
        if folder:
            journal = shared(ranks, lambda: Journal.create(Path(folder), contract.header(stream)))
            stream.record(journal, kv_snapshot)
        return stream

    def resume(
        self, journal: str | Path | Journal, extend: int = 0, kv_snapshot: bool = False, **settings: Any
    ) -> Stream:
        """Go on with a recorded run: the stream has its text so far, and its pieces are those behind it.

        journal:  the run's folder, or its journal opened.
        kv_snapshot: as for `stream`; one that is there is used in any case.
        extend:   write so many tokens more than were asked for, within the recorded context; of a finished run only.
        settings: fields of `Options`, `logits_processors` foremost, which a journal names only: as they were when the
                  run began, for each is called again for every token so far, unless it is pure. One that the text
                  depends on must be as recorded.
        Raises UserError with the difference where model, tokenizer, parameters or numerics are not the recorded ones.
        """
        ranks = self.executor.ranks
        if not isinstance(journal, Journal):
            folder = Path(journal)
            journal = shared(ranks, lambda: Journal.open(folder))
        try:
            record = journal.record
            with ranks.same_fate():
                run = self.recorded_run(record, extend, **settings)
                check_snapshot(kv_snapshot, run.options)
            ranks.agree("the parameters", (run.parameters(), kv_snapshot))
            stream = Stream(self, run)
            with ranks.same_fate():
                if ranks.leads:
                    contract.check_same(record.header, contract.header(stream))
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

    def recorded_run(self, record: Record, extend: int = 0, **settings: Any) -> Run:
        """The run that a journal records, `extend` tokens longer. Raises UserError as `resume` does."""
        recorded = {**record.header["parameters"], "max_new_tokens": record.max_new_tokens, "trace": None}
        if "positions" not in recorded:  # begun before there was a choice
            recorded["positions"] = "trained" if "/rope-dynamic" in record.header["numerics"] else "yarn"
        settings |= self.resolved_positions(settings, recorded)
        processors = settings.pop("logits_processors", ())
        check_processors(processors)
        names = [type(processor).__name__ for processor in processors]
        contract.check_parameter("logits_processors", names, recorded["logits_processors"])
        for name, value in settings.items():
            if name in recorded and name not in contract.FREE:
                contract.check_parameter(name, value, recorded[name])
        options = Options.of(**{**recorded, **settings, "logits_processors": processors})
        run = self.prepare(record.header["prompt"], options)
        outside = [token for token in record.tokens if not 0 <= token < self.checkpoint.spec.vocab_size]
        check(not outside, "journal: token", outside[:1], "the model knows no such id")
        room = run.context - len(run.prompt) - sum(map(len, run.turns)) - options.max_new_tokens
        check(extend >= 0, "extend", extend, "a number of tokens")
        allowed = f"the recorded context of {run.context} has room for {room} more; begin with a larger one"
        check(extend <= room, "extend", extend, allowed)
        return replace(run, options=replace(run.options, max_new_tokens=options.max_new_tokens + extend))

    def resolved_positions(self, settings: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
        """What is asked for of positions when a run is resumed, as a journal records what came of it; nothing where
        nothing is."""
        names = ("positions", "positions_window", "positions_block")
        if not any(name in settings for name in names):
            return {}
        asked = {name: settings.get(name, recorded.get(name)) for name in names}
        if "positions" not in settings and asked["positions"] == "trained":
            asked["positions"] = "auto"  # which may have had no need of the window and the block that it was given
        found = chosen_positions(self.checkpoint.config, recorded["context"], Positions(*asked.values()))
        return dict(zip(names, (found.scheme, found.window, found.block), strict=True))

    def prepare(self, prompt: Prompt, options: Options) -> Run:
        """Check everything that can be checked before any work. Raises UserError."""
        tokenizer, checkpoint = self.tokenizer, self.checkpoint
        tokens = prompt_tokens(tokenizer, prompt, options.raw)
        check(bool(tokens) and len(prompt) > 0, "prompt", prompt, "it must not be empty")
        turns = [turn_tokens(tokenizer, request, checkpoint.eos, options.raw) for request in options.chapters]
        highest, vocab = max([*tokens, *(token for turn in turns for token in turn)]), checkpoint.spec.vocab_size
        check(highest < vocab, "prompt", highest, f"the model knows token ids 0 to {vocab - 1}")
        sampling, stops = options.sampling(checkpoint.defaults, tokenizer), options.stop_ids(tokenizer, vocab)
        needed = len(tokens) + sum(len(turn) for turn in turns) + options.max_new_tokens
        context = options.context or needed
        parts = f"prompt ({len(tokens)})" + (
            f" + turns ({needed - len(tokens) - options.max_new_tokens})" if turns else ""
        )
        allowed = f"{parts} + max_new_tokens ({options.max_new_tokens}) need {needed}"
        check(needed <= context, "context", context, allowed)
        kept = min(context, options.kv_budget or context)
        draft = self.draft(options)
        draft_bytes = draft.kv_bytes(min(kept, options.draft_budget or kept)) if draft else 0
        tables = rope_bytes(checkpoint.config, context)
        what = f"a KV cache of {kept} tokens{' and that of the draft model' if draft else ''}"
        what += f" with RoPE tables of {context} positions"
        bounds = "quest" in (options.draft_policy, options.kv_policy)
        own_bytes = self.kv_bytes(kept, bounds) // self.executor.ranks.world + tables
        if options.chosen_drafter in SELF_DRAFTERS and self.executor.reads_copies(options.draft_kv):
            seen = min(kept, options.draft_budget or VIEWS[-1])
            draft_bytes = self.kv_bytes(seen + seen // 4, dtype=torch.int8)
        check_memory(own_bytes + draft_bytes, self.executor.device, what)
        rope = rope_tables(checkpoint.config, context, options.met_positions())
        self.executor.check_rope(rope)
        if rope.note:
            logger.warning(rope.note)
        drafting = draft.as_draft(context, vocab) if draft else {}
        return Run(options, tokens, turns, sampling, context, rope, drafting, stops)

    def goes_on(self, options: Options) -> bool:
        """Whether a prompt is the beginning of the text, which then goes on from it."""
        return options.raw or not self.tokenizer.chat_template

    def kv_bytes(self, tokens: int, bounds: bool = False, dtype: torch.dtype | None = None) -> int:
        """Of a KV cache with room for so many, heads padded as the executor has them. bounds: and of each page's keys,
        as policy quest reads them. dtype: None is the executor's."""
        spec, padded = self.checkpoint.spec, self.executor.padded_head
        pages, kept = pages_for(tokens), replace(spec, head_dim=padded(spec.head_dim))
        bytes_of_bounds = 2 * spec.layers * spec.kv_heads * spec.head_dim * torch.float32.itemsize * pages
        return kept.kv_bytes(pages * PAGE_SIZE, dtype or self.executor.kv_dtype) + (bytes_of_bounds if bounds else 0)

    def step_bytes(self, context: float) -> float:
        """What plain decoding must read for a token behind so many others, weights and KV (this rank's)."""
        kv = self.checkpoint.spec.kv_bytes(1, self.executor.kv_dtype) * context
        return self.executor.multiplied_nbytes + kv / self.executor.ranks.world

    def draft(self, options: Options) -> TokenSwift | None:
        """The smaller model of drafter draft_model, loaded at its first use; of several ranks rank 0 has it whole, and
        the others have none, for its trees are theirs. Raises UserError."""
        if options.chosen_drafter != "draft_model" or not self.executor.ranks.leads:
            return None
        assert options.draft_model is not None
        key = (options.draft_model, options.draft_weights)
        if self._draft is None or self._draft[0] != key:
            self._draft = None  # its weights make room
            checkpoint, tokenizer = open_draft_checkpoint(options.draft_model, self.tokenizer)
            executor = self.executor.beside(checkpoint, options.draft_weights)
            self._draft = key, TokenSwift(checkpoint, tokenizer, executor, {})
        return self._draft[1]

    def as_draft(self, context: int, target_vocab: int) -> Mapping[str, Any]:
        """What drafter draft_model takes of this model, for a run of a target over so many positions."""
        with about(f"draft_model {self.checkpoint.name}"):
            try:
                rope = rope_tables(self.checkpoint.config, context)
                self.executor.check_rope(rope)
            except UserError:  # a draft may be wrong, and must not stop the text
                rope = rope_tables(self.checkpoint.config, context, TRAINED)
            model = self.executor.model(rope)
        if rope.note:
            logger.warning("draft model: %s", rope.note)
        sizes = self.checkpoint.spec.vocab_size, target_vocab
        return {"model": model, "vocab_sizes": sizes if sizes[0] != sizes[1] else None}

    def engine(self, run: Run, trace: Trace | None = None, cache: KVCache | None = None) -> Engine:
        options = run.options
        drafter, settings = options.drafter_settings(self.checkpoint)
        if drafter == "draft_model" and self.executor.ranks.leads:
            settings |= run.draft_model
        elif drafter == "draft_model":
            drafter, settings = "none", {}
        with self.executor.ranks.same_fate():
            chosen = create(drafter, **settings)
        if self.executor.ranks.world > 1:
            self.executor.ranks.agree("the draft heads", chosen.alike())
        eos = self.checkpoint.eos
        first_end = len(run.prompt) + options.min_new_tokens
        vocab, special = self.checkpoint.spec.vocab_size, special_ids(self.tokenizer)
        eviction = eviction_of(options, self.executor.ranks)
        chunk: dict[str, Any] = {"prefill_chunk": STATISTICS_ROWS} if eviction and eviction.needs else {}
        ends = () if options.ignore_eos else eos
        decode = partial(self.tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
        late, processors = (*eos, *run.stop_tokens), options.logits_processors
        sampler = self.executor.sampler(run.sampling, vocab, late, first_end, processors, options.min_chapter_tokens)
        return Engine(
            self.executor.model(run.rope),
            chosen,
            sampler,
            Stops(
                options.max_new_tokens,
                ends,
                options.stop,
                decode,
                special,
                options.on_loop,
                run.stop_tokens,
                sampler.may_end_from,
                self.goes_on(options),
            ),
            run.turns,
            options.draft_tokens,
            want_logprobs=options.logprobs,
            draft_model=self.executor.draft_model(run.rope, options.draft_weights, options.draft_kv)
            if drafter in (*SELF_DRAFTERS, "heads")
            else None,
            trace=trace,
            eviction=eviction,
            cache=cache,
            ranks=self.executor.ranks,
            **chunk,
        )

    def baseline(self, stream: Stream) -> Result:
        """Write the stream's text again by plain decoding, same seed; the stream's report with both side by side.

        Raises UserError for a resumed stream, whose times are of a part of its text, and where the stream has not
        ended and there is no room for a second KV cache beside its own.
        """
        run, mine = stream.run, stream.result()
        recorded, allowed = mine.stats.recorded_tokens, "a stream that wrote all of its text itself"
        stateful = [name_of(processor) for processor in run.options.logits_processors if not is_pure(processor)]
        why = "not with processors that keep state, which stands at the text's end by now"
        check(not stateful, "baseline", stateful, why)
        check(recorded == 0, "baseline", f"a run resumed behind {recorded} tokens", allowed)
        cache = stream.spare_cache(len(run.prompt) + len(mine.tokens))
        if cache is None:
            kept = min(run.context, run.options.kv_budget or run.context)
            size = self.kv_bytes(kept, run.options.kv_policy == "quest") // self.executor.ranks.world
            with self.executor.ranks.same_fate():
                check_memory(size, self.executor.device, f"a second KV cache of {kept} tokens, for plain decoding,")
        options = replace(run.options, drafter="none", trace=None)
        if options.on_loop == "warn":  # the stream has said so already
            options = replace(options, on_loop="ignore")
        with Stream(self, replace(run, options=options), cache) as plain:
            pieces = iter(plain)
            while mine.ending != "interrupted" or len(plain.tokens) < len(mine.tokens):
                if next(pieces, None) is None:
                    break
            theirs = plain.result()
        first, eviction = len(run.prompt), eviction_of(run.options)
        positions = range(first, first + len(mine.tokens))
        mean_context = float(np.mean([eviction.tokens_held(p) if eviction else p for p in positions] or [first]))
        bandwidth = memory_bandwidth(device=self.executor.device, threads=self.executor.threads)
        reads = self.step_bytes(mean_context)
        figures = report.baseline_figures(mine.stats, theirs.stats, mine.tokens, theirs.tokens, reads, bandwidth)
        if eviction:
            figures["baseline"]["what"] += ", evicting the same pages (lossy)"
        return replace(mine, report={**mine.report, **figures})

    def window_perplexity(self, text: Result | Sequence[int], window: int | None = None) -> quality.WindowPerplexity:
        """How the model reads a text, window by window, each on its own at positions that it was trained to.

        text:   a result, of which the tokens that the model chose count, or token ids.
        window: tokens of each; None is 1000, or what the trained positions hold. A rest is left out, but a shorter
                text is one window.
        `.summary()` of what is returned is the report's `window_perplexity`. Raises UserError for a window longer than
        the trained positions, and for ids that the model does not know.
        """
        return quality.window_perplexity(self, text.chosen if isinstance(text, Result) else text, window)


class Stream:
    """Pieces of a text while it is written. Leaving it early (close, or the end of a with block) loses nothing.

    cache: an empty one to write into; None makes one.
    """

    def __init__(self, swift: TokenSwift, run: Run, cache: KVCache | None = None):
        self.run = run
        self.swift = swift
        self.tokens: list[int] = []
        self.journal: Journal | None = None
        self._recorded = 0
        self._cold = False  # whether there is a text whose KV is not in the cache
        with swift.executor.ranks.same_fate():
            traced = run.options.trace if swift.executor.ranks.leads else None
            self._trace = report.Trace(traced) if traced else None
        self.engine = swift.engine(run, self._trace, cache)
        self._limit = self.engine.cache.limit  # which the lossy mode moves on
        self._steps = self.engine.run(run.prompt)
        self._joiner = self._new_joiner()
        self._text: list[str] = []
        self.forced: list[tuple[int, int]] = []
        self._logprobs: list[float] = []
        self.ending = "interrupted"

    def __iter__(self) -> Iterator[Piece]:
        self.catch_up()
        for step in self._steps:
            yield self._take(step)
        if rest := self._finish():
            yield Piece((), (), rest)

    def replay(self, tokens: Sequence[int]) -> None:
        """Begin behind recorded tokens instead of behind the prompt. Raises ReplayError."""
        step = None
        for step in self.engine.replay(self.run.prompt, tokens):
            self._take(step)
        self._recorded, self._cold = len(tokens), bool(tokens)
        if step is not None:
            self._steps = self.engine.run(self.run.prompt, step)

    def catch_up(self, progress: Callable[[int], None] | None = None) -> None:
        """Compute the KV of a replayed text now rather than with the first piece.

        progress: called with the number of rows of each pass.
        """
        if self._cold and self.ending == "interrupted":
            self._cold = False
            self._restore(progress or (lambda rows: None))
            self.engine.catch_up(progress)

    def record(self, journal: Journal, kv_snapshot: bool) -> None:
        """Record what is written from now on; kv_snapshot: and keep the KV cache at the end."""
        self.journal = journal
        if kv_snapshot:
            self.engine.keep = self._snapshot

    def _snapshot(self) -> None:
        assert self.journal is not None
        self.journal.sync()
        engine = self.engine
        folder, tokens = self.journal.record.path.parent, engine.history.tokens
        snapshot.save(folder, engine.cache, tokens, self.numerics, engine.ranks)

    def _restore(self, progress: Callable[[int], None]) -> None:
        """What a snapshot has of the rows before the pending token; one at least is left to be computed."""
        engine, stop = self.engine, len(self.engine.history) - 2
        if self.journal is not None and engine.eviction is None and not engine.sampler.stateful:
            folder = self.journal.record.path.parent
            tokens = engine.history.tokens
            snapshot.load(folder, engine.cache, tokens, self.numerics, stop, progress, engine.ranks)

    def close(self) -> None:
        """Stop writing; what was written stays."""
        try:
            self._steps.close()  # type: ignore[attr-defined]
        finally:
            self._finish()

    def spare_cache(self, tokens: int) -> KVCache | None:
        """An empty cache of so many tokens over the memory of this stream's own, which has ended; None while it goes
        on. Its pages ascend, as those of a fresh one do: rows that follow one another are read faster."""
        mine = self.engine.cache
        if mine.nbytes:
            return None
        pages: list[int] = []
        with suppress(MemoryError):  # the lossy mode has fewer
            while len(pages) * PAGE_SIZE < tokens:
                pages.append(mine.pool.allocate())
        for page in sorted(pages, reverse=True):
            mine.pool.release(page)
        spare = KVCache(mine.pool, mine.context)
        spare.limit = self._limit
        return spare

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def result(self) -> Result:
        """The text so far, `ending` "interrupted" unless something ended it."""
        text = self.text + (self._joiner.finish() if self._joiner else "")
        logprobs = list(self._logprobs) if self.run.options.logprobs else None
        tokens, forced, stats = list(self.tokens), list(self.forced), copy.deepcopy(self.stats)
        result = Result(text, tokens, forced, logprobs, self.ending, stats, {})
        return replace(result, report=self._report(result))

    @property
    def stats(self) -> GenerationStats:
        return self.engine.stats

    @property
    def text(self) -> str:
        """The text that is certain so far."""
        return "".join(self._text)

    @property
    def numerics(self) -> str:
        """The contract under which the text is reproducible."""
        model, eviction = self.engine.model, self.engine.eviction
        return f"{model.numerics}/{eviction.label}" if eviction else model.numerics

    @property
    def guarantee(self) -> str:
        return "lossy" if self.engine.eviction else self.engine.model.guarantee

    def _take(self, step: Step) -> Piece:
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
        told = step.tokens[:-1] if by_token else step.tokens
        text += self._joiner.push(told, stopped=step.ending == "stop" and not by_token)
        self._text.append(text)
        self.tokens.extend(step.tokens)
        if self.journal is not None:
            self.journal.append(step.tokens, forced)
        self._logprobs.extend(step.logprobs or ())
        self.ending = "interrupted" if step.ending == "eos" and self.engine.goes_on else step.ending or "interrupted"
        return Piece(step.tokens, forced, text, step.logprobs)

    def _finish(self) -> str:
        try:
            if self.journal is not None:
                self.journal.close()
        finally:
            if self._trace is not None:
                self._trace.close()
        if self._joiner is None:
            return ""
        rest = self._joiner.finish()
        self._joiner = None
        self._text.append(rest)
        return rest

    def _new_joiner(self) -> ChapterText | None:
        before = [*self.run.prompt, *self.tokens] if self.swift.goes_on(self.run.options) else ()
        return ChapterText(self.swift.tokenizer, self.run.options.stop, before)

    def _report(self, result: Result) -> dict[str, Any]:
        run, engine = self.run, self.engine
        eviction = engine.eviction
        return {
            "schema": report.SCHEMA,
            "version": __version__,
            "model": self.swift.checkpoint.name,
            "dtype": self.swift.executor.dtype,
            "kv_dtype": dtype_name(self.swift.executor.kv_dtype),
            "prompt_sha256": hashlib.sha256(np.array(run.prompt, np.int32).tobytes()).hexdigest(),
            "parameters": run.parameters(),
            "seed": run.sampling.seed,
            "drafter": engine.drafter.name,
            "engine": self.swift.executor.name,
            "numerics": self.numerics,
            "guarantee": self.guarantee,
            "lossy": eviction is not None,
            "eviction": eviction.figures() if eviction else None,
            "prompt_tokens": len(run.prompt),
            "resumed_behind": self._recorded or None,
            "ending": result.ending,
            "forced": [list(span) for span in result.forced],
            **report.run_figures(engine.stats),
            **report.NO_BASELINE,
            **report.text_figures(result.chosen),
            "loops": [asdict(loop) for loop in engine.stops.loops.loops],
            "window_perplexity": None,  # it takes passes of its own: see TokenSwift.window_perplexity
            "peak_memory_bytes": report.peak_memory(self.swift.executor.device),
        }


def check_snapshot(wanted: bool, options: Options) -> None:
    lossy = wanted and options.kv_budget is not None
    check(not lossy, "kv_snapshot", wanted, "not with kv_budget: what its policy learnt is not kept")


def eviction_of(options: Options, ranks: Ranks = ALONE) -> Eviction | None:
    """Of the lossy mode, where it was asked for."""
    if options.kv_budget is None:
        return None
    name = options.kv_policy or "recent"
    policy = registry.create("tokenswift_py.kvcache.policies", "POLICY", "kv_policy", name)
    return Eviction(policy, options.kv_budget, ranks=ranks)


def find_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """Raises UserError for a device that is not there. Several ranks have a GPU each, by torchrun's LOCAL_RANK."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.world > 1:
        check(":" not in name, "device", name, f"each of {ranks.world} ranks has one of its own: cuda or cpu")
        name = f"cuda:{os.environ.get('LOCAL_RANK', ranks.rank)}" if name == "cuda" else name
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = (str(error).splitlines() or [""])[0][:200]  # some go on for a page
        check(False, "device", name, f"auto, cpu, cuda or another device that torch finds here ({why})")
    return device
