"""experiments/memory.py on the tiny model: its cells are what runs of these options read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import memory
from experiment_runs import runner
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.checkpoints.checkpoint import fingerprint
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.options import Options
from tokenswift_py.remembering.gates import Gates, gates_file, write_gates
from workloads import continuation

LENGTH = 780


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path))
    flags = ["--texts", "docs", "--lengths", str(LENGTH), "--budgets", "256", "--engine", "torch"]
    return runner(memory, tiny_folder, tmp_path, monkeypatch, *flags)


def test_each_kind_is_read_and_left_out_where_it_cannot_be(
    run: Any, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row["kind"]: row for row in run("--kinds", "full,recent,linear,performer+mass,infini")}
    assert set(rows) == {"full", "recent", "linear", "performer+mass"}
    assert "left out: infini of 780 tokens: kv_gates" in capsys.readouterr().out
    assert len({row["nats"] for row in rows.values()}) == 4
    assert rows["recent"]["memory_bytes"] == 0 < rows["linear"]["memory_bytes"] < rows["performer+mass"]["memory_bytes"]
    assert rows["full"]["held_bytes"] == LENGTH // 64 * rows["recent"]["held_bytes"] // 4
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine="torch")
    tokens = continuation("docs", swift.tokenizer, LENGTH).tokens
    told = swift.generate(tokens, max_new_tokens=1, prompt_logprobs=0, kv_budget=256, kv_memory="linear", raw=True)
    assert told.prompt_logprobs is not None
    last = [entry[0] for entry in told.prompt_logprobs[-memory.SPAN :] if entry is not None]
    assert math.isclose(-sum(last) / memory.SPAN, rows["linear"]["nats"], rel_tol=1e-3)


def test_other_gates_are_another_cell(run: Any, tiny_folder: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_folder))
    shape, model = (checkpoint.spec.layers, checkpoint.spec.heads), fingerprint(checkpoint)
    rows = []
    for beta in (-4.0, 4.0):
        write_gates(Gates(torch.full(shape, beta), "infini", model), gates_file(checkpoint, "infini"))
        rows += run("--kinds", "infini")
    assert len({row["gates"] for row in rows}) == len({row["nats"] for row in rows}) == 2
    assert all(row["gates"] in row["label"] for row in rows)


def test_tables_are_no_longer_than_the_text(tiny_folder: Path) -> None:
    """At the model's own length it is read as trained: a page more would have stretched its positions."""
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine="torch")
    for length, rows in ((1000, 1024), (1024, 1024), (1025, 2048)):
        assert len(memory.tables(swift, Options(positions="linear"), length).cos) == rows


def test_nothing_to_read_is_a_table_without_rows(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--kinds", "infini") == []
    assert "left out: infini of 780 tokens: kv_gates" in capsys.readouterr().out


def test_pass_keys_are_asked_for_behind_the_budget(run: Any) -> None:
    (row,) = run("--passkeys", "1900", "--kinds", "performer", "--positions", "trained")
    assert 0 <= row["found"] <= 9 and len(row["by_depth"]) == 9 and row["nats"] > 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--kinds", "lstm"], "kinds: 'lstm' .* performer"),
        (["--kinds", "recent+mass"], "kinds"),
        (["--texts", "news"], "texts: 'news'"),
        (["--budgets", "512"], "budgets: 512"),
    ],
)
def test_wrong_flags_are_refused(run: Any, flags: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(*flags)
