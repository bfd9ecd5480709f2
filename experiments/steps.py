"""Measures the cost of one forward pass, against the machine's own limits and against peers.

    python experiments/steps.py --contexts 64,4096,16384 --rows 1,4,8,16 --view 1024,4096 --peers hf,llamacpp

Caches are filled synthetically: the values do not matter to the time, but their places in memory do. Contenders take
turns, so that a burst on a busy machine hits all of them. Medians are printed beside the median read bandwidth of the
same rounds. The last line gives the best bandwidth of the whole run and the FLOP rate, at the same thread count.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import toys
from results import Results, Row, add_flags, start
from tokenswift_py import TokenSwift
from tokenswift_py.checkpoints.finding import kept_default_gguf
from tokenswift_py.core import DraftTree, Model, Segment
from tokenswift_py.decoding.statistics import memory_bandwidth
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE, select
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.policies.recent import Recent
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.rope import rope_tables


@dataclass
class Contender:
    """A kind of pass that is timed. step: function that runs it once. bytes, flops: what it must read and compute."""

    engine: str
    context: int
    what: str
    step: Callable[[], Any]
    bytes: float
    flops: float
    ms: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--contexts", type=numbers, default=numbers("64,4096,16384"))
    parser.add_argument("--rows", type=numbers, default=numbers("1,4,8,16"))
    parser.add_argument("--view", type=numbers, default=[], help="tokens of partial views, timed with one row")
    parser.add_argument("--prefill", type=int, default=0, help="also time the prefill of so many tokens")
    parser.add_argument("--busy", action="store_true", help="time one row also beside a process that never sleeps")
    parser.add_argument("--peers", default="", help="hf, llamacpp or both")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="a copy of the results' JSON")
    add_flags(parser)
    args = parser.parse_args()
    peers = [peer for peer in args.peers.split(",") if peer]
    for peer in peers:
        check(peer in PEERS, "peers", peer, f"known are {', '.join(PEERS)}")
    torch.set_num_threads(args.threads)
    results = Results(
        "steps",
        "What does one forward pass cost, against the machine's own limits and against peers?",
        args,
        guarantees={"milliseconds, bandwidth": "measured in interleaved rounds, medians"},
        axes=("contexts", "prefill", "busy"),
        peers=["llama-cpp-python"] if "llamacpp" in peers else [],
    )
    swift = TokenSwift.from_pretrained(args.model, dtype=args.dtype, engine=args.engine, threads=args.threads)
    for context in args.contexts:
        results.cell({"context": context}, lambda context=context: steps(swift, args, context, peers))  # type: ignore[misc]
    if args.prefill:
        results.cell({"prefill": args.prefill}, lambda: prefill(swift, args))
    for context in args.contexts if args.busy else []:
        key = {"context": context, "beside": "a busy process"}
        results.cell(key, lambda context=context: beside_busy(swift, args, context))  # type: ignore[misc]
    results.cell({"machine": results.machine["cpu"]}, lambda: limits(args, peers))
    results.save(plot)
    if args.json:
        shutil.copyfile(results.folder / "steps.json", args.json)


def steps(swift: TokenSwift, args: argparse.Namespace, context: int, peers: list[str]) -> list[Row]:
    """Returns a row for each contender."""
    with contextlib.ExitStack() as stack:
        contenders = list(ours(swift, args, context))
        for peer in peers:
            contenders.extend(stack.enter_context(PEERS[peer](swift, args, context)))
        bandwidths = interleave(contenders, args.rounds)
        return [row(contender, bandwidths, swift) for contender in contenders]


def limits(args: argparse.Namespace, peers: list[str]) -> Row:
    """Returns the best rates of plain reads and a plain matrix product, and how the peer was built."""
    return {
        "threads": args.threads,
        "best_read_gb_s": round(max(memory_bandwidth(megabytes) for megabytes in (128, 256, 512)) / 1e9, 1),
        "fp32_gflop_s": round(flop_rate() / 1e9),
        "llama_cpp": llama_build() if "llamacpp" in peers else None,
    }


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws milliseconds of a step against the context."""
    panel = figure.subplots()
    timed = [row for row in rows if "what" in row and "beside" not in row and "prefill" not in row]
    for engine, what in dict.fromkeys((row["engine"], row["what"]) for row in timed):
        here = [row for row in timed if (row["engine"], row["what"]) == (engine, what)]
        panel.plot([row["context"] for row in here], [row["ms"] for row in here], "o-", label=f"{engine}, {what}")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("tokens before")
    panel.set_ylabel("milliseconds a step")
    panel.legend(fontsize=7)


