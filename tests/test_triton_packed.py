"""Drafts with weights of few bits on Triton's kernels: their numbers, their products, and that they change no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from conftest import decoder_of, tiny_config, tiny_model
from interpreter import DEVICE
from recording import Tape
from scenes import new_pool
from scripted import write
from tokenswift_py import TokenSwift
from tokenswift_py.core import DraftTree, SamplingParams, Segment
from tokenswift_py.drafters.base import create
from tokenswift_py.errors import UserError
from tokenswift_py.kernels._rounding import quantise
from tokenswift_py.kernels.triton import fused, packed
from tokenswift_py.kernels.triton.ops import FewBitOps, TritonOps
from tokenswift_py.models import executors
from tokenswift_py.models.ops import parts_in_few_bits
from tokenswift_py.models.rope import rope_tables
from triton_scenes import Reads, reads, seeded

__all__ = ["reads", "seeded"]  # the fixtures

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PROMPT = [3, 14, 15, 9, 26]


def rounded(weights: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """The weights that few bits stand for, group by group of 32: in 4 bits an fp16 minimum and up to 15 fp16 steps
    above it, in 8 bits up to 127 steps on both sides of 0."""
    rows = np.zeros((len(weights), -(-weights.shape[1] // 32) * 32), np.float32)
    rows[:, : weights.shape[1]] = weights.float().cpu()
    for row in rows.reshape(-1, 32):
        span, most = (row.max() - row.min(), 15) if bits == 4 else (abs(row).max(), 127)
        step = np.float32(np.float16(span / np.float32(most)))
        least = np.float32(np.float16(row.min() if bits == 4 else 0))
        quants = np.rint((row - least) * (np.float32(1) / step if step > 0 else np.float32(0)))
        row[:] = quants.clip(0 if bits == 4 else -127, most) * step + least
    return torch.from_numpy(rows[:, : weights.shape[1]]).to(weights.device)


def drawn(dtype: torch.dtype, *shape: int) -> Any:
    return torch.randn(shape).to(dtype)


def test_weights_that_came_from_blocks_of_four_bits_come_back() -> None:
    """Such as those of a Q4_1 file. Those of a Q4_0 file do where a group has its largest step on both sides."""
    quants = torch.randint(0, 16, (7, 5, 32))
    quants[..., 0], quants[..., 1] = 0, 15
    scales = torch.rand(7, 5).half() / 64
    for minima in (torch.randn(7, 5).half() / 8, -8 * scales):
        weights = quants * scales.float()[..., None] + minima.float()[..., None]
        found = quantise(weights.flatten(1), 4)
        assert torch.equal(found.quants, quants.to(torch.uint8))
        assert torch.equal(found.minima, minima)
        assert torch.equal(found.widened(), weights.flatten(1)) and torch.equal(found.scales, scales)


def test_weights_that_came_from_blocks_of_eight_bits_come_back() -> None:
    """By the gguf package's own reading of Q8_0."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(torch.randn(7, 160).numpy(), kind)
    weights = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    assert torch.equal(quantise(weights, 8).widened(), weights)


def test_the_numbers_of_eight_bits_are_the_cpu_engines() -> None:
    engine = pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    weights = torch.randn(20, 96) * torch.tensor([1.0, 1e-4, 1e-5, 0.0, 900.0]).repeat(4)[:, None]
    blocks, values = np.empty((20, 3 * 34), np.uint8), np.empty((20, 96), np.float32)
    engine.quantise(weights.numpy(), blocks)
    engine.dequantise("q8", blocks, values)
    assert torch.equal(quantise(weights, 8).widened(), torch.from_numpy(values))


@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_off_by_more_than_half_a_step(bits: int) -> None:
    weights = torch.cat([drawn(torch.bfloat16, 9, 70), torch.zeros(1, 70), torch.full((1, 70), 3.0)])
    found = quantise(weights, bits)
    assert torch.equal(found.widened()[:, :70], rounded(weights, bits))
    error = (found.widened()[:, :70] - weights.float()).abs()
    step = found.scales.float().repeat_interleave(32, 1)[:, :70]
    assert (error <= 0.51 * step + 2.0**-11 * weights.float().abs().max()).all()
    torch.testing.assert_close(found.widened()[9:, :64], weights[9:, :64].float(), rtol=1e-3 * (bits == 8), atol=0)


