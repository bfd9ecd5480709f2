"""How much faster drafting writes a text than plain decoding, at several lengths of what stands before it.

    python experiments/speedup.py --texts code,docs --lengths 2048,16384 --drafters auto --new 256

Continuation, TokenSwift's protocol: a real prefix (Python's own sources and documentation), then new tokens. Plain
decoding and every drafter write the *same* text in alternating slices, so that a burst on a busy machine hits all of
them; their tokens are compared one by one. A prefix is read once, its pages are shared by all contenders.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenswift_py import TokenSwift
from tokenswift_py.api import Run
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.engine import SEEN_ROWS, Engine
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.options import Options
from tokenswift_py.report import Trace, rounded
from tokenswift_py.rope import rope_tables
from tokenswift_py.stats import distinct_n, find_loop, memory_bandwidth


@dataclass
class Contender:
    """One way of writing the text. settings: of Options; tokens: all that it wrote."""

    name: str
    settings: dict[str, Any]
    engine: Engine | None = None
    steps: Iterator[Any] | None = None
    tokens: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=lambda: [0.0])  # milliseconds of decoding when token i was there
    ended: bool = False

    def start(self, swift: TokenSwift, run: Run, cache: KVCache, trace: str | None) -> None:
        options = replace(run.options, **self.settings)
        self.engine = swift.engine(replace(run, options=options), Trace(trace) if trace else None, cache)
        self.steps = self.engine.run(run.prompt)
        self.tokens += next(self.steps).tokens

    def write(self, tokens: int) -> None:
        """Go on until there are so many tokens, or the text ends."""
        assert self.steps is not None
        while len(self.tokens) < tokens and not self.ended:
            clock = time.perf_counter()
            step = next(self.steps, None)
            ms = 1e3 * (time.perf_counter() - clock)
            if step is None:
                self.ended = True
                break
            self.tokens += step.tokens
            self.at += [self.at[-1]] * (len(step.tokens) - 1) + [self.at[-1] + ms]


def contenders(names: str) -> list[Contender]:
    """auto, ngram, ... or partial:1024:4, a view and a chain of fixed sizes, and partial:1024:4:recent."""
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
        if len(more) > 3:
            settings["draft_weights"] = more[3]
        found.append(Contender(name, settings))
    return found


def prefix(text: str, swift: TokenSwift, tokens: int) -> list[int]:
    if text == "random":  # nothing to find in it: what drafting costs where it cannot pay
        return list(map(int, np.random.default_rng(0).integers(0, swift.checkpoint.spec.vocab_size, tokens)))
    if text == "docs":
        import pydoc_data.topics as topics

        source = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    else:
        folder = Path(json.__file__).parent.parent
        source = ""
        for path in sorted(folder.glob("*.py")):
            source += path.read_text("utf-8", "replace")
            if len(source) > 6 * tokens:
                break
    return list(swift.tokenizer(source[: 6 * tokens], add_special_tokens=False).input_ids[:tokens])


class Prefix:
    """A text that is read once; forks of its cache begin at any of the tokens read so far."""

    def __init__(self, swift: TokenSwift, tokens: list[int], context: int, forks: int, new: int):
        self.tokens, self.rope = tokens, rope_tables(swift.checkpoint.config, context)
        self.model: Any = swift.executor.model(self.rope)
        pool = self.model.new_pool(pages_for(context) + forks * (pages_for(new) + 12))
        self.cache = KVCache(pool, context)

    def read(self, length: int) -> None:
        while (missing := length - self.cache.length) > 0:
            chunk = self.tokens[self.cache.length :][: min(512, missing)]
            self.model.forward([Segment(DraftTree.chain(chunk), self.cache, causal=True)], [])
            self.cache.commit(range(len(chunk)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--texts", default="code,docs")
    parser.add_argument("--lengths", default="2048,16384")
    parser.add_argument("--cuts", type=int, default=1)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--slice", type=int, default=32)
    parser.add_argument("--drafters", default="auto")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--min-p", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trace")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    swift = TokenSwift.from_pretrained(args.model, dtype=args.dtype, threads=args.threads)
    results = []
    for text in args.texts.split(","):
        for length in (int(part) for part in args.lengths.split(",")):
            for result in continuation(swift, args, text, length):
                print(json.dumps(result), flush=True)
                results.append(result)
    summary(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def continuation(swift: TokenSwift, args: argparse.Namespace, text: str, length: int) -> Iterator[dict[str, Any]]:
    last = length + (args.cuts - 1) * 1024
    tokens = prefix(text, swift, last)
    context = last + args.new
    source = Prefix(swift, tokens, context, len(contenders(args.drafters)), args.new)
    for cut in range(length, last + 1, 1024):
        started = time.perf_counter()
        source.read(cut - SEEN_ROWS)
        seconds = time.perf_counter() - started
        options = Options.of(
            raw=True, max_new_tokens=args.new, context=context, temperature=args.temperature, min_p=args.min_p,
            seed=args.seed, on_loop="ignore", ignore_eos=True,
        )  # fmt: skip
        run = swift.prepare(tokens[:cut], options)
        result = race(swift, args, run, source, contenders(args.drafters))
        yield {"text": text, "length": cut, "prefill_s": round(seconds, 2), **result}


def race(
    swift: TokenSwift, args: argparse.Namespace, run: Run, source: Prefix, runners: list[Contender]
) -> dict[str, Any]:
    bandwidth = memory_bandwidth(threads=args.threads)
    for runner in runners:
        trace = f"{args.trace}-{len(run.prompt)}-{runner.name}.jsonl" if args.trace else None
        runner.start(swift, run, source.cache.fork(), trace)
    for end in range(args.slice, args.new + args.slice, args.slice):
        for runner in runners:
            runner.write(min(end, args.new))
    for runner in runners:
        assert runner.engine is not None
        runner.engine.cache.release()
    plain = runners[0]
    tokens = plain.tokens[: args.new]
    loop = find_loop(tokens)
    ar_ms = plain.at[-1] / (len(plain.at) - 1)
    reads = swift.step_bytes(len(run.prompt) + len(tokens) / 2)
    return {
        "distinct_4": round(distinct_n(tokens, 4), 3),
        "looping": loop is not None,
        "ar_ms": round(ar_ms, 3),
        "ar_share": round(1e3 * reads / bandwidth / ar_ms, 3),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "drafters": {runner.name: figures(runner, plain) for runner in runners[1:]},
    }


def figures(runner: Contender, plain: Contender) -> dict[str, Any]:
    assert runner.engine is not None
    stats = runner.engine.stats
    total = stats.decode_ms
    count = min(len(runner.at), len(plain.at))
    half = count // 2
    late = (plain.at[count - 1] - plain.at[half]) / (runner.at[count - 1] - runner.at[half])
    return {
        "speedup": round(plain.at[count - 1] / runner.at[count - 1], 3),
        "second_half": round(late, 3),
        "identical": runner.tokens[:count] == plain.tokens[:count],
        "tokens_a_pass": round(stats.step_tokens / stats.num_spec_steps, 2),
        "drafted_a_pass": round(stats.num_draft_tokens / stats.num_spec_steps, 2),
        "acceptance": rounded(stats.num_accepted_draft_tokens / max(1, stats.num_draft_tokens)),
        "draft_share": round(stats.phase_ms["draft"] / total, 3),
        "verify_share": round(stats.phase_ms["verify"] / total, 3),
        "verify_ms": round(stats.phase_ms["verify"] / stats.num_spec_steps, 2),
        "draft_ms": round(stats.phase_ms["draft"] / stats.num_spec_steps, 2),
        "other_ms": round(sum(stats.phase_ms[p] for p in ("accept", "commit", "learn")) / stats.num_spec_steps, 2),
    }


def summary(results: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for result in results for name in result["drafters"]))
    lengths = sorted({result["length"] // 4096 for result in results})
    for name in names:
        for bucket in lengths:
            rows = [r for r in results if r["length"] // 4096 == bucket]
            ups = [r["drafters"][name]["speedup"] for r in rows]
            late = [r["drafters"][name]["second_half"] for r in rows]
            print(
                f"{name:>24} {rows[0]['length']:>7} {statistics.mean(ups):.3f} late {statistics.mean(late):.3f}"
                f" same {all(r['drafters'][name]['identical'] for r in rows)} {ups}"
            )


if __name__ == "__main__":
    main()
