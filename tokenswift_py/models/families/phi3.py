"""Phi 3 and 4: q, k and v lie in one matrix, and so do gate and up; one sliding window for all layers, or none.

llama.cpp leaves the window of its files out and says that results may suffer; here it is what the file says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenswift_py.models.families.base import Family, LayerSpec, StoredSlice, windows_everywhere


class Phi3(Family):
    architecture, class_name = "phi3", "Phi3ForCausalLM"
    keys = ("attention.sliding_window",)
    lengths = True

    def layers(self, config: Any) -> tuple[LayerSpec, ...]:
        return tuple(LayerSpec(window) for window in windows_everywhere(config))

    def stored(self, name: str, shape: tuple[int, ...], config: Any) -> Sequence[StoredSlice]:
        return (self.gguf_slice(name, shape, config),)

    def gguf_slice(self, name: str, shape: tuple[int, ...], config: Any) -> StoredSlice:
        q, kv, ffn = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.intermediate_size
        for fused, parts in (
            ("qkv_proj", {"q_proj": q, "k_proj": kv, "v_proj": kv}),
            ("gate_up_proj", {"gate_proj": ffn, "up_proj": ffn}),
        ):
            first = 0
            for part, rows in parts.items():
                if f".{part}." in name:
                    return StoredSlice(name.replace(part, fused), (sum(parts.values()), config.hidden_size), first)
                first += rows
        return StoredSlice(name, shape)

    def gguf_config(self, said: Any, config: dict[str, Any]) -> dict[str, Any]:
        original = said.size("rope.scaling.original_context_length", config["max_position_embeddings"])
        window = said.number("attention.sliding_window", 0, whole=True)
        return {"original_max_position_embeddings": original, "sliding_window": window or None, "pad_token_id": None}


FAMILY = Phi3()
