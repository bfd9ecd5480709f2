"""The safetensors files of a model's folder, and the tensors in them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from tokenswift_py.errors import check, files, one_line
from tokenswift_py.models.families.base import StoredSlice
from tokenswift_py.models.spec import ModelSpec, family_named

logger = logging.getLogger("tokenswift")

STORED = ("BF16", "F16", "F32", "F64")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Old files hold tables of RoPE. They follow from the config, so they are not read.
TABLES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# A function from a tensor's name and shape to the part of it that is read.
Part = Callable[[str, Sequence[int]], tuple[slice, ...]]


class Tensors(Mapping[str, torch.Tensor]):
    """Tensors under Hugging Face's names, read when they are asked for and not kept."""

    def to(
        self, dtype: torch.dtype, device: torch.device, names: Iterable[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns copies of the tensors of these names in memory, of all where none are given."""
        return {name: self[name].to(device, dtype, copy=True) for name in (self if names is None else names)}


FindSlices = Callable[[str, tuple[int, ...]], Sequence[StoredSlice]]


def by_its_name(name: str, shape: tuple[int, ...]) -> Sequence[StoredSlice]:
    return (StoredSlice(name, shape),)


def slices_of(spec: ModelSpec) -> FindSlices:
    """Returns what tells where files of the model's family may hold a tensor, the likeliest place first."""
    family = family_named(spec.family)
    return lambda name, shape: family.stored(name, shape, spec)


class StoredTensors(Tensors):
    """The tensors of safetensors files, or a part of each.

    A file is mapped for one tensor at a time, so that reading all of them never holds them twice. Raises UserError for
    a tensor that is missing, misshapen, of a type that is not for weights, or in two of the files.
    """

    def __init__(
        self,
        files: Sequence[Path],
        shapes: Mapping[str, tuple[int, ...]],
        part: Part | None = None,
        slices: FindSlices = by_its_name,
    ):
        self._shapes, self._part = dict(shapes), part
        self._file = files_of(files)
        self._slices = {name: self._first_found(slices(name, shape)) for name, shape in shapes.items()}
        whole = {stored.name: stored.shape for stored in self._slices.values()}
        for path in dict.fromkeys(self._file[name] for name in whole):
            with one_line(unreadable(path)), safe_open(path, "pt") as tensors:
                for name in (name for name in whole if self._file[name] == path):
                    found = tuple(tensors.get_slice(name).get_shape())
                    check(found == whole[name], f"model: tensor {name}", found, f"it must be {whole[name]}")
                    kind = tensors.get_slice(name).get_dtype()
                    check(kind in STORED, f"model: type of tensor {name}", kind, f"one of {', '.join(STORED)}")

    def _first_found(self, slices: Sequence[StoredSlice]) -> StoredSlice:
        found = next((stored for stored in slices if stored.name in self._file), None)
        check(found is not None, f"model: tensor {slices[0].name}", None, "the safetensors files must hold it")
        return found or slices[0]

    def __getitem__(self, name: str) -> torch.Tensor:
        stored, shape = self._slices[name], self._shapes[name]
        with safe_open(self._file[stored.name], "pt") as tensors:
            if self._part is None and stored.shape == shape:
                tensor: torch.Tensor = tensors.get_tensor(stored.name)
                return tensor
            rows, *columns = self._part(name, shape) if self._part else (slice(None),)
            begin, end, _ = rows.indices(shape[0])
            index = () if stored.index is None else (stored.index,)
            at = (*index, slice(stored.first + begin, stored.first + end), *columns)
            part: torch.Tensor = tensors.get_slice(stored.name)[at]
        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def weight_files(folder: Path) -> list[Path]:
    """Returns the model's safetensors files like transformers: model.safetensors, else the index's, else all."""
    index = folder / INDEX
    if (folder / WHOLE).is_file():
        found = [folder / WHOLE]
    elif index.is_file():
        with one_line(f"model: {index.name} is not a readable index"):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            check(all(Path(name).name == name for name in names), "model index", names, "plain file names")
        found = [folder / name for name in names]
    else:
        found = sorted(folder.glob("*.safetensors"))
    pickles = "; .bin and .pt files are pickles and are not read" if any(folder.glob("*.bin")) else ""
    check(bool(found), "model", str(folder), f"a folder needs *.safetensors{pickles}")
    for file in found:
        with files("model index", file.name, "names of files"):
            there = file.is_file()
        check(there, "model", file.name, "the index names it, so it must be there")
    return found


def files_of(paths: Sequence[Path]) -> dict[str, Path]:
    """Returns the file of each tensor. Raises UserError for a name that is in two files."""
    found: dict[str, Path] = {}
    for path in paths:
        with one_line(unreadable(path)), safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                twice = f"it is in {found[name].name} and in {path.name}: remove one of them" if name in found else ""
                check(not twice, "model: tensor", name, twice)
                found[name] = path
    return found


def unreadable(path: Path) -> str:
    return f"model: {path.name} is not a readable safetensors file"


def check_unread(folder: Path, spec: ModelSpec) -> None:
    """Raises UserError for an unread tensor that would change the text, and names other unread parts in the log."""
    read = weight_files(folder)
    others = [path.name for path in sorted(folder.glob("*.safetensors")) if path not in read]
    slices, found = slices_of(spec), files_of(read)
    known = {stored.name for name, shape in spec.shapes().items() for stored in slices(name, shape)}
    for name in sorted(found.keys() - known):
        if TABLES.fullmatch(name) is None and not is_neutral(name, found, spec):
            changes = name.startswith(("model.", "lm_head.")) or "lora_" in name
            why = (
                f"no model of this config reads it, yet {found[name].name} has it and the text would be another with it"
            )
            check(not changes, "model: tensor", name, why)
            others.append(f"tensor {name}")
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        logger.warning("%s: not read: %s", folder.name, shown)


def is_neutral(name: str, found: Mapping[str, Path], spec: ModelSpec) -> bool:
    """Returns whether the model computes the same with this tensor.

    It does with an LM head equal to the embedding that it is tied to, and with a bias of zeros.
    """

    def read(name: str) -> torch.Tensor:
        with safe_open(found[name], "pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    embedding = "model.embed_tokens.weight"
    if name == "lm_head.weight" and spec.tied and embedding in found:
        return torch.equal(read(name), read(embedding))
    return name.endswith(".bias") and not read(name).any()
