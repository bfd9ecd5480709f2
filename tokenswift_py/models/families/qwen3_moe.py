"""Qwen 3 with mixtures of experts, in all layers or in some; one sliding window for all layers, or none."""

from __future__ import annotations

from typing import Any

from tokenswift_py.models.families.base import (
    Experts,
    LayerSpec,
    Mixture,
    count_of,
    mixture_layers,
    windows_everywhere,
)


class Qwen3Moe(Mixture):
    architecture, class_name = "qwen3moe", "Qwen3MoeForCausalLM"
    keys = ("expert_count", "expert_used_count", "expert_feed_forward_length")

    def fields(self, config: Any) -> dict[str, Any]:
        bias, width = bool(config.attention_bias), count_of(config, "moe_intermediate_size")
        count, chosen = count_of(config, "num_experts"), count_of(config, "num_experts_per_tok")
        experts = Experts(count, chosen, width, bool(config.norm_topk_prob))
        return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, "experts": experts}

    def layers(self, config: Any) -> tuple[LayerSpec, ...]:
        kinds = zip(windows_everywhere(config), mixture_layers(config), strict=True)
        return tuple(LayerSpec(window, experts=experts) for window, experts in kinds)

    def gguf_config(self, said: Any, config: dict[str, Any]) -> dict[str, Any]:
        return {
            "num_experts": said.size("expert_count"),
            "num_experts_per_tok": said.size("expert_used_count"),
            "moe_intermediate_size": said.size("expert_feed_forward_length"),
            "norm_topk_prob": True,  # llama.cpp's value for every model
        }


FAMILY = Qwen3Moe()
