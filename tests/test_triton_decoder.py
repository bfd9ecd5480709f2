"""The whole torch executor on Triton's kernels: what it writes, and law 1 from the embedding to the logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from conftest import decoder_of, tiny_config, tiny_model, weights_of
from interpreter import DEVICE
from random_dflash import random_dflash
from random_eagle import random_eagle
from random_heads import random_heads
from scripted import Scripted, write
from tokenswift_py import TokenSwift, registry
from tokenswift_py.cli.main import main
from tokenswift_py.core import DraftTree, SamplingParams, Segment
from tokenswift_py.drafters.base import create
from tokenswift_py.drafters.cascade import Cascade
from tokenswift_py.drafters.dflash import DFlash
from tokenswift_py.drafters.eagle import Eagle
from tokenswift_py.drafters.heads import Heads
from tokenswift_py.errors import UserError
from tokenswift_py.kernels.base import architecture
from tokenswift_py.kernels.triton.configs import Config, Tiles
from tokenswift_py.kernels.triton.matmul import linear
from tokenswift_py.kernels.triton.ops import TritonOps
from tokenswift_py.kernels.triton.products import LIBRARY, TILES, Products
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.devices import choose_attention, choose_ops
from tokenswift_py.models.ops import TorchOps
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.runs import plan

# The interpreter takes milliseconds for a program: few layers, few heads, short texts.
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
OWN = {
    name: {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
    for name in ("gemma2", "gemma3_text")
}
PROMPT = [3, 14, 15, 9, 26]
FOUR_TOKENS = dict.fromkeys((3, 14, 15, 9), 30.0)  # a text that repeats itself


def triton_decoder(
    dtype: torch.dtype = torch.float32,
    products: Products = TILES,
    family: str = "llama",
    kv_dtype: torch.dtype | None = None,
    **changes: Any,
) -> Any:
    model = tiny_model(tiny_config(family, **{**SMALL, **OWN.get(family, {}), **changes}), dtype).to(DEVICE)
    return decoder_of(model, attention="triton", ops=TritonOps(products), kv_dtype=kv_dtype), model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 33, 48), (70, 31, 65)])
def test_the_fixed_tile_product(dtype: torch.dtype, rows: int, columns: int, depth: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
    x, weight, bias = (y.to(DEVICE, dtype) for y in (x, weight, bias))
    for added in (None, bias):
        out = linear(x, weight, added)
        expected = torch.nn.functional.linear(x.float(), weight.float(), None if added is None else added.float())
        tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]  # bf16 is cut short
        torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(linear(x[-1:], weight, added), out[-1:])
    assert linear(x[:0], weight).shape == (0, columns)


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "qwen2", "smollm3", "phi3", "gemma2", "gemma3_text", "mixtral", "qwen2_moe", "qwen3_moe"],
)
def test_it_computes_what_hugging_face_does(family: str) -> None:
    decoder, model = triton_decoder(family=family)
    ids = np.array(PROMPT, np.int32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids.astype(np.int64))[None].to(DEVICE)).logits[0]
    got = decoder.forward([Segment(DraftTree.chain(ids), decoder.new_cache(), causal=True)]).logits
    assert (got - expected).abs().max() < 1e-3


def test_soft_caps_are_those_of_the_textbook() -> None:
    """Those of scores and of logits. Rows of a chunk have the bits of single ones."""
    model = tiny_model(tiny_config("qwen3", **SMALL), torch.float32).to(DEVICE)
    spec = replace(ModelSpec.from_config(model.config), attention_cap=1.5, logit_cap=2.0)
    tables, ids = rope_tables(model.config, 128), DraftTree.chain(np.array(PROMPT, np.int32))
    found = []
    for attention, ops in (("triton", TritonOps()), ("naive", TorchOps())):
        backend = registry.create("tokenswift_py.kernels", "BACKEND", "attention", attention)
        decoder = TorchDecoder(spec, weights_of(model), tables, backend, ops)
        cache = decoder.new_cache()
        found.append(decoder.forward([Segment(ids, cache, causal=True)]).logits)
        if attention == "triton":
            cache.drop_tail()
            alone = []
            for token in PROMPT:
                alone.append(decoder.forward([Segment(DraftTree.chain([token]), cache)]).logits)
                cache.commit([0])
            assert torch.equal(torch.cat(alone), found[0])
    assert (found[0] - found[1]).abs().max() < 1e-4 and found[0].abs().max() > 1


@pytest.mark.parametrize(
    ("family", "dtype", "kv_dtype"),
    [
        ("llama", torch.float32, None),
        ("llama", torch.bfloat16, None),
        ("llama", torch.bfloat16, torch.int8),
        ("gemma3_text", torch.bfloat16, torch.int8),
        ("qwen2_moe", torch.float32, None),
    ],
)
def test_logits_of_tree_rows_have_the_bits_of_plain_decoding(
    family: str, dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> None:
    """The tree crosses the page boundary at 64; what is decoded plainly is committed token by token. What lies before
    it is drawn, which costs nothing."""
    decoder, _ = triton_decoder(dtype, family=family, kv_dtype=kv_dtype)
    cache = decoder.new_cache()
    for layer in range(2):
        cache.pool.write(layer, torch.arange(62), *torch.randn(2, 62, 1, 16).to(DEVICE, dtype))
    cache.append(np.arange(62, dtype=np.int32), True)
    cache.commit(range(62))
    tree = DraftTree([9, 8, 7, 6, 5, 4], [-1, 0, 0, 2, 2, 4])
    together = decoder.forward([Segment(tree, cache)]).logits
    cache.drop_tail()
    path = tree.path(5)
    chunk = decoder.forward([Segment(DraftTree.chain(tree.tokens[path]), cache, causal=True)]).logits
    assert torch.equal(chunk, together[path])
    cache.drop_tail()
    for node in path:
        token = DraftTree.chain(tree.tokens[node : node + 1])
        assert torch.equal(decoder.forward([Segment(token, cache)]).logits[0], together[node])
        cache.commit([0])
    assert cache.length == 66


@pytest.mark.parametrize(("block", "dtype", "kv_dtype"), [(64, torch.float32, None), (128, torch.bfloat16, torch.int8)])
def test_far_keys_are_met_by_moved_queries(block: int, dtype: torch.dtype, kv_dtype: torch.dtype | None) -> None:
    """Self-Extend in the kernel: naive attention's values, and the bits of tokens decoded one by one across the border
    of a block. Blocks are of one page and of two, a split of four pages otherwise."""
    config = tiny_config(**SMALL, max_position_embeddings=320)
    model = tiny_model(config, dtype).to(DEVICE)
    tables = rope_tables(config, 640, Positions("self-extend", block, block))
    decoder = decoder_of(model, attention="triton", ops=TritonOps(), kv_dtype=kv_dtype, rope=tables)
    cache = decoder.new_cache()
    for layer in range(2):
        cache.pool.write(layer, torch.arange(574), *(3 * torch.randn(2, 574, 1, 16)).to(DEVICE, dtype))
    cache.append(np.arange(574, dtype=np.int32), True)
    cache.commit(range(574))
    tree = DraftTree([9, 8, 7, 6, 5], [-1, 0, 1, 1, 3])  # crosses position 576
    output = decoder.forward([Segment(tree, cache)], want_mass=True)
    cache.drop_tail()
    if kv_dtype is None:
        naive = decoder_of(model, attention="naive", rope=tables)
        wanted = naive.forward([Segment(tree, cache)], want_mass=True)
        cache.drop_tail()
        assert (output.logits - wanted.logits).abs().max() < 1e-3
        assert (output.page_mass - wanted.page_mass).abs().max() < 1e-4
    for node in tree.path(4):
        alone = decoder.forward([Segment(DraftTree.chain(tree.tokens[[node]]), cache)])
        assert torch.equal(alone.logits[0], output.logits[node])
        cache.commit([0])


@pytest.mark.parametrize(("family", "temperature"), [("llama", 0.0), ("llama", 0.9), ("qwen2_moe", 0.8)])
def test_drafting_changes_no_token(family: str, temperature: float) -> None:
    decoder, model = triton_decoder(family=family)
    params = SamplingParams(temperature=temperature, seed=1)
    plain, _, _ = write(decoder, PROMPT, 9, params)
    assert write(decoder_of(model, attention="naive"), PROMPT, 9, params)[0] == plain
    right = Scripted(PROMPT + plain, 61, 0.8, width=2)
    others = [create("ngram", shortest=1), create("partial", view_tokens=64)]
    for drafter in [right, *(others if temperature == 0.9 else [])]:
        drafted, engine, _ = write(decoder, PROMPT, 9, params, drafter, draft_tokens=4)
        assert drafted == plain
        assert engine.cache.pool.in_use == 0
        assert drafter is not right or engine.stats.num_accepted_draft_tokens > 0


def int8_drafters(model: Any, truth: list[int]) -> list[Any]:
    """Every drafter there is, with heads and a draft model of random weights; and one that is mostly right."""
    beside = tiny_model(tiny_config("qwen2", **{**SMALL, "num_hidden_layers": 1}), torch.float32, seed=1).to(DEVICE)
    small = decoder_of(beside, attention="triton", ops=TritonOps(), kv_dtype=torch.int8)
    embedding = model.state_dict()["model.embed_tokens.weight"]
    return [
        Scripted(PROMPT + truth, 61, 0.8, width=2),
        create("ngram", shortest=1),
        create("partial", view_tokens=64),
        Cascade(view_tokens=64, heads=Heads(random_heads("tokenswift", hidden=32, vocab=61), embedding)),
        Heads(random_heads("recurrent", hidden=32, vocab=61), embedding),
        Eagle(random_eagle(embedding, heads=4), 100, width=2),
        DFlash(random_dflash(embedding, (0, 1)), 100, width=2),
        create("draft_model", model=small),
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_no_drafter_changes_a_token_over_int8_keys_and_values(temperature: float) -> None:
    decoder, model = triton_decoder(kv_dtype=torch.int8, num_hidden_layers=3)  # EAGLE-3 reads three
    params = SamplingParams(temperature=temperature, seed=2, logit_bias=FOUR_TOKENS)
    plain, _, _ = write(decoder, PROMPT, 5, params)
    drafters = int8_drafters(model, plain)
    assert {drafter.name for drafter in drafters} == {"scripted", *registry.names("tokenswift_py.drafters")} - {"none"}
    for drafter in drafters if temperature else drafters[:2]:
        drafted, engine, _ = write(decoder, PROMPT, 5, params, drafter, draft_tokens=4)
        assert drafted == plain, drafter.name
        assert engine.stats.num_draft_tokens > 0, drafter.name
        assert drafter is not drafters[0] or engine.stats.num_accepted_draft_tokens > 0


def test_the_flag_reaches_the_pool(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr(plan, "check_memory", lambda size, *_: needed.append(size))
    arguments = ["--model", str(tiny_folder), "--prompt", "the cat", "--raw", "--max-new-tokens", "2", "--quiet",
                 "--dtype", "fp32", "--kv-dtype", "int8", "--device", DEVICE.type]  # fmt: skip
    assert main([*arguments, "--attention", "triton", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kv_dtype"] == "int8" and "/float32/kv-int8/triton/" in report["numerics"]
    layers, kv_heads, head_dim = 3, 2, 8
    kept = 2 * layers * kv_heads * (head_dim + 4) * 64 * pages_for(len("the cat") + 2)
    assert kept <= needed[-1] < kept + 1024  # a few RoPE tables beside it
    for attention in ("sdpa", "naive"):
        says = rf"^kv_dtype: 'int8' is not allowed; with engine torch and attention {attention} only .*fp32[^\n]*$"
        with pytest.raises(UserError, match=says):
            TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", kv_dtype="int8", attention=attention)
    with pytest.raises(UserError, match=r"^kv_dtype: 'bf16' .* attention triton only .*\(fp32\) or int8$"):
        TokenSwift.from_pretrained(
            str(tiny_folder), dtype="fp32", kv_dtype="bf16", attention="triton", device=DEVICE.type
        )


def test_int8_keys_and_values_are_close_and_refused_where_nothing_reads_them() -> None:
    (int8, model), (full, _) = triton_decoder(kv_dtype=torch.int8), triton_decoder()
    ids = DraftTree.chain(np.array(PROMPT, np.int32))
    got, true = (decoder.forward([Segment(ids, decoder.new_cache())]).logits for decoder in (int8, full))
    assert 0 < (got - true).abs().max() < 0.05 * true.abs().max()
    assert "/kv-int8/" in int8.numerics
    for attention, ops in (("sdpa", None), ("triton", None)):
        with pytest.raises(UserError, match=r"kv_dtype: torch\.int8 is not allowed"):
            decoder_of(model, attention=attention, ops=ops, kv_dtype=torch.int8)


def test_the_deterministic_executor_says_so() -> None:
    decoder, _ = triton_decoder()
    assert decoder.guarantee == "bitwise, unverified on hardware"
    assert decoder.numerics.endswith("/fixed-tiles") and "/triton/" in decoder.numerics


def test_the_contract_names_the_gpu_and_how_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another architecture, tile, number of warps, depth of pipeline or place of a split is another contract."""
    capability = {0: (9, 0), 1: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[device.index])
    assert [architecture(torch.device("cuda", i)) for i in (0, 1)] == ["cuda-sm_90", "cuda-sm_80"]
    plain, _ = triton_decoder()
    assert f"/{architecture(DEVICE)}/" in plain.numerics
    monkeypatch.setattr("tokenswift_py.models.decoder.architecture", lambda device: "cuda-sm_90")
    assert "/cuda-sm_90/" in triton_decoder()[0].numerics
    labels = {TritonOps().label, TritonOps(LIBRARY).label}
    changes: list[tuple[str, Any]] = [
        ("matmul.tiles", lambda *args: Tiles(64, 32, 32, 4, 4)),
        ("matmul.tiles", lambda *args: Tiles(64, 32, 64, 8, 4)),
        ("attention.config", lambda *args, **kwargs: Config(64, 4, 5)),
        ("fused.BLOCK", 512),
        ("items.LAST_LEVEL", 32),
        ("items.SPLIT_LEVELS", ((8, 4),)),
    ]
    for name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(f"tokenswift_py.kernels.triton.{name}", value)
            labels.add(TritonOps().label)
    assert len(labels) == 2 + len(changes)
    assert TritonOps().label in labels


