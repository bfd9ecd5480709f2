"""Folders of drafts that read a model's states: which drafter a folder is for, its config and its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open

from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.checkpoints.stored_tensors import STORED
from tokenswift_py.drafters.base import Resources
from tokenswift_py.errors import check, one_line

T = TypeVar("T")

FIELD = "draft_heads"
NAMED = {"eagle": re.compile(r"eagle-?3", re.IGNORECASE), "dflash": re.compile(r"DFlashDraftModel")}


def config_of(path: str | None) -> dict[str, Any] | None:
    """Returns the config.json of a folder, None where `path` names no folder with one. Raises UserError."""
    if path in (None, "auto"):
        return None
    assert path is not None
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        return None
    with one_line(f"{FIELD}: {file} is not a readable config"):
        config = json.loads(file.read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}


def drafter_of(path: str | None) -> str | None:
    """Returns the drafter, eagle or dflash, that the config of a folder is for. None for anything else."""
    config = config_of(path)
    if config is None:
        return None
    names = [str(name) for name in config.get("architectures") or []] + [str(config.get("speculators_model_type", ""))]
    for drafter, pattern in NAMED.items():
        if any(pattern.search(name) for name in names):
            return drafter
    plain = "draft_vocab_size" in config and not names[-1]  # SafeAILab's own say nothing else
    return "eagle" if plain else None


def folder_for(drafter: str, path: str) -> Path:
    """Returns the folder that `path` names. Raises UserError where it is not one for this drafter."""
    kind = {"eagle": "an EAGLE-3 draft's", "dflash": "a DFlash draft's"}[drafter]
    check(drafter_of(path) == drafter, FIELD, path, f"for drafter {drafter} a folder whose config.json is {kind}")
    return Path(path).expanduser()


def key_of(folder: Path) -> str:
    """Returns a name for a folder's contents, which is another when a file has changed."""
    return str(sorted((str(file), file.stat().st_mtime_ns) for file in folder.iterdir()))


def shared(drafter: str, folder: Path, resources: Resources, read: Callable[[Path, Checkpoint], T]) -> T:
    """Returns what `read` makes of a drafter's folder. Texts of one model share it."""
    key = f"{drafter} {key_of(folder)}"
    if key not in resources.kept:
        resources.kept[key] = read(folder, resources.checkpoint)
    found: T = resources.kept[key]
    return found


def whole(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Returns a whole number above 0 of a config. Raises UserError for anything else."""
    value = fields.get(name)
    value = default if value is None else value
    fine = isinstance(value, int) and not isinstance(value, bool) and value > 0
    check(fine, f"{FIELD}: {name} of config.json", value, "a whole number above 0")
    assert value is not None
    return value


def checked_layer(fields: Mapping[str, Any]) -> float:
    """Returns the epsilon of a decoder layer's norms. Raises UserError for a layer that is not computed here."""
    act = fields.get("hidden_act", "silu")
    check(act == "silu", f"{FIELD}: hidden_act", act, "only silu")
    heads = whole(fields, "num_attention_heads")
    kv_heads = whole(fields, "num_key_value_heads", heads)
    check(heads % kv_heads == 0, f"{FIELD}: num_key_value_heads", kv_heads, f"a divisor of {heads} heads")
    eps = fields.get("rms_norm_eps", 1e-6)
    check(isinstance(eps, float) and 0 < eps < 1, f"{FIELD}: rms_norm_eps", eps, "a small number above 0")
    return float(eps)


def checked_taps(taps: tuple[int, ...], count: int, layers: int) -> tuple[int, ...]:
    """Returns the layers of the model whose inputs a draft reads. Raises UserError unless they are `count` that
    ascend."""
    fine = len(taps) == count and list(taps) == sorted(set(taps)) and taps[0] >= 0 and taps[-1] < layers
    allowed = f"{count} that ascend, of 0 to {layers - 1}"
    check(fine, f"{FIELD}: layers that the draft reads", list(taps), allowed)
    return taps


def rope_config(fields: Mapping[str, Any]) -> Any:
    """Returns a config of transformers with the RoPE of a draft. Raises UserError."""
    from transformers import AutoConfig

    names = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling",
             "rope_parameters")  # fmt: skip
    given = {name: fields[name] for name in names if fields.get(name) is not None}
    with one_line(f"{FIELD}: config.json names no RoPE that is known"):
        return AutoConfig.for_model("llama", **given)


def stored_tensors(
    folder: Path, named: Callable[[str], str], unread: re.Pattern[str], integers: tuple[str, ...] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a folder's safetensors files. Raises UserError.

    named: function from a stored name to ours. unread: our names that are left out. integers: those of whole numbers.
    """
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt") for path in folder.glob(pattern))
    convert = "save its tensors with safetensors.torch.save_file as model.safetensors"
    why = f"{pickles[0]} is a pickle and is not read: {convert}" if pickles else "it needs *.safetensors"
    check(bool(files), FIELD, str(folder), why)
    seen: set[str] = set()
    for file in files:
        with one_line(f"{FIELD}: {file.name} is not a readable safetensors file"), safe_open(file, "pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                name = named(stored)
                if unread.fullmatch(name):
                    continue
                check(name not in seen, f"{FIELD}: tensor", stored, "it must be there once")
                seen.add(name)
                kind = tensors.get_slice(stored).get_dtype()
                fine = kind in STORED or name in integers
                check(fine, f"{FIELD}: type of tensor {stored}", kind, f"one of {', '.join(STORED)}")
                yield name, tensors.get_tensor(stored)


def check_tensors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError unless these are the tensors of a draft, of finite numbers."""
    for name in sorted(found.keys() - wanted.keys()):
        check(False, f"{FIELD}: tensor", name, "no draft of this config has it")
    for name, size in wanted.items():
        check(name in found, f"{FIELD}: tensor {name}", None, "the safetensors files must hold it")
        tensor = found[name]
        check(tuple(tensor.shape) == size, f"{FIELD}: tensor {name}", tuple(tensor.shape), f"it must be {size}")
        fine = tensor.dtype.is_floating_point and bool(torch.isfinite(tensor).all())
        check(fine, f"{FIELD}: tensor {name}", str(tensor.dtype), "it must hold finite floating-point numbers")
