"""How many tokens a second are written when many texts travel together, and when they follow one another?

    python experiments/serving.py --texts 1,2,4,8,16 --lengths 512,4096,16384

Each text goes on from a place of its own in a real prefix that was read before. Every way of writing them is run in
turn, several times, and the fastest run of each counts. All ways must write the same tokens: company changes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np

from results import Results, Row, add_flags, start
from tokenswift_py import TokenSwift
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.decoding.loop import SEEN_ROWS, DecodeLoop
from tokenswift_py.decoding.statistics import distinct_n, find_loop, memory_bandwidth
from tokenswift_py.decoding.step import Step
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.options import Options
from tokenswift_py.runs.assembly import decode_loop
from tokenswift_py.runs.plan import prepare
from tokenswift_py.serving.company import Company
from tokenswift_py.serving.scheduler import Scheduler
from tokenswift_py.serving.sharing import OwnTime
from tokenswift_py.serving.work import LoopWork
from workloads import continuation

APART = 192  # tokens from the place of one text to that of the next
WAYS = (
    ("plain", "none", False),
    ("auto", "auto", False),
    ("plain together", "none", True),
    ("auto together", "auto", True),
)


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
        self.tokens = continuation("docs", swift.tokenizer, length).tokens
        self.cuts = [length - APART * (i % (length // (2 * APART))) for i in range(count)]
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

    def write(self, drafter: str, together: bool) -> tuple[float, list[Writing]]:
        """Returns the seconds until all texts are there, the rest of their prompts included."""
        writings = self.writings(drafter)
        groups = [writings] if together else [[writing] for writing in writings]
        began = perf_counter()
        for group in groups:
            scheduler = Scheduler(self.company.target, self.company.pool, perf_counter, self.count)
            for writing in group:
                scheduler.add(writing)
            while scheduler.step():
                pass
            scheduler.close()
        return perf_counter() - began, writings


def rows(swift: TokenSwift, args: argparse.Namespace, count: int, length: int) -> list[Row]:
    texts, seconds, written = Texts(swift, args, count, length), {name: [] for name, *_ in WAYS}, {}  # type: ignore[var-annotated]
    for _ in range(args.repeats):
        for name, drafter, together in WAYS:
            took, writings = texts.write(drafter, together)
            seconds[name].append(took)
            written[name] = writings
    tokens = count * args.new
    plain = [writing.tokens_written for writing in written["plain"]]
    found = []
    for name, _, together in WAYS:
        rate = tokens / min(seconds[name])
        stats = [writing.loop.stats for writing in written[name]]
        base = name.removesuffix(" together")
        found.append(
            {
                "way": name,
                "tokens_per_s": round(rate, 1),
                "over_one_by_one": round(min(seconds[base]) / min(seconds[name]), 3) if together else 1.0,
                "over_plain_here": round(min(seconds["plain" + name[len(base) :]]) / min(seconds[name]), 3),
                "identical": [writing.tokens_written for writing in written[name]] == plain,
                "tokens_a_pass": round(
                    sum(s.step_tokens for s in stats) / max(1, sum(s.num_spec_steps for s in stats)), 2
                ),
                "distinct_4": round(float(np.mean([distinct_n(text, 4) for text in plain])), 3),
                "looping": any(find_loop(text) is not None for text in plain),
                "bandwidth_gb_s": round(memory_bandwidth(threads=args.threads) / 1e9, 1),
            }
        )
    return found


def plot(figure: Any, found: Sequence[Row]) -> None:
    """Draws tokens a second against the number of texts, a panel for each length."""
    lengths = list(dict.fromkeys(row["length"] for row in found))
    for panel, length in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
        for name, *_ in WAYS:
            here = [row for row in found if (row["length"], row["way"]) == (length, name)]
            panel.plot([row["texts"] for row in here], [row["tokens_per_s"] for row in here], "o-", label=name)
        panel.set_title(f"behind {length} tokens")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("texts")
        panel.set_ylabel("tokens a second, all texts")
        panel.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", default="1,2,4,8,16", metavar="LIST")
    parser.add_argument(
        "--lengths", default="512,4096,16384", metavar="LIST", help="tokens that stand before each text"
    )
    parser.add_argument("--new", type=int, default=96, help="tokens of each text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--min-p", type=float, default=0.05)
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=None)
    add_flags(parser)
    args = parser.parse_args()
    results = Results(
        "serving",
        "How many tokens a second are many texts written at together, over one after the other?",
        args,
        guarantees={"tokens": "bitwise: each text is what it is alone", "seconds": "measured"},
        axes=("texts", "lengths"),
    )
    named = {} if args.model is None else {"model": args.model}
    swift = TokenSwift.from_pretrained(**named, dtype=args.dtype, threads=args.threads)
    for length, count in product(map(int, args.lengths.split(",")), map(int, args.texts.split(","))):
        results.cell(
            {"length": length, "texts": count}, lambda count=count, length=length: rows(swift, args, count, length)
        )
    results.save(plot)


if __name__ == "__main__":
    start(main)
