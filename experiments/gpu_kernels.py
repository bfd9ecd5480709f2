"""Steps 0 to 5 of `gpu_check.py`: ceilings, tests, noise, the row law, and kernels beside their alternatives."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from gpu_stage import NARROW, TINY_NARROW, Parts, Row, Stage, drawn_cache, drawn_pool, random_tree
from tokenswift_py.core import DraftTree, Output, SamplingParams, Segment
from tokenswift_py.decoding.history import History
from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment
from tokenswift_py.kernels.triton import attention, packed
from tokenswift_py.kernels.triton.attention import TritonAttention
from tokenswift_py.kernels.triton.configs import SWEPT, Config
from tokenswift_py.kernels.triton.matmul import linear
from tokenswift_py.kernels.triton.products import in_blocks
from tokenswift_py.kernels.triton.row_test import Matrix, row_test
from tokenswift_py.kernels.triton.runtime import launch_options
from tokenswift_py.kernels.triton.sampling import gumbel
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.captured import recorder_for
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.sampling import noise
from tokenswift_py.sampling.reference import Sampler
from tokenswift_py.sampling.triton import TritonSampler

ROOT = Path(__file__).resolve().parent.parent
EDGE = range(3037000448, 3037000500)  # words whose u is near the root of 1/2, where the logarithm changes its branch


def ceilings(stage: Stage) -> Iterator[Row]:
    """Measures a plain read, a copy (bytes read and written), and a product of large squares."""
    yield {"what": "read, GB/s", "value": stage.bandwidth / 1e9}
    source = torch.ones(stage.pick(2**30, 2**18), dtype=torch.float32, device=stage.device)
    target = torch.empty_like(source)
    ms = stage.ms(partial(target.copy_, source), 5, 1)
    yield {"what": f"copy of {source.nbytes / 1e9:.3g} GB, GB/s", "value": 2e-6 * source.nbytes / ms}
    size = stage.pick(8192, 64)
    square = torch.ones(size, size, dtype=stage.dtype, device=stage.device)
    ms = stage.ms(partial(torch.matmul, square, square), 5)
    yield {"what": f"product of {size} squared, TFLOP/s", "value": 2e-9 * size**3 / ms}


TESTS = {
    "what only a GPU can tell": ["-m", "gpu", "tests/test_triton_gpu.py"],
    "kernels, compiled": ["tests/test_triton_fused.py", "tests/test_triton.py"],
}


def ended(command: list[str], env: dict[str, str], seconds: float) -> tuple[int | None, str, str]:
    """Runs a command for some seconds at most. Returns its status (None where it was ended), output and errors.

    With it end the processes that it began, or they would compile and compute beside the next step.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            said, errors = process.communicate(timeout=max(0, seconds))
            return process.returncode, said, errors
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, *process.communicate()


def tests(stage: Stage) -> Iterator[Row]:
    """Runs some of the suite's tests in processes of their own. A tiny stage runs one, in the interpreter."""
    chosen = stage.pick(TESTS, {"swiglu": ["tests/test_triton_fused.py", "-k", "swiglu"]})
    for what, arguments in chosen.items():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        if not stage.tiny and importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(8, os.cpu_count() or 1))]  # most of their time goes into compiling
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        status, said, errors = ended(command, env, min(150, stage.left))
        if status is None:
            ends = "".join(re.findall(r"^([.sFExX]+)(?: +\[ *\d+%\])?$", said, re.MULTILINE))  # a letter a test
            wrong = ends.count("F") + ends.count("E")
            counted = {"passed": ends.count("."), "skipped": ends.count("s")}
            yield {
                "what": what,
                "ok": False if wrong else None,
                **counted,
                "failed": f"not over in time; {wrong} failed",
            }
            continue
        counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", said)}
        failed = "; ".join(re.findall(r"^(?:FAILED|ERROR) \S*?(?:::)?(\S+)", said, re.MULTILINE))
        told = failed or (errors.strip().splitlines() or said.strip().splitlines() or [""])[-1]
        good = status == 0 and counts.get("passed", 0) > 0
        yield {
            "what": what, "ok": good, "passed": counts.get("passed", 0), "skipped": counts.get("skipped", 0),
            "failed": "" if good else told[:2000],
        }  # fmt: skip


@triton.jit
def gumbel_kernel(words: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + at, mask=at < count, other=0).to(tl.uint64)
    tl.store(out + at, gumbel(word), mask=at < count)


