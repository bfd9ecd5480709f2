"""Rotary tables are Hugging Face's at every position, and reach as far as the run needs or say why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tokenswift_py.errors import UserError
from tokenswift_py.models.positions import SCHEMES, STRETCHES, Positions
from tokenswift_py.models.rope import rope_tables

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


def assert_tables(config: LlamaConfig, context: int, same_as: LlamaConfig | None = None, scheme: str = "auto") -> None:
    tables = rope_tables(config, context, Positions(scheme))
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
def test_a_stretch_has_the_smallest_whole_factor(context: int, factor: int) -> None:
    yarn = config_of("yarn", factor=float(factor), original_max_position_embeddings=TRAINED)
    assert_tables(config_of("default"), context, same_as=yarn, scheme="yarn")
    linear = config_of("linear", factor=float(factor))
    assert_tables(config_of("default"), context, same_as=linear, scheme="linear")
    for scheme in ("yarn", "linear"):
        tables = rope_tables(config_of("default"), context, Positions(scheme))
        assert tables.label == f"rope-{scheme}x{factor}" and tables.positions == Positions(scheme)
        assert tables.note is not None and "which the weights were not trained for" in tables.note


def test_ntk_is_dynamic_ntk_as_of_the_stretched_length() -> None:
    """Hugging Face's dynamic tables of factor 1, when a text has just that length."""
    dynamic = config_of("dynamic", factor=1.0)
    tables = rope_tables(config_of("default"), 257, Positions("ntk"))
    cos, sin = hugging_faces(dynamic, 3 * TRAINED)
    torch.testing.assert_close(tables.cos, cos[:257], rtol=0, atol=1e-6)
    torch.testing.assert_close(tables.sin, sin[:257], rtol=0, atol=1e-6)
    assert tables.label == "rope-ntkx3"


@pytest.mark.parametrize(("context", "factor"), [(129, 5), (161, 6), (320, 10)])
def test_a_yarn_model_is_stretched_from_its_original_length(context: int, factor: int) -> None:
    assert_tables(config_of("yarn"), context, same_as=config_of("yarn", factor=float(factor)), scheme="yarn")
    assert rope_tables(config_of("yarn"), context, Positions("yarn")).label == f"rope-yarnx{factor}"


def test_a_yarn_model_reaches_its_original_length_times_its_factor() -> None:
    config = config_of("yarn", trained=32, factor=24.0)
    extended = rope_tables(config, 769, Positions("self-extend"))
    assert rope_tables(config, 768).note is None and extended.label == "rope-yarnx24+self-extend-w192-b64-g2"


def test_a_linear_model_is_stretched_by_a_factor_more() -> None:
    assert rope_tables(config_of("linear"), 2 * TRAINED, Positions("linear")).label == "rope-linearx8"


@pytest.mark.parametrize("scheme", ["linear", "ntk", "yarn"])
def test_another_scaling_is_not_stretched(scheme: str) -> None:
    with pytest.raises(UserError, match=f"^positions: '{scheme}' is not allowed; rope type llama3 of this model"):
        rope_tables(config_of("llama3"), 129, Positions(scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_covered_is_met_as_trained(scheme: str) -> None:
    tables = rope_tables(config_of("llama3"), TRAINED, Positions(scheme))
    assert tables.positions == Positions("trained") and tables.label == "rope-llama3x8" and tables.note is None


def test_positions_as_trained_go_on_when_asked_for() -> None:
    assert_tables(config_of("default"), 500, scheme="trained")
    note = rope_tables(config_of("default"), 500, Positions("trained")).note
    assert note == "context 500 is beyond the 128 trained positions, which are met as they are"


def test_where_sliding_windows_hide_the_untrained_distances_nothing_is_moved() -> None:
    config = MistralConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=512, sliding_window=400)
    tables = rope_tables(config, 5000)
    assert (tables.label, tables.note, tables.shifts) == ("rope-default", None, None)
    config.sliding_window = 600
    assert rope_tables(config, 5000).shifts is not None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dynamic"])
def test_auto_keeps_the_configs_tables_and_extends_itself_beyond_them(kind: str) -> None:
    """Angles are in fp64 there: Hugging Face's, in fp32, are off by up to 2^-24 of the position."""
    config = config_of(kind, trained=1024)
    tables = rope_tables(config, 4000)
    cos, sin = hugging_faces(config, 4000)
    torch.testing.assert_close(tables.cos, cos, rtol=0, atol=4000 * 2**-23)
    torch.testing.assert_close(tables.sin, sin, rtol=0, atol=4000 * 2**-23)
    assert tables.positions == Positions("log-extend", 256, 128) and tables.shifts is not None
    assert tables.label.endswith("+log-extend-w256-b128-s208")
    assert tables.note == (
        "context 4000 is beyond the 1024 trained positions: log-extend, beyond a window of 256 in blocks of 128 at"
        " distances that grow ever slower"
    )


@pytest.mark.parametrize(
    ("window", "block", "says"),
    [
        (None, 100, "positions_block: 100 is not allowed; one of 64, 128, 256, 512, 1024"),
        (32, None, "positions_window: 32 is not allowed; at least 64, and a multiple of the block"),
        (192, 128, "positions_window: 192 is not allowed; a multiple of the block (128)"),
        (None, 512, "positions_block: 512 is not allowed; with 1024 trained positions below 512"),
        (896, 128, "positions_window: 896 is not allowed; at most 895: with a block of 128 more leaves none of"),
    ],
)
def test_a_window_that_cannot_be_is_told(window: int | None, block: int | None, says: str) -> None:
    with pytest.raises(UserError) as told:
        rope_tables(config_of("default", trained=1024), 4000, Positions("self-extend", window, block))
    assert str(told.value).startswith(says)
    with pytest.raises(UserError, match="only with positions self-extend, log-extend or auto"):
        Positions("yarn", 512)


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
    for scheme in STRETCHES:
        rope_tables(config, 4 * TRAINED, Positions(scheme))
    with pytest.raises(UserError, match=r"^positions: 'log-extend' is not allowed; 128 trained positions are too few"):
        rope_tables(config, 4 * TRAINED)
    assert config.to_dict() == before
