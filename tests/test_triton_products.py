"""Products by a library in blocks of 64 rows: the test that trusts it, and whole models and runs on a library that
deserves it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from conftest import decoder_of, tiny_config, tiny_model, weights_of
from interpreter import INTERPRETED
from recording import record
from row_products import (
    Changing,
    by_empty_rows,
    by_place,
    leaking,
    row_by_row,
    stand_in,
    stand_in_blocks,
    unblocked,
)
from scripted import Scripted, write
from tokenswift_py import TokenSwift
from tokenswift_py.cli.inputs import recorded_products
from tokenswift_py.cli.main import main
from tokenswift_py.core import DraftTree, SamplingParams, Segment
from tokenswift_py.errors import UserError
from tokenswift_py.hf.held import EngineSettings, executor_of, held
from tokenswift_py.kernels.triton import fused
from tokenswift_py.kernels.triton.ops import TritonOps
from tokenswift_py.kernels.triton.products import LIBRARY, TILES, Blocks, blocks_on, in_blocks, joined, whole
from tokenswift_py.kernels.triton.row_test import Matrix, drawn, row_test
from tokenswift_py.kernels.triton.runtime import new_rows
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.models.captured import Recorder
from tokenswift_py.models.devices import choose_ops
from tokenswift_py.models.ops import TorchOps, groups_of, join_weights, matrices_of
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.parallel import pipeline_executor
from toys import save_tiny

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="stand-ins on the CPU; make gpu asks the card's own library")

CPU = torch.device("cpu")
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32,
         "intermediate_size": 48}  # fmt: skip
MATRIX = Matrix(40, 96, True)


def blocks_of(product: Any) -> Any:
    return partial(in_blocks, library=product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_keep_their_bits_pass(dtype: torch.dtype) -> None:
    for matrix in (MATRIX, Matrix(1, 32), Matrix(130, 7)):
        found = row_test(blocks_of(row_by_row), matrix, dtype, CPU, lambda _: Recorder(record))
        assert found.faults == () and len(found.bits) == 8


@pytest.mark.parametrize(
    ("product", "faults", "padded"),
    [
        (blocks_of(by_place), {"alone", "chunk", "place"}, False),
        (blocks_of(by_empty_rows), {"neighbours"}, True),
        (blocks_of(leaking), {"neighbours"}, True),
        (unblocked, {"alone", "chunk", "number"}, False),
        (lambda x, *rest: row_by_row(x, *rest, len(x) > 64), {"chunk"}, False),
        (lambda x, *rest: row_by_row(x, *rest, len(x) == 17), {"number"}, False),
        (lambda x, *rest: row_by_row(x, *rest) + torch.inf, {"not finite"}, False),
    ],
    ids=["place", "empty rows", "leak", "number", "chunk", "17 rows", "infinite"],
)
def test_a_product_whose_rows_are_not_their_own_is_found_out(product: Any, faults: set[str], padded: bool) -> None:
    """padded: whether rows behind a pass, which may be anything, can show it too."""
    found = set(row_test(product, MATRIX, torch.float32, CPU).faults)
    assert faults <= found <= faults | ({"alone", "chunk", "number"} if padded else set())


def test_a_product_that_changes_from_run_to_run_is_found_out() -> None:
    assert "place" in row_test(blocks_of(Changing()), MATRIX, torch.float32, CPU).faults


def test_a_graph_with_other_bits_is_found_out() -> None:
    """A library may pick another kernel while a graph is captured."""
    capturing = False

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return row_by_row(x, weight, bias, capturing)

    def recorded(function: Callable[[], Any]) -> Any:
        nonlocal capturing
        capturing = True
        try:
            return record(function)
        finally:
            capturing = False

    for made, faults in ((recorded, ("capture",)), (record, ()), (None, ())):
        found = row_test(blocks_of(product), MATRIX, torch.float32, CPU, lambda _, made=made: Recorder(made))
        assert found.faults == faults


def test_the_label_has_the_bits_and_the_test_runs_once() -> None:
    calls = 0

    def library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return row_by_row(x, weight, bias)

    matrices = (Matrix(8, 32), MATRIX)
    first = blocks_on(matrices, torch.float32, CPU, library)
    before = calls
    assert before > 100 and blocks_on(matrices, torch.float32, CPU, library) is first and calls == before
    forwards, backwards = (
        blocks_on(matrices, torch.float32, CPU, partial(row_by_row, backwards=wish)) for wish in (False, True)
    )
    assert first.label == forwards.label != backwards.label and first.label.startswith("blocks-64-")
    assert {forwards.guarantee, backwards.guarantee} == {"bitwise by the row test, unverified on hardware"}
    doubted = blocks_on(matrices, torch.float32, CPU, by_place)
    assert doubted.guarantee == "measured" and "40 x 96: alone" in doubted.verdict.faults[1]


def test_inputs_of_the_row_test_are_the_same_everywhere_and_exact() -> None:
    wide = drawn(200, 50, torch.float32, 3)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(drawn(200, 50, dtype, 3).float(), wide)
    assert wide[0, :4].tolist() == KNOWN and wide.abs().max() < 1


KNOWN = [0.0703125, -182 * 2.0**-18, -28 * 2.0**-18, 0.051513671875]  # drawn on one machine; they are those of all


def test_a_library_sees_64_rows_whatever_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are not copied where memory goes on behind them. What is there may be anything."""
    torch.manual_seed(0)
    seen: list[torch.Tensor] = []

    def library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(x)
        return row_by_row(x, weight, bias)

    weight, bias = torch.randn(24, 32), torch.randn(24)
    rows = torch.randn(200, 32)
    alone = torch.cat([row_by_row(row[None], weight, bias) for row in rows])
    monkeypatch.setattr("tokenswift_py.kernels.triton.products.ALIGNED", 4)  # a CPU's memory is aligned less
    for count in (1, 7, 63, 64, 65, 100, 128, 200):
        x = new_rows(rows[:count])
        x.as_strided((-(-count // 64) * 64, 32), (32, 1)).fill_(torch.nan)
        x.copy_(rows[:count])
        for given, copied in ((x, False), (rows[:count].clone(), count % 64 != 0), (x[:, ::2], True)):
            seen.clear()
            got = in_blocks(given, weight[:, : given.shape[1]], bias, library)
            assert got.shape == (count, 24) and {len(part) for part in seen} == {64}
            assert (seen[0].data_ptr() != given.data_ptr()) == copied
            assert given.shape[1] == 16 or torch.equal(got, alone[:count])
    assert in_blocks(rows[:0], weight, bias, library).shape == (0, 24)
    monkeypatch.setattr("tokenswift_py.kernels.triton.products.ALIGNED", 256)
    odd = torch.empty(65 * 32 + 1)[1:].view(65, 32)[:64].copy_(rows[:64])
    assert whole(odd).data_ptr() != odd.data_ptr() and torch.equal(whole(odd), odd)


def test_matrices_side_by_side_take_one_product() -> None:
    spec = ModelSpec.from_config(tiny_config("qwen2", **SMALL))
    model = tiny_model(tiny_config("qwen2", **SMALL), torch.float32)
    weights = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    calls: list[tuple[int, ...]] = []

    def library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(tuple(weight.shape))
        return row_by_row(x, weight, bias)

    products = blocks_on(
        tuple(Matrix(*matrix) for matrix in matrices_of(spec, apart=True)), torch.float32, CPU, library
    )
    x, names = torch.randn(5, 32), [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    results = []
    for _ in range(2):
        own, biases = ([weights[f"{name}.{kind}"] for name in names] for kind in ("weight", "bias"))
        calls.clear()
        results.append((products.several(x, own, biases), list(calls)))
        join_weights(weights, spec)
    (apart, three), (together, one) = results
    assert three == [(32, 32), (16, 32), (16, 32)] and one == [(64, 32)]
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert joined([before[f"{name}.weight"] for name in names]) is None
    with pytest.raises(ValueError, match="row test has not seen"):
        products.linear(x, torch.randn(3, 32), None)
    assert {group[0].rpartition(".")[2] for group in groups_of(spec) if len(group) > 1} == {"q_proj", "gate_proj"}
    assert (32 + 16 + 16, 32, True) in matrices_of(spec, apart=False)
    assert (16, 32, True) not in matrices_of(spec, apart=False)


def test_rows_that_lie_apart_have_the_bits_of_contiguous_ones() -> None:
    """A product of several matrices leaves each one's rows apart; GLU and RoPE read them where they are."""
    torch.manual_seed(0)
    wide = torch.randn(7, 96)
    gate, up = wide.split(48, 1)
    assert torch.equal(fused.glu(gate, up), fused.glu(gate.contiguous(), up.contiguous()))
    q, k, v = (part.unflatten(1, (-1, 16)) for part in torch.randn(7, 96).split([64, 16, 16], 1))
    angles, slots = torch.rand(7, 8), torch.tensor([3, 9, -1, 64, 65, 0, 1])
    pages = torch.zeros(2, 2, 1, 2, 64, 16)
    outs = [
        fused.rope_write(*parts, angles.cos(), angles.sin(), slots, *own)
        for parts, own in (((q, k, v), pages[0]), ((q.contiguous(), k.contiguous(), v.contiguous()), pages[1]))
    ]
    assert torch.equal(*outs) and torch.equal(*pages) and pages.any()


def blocks_decoder(family: str, dtype: torch.dtype, kv_dtype: torch.dtype | None = None, **changes: Any) -> Any:
    own = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]} if "gemma" in family else {}
    config = tiny_config(family, **{**SMALL, **own, **changes})
    ops = TritonOps(stand_in_blocks(ModelSpec.from_config(config), dtype))
    return decoder_of(tiny_model(config, dtype), attention="triton", ops=ops, kv_dtype=kv_dtype)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "qwen2_moe"])