def noise_bits(stage: Stage) -> Iterator[Row]:
    """Compares the kernel's noise with numpy's, bit by bit, and the choices that rest on it with the reference's."""
    words = np.random.default_rng(0).integers(0, 2**32, stage.pick(2**22, 2**10), np.int64)
    words = np.concatenate([words, np.array(EDGE, np.int64)])
    expected = -noise.log(-noise.log((words + 0.5) * 2.0**-32))
    out = torch.empty(len(words), dtype=torch.float64, device=stage.device)
    gumbel_kernel[(triton.cdiv(len(words), 1024),)](
        torch.from_numpy(words).to(stage.device), out, len(words), BLOCK=1024, **launch_options(4, 1)
    )
    wrong = int((out.cpu().numpy() != expected).sum())
    yield {"what": "noise", "ok": wrong == 0, "compared": len(words), "wrong": wrong}
    vocab, rows = stage.pick(128_256, 300), stage.pick(16, 3)
    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    placed, tree = logits.to(stage.device), DraftTree(range(rows), [-1] + [0] * (rows - 1))
    sampled = (
        {}, {"top_k": 50}, {"min_p": 0.05}, {"penalty": 1.2, "min_p": 0.05}, {"temperature": 0.0}, {"top_p": 0.9},
        {"dry_multiplier": 0.8, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "top_p": 0.95},
    )  # fmt: skip
    for params in sampled:
        made = SamplingParams(**{"temperature": 0.8, "seed": 3, **params})
        history = History()
        history.extend([0] * 40)
        chosen = TritonSampler(made, vocab).chooser(tree, placed, history)
        same = 0
        for row in range(rows):
            own = History()
            own.extend([*[0] * 40, *([row] if row else [])])
            same += chosen(row) == Sampler(made, vocab).choose(logits[row], own)
        told = ", ".join(f"{name} {value}" for name, value in params.items()) or "no filter"
        yield {"what": f"choices, {told}", "ok": same == rows, "compared": rows, "wrong": rows - same}


def row_law(stage: Stage) -> Iterator[Row]:
    """Checks law 1 on two layers.

    A row of a tree must have the bits that it has alone, in a causal chunk, with and without page masses, under a view
    of all pages, launched and replayed. It is also checked over int8 keys and values, with moved queries, in the shape
    of the default model (`narrow`: odd groups, heads of 64, where two tiles meet a page), and with the library's
    products in blocks, which must keep it where step 4 finds that their rows do.
    """
    contexts = stage.pick((63, 64, 4095, 32_767, 100_000), (63, 128))
    counts = stage.pick((1, 2, 7, 16, 17, 64), (3,))
    longest = contexts[-1] + 256
    kinds = {
        "plain": (Parts(stage, longest, layers=2), {}),
        "int8": (Parts(stage, longest, layers=2), {"kv_dtype": torch.int8}),
        "moved": (Parts(stage, longest, layers=2, trained=stage.pick(8192, 160)), {"positions": "self-extend"}),
        "blocks": (Parts(stage, longest, layers=2), {"products": "blocks"}),
        "narrow": (Parts(stage, longest, layers=2, sizes=stage.pick(NARROW, TINY_NARROW)), {}),
    }
    of_kind = {"plain": counts, "narrow": stage.pick((1, 2, 22, 43, 64), (3,))}
    for name, (parts, options) in kinds.items():
        model, launched = parts.decoder(**options), parts.decoder(graphs=False, **options)
        pool, rng = drawn_pool(model, 64), np.random.default_rng(0)
        for length in contexts if name == "plain" else contexts[1::2]:
            for count in of_kind.get(name, counts[::2]):
                base = drawn_cache(pool, model.context, length)
                tree = random_tree(rng, count, parts.spec.vocab_size)
                wrong = differences(model, launched, base, tree)
                base.release()
                differs = ", ".join(sorted(wrong))
                kept = name != "blocks" or not parts.blocks.verdict.faults
                yield {"keys": name, "context": length, "rows": count, "ok": not (wrong and kept), "differs": differs}


