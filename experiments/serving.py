"""How many tokens a second are written when many texts travel together, and when they follow one another?

    python experiments/serving.py --texts 1,2,4,8,16 --lengths 512,4096
    python experiments/serving.py --dtype bf16,gguf --peers llamacpp --first-token

Each text goes on from a place of its own in a real prefix that was read before. Every way of writing them is run in
turn, several times. All ways must write the same tokens: company changes nothing. tokens_per_s is that of the fastest
run, over the whole time until all texts are there. Drafted texts have speeds of their own, so few are left at the end
of such a run, which a server with a queue never sees. tokens_per_s_full is the median of the runs, over the time while
all texts are being written: from when all prompts are read until the first text ends. The spreads are those of the
runs.

--peers llamacpp has llama.cpp write as many texts with a slot for each. --first-token measures how long a short
request waits beside long texts, with priority and without.
"""

from __future__ import annotations

import argparse
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
from tokenswift_py.decoding.statistics import GenerationStats, distinct_n, find_loop, memory_bandwidth
from tokenswift_py.decoding.step import Step
from tokenswift_py.errors import check, need_extra
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
    """The runs of one way. seconds: until all texts are there. full: tokens a second while all are being written."""

    seconds: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)

    def add(self, groups: Sequence[Marks], new: int) -> None:
        """Takes in a run: the marks of texts that were written together, group after group."""
        self.seconds.append(sum(marks[-1][0] - marks[0][0] for marks in groups))
        tokens, seconds = map(sum, zip(*(while_full(marks, new) for marks in groups), strict=True))
        if seconds:
            self.full.append(tokens / seconds)

    def row(self, tokens: int) -> Row:
        return {
            "tokens_per_s": round(tokens / min(self.seconds), 1),
            "spread": round(max(self.seconds) / min(self.seconds) - 1, 3),
            "tokens_per_s_full": round(median(self.full), 1) if self.full else None,
            "spread_full": round(max(self.full) / min(self.full) - 1, 3) if self.full else None,
        }

    def over(self, base: Speed) -> tuple[float, float | None]:
        """Returns how many times as fast this is as `base`, over the whole time and while all texts are in work."""
        full = round(median(self.full) / median(base.full), 3) if self.full and base.full else None
        return round(min(base.seconds) / min(self.seconds), 3), full


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


class Texts:
    """Several texts that go on from cuts of one prefix, which is read once."""

    def __init__(self, swift: TokenSwift, args: argparse.Namespace, count: int, length: int):
        self.args, self.count = args, count
        context = length + args.new + 64
        self.company = Company(swift, context, kv_tokens=count * (length + args.new + 2048), most_running=count)
        # All runs share one, as in a server. It keeps pages of the prefix, and learns what passes cost.
        self.scheduler = Scheduler(self.company.target, self.company.pool, perf_counter, count)
        self.tokens = continuation("docs", swift.tokenizer, length).tokens
        self.cuts = cuts(count, length)
        prefix = KVCache(self.company.pool, context)
        self.forks: dict[int, KVCache] = {}
        for cut in sorted(set(self.cuts)):
            while (missing := cut - SEEN_ROWS - prefix.length) > 0:
                chunk = self.tokens[prefix.length :][: min(512, missing)]
                self.company.target.forward([Segment(DraftTree.chain(chunk), prefix, causal=True)], [])
                prefix.commit(range(len(chunk)))
            self.forks[cut] = prefix.fork()

    def writings(self, drafter: str) -> list[Writing]:
        options = Options.of(
            **{
                "raw": True, "max_new_tokens": self.args.new, "context": self.company.context, "on_loop": "ignore",
                "ignore_eos": True, "temperature": self.args.temperature, "min_p": self.args.min_p, "drafter": drafter,
            }
        )  # fmt: skip
        found = []
        for i, cut in enumerate(self.cuts):
            run = prepare(self.company, self.tokens[:cut], replace(options, seed=i), in_pool=True)
            own = OwnTime(perf_counter)
            loop = decode_loop(self.company, run, cache=self.forks[cut].fork(), timer=own)
            found.append(Writing(loop, run.prompt, own))
        return found

    def write(self, drafter: str, together: bool) -> tuple[list[Marks], list[Writing]]:
        """Writes all texts, the rest of their prompts included. Returns the marks of each group that was together."""
        writings = self.writings(drafter)
        groups = [writings] if together else [[writing] for writing in writings]
        found = []
        for group in groups:
            marks = [(perf_counter(), [0] * len(group))]
            for writing in group:
                self.scheduler.add(writing)
            more = True
            while more:
                more = self.scheduler.step()
                marks.append((perf_counter(), [len(writing.tokens_written) for writing in group]))
            self.scheduler.prefixes.make_room(self.company.pool.pages)
            found.append(marks)
        return found, writings


def ours(swift: TokenSwift, args: argparse.Namespace, count: int, length: int) -> list[Row]:
    texts, speeds = Texts(swift, args, count, length), {name: Speed() for name, *_ in WAYS}
    stats: dict[str, list[GenerationStats]] = {}
    written: dict[str, list[list[list[int]]]] = {name: [] for name in speeds}  # way -> run -> text -> tokens
    for _ in range(args.repeats):
        for name, drafter, together in WAYS:
            groups, writings = texts.write(drafter, together)
            speeds[name].add(groups, args.new)
            written[name].append([writing.tokens_written for writing in writings])
            stats[name] = [writing.loop.stats for writing in writings]
    plain, bandwidth = written["plain"][0], memory_bandwidth(threads=args.threads)
    found = []
    for name, *_ in WAYS:
        base = name.removesuffix(" together")
        one_by_one, one_by_one_full = speeds[name].over(speeds[base])
        plain_here, plain_here_full = speeds[name].over(speeds["plain" + name[len(base) :]])
        passes = sum(each.num_spec_steps for each in stats[name])
        found.append(
            {
                "way": name,
                **speeds[name].row(count * args.new),
                "over_one_by_one": one_by_one,
                "over_one_by_one_full": one_by_one_full,
                "over_plain_here": plain_here,
                "over_plain_here_full": plain_here_full,
                "identical": all(run == plain for run in written[name]),
                "tokens_a_pass": round(sum(each.step_tokens for each in stats[name]) / max(1, passes), 2),
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
