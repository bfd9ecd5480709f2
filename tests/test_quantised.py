"""Weights in blocks: products have the bits of the documented formula, rows keep the row law, and drafts with int8
weights leave nothing in the cache that could be committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from block_products import VOCAB, Floats, assert_product, decoder_with, dequantised, random_blocks, rounded
from conftest import decoder_of, tiny_config, tiny_model, weights_of
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.models.blocks import FORMATS, Blocks, FourBits
from tokenswift_py.models.executors import NativeExecutor
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from toys import save_tiny

_native = pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the native engine is not built")

ISAS = _native.runnable_isas().split(", ")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TOKENSWIFT_ISA", request.param)
    return str(request.param)


def quantised(weights: Floats) -> Blocks:
    """--dtype int8 as its documentation has it."""
    padded = np.zeros((len(weights), -(-weights.shape[1] // 32) * 32), np.float32)
    padded[:, : weights.shape[1]] = weights
    blocks = padded.reshape(len(weights), -1, 32)
    d = (np.abs(blocks).max(-1, keepdims=True) / np.float32(127)).astype(np.float16)
    inverse = np.divide(np.float32(1), d.astype(np.float32), out=np.zeros(d.shape, np.float32), where=d > 0)
    quants = np.clip(np.rint(blocks * inverse), -127, 127).astype(np.int8)
    data = np.concatenate([d.view(np.uint8), quants.view(np.uint8)], -1)
    return Blocks("q8", data.reshape(len(weights), -1))


@pytest.mark.parametrize("count", [1, 4, 11])
@pytest.mark.parametrize("kind", FORMATS)
def test_products_have_the_bits_of_the_formula(isa: str, kind: str, count: int) -> None:
    columns = FORMATS[kind].weights * (count if FORMATS[kind].weights == 32 else -(-count // 4))
    blocks = random_blocks(kind, columns, columns)
    x = np.random.default_rng(1).normal(size=(29, columns)).astype(np.float32)
    x[3] = 0
    x[5] *= 1e-12
    x[7, 3] = 1e6
    assert_product(isa, decoder_with(blocks), blocks, x)


@pytest.mark.parametrize("columns", [32, 48, 112])
def test_a_checkpoints_weights_are_rounded_as_documented(isa: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    weights = (rng.normal(size=(VOCAB, columns)) * 10.0 ** rng.integers(-8, 3, (VOCAB, 1))).astype(np.float32)
    weights[4] = 0
    x = rng.normal(size=(7, columns)).astype(np.float32)
    assert_product(isa, decoder_with(torch.from_numpy(weights)), quantised(weights), x)
    halves = torch.from_numpy(weights).bfloat16()
    assert_product(isa, decoder_with(halves), quantised(halves.float().numpy()), x)


LARGEST = {"q8": 0x80, "q5_0": 0, "q6_k": 0, "iq4_nl": 0, "iq4_xs": 0}  # bytes of the largest quants: else 0xFF


@pytest.mark.parametrize("kind", FORMATS)
def test_the_largest_products_do_not_saturate(isa: str, kind: str) -> None:
    form = FORMATS[kind]
    blocks = random_blocks(kind, 2 * form.weights, 0)
    raw = blocks.data.reshape(VOCAB, 2, -1)
    others = np.setdiff1d(np.arange(form.stored), [(at, at + 1) for at in form.halves])
    raw[..., others] = LARGEST.get(kind, 0xFF)
    x = np.full((4, blocks.shape[1]), 3.0, np.float32) * np.array([[1], [-1], [0.5], [2]], np.float32)
    assert_product(isa, decoder_with(blocks), blocks, x)


@pytest.mark.parametrize("kind", FORMATS)
def test_products_are_those_of_the_files_weights(isa: str, kind: str) -> None:
    """The gguf package's values times the rounded activations, in double."""
    blocks = random_blocks(kind, 512, 7)
    x = np.random.default_rng(2).normal(size=(9, 512)).astype(np.float32)
    scale, quants = rounded(x, 16)
    factors, weights = (
        (scale[..., None].astype(np.float64) * quants).reshape(x.shape),
        dequantised(blocks).astype(np.float64),
    )
    logits = decoder_with(blocks).project(torch.from_numpy(x)).numpy()
    size = np.abs(factors) @ np.abs(weights).T
    assert (np.abs(logits - factors @ weights.T) <= 2e-6 * size + 1e-30).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_embeddings_are_the_files_values(isa: str, kind: str) -> None:
    """Layers that add nothing leave them in the residual stream, to the bit."""
    blocks = random_blocks(kind, 512, 8)
    config = tiny_config(hidden_size=512, vocab_size=VOCAB, num_attention_heads=2, tie_word_embeddings=False)
    zeros = {name: torch.zeros(shape) for name, shape in ModelSpec.from_config(config).shapes().items()}
    nothing = {name: zero for name, zero in zeros.items() if "o_proj" in name or "down_proj" in name}
    decoder = decoder_with(blocks, **{"model.embed_tokens.weight": blocks}, **nothing)
    rows = DraftTree.chain(range(VOCAB))
    output = decoder.forward([Segment(rows, decoder.new_cache(), causal=True)], [])
    assert np.array_equal(output.residual.numpy(), dequantised(blocks))


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=10, deadline=None)
@given(rows=st.lists(st.integers(0, 199), min_size=1, max_size=120), threads=st.integers(1, 4))
def test_a_projected_row_has_the_same_bits_whatever_travels_with_it(kind: str, rows: list[int], threads: int) -> None:
    decoder = PROJECTORS.setdefault((kind, threads), decoder_with(random_blocks(kind, 256, 5), threads))
    hidden = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([decoder.project(hidden[row : row + 1]) for row in rows])
    assert torch.equal(decoder.project(hidden[rows]), alone)


