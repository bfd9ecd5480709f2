"""Steps 6 to 9 of `gpu_check.py`: whole passes of the 8B shape, the loop over them, and texts of the default model."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_stage import Parts, Row, Stage, drawn_cache, drawn_pool
from tokenswift_py import TokenSwift
from tokenswift_py.checkpoints.finding import DEFAULT_MODEL
from tokenswift_py.core import Acceptance, DraftTree, Output, SamplingParams, Segment
from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.passes import without_passes
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.drafters.base import Context, Drafter, create
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.runs.audit import audit
from tokenswift_py.sampling.triton import TritonSampler
from toys import save_tiny

ROOT = Path(__file__).resolve().parent.parent


def passes(stage: Stage) -> Iterator[Row]:
    """Times passes of the whole model by rows and context, beside the time that reading their bytes takes.

    Then it lists the twelve kernels that take the most time of one pass.
    """
    contexts, counts = stage.pick((4096, 32_768, 100_000), (100,)), stage.pick((1, 8, 32, 64), (1, 2))
    parts = Parts(stage, contexts[-1] + 256)
    pool = None
    for products in ("tiles", "blocks", "library"):
        model = parts.decoder(products)
        pool = pool or drawn_pool(model)
        for length in contexts[-1:] if products == "library" else contexts:
            for count in counts:
                cache = drawn_cache(pool, model.context, length)
                ms = stage.ms(lambda: one_pass(model, cache, count))  # noqa: B023
                cache.release()
                floor = 1e3 * (parts.weight_bytes + parts.token_bytes * (length + count)) / stage.bandwidth
                yield {"products": products, "context": length, "rows": count, "ms": ms, "floor ms": floor,
                       "share": floor / ms}  # fmt: skip
        if products == "blocks":
            yield from profiled(stage, model, drawn_cache(pool, model.context, contexts[-1]), counts[1])


def one_pass(model: TorchDecoder, cache: KVCache, rows: int) -> Output:
    cache.drop_tail()
    return model.forward([Segment(DraftTree.chain(range(rows)), cache)])


def profiled(stage: Stage, model: TorchDecoder, cache: KVCache, rows: int) -> Iterator[Row]:
    gpu = stage.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA, activity.CPU] if gpu else [activity.CPU]) as profile:
        one_pass(model, cache, rows)
        if gpu:
            torch.cuda.synchronize(stage.device)
    cache.release()

    def own_us(event: Any) -> float:
        return float(event.self_device_time_total if gpu else event.self_cpu_time_total)

    for event in sorted(profile.key_averages(), key=own_us, reverse=True)[:12]:
        yield {"kernel": event.key[:60], "calls": event.count, "us": own_us(event)}


class Planted(Drafter):
    """Drafts chains of `length` tokens, each right with chance `right`. truth: the tokens of the text."""

    name = "planted"

    def __init__(self, truth: Sequence[int], right: float, length: int, vocab: int):
        self.truth, self.right, self.length, self.vocab = list(truth), right, length, vocab
        self.rng = np.random.default_rng(0)

    @without_passes
    def propose(self, context: Context, budget: int) -> DraftTree:
        at = len(context.history)
        tokens = [context.history[-1], *self.truth[at : at + min(self.length, budget - 1)]]
        wrong = self.rng.random(len(tokens)) >= self.right
        wrong[0] = False
        return DraftTree.chain((np.array(tokens) + wrong) % self.vocab)

    @without_passes
    def prefill(self, context: Context, output: Output) -> None:
        pass

    def observe(self, taken: Acceptance, output: Output) -> None:
        pass


def loop(stage: Stage) -> Iterator[Row]:
    """Times the loop after a long text that was never written.

    Keys and values are random and the same for every drafter, and no drafter may change a token. Phases are medians of
    warm rounds. The time of verify is the device's.
    """
    length, rounds = stage.pick(100_000, 130), stage.pick(40, 3)
    parts = Parts(stage, length + stage.pick(2048, 64))
    products = "tiles" if parts.blocks.verdict.faults else "blocks"  # as `--deterministic auto` chooses
    model, drafting = parts.decoder(products), parts.decoder(products, draft=True)
    pool, vocab = drawn_pool(model, 64), parts.spec.vocab_size
    prompt = np.random.default_rng(0).integers(0, vocab, length).tolist()
    base = drawn_cache(pool, model.context, length - 1)
    plain, row = written(stage, model, drafting, base, prompt, create("none"), 6 * rounds)
    yield {"drafter": "none", "products": products, **row}
    views = stage.pick((1024, 4096), (64,))
    drafters: dict[str, Drafter] = {
        "ngram": create("ngram"),
        **{f"partial, view {view}": create("partial", view_tokens=view) for view in views},
        "auto": create("cascade"),
        **{f"right {right}": Planted(prompt + plain, right, stage.pick(8, 2), vocab) for right in (0.7, 0.9)},
    }
    packed = [
        (f"partial, view {views[-1]}, int{bits}", create("partial", view_tokens=views[-1]), bits) for bits in (8, 4)
    ]
    for name, drafter, bits in (*((name, drafter, 0) for name, drafter in drafters.items()), *packed):
        fixed = drafter.length if isinstance(drafter, Planted) else None
        own = parts.decoder(products, draft=True, bits=bits) if bits else drafting  # packed weights are not kept
        tokens, row = written(stage, model, own, base, prompt, drafter, rounds, fixed)
        shared = min(len(tokens), len(plain))
        yield {"drafter": name, "ok": shared > 0 and tokens[:shared] == plain[:shared], **row}


def written(
    stage: Stage,
    model: TorchDecoder,
    drafting: TorchDecoder,
    base: KVCache,
    prompt: list[int],
    drafter: Drafter,
    rounds: int,
    draft_tokens: int | None = None,
) -> tuple[list[int], Row]:
    lines: list[dict[str, Any]] = []
    sampler = TritonSampler(SamplingParams(temperature=0.8, min_p=0.05, seed=1), model.spec.vocab_size)
    loop = DecodeLoop(
        model, drafter, sampler, Stops(10**6, ()), draft_tokens=draft_tokens, self_draft=drafting, trace=lines.append,
        cache=base.fork(),
    )  # fmt: skip
    tokens: list[int] = []
    steps = loop.run(prompt)
    for step in steps:
        tokens += step.tokens
        if len(lines) >= rounds or (len(lines) > rounds // 4 and stage.left < 0):
            break
    steps.close()
    warm = lines[min(10, len(lines) // 2) :]
    phases = {phase: statistics.median(line["ms"][phase] for line in warm) for phase in warm[0]["ms"]}
    ms = sum(sum(line["ms"].values()) for line in warm)
    made = sum(len(line["tokens"]) for line in warm)
    return tokens, {
        "rounds": len(warm), "tokens per round": made / len(warm), "rows": statistics.median(
            len(line["tree"]["tokens"]) for line in warm),
        "tokens/s": 1e3 * made / ms, **{f"{phase} ms": value for phase, value in phases.items()},
    }  # fmt: skip


SAMPLINGS: dict[str, dict[str, Any]] = {
    "0.8, min-p": {"temperature": 0.8, "min_p": 0.05},
    "greedy": {"temperature": 0.0, "min_p": 0.0},
    "top-p": {"temperature": 1.0, "top_p": 0.9, "min_p": 0.0},
    "penalty, DRY": {"temperature": 0.8, "penalty": 1.1, "dry_multiplier": 0.8, "min_p": 0.05},
}
PROMPT = "Write a long story about a lighthouse keeper who finds a letter in a bottle, chapter by chapter."


class Writer:
    """The default model, or a tiny one, and the settings of its texts."""

    def __init__(self, stage: Stage, count: int):
        self.stage, self.model = stage, DEFAULT_MODEL
        if stage.tiny:
            self.model = str(stage.scratch / "tiny")
            if not Path(self.model).exists():
                save_tiny(Path(self.model), num_hidden_layers=1, hidden_size=32, intermediate_size=32,
                          num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
        self.made = {
            "dtype": stage.pick("bf16", "fp32"), "engine": "torch", "attention": "triton", "device": str(stage.device),
        }  # fmt: skip
        self.settings = {"max_new_tokens": count, "seed": 1, "ignore_eos": True, "on_loop": "ignore", "raw": stage.tiny}
        self.prompt = stage.pick(PROMPT, "the cat")

    def swift(self, **changes: Any) -> TokenSwift:
        return TokenSwift.from_pretrained(self.model, **{**self.made, **changes})

    def text(self, swift: TokenSwift, drafter: str, **sampling: Any) -> tuple[list[int], float]:
        """Writes a text. Returns its tokens and the tokens per second."""
        result = swift.generate(self.prompt, drafter=drafter, **self.settings, **sampling)
        return result.tokens, 1e3 / result.report["ms_per_token"] if result.report["ms_per_token"] else 0.0


def texts(stage: Stage) -> Iterator[Row]:
    """Checks that no drafter, no graph and no kill changes a token of the default model's texts."""
    writer = Writer(stage, stage.pick(1500, 4))
    swift = writer.swift()
    samplings = dict(list(SAMPLINGS.items())[: stage.pick(None, 1)])
    drafters = stage.pick(("ngram", "partial", "cascade", "heads"), ("ngram",))
    first, plain_rate = writer.text(swift, "none", **SAMPLINGS["0.8, min-p"])
    yield from off_and_on(writer, swift, first)
    for name, sampling in samplings.items():
        plain, plain_rate = writer.text(swift, "none", **sampling)
        yield {"sampling": name, "drafter": "none", "ok": name != "0.8, min-p" or plain == first,
               "tokens/s": plain_rate, "speed-up": 1.0}  # fmt: skip
        for drafter in drafters:
            tokens, rate = writer.text(swift, drafter, **sampling)
            yield {"sampling": name, "drafter": drafter, "ok": tokens == plain, "tokens/s": rate,
                   "speed-up": rate / plain_rate if plain_rate else None}  # fmt: skip