@pytest.mark.parametrize(
    ("bits", "dtype", "rows", "columns", "depth", "bias"),
    [
        (4, torch.float32, 1, 43, 70, True),
        (8, torch.float32, 65, 5, 300, False),
        (4, torch.float16, 17, 33, 256, False),
        (8, torch.float16, 17, 33, 70, True),
        (8, torch.bfloat16, 1, 33, 256, True),
        (4, torch.bfloat16, 65, 5, 300, True),
    ],
)
def test_a_product(bits: int, dtype: torch.dtype, rows: int, columns: int, depth: int, bias: bool) -> None:
    x, weight = drawn(dtype, rows, depth), drawn(dtype, columns, depth)
    added = drawn(dtype, columns) if bias else None
    few = packed.pack(weight, bits=bits)
    got = packed.linear(x, few, added)
    true = x.float() @ rounded(weight, bits).T + (0 if added is None else added.float())
    tolerance = TOLERANCE[dtype] * true.abs().max().item()
    torch.testing.assert_close(got.float(), true, rtol=0, atol=tolerance)
    assert got.dtype == dtype and torch.equal(packed.linear(x, few, added), got)
    assert packed.linear(x[:0], few).shape == (0, columns)
    groups = (-(-depth // (1024 // bits))) * (32 // bits)  # in whole steps
    assert few.nbytes == columns * groups * {4: 20, 8: 34}[bits]


@pytest.mark.parametrize("bits", [4, 8])
def test_wide_tiles_sum_in_the_same_order(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    x, weight = drawn(torch.bfloat16, 3, 70), packed.pack(drawn(torch.bfloat16, 140, 70), bits=bits)
    found = packed.linear(x, weight), packed.gated(x, weight)
    monkeypatch.setattr("tokenswift_py.kernels.triton.configs.WIDE", 1)
    for narrow, wide in zip(found, (packed.linear(x, weight), packed.gated(x, weight)), strict=True):
        torch.testing.assert_close(wide.float(), narrow.float(), rtol=1e-2, atol=1e-2)


def test_rows_that_are_no_numbers_stay_alone() -> None:
    x, weight = drawn(torch.float32, 3, 70), drawn(torch.float32, 9, 70)
    clean = packed.linear(x, packed.pack(weight, bits=4))
    x[1] = torch.nan
    got = packed.linear(x, packed.pack(weight, bits=4))
    assert got[1].isnan().all() and torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("bits", "dtype", "rows", "bias", "activation"),
    [(4, torch.float32, 17, True, "silu"), (8, torch.bfloat16, 1, False, "gelu")],
)
def test_gate_and_up(bits: int, dtype: torch.dtype, rows: int, bias: bool, activation: str) -> None:
    """With the bits of two products and the activation behind them."""
    x, gate, up = drawn(dtype, rows, 70), drawn(dtype, 43, 70), drawn(dtype, 43, 70)
    biases = drawn(dtype, 86) if bias else None
    parts = [
        packed.linear(x, packed.pack(weight, bits=bits), None if biases is None else biases[43 * i :][:43].clone())
        for i, weight in enumerate((gate, up))
    ]
    together = packed.gated(x, packed.pack(gate, up, bits=bits), biases, activation)
    assert torch.equal(together, fused.glu(*parts, activation))


@pytest.mark.parametrize(
    ("bits", "dtype", "head_dim", "kv_heads", "bias"),
    [(4, torch.float32, 16, 2, True), (8, torch.bfloat16, 80, 1, False)],
)
def test_queries_keys_and_values(bits: int, dtype: torch.dtype, head_dim: int, kv_heads: int, bias: bool) -> None:
    """With the bits of three products, and of what rotates and writes them."""
    x, counts = drawn(dtype, 5, 40), (3 * kv_heads, kv_heads, kv_heads)
    weights = [drawn(dtype, count * head_dim, 40) for count in counts]
    biases = [drawn(dtype, len(weight)) if bias else None for weight in weights]
    parts = [
        packed.linear(x, packed.pack(weight, bits=bits), added).unflatten(1, (-1, head_dim))
        for weight, added in zip(weights, biases, strict=True)
    ]
    few, added = packed.pack(*weights, bits=bits), torch.cat(biases) if bias else None
    for got, expected in zip(packed.qkv(x, few, added, counts[0], head_dim), parts, strict=True):
        assert torch.equal(got, expected)
    angles, slots = torch.rand(5, head_dim // 2), torch.tensor([70, 5, -1, 3071, 64])
    turns = (angles.cos(), angles.sin(), slots)
    pools = [new_pool(kv_heads, head_dim, dtype, DEVICE) for _ in range(2)]
    rotated = fused.rope_write(*parts, *turns, pools[0].keys[1], pools[0].values[1])
    assert torch.equal(packed.qkv_rope_write(x, few, added, turns, pools[1].keys[1], pools[1].values[1]), rotated)
    for one, other in ((pools[0].keys, pools[1].keys), (pools[0].values, pools[1].values)):
        assert torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))


def drafting(model: Any, bits: int = 4, **options: Any) -> Any:
    """A decoder for drafts with the model's weights in few bits."""
    decoder = decoder_of(model, attention="triton", ops=TritonOps(), draft=True, **options)
    decoder.ops = TritonOps().in_few_bits(list(parts_in_few_bits(decoder.spec, decoder.weights)), bits)
    return decoder


@pytest.mark.parametrize(("family", "bits"), [("llama", 8), ("phi3", 4), ("gemma3_text", 8), ("qwen2_moe", 4)])
def test_a_draft_pass_is_that_of_the_rounded_weights(family: str, bits: int) -> None:
    """Hugging Face's model with the same matrices rounded. Its experts, routers and embedding keep theirs."""
    more = (
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3} if family == "gemma3_text" else {}
    )
    model = tiny_model(tiny_config(family, **SMALL, **more), torch.float32).to(DEVICE)
    decoder, ids = drafting(model, bits), np.array(PROMPT, np.int32)
    got = decoder.forward([Segment(DraftTree.chain(ids), decoder.new_cache(), causal=True)])
    head = rounded(model.lm_head.weight.detach(), bits)
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(("mlp.gate", "shared_expert_gate")):
            module.weight.data = rounded(module.weight.data, bits)
    with torch.inference_mode():
        hidden = model.model(torch.from_numpy(ids.astype(np.int64))[None].to(DEVICE)).last_hidden_state[0]
    torch.testing.assert_close(got.hidden, hidden, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.logits, hidden @ head.T, rtol=1e-3, atol=1e-3)
    assert f"/int{bits}" in decoder.ops.label