PROJECTORS: dict[tuple[str, int], NativeDecoder] = {}


def test_what_is_not_finite_shows() -> None:
    decoder = decoder_with(random_blocks("q8", 96, 5))
    hidden = torch.ones(3, 96)
    hidden[1, 40], hidden[2, 90] = torch.nan, torch.inf
    finite = decoder.project(hidden).isfinite()
    assert finite[0].all() and not finite[1].any() and not finite[2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_projecting_a_passs_hidden_states_gives_its_logits(isa: str, dtype: torch.dtype) -> None:
    config = tiny_config(hidden_size=42, head_dim=14)
    decoder = native(config, dtype)
    output = decoder.forward([Segment(DraftTree.chain(range(30)), decoder.new_cache(), causal=True)])
    assert torch.equal(decoder.project(output.hidden), output.logits)
    assert torch.equal(decoder.project(output.hidden[[7]]), output.logits[[7]])
    assert decoder.project(output.hidden[:0]).shape == (0, 61)


def native(config: Any, dtype: torch.dtype = torch.int8, threads: int = 2, **options: Any) -> NativeDecoder:
    weights = weights_of(tiny_model(config, torch.float32))
    return NativeDecoder(
        NativeWeights(ModelSpec.from_config(config), weights, dtype, threads), tables(config), **options
    )


def tables(config: Any) -> Any:
    return rope_tables(config, 512)


def test_torch_projects_too() -> None:
    decoder = decoder_of(tiny_model(tiny_config()))
    output = decoder.forward([Segment(DraftTree.chain(range(9)), decoder.new_cache())])
    assert torch.equal(decoder.project(output.hidden), output.logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_int8_is_near_the_weights_it_was_made_from(isa: str, family: str) -> None:
    config = tiny_config(family=family, hidden_size=96, intermediate_size=160, tie_word_embeddings=family == "qwen2")
    half, whole = native(config), decoder_of(tiny_model(config, torch.float32), 512)
    tokens = np.random.default_rng(0).integers(0, 61, 100)
    logits, expected = (
        model.forward([Segment(DraftTree.chain(tokens), model.new_cache(), causal=True)]).logits
        for model in (half, whole)
    )
    assert (logits - expected).pow(2).mean() < 0.15**2 * expected.pow(2).mean()


def test_packed_weights_take_eight_and_a_half_bits() -> None:
    config = tiny_config(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=1024, num_attention_heads=4)
    weights = native(config).weights
    spec = weights.spec
    assert weights.nbytes == pytest.approx(spec.parameters * 8.5 / 8, rel=0.01)
    assert weights.multiplied_nbytes == pytest.approx(spec.multiplied * 8.5 / 8, rel=0.01)
    assert weights.multiplied_nbytes < weights.nbytes
    assert native(config).numerics.split("/")[2:4] == ["q8-block32", "kv-bf16"]


BAD_BLOCKS: dict[str, tuple[Any, ...]] = {
    "rows": ("head", "q8", np.zeros((60, 34), np.uint8)),
    "columns": ("head", "q8", np.zeros((61, 34), np.uint8)),
    "half a block": ("head", "q4", np.zeros((61, 30), np.uint8)),
    "a quarter of a block": ("head", "q4_k", np.zeros((61, 36), np.uint8)),
    "columns of whole blocks": ("head", "q4_k", np.zeros((61, 144), np.uint8)),
    "kind": ("head", "q5", np.zeros((61, 68), np.uint8)),
    "type": ("head", "q8", np.zeros((61, 68), np.int8)),
    "strided": ("head", "q8", np.zeros((61, 136), np.uint8)[:, ::2]),
    "flat": ("head", "q8", np.zeros(68, np.uint8)),
    "part": ("neck", "q8", np.zeros((61, 68), np.uint8)),
}


@pytest.mark.parametrize("case", BAD_BLOCKS)
def test_malformed_blocks_are_refused(case: str) -> None:
    decoder = native(tiny_config(hidden_size=64, num_attention_heads=4)).weights.native
    part, kind, data = BAD_BLOCKS[case]
    with pytest.raises((ValueError, TypeError)):
        decoder.set_blocks(part, 0, kind, data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_values_hold_no_blocks(dtype: torch.dtype) -> None:
    decoder = native(tiny_config(hidden_size=64, num_attention_heads=4), dtype).weights.native
    with pytest.raises(ValueError, match="head"):
        decoder.set_blocks("head", -1, "q8", np.zeros((61, 68), np.uint8))


@pytest.mark.parametrize(
    ("hidden", "logits"),
    [
        (np.zeros((2, 47), np.float32), np.zeros((2, 61), np.float32)),
        (np.zeros((2, 48), np.float32), np.zeros((1, 61), np.float32)),
        (np.zeros((2, 48), np.float64), np.zeros((2, 61), np.float32)),
        (np.zeros((48, 2), np.float32).T, np.zeros((2, 61), np.float32)),
        (None, np.zeros((2, 61), np.float32)),
    ],
)
def test_malformed_projections_are_refused(hidden: Any, logits: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        native(tiny_config()).weights.native.project(hidden, logits)


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(str(tiny_folder), engine="native")


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_draft_models_rows_are_never_committed(tiny_folder: Path, engine: str, weights: str) -> None:
    attention = "sdpa" if engine == "torch" else "auto"
    executor = TokenSwift.from_pretrained(str(tiny_folder), engine=engine, attention=attention).executor
    rope = tables(tiny_config())
    if (engine, weights) == ("torch", "int8"):
        with pytest.raises(UserError, match=r"draft_weights: 'int8' is not allowed; .* engine native have all"):
            executor.self_draft(rope, weights)
        return
    target, draft = executor.model(rope), executor.self_draft(rope, weights, "own")
    cache = target.new_cache()
    prompt = DraftTree.chain(range(70))
    target.forward([Segment(prompt, cache, causal=True)])
    cache.commit(range(70))
    expected = target.forward([Segment(DraftTree.chain([5]), cache)]).logits
    cache.drop_tail()
    drafted = draft.forward([Segment(DraftTree.chain([5]), cache)]).logits
    assert (drafted - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.equal(drafted, expected) == (weights == "bf16")
    with pytest.raises(ValueError, match="commit"):
        cache.commit([0])
    target.forward([Segment(DraftTree.chain([6]), cache, tail=(0,))])
    with pytest.raises(ValueError, match="commit"):  # it stands on the draft's row
        cache.commit([0, 1])
    cache.drop_tail()
    assert torch.equal(target.forward([Segment(DraftTree.chain([5]), cache)]).logits, expected)


def test_int8_drafts_share_the_team_and_are_packed_once(swift: TokenSwift) -> None:
    rope = tables(tiny_config())
    first, second = (swift.executor.self_draft(rope, "int8") for _ in range(2))
    target = swift.executor.model(rope)
    assert isinstance(first, NativeDecoder) and isinstance(second, NativeDecoder) and isinstance(target, NativeDecoder)
    assert first.weights is second.weights
    assert first.weights.team is target.weights.team
    assert swift.executor.self_draft(rope, "bf16").weights is target.weights  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="draft_weights: 'fp4'"):
        swift.executor.self_draft(rope, "fp4")


def test_int8_drafts_that_cannot_fit_are_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_folder), engine="native")
    monkeypatch.setattr("tokenswift_py.memory.free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"memory: .* int8 weights for drafts"):
        swift.executor.self_draft(tables(tiny_config()), "int8")


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_int4_drafts_are_blocks_of_four_bits(tmp_path: Path, family: str) -> None:
    """By the gguf package no weight is off by more than half a step, a thirtieth of what its group spans. Routers, and
    an embedding of which only rows are read, stay."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 32}
    save_tiny(tmp_path / "model", family, **sizes, shared_expert_intermediate_size=32, tie_word_embeddings=False)
    executor = TokenSwift.from_pretrained(str(tmp_path / "model"), engine="native", dtype="fp32").executor
    assert isinstance(executor, NativeExecutor)
    rope = tables(executor._checkpoint.config)
    draft, again = (executor.self_draft(rope, "int4", "own") for _ in range(2))
    assert isinstance(draft, NativeDecoder) and isinstance(again, NativeDecoder)
    assert again.weights is draft.weights and draft.weights.kinds == {"q4", "q8"}
    tensors = executor._checkpoint.tensors()
    found = FourBits(tensors, draft.spec)
    for name, shape in draft.spec.shapes().items():
        part, stay = found[name], ("mlp.gate.weight", "expert_gate.weight", "embed_tokens.weight")
        assert isinstance(part, Blocks) == (len(shape) == 2 and not name.endswith(stay))
        if isinstance(part, Blocks):
            groups = tensors[name].unflatten(1, (-1, 32))
            half = (groups.amax(2) - groups.amin(2)) / 30
            error = torch.from_numpy(dequantised(part)).unflatten(1, (-1, 32)) - groups
            assert (error.abs().amax(2) <= 1.05 * half).all()
    target, rows = executor.model(rope), DraftTree.chain(range(9))
    cache = target.new_cache()
    expected = target.forward([Segment(rows, cache)]).logits
    cache.drop_tail()
    drafted = draft.forward([Segment(rows, cache)]).logits
    assert 0 < (drafted - expected).abs().max() < 0.5 * expected.abs().max()
    beside = executor.beside(executor._checkpoint, "int4")
    assert beside.kinds == draft.weights.kinds


def test_an_int8_target_drafts_with_its_own_weights(tiny_folder: Path) -> None:
    executor = TokenSwift.from_pretrained(str(tiny_folder), engine="native", dtype="int8").executor
    rope = tables(tiny_config())
    assert executor.self_draft(rope, "int8").weights is executor.model(rope).weights  # type: ignore[attr-defined]


def test_two_decoders_of_one_team_take_turns(swift: TokenSwift) -> None:
    """Their passes run in different threads, with one set of workers."""
    from concurrent.futures import ThreadPoolExecutor

    rope = tables(tiny_config())
    models = [swift.executor.model(rope), swift.executor.self_draft(rope, "int8")]

    def logits(model: Any) -> torch.Tensor:
        cache = model.new_cache()
        return torch.cat([model.forward([Segment(DraftTree.chain(range(40)), cache)]).logits for _ in range(5)])

    alone = [logits(model) for model in models]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(logits, models * 8))
    assert all(torch.equal(found, expected) for found, expected in zip(together, alone * 8, strict=True))


@pytest.mark.parametrize("dtype", ["int8"])
@pytest.mark.parametrize("drafter", ["ngram", "partial"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_quantised_targets_write_what_plain_decoding_writes(
    tiny_folder: Path, dtype: str, drafter: str, temperature: float
) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_folder), engine="native", dtype=dtype)
    settings: dict[str, Any] = {"max_new_tokens": 150, "temperature": temperature, "seed": 3, "ignore_eos": True}
    plain = swift.generate("the cat and the dog and the cat", drafter="none", **settings)
    drafted = swift.generate("the cat and the dog and the cat", drafter=drafter, **settings)
    assert drafted.tokens == plain.tokens
    assert drafted.report["guarantee"] == "bitwise"
    assert "-block32/kv-bf16/" in drafted.report["numerics"]
    assert drafted.report["dtype"] == dtype


def test_quantised_weights_need_the_native_engine(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="dtype: 'int8' is not allowed; with engine torch one of bf16, fp32"):
        TokenSwift.from_pretrained(str(tiny_folder), engine="torch", dtype="int8")


@pytest.mark.parametrize("columns", [64, 96])
def test_weights_that_came_from_4_bits_are_packed_in_4_bits_again(isa: str, columns: int) -> None:
    """From q = 0 to 15 in every block: the same blocks are found again, and almost the same after rounding to bf16."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (VOCAB, columns // 32, FORMATS["q4"].stored)).astype(np.uint8)
    raw[..., 7], raw[..., 11] = 0x0F, 0xF0
    halves = rng.uniform((0.01, -0.3), (0.03, -0.1), (VOCAB, columns // 32, 2)).astype(np.float16)
    raw[..., :4] = halves.view(np.uint8)
    blocks = Blocks("q4", raw.reshape(VOCAB, -1))
    values = torch.from_numpy(dequantised(blocks))
    x = torch.randn((3, columns), generator=torch.Generator().manual_seed(0))
    expected = decoder_with(blocks).project(x)
    packed, found = head_of(values, fewest_bits=True)
    assert "q4" in packed.label and torch.equal(found(x), expected)
    packed, found = head_of(values.bfloat16(), fewest_bits=True)
    assert "q4" in packed.label
    assert 0 < (found(x) - expected).abs().mean() < 0.01 * expected.std()


@pytest.mark.parametrize("columns", [64, 96])
def test_weights_finer_than_4_bits_keep_8(columns: int) -> None:
    normal = torch.randn((VOCAB, columns), generator=torch.Generator().manual_seed(0))
    broken = normal.clone()
    broken[70, 5] = torch.nan
    for values in (normal, broken):
        assert "q4" not in head_of(values, fewest_bits=True)[0].label
    few = torch.tensor(np.random.default_rng(0).integers(0, 2, (VOCAB, columns))).float()
    assert "q4" in head_of(few, fewest_bits=True)[0].label
    assert "q4" not in head_of(few)[0].label, "only where it was asked for"
    almost = few.clone()
    almost[-1] = normal[-1]
    assert "q4" not in head_of(almost, fewest_bits=True)[0].label, "one row of many is finer"


def head_of(values: torch.Tensor, **options: Any) -> tuple[NativeWeights, Any]:
    """The LM head packed so, in a model of 8 bits else, and what multiplies with it."""
    config = tiny_config(
        hidden_size=values.shape[1], vocab_size=VOCAB, num_attention_heads=2, tie_word_embeddings=False
    )
    weights: dict[str, Any] = weights_of(tiny_model(config, torch.float32))
    packed = NativeWeights(
        ModelSpec.from_config(config), weights | {"lm_head.weight": values}, torch.int8, 2, **options
    )
    return packed, NativeDecoder(packed, rope_tables(config, 512)).project
