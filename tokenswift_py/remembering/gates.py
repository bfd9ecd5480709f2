"""Files of the gates of an Infini-attention memory: how much of a head's output is recalled (arXiv 2404.07143)."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from tokenswift_py.checkpoints.cache import cache_folder
from tokenswift_py.checkpoints.checkpoint import Checkpoint, fingerprint
from tokenswift_py.errors import check, one_line
from tokenswift_py.options import GATED

FORMAT, VERSION = "tokenswift-gates", "1"


@dataclass(frozen=True)
class Gates:
    """The learnt numbers beta of a model's heads. A head takes the share sigmoid(beta) from the memory.

    values: [layers, heads] fp32. Those of layers without a memory are not read.
    kind:   the memory that they were trained with.
    model:  fingerprint of the model that they were trained for.
    provenance: how they were made.
    """

    values: torch.Tensor
    kind: str
    model: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Returns 12 hex digits that name these numbers in the numerics contract."""
        return hashlib.sha256(self.values.float().contiguous().numpy().tobytes()).hexdigest()[:12]


def gates_file(checkpoint: Checkpoint, kind: str) -> Path:
    """Returns the file where the gates of a model are looked for."""
    return cache_folder() / f"gates-{kind}-{fingerprint(checkpoint)}.safetensors"


def find_gates(checkpoint: Checkpoint, kind: str, path: str | None = None) -> Gates:
    """Reads gates and checks them against model and memory. Raises UserError.

    path: file of gates. "auto" and None look for those that were trained for this model.
    """
    file = gates_file(checkpoint, kind) if path in (None, "auto") else Path(str(path)).expanduser()
    command = f"tokenswift train-memory --model {checkpoint.name} --kind {kind}"
    check(file.is_file(), "kv_gates", path, f"there are none for {checkpoint.name}: {command} makes them")
    gates = read_gates(file)
    check(gates.kind == kind, "kv_gates", file.name, f"gates of memory {kind}; these are of {gates.kind}")
    shape, spec = tuple(gates.values.shape), checkpoint.spec
    check(shape == (spec.layers, spec.heads), "kv_gates", shape, f"{spec.layers} layers of {spec.heads} heads")
    mine = fingerprint(checkpoint)
    check(gates.model == mine, "kv_gates", file.name, f"those of model {mine}; these were made for {gates.model}")
    return gates


def read_gates(file: Path) -> Gates:
    """Reads a file that `write_gates` wrote. Raises UserError."""
    with one_line(f"kv_gates: {file.name} is not a readable file of gates"), safe_open(file, "pt") as stored:
        about = stored.metadata() or {}
        check(about.get("format") == FORMAT, "kv_gates", file.name, "a file that `tokenswift train-memory` made")
        check(about["version"] == VERSION, "kv_gates: version", about["version"], f"{VERSION} is read")
        check(about["kind"] in GATED, "kv_gates: kind", about["kind"], f"one of {', '.join(GATED)}")
        values = stored.get_tensor("gates").float()
        fine = values.ndim == 2 and bool(values.isfinite().all())
        check(fine, "kv_gates: gates", list(values.shape), "[layers, heads] numbers that are finite")
        return Gates(values, about["kind"], about["model"], json.loads(about["provenance"]))


def write_gates(gates: Gates, file: Path) -> None:
    """Replaces the file whole."""
    about = {
        "format": FORMAT,
        "version": VERSION,
        "kind": gates.kind,
        "model": gates.model,
        "provenance": json.dumps(dict(gates.provenance), sort_keys=True),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        fresh = Path(scratch) / file.name
        fresh.write_bytes(save({"gates": gates.values.float().contiguous()}, about))
        fresh.replace(file)
