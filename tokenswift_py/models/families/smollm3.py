"""SmolLM 3: a llama some of whose layers rotate nothing (NoPE, arXiv 2305.19466)."""

from __future__ import annotations

from typing import Any

from tokenswift_py.errors import check
from tokenswift_py.models.families.base import GLOBAL, Family, LayerSpec, windows_by_type

GGUF_INTERVAL = 4  # llama.cpp has it in its code, the files do not say


class SmolLM3(Family):
    architecture, class_name = "smollm3", "SmolLM3ForCausalLM"
    paired = frequencies = True

    def fields(self, config: Any) -> dict[str, Any]:
        bias = bool(getattr(config, "attention_bias", False))
        return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(getattr(config, "mlp_bias", False))}

    def layers(self, config: Any) -> tuple[LayerSpec, ...]:
        windows, turned = windows_by_type(config), config.no_rope_layers
        right = isinstance(turned, (list, tuple)) and len(turned) >= len(windows) and set(turned) <= {0, 1}
        check(right, "no_rope_layers", turned, f"1 (RoPE) or 0 (none) for each of {len(windows)} layers")
        return tuple(
            LayerSpec(window, GLOBAL if turns else None) for window, turns in zip(windows, turned, strict=False)
        )

    def gguf_config(self, said: Any, config: dict[str, Any]) -> dict[str, Any]:
        return {"no_rope_layer_interval": GGUF_INTERVAL}


FAMILY = SmolLM3()
