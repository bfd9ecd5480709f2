"""Tiny random models of every family, made here; the real default model for tests marked `model`."""

from __future__ import annotations

import interpreter  # isort: skip  # noqa: F401  before anything that imports triton

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tokenswift_py import registry
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.ops import Ops
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.rope import rope_tables

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # how long one example takes says nothing while the machine is busy

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


def decoder_of(
    model: Any,
    context: int = 512,
    attention: str = "sdpa",
    ops: Ops | None = None,
    kv_dtype: torch.dtype | None = None,
) -> TorchDecoder:
    backend = registry.create("tokenswift_py.kernels", "BACKEND", "attention", attention)
    spec = ModelSpec.from_config(model.config)
    return TorchDecoder(spec, weights_of(model), rope_tables(model.config, context), backend, ops, kv_dtype=kv_dtype)


@pytest.fixture(scope="session")
def tiny_decoder() -> TorchDecoder:
    """A llama of three layers in float64, whose tokens do not change with the number of rows in a pass."""
    return decoder_of(tiny_model(tiny_config()))


@pytest.fixture(scope="session")
def default_model() -> Any:
    """The default model in fp32 on the torch executor, fetched and converted at the first use."""
    from tokenswift_py import TokenSwift

    return TokenSwift.from_pretrained(dtype="fp32", engine="torch")


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML, trained on the spot."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat and the dog and the bird sat on the mat, and then the rain began"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML, clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint on disk: config, sharded safetensors, tokenizer, generation defaults."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = tiny_tokenizer()
    config = tiny_config(vocab_size=len(tokenizer), eos_token_id=2, bos_token_id=0, max_position_embeddings=1024)
    model = tiny_model(config, torch.float32)
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=[2, 0])
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    return folder
