"""A model that was found: its config, and access to its weights and its tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from tokenswift_py.checkpoints.finding import DEFAULT_MODEL
from tokenswift_py.checkpoints.gguf_tensors import GgufBlocks, GgufIndex, GgufTensors
from tokenswift_py.checkpoints.stored_tensors import Part, StoredTensors, Tensors, slices_of, weight_files
from tokenswift_py.errors import check, one_line
from tokenswift_py.memory import check_memory
from tokenswift_py.models.blocks import FEW_BITS
from tokenswift_py.models.devices import DTYPES
from tokenswift_py.models.spec import ModelSpec

NO_BLOCKS = f"only for a .gguf file or {DEFAULT_MODEL}; int8 is for any model"


@dataclass(frozen=True)
class Checkpoint:
    """A model that was found and read, except its weights and tokenizer.

    name:     the name that the user gave.
    folder:   folder of config.json, tokenizer files and, unless a GGUF file holds them, weights as *.safetensors.
    config:   the fields of the transformers config, see loading.py.
    defaults: sampling parameters of generation_config.json, under our names.
    eos:      every end-of-sequence id that the checkpoint names.
    gguf:     the GGUF file that holds the weights; config.json and tokenizer were made from its metadata.
    """

    name: str
    folder: Path
    config: Any
    spec: ModelSpec
    defaults: dict[str, Any]
    eos: tuple[int, ...]
    gguf: GgufIndex | None = None
    borrowed: ClassVar[bool] = False  # whether tensors in memory are another model's, and stay as they are

    def tensors(self, part: Part | None = None, dtype: torch.dtype = torch.float32) -> Tensors:
        """Returns the weights as they lie on disk. Blocks of a GGUF file are dequantised in fp32, rounded to `dtype`.

        part: function from a tensor's name and shape to the part that is read. None reads everything.
        Raises UserError for a missing, misshapen or cut tensor.
        """
        if self.gguf is not None:
            return GgufTensors(self.gguf, part, dtype)
        return StoredTensors(weight_files(self.folder), self.spec.shapes(), part, slices_of(self.spec))

    def blocks(self) -> GgufBlocks:
        """Returns the weights in the blocks of the GGUF file. Raises UserError where there is none."""
        check(self.gguf is not None, "dtype", "gguf", NO_BLOCKS)
        assert self.gguf is not None
        return GgufBlocks(self.gguf)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self.gguf.file.parts if self.gguf else tuple(weight_files(self.folder))

    def weight_bytes(self, dtype: str) -> int:
        """Returns the bytes that the weights take in memory. dtype: a name of --dtype."""
        if dtype == "gguf":
            return self.blocks().nbytes
        return int(self.spec.parameters * (DTYPES[dtype].itemsize if dtype in DTYPES else FEW_BITS["int8"].nbytes))

    def check_memory_for_drafts(self, dtype: str, device: torch.device) -> None:
        """Raises UserError where memory has no room for this model beside the one that it drafts for."""
        check_memory(self.weight_bytes(dtype), device, f"the draft model {self.name} in {dtype}")

    def tokenizer(self) -> Any:
        """Loads the fast tokenizer. Raises UserError when there is none."""
        from transformers import AutoTokenizer

        with one_line(f"tokenizer: {self.name} has none that loads; needed is a tokenizer.json"):
            tokenizer = AutoTokenizer.from_pretrained(self.folder, config=self.config, local_files_only=True)
        check(bool(getattr(tokenizer, "is_fast", False)), "tokenizer", type(tokenizer).__name__, "needs tokenizer.json")
        return tokenizer


def fingerprint(checkpoint: Checkpoint) -> str:
    """Returns 16 hex digits of a model's shape and final norm, which tell models of one shape apart, too."""
    spec = checkpoint.spec
    norm = checkpoint.tensors()["model.norm.weight"].float().numpy()
    shape = f"{spec.family} {spec.vocab_size} {spec.hidden_size} {spec.layers} "
    return hashlib.sha256(shape.encode() + norm.tobytes()).hexdigest()[:16]
