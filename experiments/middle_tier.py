"""Would a middle tier pay, which verifies a draft over all pages at few bits before the full cache does?

    python experiments/middle_tier.py --workloads code,docs --lengths 16384,65536 --bits 4,3 --kept DIR

After a real prefix the next rows of the text are computed over the whole cache, and again with the draft's weights
over a copy of it whose pages were rounded to few bits. A least value and a step in fp16 are shared by the 64 keys of
a page in each channel (`keys by channel`) or by the channels of each key (`by token`), and by the channels of each
value. Both choose a token after each row, with the same noise. `agreement` is the share of rows where it is the same:
how often a guess of the tier would be right. The rows are of the text, not of the model's own writing, so it is not
the `acceptance` of acceptance.py. `bits` 16 is the copy as it was, so what is missing there is the draft weights'
part. `read_of_whole` is the share of the bytes of a plain pass, with a bf16 cache, that the tier's pass would read.
(Here caches are fp32.)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from results import Results, Row, add_flags, start
from speedup import Prefix
from tokenswift_py import TokenSwift
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.decoding.history import History
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE, Bytes
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.runs.report import rounded
from tokenswift_py.sampling.params import SamplingParams
from tokenswift_py.sampling.reference import Sampler
from workloads import CONTINUATIONS, continuation

ROWS = 16  # of a pass; their own keys stand after the full pages, unrounded
WHOLE = 16  # the bits of what is not rounded
KEYS = {"by channel": -1, "by token": -2}  # the axis of keys [channels, tokens] along which a scale is shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--workloads", default="code,docs", help=", ".join(CONTINUATIONS))
    parser.add_argument("--lengths", default="16384", help="tokens before the rows that are compared")
    parser.add_argument("--bits", default="8,4,3", help="of a key's or value's channel")
    parser.add_argument("--new", type=int, default=512, help="rows that are compared")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--min-p", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kept", type=Path, metavar="DIR", help="keep the KV of prefixes there, 46 KB a token")
    add_flags(parser)
    args = parser.parse_args()
    names, lengths, bits = (value.split(",") for value in (args.workloads, args.lengths, args.bits))
    check(args.new >= ROWS and args.new % ROWS == 0, "new", args.new, f"a multiple of {ROWS}")
    for name in names:
        check(name in CONTINUATIONS, "workloads", name, f"known are {', '.join(CONTINUATIONS)}")
    for n in map(int, bits):
        check(1 <= n <= 8, "bits", n, "between 1 and 8")
    for n in map(int, lengths):
        whole = n >= PAGE_SIZE and n % PAGE_SIZE == 0
        check(whole, "lengths", n, f"a multiple of {PAGE_SIZE}, so that all rows before are in full pages")
    results = Results(
        "middle_tier",
        "How often would a tier over all pages at few bits choose the full cache's token?",
        args,
        guarantees={"agreement": "exact, of so many rows of one text; no times"},
        axes=("workloads", "lengths", "kept"),
    )
    swift = TokenSwift.from_pretrained(args.model, dtype=args.dtype, kv_dtype="fp32", threads=args.threads)
    check(
        swift.executor.name == "native", "executor", swift.executor.name, "this study rounds the native engine's pages"
    )
    for name, length in product(names, map(int, lengths)):
        results.cell(
            {"workload": name, "length": length},
            lambda name=name, length=length: rows(swift, args, name, length),  # type: ignore[misc]
        )
    results.save(plot)


def rows(swift: TokenSwift, args: argparse.Namespace, name: str, length: int) -> Iterator[Row]:
    """Yields a row for each way of rounding."""
    spec, end = swift.checkpoint.spec, length + args.new
    tokens = continuation(name, swift.tokenizer, end).tokens
    source = Prefix(swift, tokens, end, 1, end, args.kept and args.kept / f"{name}-{length}-fp32")
    source.read(length)
    model, cache = source.model, source.cache
    sampling = SamplingParams(temperature=args.temperature, min_p=args.min_p, seed=args.seed)
    sampler = swift.executor.sampler(sampling, spec.vocab_size)
    truth = []
    for start_row in range(length, end, ROWS):
        output = model.forward([Segment(DraftTree.chain(tokens[start_row:][:ROWS]), cache, causal=True)])
        truth += choices(sampler, tokens, start_row, output.logits)
        cache.commit(range(ROWS))
    draft = swift.executor.self_draft(source.rope, "int8", "own", "all")
    whole = swift.executor.multiplied_nbytes + kv_bytes(spec, length, WHOLE)
    for bits, keys in [(WHOLE, ""), *product(map(int, args.bits.split(",")), KEYS)]:
        copy = KVCache(cache.pool, end)
        for page in cache.pages[: length // PAGE_SIZE]:
            copy.adopt(few_bits(cache.pool.dump(int(page)), spec, bits, keys)[None])
        guesses = []
        for start_row in range(length, end, ROWS):
            output = draft.forward([Segment(DraftTree.chain(tokens[start_row:][:ROWS]), copy, causal=True)])
            guesses += choices(sampler, tokens, start_row, output.logits)
            copy.drop_tail()
            there = np.arange(start_row, start_row + ROWS, dtype=np.int32)
            cache.pool.move(cache.slots(there), copy.append(there, True))  # rows of the full cache follow, as written
            copy.commit(range(ROWS))
        copy.release()
        shared = [PAGE_SIZE if keys == "by channel" else spec.head_dim, spec.head_dim]  # by how many keys, values
        per_number = bits if bits == WHOLE else bits + float(np.mean([32 / count for count in shared]))
        read = draft.weights.multiplied_nbytes + kv_bytes(spec, length, per_number)
        yield {
            "bits": bits,
            "keys": keys or None,
            "agreement": rounded(float(np.mean(np.equal(truth, guesses)))),
            "read_of_whole": rounded(read / whole),
        }


def choices(sampler: Sampler, tokens: list[int], start: int, logits: torch.Tensor) -> list[int]:
    """Returns the token that would be chosen after each of these rows, of which the first stands at `start`."""
    history, found = History(tokens[:start]), []
    for row, token in enumerate(tokens[start:][: len(logits)]):
        history.append(token)
        found.append(sampler.rank(logits[row], history, 1)[0])
    return found


def kv_bytes(spec: ModelSpec, tokens: int, bits: float) -> float:
    return tokens * spec.layers * spec.kv_heads * 2 * spec.head_dim * bits / 8


def few_bits(page: Bytes, spec: ModelSpec, bits: int, keys: str) -> Bytes:
    """Returns a dumped page of fp32 with keys and values rounded to so many bits. WHOLE leaves them as they are.

    A block of fp32 is keys [channels, tokens], then values [tokens, channels] (kernels/cpu/engine/pool.h).
    """
    if bits == WHOLE:
        return page
    blocks = torch.from_numpy(page.view(np.float32).copy()).unflatten(0, (spec.layers * spec.kv_heads, 2, -1))
    keys_there = blocks[:, 0].unflatten(1, (-1, PAGE_SIZE))[:, : spec.head_dim]  # what is behind them is padding
    values = blocks[:, 1].unflatten(1, (PAGE_SIZE, -1))[..., : spec.head_dim]
    keys_there.copy_(nearest(keys_there, bits, KEYS[keys]))
    values.copy_(nearest(values, bits, -1))
    found: Bytes = blocks.numpy().reshape(-1).view(np.uint8)
    return found


def nearest(x: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Rounds to the nearest of 2^bits values at even distances from the least along an axis to the greatest. The least
    and the distance are fp16."""
    low = x.amin(axis, keepdim=True).half().float()
    step = ((x.amax(axis, keepdim=True) - low) / (2**bits - 1)).half().float()
    return low + step * torch.where(step > 0, (x - low) / step, 0.0).round().clamp(0, 2**bits - 1)


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws the agreement against the bytes that the tier's pass reads, a line for each text and way."""
    panel = figure.subplots()
    for name, length in dict.fromkeys((row["workload"], row["length"]) for row in rows):
        for keys in KEYS:
            here = [
                row
                for row in rows
                if (row["workload"], row["length"]) == (name, length) and row["keys"] in (keys, None)
            ]
            points = sorted((row["read_of_whole"], row["agreement"]) for row in here)
            panel.plot(*zip(*points, strict=True), "o-", label=f"{name}, {length} tokens, keys {keys}")
    panel.set_xlabel("bytes of a pass, of a plain one's")
    panel.set_ylabel("share of tokens that the full cache chooses")
    panel.legend(fontsize=6)


if __name__ == "__main__":
    start(main)
