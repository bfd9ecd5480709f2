"""experiments/memory.py on the tiny model: its cells are what runs of these options read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import memory
from experiment_runs import runner
from tokenswift_py import TokenSwift, UserError
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
