"""`tokenswift audit`: proves that plain decoding writes a recorded text, without decoding it.

The token at position p is a function of the row at p - 1 and of the tokens before p (laws 1 and 2). So one parallel
pass over the recorded tokens, in chunks, gives every row that chose a token, and the sampler is asked for its choice at
each. If all choices are the recorded ones, plain decoding writes this text token by token. The proof is by induction:
each row depends on its own ancestors only. That is law 1, which the tests carry and `sample` looks at in place. Forced
tokens are derived again by the chapter rule, and so is the ending of the text.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.step import ReplayError
from tokenswift_py.errors import UserError, check, one_line
from tokenswift_py.runs import contract, journal
from tokenswift_py.runs.journal import Record
from tokenswift_py.runs.plan import recorded_run
from tokenswift_py.runs.stream import Stream

if TYPE_CHECKING:
    from tokenswift_py.loaded import LoadedModel

LOGITS_BYTES = 32 * 2**20  # the most bytes of logits of one chunk's rows
WINDOW = 32  # how many tokens --sample decodes at each place
TIMED = 4  # at how many places, and for how many tokens at each, steps are timed to estimate plain decoding
ROUNDING = {"fp32": 2e-3, "bf16": 0.5}  # differences of logits that count as rounding between two arithmetics


@dataclass(frozen=True)
class Mismatch:
    """A token that is not the sampler's choice. index: place after the prompt. margin, slack: see `Sampler.behind`."""

    index: int
    recorded: int
    chosen: int
    margin: float
    slack: float


@dataclass
class Audit:
    """The findings of an audit.

    proof:        whether the arithmetic is the run's own and keeps law 1, so that every mismatch counts. Else the audit
                  is a cross-check, in which a slack up to `rounding` is a tie.
    checked:      tokens whose choice was checked.
    forced:       tokens derived from the chapter rule.
    faults:       other faults of the record or the files beside it.
    windows:      first tokens of the random windows that were decoded token by token too.
    decoded:      tokens decoded one by one, those of the timed places among them.
    unequal_rows: those of them whose logits are not bit for bit the chunk's.
    ar_seconds:   seconds that plain decoding of the checked tokens would take, estimated from steps at some places.
    """

    folder: str
    numerics: str
    recorded_numerics: str
    guarantee: str
    proof: bool
    rounding: float
    prompt_tokens: int
    ending: str
    checked: int = 0
    forced: int = 0
    mismatch: Mismatch | None = None
    ties: list[Mismatch] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    decoded: int = 0
    unequal_rows: int = 0
    seconds: float = 0.0
    ar_seconds: float | None = None

    @property
    def passed(self) -> bool:
        return self.mismatch is None and not self.faults and not (self.proof and self.unequal_rows)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def audit(
    loaded: LoadedModel,
    folder: str | Path,
    sample: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
    logits_processors: Sequence[Any] = (),
    kv_gates: str | None = None,
) -> Audit:
    """Checks every recorded token of a run's folder.

    sample:   number of random windows of WINDOW tokens that are decoded token by token, too.
    progress: function that gets the number of rows of each pass.
    kv_gates: where the gates of the run's memory lie now; None is where they lay.
    Raises UserError for another model, tokenizer or parameters than the recorded ones.
    """
    record = journal.read(Path(folder))
    plain: dict[str, Any] = {"drafter": "none", "draft_heads": None}  # because the drafter's files may be gone
    plain |= {} if kv_gates is None else {"kv_gates": kv_gates}
    run = recorded_run(loaded, record, logits_processors=logits_processors, **plain)
    quiet = "ignore" if run.options.on_loop == "warn" else run.options.on_loop
    stream = Stream(loaded, replace(run, options=replace(run.options, on_loop=quiet)))
    same = {**stream.header(), "parameters": run.parameters()}  # the recorded run's, not the quiet one's
    contract.check_same(record.header, same, numerics=False)
    found = Audit(
        str(folder), stream.numerics, record.header["numerics"], stream.guarantee,
        proof=stream.numerics == record.header["numerics"] and stream.loop.model.guarantee.startswith("bitwise"),
        rounding=rounding(record.header["origin"]["dtype"], loaded.executor.dtype, run.sampling.temperature),
        prompt_tokens=len(run.prompt), ending="interrupted",
    )  # fmt: skip
    try:
        stream.replay(record.tokens)
    except ReplayError as error:
        found.faults.append(f"token {error.position}: {error.reason}")
    found.ending = stream.ending
    found.faults += marks_faults(stream, record)
    began = time.perf_counter()
    Check(stream, found, sample, progress).run()
    found.seconds = time.perf_counter() - began
    if not found.faults:
        found.faults += file_faults(stream, Path(folder))
    return found