def test_cublas_is_labelled_measured() -> None:
    decoder, _ = triton_decoder(products=LIBRARY)
    assert decoder.guarantee == "measured"
    assert "fixed-tiles" not in decoder.numerics and "triton" in decoder.numerics


def test_what_deterministic_means() -> None:
    cpu = torch.device("cpu")
    assert [choose_ops("triton", DEVICE, wish).guarantee for wish in ("auto", "on", "off")] == [
        "bitwise, unverified on hardware", "bitwise, unverified on hardware", "measured",
    ]  # fmt: skip
    assert all(isinstance(choose_ops("sdpa", cpu, wish), TorchOps) for wish in ("auto", "off"))
    with pytest.raises(UserError, match="deterministic: 'on' is not allowed; only with attention triton"):
        choose_ops("sdpa", cpu, "on")
    spec = ModelSpec.from_config(tiny_config())
    assert choose_attention(cpu, spec) == "sdpa"
    assert choose_attention(torch.device("cuda"), spec) == "triton"


def test_the_command_line_reaches_the_kernels(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_folder), "--prompt", "the cat", "--raw", "--max-new-tokens", "2", "--quiet",
                 "--dtype", "fp32", "--device", DEVICE.type, "--attention", "triton", "--temperature", "0"]  # fmt: skip
    for wish, guarantee in (("auto", "bitwise, unverified on hardware"), ("off", "measured")):
        out = tmp_path / wish
        assert main([*arguments, "--deterministic", wish, "--out", str(out)]) == 0
        report = json.loads((out / "report.json").read_text())
        assert report["guarantee"] == guarantee and report["new_tokens"] == 2
    assert main([*arguments, "--deterministic", "perhaps"]) == 2
    other = ["sdpa" if word == "triton" else word for word in arguments]
    assert main([*other, "--deterministic", "on"]) == 2
