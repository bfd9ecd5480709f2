"""Qwen 2 and 2.5: biases of q, k and v."""

from __future__ import annotations

from typing import Any

from tokenswift_py.models.families.base import Family


class Qwen2(Family):
    architecture, class_name = "qwen2", "Qwen2ForCausalLM"

    def fields(self, config: Any) -> dict[str, Any]:
        return {"qkv_bias": True}


FAMILY = Qwen2()
