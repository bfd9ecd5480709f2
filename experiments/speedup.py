"""How much faster does drafting write a text than plain decoding, at several lengths of the text before it?

    python experiments/speedup.py --workloads code,docs --lengths 2048,16384 --drafters auto --new 256

There are three kinds of workload. `code` and `docs` go on from a real prefix (TokenSwift's protocol). `story`,
`manual` and `records` are free runs: `auto` writes them up to the length, and the race begins there. `random` goes on
from random tokens at a temperature at which nothing can be guessed. It shows what drafting costs where it cannot pay.

Plain decoding and every drafter write the *same* text in alternating slices, so that a burst on a busy machine hits all
of them. Their tokens are compared one by one. A text is read once, and all contenders share its pages.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from results import Results, Row, add_flags, start
from tokenswift_py import TokenSwift
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.decoding.loop import SEEN_ROWS, DecodeLoop
from tokenswift_py.decoding.statistics import distinct_n, find_loop, memory_bandwidth
from tokenswift_py.errors import check
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import AUTO, rope_tables
from tokenswift_py.options import Options
from tokenswift_py.runs import snapshot
from tokenswift_py.runs.assembly import decode_loop
from tokenswift_py.runs.plan import Run, prepare
from tokenswift_py.runs.report import Trace, rounded
from workloads import CONTINUATIONS, WORKLOADS, continuation, free_run

RANDOM: dict[str, Any] = {"temperature": 3.0, "min_p": 0.0}  # of `random`: nearly any token may come
CUT = 1024  # the number of tokens from one cut of a text to the next


@dataclass
class Contender:
    """One way of writing the text. settings: fields of Options. tokens: the model's choices after `written`."""

    name: str
    settings: dict[str, Any]
    loop: DecodeLoop | None = None
    steps: Iterator[Any] | None = None
    tokens: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=lambda: [0.0])  # milliseconds of decoding until token i
    ended: bool = False

    def start(
        self, swift: TokenSwift, run: Run, cache: KVCache, trace: str | None, written: Sequence[int] = ()
    ) -> None:
        options = replace(run.options, **self.settings)
        self.loop = self.made(decode_loop(swift, replace(run, options=options), Trace(trace) if trace else None, cache))
        replayed = list(self.loop.replay(run.prompt, written))
        self.steps = self.loop.run(run.prompt, replayed[-1] if replayed else None)
        self.tokens += next(self.steps).tokens

    def made(self, loop: DecodeLoop) -> DecodeLoop:
        """Returns the loop. A subclass changes it where no setting can."""
        return loop

    def write(self, tokens: int) -> None:
        """Goes on until there are `tokens` tokens, or the text ends."""
        assert self.steps is not None
        while len(self.tokens) < tokens and not self.ended:
            clock = perf_counter()
            step = next(self.steps, None)
            ms = 1e3 * (perf_counter() - clock)
            if step is None:
                self.ended = True
                break
            self.tokens += step.tokens
            self.at += [self.at[-1]] * (len(step.tokens) - 1) + [self.at[-1] + ms]


def contenders(names: str) -> list[Contender]:
    """Parses contenders like auto, ngram, partial:1024:4 (fixed sizes of view and chain), partial:1024:4:recent and
    auto:::mass:int4:all (policy, weights and vocabulary of drafts)."""
    found = [Contender("ar", {"drafter": "none"})]
    for name in filter(None, names.split(",")):
        drafter, *more = name.split(":")
        settings: dict[str, Any] = {"drafter": drafter}
        if more and more[0]:
            settings["draft_budget"] = int(more[0])
        if len(more) > 1 and more[1]:
            settings["draft_tokens"] = int(more[1])
        if len(more) > 2 and more[2]:
            settings["draft_policy"] = more[2]
        if len(more) > 3 and more[3]:
            settings["draft_weights"] = more[3]
        if len(more) > 4:
            settings["draft_vocabulary"] = int(more[4]) if more[4].isdigit() else more[4]
        found.append(Contender(name, settings))
    return found


