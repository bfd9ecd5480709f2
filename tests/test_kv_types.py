"""The experiment on types of the KV cache, end to end, with a random model of two layers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kv_types
from gguf_files import SHAPES, write_random
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.errors import UserError
from workloads import continuation

TOKENS = 160


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, model: Path, types: str) -> list[dict[str, Any]]:
    flags = ["--dtype=fp32", "--contexts=70", "--rows=1,3", f"--tokens={TOKENS}", "--threads=1", "--rounds=1"]
    command = ["kv_types.py", f"--results={folder}", f"--model={model}", f"--types={types}", *flags]
    monkeypatch.setattr(sys, "argv", command)
    kv_types.main()
    rows: list[dict[str, Any]] = json.loads((folder / "kv_types.json").read_text())["rows"]
    return rows


def test_passes_and_a_text_are_measured_under_each_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source.gguf"
    write_random(source, SHAPES["tiny"])
    one, three, text = run(monkeypatch, tmp_path, source, "fp32,int8")
    assert (one["rows"], three["rows"]) == (1, 3)
    for row in (one, three):
        assert row["int8_times_as_fast"] == pytest.approx(row["fp32_ms"] / row["int8_ms"], rel=0.01)
    tokens = continuation("docs", open_checkpoint(str(source), None, "fp32").tokenizer(), TOKENS).tokens
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32).eval()
    with torch.inference_mode():
        loss = float(model(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss)
    assert text["fp32_perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert 0 < abs(text["int8_percent"]) < 2


def test_a_type_that_is_not_known_ends_it(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="types: 'int4' is not allowed; known are"):
        run(monkeypatch, tmp_path, tmp_path, "bf16,int4")
