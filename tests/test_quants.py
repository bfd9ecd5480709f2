"""The experiment on GGUF files in llama.cpp's types, end to end, with random models of two layers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import quants
from gguf_files import MIXES, SHAPES, vocabulary, write_random
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.errors import UserError
from workloads import continuation

TOKENS = 160
SETTINGS = {
    "made": "tiny", "types": "Q8_0,Q4_K_M", "dtypes": "gguf,fp32", "contexts": "40", "rows": "1,3", "prefill": "30",
    "tokens": str(TOKENS), "threads": "1", "rounds": "1",
}  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, **settings: str) -> list[dict[str, Any]]:
    flags = [f"--{name}={value}" for name, value in {**SETTINGS, **settings}.items()]
    monkeypatch.setattr(sys, "argv", ["quants.py", f"--results={folder}", *flags])
    quants.main()
    rows: list[dict[str, Any]] = json.loads((folder / "quants.json").read_text())["rows"]
    return rows


def test_files_are_made_read_and_timed_here_and_in_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexities are those of transformers on the same file, and of llama.cpp."""
    pytest.importorskip("llama_cpp", reason="pip install 'tokenswift-py[peers]'")
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    cache = tmp_path / "cache"
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(cache))
    source = tmp_path / "source.gguf"
    write_random(source, SHAPES["tiny"])
    rows = run(monkeypatch, tmp_path, model=str(source))
    passed, prefilled, *typed = rows[:4]
    assert passed["stored"].startswith("Q4_K ") and "Q6_K" in passed["stored"] and passed["context"] == 40
    assert prefilled["prefill"] == 30 and all(row["ms"] > 0 and row["llama_cpp_ms"] > 0 for row in rows[:4])
    assert [path.name for path in cache.glob("*.*")] == ["made-tiny-Q4_K_M.gguf"]  # neither its source nor the types'
    assert [row["type"] for row in typed] == ["Q8_0", "Q4_K_M"] and typed[0]["stored"] == "Q8_0 100 %"
    for row in typed:
        assert row["perplexity_fp32"] == pytest.approx(row["perplexity_llama_cpp"], rel=0.01)
        assert row["perplexity_gguf"] == pytest.approx(row["perplexity_fp32"], rel=0.01)
        assert row["within_goal"] == (abs(row["perplexity_gguf"] / row["perplexity_fp32"] - 1) <= 0.005)
    one, three, blocks, exact = rows[4:8]
    assert (one["rows"], three["rows"]) == (1, 3) and all(row["gguf_ms"] > 0 < row["fp32_ms"] for row in (one, three))
    assert (blocks["dtype"], exact["dtype"]) == ("gguf", "fp32") and blocks["weights_mb"] < exact["weights_mb"] / 3

    tokens = torch.tensor([continuation("docs", open_checkpoint(str(source), None, "fp32").tokenizer(), TOKENS).tokens])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32).eval()
    with torch.inference_mode():
        loss = float(model(tokens, labels=tokens).loss)
    assert exact["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert len({row["perplexity_fp32"] for row in typed} | {exact["perplexity"]}) == 3


@pytest.mark.parametrize(("flag", "value"), [("types", "Q4_0,Q9"), ("parts", "all"), ("dtypes", "fp8"), ("made", "x")])
def test_names_that_are_not_known_end_it_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, value: str
) -> None:
    with pytest.raises(UserError, match=f"{flag}: '.*' is not allowed; known are"):
        run(monkeypatch, tmp_path, **{flag: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [300, 66_000])
def test_a_made_vocabulary_has_each_token_once_and_a_merge_for_each(size: int) -> None:
    tokens, merges = vocabulary(size)
    assert len(tokens) == len(set(tokens)) == size and len(merges) == size - 258
    known = set(tokens)
    assert all({*merge.split(" "), merge.replace(" ", "")} <= known for merge in merges)


def test_llama_cpp_has_a_mix_of_each_name() -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install 'tokenswift-py[peers]'")
    assert all(hasattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix}") for mix in MIXES)
