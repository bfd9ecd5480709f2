"""Qwen 2 with mixtures of experts and one feed-forward that every token takes, in all layers or in some."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenswift_py.models.families.base import (
    Experts,
    LayerSpec,
    Mixture,
    count_of,
    mixture_layers,
)


class Qwen2Moe(Mixture):
    architecture, class_name = "qwen2moe", "Qwen2MoeForCausalLM"
    keys = (
        "expert_count",
        "expert_used_count",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
    )

    def fields(self, config: Any) -> dict[str, Any]:
        width, shared = (count_of(config, f"{kind}_intermediate_size") for kind in ("moe", "shared_expert"))
        count, chosen = count_of(config, "num_experts"), count_of(config, "num_experts_per_tok")
        return {
            "qkv_bias": bool(config.qkv_bias),
            "experts": Experts(count, chosen, width, bool(config.norm_topk_prob), shared),
        }

    def layers(self, config: Any) -> tuple[LayerSpec, ...]:
        kinds = zip(super().layers(config), mixture_layers(config), strict=True)
        return tuple(replace(layer, experts=experts) for layer, experts in kinds)

    def gguf_config(self, said: Any, config: dict[str, Any]) -> dict[str, Any]:
        return {
            "num_experts": said.size("expert_count"),
            "num_experts_per_tok": said.size("expert_used_count"),
            "moe_intermediate_size": said.size("expert_feed_forward_length"),
            "shared_expert_intermediate_size": said.size(
                "expert_shared_feed_forward_length",
                config["intermediate_size"],  # early files do not say it
            ),
            "norm_topk_prob": False,  # llama.cpp's value for every model
            "qkv_bias": True,
        }


FAMILY = Qwen2Moe()
