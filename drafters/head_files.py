"""Files of draft heads: our own, those in the package, and those of Medusa and TokenSwift, which are converted once."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from tokenswift_py.checkpoints.cache import WRITABLE, cache_folder
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.checkpoints.checkpoint import fingerprint as fingerprint
from tokenswift_py.drafters.head_weights import FORMS, HeadWeights, check_shapes
from tokenswift_py.errors import UserError, check, files, one_line

logger = logging.getLogger("tokenswift")

FORMAT = "tokenswift-heads"
VERSION = 1
PACKAGED = Path(__file__).parent / "data"


def find_heads(checkpoint: Checkpoint, path: str | None = None) -> HeadWeights:
    """Reads the file that `find_file` finds, and checks it against the model. Raises UserError."""
    return read_for(checkpoint, find_file(checkpoint, path))


def read_for(checkpoint: Checkpoint, file: Path) -> HeadWeights:
    weights = read_heads(file)
    check_shapes(weights, checkpoint.spec)
    if weights.model not in (None, fingerprint(checkpoint)):
        logger.warning("%s was made for another model of the same shape: its drafts may be poor", file.name)
    return weights


def find_file(checkpoint: Checkpoint, path: str | None = None) -> Path:
    """Returns the file of ours that has the heads. Raises UserError.

    path: a file of ours, or a file or folder with heads of Medusa or TokenSwift (.safetensors, .pt, .bin), which is
          converted once into the cache. "auto" and None look for heads that were trained for this model, in the cache
          and in the package.
    """
    if path in (None, "auto"):
        found = [file for file in heads_files(checkpoint) if file.is_file()]
        advice = f"train them (tokenswift train-heads --model {checkpoint.name}) or name a file"
        check(bool(found), "draft_heads", path, f"there are none for {checkpoint.name}: {advice}")
        return found[0]
    assert path is not None
    file = Path(path).expanduser()
    check(file.exists(), "draft_heads", path, "an existing file or folder")
    return file if is_ours(file) else convert(file, checkpoint)


def heads_files(checkpoint: Checkpoint) -> list[Path]:
    """Returns the files where heads for a model are looked for. Those that were trained here come first."""
    key = fingerprint(checkpoint)
    return [heads_file(folder, key) for folder in (cache_folder(), PACKAGED)]


def heads_file(folder: Path, key: str) -> Path:
    """Returns the file where heads for the model of this fingerprint lie."""
    return folder / f"heads-{key}.safetensors"


def is_ours(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    with one_line(f"draft_heads: {file.name} is not a readable safetensors file"), safe_open(file, "pt") as tensors:
        return (tensors.metadata() or {}).get("format") == FORMAT


def read_heads(file: Path) -> HeadWeights:
    """Reads a file that `write_heads` wrote. Raises UserError."""
    with one_line(f"draft_heads: {file.name} is not a readable file of heads"):
        with safe_open(file, "pt") as stored:
            about = stored.metadata()
            check(about["version"] == str(VERSION), "draft_heads: version", about["version"], f"{VERSION} is read")
            check(about["form"] in FORMS, "draft_heads: form", about["form"], f"one of {', '.join(FORMS)}")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
        acceptance = np.array(json.loads(about["acceptance"]), np.float64)
        fine = acceptance.ndim == 2 and len(acceptance) and acceptance.shape[1] and np.isfinite(acceptance).all()
        check(bool(fine), "draft_heads: acceptance", about["acceptance"][:40], "a table of heads x ranks")
        return HeadWeights(
            about["form"], tensors, float(about["eps"]), about["model"] or None, acceptance,
            json.loads(about["provenance"]),
        )  # fmt: skip


def write_heads(weights: HeadWeights, file: Path) -> None:
    """Replaces the file as a whole."""
    about = {
        "format": FORMAT,
        "version": str(VERSION),
        "form": weights.form,
        "eps": repr(weights.eps),
        "model": weights.model or "",
        "acceptance": json.dumps(np.round(weights.acceptance[: len(weights)], 4).tolist()),
        "provenance": json.dumps(dict(weights.provenance), sort_keys=True),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        fresh = Path(scratch) / file.name
        fresh.write_bytes(save({name: tensor.contiguous() for name, tensor in weights.tensors.items()}, about))
        fresh.replace(file)


MEDUSA = re.compile(r"(?:medusa_heads?\.|heads\.)?(\d+)\.(\d+)\.(linear\.)?(weight|bias)")
TOKENSWIFT = re.compile(r"(?:model\.)?medusa_layers\.(\d+)\.(linear|input_layernorm|post_layernorm)\.weight")
TOKENSWIFT_NAMES = {"linear": "weight", "input_layernorm": "norm_in", "post_layernorm": "norm_out"}


def convert(path: Path, checkpoint: Checkpoint) -> Path:
    """Returns a checkpoint of Medusa or TokenSwift in a file of ours, written once into the cache."""
    theirs = foreign_files(path)
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in theirs]
    key = hashlib.sha256(f"{VERSION} {checkpoint.spec.norm_eps} {stats}".encode()).hexdigest()[:12]
    target = cache_folder() / "heads" / f"{path.stem}-{key}.safetensors"
    if not target.is_file():
        tensors: dict[str, torch.Tensor] = {}
        for file in theirs:
            tensors.update(foreign_tensors(file))
        weights = from_names(tensors, checkpoint.spec.norm_eps)
        check_shapes(weights, checkpoint.spec)
        with files("draft_heads", target.parent, WRITABLE):
            write_heads(replace(weights, provenance={"converted_from": path.name}), target)
    return target


def foreign_files(path: Path) -> list[Path]:
    """Returns the file, or the files of a folder: its safetensors if there are any, otherwise its pickles."""
    if path.is_file():
        return [path]
    for pattern in ("*.safetensors", "*.pt", "*.bin"):
        if files := sorted(path.glob(pattern)):
            return files
    raise UserError(f"draft_heads: {str(path)!r} is not allowed; a folder needs *.safetensors, *.pt or *.bin")


def foreign_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of heads in a file, which may hold the rest of a model too. From pickles only tensors are read,
    and no code runs."""
    with one_line(f"draft_heads: {file.name} is not a readable file of tensors"):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as stored:
                names = [name for name in stored.keys() if is_head(name)]  # noqa: SIM118 - not a mapping
                return {name: stored.get_tensor(name) for name in names}
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        fine = isinstance(tensors, dict) and all(isinstance(value, torch.Tensor) for value in tensors.values())
        check(fine, "draft_heads", file.name, "a pickle of a dictionary of tensors")
        return {name: tensor for name, tensor in tensors.items() if is_head(name)}