def interleave(contenders: list[Contender], rounds: int) -> list[float]:
    """Times every contender once a round. Returns the read bandwidth of each round.

    Each runs once untimed first, because steps of a text follow one another too. The contender before may have left its
    threads spinning and its data in the caches.
    """
    bandwidths = []
    for _ in range(rounds):
        for contender in contenders:
            contender.step()
            start = time.perf_counter()
            contender.step()
            contender.ms.append(1e3 * (time.perf_counter() - start))
        bandwidths.append(memory_bandwidth(128))
    return bandwidths


def ours(swift: TokenSwift, args: argparse.Namespace, context: int) -> Iterator[Contender]:
    room = context + max(args.rows) + 1
    model = swift.executor.model(rope_tables(swift.checkpoint.config, room))
    cache = filled_cache(model, context)
    for rows in args.rows:
        segment = Segment(DraftTree.chain([5] * rows), cache)
        yield Contender(
            swift.executor.name, context, f"{rows} rows", passes(model, cache, segment), *cost(swift, context, rows)
        )
    for tokens in args.view:
        if tokens < context:
            view = PageView(select(Recent(), cache.page_stats(), tokens))
            segment = Segment(DraftTree.chain([5]), cache, view)
            yield Contender(
                swift.executor.name, context, f"view {tokens}", passes(model, cache, segment), *cost(swift, tokens, 1)
            )


def passes(model: Model, cache: KVCache, segment: Segment) -> Callable[[], Any]:
    def step() -> None:
        cache.drop_tail()
        model.forward([segment])

    return step


def filled_cache(model: Model, context: int) -> KVCache:
    """Fills a cache with real keys and values on the first page, and copies of them on the others.

    Each page has its own place in memory.
    """
    cache = model.new_cache()
    first = min(context, PAGE_SIZE)
    tokens = np.random.default_rng(0).integers(0, 1000, first).astype(np.int32)
    model.forward([Segment(DraftTree.chain(tokens), cache, causal=True)], [])
    cache.commit(range(first))
    source = cache.slots(np.arange(first, dtype=np.int32))
    while cache.length < context:
        count = min(PAGE_SIZE, context - cache.length)
        target = cache.append(np.arange(cache.length, cache.length + count, dtype=np.int32), committable=True)
        cache.pool.move(source[:count], target)
        cache.commit(range(count))
    return cache


def cost(swift: TokenSwift, context: int, rows: int) -> tuple[float, float]:
    """Returns the bytes that a pass of so many rows must read, and its floating-point operations."""
    spec = swift.checkpoint.spec
    attention = 4 * spec.heads * spec.head_dim * spec.keys_seen(context)
    return swift.step_bytes(context), rows * (2.0 * spec.multiplied + attention)


@contextlib.contextmanager
def hugging_face(swift: TokenSwift, args: argparse.Namespace, context: int) -> Iterator[list[Contender]]:
    """Times transformers' own model, in bf16 with SDPA and its dynamic cache. Beyond 32 K a step would take seconds."""
    from transformers import DynamicCache

    if context > 32768:
        yield []
        return
    model: Any = toys.hugging_face(swift.checkpoint, torch.bfloat16)
    spec, token = swift.checkpoint.spec, torch.tensor([[5]])
    cache = DynamicCache(config=model.config)
    for layer in range(spec.layers):
        shape = (1, spec.kv_heads, context, spec.head_dim)
        cache.update(torch.randn(shape, dtype=torch.bfloat16), torch.randn(shape, dtype=torch.bfloat16), layer)

    @torch.inference_mode()
    def step() -> None:
        position = torch.tensor([context])
        model(token, past_key_values=cache, position_ids=position[None], use_cache=True)
        cache.crop(-1)

    yield [Contender("transformers", context, "1 rows", step, *cost(swift, context, 1))]


@contextlib.contextmanager
def llama_cpp(swift: TokenSwift, args: argparse.Namespace, context: int) -> Iterator[list[Contender]]:
    """Times llama.cpp on the default model's GGUF: 4-bit weights, f16 KV, flash attention.

    It is left out beyond 32 K, where filling its cache would take an hour.
    """
    if context > 32768:
        yield []
        return
    llama, low = open_llama(default_file(), context + 64, args.threads)
    try:
        step = llama_passes(llama, low, context)
        yield [Contender(f"llama.cpp {low.__version__}", context, "1 rows", step, *cost(swift, context, 1))]
    finally:
        llama.close()


def default_file() -> Path:
    return kept_default_gguf()


def open_llama(path: Path, context: int, threads: int, **settings: Any) -> tuple[Any, Any]:
    """Returns llama.cpp's model of a file, and the module with its functions. settings: further ones of `Llama`."""
    import llama_cpp

    llama = llama_cpp.Llama(
        str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, flash_attn=True,
        verbose=False, rope_scaling_type=llama_cpp.LLAMA_ROPE_SCALING_TYPE_NONE, **settings,
    )  # fmt: skip
    return llama, llama_cpp


