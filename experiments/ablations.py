"""Measures the worth of each part of drafting: one thing is varied at a time, the rest is fixed.

    python experiments/ablations.py --groups budget,policy --lengths 4096,16384 --new 256

Every variant and plain decoding write the same text in alternating slices (`speedup.race`), going on from a real
prefix. Where the variants write different texts (temperature, sampler, penalty), each races plain decoding of its own.
The groups have the form of TokenSwift's Tables 5 to 16 (arXiv 2502.18890).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, product
from typing import Any

from results import Results, Row, add_flags, start
from speedup import Contender, Prefix, race
from tokenswift_py import TokenSwift
from tokenswift_py.decoding.loop import SEEN_ROWS, DecodeLoop
from tokenswift_py.drafters.base import Drafter
from tokenswift_py.drafters.ngram import NGram
from tokenswift_py.drafters.partial import Partial
from tokenswift_py.errors import check
from tokenswift_py.options import Options
from tokenswift_py.runs.plan import prepare
from workloads import continuation


@dataclass(frozen=True)
class Variant:
    """A setting to compare. drafting, sampling: fields of Options. make: makes the drafter if no option can."""

    name: str
    drafting: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], Drafter] | None = None


PARTIAL: dict[str, Any] = {"drafter": "partial", "draft_budget": 1024, "draft_tokens": 4}


def partial(**changes: Any) -> dict[str, Any]:
    return {**PARTIAL, **changes}


def tree(chain: int, width: int) -> Variant:
    """Returns a variant that drafts `chain` guesses in a row, each with runners-up beside it."""
    return Variant(
        f"{chain} deep, {width} wide", partial(draft_tokens=chain * width),
        make=lambda: Partial(view_tokens=PARTIAL["draft_budget"], width=width),
    )  # fmt: skip


def ngram(shortest: int) -> Variant:
    return Variant(f"{shortest} tokens", {"drafter": "ngram", "draft_tokens": 8}, make=lambda: NGram(shortest))


GROUPS: dict[str, list[Variant]] = {
    "view budget": [Variant(str(n), partial(draft_budget=n)) for n in (256, 512, 1024, 2048, 4096)],
    "view policy": [
        Variant(name, partial(draft_policy=name)) for name in ("mass", "recent", "quest", "importance", "snapkv", "h2o")
    ],
    "draft weights": [Variant(kind, partial(draft_weights=kind)) for kind in ("bf16", "int8")],
    "draft keys and values": [Variant(kind, partial(draft_kv=kind)) for kind in ("own", "int8")],
    "draft vocabulary": [
        Variant(f"{weights}, {tokens}", partial(draft_weights=weights, draft_vocabulary=tokens))
        for weights in ("int8", "int4")
        for tokens in ("all", "auto", 4096, 16384)
    ],
    "tree": [tree(*shape) for shape in ((2, 1), (4, 1), (8, 1), (4, 2), (4, 3), (8, 2))],
    "n-gram match": [ngram(shortest) for shortest in (1, 2, 3, 4, 6)],
    "n-gram nodes": [Variant(str(n), {"drafter": "ngram", "draft_tokens": n}) for n in (2, 4, 8, 16, 32)],
    "heads nodes": [Variant(str(n), {"drafter": "heads", "draft_tokens": n}) for n in (1, 3, 8, 16, 39)],
    "heads in cascade": [Variant("without", {}), Variant("with", {"draft_heads": "auto"})],
    "drafter": [Variant(name, {"drafter": name}) for name in ("ngram", "partial", "heads", "cascade")],
    "temperature": [Variant(f"{t:g}", sampling={"temperature": t}) for t in (0.0, 0.4, 0.8, 1.0, 1.2)],
    "sampler": [
        Variant("temperature only", sampling={"min_p": 0.0}),
        Variant("min-p 0.05"),
        Variant("min-p 0.1", sampling={"min_p": 0.1}),
        Variant("top-p 0.9", sampling={"min_p": 0.0, "top_p": 0.9}),
        Variant("top-k 50", sampling={"min_p": 0.0, "top_k": 50}),
    ],
    "penalty": [
        Variant("none"),
        *(Variant(f"1.05 over {n}", sampling={"penalty": 1.05, "penalty_window": n}) for n in (64, 256, 1024)),
        Variant("1.2 over 1024", sampling={"penalty": 1.2, "penalty_window": 1024}),
        Variant("DRY 0.8", sampling={"dry_multiplier": 0.8}),
    ],
}


@dataclass
class Varied(Contender):
    """A contender whose drafter the variant makes."""

    make: Callable[[], Drafter] | None = None

    def made(self, loop: DecodeLoop) -> DecodeLoop:
        if self.make is not None:
            loop.drafter = self.make()
        return loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--texts", default="docs,code")
    parser.add_argument("--lengths", default="4096,16384")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--slice", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--min-p", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    add_flags(parser)
    args = parser.parse_args()
    groups = args.groups.split(",")
    for group in groups:
        check(group in GROUPS, "groups", group, f"known are {', '.join(GROUPS)}")
    results = Results(
        "ablations",
        "What is each part of drafting worth?",
        args,
        guarantees={
            "tokens": "bitwise on the native engine, measured on torch; compared with plain decoding's, one by one",
            "speedup, milliseconds": "measured in alternating slices",
        },
        axes=("groups", "texts", "lengths"),
    )
    swift = TokenSwift.from_pretrained(args.model, dtype=args.dtype, threads=args.threads)
    for text, length in product(args.texts.split(","), map(int, args.lengths.split(","))):
        before = Before(swift, args, text, length)
        for group in groups:
            key = {"group": group, "text": text, "length": length}
            results.cell(key, lambda group=group, before=before: ablate(args, before, group))  # type: ignore[misc]
    results.save(plot)


@dataclass(frozen=True)
class Before:
    """The text before the new tokens, which is read when it is first needed."""

    swift: TokenSwift
    args: argparse.Namespace
    text: str
    length: int

    @cached_property
    def prefix(self) -> Prefix:
        tokens = continuation(self.text, self.swift.tokenizer, self.length).tokens
        most = max(map(len, GROUPS.values()))
        prefix = Prefix(self.swift, tokens, self.length + self.args.new, 1 + most, self.args.new)
        prefix.read(self.length - SEEN_ROWS)
        return prefix


def ablate(args: argparse.Namespace, before: Before, group: str) -> Iterator[Row]:
    """Yields a row for each variant."""
    swift, prefix = before.swift, before.prefix
    for sampling, together in groupby(GROUPS[group], key=lambda variant: variant.sampling):
        variants = list(together)
        options = Options.of(
            **{
                "raw": True, "max_new_tokens": args.new, "context": before.length + args.new, "seed": args.seed,
                "temperature": args.temperature, "min_p": args.min_p, "on_loop": "ignore", "ignore_eos": True,
                **sampling,
            }
        )  # fmt: skip
        runners = [Contender("ar", {"drafter": "none"})]
        runners += [Varied(variant.name, variant.drafting, make=variant.make) for variant in variants]
        found = race(swift, args, prepare(swift, prefix.tokens, options), prefix, runners)
        common = {name: value for name, value in found.items() if name != "drafters"}
        for variant in variants:
            yield {"variant": variant.name, **found["drafters"][variant.name], **common}


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws a panel for each group: speed-up by variant, a line for each length, mean over the texts."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    columns = min(3, len(groups))
    figure.set_size_inches(4 * columns, 3 * math.ceil(len(groups) / columns))
    panels = figure.subplots(math.ceil(len(groups) / columns), columns, squeeze=False, sharey=True).flatten()
    for panel, group in zip(panels, groups, strict=False):
        here = [row for row in rows if row["group"] == group]
        names = list(dict.fromkeys(row["variant"] for row in here))
        for length in dict.fromkeys(row["length"] for row in here):
            means = []
            for name in names:
                found = [row["speedup"] for row in here if (row["variant"], row["length"]) == (name, length)]
                means.append(sum(found) / len(found))
            panel.plot(range(len(names)), means, "o-", label=f"{length}")
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
        panel.set_title(group, fontsize=9)
        panel.set_ylabel("speed-up")
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    panels[0].legend(title="tokens before", fontsize=7)


if __name__ == "__main__":
    start(main)
