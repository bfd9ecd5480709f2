"""Qwen 3: a norm over each head of q and k; optional biases."""

from __future__ import annotations

from typing import Any

from tokenswift_py.models.families.base import Family


class Qwen3(Family):
    architecture, class_name = "qwen3", "Qwen3ForCausalLM"

    def fields(self, config: Any) -> dict[str, Any]:
        bias = bool(getattr(config, "attention_bias", False))
        return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias}


FAMILY = Qwen3()
