"""A model that was found: its config, and access to its weights and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from tokenswift_py.checkpoints.cache import kept_sha256
from tokenswift_py.checkpoints.finding import DEFAULT_MODEL
from tokenswift_py.checkpoints.gguf_tensors import GgufBlocks, GgufIndex, GgufTensors
from tokenswift_py.checkpoints.stored_tensors import Part, StoredTensors, Tensors, slices_of, weight_files
from tokenswift_py.errors import check, one_line
from tokenswift_py.memory import check_memory
from tokenswift_py.models.blocks import FEW_BITS
from tokenswift_py.models.devices import DTYPES
from tokenswift_py.models.spec import ModelSpec

# These keys of config.json only say who wrote the file.
UNREAD = ("_name_or_path", "transformers_version")
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
        """Loads the fast tokenizer. Raises UserError when there is none.

        It is what tokenizer.json says. Many of transformers' classes take only vocabulary and merges from the file, and
        cut words by a rule of their own: other tokens than the model was trained on. They are asked only where the file
        is missing.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        with one_line(f"tokenizer: {self.name} has none that loads; needed is a tokenizer.json"):
            if (self.folder / "tokenizer.json").is_file():
                # The files of Mistral's later models cut numbers and words wrongly, and have tekken.json beside them.
                own: dict[str, Any] = {"fix_mistral_regex": True} if (self.folder / "tekken.json").is_file() else {}
                tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder, local_files_only=True, **own)
            else:
                tokenizer = AutoTokenizer.from_pretrained(self.folder, config=self.config, local_files_only=True)
        check(bool(getattr(tokenizer, "is_fast", False)), "tokenizer", type(tokenizer).__name__, "needs tokenizer.json")
        return tokenizer


def fingerprint(checkpoint: Checkpoint) -> str:
    """Returns 16 hex digits of a model's shape and final norm.

    They are the same for every file of one model, of whatever type, and tell models of one shape apart where their
    norms were trained. A LoRA adapter that is merged leaves the norms as they are: such a model has its base's
    fingerprint, and with it finds the base's draft heads, which guess for it as well as they can.
    """
    spec = checkpoint.spec
    norm = checkpoint.tensors()["model.norm.weight"].float().numpy()
    shape = f"{spec.family} {spec.vocab_size} {spec.hidden_size} {spec.layers} "
    return hashlib.sha256(shape.encode() + norm.tobytes()).hexdigest()[:16]


def model_fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the SHA-256 of every file of weights, and of the contents of config.json."""
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    said = json.dumps({name: value for name, value in config.items() if name not in UNREAD}, sort_keys=True)
    files = checkpoint.weight_files
    return {"config": hashlib.sha256(said.encode()).hexdigest(), **{file.name: kept_sha256(file) for file in files}}
