"""Folders of EAGLE-3 drafts: those of SafeAILab, SGLang, vLLM and speculators, and those that are trained here.

The same tensors have two spellings: `midlayer.` (SafeAILab, SGLang) and `layers.0.` (vLLM, speculators).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tokenswift_py.checkpoints.cache import cache_folder, full_disks
from tokenswift_py.checkpoints.checkpoint import Checkpoint, fingerprint
from tokenswift_py.drafters.draft_folders import (
    FIELD,
    check_tensors,
    checked_layer,
    checked_taps,
    config_of,
    folder_for,
    rope_config,
    stored_tensors,
    whole,
)
from tokenswift_py.drafters.eagle_layer import TAPS, EagleLayer, EagleShape
from tokenswift_py.errors import check
from tokenswift_py.models.spec import ModelSpec

# Tensors that guessing does not need: which tokens have a guess, parts of the target, tables of RoPE.
UNREAD = re.compile(r"t2d|verifier_(norm|lm_head)\.weight|.*rotary_emb\.inv_freq")
RULES = ("norm_before_residual", "fc_norm", "norm_before_fc", "norm_output")
AUX = "eagle_aux_hidden_state_layer_ids"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def find_folder(checkpoint: Checkpoint, path: str | None) -> Path:
    """Returns the folder that `path` names; auto and None are where `train-heads` keeps a model's. Raises UserError."""
    if path not in (None, "auto"):
        assert path is not None
        return folder_for("eagle", path)
    folder = own_folder(checkpoint)
    advice = f"train one (tokenswift train-heads --form eagle --model {checkpoint.name}) or name a folder"
    check(folder.is_dir(), FIELD, path, f"there is no EAGLE-3 draft for {checkpoint.name}: {advice}")
    return folder


def own_folder(checkpoint: Checkpoint) -> Path:
    """Returns the folder where the draft that was trained for a model is kept."""
    return cache_folder() / f"eagle-{fingerprint(checkpoint)}"


def read_eagle(folder: Path, checkpoint: Checkpoint) -> EagleLayer:
    """Reads a draft and checks it against the model that it drafts for. Raises UserError."""
    spec, theirs = checkpoint.spec, checkpoint.tensors(dtype=torch.bfloat16)
    shape = shape_of(config_of(str(folder)) or {}, spec)
    found = dict(stored_tensors(folder, our_name, UNREAD, ("d2t",)))
    offsets, embedding = found.pop("d2t", None), found.pop(EMBEDDING, None)
    if embedding is None:
        allowed = f"the draft's states have {shape.hidden} values, not the model's {spec.hidden_size}: it must be there"
        check(shape.hidden == spec.hidden_size, f"{FIELD}: tensor {EMBEDDING}", None, allowed)
        embedding = theirs["model.embed_tokens.weight"]
    if HEAD not in found and (shape.hidden, shape.draft_vocab) == (spec.hidden_size, spec.vocab_size):
        found[HEAD] = theirs["model.embed_tokens.weight" if spec.tied else HEAD]
    wanted = {**shape.shapes(), EMBEDDING: (shape.vocab, shape.hidden)}
    check_tensors({**found, EMBEDDING: embedding}, wanted)
    return EagleLayer(shape, found, embedding, targets_of(offsets, shape))


def our_name(stored: str) -> str:
    return re.sub(r"^layers\.0\.", "midlayer.", stored.removeprefix("model."))


def targets_of(offsets: torch.Tensor | None, shape: EagleShape) -> torch.Tensor:
    """Returns [draft_vocab] the target's token for each of the draft's. offsets: `d2t`, to be added to its number."""
    name = f"{FIELD}: tensor d2t"
    if offsets is None:
        check(shape.draft_vocab == shape.vocab, name, None, f"{shape.draft_vocab} of {shape.vocab} tokens need it")
        return torch.arange(shape.vocab)
    fine = offsets.dtype in (torch.int64, torch.int32) and offsets.shape == (shape.draft_vocab,)
    check(fine, name, (str(offsets.dtype), *offsets.shape), f"it must be whole numbers, ({shape.draft_vocab},)")
    targets = torch.arange(shape.draft_vocab) + offsets.long()
    inside = int(targets.min()) >= 0 and int(targets.max()) < shape.vocab
    check(inside, name, [int(targets.min()), int(targets.max())], f"tokens are 0 to {shape.vocab - 1}")
    check(len(targets.unique()) == len(targets), name, "a token twice", "each token must be named once")
    return targets


