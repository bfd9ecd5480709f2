"""The check of the GPU path is exercised where there is no GPU, so that no minute of a card goes into a slip."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

import gpu_check
import gpu_kernels
import gpu_pack
from interpreter import INTERPRETED
from tokenswift_py.checkpoints import finding
from tokenswift_py.checkpoints.cache import sha256
from tokenswift_py.errors import UserError

interpreted = pytest.mark.skipif(not INTERPRETED, reason="sizes for the interpreter; on a GPU: make gpu")


def checked(folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    status = gpu_check.main(["--tiny", "--results", str(folder), *flags])
    return status, json.loads((folder / "gpu-tiny.json").read_text())


def test_the_script_finds_what_it_needs_by_itself(tmp_path: Path) -> None:
    """On a bare machine: without pytest's paths, an installed package, or anything in the environment."""
    command = [sys.executable, str(Path(gpu_check.__file__)), "--tiny", "--steps", "0", "--results", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "gpu-tiny.json").read_text())["steps"]["0"]["verdict"] == "ok"


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("steps", ["0-5", "6,7", "8,9"])
def test_every_step_runs_in_tiny(tmp_path: Path, steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, record = checked(tmp_path, "--steps", steps)
    assert status == 0, capsys.readouterr().out
    assert [int(number) for number in record["steps"]] == gpu_check.numbers(steps)
    for number, step in record["steps"].items():
        assert step["verdict"] == "ok" and step["rows"], (number, step)
        assert number in ("0", "4", "6") or any(row.get("ok") for row in step["rows"]), "says whether it held"
    if steps == "0-5":
        law = [(row["keys"], row["context"]) for row in record["steps"]["3"]["rows"]]
        assert law == [("plain", 63), ("plain", 128), ("int8", 128), ("moved", 128), ("blocks", 128), ("narrow", 128)]
    if steps == "8,9":
        said = [row.get("what") or row["drafter"] for row in record["steps"]["8"]["rows"]]
        assert said == ["killed and resumed", "audit", "none, no graphs", "auto, int8 KV", "none", "ngram"]


def test_what_a_card_told_is_not_lost_to_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> gpu_check.Record:
        return gpu_check.Record(tmp_path / "gpu.json", gpu_kernels.torch.device("cpu"), False)

    record = made()
    record.steps["3"] = {"title": "law", "verdict": "ok", "seconds": 1.0, "rows": []}
    record.write()
    assert made().steps == record.steps
    monkeypatch.setattr(importlib.import_module("results"), "code_digest", lambda: "other")
    assert made().steps == {}
    (aside,) = tmp_path.glob("gpu-*.json")
    assert json.loads(aside.read_text())["steps"] == record.steps


@interpreted
def test_a_row_with_other_bits_fails_the_row_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that rounds by the number of rows is told, and where it shows."""
    from tokenswift_py.kernels.triton.ops import TritonOps

    right = TritonOps.linear
    monkeypatch.setattr(TritonOps, "linear", lambda self, x, *rest: right(self, x, *rest) * (1 + 1e-6 * (len(x) == 1)))
    stage = SimpleNamespace(pick=lambda full, tiny: tiny, tiny=True, dtype=gpu_kernels.torch.float32,
                            device=gpu_kernels.torch.device("cpu"))  # fmt: skip
    row = next(gpu_kernels.row_law(stage))  # type: ignore[arg-type]
    assert row["ok"] is False and "alone" in row["differs"]


def planned(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Steps of one's own instead of the plan's: 0, 1, 2 ... of 100 seconds each."""
    plan = tuple(gpu_check.Planned(i, name, 100, "gpu_kernels", name) for i, name in enumerate(functions))
    monkeypatch.setattr(gpu_check, "PLAN", plan)
    for name, function in functions.items():
        monkeypatch.setattr(gpu_kernels, name, function, raising=False)


def raising(stage: Any) -> Any:
    yield {"ok": True}
    raise RuntimeError("an illegal memory access")


def test_a_step_that_fails_is_told_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(monkeypatch, raises=raising, wrong=lambda stage: iter([{"ok": False}]), good=lambda stage: iter([{"x": 1}]))
    status, record = checked(tmp_path, "--steps", "0-2")
    assert status == 1
    assert [step["verdict"] for step in record["steps"].values()] == ["failed", "failed", "ok"]
    assert record["steps"]["0"]["rows"] == [{"ok": True}, {"error": "RuntimeError: an illegal memory access"}]
    assert '  0 {"ok": true}\n' in capsys.readouterr().out


def test_a_later_call_adds_its_steps_unless_something_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, one=lambda stage: iter([{"x": 1}]), two=lambda stage: iter([{"x": 2}]))
    checked(tmp_path, "--steps", "1")
    assert list(checked(tmp_path, "--steps", "0")[1]["steps"]) == ["0", "1"]
    monkeypatch.setattr(gpu_check, "card", lambda device: {"name": "another"})
    status, record = checked(tmp_path, "--steps", "0")
    assert status == 0 and list(record["steps"]) == ["0"] and record["card"] == {"name": "another"}
    assert {"torch", "triton", "transformers", "python", "cuda"} == set(record["versions"])
    assert record["schema"] == 1 and "commit" in record


