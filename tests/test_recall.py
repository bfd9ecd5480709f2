"""Recall by policy: which share of the true mass a choice of pages keeps, and which bytes it is counted to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recall
from experiment_runs import runner
from tokenswift_py import UserError
from tokenswift_py.kvcache.base import PAGE_SIZE

LAYERS, KV_HEADS, HEAD_DIM, PADDED = 3, 2, 8, 16  # of the tiny model, and of its heads in memory


def test_the_share_is_of_the_chosen_pages_and_of_what_is_behind_the_full_ones() -> None:
    mass = np.zeros((2, 2, 1, 5))  # [layers, rows, kv_heads, pages]
    mass[0, 0, 0] = [1, 2, 3, 4, 0]
    mass[0, 1, 0] = [1, 0, 0, 0, 1]
    mass[1, 0, 0] = [0, 0, 0, 0, 2]
    mass[1, 1, 0] = [0, 1, 3, 0, 0]
    chosen = np.array([[[0, 2]], [[1, 3]]])
    assert recall.kept(mass, chosen, 4) == [pytest.approx((0.4 + 1) / 2), pytest.approx((1 + 0.25) / 2)]
    assert recall.kept(mass, np.arange(4)[None, None].repeat(2, 0), 4) == [1, 1]
    assert recall.kept(mass, np.array([[[0, 1]], [[0, 2]]]), 3) == [pytest.approx((0.7 + 1) / 2), pytest.approx(0.875)]


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    flags = ["--workloads", "docs", "--lengths", "700", "--views", "128,256", "--measured", "16", "--seen", "100"]
    return runner(recall, tiny_folder, tmp_path, monkeypatch, *flags)


def test_no_policy_beats_the_best_choice_and_bytes_are_what_is_read(run: Any, tmp_path: Path) -> None:
    rows = {(row["policy"], row["view"]): row for row in run("--policies", "recent,mass,quest,importance,clusters")}
    pages = 692 // PAGE_SIZE  # full ones before the last pass
    heads, page = LAYERS * KV_HEADS, LAYERS * KV_HEADS * PAGE_SIZE * PADDED * 2 * torch.float32.itemsize
    by_policy = {
        "recent": 0, "mass": 0, "best": 0, "quest": heads * pages * 2 * HEAD_DIM * 4,
        "importance": pages * page // 2, "clusters": heads * (pages * 4 * 2 * HEAD_DIM + 2 * 4 * 4 * 4 + 2 * 4),
    }  # fmt: skip
    for (policy, view), row in rows.items():
        assert 0 < row["alike"] <= 1 and 0 < row["later"] <= 1
        assert row["own"] <= rows["best", view]["own"]
        assert row["chosen_by_bytes"] == by_policy[policy]
        assert row["view_bytes"] == view // PAGE_SIZE * page
        assert row["read_of_whole"] == pytest.approx((by_policy[policy] + row["view_bytes"]) / (pages * page), abs=1e-3)
    assert all(rows[policy, 128]["own"] < rows[policy, 256]["own"] for policy in by_policy)
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_refused(run: Any) -> None:
    for flags, says in [
        (["--policies", "oldest"], "policies: 'oldest' is not allowed"),
        (["--views", "600"], "views: 600 is not allowed; at most"),
        (["--measured", "12"], "measured: 12 is not allowed"),
        (["--seen", "0"], "seen: 0 is not allowed"),
        (["--workloads", "story"], "workloads: 'story' is not allowed"),
    ]:
        with pytest.raises(UserError, match=says):
            run(*flags)
