"""Memory over long runs and many of them, each in a process of its own: what grows is accounted for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from served import surroundings

KIB = 1024

SAMPLER = """
import gc, json, sys
import psutil, torch
from tokenswift_py import TokenSwift
torch.set_num_threads(1)
model, engine, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
swift = TokenSwift.from_pretrained(model, dtype="fp32", engine=engine, threads=1)
process, samples = psutil.Process(), []

def sample(at):
    gc.collect()
    samples.append((at, process.memory_info().rss, len(gc.get_objects())))
"""
ONE_RUN = """
with swift.stream("the cat", ignore_eos=True, seed=1, on_loop="ignore", **settings) as stream:
    for _ in stream:
        if len(stream.tokens) >= 500 * (len(samples) + 1):
            sample(len(stream.tokens))
print(json.dumps([samples, swift.kv_bytes(64 * 1000) / 64]))
"""
MANY_RUNS = """
for number in range(80):
    drafter = ("none", "ngram", "partial", "cascade")[number % 4]
    swift.generate("the cat " * (1 + number % 7), ignore_eos=True, seed=number, drafter=drafter, **settings)
    if number % 4 == 3:
        sample(number + 1)
print(json.dumps([samples, 0]))
"""


def sampled(code: str, *arguments: str) -> tuple[np.ndarray, float]:
    """[n, 3]: where a sample was taken, resident bytes, Python objects; and what the code says beside them."""
    done = subprocess.run(
        [sys.executable, "-c", SAMPLER + code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=surroundings(),
    )
    samples, other = json.loads(done.stdout)
    return np.array(samples, np.float64), other


def slope(samples: np.ndarray, column: int) -> float:
    """Returns the slope of a straight line through the later three quarters, after what is made once."""
    later = samples[len(samples) // 4 :]
    return float(np.polyfit(later[:, 0], later[:, column], 1)[0])


# What 1 000 tokens may take beyond their KV: the text itself, its statistics, and a drafter's index of it.
@pytest.mark.soak
@pytest.mark.parametrize(("drafter", "most"), [("none", 64 * KIB), ("ngram", 768 * KIB), ("cascade", 1024 * KIB)])
@pytest.mark.parametrize("kv_budget", [None, 512])
def test_memory_is_steady_over_20_000_tokens(
    tiny_folder: Path, drafter: str, most: int, kv_budget: int | None, record_property: Any
) -> None:
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    settings = {"max_new_tokens": 20_000, "context": 20_200, "drafter": drafter, "kv_budget": kv_budget}
    samples, kv = sampled(ONE_RUN, str(tiny_folder), "native", json.dumps(settings))
    grown, pages = 1000 * slope(samples, 1), 0 if kv_budget else kv
    record_property("resident bytes per 1000 tokens", grown)
    print(f"{drafter}, budget {kv_budget}: {grown / KIB:.0f} KiB a 1000 tokens, KV {pages / KIB:.0f} KiB among it")
    # The native engine maps pages in slabs, so that a short run's may be there from the first token on.
    assert len(samples) == 40 and grown < pages + most


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_many_runs_leave_nothing_behind(tiny_folder: Path, engine: str) -> None:
    if engine == "native":
        pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    samples, _ = sampled(MANY_RUNS, str(tiny_folder), engine, json.dumps({"max_new_tokens": 100, "context": 400}))
    grown, objects = slope(samples, 1), slope(samples, 2)
    print(f"{engine}: {grown / KIB:.1f} KiB and {objects:.1f} objects a run")
    assert grown < 32 * KIB and objects < 2
