"""Choices of pages by a row's own query: each summary of keys against attention itself, where it can say all of it."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import own_query
import recall
from experiment_runs import runner
from speedup import Prefix
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.drafters.base import committed
from tokenswift_py.extending.human import continuation
from tokenswift_py.kvcache.base import PAGE_SIZE

LAYERS, KV_HEADS, GROUP, DIM = 2, 1, 3, 16


def summaries_of(keys: torch.Tensor) -> own_query.Summaries:
    """Returns the summaries of keys [layers, kv_heads, pages, PAGE_SIZE, d]."""
    pool = SimpleNamespace(layers=LAYERS, page_keys=lambda layer, places: keys[layer][:, torch.from_numpy(places)])
    summaries = own_query.Summaries()
    for full in (1, keys.shape[2]):  # in two steps, as a text grows
        summaries.read(SimpleNamespace(pool=pool, pages=np.arange(keys.shape[2]), full_pages=full))
    return summaries


def exact(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Returns the log of the attention weight of each page, [layers, kv_heads, group, pages]."""
    return torch.einsum("lhgd,lhpkd->lhgpk", queries.double(), keys.double()).logsumexp(-1)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "distinct"),
    [
        ("mean", 1), ("spread", 1), ("parts", 4), ("parts, spread", 4), ("centroids 2", 2), ("centroids 4", 4),
        ("centroids 4", 1), ("centroids 4", 2),
    ],
)  # fmt: skip
def test_keys_that_a_summary_can_hold_are_estimated_exactly(name: str, distinct: int) -> None:
    """A page has so many different keys, each of them in a run of its own."""
    keys = drawn(LAYERS, KV_HEADS, 5, distinct, DIM).bfloat16().float()  # centroids are kept in bf16
    keys = keys.repeat_interleave(PAGE_SIZE // distinct, 3)
    queries = drawn(LAYERS, KV_HEADS, GROUP, DIM, seed=1)
    summaries, pages = summaries_of(keys), np.array([4, 0, 3], np.int32)
    logs = summaries.logs(name, queries, pages)
    assert (logs - exact(queries, keys)[..., [4, 0, 3]]).abs().max() < 1e-4
    if distinct > 1:
        assert (summaries.logs("mean", queries, pages) - logs).abs().max() > 0.1


@pytest.mark.parametrize("name", ["spread", "parts, spread"])
def test_the_spread_is_that_of_keys_drawn_from_a_normal_distribution(name: str) -> None:
    """There the mean of exp(q.k) is exp(q.m + variance / 2), up to chance: 64 keys are off by 0.05 nats on average."""
    keys = 0.5 * drawn(LAYERS, KV_HEADS, 40, PAGE_SIZE, DIM)
    queries = 0.4 * drawn(LAYERS, KV_HEADS, GROUP, DIM, seed=1)
    summaries, pages = summaries_of(keys), np.arange(40, dtype=np.int32)
    off = {n: (summaries.logs(n, queries, pages) - exact(queries, keys)).abs().mean() for n in ("mean", name)}
    assert off[name] < 0.08 < 0.2 < off["mean"]


@pytest.mark.parametrize("size", [16, 64])
def test_a_large_spread_is_what_the_largest_of_so_few_numbers_is_worth(size: int) -> None:
    """Against the mean over many draws. It is up to half a deviation lower, since so few numbers seldom reach as far as
    the limit for many says. Half the variance alone would be off by 6 nats and more."""
    x = drawn(20_000, size).double()
    for deviation in (1.0, 2.0, 4.0, 6.0):
        true = (torch.logsumexp(deviation * x, -1) - math.log(size)).mean()
        half = torch.tensor(deviation**2 / 2)
        assert float(own_query.spread(half, size)) == pytest.approx(float(true), abs=0.6 * deviation)
    assert half - true > 6


@pytest.fixture(scope="module")
def sharp_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with sharp attention: most of a row's mass lies on a few keys."""
    folder = tmp_path_factory.mktemp("sharp") / "model"
    shutil.copytree(tiny_folder, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: 12 * t if "q_proj.weight" in name else t for name, t in tensors.items()}, file)
    return folder


