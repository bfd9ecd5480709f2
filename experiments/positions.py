"""How well does the model read at each position, by the scheme that meets positions beyond the trained ones?

    python experiments/positions.py --texts code,docs,prose --spots 2048,7168,9216,16384,32768,65536,98304

The model reads real text by teacher forcing. Figures are the nats per token of the SPAN tokens from each spot on, with
the whole text before them in the cache. The schemes are:
  trained, linear, ntk, yarn   the values of --positions
  self-extend[:W[:B]], log-extend[:W[:B]]   the same with this window and block
  truncated                    the same tokens in trained positions. Only the latest tokens are before them, as many as
                               the trained length minus 1 024. A long context must at least match this.

    python experiments/positions.py --passkeys 4096,7168,16384,32768

Nine sentences stand at depths of 10 to 90 % of a text of prose. Each gives somebody's pass key, which has five digits.
Each key is asked for at the end, on a fork of the cache, and answered greedily. `found` is how many of the nine answers
are right, and `nats` is per token of the right answers.

    python experiments/positions.py --costs 16384,65536

This measures the milliseconds of a pass of one row over the same cache, with and without queries moved, in turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from results import Results, Row, add_flags, start
from speedup import Prefix
from tokenswift_py import TokenSwift
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.models.positions import EXTENSIONS, SCHEMES, Positions
from tokenswift_py.models.rope import rope_tables, trained_length
from tokenswift_py.quality import teacher_forced
from tokenswift_py.runs.report import rounded
from workloads import CONTINUATIONS, continuation

SPAN = 512  # how many tokens are scored at a spot
MARGIN = 1024  # how many positions of the trained length a truncated reading leaves free
WHOLE = 1024  # contexts are rounded up to a multiple of this, so that close ones share their tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--texts", default=",".join(CONTINUATIONS))
    parser.add_argument("--spots", default="2048,7168,9216,11264,16384")
    parser.add_argument("--schemes", default="truncated,trained,linear,ntk,yarn,self-extend,log-extend")
    parser.add_argument("--context", type=int, default=0, help="N of the tables (default: what the last spot needs)")
    parser.add_argument("--passkeys", default="", help="lengths of texts that hide pass keys, instead of spots")
    parser.add_argument("--costs", default="", help="lengths to time a pass of one row at, instead of spots")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kept", type=Path, metavar="DIR", help="keep the KV of texts there, to go on with")
    parser.add_argument("--name", default="positions", help="of the files in results/")
    add_flags(parser)
    args = parser.parse_args()
    for text in args.texts.split(","):
        check(text in CONTINUATIONS, "texts", text, f"known are {', '.join(CONTINUATIONS)}")
    schemes = args.schemes.split(",")
    for scheme in schemes:
        parsed(scheme)
    results = Results(
        args.name,
        "How well does the model read at each position, by the scheme that meets positions beyond the trained ones?",
        args,
        guarantees={
            "nats": f"exact, of {SPAN} tokens of one text each",
            "found": "exact, of nine pass keys in one text",
            "milliseconds": "measured, medians of interleaved passes",
        },
        axes=("texts", "spots", "schemes", "passkeys", "costs", "kept"),
    )
    swift = TokenSwift.from_pretrained(args.model, dtype=args.dtype, threads=args.threads)
    if args.costs:
        for length, scheme in ((n, s) for n in numbers(args.costs) for s in schemes if parsed(s)[0] in EXTENSIONS):
            results.cell({"length": length, "scheme": scheme}, lambda n=length, s=scheme: cost(swift, args, s, n))  # type: ignore[misc]
    elif args.passkeys:
        for length, scheme in ((n, s) for n in numbers(args.passkeys) for s in schemes):
            results.cell(
                {"length": length, "scheme": scheme},
                lambda n=length, s=scheme: passkeys(swift, args, s, n),  # type: ignore[misc]
            )
    else:
        for text in args.texts.split(","):
            for scheme in schemes:
                read_at_spots(swift, args, results, text, scheme)
    results.save(None if args.costs or args.passkeys else plot)


def numbers(value: str) -> list[int]:
    return [int(n) for n in value.split(",")]


def parsed(scheme: str) -> tuple[str, Positions]:
    """Parses a scheme's name, and its window and block where they are given."""
    name, *sizes = scheme.split(":")
    known = (*SCHEMES[1:], "truncated")
    check(name in known, "schemes", scheme, f"one of {', '.join(known)}")
    window, block = (int(size) for size in (*sizes, 0, 0)[:2])
    return name, Positions("trained" if name == "truncated" else name, window or None, block or None)