def off_and_on(writer: Writer, swift: TokenSwift, plain: list[int]) -> Iterator[Row]:
    """Checks a text that was killed and resumed, its audit, and texts without graphs and over int8 keys and values."""
    folder = writer.stage.scratch / "run"
    killed(writer, folder, len(plain) // 2)
    stream = swift.resume(folder)
    recorded = len(stream.tokens)
    for _ in stream:
        pass
    yield {"what": "killed and resumed", "ok": stream.tokens == plain, "recorded": recorded, "tokens": len(plain)}
    found = audit(swift, folder)
    yield {"what": "audit", "ok": not found.faults and found.proof, "recorded": recorded, "tokens": len(plain)}
    before = os.environ.get("TOKENSWIFT_GRAPHS")
    os.environ["TOKENSWIFT_GRAPHS"] = "0"
    try:
        tokens, rate = writer.text(swift, "none", **SAMPLINGS["0.8, min-p"])
    finally:
        os.environ.pop("TOKENSWIFT_GRAPHS") if before is None else os.environ.update(TOKENSWIFT_GRAPHS=before)
    yield {"sampling": "0.8, min-p", "drafter": "none, no graphs", "ok": tokens == plain, "tokens/s": rate,
           "speed-up": None}  # fmt: skip
    int8 = writer.swift(kv_dtype="int8")
    (plain, plain_rate), (tokens, rate) = (
        writer.text(int8, drafter, **SAMPLINGS["0.8, min-p"]) for drafter in ("none", "cascade")
    )
    yield {"sampling": "0.8, min-p", "drafter": "auto, int8 KV", "ok": tokens == plain, "tokens/s": rate,
           "speed-up": rate / plain_rate if plain_rate else None}  # fmt: skip


KILLED = """
import json, os, signal, sys
sys.path[:0] = json.loads(sys.argv[1])
import interpreter
from tokenswift_py import TokenSwift
model, made, prompt, settings, folder, count = json.loads(sys.argv[2])
with TokenSwift.from_pretrained(model, **made).stream(prompt, out=folder, drafter="auto", **settings) as stream:
    for _ in stream:
        if len(stream.tokens) >= count:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(writer: Writer, folder: Path, count: int) -> None:
    """Lets a process write `count` tokens of the text into a folder, and kill itself."""
    settings = {**writer.settings, **SAMPLINGS["0.8, min-p"]}
    told = json.dumps([writer.model, writer.made, writer.prompt, settings, str(folder), count])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(sys.path), told], capture_output=True, text=True, check=False
    )
    if done.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the process that was to be killed ended by itself: {done.stderr.strip()[-2000:]}")


def long_text(stage: Stage) -> Iterator[Row]:
    """Compares a long text by plain decoding with that of the automatic drafter, token for token."""
    writer = Writer(stage, stage.pick(20_000, 5))
    swift = writer.swift()
    plain, plain_rate = writer.text(swift, "none", **SAMPLINGS["0.8, min-p"])
    yield {"drafter": "none", "ok": len(plain) == writer.settings["max_new_tokens"], "tokens/s": plain_rate,
           "speed-up": 1.0}  # fmt: skip
    tokens, rate = writer.text(swift, "auto", **SAMPLINGS["0.8, min-p"])
    yield {"drafter": "auto", "ok": tokens == plain, "tokens/s": rate,
           "speed-up": rate / plain_rate if plain_rate else None}  # fmt: skip
