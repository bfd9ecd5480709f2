"""Rotary tables are Hugging Face's at every position, and reach as far as the run needs or say why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tokenswift_py.errors import UserError
from tokenswift_py.rope import rope_tables

TRAINED = 128
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0 + step / 16 for step in range(16)],
        "long_factor": [1.0 + step for step in range(16)],
        "original_max_position_embeddings": 32,
    },
}


def config_of(kind: str, trained: int = TRAINED, **changes: Any) -> LlamaConfig:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **KINDS.get(kind, {}), **changes}
    return LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=trained, rope_parameters=parameters
    )


def hugging_faces(config: LlamaConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    return cos[0, :, :half], sin[0, :, :half]


def assert_tables(config: LlamaConfig, context: int, same_as: LlamaConfig | None = None) -> None:
    tables = rope_tables(config, context)
    cos, sin = hugging_faces(same_as or config, context)
    assert tables.context == context and tables.cos.dtype == tables.sin.dtype == torch.float32
    torch.testing.assert_close(tables.cos, cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(tables.sin, sin, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [1, TRAINED - 1, TRAINED])
def test_within_the_trained_length_the_tables_are_hugging_faces(kind: str, context: int) -> None:
    assert_tables(config_of(kind), context)
    tables = rope_tables(config_of(kind), context)
    assert tables.note is None and tables.label.startswith(f"rope-{kind}")


@pytest.mark.parametrize(("context", "factor"), [(129, 2), (256, 2), (257, 3), (1024, 8)])
def test_beyond_the_trained_length_yarn_gets_the_smallest_whole_factor(context: int, factor: int) -> None:
    yarn = config_of("yarn", factor=float(factor), original_max_position_embeddings=TRAINED)
    assert_tables(config_of("default"), context, same_as=yarn)
    tables = rope_tables(config_of("default"), context)
    assert tables.label == f"rope-yarnx{factor}"
    assert tables.note == f"context {context} is beyond the 128 trained positions: YaRN with factor {factor}"


@pytest.mark.parametrize(("context", "factor"), [(129, 5), (161, 6), (320, 10)])
def test_a_yarn_model_gets_a_larger_factor(context: int, factor: int) -> None:
    """From its original length, not from the one it already reaches."""
    assert_tables(config_of("yarn"), context, same_as=config_of("yarn", factor=float(factor)))
    assert rope_tables(config_of("yarn"), context).label == f"rope-yarnx{factor}"


def test_a_yarn_model_reaches_its_original_length_times_its_factor() -> None:
    config = config_of("yarn", trained=32, factor=3.0)
    assert rope_tables(config, 96).note is None and rope_tables(config, 97).label == "rope-yarnx4"


@pytest.mark.parametrize("kind", ["linear", "llama3", "longrope"])
def test_a_scaling_that_ends_before_the_context_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"^context: 129 is not allowed; rope type {kind} of this model ends at 128$"):
        rope_tables(config_of(kind), 129)


def test_unknown_scalings_and_partial_rotation_are_refused() -> None:
    with pytest.raises(UserError, match=r"^rope_type: 'proportional' is not allowed; supported are default, linear"):
        rope_tables(config_of("proportional", factor=2.0), 64)
    with pytest.raises(UserError, match="over the whole head"):
        rope_tables(config_of("default", partial_rotary_factor=0.5), 64)


def test_dynamic_is_frozen_at_the_context_of_the_run() -> None:
    """Hugging Face's tables change while a text grows; ours are those it has when the text is `context` long."""
    assert_tables(config_of("dynamic"), 500)
    long, longer = rope_tables(config_of("dynamic"), 500), rope_tables(config_of("dynamic"), 501)
    assert long.label == "rope-dynamicx2@500" and longer.label != long.label
    assert not torch.equal(long.cos, longer.cos[:500])
    assert rope_tables(config_of("dynamic"), 64).label == rope_tables(config_of("dynamic"), TRAINED).label


def test_longrope_is_frozen_at_the_context_of_the_run() -> None:
    """Hugging Face's factors change when a text outgrows the original length; ours are those for the run's context
    from its first token on, which the label says."""
    short, long = rope_tables(config_of("longrope"), 32), rope_tables(config_of("longrope"), 33)
    assert (short.label, long.label) == ("rope-longropex4@short", "rope-longropex4@long")
    assert not torch.equal(short.cos, long.cos[:32])
    assert_tables(config_of("longrope"), 32)
    assert_tables(config_of("longrope"), 33)


def test_the_models_config_is_left_alone() -> None:
    config = config_of("default")
    before = config.to_dict()
    rope_tables(config, 4 * TRAINED)
    assert config.to_dict() == before
