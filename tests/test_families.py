"""Every family computes what transformers computes, on both engines; keeps the row law; is written the same however it
is drafted; and is read from files as it was written there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import FAMILIES, PLAIN, decoder_of, tiny_config, tiny_model, weights_of
from gguf_writer import gguf_config, write_gguf
from native_rows import CONTEXT, assert_row_law, extend, native_of, random_tree, tokens
from samplings import PROMPT
from scripted import Scripted, write
from tokenswift_py import TokenSwift, registry
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.core import SamplingParams
from tokenswift_py.drafters.base import create
from tokenswift_py.errors import UserError
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.families.base import Experts
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.ops import choose_experts
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from toys import save_tiny

pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the native engine is not built")

KERNELS = "tokenswift_py.kernels"
LONGROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0 + i / 8 for i in range(4)],
            "long_factor": [1.0 + i for i in range(4)]}  # fmt: skip
# The fields that differ among the models of a family, by the family.
CASES: dict[str, dict[str, Any]] = {
    "smollm3": {},
    "smollm3, tied, biases, windows where nothing rotates": {
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "use_sliding_window": True,
        "sliding_window": 40,
    },
    "smollm3, every fourth layer, yarn": {
        "no_rope_layers": None, "num_hidden_layers": 5,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
                            "original_max_position_embeddings": 128},
    },
    "phi3": {},
    "phi3, a window, other heads": {"sliding_window": 40, "num_key_value_heads": 6, "tie_word_embeddings": True},
    "phi3, longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": CONTEXT},
    "gemma3_text": {},
    "gemma3_text, linear scaling of the global layers, biases": {
        "attention_bias": True, "num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 16,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "gemma3_text, a soft cap of logits": {"final_logit_softcapping": 4.0},
    "gemma2": {},
    "gemma2, other layers, heads and biases, a cap of scores alone": {
        "attention_bias": True, "final_logit_softcapping": None, "query_pre_attn_scalar": 16,
        "num_key_value_heads": 6, "tie_word_embeddings": False,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "mixtral": {},
    "mixtral, a window": {"sliding_window": 40, "num_local_experts": 3},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_moe, some layers dense": {"mlp_only_layers": [1], "attention_bias": True, "tie_word_embeddings": True},
    "qwen3_moe, every other layer": {"decoder_sparse_step": 2, "num_experts_per_tok": 1},
    "qwen2_moe": {},
    "qwen2_moe, shares that sum to 1, windows": {
        "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 40, "mlp_only_layers": [0],
    },
}  # fmt: skip


def config_of(case: str, **changes: Any) -> Any:
    sizes = {"max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 2}
    return tiny_config(case.partition(",")[0], **{**sizes, **CASES[case], **changes})


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    """In fp32, over several pages, in chunks, on both engines."""
    config = config_of(case)
    model = tiny_model(config, torch.float32)
    ids = tokens(200)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids).long()[None]).logits[0]
    for decoder in (decoder_of(model), decoder_of(model, attention="naive"), native_of(config, torch.float32)):
        found = extend(decoder, decoder.new_cache(), ids, [1, 63, 70])
        assert (found - expected).abs().max() < 1e-3, decoder.numerics


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("case", CASES)
def test_a_rows_bits_are_its_own(case: str, dtype: torch.dtype) -> None:
    """Whatever else is in the pass, on any number of threads."""
    decoder = native_of(config_of(case), dtype, threads=3)
    assert_row_law(decoder, 60, random_tree(7, 40, 0.2))
    assert_row_law(decoder, 126, random_tree(8, 30, 0.7))


@pytest.mark.parametrize("case", CASES)
def test_drafting_changes_no_token(case: str) -> None:
    decoder = native_of(config_of(case))
    params = SamplingParams(temperature=0.9, seed=8)
    plain, _, _ = write(decoder, PROMPT, 90, params)
    assert len(set(plain)) > 10
    assert write(decoder, PROMPT, 90, params, Scripted(PROMPT + plain, 61, 0.8), draft_tokens=30)[0] == plain
    assert write(decoder, PROMPT, 90, params, create("partial", view_tokens=64))[0] == plain


@pytest.mark.parametrize("case", CASES)
def test_a_folder_is_read_as_transformers_wrote_it(case: str, tmp_path: Path) -> None:
    """Every tensor to the bit; shares of them are those of the whole."""
    model = tiny_model(config_of(case), torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    checkpoint = open_checkpoint(str(tmp_path))
    expected, found = weights_of(model), checkpoint.tensors()
    assert set(found) == set(expected) == set(checkpoint.spec.shapes())
    share = checkpoint.tensors(lambda name, shape: (slice(len(shape), shape[0] // 2),))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(share[name], tensor[tensor.ndim : len(tensor) // 2]), name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_one_stack_are_read_too(family: str, tmp_path: Path) -> None:
    """transformers holds them so in memory."""
    model = tiny_model(config_of(family), torch.float32)
    model.config.save_pretrained(tmp_path)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    found = open_checkpoint(str(tmp_path)).tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights_of(model).items())


GGUF = {"smollm3": {"no_rope_layers": None}, "phi3": {},
        "gemma3_text": {"query_pre_attn_scalar": 32, "layer_types": None}, "mixtral": {},
        "gemma2": {"query_pre_attn_scalar": 32},
        "qwen3_moe": {"norm_topk_prob": True, "moe_intermediate_size": 64},
        "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}}  # fmt: skip


@pytest.mark.parametrize("family", GGUF)
def test_a_gguf_file_in_its_own_blocks(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 bits are multiplied as they are; so are other executors' values of the same file."""
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    kinds = {"down_proj": "Q4_1", "o_proj": "F16"}
    path = write_gguf(tmp_path / "tiny.gguf", gguf_config(family, **GGUF[family]), kinds, "Q8_0")
    ids, logits = tokens(100), []
    for dtype in ("gguf", "fp32"):
        swift = TokenSwift.from_pretrained(str(path), dtype=dtype)
        decoder = swift.executor.model(rope_tables(swift.checkpoint.config, CONTEXT))
        logits.append(extend(decoder, decoder.new_cache(), ids, [30]))
        assert (dtype == "gguf") == ("q8" in decoder.numerics)
    error, size = (logits[0] - logits[1]).pow(2).mean(), logits[1].pow(2).mean()
    assert 0 < error < 0.15**2 * size


