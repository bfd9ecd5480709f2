"""EAGLE-3 drafts with random weights, and the folders that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tokenswift_py.drafters.draft_folders import rope_config
from tokenswift_py.drafters.eagle_layer import EagleLayer, EagleShape

HEADS, KV_HEADS, FFN, DRAFT_VOCAB = 6, 2, 40, 45
ROPE = {"max_position_embeddings": 512, "rope_theta": 5000.0}


def random_eagle(
    embedding: torch.Tensor, taps: tuple[int, ...] = (0, 1, 2), seed: int = 0, heads: int = HEADS, **rules: Any
) -> EagleLayer:
    """A draft for a model with this embedding. The tokens that it can guess are scattered over the vocabulary."""
    draw = torch.Generator().manual_seed(seed)
    vocab, hidden = embedding.shape
    rope = rope_config({"hidden_size": hidden, "num_attention_heads": heads, **ROPE})
    sizes = (hidden, hidden, heads, KV_HEADS, hidden // heads, FFN, vocab, DRAFT_VOCAB)
    shape = EagleShape(*sizes, 1e-5, taps, rope, **rules)
    tensors = {}
    for name, size in shape.shapes().items():
        noise = torch.randn(size, generator=draw)
        tensors[name] = 1 + 0.3 * noise if len(size) == 1 else noise * size[1] ** -0.5
    tensors["lm_head.weight"] *= 2
    targets = torch.randperm(vocab, generator=draw)[:DRAFT_VOCAB].sort().values
    return EagleLayer(shape, tensors, embedding, targets)


def config_for(layer: EagleLayer) -> dict[str, Any]:
    """The config.json of such a draft, in SafeAILab's form with vLLM's field for the layers."""
    shape = layer.shape
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "hidden_size": shape.hidden,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "vocab_size": shape.vocab,
        "draft_vocab_size": DRAFT_VOCAB,
        "eagle_aux_hidden_state_layer_ids": list(shape.taps),
        "norm_before_residual": shape.norm_before_residual,
        "fc_norm": shape.fc_norm,
        "norm_before_fc": shape.norm_before_fc,
        "norm_output": shape.norm_output,
        **ROPE,
    }


def stored(layer: EagleLayer) -> dict[str, torch.Tensor]:
    """Its tensors as a file holds them."""
    known = torch.zeros(layer.shape.vocab, dtype=torch.bool)
    known[layer.targets] = True
    return {**layer.tensors, "d2t": layer.targets - torch.arange(DRAFT_VOCAB), "t2d": known}


def save_eagle(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
