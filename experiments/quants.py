"""What do the types of quantised GGUF files cost, in milliseconds and in perplexity, here and in llama.cpp?

    python experiments/quants.py

There are three parts (--parts):
  beside   a made model of Qwen2.5-0.5B's shape in Q4_K_M, whose file our native engine (--dtype gguf) and llama.cpp
           read: a pass of one token at the first and the last context, and a prefill. Its weights are random; the
           cache keeps its file.
  types    the default model in each type, made of its own file (most of it Q4_1) by llama.cpp's quantiser: the
           perplexity of a real text by our engine with the file's blocks (gguf) and with the values that they stand for
           (fp32), and by llama.cpp; and a pass of one token at the first context.
  dtypes   the default model's own file in each --dtype: passes of some rows at each context, a prefill, the
           perplexity, and the bytes that a token reads: all weights, and the KV of each token before it.

A perplexity is that of all tokens of one text but the first, in one pass over the whole text. Contenders take turns, as
in steps.py, and medians are printed. Columns of llama.cpp are in the same rows as ours.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gguf_files import MIXES, SHAPES, made_file, quantise, stored_types
from results import Results, Row, add_flags, start
from steps import (
    Contender,
    filled_cache,
    interleave,
    llama_build,
    llama_passes,
    llama_reading,
    numbers,
    open_llama,
    passes,
    reading,
    some_tokens,
)
from tokenswift_py import TokenSwift
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.errors import check, need_extra
from tokenswift_py.models.devices import WEIGHT_FORMATS
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.quality import CHUNK, nats
from workloads import CONTINUATIONS, continuation

PARTS = ("beside", "types", "dtypes")
MADE_MIX = "Q4_K_M"
GOAL = 0.5  # by how many percent the perplexity of a file's blocks may differ from that of the values they stand for
PREFILLS = 3  # the number of rounds of a prefill


def words(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a model in a GGUF file")
    parser.add_argument("--made", default="qwen2-0.5b", help=f"shape of the made model: {', '.join(SHAPES)}")
    parser.add_argument("--parts", type=words, default=list(PARTS))
    parser.add_argument("--types", type=words, default=list(MIXES))
    parser.add_argument("--dtypes", type=words, default=words("bf16,gguf,int8,fp32"))
    parser.add_argument("--contexts", type=numbers, default=numbers("64,1024,4096"))
    parser.add_argument("--rows", type=numbers, default=numbers("1,4,8,16"))
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--text", default="docs")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text whose perplexity is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    add_flags(parser)
    args = parser.parse_args()
    check_flags(args)
    need_extra("extra", "peers", "llama_cpp")
    torch.set_num_threads(args.threads)
    results = Results(
        "quants",
        "What do the types of quantised GGUF files cost, in milliseconds and in perplexity, here and in llama.cpp?",
        args,
        guarantees={
            "milliseconds": "measured in interleaved rounds, medians",
            "perplexity": f"exact, of {args.tokens} tokens of one text, each engine with its own KV cache: "
            "ours bf16 (fp32 with --dtype fp32), llama.cpp's fp16",
            "within_goal": f"gguf differs from fp32 by at most {GOAL} %",
        },
        axes=("parts", "contexts", "types"),
        peers=["llama-cpp-python"],
    )
    if "beside" in args.parts:
        made = f"made {args.made}, {MADE_MIX}"
        for context in dict.fromkeys((args.contexts[0], args.contexts[-1])):  # llama.cpp fills its cache in a minute
            results.cell({"file": made, "context": context}, lambda n=context: beside(args, n))  # type: ignore[misc]
        results.cell({"file": made, "prefill": args.prefill}, lambda: prefill_beside(args))
    for mix in args.types if "types" in args.parts else []:
        key = {"type": mix, "context": args.contexts[0]}
        results.cell(key, lambda mix=mix: of_type(args, mix))  # type: ignore[misc]
    if "dtypes" in args.parts:
        for context in args.contexts:
            results.cell({"model": args.model, "context": context}, lambda n=context: by_rows(args, n))  # type: ignore[misc]
        results.cell({"model": args.model, "prefill": args.prefill}, lambda: by_dtype(args))
    results.cell({"machine": results.machine["cpu"]}, lambda: {"llama_cpp": llama_build()})
    results.save(plot)


def check_flags(args: argparse.Namespace) -> None:
    known = {"parts": PARTS, "types": MIXES, "dtypes": WEIGHT_FORMATS}
    for flag, allowed in known.items():
        for value in getattr(args, flag):
            check(value in allowed, flag, value, f"known are {', '.join(allowed)}")
    check(args.made in SHAPES, "made", args.made, f"known are {', '.join(SHAPES)}")
    check(args.text in CONTINUATIONS, "text", args.text, f"known are {', '.join(CONTINUATIONS)}")
    check(bool(args.contexts) and bool(args.rows), "contexts, rows", None, "at least one each")
    check(args.tokens > 1 and args.prefill > 0, "tokens, prefill", (args.tokens, args.prefill), "at least 2 and 1")


def loaded(args: argparse.Namespace, path: Path | str, dtype: str) -> TokenSwift:
    return TokenSwift.from_pretrained(str(path), dtype=dtype, engine="native", threads=args.threads)


@contextmanager
def llama_of(args: argparse.Namespace, path: Path, context: int, **settings: Any) -> Iterator[tuple[Any, Any]]:
    llama, low = open_llama(path, context, args.threads, **settings)
    try:
        yield llama, low
    finally:
        llama.close()


def our_passes(swift: TokenSwift, context: int, rows: Sequence[int]) -> list[Callable[[], Any]]:
    """Returns passes of so many rows each, over one cache."""
    model = swift.executor.model(rope_tables(swift.checkpoint.config, context + max(rows) + 1))
    cache = filled_cache(model, context)
    return [passes(model, cache, Segment(DraftTree.chain([5] * count), cache)) for count in rows]


def medians(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median milliseconds of each contender by its name. The contenders take turns."""
    contenders = [Contender(name, 0, "", step, 0.0, 0.0) for name, step in steps.items()]
    interleave(contenders, rounds)
    return {contender.engine: contender.median for contender in contenders}


