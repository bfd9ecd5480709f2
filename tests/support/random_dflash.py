"""DFlash drafts with random weights, and the folders that hold them."""

from __future__ import annotations

from typing import Any

import torch

from tokenswift_py.drafters.dflash_layers import DFlashLayers, DFlashShape
from tokenswift_py.drafters.draft_folders import rope_config

HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, BLOCK, MASK = 4, 2, 16, 40, 2, 6, 5
ROPE = {"max_position_embeddings": 512, "rope_theta": 5000.0}


def random_dflash(embedding: torch.Tensor, taps: tuple[int, ...] = (1, 2), seed: int = 0) -> DFlashLayers:
    """A draft of two layers for a model with this embedding."""
    draw = torch.Generator().manual_seed(seed)
    hidden = embedding.shape[1]
    rope = rope_config({"hidden_size": hidden, "num_attention_heads": HEADS, "head_dim": HEAD_DIM, **ROPE})
    shape = DFlashShape(hidden, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, BLOCK, MASK, 1e-5, taps, rope)
    tensors = {}
    for name, size in shape.shapes().items():
        noise = torch.randn(size, generator=draw)
        tensors[name] = 1 + 0.3 * noise if len(size) == 1 else noise * size[1] ** -0.5
    return DFlashLayers(shape, tensors, embedding)


def config_for(layers: DFlashLayers) -> dict[str, Any]:
    """The config.json of such a draft, as its authors write it."""
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": layers.shape.hidden,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_target_layers": 3,
        "layer_types": ["full_attention"] * LAYERS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "block_size": BLOCK,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [tap - 1 for tap in layers.shape.taps]},
        **ROPE,
    }