class Check:
    """The passes over the recorded tokens. Position p of the text is chosen by row p - 1."""

    def __init__(self, stream: Stream, found: Audit, sample: int, progress: Callable[[int], None]):
        self.loop, self.found, self.progress = stream.loop, found, progress
        self.prompt = len(stream.run.prompt)
        self.total = self.prompt + len(stream.tokens)
        self.chosen = np.ones(self.total, np.bool_)
        self.chosen[: self.prompt] = False
        for start, stop in stream.forced:
            self.chosen[self.prompt + start : self.prompt + stop] = False
        found.forced = int((~self.chosen).sum()) - self.prompt
        self.tokens = self.loop.history.tokens[: self.total].copy()
        self.seen = History()
        vocab_bytes = 4 * stream.loaded.checkpoint.spec.vocab_size
        self.most = max(1, min(self.loop.prefill_chunk, LOGITS_BYTES // vocab_bytes))
        self.step_ms: list[list[float]] = []
        self.windows = self.places(sample)

    def places(self, sample: int) -> dict[int, int]:
        """Chooses the windows that are decoded one by one: first row of each -> its number of tokens."""
        first, last = self.prompt - 1, self.total - 1
        starts = range(first, last, WINDOW)
        chosen = sorted(random.SystemRandom().sample(starts, min(sample, len(starts))))
        self.found.windows = [start + 1 - self.prompt for start in chosen]
        timed = starts[:: max(1, len(starts) // TIMED)]
        return {**dict.fromkeys(timed, TIMED), **dict.fromkeys(chosen, WINDOW)}

    def run(self) -> None:
        if self.total == self.prompt:
            return
        cache = self.loop.cache
        try:
            while cache.length < self.total - 1 and self.found.mismatch is None:
                at = cache.length
                later = [start for start in self.windows if start > at]
                count = min(self.most, self.loop.room, min([self.total - 1, *later]) - at)
                if at in self.windows:
                    self.decode(min(count, self.windows[at]))
                else:
                    self.check(at, self.rows(count), commit=count)
                self.progress(cache.length - at)
        finally:
            cache.release()
        if self.step_ms:
            step = np.mean([np.median(times) for times in self.step_ms])
            self.found.ar_seconds = float(step) * self.found.checked / 1e3

    def rows(self, count: int) -> torch.Tensor:
        """Computes the next `count` rows, provisionally. Returns logits [n, vocab_size] of those that chose a token."""
        at = self.loop.cache.length
        wanted = np.flatnonzero(self.chosen[at + 1 : at + 1 + count]).tolist()
        self.output = self.loop.ask(self.loop.chunk(count), wanted, seen=False).compute()
        return self.output.logits

    def check(self, at: int, logits: torch.Tensor, commit: int) -> None:
        """Commits `commit` rows from position `at` on, and compares the choices of their logits with the record."""
        self.loop.commit_chunk(commit, self.output)
        for row, position in zip(logits, at + 1 + np.flatnonzero(self.chosen[at + 1 : at + 1 + commit]), strict=True):
            self.seen.extend(self.tokens[len(self.seen) : position].tolist())
            self.found.checked += 1
            recorded = int(self.tokens[position])
            choice, margin, slack = self.loop.sampler.judge(row, self.seen, recorded)
            if choice != recorded:
                self.differ(Mismatch(int(position) - self.prompt, recorded, choice, margin, slack))
            if self.found.mismatch is not None:
                return

    def differ(self, mismatch: Mismatch) -> None:
        if not self.found.proof and mismatch.slack <= self.found.rounding:
            self.found.ties.append(mismatch)
        else:
            self.found.mismatch = mismatch

    def decode(self, count: int) -> None:
        """Decodes the next tokens one by one like plain decoding, and compares bits with the rows computed together."""
        at, times = self.loop.cache.length, []
        together = iter(self.rows(count))
        self.loop.cache.drop_tail()
        for place in range(at, at + count):
            began = time.perf_counter()
            alone = self.rows(1)
            self.check(place, alone, commit=1)
            times.append(1e3 * (time.perf_counter() - began))
            if len(alone):
                self.found.decoded += 1
                self.found.unequal_rows += not bool((alone[0] == next(together)).all())
            if self.found.mismatch is not None:
                break
        self.step_ms.append(times)


def rounding(recorded: str, audited: str, temperature: float) -> float:
    """Returns the difference of scores that counts as rounding between weights of two types."""
    return max(ROUNDING.get(dtype, max(ROUNDING.values())) for dtype in (recorded, audited)) / (temperature or 1.0)


def marks_faults(stream: Stream, record: Record) -> list[str]:
    """Reports the first token whose mark in the record, forced or not, is not the chapter rule's."""
    forced = np.zeros(len(stream.tokens), np.bool_)
    for start, stop in stream.forced:
        forced[start:stop] = True
    wrong = np.flatnonzero(forced != np.array(record.forced[: len(forced)], np.bool_))
    return [f"token {i}: it is{'' if forced[i] else ' not'} forced by the chapter rule" for i in wrong[:1]]


def file_faults(stream: Stream, folder: Path) -> list[str]:
    """Reports which of tokens.npy and text.txt, if they exist, differ from the journal.

    A file that says more than the journal is unproven there: after a kill, text.txt may be ahead of the synced tokens.
    """
    resume = "; `tokenswift resume` writes it again" if stream.ending == "interrupted" else ""
    faults = []
    for name, differs in (("tokens.npy", tokens_differ), ("text.txt", text_differs)):
        if not (folder / name).exists():
            continue
        try:
            with one_line(f"{name} cannot be read"):
                wrong = differs(stream, folder / name)
        except UserError as error:
            wrong = str(error)
        faults += [wrong + resume] if wrong else []
    return faults


def tokens_differ(stream: Stream, path: Path) -> str:
    kept = np.load(path, allow_pickle=False)
    check(kept.ndim == 1 and kept.dtype == np.int32, path.name, (kept.shape, str(kept.dtype)), "a row of int32")
    tokens = kept.tolist()
    pairs = zip(tokens, stream.tokens, strict=False)
    wrong = next((i for i, (kept_one, recorded) in enumerate(pairs) if kept_one != recorded), None)
    if wrong is not None:
        return f"{path.name} differs from the journal at token {wrong}"
    same = len(tokens) == len(stream.tokens)
    return "" if same else f"{path.name} has {len(tokens)} tokens, the journal {len(stream.tokens)}"


def text_differs(stream: Stream, path: Path) -> str:
    same = path.read_bytes() == stream.result().text.encode()
    return "" if same else f"{path.name} is not the text of the recorded tokens"


def verdict(found: Audit, decode: Callable[[int], str]) -> str:
    """Returns the audit's findings as lines for people."""
    lines = [
        f"audit of {found.folder}: {found.checked} choices checked, {found.forced} forced tokens derived again, "
        f"after a prompt of {found.prompt_tokens}; ended by: {found.ending}",
    ]
    if found.numerics == found.recorded_numerics:
        lines.append(f"numerics {found.numerics} ({found.guarantee})")
    else:
        lines.append(f"cross-check: numerics {found.numerics}, recorded under {found.recorded_numerics}")
    lines += [f"FAULT: {fault}" for fault in found.faults]
    if (worst := found.mismatch) is not None:
        lines.append(
            f"MISMATCH at token {worst.index}: recorded is {worst.recorded} {decode(worst.recorded)!r}, chosen "
            f"{worst.chosen} {decode(worst.chosen)!r} by a margin of {worst.margin:.4g} (slack {worst.slack:.4g})"
        )
    if found.ties:
        margin, slack = max(tie.margin for tie in found.ties), max(tie.slack for tie in found.ties)
        lines.append(
            f"{len(found.ties)} choices differ within rounding ({found.rounding:.3g}): largest slack {slack:.3g}, "
            f"largest margin {margin:.3g}, the first at token {found.ties[0].index}"
        )
    if found.decoded:
        bits = f"{found.unequal_rows} with other bits" if found.unequal_rows else "with the same bits"
        lines.append(f"{found.decoded} tokens were decoded one by one too ({len(found.windows)} windows), {bits}")
    if found.ar_seconds is not None:
        lines.append(
            f"{found.seconds:.1f} s; plain decoding would take about {found.ar_seconds:.1f} s "
            f"(from single steps at several places)"
        )
    return "\n".join([*lines, conclusion(found)])


def conclusion(found: Audit) -> str:
    if not found.passed:
        return "FAILED: not all of this is what plain decoding writes with these parameters"
    if not found.proof:
        return "CONSISTENT, measured: this arithmetic finds nothing that rounding does not explain; it proves nothing"
    lossy = ", evicting the same pages (lossy)" if found.guarantee == "lossy" else ""
    return f"PROVEN: every token is the one that plain decoding{lossy} writes there, given law 1 (a row is a row)"


def strict(value: Any) -> Any:
    """Returns a value as JSON has it, which knows no infinity: the margin of a banned token is null."""
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
