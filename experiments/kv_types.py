"""What do the types of the KV cache cost, in milliseconds and in perplexity?

    python experiments/kv_types.py --contexts 4096,16384,65536 --rows 1,8 --tokens 4096,16384

Passes of so many rows are timed at each context, the types in turns, as in steps.py; medians. A perplexity is of every
token of one real text after the first, in one pass over the whole text. The first type is what the others are compared
with.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from quants import medians, our_passes, perplexity, words
from results import Results, Row, add_flags, start
from steps import numbers
from tokenswift_py import TokenSwift
from tokenswift_py.errors import check
from tokenswift_py.models.devices import KV_DTYPES
from workloads import CONTINUATIONS, continuation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16", help="of the weights")
    parser.add_argument("--types", type=words, default=words("bf16,int8"), help="of the KV cache")
    parser.add_argument("--contexts", type=numbers, default=numbers("4096,16384,65536"))
    parser.add_argument("--rows", type=numbers, default=numbers("1,8"))
    parser.add_argument("--text", default="docs")
    parser.add_argument("--tokens", type=numbers, default=numbers("4096,16384"), help="of texts that are read")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    add_flags(parser)
    args = parser.parse_args()
    check(bool(args.types), "types", args.types, "at least one")
    for kind in args.types:
        check(kind in KV_DTYPES, "types", kind, f"known are {', '.join(KV_DTYPES)}")
    check(args.text in CONTINUATIONS, "text", args.text, f"known are {', '.join(CONTINUATIONS)}")
    torch.set_num_threads(args.threads)
    results = Results(
        "kv_types",
        "What do the types of the KV cache cost, in milliseconds and in perplexity?",
        args,
        guarantees={
            "milliseconds": "measured in interleaved rounds, medians",
            "perplexity": "exact, of one text under each type",
        },
        axes=("contexts", "tokens"),
    )
    for context in args.contexts:
        results.cell({"context": context}, lambda n=context: by_rows(args, n))  # type: ignore[misc]
    for tokens in args.tokens:
        results.cell({"text": args.text, "tokens": tokens}, lambda n=tokens: by_text(args, n))  # type: ignore[misc]
    results.save(plot)


def loaded(args: argparse.Namespace) -> dict[str, TokenSwift]:
    """Returns the model with each type of KV cache."""
    settings = {"dtype": args.dtype, "engine": "native", "threads": args.threads}
    return {kind: TokenSwift.from_pretrained(args.model, kv_dtype=kind, **settings) for kind in args.types}


def by_rows(args: argparse.Namespace, context: int) -> Iterator[Row]:
    """Times passes of each number of rows, every type in turns."""
    steps = {}
    for kind, swift in loaded(args).items():
        for rows, step in zip(args.rows, our_passes(swift, context, args.rows), strict=True):
            steps[f"{kind} {rows}"] = step
    ms = medians(steps, args.rounds)
    for rows in args.rows:
        first, *others = (ms[f"{kind} {rows}"] for kind in args.types)
        faster = {f"{kind}_times_as_fast": first / other for kind, other in zip(args.types[1:], others, strict=True)}
        yield {"rows": rows, **{f"{kind}_ms": ms[f"{kind} {rows}"] for kind in args.types}, **faster}


def by_text(args: argparse.Namespace, tokens: int) -> Row:
    """Measures the perplexity of a text under each type."""
    swifts = loaded(args)
    found = {
        kind: perplexity(swift, continuation(args.text, swift.tokenizer, tokens).tokens)
        for kind, swift in swifts.items()
    }
    first = found[args.types[0]]
    percent = {f"{kind}_percent": 100 * (found[kind] / first - 1) for kind in args.types[1:]}
    return {**{f"{kind}_perplexity": value for kind, value in found.items()}, **percent}


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws milliseconds against the context, a line for each type and number of rows."""
    panel = figure.subplots()
    timed = [row for row in rows if "rows" in row]
    for count in dict.fromkeys(row["rows"] for row in timed):
        here = [row for row in timed if row["rows"] == count]
        for column in (name for name in here[0] if name.endswith("_ms")):
            label = f"{column.removesuffix('_ms')}, {count} rows"
            panel.plot([row["context"] for row in here], [row[column] for row in here], "o-", label=label)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("tokens before")
    panel.set_ylabel("milliseconds a pass")
    panel.legend(fontsize=7)


if __name__ == "__main__":
    start(main)
