"""Lists the bytes and FLOPs that the Triton kernels need, and the best times that a GPU's memory and units allow.

    python experiments/kernel_roofline.py --model llama-3.1-8b --contexts 4096,32768,100000 --rows 1,8,16

The table is arithmetic on shapes. It has every kernel of kernels/triton, for one layer (the head and the choice of
tokens: for one pass). Activations have 16 bits, and weights too, except with `int8` and `int4`. KV has 16 bits, except
with `+int8`. The bytes of attention beyond the minimum are those of partial states, which a GPU's second-level cache
may hold. If there is a GPU, attention is timed too: Triton's and the other backends that are installed, as a share of
the bandwidth read in the same run. Without a GPU the script says so and times nothing. (If this file were called
kernels.py, transformers would import it as Hugging Face's package.)
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from tokenswift_py import registry
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.decoding.statistics import memory_bandwidth
from tokenswift_py.errors import UserError, check
from tokenswift_py.kernels.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import TorchPagePool, pages_for
from tokenswift_py.models.blocks import FEW_BITS
from tokenswift_py.models.rows import lay_out

ITEM = 2  # the bytes of a weight, an activation or an element of a key
FP32 = 4
FP64 = 8
CAP_FLOPS = 4  # the capping of a score: an exponential, a sum, a quotient and a difference
CHOICE_BLOCK = 1024  # how many tokens a program of the sampler chooses from


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer, of which a row takes some. width: columns of one."""

    count: int
    chosen: int
    width: int


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    mixture: Mixture | None = None


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 9, 3, 64, 49152),
    "qwen2.5-7b": Shape(3584, 18944, 28, 4, 128, 152064),
    "llama-3.1-8b": Shape(4096, 14336, 32, 8, 128, 128256),
    "qwen3-30b-a3b": Shape(2048, 6144, 32, 4, 128, 151936, Mixture(128, 8, 768)),
}


@dataclass(frozen=True)
class Device:
    """A device by its vendor's figures: bytes of memory a second, and dense bf16 FLOPs a second of the matrix units."""

    bandwidth: float
    flops: float


DEVICES = {
    "A100 80GB SXM": Device(2.039e12, 312e12),
    "H100 SXM": Device(3.35e12, 989e12),
    "B200": Device(8.0e12, 2250e12),
    "MI300X": Device(5.3e12, 1307e12),
}


@dataclass(frozen=True)
class Work:
    """The work of one launch, or of the launches of the kernels named.

    Attention has two: one for the splits, and one to merge them.
    read, written: bytes. minimum: bytes that every kernel for this work must read or write.
    """

    kernel: str
    rows: int
    context: int | None
    read: int
    written: int
    minimum: int
    flops: int

    def best_us(self, device: Device) -> float:
        """Returns the microseconds at the roofline."""
        return 1e6 * max((self.read + self.written) / device.bandwidth, self.flops / device.flops)


