"""What a GGUF file's metadata say that transformers' reading of it drops: honoured here, or refused in one line.

Only what would change the text without a word: scalings of RoPE, factors of other architectures, more than one token
that ends a text. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tokenswift_py.errors import check

# Keys of an architecture that transformers reads, that the tensors' shapes say too, or that do not matter here.
READ = (
    "context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base",
)  # fmt: skip
NEUTRAL: dict[str, Any] = {
    "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0, "expert_count": 0,
    "expert_used_count": 0, "attention.causal": True, "attention.sliding_window": 0,
}  # fmt: skip
FREQUENCIES = "rope_freqs.weight"  # a factor for each, as Llama 3's scaling is stored
ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def check_metadata(path: Path) -> None:
    """Raise UserError for what changes the arithmetic and is not computed here from a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = value_of(reader, "general.architecture")
    for key in reader.fields:
        part = str(key).removeprefix(f"{architecture}.")
        if part != key and part not in READ:
            found, wanted = value_of(reader, key), NEUTRAL.get(part)
            allowed = f"from a GGUF file only {wanted!r}; a folder of the same model has it in config.json"
            check(found == wanted and wanted is not None, f"model: {key}", found, allowed)
    for tensor in reader.tensors:
        if tensor.name == FREQUENCIES:
            allowed = "from a GGUF file only ones; a folder of the same model has its RoPE scaling in config.json"
            check(bool((np.asarray(tensor.data) == 1).all()), f"model: tensor {FREQUENCIES}", "scaling", allowed)


def write_ends(path: Path, folder: Path) -> None:
    """Put every token that ends a text into generation_config.json: llama.cpp stops at each, transformers reads one."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    ends = [int(value_of(reader, key)) for key in ENDS if reader.get_field(key) is not None]
    ends = list(dict.fromkeys(ends))
    if len(ends) > 1:
        config = folder / "generation_config.json"
        kept = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        config.write_text(json.dumps({**kept, "eos_token_id": ends}, indent=2), encoding="utf-8")


def value_of(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()