def prefix_of(
    swift: TokenSwift, args: argparse.Namespace, name: str, tokens: list[int], scheme: str, context: int, forks: int = 0
) -> Prefix:
    """Makes a text to be read under a scheme. `forks` forks of its cache can go on for a page each."""
    kept = args.kept and args.kept / f"{name}-{scheme.replace(':', '-')}"
    return Prefix(swift, tokens, -(-context // WHOLE) * WHOLE, forks, PAGE_SIZE, kept, parsed(scheme)[1])


def judged(model: Any, cache: KVCache, tokens: Sequence[int], scored: int) -> tuple[float, bool]:
    """Returns the nats of the last `scored` tokens, and whether each of them is the likeliest in its place.

    The cache holds a beginning of the tokens.
    """
    total, right = 0.0, True
    for logits, after in teacher_forced(model, cache, tokens, scored):
        total += float(torch.nn.functional.cross_entropy(logits.double(), after, reduction="sum"))
        right &= bool((logits.argmax(-1) == after).all())
    return total, right


def read_at_spots(swift: TokenSwift, args: argparse.Namespace, results: Results, text: str, scheme: str) -> None:
    """Measures a cell for each spot. The text is read on from one spot to the next."""
    spots = sorted(numbers(args.spots))
    context = args.context or spots[-1] + SPAN
    tokens = continuation(text, swift.tokenizer, spots[-1] + SPAN).tokens
    trained = trained_length(swift.checkpoint.config)
    whole: list[Prefix] = []

    def measured(spot: int) -> Row:
        text_before = tokens
        if parsed(scheme)[0] == "truncated":
            before = max(0, spot - (trained - MARGIN))
            text_before, spot = tokens[before:], spot - before
            prefix = prefix_of(swift, args, f"{text}-{before}", text_before, scheme, trained)
        else:
            if not whole:
                whole.append(prefix_of(swift, args, text, tokens, scheme, context))
            (prefix,) = whole
        prefix.read(spot - 1)
        nats, _ = judged(prefix.model, prefix.cache, text_before[: spot + SPAN], SPAN)
        return {"nats": rounded(nats / SPAN), "label": prefix.rope.label}

    for spot in spots:
        key = {"text": text, "scheme": scheme, "context": context, "position": spot}
        results.cell(key, lambda spot=spot: measured(spot))  # type: ignore[misc]


TOLD = "\n\nThe pass key of {person} is {key}. Remember it: {person}'s pass key is {key}.\n\n"
ASKED = "\n\nWhat is the pass key of {person}? The pass key of {person} is"
PEOPLE = ("Adam", "Bella", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene")


def hidden_passkeys(ids: Any, length: int) -> tuple[list[int], dict[str, list[int]], dict[str, list[int]]]:
    """Returns a text of prose that tells nine pass keys, the question for each, and each answer, all as tokens.

    ids: the tokenizer. length: tokens of the text, the longest question and an answer.
    """
    drawn = random.Random(length)
    keys = {person: f"{drawn.randrange(10_000, 100_000)}" for person in PEOPLE}

    def encoded(text: str) -> list[int]:
        return list(ids(text, add_special_tokens=False).input_ids)

    filler = continuation("prose", ids, length).tokens
    told = {person: encoded(TOLD.format(person=person, key=key)) for person, key in keys.items()}
    asked = {person: encoded(ASKED.format(person=person)) for person in PEOPLE}
    answers = {person: encoded(f" {key}") for person, key in keys.items()}
    room = length - sum(map(len, told.values())) - max(len(asked[p]) + len(answers[p]) for p in PEOPLE)
    tokens: list[int] = []
    for i, person in enumerate(PEOPLE):
        tokens += filler[i * room // 10 : (i + 1) * room // 10] + told[person]
    return tokens + filler[9 * room // 10 : room], asked, answers


def passkeys(swift: TokenSwift, args: argparse.Namespace, scheme: str, length: int) -> Row:
    tokens, asked, answers = hidden_passkeys(swift.tokenizer, length)
    trained = trained_length(swift.checkpoint.config)
    if parsed(scheme)[0] == "truncated":
        tokens = tokens[-(trained - MARGIN) :]
    prefix = prefix_of(swift, args, f"passkeys-{length}", tokens, scheme, length, forks=1)
    prefix.read(len(tokens))
    found, nats, count = [], 0.0, 0
    for person in PEOPLE:
        fork, text = prefix.cache.fork(), [*tokens, *asked[person], *answers[person]]
        loss, right = judged(prefix.model, fork, text, len(answers[person]))
        fork.release()
        found.append(right)
        nats, count = nats + loss, count + len(answers[person])
    places = "".join("x" if right else "." for right in found)
    return {"found": sum(found), "by_depth": places, "nats": rounded(nats / count)}


def cost(swift: TokenSwift, args: argparse.Namespace, scheme: str, length: int, rounds: int = 60) -> Row:
    tokens = continuation("docs", swift.tokenizer, length + 2).tokens
    prefix = prefix_of(swift, args, "docs", tokens, scheme, length + 2)
    prefix.read(length)
    plain = swift.executor.model(rope_tables(swift.checkpoint.config, prefix.rope.context, Positions("trained")))
    times: dict[str, list[float]] = {"moved": [], "plain": []}
    for _ in range(rounds):
        for name, model in (("moved", prefix.model), ("plain", plain)):
            began = time.perf_counter()
            model.forward([Segment(DraftTree.chain([tokens[length]]), prefix.cache)])
            times[name].append(1e3 * (time.perf_counter() - began))
            prefix.cache.drop_tail()
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    ratios = statistics.median(a / b for a, b in zip(times["moved"], times["plain"], strict=True))
    return {"moved_ms": rounded(medians["moved"]), "plain_ms": rounded(medians["plain"]), "ratio": rounded(ratios)}


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws a panel for each text: nats against the position."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for panel, text in zip(panels, texts, strict=True):
        for scheme in dict.fromkeys(row["scheme"] for row in rows):
            here = [row for row in rows if (row["text"], row["scheme"]) == (text, scheme)]
            style = "k--" if scheme == "truncated" else "o-"
            at, nats = ([row[name] for row in here] for name in ("position", "nats"))
            panel.plot(at, nats, style, linewidth=1, markersize=3, label=scheme)
        panel.set_xscale("log", base=2)
        panel.set_title(text, fontsize=9)
        panel.set_xlabel("position")
    panels[0].set_ylabel("nats a token")
    panels[-1].legend(fontsize=6)


if __name__ == "__main__":
    start(main)
