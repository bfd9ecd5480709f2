"""Gemma 2: soft caps of attention's scores and of the logits.

It has norms by 1 + weight before and after attention and feed-forward, GeGLU, and a scaled embedding. Every other layer
has a sliding window. What Gemma 3 has of this it takes from here.
"""

from __future__ import annotations

from typing import Any

from tokenswift_py.core import is_finite
from tokenswift_py.errors import check
from tokenswift_py.models.families.base import Family

# What llama.cpp takes where a file does not say: load_hparams in its src/llama-model.cpp, src/llama-hparams.h.
WINDOW, ATTENTION_CAP, LOGIT_CAP = 4096, 50.0, 30.0
LAYERS_OF_27B = 46  # whose queries llama.cpp scales by hidden_size / heads
LEAST_CAP, LARGEST_CAP = 1e-3, 1e6


class Gemma2(Family):
    architecture, class_name = "gemma2", "Gemma2ForCausalLM"
    keys: tuple[str, ...] = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    hidden_act = ("gelu_pytorch_tanh",)
    activation = "gelu"
    layers_of_27b = LAYERS_OF_27B

    def act(self, config: Any) -> Any:
        return config.hidden_activation

    def fields(self, config: Any) -> dict[str, Any]:
        both = getattr(config, "use_bidirectional_attention", None)
        check(not both, "use_bidirectional_attention", both, "only none")
        scalar, bias = config.query_pre_attn_scalar, bool(config.attention_bias)
        check(scalar > 0, "query_pre_attn_scalar", scalar, "above 0")
        return {
            "qkv_bias": bias,
            "o_bias": bias,
            "norm_offset": 1.0,
            "post_norms": True,
            "embedding_scale": config.hidden_size**0.5,
            "query_scale": (config.head_dim / scalar) ** 0.5,
            "attention_cap": cap_of(config, "attn_logit_softcapping"),
            "logit_cap": cap_of(config, "final_logit_softcapping"),
        }

    def gguf_config(self, said: Any, config: dict[str, Any]) -> dict[str, Any]:
        return {
            **self.of_all_sizes(config),
            "tie_word_embeddings": True,  # llama.cpp has no other matrix for the logits
            "sliding_window": said.size("attention.sliding_window", WINDOW),
            "attn_logit_softcapping": said.number("attn_logit_softcapping", ATTENTION_CAP),
            "final_logit_softcapping": said.number("final_logit_softcapping", LOGIT_CAP) or None,
        }

    def of_all_sizes(self, config: dict[str, Any]) -> dict[str, Any]:
        """Returns the activation and the scale of queries, which no GGUF file says."""
        largest = config["num_hidden_layers"] == self.layers_of_27b
        scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
        return {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar}


def cap_of(config: Any, name: str) -> float:
    """Returns a soft cap of the config, 0 where there is none."""
    cap = getattr(config, name, None)
    if cap is None:
        return 0.0
    allowed = f"none, or a number from {LEAST_CAP} to {LARGEST_CAP:.0f}"
    check(is_finite(cap) and LEAST_CAP <= cap <= LARGEST_CAP, name, cap, allowed)
    return float(cap)


FAMILY = Gemma2()
