"""What a decoder of the supported families is made of, read from its Hugging Face config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tokenswift_py.core import is_whole
from tokenswift_py.errors import UserError, check

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and switches of one model.

    windows: [layers] sliding window of each layer in tokens; None is full attention.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    trained_context: int

    @classmethod
    def from_config(cls, config: Any) -> ModelSpec:
        """From a transformers config. Raises UserError for a family or feature that is not supported."""
        family = str(getattr(config, "model_type", None))
        check(family in FAMILIES, "model family", family, f"supported are {', '.join(FAMILIES)}")
        act = getattr(config, "hidden_act", "silu")
        check(act in ("silu", "swish"), "hidden_act", act, "supported is silu")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            size = getattr(config, name)
            check(is_whole(size) and size >= 1, f"config.json: {name}", size, "a whole number, at least 1")
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        check(is_whole(kv_heads) and kv_heads >= 1, "num_key_value_heads", kv_heads, "a whole number, at least 1")
        check(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"it must divide the {heads} attention heads")
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            family=family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            norm_eps=config.rms_norm_eps,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias and family in ("llama", "qwen3"),
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=family == "qwen3",
            windows=windows(config),
            trained_context=config.max_position_embeddings,
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the model, under Hugging Face's names."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            linear = {
                "self_attn.q_proj": (q, hidden, self.qkv_bias),
                "self_attn.k_proj": (kv, hidden, self.qkv_bias),
                "self_attn.v_proj": (kv, hidden, self.qkv_bias),
                "self_attn.o_proj": (hidden, q, self.o_bias),
                "mlp.gate_proj": (ffn, hidden, self.mlp_bias),
                "mlp.up_proj": (ffn, hidden, self.mlp_bias),
                "mlp.down_proj": (hidden, ffn, self.mlp_bias),
            }
            for name, (rows, columns, bias) in linear.items():
                shapes[f"{at}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{at}{name}.bias"] = (rows,)
            if self.qk_norm:
                shapes[f"{at}self_attn.q_norm.weight"] = shapes[f"{at}self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with; of an untied embedding only rows are read."""
        return self.parameters - (0 if self.tied else self.vocab_size * self.hidden_size)

    def kv_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values of `tokens` tokens, all layers; of int8 with the scale beside each."""
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        return 2 * self.layers * self.kv_heads * (self.head_dim * dtype.itemsize + scale) * tokens


def windows(config: Any) -> tuple[int | None, ...]:
    """The sliding window of each layer, as transformers' model of the family has it: llama's has none, whatever the
    config says; mistral's is one for all layers."""
    width: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "llama" or getattr(config, "use_sliding_window", True) is False:
        width = None
    check(width is None or (is_whole(width) and width >= 1), "sliding_window", width, "a number of tokens, at least 1")
    kinds = getattr(config, "layer_types", None)
    if kinds is None or config.model_type == "mistral":
        return (width,) * int(config.num_hidden_layers)
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) != config.num_hidden_layers:
        raise UserError(
            f"layer_types: {unknown or len(kinds)} is not allowed; full_attention and sliding_attention are"
        )
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)