def is_head(name: object) -> bool:
    return isinstance(name, str) and bool(MEDUSA.fullmatch(name) or TOKENSWIFT.fullmatch(name))


def from_names(tensors: Mapping[str, torch.Tensor], eps: float) -> HeadWeights:
    """Makes heads from the names of Medusa (`0.0.linear.weight`, `0.0.linear.bias`, `0.1.weight`: head, block) or
    TokenSwift (`model.medusa_layers.0.linear.weight`, `.input_layernorm.weight`, `.post_layernorm.weight`).

    Raises UserError where one is missing or the heads differ in shape.
    """
    check(bool(tensors), "draft_heads", "no heads", "the names of Medusa's or TokenSwift's tensors, or a file of ours")
    found: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    form = "tokenswift" if any(TOKENSWIFT.fullmatch(name) for name in tensors) else "medusa"
    for name, tensor in tensors.items():
        if match := TOKENSWIFT.fullmatch(name):
            found.setdefault(TOKENSWIFT_NAMES[match[2]], {})[(int(match[1]),)] = tensor
        elif form == "medusa" and (match := MEDUSA.fullmatch(name)):
            head, block = int(match[1]), int(match[2])
            if match[3]:
                found.setdefault(match[4], {})[head, block] = tensor
            else:
                found.setdefault("head", {})[(head,)] = tensor
    return HeadWeights(form, {part: stack(part, pieces) for part, pieces in found.items()}, eps)


def stack(part: str, pieces: Mapping[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
    """Stacks pieces that are numbered without gaps in one tensor, whose first dimensions are the numbers."""
    counts = [max(numbers) + 1 for numbers in zip(*pieces, strict=True)]
    check(len(pieces) == np.prod(counts), f"draft_heads: pieces of {part}", sorted(pieces), f"all of {counts}")
    shapes = {tuple(piece.shape) for piece in pieces.values()}
    check(len(shapes) == 1, f"draft_heads: shapes of {part}", sorted(shapes), "all heads must have the same")
    stacked = torch.stack([pieces[numbers] for numbers in sorted(pieces)])
    return stacked.reshape(*counts, *stacked.shape[1:])
