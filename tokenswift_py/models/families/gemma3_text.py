"""Gemma 3, the text models: Gemma 2 with norms over heads of q and k instead of a soft cap of scores.

Of six layers five have a sliding window and a RoPE base of their own.
"""

from __future__ import annotations

from typing import Any

from tokenswift_py.errors import check
from tokenswift_py.models.families.base import GLOBAL, LOCAL, LayerSpec, windows_by_type
from tokenswift_py.models.families.gemma2 import Gemma2

SWA_BASE, PERIOD = 10_000.0, 6  # llama.cpp's values for a file that does not name them
LAYERS_OF_27B = 62  # a model of so many layers has its queries scaled by hidden_size / heads in llama.cpp


class Gemma3(Gemma2):
    architecture, class_name = "gemma3", "Gemma3ForCausalLM"
    keys = (
        "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa", "final_logit_softcapping",
    )  # fmt: skip
    layers_of_27b = LAYERS_OF_27B

    def fields(self, config: Any) -> dict[str, Any]:
        cap = getattr(config, "attn_logit_softcapping", None)
        check(not cap, "attn_logit_softcapping", cap, "of Gemma 3 only none: transformers and llama.cpp apply none")
        return {**super().fields(config), "qk_norm": True}

    def layers(self, config: Any) -> tuple[LayerSpec, ...]:
        kinds = zip(windows_by_type(config), config.layer_types, strict=True)
        return tuple(LayerSpec(window, LOCAL if kind == "sliding_attention" else GLOBAL) for window, kind in kinds)

    def gguf_config(self, said: Any, config: dict[str, Any]) -> dict[str, Any]:
        period, layers = said.size("attention.sliding_window_pattern", PERIOD), range(config["num_hidden_layers"])
        local = {"rope_type": "default", "rope_theta": said.number("rope.freq_base_swa", SWA_BASE)}
        return {
            **self.of_all_sizes(config),
            "final_logit_softcapping": said.number("final_logit_softcapping", 0.0) or None,
            "sliding_window": said.size("attention.sliding_window"),
            "layer_types": ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in layers],
            "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        }


FAMILY = Gemma3()
