"""Opens a name, a folder, a .gguf file or a hub id as a checkpoint: config, weights, tokenizer, generation defaults.

Weights are read from safetensors and GGUF only. Nothing is unpickled, and no remote code runs.

config.json is read as transformers does. Importing its config of a family takes 2 to 3 s, as it brings half of torch
with it. What it makes of a file stays the same as long as file and version do. So a second process takes it from the
cache folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenswift_py.checkpoints.cache import cache_folder, keep
from tokenswift_py.checkpoints.checkpoint import NO_BLOCKS, Checkpoint
from tokenswift_py.checkpoints.finding import DEFAULT_MODEL, from_hub, locate
from tokenswift_py.checkpoints.generation_defaults import generation_defaults
from tokenswift_py.checkpoints.gguf_file import open_gguf
from tokenswift_py.checkpoints.gguf_folder import describe_gguf
from tokenswift_py.checkpoints.gguf_tensors import GgufIndex
from tokenswift_py.checkpoints.stored_tensors import check_unread
from tokenswift_py.core import is_whole
from tokenswift_py.errors import about, check, one_line
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import FAMILIES, ModelSpec

MOST_LAYERS = 10_000
KEPT = 1  # part of the names of kept configs; raise it when what is kept changes
PLAIN = (bool, int, float, str, type(None))


def open_checkpoint(model: str = DEFAULT_MODEL, revision: str | None = None, dtype: str = "bf16") -> Checkpoint:
    """Finds a model and reads its config. Raises UserError for one that cannot be used.

    dtype: a name of --dtype. gguf is for GGUF files only.
    """
    there = locate(model)
    check(revision is None or there is None, "revision", revision, f"of a hub id only; {model} is not read from a hub")
    there = there or from_hub(model, revision)
    file = None
    if there.is_file():
        with one_line(f"model: {there.name} is not a readable GGUF file"):
            file = open_gguf(there)
    check(file is not None or dtype != "gguf", "dtype", dtype, NO_BLOCKS)
    folder = describe_gguf(file) if file else there
    check((folder / "config.json").is_file(), "model", model, "a folder needs config.json and *.safetensors")
    with one_line(f"model: {model}: config.json is not a readable config of {', '.join(FAMILIES)}"):
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, layers = stored.get("model_type"), stored.get("num_hidden_layers")
        few = not is_whole(layers) or layers <= MOST_LAYERS  # transformers makes lists of so many elements
        check(few, "config.json: num_hidden_layers", layers, f"at most {MOST_LAYERS}")
        text = stored.get("text_config")
        text_kind = text.get("model_type") if isinstance(text, dict) else None
        inner = "; of a model of text and images only the .gguf file is read" if text_kind in FAMILIES else ""
        check(kind in FAMILIES, "model family", kind, f"supported are {', '.join(FAMILIES)}{inner}")
        config = read_config(folder)
        quantized = getattr(config, "quantization_config", None)
        check(quantized is None, "quantization_config", quantized, "weights in bf16, fp16 or fp32, or a .gguf file")
        spec = ModelSpec.from_config(config)
        rope_tables(config, 2)
    with one_line(f"model: {model}: generation_config.json is not readable"):
        defaults, eos = generation_defaults(folder, config)
        check(all(is_whole(token) and token >= 0 for token in eos), "eos_token_id", eos, "token ids")
    if file is None:
        check_unread(folder, spec)
        return Checkpoint(model, folder, config, spec, defaults, eos)
    with one_line(f"model: {file.name} is not a readable GGUF file"):
        return Checkpoint(model, folder, config, spec, defaults, eos, GgufIndex(file, spec))


def open_draft_checkpoint(model: str, target: Any) -> tuple[Checkpoint, Any]:
    """Opens the checkpoint of a model that drafts for another. Returns it with its own tokenizer.

    target: the other model's tokenizer. A guess is a token id, so the same ids must stand for the same texts. Raises
    UserError where they do not, and where `open_checkpoint` does.
    """
    with about("draft_model"):
        checkpoint = open_checkpoint(model)
        tokenizer = checkpoint.tokenizer()
    check_same_vocabulary(model, tokenizer.get_vocab(), target.get_vocab())
    return checkpoint, tokenizer


def check_same_vocabulary(model: str, own: Mapping[str, int], target: Mapping[str, int]) -> None:
    """Raises UserError, with the first token that differs, for a draft model of another vocabulary."""
    if own != target:
        texts, wanted = ({token: text for text, token in vocab.items()} for vocab in (own, target))
        token = min(token for _, token in own.items() ^ target.items())
        differs = f"token {token} is {texts.get(token)!r} there and {wanted.get(token)!r} here"
        sizes = f"it has {len(own)} tokens, the target {len(target)}"
        check(False, "draft_model", model, f"its vocabulary must be the target's: {differs} ({sizes})")


def transformers_config(folder: Path) -> Any:
    """Returns the folder's config as an object of its family's own class, which transformers' models are made of."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


def read_config(folder: Path) -> Any:
    """Returns the folder's config with the fields of its family's class, defaults included, and no other class's
    methods than those of all configs. Raises what transformers raises."""
    from transformers import __version__

    data = (folder / "config.json").read_bytes()
    name = hashlib.sha256(f"{KEPT} {__version__} ".encode() + data).hexdigest()
    path = cache_folder() / "configs" / f"{name}.json"
    with suppress(OSError, ValueError, TypeError, AttributeError):  # a list has no items, for instance
        return plain_config(json.loads(path.read_text(encoding="utf-8")))
    fields = fields_of(transformers_config(folder))
    keep(path, json.dumps(fields, indent=1))
    return plain_config(fields)


def fields_of(config: Any) -> dict[str, Any]:
    """Returns the fields that files have, under all their names."""
    fields = {name: value for name, value in vars(config).items() if name[0] != "_" and is_plain(value)}
    aliases = {alias: getattr(config, name) for alias, name in config.attribute_map.items()}
    return {**fields, **aliases, "model_type": config.model_type}


def is_plain(value: Any) -> bool:
    """Returns whether JSON gives the value back as it was."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and is_plain(field) for name, field in value.items())
    return all(map(is_plain, value)) if isinstance(value, list) else isinstance(value, PLAIN)


def plain_config(fields: Mapping[str, Any]) -> Any:
    from transformers.configuration_utils import PreTrainedConfig

    config = PreTrainedConfig()
    for name, value in fields.items():
        setattr(config, name, value)
    return config