def test_it_computes_what_hugging_face_does(family: str) -> None:
    decoder = blocks_decoder(family, torch.float32)
    ids = np.arange(3, 9, dtype=np.int32)
    own = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]} if "gemma" in family else {}
    with torch.inference_mode():
        model = tiny_model(tiny_config(family, **SMALL, **own), torch.float32)
        expected = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    got = decoder.forward([Segment(DraftTree.chain(ids), decoder.new_cache(), causal=True)]).logits
    assert (got - expected).abs().max() < 1e-3
    assert "/blocks-64-" in decoder.numerics and decoder.guarantee.startswith("bitwise by the row test")


@pytest.mark.parametrize(
    ("family", "dtype", "kv_dtype"),
    [
        ("llama", torch.float32, None),
        ("qwen3", torch.bfloat16, torch.int8),
    ],
)
def test_every_pass_has_the_bits_of_plain_decoding(
    family: str, dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> None:
    """A prompt of more rows than a block, the same in other chunks, a tree beside another text, and single tokens."""
    decoder = blocks_decoder(family, dtype, kv_dtype, num_hidden_layers=1)
    tokens = np.random.default_rng(0).integers(0, 61, 70).astype(np.int32)
    pool = decoder.new_pool(12)
    cache, other = KVCache(pool, 512), KVCache(pool, 512)
    prompt = decoder.forward([Segment(DraftTree.chain(tokens), cache, causal=True)])
    cache.commit(range(70))
    at = 0
    for size in (4, 66):
        chunk = decoder.forward([Segment(DraftTree.chain(tokens[at : at + size]), other, causal=True)])
        other.commit(range(size))
        assert torch.equal(chunk.logits, prompt.logits[at : at + size])
        at += size
    tree = DraftTree([9, 8, 7, 6, 5], [-1, 0, 0, 2, 3])
    company = Segment(DraftTree([1, 2], [-1, 0]), other)
    together = decoder.forward([company, Segment(tree, cache)]).logits[2:]
    cache.drop_tail()
    other.drop_tail()
    for node in tree.path(4):
        alone = decoder.forward([Segment(DraftTree.chain(tree.tokens[node : node + 1]), cache)]).logits
        assert torch.equal(alone[0], together[node])
        cache.commit([0])


def test_drafting_changes_no_token() -> None:
    decoder, prompt = blocks_decoder("llama", torch.float32), [3, 14, 15, 9, 26]
    params = SamplingParams(temperature=0.9, seed=1)
    plain, _, _ = write(decoder, prompt, 9, params)
    drafted, loop, _ = write(decoder, prompt, 9, params, Scripted(prompt + plain, 61, 0.8, width=2), draft_tokens=4)
    assert drafted == plain and loop.stats.num_accepted_draft_tokens > 0


def test_auto_trusts_a_library_by_its_rows(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    matrices = ((40, 96, True), (8, 32, False))

    def chosen(wish: str, matrices: Any = matrices) -> Any:
        return choose_ops("triton", CPU, wish, matrices, torch.float32).products

    assert chosen("auto") is TILES, "no library is asked on a CPU"
    stand_in(monkeypatch, row_by_row)
    assert [chosen("on"), chosen("off"), chosen("auto", None)] == [TILES, LIBRARY, TILES]
    assert isinstance(chosen("auto"), Blocks) and chosen("auto").guarantee.startswith("bitwise by the row test")
    assert not caplog.records
    stand_in(monkeypatch, by_place)
    with caplog.at_level(logging.WARNING):
        assert chosen("auto") is TILES and "does not keep a row's bits (40 x 96: alone" in caplog.text
        assert chosen("blocks").guarantee == "measured" and "the text is measured" in caplog.text
    with pytest.raises(UserError, match="deterministic: 'blocks' is not allowed; one process"):
        chosen("blocks", None)
    with pytest.raises(UserError, match="deterministic: 'blocks' is not allowed; only with attention triton"):
        choose_ops("sdpa", CPU, "blocks")
    assert isinstance(choose_ops("sdpa", CPU, "auto"), TorchOps)


def test_a_run_goes_on_and_is_proven_with_the_products_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever `auto` would choose by then."""
    model = ["--dtype", "fp32", "--device", "cpu", "--attention", "triton"]
    save_tiny(tmp_path / "model", **SMALL)
    begin = ["--model", str(tmp_path / "model"), "--prompt", "the cat", "--raw", "--quiet", "--context", "40", "--seed",
             "1", "--ignore-eos", *model]  # fmt: skip
    texts = {}
    for name, library, label in (("blocks", row_by_row, "/blocks-64-"), ("tiles", by_place, "/fixed-tiles")):
        whole, cut = tmp_path / name / "whole", tmp_path / name / "cut"
        with monkeypatch.context() as patch:
            stand_in(patch, library)
            for out, count in ((whole, "4"), (cut, "3")):
                assert main([*begin, "--max-new-tokens", count, "--out", str(out)]) == 0
        with monkeypatch.context() as patch:
            stand_in(patch, row_by_row)
            if name == "blocks":
                patch.setattr("tokenswift_py.models.devices.ASKED", ())
            assert main(["--resume", str(cut), "--extend", "1", "--quiet"]) == 0
            capsys.readouterr()
            assert main(["audit", str(cut)]) == 0
            assert "PROVEN" in (told := capsys.readouterr().out) and label in told
        reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, cut)]
        assert reports[0]["numerics"] == reports[1]["numerics"] and label in reports[0]["numerics"]
        texts[name] = [np.load(folder / "tokens.npy").tolist() for folder in (whole, cut)]
        assert texts[name][0] == texts[name][1] and len(texts[name][0]) == 4


def test_stages_of_a_pipeline_have_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract is one, so a stage on a card that has come to others is refused."""
    spec = ModelSpec.from_config(tiny_config("llama", **SMALL))
    own = SimpleNamespace(products="a/blocks-64-00000000", kinds=set(), multiplied_nbytes=0, name="torch", dtype="fp32",
                          kv_dtype=torch.float32, device=CPU, ranks=None, copies_all=True)  # fmt: skip
    monkeypatch.setattr("tokenswift_py.checkpoints.checkpoint.model_fingerprint", lambda _: {"weights": "0123"})
    answers = [
        ({"kinds": [], "multiplied": 0, "products": products}, ()) for products in (own.products, "a/fixed-tiles")
    ]
    for told in (answers[:1], answers):
        line: Any = SimpleNamespace(place=SimpleNamespace(stages=2), number=lambda _: 0, others=[1],
                                    beside=lambda *_, told=told: (own, told))  # fmt: skip
        made = partial(pipeline_executor.PipelineExecutor, line, SimpleNamespace(spec=spec), CPU, {}, {})
        if told is answers:
            with pytest.raises(UserError, match="deterministic: 'a/fixed-tiles' is not allowed; as the first stage's"):
                made()
        else:
            assert made().products == own.products


def test_what_a_contract_says_of_products() -> None:
    kernels = "torch-2.11/cuda-sm_90/bfloat16/kv-bfloat16/triton/rope-default/triton-3.6/kernels-0123abcd"
    for rest, wanted in (
        ("", "off"), ("/fixed-tiles", "on"), ("/blocks-64-89abcdef", "blocks"), ("/fixed-tiles/tp-2-gather", "on"),
        ("/tp-2-all-reduce", "off"), ("/blocks-64-89abcdef/kv-recent-256-64", "blocks"),
    ):  # fmt: skip
        assert recorded_products(kernels + rest) == wanted
    assert recorded_products("native-0.1/avx2/bf16/kv-bf16/rope-default") is None
    assert recorded_products("torch-2.11/cpu/float32/kv-float32/sdpa/rope-default") is None


def test_the_executor_joins_its_own_weights_and_leaves_a_models(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, row_by_row)
    settings: dict[str, Any] = {"dtype": "fp32", "device": "cpu", "attention": "triton"}
    swift = TokenSwift.from_pretrained(str(tiny_folder), deterministic="blocks", **settings)
    own = swift.executor._weights  # type: ignore[attr-defined]
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    assert joined([own[name] for name in names]) is not None
    model = tiny_model(tiny_config("phi3", **SMALL), torch.float32)  # whose own q, k and v lie side by side
    theirs = held(model)
    executor: Any = executor_of(theirs, EngineSettings(attention="triton", deterministic="blocks"))
    assert all(executor._weights[name] is tensor for name, tensor in theirs.checkpoint.held.items())
    decoder = executor.model(rope_tables(model.config, 64))
    ids = np.arange(3, 9, dtype=np.int32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    got = decoder.forward([Segment(DraftTree.chain(ids), decoder.new_cache(), causal=True)]).logits
    assert (got - expected).abs().max() < 1e-3
