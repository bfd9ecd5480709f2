"""The two experiments that time whole texts: same tokens, cells that go on, plain decoding from the middle of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import longrun
import speedup
from workloads import FreeRun

SETTINGS: dict[str, Any] = {
    "temperature": 0.9,
    "min_p": 0.05,
    "min_chapter_tokens": 12,
    "raw": True,
    "logit_bias": {"2": 9.0},
}
TALE = FreeRun("story", "the cat sat", 4 * ("a dog ran", "the end", "of the day"), SETTINGS, "")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (speedup, longrun):
        monkeypatch.setattr(module, "memory_bandwidth", lambda threads: 5e10)
        monkeypatch.setattr(module, "free_run", lambda name: TALE)
    monkeypatch.setattr("results.memory_bandwidth", lambda threads: 5e10)


def run(main: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    main()


def test_every_workload_is_raced_over_one_text(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [
        "--model", tiny_folder, "--dtype", "fp32", "--workloads", "docs,random,story", "--lengths", "70", "--new", "24",
        "--slice", "8", "--drafters", "auto,ngram,partial:64:3", "--results", tmp_path / "r", "--kept", tmp_path / "kv",
        "--threads", "1",
    ]  # fmt: skip
    run(speedup.main, monkeypatch, *flags)
    rows = json.loads((tmp_path / "r" / "speedup.json").read_text())["rows"]
    assert [row["drafter"] for row in rows] == 3 * ["auto", "ngram", "partial:64:3"]
    assert all(row["identical"] and row["speedup"] > 0 and row["ar_ms"] > 0 for row in rows)
    assert all(row["window_perplexity"] > 1 and row["bits_per_byte"] > 0 for row in rows)
    always = [row for row in rows if row["drafter"] == "partial:64:3"]
    assert all(row["drafted_a_pass"] > 1.5 for row in always)
    run(speedup.main, monkeypatch, *flags)
    assert json.loads((tmp_path / "r" / "speedup.json").read_text())["rows"] == rows, "finished cells are read back"


def test_a_kept_prefix_is_the_one_that_was_read(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swift = speedup.TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", threads=1)
    tokens, passes = [int(t) % 50 for t in np.arange(1200) ** 2], []

    def read(folder: Path | None) -> speedup.Prefix:
        prefix = speedup.Prefix(swift, tokens, 1210, 1, 8, folder)
        forward = prefix.model.forward
        monkeypatch.setattr(prefix.model, "forward", lambda *given: passes.append(1) or forward(*given))
        prefix.read(1100)
        return prefix

    fresh, computed = read(tmp_path), len(passes)
    kept = read(tmp_path)
    assert len(passes) - computed == 1 < computed
    for mine, theirs in zip(fresh.cache.pages[:17], kept.cache.pages[:17], strict=True):
        assert np.array_equal(fresh.cache.pool.dump(int(mine)), kept.cache.pool.dump(int(theirs)))


def test_texts_that_repeat_themselves_do_not_count() -> None:
    assert speedup.counts({"looping": False, "distinct_4": 0.4})
    assert not speedup.counts({"looping": True, "distinct_4": 0.9})
    assert not speedup.counts({"looping": False, "distinct_4": 0.39})


def test_a_long_run_is_compared_at_its_spots_and_goes_on(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(longrun, "MARK", 20)
    out = tmp_path / "run"
    flags = [
        "--model",
        tiny_folder,
        "--tokens",
        "80",
        "--spots",
        "4",
        "--window",
        "9",
        "--seed",
        "2",
        "--threads",
        "1",
        "--out",
        out,
        "--results",
        tmp_path / "results",
    ]
    spot, seen = longrun.spot, []

    def interrupted(*given: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return spot(*given)

    monkeypatch.setattr(longrun, "spot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(longrun.main, monkeypatch, *flags)
    run(longrun.main, monkeypatch, *flags)
    figures = json.loads((out / "longrun.json").read_text())
    assert figures["new_tokens"] == 80 and figures["forced_tokens"] > 0
    assert figures["spots_identical"] == [True] * len(figures["spots"]) and len(figures["spots"]) >= 3
    assert figures["speedup"] > 0 and len(figures["marks"]) >= 4
    shown = tmp_path / "results" / "run"
    assert json.loads((shown / "longrun.json").read_text()) == figures
    assert (shown / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert (shown / "sample.txt").read_text().startswith((out / "text.txt").read_text()[:20])
    tokens = np.load(out / "tokens.npy", allow_pickle=False)
    report = json.loads((out / "report.json").read_text())
    assert len(tokens) == 80 + figures["forced_tokens"] and report["ending"] == "length"
    assert figures["window_perplexity"] == report["window_perplexity"] and report["window_perplexity"]["windows"] == 1


def test_a_spot_that_differs_is_seen() -> None:
    assert longrun.same([5, 6, 7, 8], {"behind": 1, "tokens": [6, 7]})
    assert not longrun.same([5, 6, 7, 8], {"behind": 1, "tokens": [6, 9]})
    assert not longrun.same([5, 6], {"behind": 2, "tokens": [6]})