def against(ms: dict[str, float]) -> Row:
    """Returns the columns with our milliseconds and llama.cpp's."""
    return {
        "ms": ms["ours"],
        "llama_cpp_ms": ms["llama.cpp"],
        "times_llama_cpp": ms["llama.cpp"] / ms["ours"],
    }


def beside(args: argparse.Namespace, context: int) -> Row:
    """Times passes of one token over the made file."""
    path = made_file(args.made, MADE_MIX)
    swift = loaded(args, path, "gguf")
    return {
        "megabytes": path.stat().st_size / 1e6,
        "stored": stored_types(path),
        **against(pass_beside(args, path, swift, context)),
    }


def pass_beside(args: argparse.Namespace, path: Path, swift: TokenSwift, context: int) -> dict[str, float]:
    with llama_of(args, path, context + 64) as (llama, low):
        (ours,) = our_passes(swift, context, [1])
        return medians({"ours": ours, "llama.cpp": llama_passes(llama, low, context)}, args.rounds)


def prefill_beside(args: argparse.Namespace) -> Row:
    path, tokens = made_file(args.made, MADE_MIX), some_tokens(args.prefill)
    ours = reading(loaded(args, path, "gguf"), tokens)
    with llama_of(args, path, args.prefill + 64) as (llama, low):
        ms = medians({"ours": ours, "llama.cpp": llama_reading(llama, low, tokens)}, min(PREFILLS, args.rounds))
    return {**against(ms), "tokens_per_s": 1e3 * args.prefill / ms["ours"]}


def of_type(args: argparse.Namespace, mix: str) -> Row:
    """Makes the model's file in one type, and measures it."""
    source, *_ = open_checkpoint(args.model, None, "gguf").weight_files
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="quants-"))
        path = Path(folder) / f"{mix}.gguf"
        quantise(source, path, mix)
        # The tokenizer and config that were made from the file are removed with it.
        stack.enter_context(mock.patch.dict(os.environ, {"TOKENSWIFT_CACHE": folder}))
        blocks = loaded(args, path, "gguf")
        tokens = continuation(args.text, blocks.tokenizer, args.tokens).tokens
        gguf, fp32 = perplexity(blocks, tokens), perplexity(loaded(args, path, "fp32"), tokens)
        percent = 100 * (gguf / fp32 - 1)
        return {
            "stored": stored_types(path),
            "megabytes": path.stat().st_size / 1e6,
            "perplexity_gguf": gguf,
            "perplexity_fp32": fp32,
            "perplexity_llama_cpp": llama_perplexity(args, path, tokens),
            "gguf_over_fp32_percent": percent,
            "within_goal": abs(percent) <= GOAL,
            **against(pass_beside(args, path, blocks, args.contexts[0])),
        }


def perplexity(swift: TokenSwift, tokens: list[int]) -> float:
    """Returns the perplexity of all tokens but the first, where each is given those before it."""
    model = swift.executor.model(rope_tables(swift.checkpoint.config, len(tokens)))
    return math.exp(nats(model, tokens, len(tokens) - 1) / (len(tokens) - 1))