class Prefix:
    """A text that is read once. Forks of its cache begin after the tokens read so far.

    kept: folder that keeps the keys and values of its pages for the next time, 23 KB a token of the default model.
    """

    written: Sequence[int] = ()

    def __init__(
        self,
        swift: TokenSwift,
        tokens: list[int],
        context: int,
        forks: int,
        new: int,
        kept: Path | None = None,
        positions: Positions = AUTO,
    ):
        self.tokens, self.rope, self.kept = tokens, rope_tables(swift.checkpoint.config, context, positions), kept
        self.model: Any = swift.executor.model(self.rope)
        pool = self.model.new_pool(pages_for(context) + forks * (pages_for(new) + 12))
        self.cache = KVCache(pool, context)

    def read(self, length: int) -> None:
        tokens = np.array(self.tokens, np.int32)
        if self.kept is not None and not self.cache.length:
            self.kept.mkdir(parents=True, exist_ok=True)
            snapshot.load(self.kept, self.cache, tokens, self.model.numerics, length, lambda rows: None)
        while (missing := length - self.cache.length) > 0:
            chunk = self.tokens[self.cache.length :][: min(512, missing)]
            self.model.forward([Segment(DraftTree.chain(chunk), self.cache, causal=True)], [])
            self.cache.commit(range(len(chunk)))
        if self.kept is not None:
            snapshot.save(self.kept, self.cache, tokens, self.model.numerics)


class Written:
    """A free run, written by `auto` as far as it is asked for.

    written: the tokens after the prompt so far, forced ones included.
    """

    def __init__(self, swift: TokenSwift, name: str, most: int, args: argparse.Namespace):
        workload = free_run(name)
        self._stream = swift.stream(
            workload.prompt, chapters=workload.chapters, max_new_tokens=most, seed=args.seed, on_loop="ignore",
            **workload.settings,
        )  # fmt: skip
        self._pieces = iter(self._stream)
        self.run, self.cache = self._stream.run, self._stream.loop.cache

    @property
    def written(self) -> list[int]:
        return self._stream.tokens

    def read(self, length: int) -> None:
        while self.cache.length < length:
            if next(self._pieces, None) is None:
                raise SystemExit(f"speedup.py: the run ended after {self.cache.length} tokens, before {length}")

    def close(self) -> None:
        self._stream.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16", help="of the weights")
    parser.add_argument("--kv-dtype", help="of keys and values (default: bf16)")
    parser.add_argument("--workloads", default="code,docs", help=", ".join((*CONTINUATIONS, *WORKLOADS, "random")))
    parser.add_argument("--lengths", default="2048,16384", help="tokens before those that are raced")
    parser.add_argument("--cuts", type=int, default=1, help=f"places in the text, {CUT} tokens apart")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--slice", type=int, default=32)
    parser.add_argument("--drafters", default="auto", help="auto, ngram, partial:1024:4 (view, chain), eagle:1024, ...")
    parser.add_argument(
        "--seen",
        type=int,
        default=SEEN_ROWS,
        help="rows before the race that each reads itself, as eagle's window needs",
    )
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--min-p", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kept", type=Path, metavar="DIR", help="keep the KV of prefixes there, gigabytes of it")
    parser.add_argument("--name", default="speedup", help="of the files in results/")
    parser.add_argument("--trace", metavar="PREFIX", help="of a file for each text and drafter, a line a round")
    add_flags(parser)
    args = parser.parse_args()
    names = args.workloads.split(",")
    for name in names:
        known = (*CONTINUATIONS, *WORKLOADS, "random")
        check(name in known, "workloads", name, f"known are {', '.join(known)}")
    results = Results(
        args.name,
        f"How much faster is drafting than plain decoding on {', '.join(names)}, by what stands before it?",
        args,
        guarantees={
            "tokens": "bitwise on the native engine, measured on torch; compared with plain decoding's, one by one",
            "speedup, milliseconds": "measured in alternating slices of one text",
        },
        axes=("workloads", "lengths", "kept", "name"),
    )
    swift = TokenSwift.from_pretrained(args.model, dtype=args.dtype, kv_dtype=args.kv_dtype, threads=args.threads)
    for name, length in product(names, map(int, args.lengths.split(","))):
        text = Text(swift, args, name, length, len(contenders(args.drafters)))
        for cut in range(length, text.last + 1, CUT):
            results.cell({"workload": name, "length": cut}, lambda text=text, cut=cut: rows(text, cut))  # type: ignore[misc]
        text.close()
    summary(results.rows)
    results.save(plot)