def attention_work(
    shape: Shape,
    context: int,
    rows: int,
    int8: bool = False,
    mass: bool = False,
    far: bool = False,
    cap: bool = False,
    copies: bool = False,
) -> Work:
    """Returns the attention work of a chain of `rows` after `context` committed tokens.

    Keys and values are read once for each piece of packed rows, gathered ones for each tile. The partial states of
    every split are written once and read once.

    int8: keys and values are int8, each with its scale.
    mass: every page's maximum is set. It and the page's sum are written and read for each row and head, and the page's
          mass is written.
    far:  queries are turned in every split, which reads their other halves and two angles for each element. Blocks are
          no shorter than a split.
    copies: full pages are read as int8 copies.
    cap:  scores are capped, each by a hyperbolic tangent, which reads nothing.
    """
    # These are imported here because they need triton.
    from tokenswift_py.kernels.triton.configs import config
    from tokenswift_py.kernels.triton.items import NEAR, splits
    from tokenswift_py.kernels.triton.runtime import padded

    group, chosen = (
        shape.heads // shape.kv_heads,
        config(torch.bfloat16, shape.head_dim, int8 or copies, more=far or cap),
    )
    tokens, full = context + rows, context // PAGE_SIZE * PAGE_SIZE
    token, token_of_page = token_bytes(shape, int8), token_bytes(shape, int8 or copies)
    pieces, tail_tiles = -(-rows * group // (chosen.tile * chosen.tiles)), -(-rows // max(1, chosen.tile // group))
    state = shape.heads * rows * (padded(shape.head_dim) + 2) * FP32
    pages = -(-tokens // PAGE_SIZE)
    count = min(NEAR, pages) + (len(splits(pages - NEAR)) - 1 if pages > NEAR else 0)
    activations = rows * shape.heads * shape.head_dim * ITEM
    keys = token_of_page * pieces * full + token * tail_tiles * (tokens - full)
    flops = rows * shape.heads * tokens * (4 * shape.head_dim + CAP_FLOPS * cap)
    minimum = token_of_page * full + token * (tokens - full) + 2 * activations
    read, written = keys + count * (activations + state), count * state + activations  # every split reads q
    if far:
        read += count * (activations + 2 * activations // ITEM * FP32)
    name = f"attend{'+int8' * int8}{'+copy' * copies}{'+far' * far}{'+cap' * cap}, merge"
    if mass:
        page_mass = rows * -(-tokens // PAGE_SIZE) * FP32
        read, written = read + 2 * shape.heads * page_mass, written + (3 * shape.heads + shape.kv_heads) * page_mass
        name, minimum = f"{name}, mass", minimum + shape.kv_heads * page_mass
    return Work(name, rows, context, read, written, minimum, flops)


def token_bytes(shape: Shape, int8: bool) -> int:
    """Returns the bytes of a token's key and value in one layer."""
    return 2 * shape.kv_heads * (shape.head_dim + FP32 if int8 else shape.head_dim * ITEM)


def drafted(names: str) -> Iterator[tuple[str, float]]:
    """Yields the kernels with the target's weights, then with a draft's of few bits, and the bytes of a weight."""
    yield names, ITEM
    for own, (_, size) in FEW_BITS.items():
        yield (
            ", ".join(n.replace("matmul", own) if n.startswith("matmul") else f"{own}_{n}" for n in names.split(", ")),
            size,
        )


def dense_works(shape: Shape, rows: int) -> Iterator[Work]:
    """Yields the work of a layer except attention, and that of the LM head."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    feed_forward = (
        ("gated, gated+gelu", shape.hidden, 2 * shape.intermediate, shape.intermediate),
        ("matmul down", shape.intermediate, shape.hidden, shape.hidden),
    )
    for name, depth, columns, outputs in (
        ("qkv", shape.hidden, q + 2 * kv, q + 2 * kv),
        ("matmul o", q, shape.hidden, shape.hidden),
        *(() if shape.mixture else feed_forward),
        ("matmul head", shape.hidden, shape.vocab, shape.vocab),
    ):
        moved, written = rows * depth * ITEM, rows * outputs * ITEM
        for said, weight in drafted(name):
            read = int(columns * depth * weight) + moved
            yield Work(said, rows, None, read, written, read + written, 2 * rows * columns * depth)
    row = rows * shape.hidden * ITEM
    for more, weight in (("", shape.hidden * ITEM), ("+wide", shape.hidden * FP32)):
        yield Work(f"norm{more}", rows, None, 2 * row + weight, row, 2 * row, 4 * rows * shape.hidden)
        yield Work(f"add_norm{more}", rows, None, 4 * row + weight, 2 * row, 4 * row, 5 * rows * shape.hidden)
    heads, moved = (q + kv) * rows, (q + 2 * kv) * rows * ITEM
    angles = rows * shape.head_dim * FP32
    for name, weight in drafted("qkv_rope"):
        read = int((q + 2 * kv) * shape.hidden * weight) + rows * shape.hidden * ITEM + angles
        yield Work(name, rows, None, read, moved, read + moved, (2 * shape.hidden + 3) * (q + 2 * kv) * rows)
    for norm, int8 in product(("", "+norm", "+wide"), (False, True)):
        stored = rows * (q * ITEM + token_bytes(shape, int8))
        flops = (7 if norm else 3) * heads + (8 * rows * kv if int8 else 0)
        name = f"rope_write{norm}{'+int8' * int8}"
        read = moved + angles + ((q + kv) * rows * ITEM if norm else 0)  # a head is first read for its sum
        yield Work(name, rows, None, read, stored, moved + stored, flops)
    kept = rows * token_bytes(shape, False)
    yield Work("move", rows, None, kept, kept, 2 * kept, 0)
    if shape.mixture:
        yield from mixture_works(shape.hidden, shape.mixture, rows)
        return
    inner = rows * shape.intermediate * ITEM
    yield Work("swiglu, geglu", rows, None, 2 * inner, inner, 3 * inner, 5 * rows * shape.intermediate)


def mixture_works(hidden: int, mixture: Mixture, rows: int) -> Iterator[Work]:
    """Yields the work of a mixture, from its router on. Experts are read that rows take who choose evenly and alone."""
    count, pairs = mixture.count, rows * mixture.chosen
    taken = round(count * (1 - (1 - mixture.chosen / count) ** rows))
    scores, shares, numbers = rows * count * ITEM, pairs * FP32, pairs * FP32
    yield Work("route, route+sum", rows, None, scores, shares + numbers, scores + shares, 5 * rows * count)
    yield Work("group", rows, None, 2 * count * numbers, numbers + 2 * count * FP32, 2 * numbers, 3 * count * pairs)
    for name, depth, columns, outputs in (
        ("experts+gated", hidden, 2 * mixture.width, mixture.width),
        ("experts", mixture.width, hidden, hidden),
    ):
        read, written = (taken * columns * depth + pairs * depth) * ITEM, pairs * outputs * ITEM
        yield Work(name, rows, None, read, written, read + written, 2 * pairs * columns * depth)
    parts, row = pairs * hidden * ITEM, rows * hidden * ITEM
    yield Work("mix", rows, None, parts + shares, row, parts + shares + row, 2 * pairs * hidden)
    yield Work(
        "mix+shared", rows, None, parts + shares + row, row, parts + shares + 2 * row, 2 * (pairs + rows) * hidden
    )


def choice_works(shape: Shape, rows: int) -> Iterator[Work]:
    """Yields the work of the sampler's kernels over the logits of `rows`, without the search of the text."""
    logits, scores = rows * shape.vocab * FP32, rows * shape.vocab * FP64
    told = rows * shape.vocab * (3 * FP32 + FP64)  # places and counts of the text, marks, biases
    for name, more, flops in (("scores", 0, 2), ("greedy scores", 0, 1), ("changed scores", told, 12)):
        yield Work(name, rows, None, logits + more, scores, logits + scores, flops * rows * shape.vocab)
    best, chosen = rows * -(-shape.vocab // CHOICE_BLOCK) * (FP64 + FP32), rows * (FP64 + FP32)
    for name, flops in (("best", 1), ("gumbel best", 70)):
        yield Work(f"{name}, best merge", rows, None, scores + best, best + chosen, scores, flops * rows * shape.vocab)
    yield Work("nucleus mass", rows, None, scores, scores, 2 * scores, 30 * rows * shape.vocab)
    yield Work("nucleus digit", rows, None, scores, 0, scores, 3 * rows * shape.vocab)
    yield Work("weights", rows, None, scores, scores, 2 * scores, 30 * rows * shape.vocab)
    yield Work("sigmas", rows, None, 5 * rows * FP64, rows * FP64, 5 * rows * FP64, 5 * rows)
    yield Work("halving", rows, None, scores, rows * FP64, scores, rows * shape.vocab)
    yield Work("nucleus edge", rows, None, 2 * scores, 0, 2 * scores, 3 * rows * shape.vocab)


def repeat_works(context: int, rows: int) -> Iterator[Work]:
    """Yields the work of searching the text for what the end of each row's path repeats."""
    text = context * FP32  # a token has 4 bytes, which all rows but the first find in the cache
    for name in ("repeats", "repeats out"):
        yield Work(name, rows, context, rows * text, 0, text, 4 * rows * context)


def analytical(shape: Shape, contexts: list[int], row_counts: list[int]) -> list[Work]:
    works = [
        attention_work(shape, context, rows, int8, mass, far, cap, copies)
        for int8, mass, far, cap, copies in product((False, True), repeat=5)
        if not (int8 and copies)
        for context in contexts
        for rows in row_counts
    ]
    wide, narrow = (PAGE_SIZE * token_bytes(shape, int8) for int8 in (False, True))
    numbers = 2 * PAGE_SIZE * shape.kv_heads * shape.head_dim
    works.append(Work("copy_pages", PAGE_SIZE, None, wide, narrow, wide + narrow, 4 * numbers))  # one page
    for rows in row_counts:
        works += [*dense_works(shape, rows), *choice_works(shape, rows)]
        works += [work for context in contexts for work in repeat_works(context, rows)]
    return works


def print_table(works: list[Work]) -> None:
    columns = ("kernel", 29), ("rows", 4), ("context", 8), ("MB", 9), ("over min", 8), ("GFLOP", 8), ("FLOP/B", 7)
    names = " ".join(f"{name:>14}" for name in DEVICES)
    print(" ".join(f"{name:{width}}" for name, width in columns), "  best us:", names)
    for work in works:
        total = work.read + work.written
        context = "" if work.context is None else work.context
        over = f"{100 * (total / work.minimum - 1):7.1f}%"
        times = " ".join(f"{work.best_us(device):14.1f}" for device in DEVICES.values())
        print(
            f"{work.kernel:29} {work.rows:4} {context:>8} {total / 1e6:9.2f} {over:>8} {work.flops / 1e9:8.2f} "
            f"{work.flops / total:7.1f}           {times}"
        )


@dataclass(frozen=True)
class Timing:
    """A measured time. bandwidth: minimum bytes over time. share: bandwidth over that of a plain read in this run."""

    backend: str
    rows: int
    context: int
    us: float
    bandwidth: float
    share: float


def measured(shape: Shape, contexts: list[int], row_counts: list[int], device: torch.device) -> Iterator[Timing]:
    """Times attention of one layer by each installed backend. They take turns, so that a slower clock hits all."""
    backends = {}
    for name in ("triton", "flash", "xformers", "sdpa"):
        try:
            backends[name] = registry.create("tokenswift_py.kernels", "BACKEND", "attention", name)
        except UserError as error:
            print(error)
    limit = memory_bandwidth(1024, device)
    for context in contexts:
        cache = filled_cache(shape, context, max(row_counts), device)
        pool = cache.pool
        assert isinstance(pool, TorchPagePool)
        for rows in row_counts:
            cache.drop_tail()
            segments = lay_out([Segment(DraftTree.chain(np.arange(rows)), cache)]).segments
            q = torch.randn(rows, shape.heads, shape.head_dim, dtype=torch.bfloat16, device=device)
            plans = {name: backend.prepare(segments, device) for name, backend in backends.items()}

            def step(name: str, plans=plans, q=q, pool=pool) -> None:  # type: ignore[no-untyped-def]
                backends[name].attend(plans[name], 0, q, pool.keys[0], pool.values[0])

            times: dict[str, list[float]] = {name: [] for name in backends}
            for _ in range(20):
                for name in backends:
                    times[name].append(time_us(lambda name=name: step(name)))  # type: ignore[misc]
            for name, samples in times.items():
                us = statistics.median(samples)
                rate = attention_work(shape, context, rows).minimum / us * 1e6
                yield Timing(name, rows, context, us, rate, rate / limit)


def time_us(step: Callable[[], None]) -> float:
    """Returns the microseconds of the second of two runs, by the GPU's own clock."""
    step()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    stop.record()
    stop.synchronize()
    return 1e3 * float(start.elapsed_time(stop))


def filled_cache(shape: Shape, context: int, rows: int, device: torch.device) -> KVCache:
    """Makes a cache of random keys and values, which do not matter to the time."""
    room = context + rows
    pool = TorchPagePool(1, shape.kv_heads, shape.head_dim, pages_for(room), torch.bfloat16, device)
    pool.keys.normal_()
    pool.values.normal_()
    cache = KVCache(pool, room)
    cache.append(np.arange(context, dtype=np.int32), True)
    cache.commit(range(context))
    return cache


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help=", ".join(SHAPES))
    parser.add_argument("--contexts", type=numbers, default=numbers("4096,32768,100000"))
    parser.add_argument("--rows", type=numbers, default=numbers("1,8,16"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        check(args.model in SHAPES, "model", args.model, f"known are {', '.join(SHAPES)}")
    except UserError as error:
        parser.error(str(error))
    shape = SHAPES[args.model]
    works = analytical(shape, args.contexts, args.rows)
    print_table(works)
    timings: list[Timing] = []
    if torch.cuda.is_available():
        device = torch.device("cuda")
        print(f"\nmeasured on {torch.cuda.get_device_name(device)}")
        for timing in measured(shape, args.contexts, args.rows, device):
            timings.append(timing)
            print(
                f"{timing.backend:10} {timing.rows:4} rows {timing.context:8} tokens {timing.us:10.1f} us "
                f"{timing.bandwidth / 1e9:8.0f} GB/s ({timing.share:.2f})"
            )
    else:
        print("\nNo GPU here: arithmetic only, nothing was measured.")
    if args.json:
        record = {"model": args.model, "works": [asdict(w) for w in works], "timings": [asdict(t) for t in timings]}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
