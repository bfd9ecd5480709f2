"""Tiny random models of every family; the real default model for tests marked `model`."""

from __future__ import annotations

import interpreter  # isort: skip  # noqa: F401  before anything that imports triton

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from served import long_folder as long_folder
from served import long_swift as long_swift
from served import tiny_swift as tiny_swift
from tokenswift_py import registry
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.ops import Ops
from tokenswift_py.models.rope import RopeTables, rope_tables
from tokenswift_py.models.spec import ModelSpec
from toys import FAMILIES as FAMILIES
from toys import save_tiny, tiny_config, tiny_model
from toys import tiny_tokenizer as tiny_tokenizer
from toys import weights_of as weights_of

PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # families of one kind of layer; test_families.py has the others

# The longest come first, so that none is left to one worker at the end. xdist would begin with those of most tests.
LONGEST = (
    "test_model", "test_identity", "test_parallel", "test_gpu_check", "test_triton_decoder", "test_api",
    "test_triton_sampling", "test_pipeline", "test_distribution", "test_policies", "test_quality", "test_heads",
    "test_abuse", "test_cli", "test_steps", "test_triton", "test_triton_products", "test_docs", "test_eviction",
    "test_output_law", "test_journal", "test_company",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))


torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # how long one example takes says nothing while the machine is busy


def decoder_of(
    model: Any,
    context: int = 512,
    attention: str = "sdpa",
    ops: Ops | None = None,
    kv_dtype: torch.dtype | None = None,
    draft: bool = False,
    rope: RopeTables | None = None,
) -> TorchDecoder:
    backend = registry.create("tokenswift_py.kernels", "BACKEND", "attention", attention)
    spec = ModelSpec.from_config(model.config)
    tables = rope or rope_tables(model.config, context)
    return TorchDecoder(spec, weights_of(model), tables, backend, ops, draft, kv_dtype)


@pytest.fixture(scope="session")
def tiny_decoder() -> TorchDecoder:
    """A llama of three layers in float64, whose tokens do not change with the number of rows in a pass."""
    return decoder_of(tiny_model(tiny_config()))


@pytest.fixture(scope="session")
def native_decoder() -> Any:
    """The same model with bf16 weights on the native engine."""
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    from tokenswift_py.models.native import NativeDecoder, NativeWeights

    config = tiny_config()
    weights = weights_of(tiny_model(config, torch.float32))
    packed = NativeWeights(ModelSpec.from_config(config), weights, torch.bfloat16, 2)
    return NativeDecoder(packed, rope_tables(config, 512))


@pytest.fixture(scope="session")
def default_model() -> Any:
    """The default model in fp32 on the torch executor, fetched and converted at the first use."""
    from tokenswift_py import TokenSwift

    return TokenSwift.from_pretrained(dtype="fp32", engine="torch")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint on disk: config, sharded safetensors, tokenizer, generation defaults."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny(folder)
    return folder