def shape_of(config: Mapping[str, Any], spec: ModelSpec) -> EagleShape:
    """Reads a config.json and checks it against the model. Raises UserError for what is not computed here."""
    layer = config.get("transformer_layer_config", config)
    check(isinstance(layer, dict), f"{FIELD}: transformer_layer_config", layer, "fields of a decoder layer")
    count = whole(layer, "num_hidden_layers", 1)
    check(count == 1, f"{FIELD}: num_hidden_layers", count, "only 1")
    eps = checked_layer(layer)
    hidden, heads = whole(layer, "hidden_size"), whole(layer, "num_attention_heads")
    vocab, target = whole(layer, "vocab_size"), whole(config, "target_hidden_size", hidden)
    check(target == spec.hidden_size, f"{FIELD}: hidden size", target, f"the model's is {spec.hidden_size}")
    check(vocab == spec.vocab_size, f"{FIELD}: vocab_size", vocab, f"the model's is {spec.vocab_size}")
    return EagleShape(
        hidden, target, heads, whole(layer, "num_key_value_heads", heads), whole(layer, "head_dim", hidden // heads),
        whole(layer, "intermediate_size"), vocab, whole(config, "draft_vocab_size", vocab), eps,
        taps_of(config, spec.layers), rope_config(layer), *(bool(config.get(name, False)) for name in RULES),
    )  # fmt: skip


def taps_of(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Returns the layers whose inputs a draft reads.

    `eagle_config` numbers layers by what leaves them (SGLang), the field at the top by what enters them (vLLM). Where
    neither is there, the layers are those of the authors' code.
    """
    nested = config.get("eagle_config") or {}
    check(nested.get("use_aux_hidden_state", True), f"{FIELD}: use_aux_hidden_state", False, "only true, as EAGLE-3")
    given, shift = (nested[AUX], 1) if nested.get(AUX) else (config.get(AUX), 0)
    if not given:
        return checked_taps(usual_taps(layers), TAPS, layers)
    fine = isinstance(given, list) and all(isinstance(layer, int) for layer in given)
    check(fine, f"{FIELD}: {AUX}", given, "a list of layers")
    return checked_taps(tuple(layer + shift for layer in given), TAPS, layers)


def usual_taps(layers: int) -> tuple[int, ...]:
    """Returns the layers whose inputs the authors' code reads: a low one, the middle one, a high one."""
    return 2, layers // 2, layers - 3


def write_eagle(layer: EagleLayer, folder: Path, layers: int, provenance: Mapping[str, Any]) -> None:
    """Writes a new folder in SafeAILab's and SGLang's form, without the embedding, which is the target's.

    layers: those of the target. provenance: record of how the draft was made, in training.json.
    """
    shape, rope = layer.shape, layer.shape.rope
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "max_position_embeddings": rope.max_position_embeddings,
        "rope_theta": rope.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "vocab_size": shape.vocab,
        "draft_vocab_size": shape.draft_vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **({} if shape.taps == usual_taps(layers) else {AUX: list(shape.taps)}),
    }
    known = torch.zeros(shape.vocab, dtype=torch.bool).index_fill_(0, layer.targets, True)
    integers = {"d2t": layer.targets - torch.arange(shape.draft_vocab), "t2d": known}
    halves = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in layer.tensors.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        fresh = Path(scratch) / folder.name
        fresh.mkdir()
        (fresh / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (fresh / "training.json").write_text(json.dumps(dict(provenance), indent=1) + "\n", encoding="utf-8")
        with full_disks():
            save_file({**halves, **integers}, fresh / "model.safetensors", {"format": "pt"})
        fresh.replace(folder)