@pytest.mark.parametrize("bits", [4, 8])
def test_what_a_draft_pass_launches_and_reads(reads: Reads, bits: int) -> None:
    """As many launches as a pass of the target, and every packed matrix is read once."""
    model = tiny_model(tiny_config(**{**SMALL, "tie_word_embeddings": False}), torch.bfloat16).to(DEVICE)
    decoders = [drafting(model, bits), decoder_of(model, attention="triton", ops=TritonOps())]
    names = []
    every = [weight for weight, _ in decoders[0].ops._packed.values()]
    reads.spans = Reads(*(part for each in every for part in (each.words, each.scales))).spans
    for decoder in decoders:
        cache = decoder.new_cache()
        with Tape() as tape:
            decoder.forward([Segment(DraftTree.chain([5, 6, 7]), cache)])
        names.append([launch.name for launch in tape.launches if launch.name.endswith("_kernel")])
    assert len(names[0]) == len(names[1])
    assert {name for name in names[0] if name.startswith("packed")} == {
        "packed_kernel", "packed_gated_kernel", "packed_heads_kernel",
    }  # fmt: skip
    assert not {"matmul_kernel", "gated_kernel", "heads_kernel"} & set(names[0])
    assert reads.bytes == decoders[0].ops.nbytes == sum(each.nbytes for each in every)


