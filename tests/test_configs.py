"""A config that was kept is what transformers makes of the file. A process that finds one imports no family's class."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from conftest import FAMILIES, tiny_config
from tokenswift_py.checkpoints import loading
from tokenswift_py.checkpoints.loading import read_config
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec

ROOT = Path(__file__).parents[1]
ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 128, "rope_theta": 500000.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "configs"


def folder_of(tmp_path: Path, config: Any) -> Path:
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    return folder


def read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads a config that must have been kept."""
    with monkeypatch.context() as patch:
        patch.setattr(loading, "transformers_config", None)
        return read_config(folder)


def assert_alike(found: Any, expected: Any) -> None:
    spec = ModelSpec.from_config(expected)
    assert ModelSpec.from_config(found) == spec
    for context in (64, 3000):
        ours, theirs = rope_tables(found, context), rope_tables(expected, context)
        assert (ours.label, ours.positions, ours.note) == (theirs.label, theirs.positions, theirs.note)
        assert torch.equal(ours.cos, theirs.cos) and torch.equal(ours.sin, theirs.sin)
        assert (ours.local is None) == (theirs.local is None)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_of_every_family_is_all_that_is_read(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, tiny_config(family))
    theirs = AutoConfig.from_pretrained(folder)
    for found in (read_config(folder), read_again(folder, monkeypatch)):
        assert_alike(found, theirs)
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert found.model_type == stored["model_type"]
        for name in stored.keys() - {"dtype", "transformers_version", "model_type", "_sliding_window_pattern"}:
            assert getattr(found, name) == getattr(theirs, name), name


@pytest.mark.parametrize("kind", ROPES)
def test_tables_that_a_config_asks_for(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, tiny_config(rope_parameters=ROPES[kind]))
    read_config(folder)
    assert_alike(read_again(folder, monkeypatch), AutoConfig.from_pretrained(folder))


def test_fields_that_a_file_leaves_out_have_the_familys_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, tiny_config("qwen3"))
    path = folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    for name in ("head_dim", "rms_norm_eps", "rope_parameters", "layer_types"):
        del stored[name]
    path.write_text(json.dumps(stored), encoding="utf-8")
    read_config(folder)
    found, theirs = read_again(folder, monkeypatch), AutoConfig.from_pretrained(folder)
    assert (found.head_dim, found.rms_norm_eps, found.rope_parameters["rope_theta"]) == (128, 1e-6, 10000.0)
    assert_alike(found, theirs)


def test_a_file_that_changed_is_read_anew(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, tiny_config())
    assert read_config(folder).rms_norm_eps != 0.125
    path = folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(stored | {"rms_norm_eps": 0.125}), encoding="utf-8")
    assert read_config(folder).rms_norm_eps == 0.125
    assert len(list(own_cache.iterdir())) == 2
    monkeypatch.setattr("transformers.__version__", "5.999")
    read_config(folder)
    assert len(list(own_cache.iterdir())) == 3


@pytest.mark.parametrize("left", ["", "{", "[1, 2]", "\x80"])
def test_a_kept_file_that_is_damaged_is_made_anew(tmp_path: Path, own_cache: Path, left: str) -> None:
    folder = folder_of(tmp_path, tiny_config())
    read_config(folder)
    (path,) = own_cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(left.encode("latin1"))
    assert_alike(read_config(folder), AutoConfig.from_pretrained(folder))
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "file"))
    folder = folder_of(tmp_path, tiny_config())
    assert_alike(read_config(folder), AutoConfig.from_pretrained(folder))


LOOK = """
import sys
from tokenswift_py.checkpoints.loading import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
tokens = checkpoint.tokenizer()("the cat")["input_ids"]
print(tokens, "transformers.activations" in sys.modules)
"""


def test_a_second_process_imports_no_class_of_a_family(tiny_folder: Path) -> None:
    """Nor does its tokenizer. Each of them brings transformers.activations, and half of torch with it."""
    run = [sys.executable, "-c", LOOK, str(tiny_folder)]
    first, second = (
        subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ).stdout
        for _ in range(2)
    )
    assert first.split("]")[1].strip() == "True"
    assert second.split("]")[1].strip() == "False"
    assert first.split("]")[0] == second.split("]")[0]
