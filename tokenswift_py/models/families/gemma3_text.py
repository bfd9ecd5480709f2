"""Gemma 3, the text models.

They have norms by 1 + weight before and after attention and feed-forward and over heads of q and k, GeGLU, and a scaled
embedding. Of six layers five have a sliding window and a RoPE base of their own.
"""

from __future__ import annotations

from typing import Any

from tokenswift_py.errors import check
from tokenswift_py.models.families.base import GLOBAL, LOCAL, Family, LayerSpec, windows_by_type

SWA_BASE, PERIOD = 10_000.0, 6  # llama.cpp's values for a file that does not name them
LAYERS_OF_27B = 62  # a model of so many layers has its queries scaled by hidden_size / heads in llama.cpp


class Gemma3(Family):
    architecture, class_name = "gemma3", "Gemma3ForCausalLM"
    keys = ("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa")
    hidden_act = ("gelu_pytorch_tanh",)
    activation = "gelu"

    def act(self, config: Any) -> Any:
        return config.hidden_activation

    def fields(self, config: Any) -> dict[str, Any]:
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            value = getattr(config, name, None)
            check(not value, name, value, "only none")
        scalar, bias = config.query_pre_attn_scalar, bool(config.attention_bias)
        check(scalar > 0, "query_pre_attn_scalar", scalar, "above 0")
        return {
            "qk_norm": True,
            "qkv_bias": bias,
            "o_bias": bias,
            "norm_offset": 1.0,
            "post_norms": True,
            "embedding_scale": config.hidden_size**0.5,
            "query_scale": (config.head_dim / scalar) ** 0.5,
        }

    def layers(self, config: Any) -> tuple[LayerSpec, ...]:
        kinds = zip(windows_by_type(config), config.layer_types, strict=True)
        return tuple(LayerSpec(window, LOCAL if kind == "sliding_attention" else GLOBAL) for window, kind in kinds)

    def gguf_config(self, said: Any, config: dict[str, Any]) -> dict[str, Any]:
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        period, window = said.size("attention.sliding_window_pattern", PERIOD), said.size("attention.sliding_window")
        local = {"rope_type": "default", "rope_theta": said.number("rope.freq_base_swa", SWA_BASE)}
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": config["hidden_size"] // heads if layers == LAYERS_OF_27B else config["head_dim"],
            "sliding_window": window,
            "layer_types": [
                "full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)
            ],
            "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        }


FAMILY = Gemma3()
