"""How many tokens a second are written when many texts travel together, and when they follow one another?

    python experiments/serving.py --texts 1,2,4,8,16 --lengths 512,4096
    python experiments/serving.py --dtype bf16,gguf --peers llamacpp --first-token

Each text goes on from a place of its own in a real prefix that was read before. All ways of writing them take turns of
--slice tokens a text, so that a burst on a busy machine hits all of them, and each has a clock that stands still
meanwhile. All ways must write the same tokens: company changes nothing. tokens_per_s is that of the fastest run, over
the whole time until all texts are there. Drafted texts have speeds of their own, so few are left at the end of such a
run, which a server with a queue never sees. tokens_per_s_full is the median of the runs, over the time while all texts
are being written: from when all prompts are read until the first text ends. The spreads are those of the runs. What one
way is over another is the median of their ratios, run by run.

--peers llamacpp has llama.cpp write as many texts with a slot for each. --first-token measures how long a short
request waits beside long texts, with priority and without.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from first_token import LONG_TEXTS, first_token
from results import Results, Row, add_flags, start
from slots import NO_DRAFTS, Slots
from tokenswift_py import TokenSwift
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.decoding.loop import SEEN_ROWS, DecodeLoop
from tokenswift_py.decoding.statistics import distinct_n, find_loop, memory_bandwidth
from tokenswift_py.decoding.step import Step
from tokenswift_py.errors import check, need_extra
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.models.devices import available_threads
from tokenswift_py.options import Options
from tokenswift_py.runs.assembly import decode_loop
from tokenswift_py.runs.plan import prepare
from tokenswift_py.serving.company import Company
from tokenswift_py.serving.scheduler import Scheduler
from tokenswift_py.serving.sharing import OwnTime
from tokenswift_py.serving.work import LoopWork
from workloads import continuation

APART = 192  # the number of tokens from the place of one text to that of the next
WAYS = (
    ("plain", "none", False),
    ("auto", "auto", False),
    ("plain together", "none", True),
    ("auto together", "auto", True),
)

Marks = list[tuple[float, list[int]]]  # times in seconds, and how many tokens each text had then


@dataclass
class Speed:
    """The runs of one way. seconds: until all texts are there. full: tokens a second while all are being written, NaN
    where they never all were."""

    seconds: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)

    def add(self, groups: Sequence[Marks], new: int) -> None:
        """Takes in a run: the marks of texts that were written together, group after group."""
        self.seconds.append(sum(marks[-1][0] - marks[0][0] for marks in groups))
        tokens, seconds = map(sum, zip(*(while_full(marks, new) for marks in groups), strict=True))
        self.full.append(tokens / seconds if seconds else math.nan)

    def row(self, tokens: int) -> Row:
        return {
            "tokens_per_s": round(tokens / min(self.seconds), 1),
            "spread": round(max(self.seconds) / min(self.seconds) - 1, 3),
            "tokens_per_s_full": rounded(self.full, 1),
            "spread_full": round(max(self.full) / min(self.full) - 1, 3) if finite(self.full) else None,
        }

    def over(self, base: Speed) -> tuple[float, float | None]:
        """Returns how many times as fast this is as `base`, over the whole time and while all texts are in work."""
        full = [own / other for own, other in zip(self.full, base.full, strict=True)]
        whole = [other / own for own, other in zip(self.seconds, base.seconds, strict=True)]
        return round(median(whole), 3), rounded(full, 3)


def finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def rounded(values: Sequence[float], digits: int) -> float | None:
    """Returns the median, None where a run has no such figure."""
    return round(median(values), digits) if finite(values) else None


def while_full(marks: Marks, new: int) -> tuple[int, float]:
    """Returns the tokens and the seconds from the first mark at which every text has one to the first at which a text
    is whole, with `new` tokens; zeros where a text ends before another begins."""
    began, before = next(mark for mark in marks if min(mark[1]) > 0)
    ended, behind = next(mark for mark in marks if max(mark[1]) >= new)
    return (sum(behind) - sum(before), ended - began) if ended > began else (0, 0.0)


class Writing(LoopWork):
    """One text as the scheduler sees it."""

    def __init__(self, loop: DecodeLoop, prompt: list[int], time: OwnTime):
        super().__init__(loop, prompt, time)
        self.tokens_written: list[int] = []

    def tell(self, step: Step) -> None:
        self.tokens_written += step.tokens

    def end(self, error: BaseException | None) -> None:
        assert error is None, error


class TurnClock:
    """A clock that stands still while other ways have their turns."""

    def __init__(self) -> None:
        self._lost, self._left = 0.0, perf_counter()

    def __call__(self) -> float:
        return perf_counter() - self._lost

    def resume(self) -> None:
        self._lost += perf_counter() - self._left

    def suspend(self) -> None:
        self._left = perf_counter()


class Way:
    """One way of writing the texts. Its company and scheduler are the same in all runs, as in a server: they keep pages
    of the prefix, and learn what passes cost.

    runs: what each run wrote. writings: those of the latest run.
    """

    def __init__(self, texts: Texts, drafter: str, together: bool):
        self.texts, self.drafter, self.together = texts, drafter, together
        self.clock, self.speed = TurnClock(), Speed()
        self.company = Company(texts.swift, texts.context, texts.kv_tokens)
        self.forks = texts.forks(self.company)
        self.scheduler = Scheduler(self.company.target, self.company.pool, self.clock, texts.count)
        self.runs: list[list[list[int]]] = []
        self.writings: list[Writing] = []

    def steps(self) -> Iterator[int]:
        """Writes all texts once, the rest of their prompts included. Yields how many tokens there are after each
        step."""
        self.writings = writings = list(self.begin())
        groups = [writings] if self.together else [[writing] for writing in writings]
        marked = []
        for group in groups:
            marks = [(self.clock(), [0] * len(group))]
            for writing in group:
                self.scheduler.add(writing)
            more = True
            while more:
                more = self.scheduler.step()
                marks.append((self.clock(), [len(writing.tokens_written) for writing in group]))
                yield sum(len(writing.tokens_written) for writing in writings)
            marked.append(marks)
        self.scheduler.prefixes.make_room(self.company.pool.pages)
        self.speed.add(marked, self.texts.args.new)
        self.runs.append([writing.tokens_written for writing in writings])

    def begin(self) -> Iterator[Writing]:
        args = self.texts.args
        options = Options.of(
            **{
                "raw": True, "max_new_tokens": args.new, "context": self.company.context, "on_loop": "ignore",
                "ignore_eos": True, "temperature": args.temperature, "min_p": args.min_p, "drafter": self.drafter,
            }
        )  # fmt: skip
        for i, cut in enumerate(self.texts.cuts):
            run = prepare(self.company, self.texts.tokens[:cut], replace(options, seed=i), in_pool=True)
            own = OwnTime(self.clock)
            yield Writing(decode_loop(self.company, run, cache=self.forks[cut].fork(), timer=own), run.prompt, own)


class Texts:
    """Several texts that go on from cuts of one prefix, which is read once."""

    def __init__(self, swift: TokenSwift, args: argparse.Namespace, count: int, length: int):
        self.swift, self.args, self.count = swift, args, count
        self.context = length + args.new + 64
        self.kv_tokens = self.context + count * (APART + args.new + 2048)
        self.tokens = continuation("docs", swift.tokenizer, length).tokens
        self.cuts = cuts(count, length)
        self._pages: np.ndarray | None = None

    def forks(self, company: Company) -> dict[int, KVCache]:
        """Returns a cache in a company's pool for each cut, filled but for the rows that a text reads by itself. The
        first company reads the prefix, and the others take over its pages."""
        prefix = KVCache(company.pool, self.context)
        if self._pages is not None:
            prefix.adopt(self._pages)
        found = {}
        for cut in sorted(set(self.cuts)):
            while (missing := cut - SEEN_ROWS - prefix.length) > 0:
                chunk = self.tokens[prefix.length :][: min(512, missing)]
                company.target.forward([Segment(DraftTree.chain(chunk), prefix, causal=True)], [])
                prefix.commit(range(len(chunk)))
            found[cut] = prefix.fork()
        if self._pages is None:
            common = prefix.pages[: (min(self.cuts) - SEEN_ROWS) // PAGE_SIZE]
            self._pages = np.stack([company.pool.dump(int(page)) for page in common])
        return found


def in_turns(ways: Sequence[Way], tokens: int) -> None:
    """Lets each way write all texts once, all of them in turns of so many tokens."""
    left = [(way, way.steps()) for way in ways]
    due = 0
    while left:
        due += tokens
        left = [(way, steps) for way, steps in left if written_until(way, steps, due)]


def written_until(way: Way, steps: Iterator[int], due: int) -> bool:
    """Lets a way write until it has so many tokens. Returns whether any are left."""
    way.clock.resume()
    more = any(written >= due for written in steps)
    way.clock.suspend()
    return more


def ours(swift: TokenSwift, args: argparse.Namespace, count: int, length: int) -> list[Row]:
    texts = Texts(swift, args, count, length)
    ways = {name: Way(texts, drafter, together) for name, drafter, together in WAYS}
    for _ in range(args.repeats):
        in_turns(list(ways.values()), args.slice * count)
    plain, bandwidth = ways["plain"].runs[0], memory_bandwidth(threads=args.threads)
    found = []
    for name, way in ways.items():
        base = name.removesuffix(" together")
        one_by_one, one_by_one_full = way.speed.over(ways[base].speed)
        plain_here, plain_here_full = way.speed.over(ways["plain" + name[len(base) :]].speed)
        stats = [writing.loop.stats for writing in way.writings]
        passes = sum(each.num_spec_steps for each in stats)
        found.append(
            {
                "way": name,
                **way.speed.row(count * args.new),
                "over_one_by_one": one_by_one,
                "over_one_by_one_full": one_by_one_full,
                "over_plain_here": plain_here,
                "over_plain_here_full": plain_here_full,
                "identical": all(run == plain for run in way.runs),
                "tokens_a_pass": round(sum(each.step_tokens for each in stats) / max(1, passes), 2),
                **looks(plain),
                "bandwidth_gb_s": round(bandwidth / 1e9, 1),
                "note": None,
            }
        )
    return found


def looks(texts: Sequence[Sequence[int]]) -> Row:
    return {
        "distinct_4": round(float(np.mean([distinct_n(text, 4) for text in texts])), 3),
        "looping": any(find_loop(text) is not None for text in texts),
    }


def llama_cpp(args: argparse.Namespace, count: int, length: int) -> Iterator[Row]:
    """Yields a row for each way of llama.cpp, with the columns of ours."""
    nothing = dict.fromkeys(
        ("way", *Speed([1.0]).row(0), "over_one_by_one", "over_one_by_one_full", "over_plain_here",
         "over_plain_here_full", "identical", "tokens_a_pass", "distinct_4", "looping", "bandwidth_gb_s", "note")
    )  # fmt: skip
    checkpoint = open_checkpoint(args.model, None, "gguf")
    path, *_ = checkpoint.weight_files
    tokens, bandwidth = (
        continuation("docs", checkpoint.tokenizer(), length).tokens,
        memory_bandwidth(threads=args.threads),
    )
    for unified in (True, False):
        speed, texts = Speed(), list[list[int]]()
        slots = Slots(
            path, tokens, cuts(count, length), SEEN_ROWS, args.new, unified=unified,
            sampling=(args.temperature, args.min_p), threads=args.threads or available_threads(),
        )  # fmt: skip
        with closing(slots):
            for _ in range(args.repeats):
                marks, texts = slots.write()
                speed.add([marks], args.new)
        yield {
            **nothing,
            "way": f"plain in slots, {'one KV for all' if unified else 'a KV for each'}",
            **speed.row(count * args.new),
            "tokens_a_pass": 1.0,
            **looks(texts),
            "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        }
    yield {**nothing, "way": "prompt lookup in slots", "note": NO_DRAFTS}


def cuts(count: int, length: int) -> list[int]:
    """Returns how many tokens stand before each text."""
    return [length - APART * (i % (length // (2 * APART))) for i in range(count)]


def plot(figure: Any, found: Sequence[Row]) -> None:
    """Draws tokens a second while all texts are being written against their number, a panel for each length."""
    found = [row for row in found if row.get("tokens_per_s_full")]
    lengths = list(dict.fromkeys(row["length"] for row in found))
    if not lengths:
        return
    for panel, length in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
        lines: dict[str, list[Row]] = {}
        for row in found:
            if row["length"] == length:
                lines.setdefault(f"{row['engine']}, {row['weights']}, {row['way']}", []).append(row)
        for label, here in lines.items():
            panel.plot([row["texts"] for row in here], [row["tokens_per_s_full"] for row in here], "o-", label=label)
        panel.set_title(f"after {length} tokens")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("texts")
        panel.set_ylabel("tokens a second, all texts")
        panel.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", default="1,2,4,8,16", metavar="LIST", help="numbers of texts; empty leaves them out")
    parser.add_argument("--lengths", default="512,4096", metavar="LIST", help="tokens that stand before each text")
    parser.add_argument("--new", type=int, default=128, help="tokens of each text")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each way")
    parser.add_argument("--slice", type=int, default=8, help="tokens of each text in a way's turn")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--min-p", type=float, default=0.05)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16", metavar="LIST", help="types of our weights")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--peers", default="", metavar="LIST", help="llamacpp")
    parser.add_argument("--first-token", action="store_true", help="with the first of --dtype")
    parser.add_argument("--requests", type=int, default=30, help="short requests of --first-token")
    add_flags(parser)
    args = parser.parse_args()
    peers = [name for name in args.peers.split(",") if name]
    for name in peers:
        check(name == "llamacpp", "peers", name, "known is llamacpp")
    if peers:
        need_extra("extra", "peers", "llama_cpp")
    lengths, counts = ([int(one) for one in value.split(",") if one] for value in (args.lengths, args.texts))
    for length in lengths:
        check(length >= 2 * APART, "lengths", length, f"at least {2 * APART}")
    results = Results(
        "serving",
        "How many tokens a second are many texts written at together, over one after the other?",
        args,
        guarantees={
            "ours": "bitwise: each text is what it is alone, and so is each answer to a request",
            "llama.cpp's texts": "its own draws: not compared",
            "seconds": "measured",
        },
        axes=("texts", "lengths", "dtype", "peers", "first_token", "requests"),
    )
    swifts: dict[str, TokenSwift] = {}

    def swift(dtype: str) -> TokenSwift:
        if dtype not in swifts:
            swifts[dtype] = TokenSwift.from_pretrained(args.model, dtype=dtype, threads=args.threads)
        return swifts[dtype]

    dtypes = args.dtype.split(",")
    for length, count in product(lengths, counts):
        place = {"length": length, "texts": count}
        for dtype in dtypes:
            key = {"engine": "ours", "weights": dtype, **place}
            results.cell(key, lambda dtype=dtype, place=place: ours(swift(dtype), args, *reversed(place.values())))
        if peers:
            key = {"engine": f"llama.cpp {metadata.version('llama-cpp-python')}", "weights": "gguf", **place}
            results.cell(key, lambda place=place: llama_cpp(args, *reversed(place.values())))
    if args.first_token:
        for most_running, priority in product((LONG_TEXTS, 2 * LONG_TEXTS), (1, 0)):
            asked = {"most_running": most_running, "priority": priority}
            key = {"engine": "ours", "weights": dtypes[0], "requests": args.requests, "beside": LONG_TEXTS, **asked}
            results.cell(key, lambda asked=asked: first_token(swift(dtypes[0]), args, **asked))
    results.save(plot)


if __name__ == "__main__":
    start(main)