def llama_passes(llama: Any, low: Any, context: int) -> Callable[[], Any]:
    """Returns llama.cpp's pass of one token after `context` others, with which its cache is filled first."""
    batch = 512
    for first in range(0, context, batch):  # llama.cpp can fill its cache only by computing it
        llama.eval([5] * min(batch, context - first))

    def step() -> None:
        llama.eval([5])
        low.llama_memory_seq_rm(low.llama_get_memory(llama.ctx), 0, context, -1)
        llama.n_tokens = context

    return step


def llama_reading(llama: Any, low: Any, tokens: Sequence[int]) -> Callable[[], Any]:
    """Returns llama.cpp's prefill of these tokens."""

    def run() -> None:
        llama.reset()
        low.llama_memory_clear(low.llama_get_memory(llama.ctx), True)
        llama.eval(list(tokens))

    return run


def llama_build() -> str:
    """Returns llama.cpp's own description of its version and build."""
    import llama_cpp as low

    return f"{low.__version__}: {low.llama_print_system_info().decode().strip()}"


PEERS = {"hf": hugging_face, "llamacpp": llama_cpp}


def beside_busy(swift: TokenSwift, args: argparse.Namespace, context: int) -> dict[str, Any]:
    """Times a step of one row alone, and beside a process that wants a core all the time, in turns."""
    model = swift.executor.model(rope_tables(swift.checkpoint.config, context + 2))
    cache = filled_cache(model, context)
    step = passes(model, cache, Segment(DraftTree.chain([5]), cache))
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    times: dict[bool, list[float]] = {False: [], True: []}
    try:
        for _ in range(args.rounds):
            for beside in times:
                busy.send_signal(signal.SIGCONT if beside else signal.SIGSTOP)
                time.sleep(0.02)
                step()
                for _ in range(BUSY_STEPS):
                    start = time.perf_counter()
                    step()
                    times[beside].append(1e3 * (time.perf_counter() - start))
    finally:
        busy.kill()
        busy.wait()
    quiet, shared = (statistics.median(times[beside]) for beside in (False, True))
    return {
        "engine": swift.executor.name,
        "ms": round(shared, 3), "ms_quiet": round(quiet, 3), "over_quiet": round(shared / quiet, 3),
        "ms_p90": round(float(np.percentile(times[True], 90)), 3),
    }  # fmt: skip


BUSY_STEPS = 6  # the steps of a turn, so that a turn is longer than one burst of the scheduler


def prefill(swift: TokenSwift, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times the prefill, ours and llama.cpp's, in turns."""
    tokens = some_tokens(args.prefill)
    contenders = [Contender(swift.executor.name, 0, f"prefill {args.prefill}", reading(swift, tokens), 0.0, 0.0)]
    if "llamacpp" in args.peers:
        llama, low = open_llama(default_file(), args.prefill + 64, args.threads)
        peer = llama_reading(llama, low, tokens)
        contenders.append(Contender(f"llama.cpp {low.__version__}", 0, f"prefill {args.prefill}", peer, 0.0, 0.0))
    interleave(contenders, min(3, args.rounds))
    return [
        {"engine": c.engine, "ms": round(c.median, 1), "tokens_per_s": round(1e3 * args.prefill / c.median)}
        for c in contenders
    ]  # fmt: skip


def some_tokens(count: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(1).integers(0, 1000, count).tolist()
    return tokens


def reading(swift: TokenSwift, tokens: Sequence[int]) -> Callable[[], Any]:
    """Returns our prefill of these tokens."""
    model = swift.executor.model(rope_tables(swift.checkpoint.config, len(tokens) + 1))
    cache = model.new_cache()

    def run() -> None:
        cache.release()
        for first in range(0, len(tokens), 512):
            chunk = tokens[first : first + 512]
            model.forward([Segment(DraftTree.chain(chunk), cache, causal=True)], [len(chunk) - 1])
            cache.commit(range(len(chunk)))

    return run


def flop_rate(size: int = 1536) -> float:
    """Measures the fp32 operations per second of a square matrix product."""
    a = torch.rand(size, size)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def row(contender: Contender, bandwidths: list[float], swift: TokenSwift) -> Row:
    """Returns a contender's figures.

    share: of the median bandwidth, by the median step. share_best: of the best bandwidth, by the best step.
    """
    median, own = statistics.median(bandwidths), contender.engine == swift.executor.name
    return {
        "engine": contender.engine,
        "what": contender.what,
        "ms": round(contender.median, 3),
        "ms_min": round(min(contender.ms), 3),
        "bandwidth_gb_s": round(median / 1e9, 1),
        "share": round(1e3 * contender.bytes / median / contender.median, 3) if own else None,
        "share_best": round(1e3 * contender.bytes / max(bandwidths) / min(contender.ms), 3) if own else None,
        "gflop_s": round(contender.flops / contender.median / 1e6, 1),
    }


if __name__ == "__main__":
    start(main)
