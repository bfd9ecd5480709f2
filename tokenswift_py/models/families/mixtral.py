"""Mixtral: Mistral with a mixture of experts in every layer. Its GGUF files are llama's, with experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenswift_py.models.families.base import (
    Experts,
    Family,
    LayerSpec,
    StoredSlice,
    count_of,
    stacked,
    stacked_halves,
    windows_everywhere,
)

NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class Mixtral(Family):
    architecture, class_name = "llama", "MixtralForCausalLM"
    keys = ("expert_count", "expert_used_count")
    paired = frequencies = True

    def fields(self, config: Any) -> dict[str, Any]:
        count, chosen = count_of(config, "num_local_experts"), count_of(config, "num_experts_per_tok")
        return {"experts": Experts(count, chosen, config.intermediate_size, normalised=True)}

    def layers(self, config: Any) -> tuple[LayerSpec, ...]:
        return tuple(LayerSpec(window, experts=True) for window in windows_everywhere(config))

    def stored(self, name: str, shape: tuple[int, ...], config: Any) -> Sequence[StoredSlice]:
        if ".mlp." not in name:
            return (StoredSlice(name, shape),)
        theirs = name.replace(".mlp.", ".block_sparse_moe.")
        for ours, wanted in NAMES.items():
            theirs = theirs.replace(ours, wanted)
        return StoredSlice(theirs, shape), StoredSlice(name, shape), stacked_halves(name, shape, config)

    def gguf_slice(self, name: str, shape: tuple[int, ...], config: Any) -> StoredSlice:
        return stacked(name, shape, config)

    def gguf_fits(self, metadata: Mapping[str, Any]) -> bool:
        return bool(metadata.get("llama.expert_count"))

    def gguf_config(self, said: Any, config: dict[str, Any]) -> dict[str, Any]:
        return {"num_local_experts": said.size("expert_count"), "num_experts_per_tok": said.size("expert_used_count")}


FAMILY = Mixtral()
