"""Mistral: one sliding window for all layers, or none. Its GGUF files are llama's, without a window."""

from __future__ import annotations

from typing import Any

from tokenswift_py.models.families.base import Family, LayerSpec, windows_everywhere


class Mistral(Family):
    def layers(self, config: Any) -> tuple[LayerSpec, ...]:
        return tuple(LayerSpec(window) for window in windows_everywhere(config))


FAMILY = Mistral()