def differences(model: TorchDecoder, launched: TorchDecoder, base: KVCache, tree: DraftTree) -> set[str]:
    """Returns the names of the ways to compute the rows that give other bits than the tree's pass."""
    cache = base.fork()
    segment = Segment(tree, cache)

    def run(by: TorchDecoder, segment: Segment, **wants: bool) -> Output:
        output = by.forward([segment], **wants)
        segment.cache.drop_tail()
        return output

    together = run(model, segment, want_mass=True)
    wrong = set() if together.logits.isfinite().all() else {"not finite"}
    others = {"mass": run(model, segment), "graphs": run(launched, segment, want_mass=True)}
    if cache.full_pages:
        view = PageView.all(model.spec.layers, model.spec.kv_heads, cache.full_pages)
        others["view"] = run(model, replace(segment, view=view))
    wrong |= {name for name, output in others.items() if not same(output, together)}
    cache.release()
    for node in {0, len(tree) // 2, len(tree) - 1}:
        tokens = tree.tokens[tree.path(node)]
        cache = base.fork()
        chunk = run(model, Segment(DraftTree.chain(tokens), cache, causal=True))
        if len(tokens) > 1:
            model.forward([Segment(DraftTree.chain(tokens[:-1]), cache, causal=True)], [])
            cache.commit(range(len(tokens) - 1))
        alone = run(model, Segment(DraftTree.chain(tokens[-1:]), cache))
        cache.release()
        wrong |= {name for name, output in (("chunk", chunk), ("alone", alone)) if not same(output, together, node)}
    return wrong


def same(output: Output, together: Output, node: int | None = None) -> bool:
    """Returns whether bits are equal. node: the node that the output's last row is compared with. None is all rows."""
    pairs = ((output.hidden, together.hidden), (output.logits, together.logits))
    return all(torch.equal(a, b) if node is None else torch.equal(a[-1], b[node]) for a, b in pairs)


def products(stage: Stage) -> Iterator[Row]:
    """Runs the row test on the library's products in blocks of 64 rows, as at the start of a run, and times them beside
    the fixed tiles."""
    hidden, ffn, kv, vocab = stage.pick((4096, 14_336, 1024, 128_256), (32, 48, 16, 61))
    shapes = {"q, k, v": (hidden + 2 * kv, hidden), "o": (hidden, hidden), "gate, up": (2 * ffn, hidden),
              "down": (hidden, ffn), "head": (vocab, hidden)}  # fmt: skip
    torch.manual_seed(0)
    for name, (columns, depth) in shapes.items():
        began = time.monotonic()
        found = row_test(in_blocks, Matrix(columns, depth), stage.dtype, stage.device, recorder_for)
        seconds = time.monotonic() - began
        x = torch.randn(64, depth, device=stage.device, dtype=stage.dtype)
        weight = torch.randn(columns, depth, device=stage.device, dtype=stage.dtype) * depth**-0.5
        timed = {
            "blocks us": (in_blocks, x),
            "tiles us": (linear, x),
            "tiles us, one row": (linear, x[:1].contiguous()),
        }
        us = {kind: 1e3 * stage.ms(partial(run, rows, weight, None)) for kind, (run, rows) in timed.items()}
        floor = 1e6 * weight.nbytes / stage.bandwidth
        for bits in (8, 4):
            few = packed.pack(weight, bits=bits)
            us[f"int{bits} us, one row"] = 1e3 * stage.ms(partial(packed.linear, x[:1].contiguous(), few))
            us[f"int{bits} floor us"] = 1e6 * few.nbytes / stage.bandwidth
        yield {"product": name, "rows keep their bits": not found.faults, "faults": ", ".join(found.faults),
               "bits": found.bits, "test s": seconds, **us, "floor us": floor}  # fmt: skip


def attention_variants(stage: Stage) -> Iterator[Row]:
    """Times one row and 32 in one layer by tiles, warps and stages, beside PyTorch's own, as a share of a plain read's
    bandwidth."""
    heads, kv_heads, head_dim = stage.pick((32, 8, 128), (2, 1, 16))
    default = attention.config(stage.dtype, head_dim)
    others = stage.pick(SWEPT, (Config(default.tile, 8, 1),))
    for length, rows in product(stage.pick((4096, 32_768, 100_000), (130,)), stage.pick((1, 32), (1, 9))):
        pages = -(-length // PAGE_SIZE)
        keys, values = (
            torch.randn(kv_heads, pages, PAGE_SIZE, head_dim, device=stage.device, dtype=stage.dtype) for _ in range(2)
        )
        q = torch.randn(rows, heads, head_dim, device=stage.device, dtype=stage.dtype)
        full = (length - rows) // PAGE_SIZE
        tail = np.arange(full * PAGE_SIZE, length, dtype=np.int32)[None]
        at = np.arange(length - rows, length, dtype=np.int32)
        segment = AttentionSegment(slice(0, rows), at, np.arange(full, dtype=np.int32), None, tail, True)
        flat = [part.flatten(1, 2)[None, :, :length] for part in (keys, values)]
        ideal_us = 1e6 * 2 * kv_heads * length * head_dim * stage.dtype.itemsize / stage.bandwidth
        seen = torch.arange(length, device=stage.device) <= torch.from_numpy(at).to(stage.device)[:, None]
        by_heads = q.transpose(0, 1)[None]
        theirs = partial(F.scaled_dot_product_attention, by_heads, *flat, seen if rows > 1 else None, enable_gqa=True)
        expected, us = theirs()[0].transpose(0, 1).float(), 1e3 * stage.ms(theirs)
        yield {"attention": "sdpa", "context": length, "rows": rows, "us": us, "share": ideal_us / us}
        for chosen in dict.fromkeys([default, *others]):
            name = f"triton, {chosen.tiles} x tile {chosen.tile}, {chosen.warps} warps, {chosen.stages} stages"
            with mock.patch.object(attention, "config", return_value=chosen):
                plan = TritonAttention().prepare([segment], stage.device)
                run = partial(TritonAttention().attend, plan, 0, q, keys, values)
                try:
                    error = float((run().float() - expected).abs().max() / expected.abs().max())
                    us = 1e3 * stage.ms(run)
                except triton.runtime.errors.OutOfResources as told:
                    yield {"attention": name, "context": length, "rows": rows, "note": str(told)}
                    continue
            yield {"attention": name, "context": length, "rows": rows, "us": us, "share": ideal_us / us,
                   "default": chosen == default, "ok": error < 0.03,
                   "error": error}  # fmt: skip