@pytest.fixture
def run(sharp_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    flags = ["--workloads", "docs", "--lengths", "700", "--views", "256,384", "--measured", "16", "--seen", "100"]
    return runner(own_query, sharp_folder, tmp_path, monkeypatch, *flags)


def test_no_choice_keeps_more_than_the_rows_own_mass(run: Any, tmp_path: Path) -> None:
    rows = {(row["choice"], row["view"]): row for row in run()}
    pages, page = 692 // PAGE_SIZE, PAGE_SIZE * 16 * 2 * 4  # full ones, and bytes of one for a layer and KV head
    vector = 2 * 8  # head_dim 8 in bf16
    read = {
        "held": 0, "fresh": 0, "last": 0, "true": 0, "mean": vector, "spread": 2 * vector, "parts": 4 * vector,
        "parts, spread": 8 * vector, "centroids 2": 2 * (vector + 1), "centroids 4": 4 * (vector + 1),
    }  # fmt: skip
    read |= {f"{name} + held": read[name] for name in ("spread", "centroids 4", "parts, spread")}
    assert {choice for choice, _ in rows} == set(read)
    for (choice, view), row in rows.items():
        assert 0 < row["kept"] <= rows["true", view]["kept"] < 1
        share = (view // PAGE_SIZE * page + pages * read[choice]) / (pages * page)
        assert row["read_of_whole"] == pytest.approx(share, abs=1e-4)
    assert all(rows[choice, 256]["kept"] < rows[choice, 384]["kept"] for choice in read)
    assert (tmp_path / "own_query.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_product_does_is_recalls_mass(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {row["view"]: row["kept"] for row in run() if row["choice"] == "held"}
    monkeypatch.setattr(sys, "argv", ["recall.py", *sys.argv[1:], "--policies", "mass"])
    recall.main()
    rows = json.loads((tmp_path / "recall.json").read_text())["rows"]
    assert held == {row["view"]: row["later"] for row in rows if row["policy"] == "mass"}


@pytest.mark.parametrize("length", [700, 1500])
def test_with_a_run_for_each_key_the_estimate_is_the_truth(
    sharp_folder: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the trained length (1 024), too, where far pages are met by queries that were turned for them."""
    monkeypatch.setattr(own_query, "PARTS", PAGE_SIZE)
    monkeypatch.setattr(own_query, "KEPT", torch.float32)
    swift = TokenSwift.from_pretrained(str(sharp_folder), dtype="fp32", threads=1)
    tokens = continuation("docs", swift.tokenizer, length).tokens
    prefix = Prefix(swift, tokens, length, 0, 0)
    prefix.read(length - 10)
    cache, full = prefix.cache, prefix.cache.full_pages
    summaries = own_query.Summaries()
    summaries.read(cache)
    segment = Segment(DraftTree.chain(tokens[cache.length :]), cache, causal=True)
    learnt = committed(prefix.model.forward([segment], [], True, True), range(10), cache.length)
    assert learnt.mass is not None and (learnt.turns is not None) == (length > 1024)
    for row in (0, 9):
        found = own_query.shares(summaries, "parts", learnt, row, own_query.tail_keys(cache), full)
        assert np.abs(found - learnt.mass[:, row, :, :full]).max() < 1e-4
        rough = own_query.shares(summaries, "mean", learnt, row, own_query.tail_keys(cache), full)
        assert np.abs(rough - found).max() > 0.05


def test_what_cannot_be_measured_is_refused(run: Any) -> None:
    for flags, says in [
        (["--views", "600"], "views: 600 is not allowed; at most"),
        (["--measured", "12"], "measured: 12 is not allowed"),
        (["--seen", "0"], "seen: 0 is not allowed"),
        (["--workloads", "story"], "workloads: 'story' is not allowed"),
    ]:
        with pytest.raises(UserError, match=says):
            run(*flags)