def llama_perplexity(args: argparse.Namespace, path: Path, tokens: list[int]) -> float:
    """Returns the same by llama.cpp's logits."""
    with llama_of(args, path, len(tokens), logits_all=True) as (llama, _):
        llama.eval(tokens)
        logits, after = torch.from_numpy(llama.scores[: len(tokens) - 1]), torch.tensor(tokens[1:])
        total = sum(
            float(torch.nn.functional.cross_entropy(part, target, reduction="none").double().sum())
            for part, target in zip(logits.split(CHUNK), after.split(CHUNK), strict=True)
        )
    return math.exp(total / len(after))


def by_rows(args: argparse.Namespace, context: int) -> Iterator[Row]:
    """Times passes of each number of rows over the model's own file. The types of weights take turns."""
    swifts = {dtype: loaded(args, args.model, dtype) for dtype in args.dtypes}
    steps = {}
    for dtype, swift in swifts.items():
        for rows, step in zip(args.rows, our_passes(swift, context, args.rows), strict=True):
            steps[f"{dtype} {rows}"] = step
    ms = medians(steps, args.rounds)
    for rows in args.rows:
        yield {"rows": rows, **{f"{dtype}_ms": ms[f"{dtype} {rows}"] for dtype in swifts}}


def by_dtype(args: argparse.Namespace) -> Iterator[Row]:
    """Measures the figures that depend on neither rows nor context: the prefill, the perplexity and the bytes read."""
    swifts = {dtype: loaded(args, args.model, dtype) for dtype in args.dtypes}
    tokens = some_tokens(args.prefill)
    ms = medians({name: reading(swift, tokens) for name, swift in swifts.items()}, min(PREFILLS, args.rounds))
    for dtype, swift in swifts.items():
        text = continuation(args.text, swift.tokenizer, args.tokens).tokens
        yield {
            "dtype": dtype,
            "ms": ms[dtype],
            "perplexity": perplexity(swift, text),
            "weights_mb": swift.step_bytes(0) / 1e6,
            "kv_kb_a_token_before": (swift.step_bytes(1) - swift.step_bytes(0)) / 1e3,
        }


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws a panel for each part: passes beside llama.cpp, perplexity by type, and passes by type of weights."""
    passed = [row for row in rows if "file" in row and "context" in row]
    typed = [row for row in rows if "type" in row]
    timed = [row for row in rows if "rows" in row]
    drawn = [
        (draw, part) for draw, part in ((plot_beside, passed), (plot_types, typed), (plot_rows, timed)) if part
    ]  # fmt: skip
    figure.set_size_inches(5 * max(1, len(drawn)), 4.5)
    for panel, (draw, part) in zip(figure.subplots(1, max(1, len(drawn)), squeeze=False)[0], drawn, strict=False):
        draw(panel, part)


def plot_beside(panel: Any, rows: list[Row]) -> None:
    for column, label in (("ms", "ours"), ("llama_cpp_ms", "llama.cpp")):
        panel.plot([row["context"] for row in rows], [row[column] for row in rows], "o-", label=label)
    panel.set_title(rows[0]["file"], fontsize=9)
    panel.set_xscale("log", base=2)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("tokens before")
    panel.set_ylabel("milliseconds a token")
    panel.legend(fontsize=7)


def plot_types(panel: Any, rows: list[Row]) -> None:
    for column, mark in (("perplexity_gguf", "o"), ("perplexity_fp32", "x"), ("perplexity_llama_cpp", "+")):
        label = column.removeprefix("perplexity_").replace("_cpp", ".cpp")
        panel.plot([row["megabytes"] for row in rows], [row[column] for row in rows], mark, label=label)
    for row in rows:
        panel.annotate(row["type"], (row["megabytes"], row["perplexity_gguf"]), fontsize=6)
    panel.set_xlabel("megabytes of the file")
    panel.set_ylabel("perplexity")
    panel.legend(fontsize=7)


def plot_rows(panel: Any, rows: list[Row]) -> None:
    context = rows[0]["context"]
    here = [row for row in rows if row["context"] == context]
    for column in (name for name in here[0] if name.endswith("_ms")):
        panel.plot([row["rows"] for row in here], [row[column] for row in here], "o-", label=column.removesuffix("_ms"))
    panel.set_title(f"{context} tokens before", fontsize=9)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("rows of a pass")
    panel.set_ylabel("milliseconds")
    panel.legend(fontsize=7)


if __name__ == "__main__":
    start(main)