@pytest.mark.parametrize("family", [*GGUF])
def test_int8_drafts_and_kept_pages_change_no_token(family: str, tmp_path: Path) -> None:
    """Through the whole program: weights and keys in 8 bits for drafts, sampled, on the native engine."""
    save_tiny(tmp_path, family)
    swift = TokenSwift.from_pretrained(str(tmp_path))
    settings: dict[str, Any] = {"max_new_tokens": 70, "temperature": 0.8, "seed": 3}
    plain = swift.generate("the cat sat on the mat and the dog", drafter="none", **settings)
    drafted = swift.generate(
        "the cat sat on the mat and the dog", drafter="partial", draft_weights="int8", draft_kv="int8", **settings
    )
    assert drafted.tokens == plain.tokens
    assert drafted.stats.num_draft_tokens > 0


@pytest.mark.parametrize("scheme", ["self-extend", "log-extend", "yarn"])
@pytest.mark.parametrize(
    "case", ["smollm3", "phi3", "gemma3_text", "gemma2", "mixtral", "qwen2_moe", "qwen3_moe, some layers dense"]
)
def test_positions_beyond_the_trained_ones(case: str, scheme: str) -> None:
    """Both engines meet them alike, and a row's bits are its own."""
    config = config_of(case, max_position_embeddings=256)
    tables, ids = rope_tables(config, 512, Positions(scheme)), tokens(450)
    model = tiny_model(config, torch.float32)
    packed = NativeWeights(ModelSpec.from_config(config), weights_of(model), torch.float32, 2)
    native = NativeDecoder(packed, tables)
    found = [extend(decoder, decoder.new_cache(), ids, [200]) for decoder in (native, decoder_of(model, rope=tables))]
    assert (found[0] - found[1]).abs().max() < 1e-3
    assert_row_law(native, 400, random_tree(3, 30, 0.3))