def test_drafting_with_eight_bits_over_int8_keys_changes_no_token() -> None:
    kv_dtype = torch.int8
    model = tiny_model(tiny_config("qwen3", **SMALL), torch.float32).to(DEVICE)
    decoder = decoder_of(model, attention="triton", ops=TritonOps(), kv_dtype=kv_dtype)
    params = SamplingParams(temperature=0.9, seed=1)
    plain, _, _ = write(decoder, PROMPT, 4, params)
    draft = drafting(model, 8, kv_dtype=kv_dtype)
    partial = create("partial", view_tokens=64, width=1)
    drafted, loop, _ = write(decoder, PROMPT, 4, params, partial, draft_tokens=2, self_draft=draft)
    assert drafted == plain
    assert loop.stats.num_draft_tokens > 0


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(
        str(tiny_folder), engine="torch", attention="triton", device=DEVICE.type, dtype="fp32"
    )


def test_the_flag_reaches_the_drafts(swift: TokenSwift) -> None:
    """The weights are packed once, no row that they compute can be committed, and the text is the same."""
    settings: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0.0, "raw": True}
    plain = swift.generate("the cat", drafter="none", **settings)
    drafted = swift.generate("the cat", drafter="partial", draft_tokens=2, draft_weights="int4", **settings)
    assert drafted.tokens == plain.tokens and drafted.report["num_draft_tokens"] > 0
    rope = rope_tables(swift.checkpoint.config, 512)
    target, first, second = swift.executor.model(rope), *(swift.executor.self_draft(rope, "int4") for _ in range(2))
    assert first.ops is second.ops and isinstance(first.ops, FewBitOps) and first.ops.label.endswith("/int4")
    eight, beside = swift.executor.self_draft(rope, "int8"), swift.executor.beside(swift.checkpoint, "int8").model(rope)
    assert isinstance(eight.ops, FewBitOps) and isinstance(beside.ops, FewBitOps)
    assert eight.ops.label.endswith("/int8") and eight.ops.nbytes == beside.ops.nbytes
    assert not isinstance(swift.executor.self_draft(rope, "auto").ops, FewBitOps)
    cache = target.new_cache()
    for row, model in enumerate((first, target)):
        model.forward([Segment(DraftTree.chain([5 + row]), cache, tail=tuple(range(row)))])
    for path in ([0], [0, 1]):
        with pytest.raises(ValueError, match="cannot be committed"):
            cache.commit(path)


def test_what_has_no_such_weights_says_so(
    swift: TokenSwift, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = rope_tables(swift.checkpoint.config, 512)
    with pytest.raises(UserError, match=r"^draft_weights: 'int2' is not allowed; one of auto, bf16, int8, int4$"):
        swift.executor.self_draft(rope, "int2")
    other = TokenSwift.from_pretrained(str(tiny_folder), engine="torch", attention="sdpa", dtype="fp32").executor
    with pytest.raises(
        UserError,
        match=r"draft_weights: 'int4' .* attention sdpa only bf16; attention triton and engine native have all$",
    ):
        other.self_draft(rope, "int4")
    fresh = TokenSwift.from_pretrained(
        str(tiny_folder), engine="torch", attention="triton", device=DEVICE.type, dtype="fp32"
    ).executor
    with monkeypatch.context() as patched:
        patched.setattr("tokenswift_py.memory.free_on", lambda device: 1000)
        with pytest.raises(UserError, match=r"memory: .* int4 weights for drafts must fit"):
            fresh.self_draft(rope, "int4")
    asked: list[int] = []
    monkeypatch.setattr(executors, "check_memory", lambda needed, device, what: asked.append(needed))
    taken = [fresh.self_draft(rope, kind).ops.nbytes for kind in ("int4", "int8")]
    assert asked == taken