def test_what_does_not_fit_the_time_is_skipped_or_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(monkeypatch, one=lambda stage: iter([{"x": 1}, {"x": 2}]))
    status, record = checked(tmp_path, "--steps", "0", "--seconds", "-1")
    assert status == 3 and record["steps"]["0"]["verdict"] == "cut short" and record["steps"]["0"]["rows"] == [{"x": 1}]
    assert checked(tmp_path, "--steps", "0") == (0, record := json.loads((tmp_path / "gpu-tiny.json").read_text()))
    assert record["steps"]["0"]["verdict"] == "ok"
    status, later = checked(tmp_path, "--steps", "0", "--seconds", "-1")
    assert status == 3 and later["steps"] == record["steps"], "what held whole is not replaced by a part"
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "card", lambda device: {"name": "a card"})
    monkeypatch.setattr(gpu_check.torch.cuda, "empty_cache", lambda: None)
    capsys.readouterr()
    assert gpu_check.main(["--results", str(tmp_path), "--steps", "0", "--seconds", "50"]) == 3
    assert "0 one: skipped, 50 s are left of 100" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"]["0"]["verdict"] == "skipped"


def test_other_tests_are_another_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, one=lambda stage: iter([{"x": 1}]), two=lambda stage: iter([{"x": 2}]))
    checked(tmp_path, "--steps", "1")
    monkeypatch.setitem(gpu_kernels.TESTS, "more", ["tests/test_triton_copies.py"])
    assert list(checked(tmp_path, "--steps", "0")[1]["steps"]) == ["0"]


STEPS = """
import sys, time
import gpu_check, gpu_kernels
gpu_check.STUCK = 3
names = ("raises", "hangs", "good")
gpu_check.PLAN = tuple(gpu_check.Planned(i, name, 0, "gpu_kernels", name) for i, name in enumerate(names))
def raises(stage):
    yield {"ok": True}
    raise RuntimeError("an illegal address")
def hangs(stage):
    time.sleep(100)
    yield {"ok": True}
gpu_kernels.raises, gpu_kernels.hangs, gpu_kernels.good = raises, hangs, lambda stage: iter([{"ok": True}])
gpu_check.usable = lambda device: False
gpu_check.__file__ = sys.argv[0]
sys.exit(gpu_check.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_what_makes_the_gpu_unusable_does_not_cost_the_other_steps(tmp_path: Path) -> None:
    """They run in a new process, and the whole is told to have failed."""
    script = tmp_path / "check.py"
    folders = [str(path) for path in (gpu_check.ROOT, gpu_check.ROOT / "experiments", *map(Path, sys.path))]
    script.write_text(f"import sys\nsys.path[:0] = {folders}\n{STEPS}")
    command = [sys.executable, str(script), "--results", str(tmp_path), "--steps", "0-2", "--seconds", "2", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    steps = json.loads((tmp_path / "gpu-tiny.json").read_text())["steps"]
    assert [step["verdict"] for step in steps.values()] == ["failed", "failed", "cut short"], "its row came, but late"
    assert steps["2"]["rows"] == [{"ok": True}]
    assert "steps 1,2 go on in a new process" in done.stdout and "steps 2 go on" in done.stdout


def test_steps_by_number_and_range() -> None:
    assert gpu_check.numbers("0-2,7") == [0, 1, 2, 7]
    assert sorted(step.number for step in gpu_check.PLAN) == list(range(10))
    first = {step.number: step.seconds for step in gpu_check.PLAN[:8]}
    assert first.keys() == set(range(8)), "the first call's come first"
    assert sum(first.values()) < 460 > sum(step.seconds for step in gpu_check.PLAN[8:])
    for wrong in ("10", "x", "", "2-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="numbers of steps and ranges"):
            gpu_check.numbers(wrong)


@interpreted
def test_without_a_gpu_it_says_so_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--steps", "0"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu_check.py: device: 'cpu' is not allowed") and len(said.splitlines()) == 1


def test_what_travels_is_put_together_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loads that each fit a transfer; the first alone brings the wheels, both the model, byte for byte."""
    model, asked = tmp_path / "m.gguf", []
    model.write_bytes(bytes(range(251)) * 3)
    monkeypatch.setattr(finding, "DEFAULT_SHA256", sha256(model))
    monkeypatch.setattr(gpu_pack, "pip", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(gpu_pack.sys, "path", [*gpu_pack.sys.path])
    packed = tmp_path / "packed"
    loads = gpu_pack.pack(packed, model)
    assert [load.name for load in loads] == ["first", "second"]
    assert asked[0][:3] == ("download", "--quiet", "--no-deps") and {"gguf", "google-crc32c"} <= set(asked[0])
    there = tmp_path / "there"
    (loads[0] / "wheels").mkdir()
    shutil.copytree(loads[0], there / "first")
    monkeypatch.setitem(gpu_pack.WHEELS, "gguf", "a_module_that_is_missing")
    told = gpu_pack.join(there)
    assert told[0] == "installed: gguf" and "no" in told[1] and asked[-1][-1] == "gguf"
    assert {"--no-index", "--find-links"} <= set(asked[-1])
    shutil.copytree(loads[1], there / "second")
    gpu_pack.join(there)
    joined = there / "site" / finding.DEFAULT_MEMBER
    assert joined.read_bytes() == model.read_bytes()
    assert finding.installed_default() == joined, "found as the installed package's, nothing is fetched"
    (there / "second" / "model").write_bytes(b"torn")
    with pytest.raises(UserError, match="SHA-256"):
        gpu_pack.join(there)


def test_a_load_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model := tmp_path / "m.gguf").write_bytes(bytes(300))
    monkeypatch.setattr(gpu_pack, "pip", lambda *arguments: None)
    monkeypatch.setattr(gpu_pack, "LIMIT", 100)
    with pytest.raises(UserError, match=r"pack: bytes of first: 150 is not allowed; less than 100"):
        gpu_pack.pack(tmp_path / "packed", model)