@dataclass
class Text:
    """A workload from one length on, read or written when a cell first needs it. forks: number of forks at a time."""

    swift: TokenSwift
    args: argparse.Namespace
    name: str
    length: int
    forks: int

    @property
    def last(self) -> int:
        return self.length + (self.args.cuts - 1) * CUT

    @cached_property
    def source(self) -> Prefix | Written:
        swift, args = self.swift, self.args
        if self.name in WORKLOADS:
            return Written(swift, self.name, self.last + 2 * args.new, args)
        if self.name == "random":
            vocab = swift.checkpoint.spec.vocab_size
            tokens = list(map(int, np.random.default_rng(args.seed).integers(0, vocab, self.last)))
        else:
            tokens = continuation(self.name, swift.tokenizer, self.last).tokens
        kept = args.kept and args.kept / f"{self.name}-{self.length}"
        return Prefix(swift, tokens, self.last + args.new, self.forks, args.new + args.seen, kept)

    def run(self, cut: int) -> Run:
        if isinstance(self.source, Written):
            return self.source.run
        args, sampling = self.args, {"temperature": self.args.temperature, "min_p": self.args.min_p}
        options = Options.of(
            **{
                "raw": True, "max_new_tokens": args.new, "context": self.last + args.new, "seed": args.seed,
                "on_loop": "ignore", "ignore_eos": True, **(RANDOM if self.name == "random" else sampling),
            }
        )  # fmt: skip
        return prepare(self.swift, self.source.tokens[:cut], options)

    def close(self) -> None:
        if isinstance(self.__dict__.get("source"), Written):
            self.source.close()  # type: ignore[union-attr]


def rows(text: Text, cut: int) -> Iterator[Row]:
    """Yields a row for each drafter."""
    text.source.read(cut - (0 if text.source.written else max(SEEN_ROWS, min(text.args.seen, cut - 1))))
    trace = f"{text.args.trace}-{text.name}" if text.args.trace else ""
    found = race(text.swift, text.args, text.run(cut), text.source, contenders(text.args.drafters), trace)
    common = {name: value for name, value in found.items() if name != "drafters"}
    for drafter, drafted in found["drafters"].items():
        yield {"drafter": drafter, **drafted, **common}


def race(
    swift: TokenSwift, args: argparse.Namespace, run: Run, source: Any, runners: list[Contender], trace: str = ""
) -> dict[str, Any]:
    """Lets the runners write the same text in alternating slices, and returns their figures.

    trace: beginning of the names of their traces. Without it there are none.
    """
    bandwidth = memory_bandwidth(threads=args.threads)
    written = list(source.written)
    for runner in runners:
        file = f"{trace}-{len(run.prompt)}-{runner.name}.jsonl" if trace else None
        more = (written,) if written else ()
        runner.start(swift, run, source.cache.fork(), file, *more)
    for end in range(args.slice, args.new + args.slice, args.slice):
        for runner in runners:
            runner.write(min(end, args.new))
    for runner in runners:
        assert runner.loop is not None
        runner.loop.cache.release()
    plain = runners[0]
    tokens = plain.tokens[: args.new]
    ar_ms = plain.at[-1] / (len(plain.at) - 1)
    reads = swift.step_bytes(source.cache.length + len(tokens) / 2)
    return {
        "distinct_4": round(distinct_n(tokens, 4), 3),
        "looping": find_loop(tokens) is not None,
        **readability(swift, tokens),
        "ar_ms": round(ar_ms, 3),
        "ar_share": round(1e3 * reads / bandwidth / ar_ms, 3),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "drafters": {runner.name: figures(runner, plain, args.slice) for runner in runners[1:]},
    }


