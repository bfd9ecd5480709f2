"""What GGUF files that people have compute is what transformers computes of the same model: every type of blocks, every
way to store RoPE's scaling, biases, parts; what is not computed is refused in one line."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import gguf_writer
from conftest import tiny_config, tiny_model, tiny_tokenizer
from gguf_writer import VALUES, gguf_config, write_gguf
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.checkpoints.cache import sha256
from tokenswift_py.checkpoints.generation_defaults import not_honoured
from tokenswift_py.checkpoints.gguf_config import config_of
from tokenswift_py.checkpoints.gguf_file import open_gguf
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.checkpoints.stored_tensors import StoredTensors
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.models.devices import WEIGHT_FORMATS
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.runs import contract
from tokenswift_py.runs.audit import audit

pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")

KINDS = sorted(kind for kind in GGMLQuantizationType.__members__ if hasattr(quants, kind) and kind not in VALUES)
HEAD = 32
Change = Callable[[GGUFWriter], None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Values


def random_blocks(shape: tuple[int, int], kind: str, seed: int) -> npt.NDArray[np.uint8]:
    """Random bytes; blocks whose values are not finite are drawn again."""
    type_of, rng = GGMLQuantizationType[kind], np.random.default_rng(seed)
    block, size = GGML_QUANT_SIZES[type_of]
    raw = np.zeros((math.prod(shape) // block, size), np.uint8)
    left = np.ones(len(raw), bool)
    while left.any():
        raw[left] = rng.integers(0, 256, (int(left.sum()), size), np.uint8)
        with np.errstate(all="ignore"):
            left = ~np.isfinite(dequantize(raw, type_of)).all(-1)
    return raw.reshape(shape[0], -1)


@pytest.mark.parametrize("kind", [*KINDS, *VALUES])
def test_the_values_of_every_type_are_those_that_transformers_reads(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 to the bit; in bf16 these rounded; q and k of the llama architecture in transformers' order of rows."""
    monkeypatch.setattr(
        gguf_writer, "encoded", lambda weights, kind, seed: weights if kind == "F32"
        else weights.astype(np.float16) if kind == "F16" else random_blocks(weights.shape, kind, seed)
    )  # fmt: skip
    config = gguf_config("llama", num_hidden_layers=1, tie_word_embeddings=False)
    path = write_gguf(tmp_path / "tiny.gguf", config, {}, kind)
    source: dict[str, Any] = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **source).state_dict()
    checkpoint = open_checkpoint(str(path))
    ours, rounded = (checkpoint.tensors(dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for name, tensor in ours.items():
        assert torch.equal(tensor.float(), theirs[name]), name
        assert torch.equal(rounded[name].bfloat16(), theirs[name].bfloat16()), name


def test_a_type_that_is_only_known_by_name_is_refused(tmp_path: Path) -> None:
    config = gguf_config("llama", num_hidden_layers=1)
    writer_type = GGMLQuantizationType.Q8_K
    raw = np.zeros((512, GGML_QUANT_SIZES[writer_type][1]), np.uint8)
    path = write_gguf(
        tmp_path / "tiny.gguf", config, {}, without=["blk.0.ffn_up.weight"],
        change=lambda writer: writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=writer_type),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"tensor blk\.0\.ffn_up\.weight: type: 'Q8_K' is not allowed"):
        open_checkpoint(str(path))


def test_shares_of_tensors_are_those_of_the_whole(tmp_path: Path) -> None:
    """Rows and columns, as ranks read them."""
    from tokenswift_py.parallel.shards import Shard

    config = gguf_config("llama", attention_bias=True)
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", config, {"o_proj": "Q8_0"}, "Q4_1")))
    whole = checkpoint.tensors()
    for gather in (False, True):
        for rank in (0, 1):
            part = Shard(rank, 2, gather).of
            for name, tensor in checkpoint.tensors(part).items():
                assert torch.equal(tensor, whole[name][part(name, whole[name].shape)]), name


# What a file's metadata and tensors mean


def llama3() -> tuple[dict[str, Any], npt.NDArray[np.float32]]:
    """The scaling of Llama 3.1 and 3.2, smaller, and the factors that llama.cpp's converter makes of it."""
    scaling = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    config = gguf_config("llama", rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 500_000.0 ** (torch.arange(0, HEAD, 2).float() / HEAD)
    return scaling, (plain / scaled).numpy()


LLAMA3, FACTORS = llama3()
LONG = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 64, "factor": 16.0,
        "short_factor": np.linspace(1, 2, HEAD // 2, dtype=np.float32).tolist(), "attention_factor": 1.25,
        "long_factor": np.linspace(1, 9, HEAD // 2, dtype=np.float32).tolist()}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def keys(family: str = "llama", **values: Any) -> Change:
    def change(writer: GGUFWriter) -> None:
        for name, value in values.items():
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
            add(f"{family}.{name.replace('__', '.')}", value)

    return change


# Of each: the config that transformers computes with, and how the file differs from one that says everything.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (gguf_config("llama"), {}),
    "llama, tied": (gguf_config("llama", tie_word_embeddings=True), {}),
    "llama, heads of another size": (gguf_config("llama", head_dim=64), {}),
    "llama without head_count_kv": (
        gguf_config("llama", num_key_value_heads=8), {"without": ["attention.head_count_kv"]}),
    "llama without sizes of heads": (
        gguf_config("llama"), {"without": ["attention.key_length", "attention.value_length", "rope.dimension_count"]}),
    "llama without freq_base": (gguf_config("llama"), {"without": ["rope.freq_base"]}),
    "llama without vocab_size": (gguf_config("llama"), {"without": ["vocab_size"]}),
    "llama with biases": (gguf_config("llama", attention_bias=True, mlp_bias=True), {}),
    "qwen2": (gguf_config("qwen2"), {}),
    "qwen2, yarn": (
        gguf_config("qwen2", rope_parameters=YARN),
        {"change": keys("qwen2", rope__scaling__type="yarn", rope__scaling__factor=4.0,
                        rope__scaling__original_context_length=32)}),
    "qwen3": (gguf_config("qwen3", head_dim=64), {}),
    "qwen3 with biases": (gguf_config("qwen3", attention_bias=True, tie_word_embeddings=True), {}),
    "smollm3": (gguf_config("smollm3", no_rope_layers=None, num_hidden_layers=5), {}),
    "smollm3, yarn": (
        gguf_config("smollm3", no_rope_layers=None, num_hidden_layers=4, rope_parameters=YARN),
        {"change": keys("smollm3", rope__scaling__type="yarn", rope__scaling__factor=4.0,
                        rope__scaling__original_context_length=32)}),
    "phi3": (gguf_config("phi3", sliding_window=40), {}),
    "phi3, longrope": (
        gguf_config("phi3", rope_parameters=LONG, original_max_position_embeddings=64),
        {"more": {f"rope_factors_{name}.weight": np.array(LONG[f"{name}_factor"], np.float32)
                  for name in ("short", "long")},
         "change": keys("phi3", rope__scaling__attn_factor=1.25, rope__scaling__original_context_length=64)}),
    "gemma3": (
        gguf_config("gemma3_text", layer_types=None, num_hidden_layers=7, query_pre_attn_scalar=32, rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}),
        {"change": keys("gemma3", rope__scaling__type="linear", rope__scaling__factor=8.0)}),
    "gemma3, its own bases and pattern": (
        gguf_config("gemma3_text", query_pre_attn_scalar=32, tie_word_embeddings=False, rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}, num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        {"change": keys("gemma3", rope__freq_base_swa=500.0, attention__sliding_window_pattern=2)}),
    "gemma3, a cap of logits": (
        gguf_config("gemma3_text", layer_types=None, num_hidden_layers=6, query_pre_attn_scalar=32,
            final_logit_softcapping=3.0, rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}), {}),
    "gemma2": (gguf_config("gemma2", num_hidden_layers=5, query_pre_attn_scalar=32), {}),
    "gemma2, llama.cpp's own window and caps": (
        gguf_config("gemma2", num_hidden_layers=3, query_pre_attn_scalar=32, sliding_window=4096,
                    attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        {"without": ["attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"]}),
    "gemma2 of 27B": (
        gguf_config("gemma2", num_hidden_layers=46, hidden_size=64, intermediate_size=64, num_attention_heads=4,
                    query_pre_attn_scalar=16), {}),
    "mixtral": (gguf_config("mixtral"), {}),
    "qwen3_moe": (gguf_config("qwen3_moe", norm_topk_prob=True), {}),
    "qwen2_moe": (gguf_config("qwen2_moe"), {}),
    "qwen2_moe of an early file": (
        gguf_config("qwen2_moe", shared_expert_intermediate_size=512),
        {"without": ["expert_shared_feed_forward_length"]}),
    "llama 3": (gguf_config("llama", rope_parameters=LLAMA3), {"more": {"rope_freqs.weight": FACTORS}}),
    "llama 3, said to be none": (
        gguf_config("llama", rope_parameters=LLAMA3),
        {"more": {"rope_freqs.weight": FACTORS}, "change": keys(rope__scaling__type="none")}),
    "factors of one": (gguf_config("llama"), {"more": {"rope_freqs.weight": np.ones(HEAD // 2, np.float32)}}),
    "linear": (
        gguf_config("llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}),
        {"change": keys(rope__scaling__type="linear", rope__scaling__factor=4.0)}),
    "linear, by default": (
        gguf_config("llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}),
        {"change": keys(rope__scaling__factor=4.0)}),
    "linear, the old key": (
        gguf_config("llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}),
        {"change": keys(rope__scale_linear=4.0)}),
    "scaling none": (gguf_config("llama"), {"change": keys(rope__scaling__type="none", rope__scaling__factor=4.0)}),
    "yarn": (
        gguf_config("llama", rope_parameters={**YARN, "beta_fast": 24.0, "beta_slow": 2.0}),
        {"change": keys(rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__yarn_beta_fast=24.0,
                        rope__scaling__yarn_beta_slow=2.0, rope__scaling__original_context_length=32)}),
    "yarn with attn_factor": (
        gguf_config("llama", rope_parameters={**YARN, "attention_factor": 1.5 * (0.1 * math.log(4.0) + 1)}),
        {"change": keys(rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__attn_factor=1.5,
                        rope__scaling__original_context_length=32)}),
    "longrope": (
        gguf_config("llama", rope_parameters=LONG),
        {"more": {f"rope_factors_{name}.weight": np.array(LONG[f"{name}_factor"], np.float32)
                  for name in ("short", "long")},
         "change": keys(rope__scaling__type="longrope", rope__scaling__attn_factor=1.25,
                        rope__scaling__original_context_length=64)}),
}  # fmt: skip


def logits_of(model: Any, tokens: npt.NDArray[Any]) -> torch.Tensor:
    logits: torch.Tensor = model.forward([Segment(DraftTree.chain(tokens), model.new_cache(), causal=True)]).logits
    return logits


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    """The same weights in a GGUF file as in transformers' model, on both engines."""
    config, differs = CASES[case]
    model = tiny_model(config, torch.float32)
    path = write_gguf(tmp_path / "tiny.gguf", config, {}, state=model.state_dict(), **differs)
    tokens = np.random.default_rng(0).integers(0, 250, 100)
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)[None]).logits[0]
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.spec.kv_heads == config.num_key_value_heads
    assert checkpoint.config.rms_norm_eps == config.rms_norm_eps
    assert checkpoint.spec.trained_context == config.max_position_embeddings
    assert checkpoint.spec.vocab_size == config.vocab_size
    for engine in ("torch", "native"):
        swift = TokenSwift.from_pretrained(str(path), dtype="fp32", engine=engine)
        logits = logits_of(swift.executor.model(rope_tables(checkpoint.config, 100)), tokens)
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max(), engine


def test_a_mistral_in_the_llama_architecture(tmp_path: Path) -> None:
    """llama.cpp's converter writes it so."""
    sizes = {**gguf_writer.SIZES, "vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 1024}
    model = tiny_model(tiny_config("mistral", **{**sizes, "head_dim": 64}, sliding_window=None), torch.float32)
    path = write_gguf(tmp_path / "tiny.gguf", gguf_config("llama", head_dim=64), {}, state=model.state_dict())
    tokens = np.random.default_rng(0).integers(0, 250, 100)
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)[None]).logits[0]
    swift = TokenSwift.from_pretrained(str(path), dtype="fp32")
    logits = logits_of(swift.executor.model(rope_tables(swift.checkpoint.config, 100)), tokens)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_bias_that_is_missing_is_zero(tmp_path: Path) -> None:
    """llama.cpp takes each of a layer's biases or leaves it."""
    config = gguf_config("llama", attention_bias=True)
    state = tiny_model(config, torch.float32).state_dict()
    without = [f"blk.{layer}.{name}.bias" for layer in (0, 1) for name in ("attn_output", "attn_k")]
    tensors = open_checkpoint(str(write_gguf(tmp_path / "t.gguf", config, {}, state=state, without=without))).tensors()
    for layer in (0, 1):
        at = f"model.layers.{layer}.self_attn"
        assert torch.equal(tensors[f"{at}.q_proj.bias"], state[f"{at}.q_proj.bias"])
        for name, size in (("o_proj", 256), ("k_proj", 64)):
            assert torch.equal(tensors[f"{at}.{name}.bias"], torch.zeros(size))


@pytest.mark.parametrize("dtype", ["bf16", "gguf"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope__scaling__type", "su"),
        ("rope__scaling__attn_factor", 1.5),
        ("rope__scaling__yarn_log_multiplier", 0.1),
        ("logit_scale", 0.5),
        ("attention__scale", 0.5),
        ("attention__sliding_window", 64),
        ("rope__freq_base_swa", 5.0),
    ],
)
def test_metadata_that_change_the_arithmetic_are_refused(tmp_path: Path, dtype: str, name: str, value: Any) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", gguf_config("llama"), {}, change=keys(**{name: value}))
    key = re.escape(f"llama.{name.replace('__', '.')}")
    with pytest.raises(UserError, match=f"model: {key}: {value!r} is not allowed") as error:
        open_checkpoint(str(path), dtype=dtype)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("without", "change", "says"),
    [
        (["attention.value_length"], keys(attention__value_length=16), r"llama\.attention\.value_length: 16"),
        (["rope.dimension_count"], keys(rope__dimension_count=16), r"llama\.rope\.dimension_count: 16"),
        (["attention.head_count"], keys(), r"llama\.attention\.head_count: None"),
        (["context_length"], keys(context_length=0), r"llama\.context_length: 0"),
        ((), lambda writer: writer.add_array("llama.leading", [1]), r"llama\.leading"),
        ((), lambda writer: writer.add_type("adapter"), r"general\.type: 'adapter'"),
    ],
)
def test_metadata_that_are_missing_or_not_supported(tmp_path: Path, without: Any, change: Change, says: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", gguf_config("llama"), {}, without=without, change=change)
    with pytest.raises(UserError, match=says):
        open_checkpoint(str(path))


def test_one_number_for_every_layer_may_be_a_list(tmp_path: Path) -> None:
    def heads(*counts: int) -> Change:
        return lambda writer: writer.add_array("llama.attention.head_count_kv", list(counts))

    settings: dict[str, Any] = {"without": ["attention.head_count_kv"]}
    path = write_gguf(tmp_path / "same.gguf", gguf_config("llama"), {}, change=heads(2, 2), **settings)
    assert config_of(open_gguf(path))["num_key_value_heads"] == 2
    path = write_gguf(tmp_path / "other.gguf", gguf_config("llama"), {}, change=heads(2, 4), **settings)
    with pytest.raises(UserError, match=r"head_count_kv.*the same number for every layer"):
        open_checkpoint(str(path))


@pytest.mark.parametrize("dtype", ["bf16", "gguf"])
@pytest.mark.parametrize(
    ("family", "name", "size"),
    [
        ("llama", "blk.0.attn_q_norm.weight", HEAD),
        ("llama", "blk.2.ffn_norm.weight", 256),
        ("llama", "rope_factors_long.weight", HEAD // 2),
        ("qwen2", "rope_freqs.weight", HEAD // 2),
        ("qwen2", "blk.0.attn_output.bias", 256),
    ],
)
def test_tensors_that_nothing_reads_are_refused(tmp_path: Path, dtype: str, family: str, name: str, size: int) -> None:
    path = write_gguf(tmp_path / "t.gguf", gguf_config(family), {}, more={name: np.full(size, 2, np.float32)})
    with pytest.raises(UserError, match=f"model: tensor {re.escape(name)}"):
        open_checkpoint(str(path), dtype=dtype)


@pytest.mark.parametrize("count", [20_000_000, [20_000_000], [2, 20_000_000], 2.0e7])
def test_more_layers_than_tensors_are_refused_before_any_is_described(tmp_path: Path, count: Any) -> None:
    """In whatever type: for each layer much is made before its tensors are looked for."""

    def change(writer: GGUFWriter) -> None:
        key = "llama.block_count"
        add = {list: writer.add_array, float: writer.add_float32}.get(type(count), writer.add_uint32)
        add(key, count)

    path = write_gguf(tmp_path / "t.gguf", gguf_config("llama"), {}, without=["block_count"], change=change)
    with pytest.raises(UserError, match=r"model: llama\.block_count: .* tensors in all"):
        open_checkpoint(str(path))


def test_more_experts_than_can_be_are_refused_before_any_is_described(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "t.gguf", gguf_config("mixtral"), {}, without=["expert_count"],
        change=lambda writer: writer.add_uint32("llama.expert_count", 2**32 - 1),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"experts: 8589934590 is not allowed; at most 262144"):
        open_checkpoint(str(path))


@pytest.mark.parametrize("dtype", ["bf16", "gguf"])
def test_every_token_that_ends_a_text_ends_it(tmp_path: Path, dtype: str) -> None:
    def change(writer: GGUFWriter) -> None:
        writer.add_eot_token_id(5)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 2)

    path = write_gguf(tmp_path / "tiny.gguf", gguf_config("llama"), {}, change=change)
    # 0 is <|endoftext|>. llama.cpp ends a text there by the token's text, whether or not a key names it.
    assert open_checkpoint(str(path), dtype=dtype).eos == (2, 5, 0)


def test_a_tag_of_html_ends_no_text(tmp_path: Path) -> None:
    """Gemma's vocabulary has </s> beside its own <eos>."""

    def with_tags(writer: GGUFWriter) -> None:
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        tokens[20:22] = ["</s>", "<eos>"]

    path = write_gguf(tmp_path / "tags.gguf", gguf_config("llama"), {}, change=with_tags)
    eos = open_checkpoint(str(path)).eos
    assert 21 in eos and 20 not in eos


def test_a_run_ends_by_the_tokens_that_it_was_begun_with(tmp_path: Path) -> None:
    """One that was begun when fewer were known is resumed and proven as it was begun."""
    path = write_gguf(tmp_path / "tiny.gguf", gguf_config("llama"), {})
    swift, older = (TokenSwift.from_pretrained(str(path), dtype="fp32") for _ in range(2))
    assert swift.checkpoint.eos == (2, 0)
    older.checkpoint = replace(older.checkpoint, eos=(2,))
    settings: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.0, "logit_bias": {0: 8.0, 2: -100.0}, "seed": 1}
    whole = older.generate("the cat", **settings)
    assert 0 in whole.tokens and len(whole.tokens) == 60 > len(swift.generate("the cat", **settings).tokens)
    with older.stream("the cat", out=tmp_path / "run", **settings) as stream:
        for count, _ in enumerate(stream):
            if count == 5:
                break
    with swift.resume(tmp_path / "run") as stream:
        assert list(stream)
    assert stream.result().tokens == whole.tokens
    assert audit(swift, tmp_path / "run").passed


def test_recommended_sampling_parameters_are_the_defaults(tmp_path: Path) -> None:
    """As those of generation_config.json are, from which the converter of llama.cpp takes them."""

    def change(writer: GGUFWriter) -> None:
        writer.add_float32("general.sampling.temp", 0.6)
        writer.add_float32("general.sampling.top_p", 0.95)
        writer.add_int32("general.sampling.top_k", 20)
        writer.add_float32("general.sampling.penalty_repeat", 1.05)
        writer.add_int32("general.sampling.mirostat", 2)

    path = write_gguf(tmp_path / "tiny.gguf", gguf_config("llama"), {}, change=change)
    checkpoint = open_checkpoint(str(path))
    wanted = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    assert checkpoint.defaults == wanted
    assert not_honoured(checkpoint.folder) == "mirostat 2"

    greedy = write_gguf(
        tmp_path / "greedy.gguf", gguf_config("llama"), {},
        change=lambda writer: writer.add_float32("general.sampling.temp", 0.0),
    )  # fmt: skip
    assert open_checkpoint(str(greedy)).defaults == {}


# Where a file lies, and in how many parts


def same_weights(path: Path, expected: Any) -> bool:
    tensors = open_checkpoint(str(path)).tensors()
    return all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(gguf_config("llama", attention_bias=True), torch.float32)


def test_a_split_model_opens_by_any_of_its_parts(tmp_path: Path, own_cache: Path, model: Any) -> None:
    state = model.state_dict()
    write_gguf(tmp_path / "tiny.gguf", model.config, {}, state=state, parts=3)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in (*parts, tmp_path):
        assert same_weights(part, state)
    assert len(list(own_cache.glob("*-config"))) == 1
    checkpoint = open_checkpoint(str(parts[1]), dtype="gguf")
    assert set(contract.model_fingerprint(checkpoint)) == {"config", *(part.name for part in parts)}
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match=r"renamed\.gguf.*must keep the name"):
        open_checkpoint(str(renamed))
    with pytest.raises(UserError, match=r"^model: 'tiny-00001-of-00003\.gguf' is not .* one of 3 parts") as error:
        open_checkpoint(str(parts[2]))
    assert "\n" not in str(error.value)


def test_the_first_part_of_a_split_model_may_be_empty(tmp_path: Path, model: Any) -> None:
    """As with llama.cpp's --no-tensor-first-split: it has fewer tensors than the model has layers."""
    path = write_gguf(tmp_path / "tiny.gguf", model.config, {}, state=model.state_dict(), parts=2, small_first=True)
    assert not GGUFReader(path).tensors and path.name.endswith("-00001-of-00003.gguf")
    assert same_weights(path, model.state_dict())


def test_parts_of_two_models_are_not_one(tmp_path: Path, model: Any) -> None:
    write_gguf(tmp_path / "tiny.gguf", model.config, {}, parts=3)
    first, second, third = sorted(tmp_path.glob("*.gguf"))
    shutil.copy(second, third)
    with pytest.raises(UserError, match=r"split\.no and split\.count of tiny-00003"):
        open_checkpoint(str(first))


@pytest.mark.parametrize("name", ["tiny", "tiny.bin", "tiny.GGUF"])
@pytest.mark.parametrize("dtype", ["fp32", "gguf"])
def test_a_file_is_known_by_its_first_bytes(tmp_path: Path, model: Any, name: str, dtype: str) -> None:
    path = write_gguf(tmp_path / name, model.config, {}, "Q8_0")
    assert open_checkpoint(str(path), dtype=dtype).spec.layers == 2
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="does not begin as GGUF"):
        open_checkpoint(str(path), dtype=dtype)


def test_a_folder_with_one_gguf_file(tmp_path: Path, model: Any) -> None:
    """And none of safetensors, whose config says nothing of the file; of several the user chooses."""
    folder, state = tmp_path / "folder", model.state_dict()
    folder.mkdir()
    write_gguf(folder / "one.gguf", model.config, {}, state=state)
    assert same_weights(folder, state)
    assert open_checkpoint(str(folder), dtype="gguf").weight_files == (folder / "one.gguf",)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert same_weights(folder, state)
    shutil.copy(folder / "one.gguf", folder / "two.gguf")
    with pytest.raises(UserError, match=r"several models; name one of one\.gguf, two\.gguf"):
        open_checkpoint(str(folder))


def test_a_folder_of_safetensors_is_that_whatever_lies_beside(tiny_folder: Path, tmp_path: Path, model: Any) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "folder"))
    for name in ("one", "two"):
        write_gguf(folder / f"{name}.gguf", model.config, {})
    assert isinstance(open_checkpoint(str(folder)).tensors(), StoredTensors)


# What a run is a function of


def test_a_run_is_a_function_of_the_file(tmp_path: Path, model: Any, own_cache: Path) -> None:
    """The journal has the file's SHA-256; the cache folder has no weights and may be deleted."""
    path = write_gguf(tmp_path / "tiny.gguf", model.config, {}, state=model.state_dict())
    settings: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True, "seed": 3}
    whole = TokenSwift.from_pretrained(str(path)).generate("the cat", **settings)
    with TokenSwift.from_pretrained(str(path)).stream("the cat", out=tmp_path / "run", **settings) as stream:
        next(iter(stream))
    assert sum(file.stat().st_size for file in own_cache.rglob("*") if file.parent.name != "sha256") < 200_000
    shutil.rmtree(own_cache)
    with TokenSwift.from_pretrained(str(path)).resume(tmp_path / "run") as stream:
        list(stream)
        assert stream.result().tokens == whole.tokens
    header = sha256(path)
    assert contract.model_fingerprint(open_checkpoint(str(path)))["tiny.gguf"] == header
    write_gguf(path, model.config, {}, state=tiny_model(model.config, torch.float32, seed=1).state_dict())
    with pytest.raises(UserError, match=rf"^model: tiny\.gguf: .*{header}"):
        TokenSwift.from_pretrained(str(path)).resume(tmp_path / "run")


def test_heads_draft_for_a_model_in_blocks(tmp_path: Path, model: Any) -> None:
    """The embedding that they read is the file's, dequantised."""
    from tokenswift_py.drafters import head_files, training

    path = write_gguf(tmp_path / "tiny.gguf", model.config, {}, "Q8_0")
    swift = TokenSwift.from_pretrained(str(path), dtype="gguf")
    tensors = swift.checkpoint.tensors()
    fresh = training.new_heads("medusa", 2, tensors["model.norm.weight"], swift.checkpoint.spec.norm_eps)
    file = tmp_path / "heads.safetensors"
    head_files.write_heads(fresh, file)
    settings: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 0.8, "seed": 3}
    drafted = swift.generate("the cat", drafter="heads", draft_heads=str(file), **settings)
    assert drafted.report["drafter"] == "heads"
    assert drafted.tokens == swift.generate("the cat", drafter="none", **settings).tokens


