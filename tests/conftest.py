"""Tiny random models of every family, made here; the real default model for tests marked `model`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tokenswift_py import registry
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.rope import rope_tables

torch.set_num_threads(min(2, os.cpu_count() or 1))

FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}

SMALL = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def tiny_config(family: str = "llama", **changes: Any) -> Any:
    extra = {"head_dim": 16} if family in ("qwen3", "mistral") else {}
    return FAMILIES[family](**{**SMALL, **extra, **changes})


def tiny_model(config: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Hugging Face's own model with random weights; biases and norms too, which start as constants there."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor) if "norm" in name else torch.randn_like(tensor))
    return model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    spec = ModelSpec.from_config(model.config)
    state = model.state_dict()
    return {name: state[name].detach() for name in spec.shapes()}


def decoder_of(model: Any, context: int = 512, attention: str = "sdpa") -> TorchDecoder:
    backend = registry.create("tokenswift_py.kernels", "BACKEND", "attention", attention)
    spec = ModelSpec.from_config(model.config)
    return TorchDecoder(spec, weights_of(model), rope_tables(model.config, context), backend)


@pytest.fixture(scope="session")
def tiny_decoder() -> TorchDecoder:
    """A llama of three layers in float64, whose tokens do not change with the number of rows in a pass."""
    return decoder_of(tiny_model(tiny_config()))


@pytest.fixture(scope="session")
def default_model() -> Any:
    """The default model in fp32, fetched and converted at the first use."""
    from tokenswift_py import TokenSwift

    return TokenSwift.from_pretrained(dtype="fp32")