def test_a_layer_that_rotates_nothing_knows_no_positions() -> None:
    """A model of such layers alone writes the same, however far keys are met."""
    config = config_of("smollm3", max_position_embeddings=256, no_rope_layers=[0, 0, 0])
    decoders = [
        NativeDecoder(
            NativeWeights(
                ModelSpec.from_config(config), weights_of(tiny_model(config, torch.float32)), torch.float32, 1
            ),
            rope_tables(config, 512, Positions(scheme)),
        )
        for scheme in ("trained", "self-extend")
    ]
    one, other = (extend(decoder, decoder.new_cache(), tokens(450)) for decoder in decoders)
    assert torch.equal(one, other)


def test_of_equal_scores_the_lowest_experts_are_taken() -> None:
    """On both engines; whatever is equal by chance must not be a matter of the rows beside it."""
    config = config_of("qwen3_moe", num_experts=20, norm_topk_prob=True)
    spec, weights = ModelSpec.from_config(config), weights_of(tiny_model(config, torch.float32))
    for name in weights:
        if name.endswith("mlp.gate.weight"):
            weights[name] = torch.zeros_like(weights[name])
            weights[name][[4, 9]] = 0.1  # two that are equal, besides the others that are
        if ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) > 9:
            weights[name] = torch.full_like(weights[name], float("nan"))
    tables = rope_tables(config, 128)
    native = NativeDecoder(NativeWeights(spec, weights, torch.float32, 2), tables)
    chosen, shares = choose_experts(torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]), Experts(5, 2, 8, normalised=True))
    assert chosen.tolist() == [[1, 2]] and shares.tolist() == [[0.5, 0.5]]
    both = [native, TorchDecoder(spec, weights, tables, registry.create(KERNELS, "BACKEND", "attention", "sdpa"))]
    one, other = (extend(decoder, decoder.new_cache(), tokens(100)) for decoder in both)
    assert one.isfinite().all() and (one - other).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0 .*Gemma 3 only none"),
        ("gemma2", {"attn_logit_softcapping": -50.0}, "attn_logit_softcapping: -50.0"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping: 0.0"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        ("gemma3_text", {"hidden_activation": "relu"}, "hidden_act"),
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts"),
    ],
)
def test_what_is_not_computed_is_refused(case: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        ModelSpec.from_config(config_of(case, **changes))
    assert "\n" not in str(error.value)


def test_tables_without_the_local_ones_are_refused_before_anything_is_read() -> None:
    config = config_of("gemma3_text")
    packed = native_of(config).weights
    decoder = NativeDecoder(packed, replace(rope_tables(config, 128), local=None))
    with pytest.raises(ValueError, match="needs local RoPE tables"):
        extend(decoder, decoder.new_cache(), tokens(3))


def test_local_layers_beyond_their_training_are_refused() -> None:
    config = config_of("gemma3_text", max_position_embeddings=256, sliding_window=300)
    with pytest.raises(UserError, match="positions: 'log-extend' is not allowed; the local layers' window of 300"):
        rope_tables(config, 512)


def test_only_chosen_experts_count_as_multiplied() -> None:
    spec = ModelSpec.from_config(config_of("qwen3_moe, some layers dense"))
    mixtures, each = 2, 3 * 40 * 48
    assert spec.parameters - spec.multiplied == mixtures * 3 * each
    decoder = native_of(config_of("qwen3_moe, some layers dense"), torch.float32)
    assert decoder.weights.nbytes - decoder.weights.multiplied_nbytes >= mixtures * 3 * each * 4


def test_every_family_is_here_or_has_nothing_of_its_own() -> None:
    assert set(FAMILIES) == {*PLAIN} | {case.partition(",")[0] for case in CASES}


def test_the_page_on_adding_shows_a_family_as_it_is() -> None:
    root = Path(__file__).resolve().parent.parent
    family = (root / "tokenswift_py/models/families/qwen3.py").read_text(encoding="utf-8")
    assert f"```python\n{family}```" in (root / "docs/adding.md").read_text(encoding="utf-8")


def test_layers_without_rope_are_known() -> None:
    spec = ModelSpec.from_config(config_of("smollm3, every fourth layer, yarn"))
    assert [layer.rope for layer in spec.layer_specs] == ["global"] * 3 + [None, "global"]
