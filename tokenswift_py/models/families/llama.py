"""Llama: no sliding window, whatever the config says; optional biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenswift_py.models.families.base import Family, LayerSpec


class Llama(Family):
    architecture, class_name = "llama", "LlamaForCausalLM"
    paired = frequencies = True

    def fields(self, config: Any) -> dict[str, Any]:
        bias = bool(getattr(config, "attention_bias", False))
        return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(getattr(config, "mlp_bias", False))}

    def layers(self, config: Any) -> tuple[LayerSpec, ...]:
        return (LayerSpec(),) * int(config.num_hidden_layers)

    def gguf_fits(self, metadata: Mapping[str, Any]) -> bool:
        return not metadata.get("llama.expert_count")


FAMILY = Llama()