# docs/files.md


@pytest.fixture(scope="module")
def sources(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, model: Any) -> dict[str, Path]:
    """The default model and hub ids are a GGUF file and a folder of safetensors, found in other ways."""
    folder, parts = (tmp_path_factory.mktemp(name) for name in ("folder", "parts"))
    file = write_gguf(folder / "one.gguf", model.config, {}, "Q8_0")
    split = write_gguf(parts / "part.gguf", model.config, {}, "Q4_1", parts=2)
    return {"safetensors": tiny_folder, "gguf": file, "gguf in a folder": folder, "gguf in parts": split}


NO_BLOCKS = "dtype: 'gguf' is not allowed; only for a .gguf file or smollm2-135m; int8 is for any model"
NATIVE = "dtype: {!r} is not allowed; with engine torch one of bf16, fp32; engine native has {}"


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("dtype", WEIGHT_FORMATS)
@pytest.mark.parametrize("source", ["safetensors", "gguf", "gguf in a folder", "gguf in parts"])
def test_every_cell_of_the_matrix_runs_or_says_why_not(
    sources: dict[str, Path], source: str, dtype: str, engine: str
) -> None:
    refused = NO_BLOCKS if (source, dtype) == ("safetensors", "gguf") else ""
    if not refused and engine == "torch" and dtype in ("int8", "gguf"):
        refused = NATIVE.format(dtype, dtype)
    if refused:
        with pytest.raises(UserError, match=f"^{re.escape(refused)}$"):
            TokenSwift.from_pretrained(str(sources[source]), dtype=dtype, engine=engine)
        return
    swift = TokenSwift.from_pretrained(str(sources[source]), dtype=dtype, engine=engine)
    settings: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 0}
    plain, drafted = (swift.generate("the cat", drafter=drafter, **settings) for drafter in ("none", "ngram"))
    assert plain.report["dtype"] == dtype and len(plain.tokens) == 12
    assert drafted.tokens == plain.tokens or engine == "torch"  # there a tie may fall otherwise


def test_the_page_about_files_names_tests_that_are_there() -> None:
    root = Path(__file__).parent.parent
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", (root / "docs" / "files.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (root / "tests" / f"{file}.py").read_text(encoding="utf-8"), (file, name)