def readability(swift: TokenSwift, tokens: Sequence[int]) -> Row:
    """Lets the model read the text alone. Returns medians over windows. Below 1 000 tokens there is one window."""
    read = swift.window_perplexity(tokens).summary()
    return {"window_perplexity": read["median"], "bits_per_byte": read["bits_per_byte_median"]}


def figures(runner: Contender, plain: Contender, width: int) -> dict[str, Any]:
    """Returns a runner's figures. `speedup` is over all tokens, `second_half` over the later half of them, and
    `median_slice` is the median of the slices."""
    assert runner.loop is not None
    stats = runner.loop.stats
    count = min(len(runner.at), len(plain.at)) - 1

    def ratio(first: int, last: int) -> float:
        return (plain.at[last] - plain.at[first]) / max(runner.at[last] - runner.at[first], 1e-9)

    total, passes = stats.decode_ms, stats.num_spec_steps
    slices = [ratio(first, min(first + width, count)) for first in range(0, count, width)]
    return {
        "speedup": round(ratio(0, count), 3),
        "second_half": round(ratio(count // 2, count), 3),
        "median_slice": round(statistics.median(slices), 3),
        "tokens_per_s": round(1e3 * count / runner.at[count], 1),
        "identical": runner.tokens[:count] == plain.tokens[:count],
        "tokens_a_pass": round(stats.step_tokens / passes, 2),
        "drafted_a_pass": round(stats.num_draft_tokens / passes, 2),
        "acceptance": rounded(stats.num_accepted_draft_tokens / max(1, stats.num_draft_tokens)),
        "draft_share": round(stats.phase_ms["draft"] / total, 3),
        "verify_share": round(stats.phase_ms["verify"] / total, 3),
        "verify_ms": round(stats.phase_ms["verify"] / passes, 2),
        "draft_ms": round(stats.phase_ms["draft"] / passes, 2),
        "other_ms": round(sum(stats.phase_ms[p] for p in ("accept", "commit", "learn")) / passes, 2),
    }


def counts(row: Row) -> bool:
    """Returns whether a text may stand for a speed-up. One that repeats itself flatters every drafter."""
    return not row["looping"] and row["distinct_4"] >= VARIED


VARIED = 0.4  # the least distinct-4 of a text that counts


def summary(found: list[Row]) -> None:
    """Prints means by drafter and length, of texts that count, and how near auto comes to the best fixed setting."""
    buckets: dict[int, list[Row]] = {}
    for row in found:
        buckets.setdefault(row["length"] // 4096 * 4096, []).append(row)
    for bucket, here in sorted(buckets.items()):
        means: dict[str, float] = {}
        for drafter in dict.fromkeys(row["drafter"] for row in here):
            ups = [row["speedup"] for row in here if row["drafter"] == drafter and counts(row)]
            if ups:
                means[drafter] = statistics.mean(ups)
                print(f"from {bucket:>6} on {drafter:>20} {means[drafter]:.3f}x, {len(ups)} texts that count")
        fixed = {name: mean for name, mean in means.items() if ":" in name}
        if fixed and "auto" in means:
            best = max(fixed, key=lambda name: fixed[name])
            print(f"from {bucket:>6} on auto is at {means['auto'] / fixed[best]:.3f} of the best fixed setting, {best}")


def plot(figure: Any, found: list[Row]) -> None:
    """Draws speed-up against length, a line for each drafter and workload. Texts that do not count are hollow."""
    panel = figure.subplots()
    for drafter, workload in dict.fromkeys((row["drafter"], row["workload"]) for row in found):
        here = sorted(
            (row for row in found if (row["drafter"], row["workload"]) == (drafter, workload)),
            key=lambda row: row["length"],
        )
        (line,) = panel.plot([row["length"] for row in here], [row["speedup"] for row in here], "-", linewidth=0.8)
        for row in here:
            fill = line.get_color() if counts(row) else "none"
            panel.plot(row["length"], row["speedup"], "o", color=line.get_color(), markerfacecolor=fill)
        line.set_label(f"{workload}, {drafter}")
    panel.axhline(1, color="gray", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("tokens before (hollow: the text repeats itself)")
    panel.set_ylabel("speed-up over plain decoding")
    panel.legend(fontsize=7)


if __name__ == "__main__":
    start(main)
