"""Drafts with weights of 4 bits on Triton's kernels: their numbers, their products, and that they change no text."""

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
from tokenswift_py.kernels._four_bits import quantise
from tokenswift_py.kernels.triton import fused, int4
from tokenswift_py.kernels.triton.ops import FourBitOps, TritonOps
from tokenswift_py.models.ops import four_bit_parts
from tokenswift_py.models.rope import rope_tables
from triton_scenes import Reads, reads, seeded

__all__ = ["reads", "seeded"]  # the fixtures

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PROMPT = [3, 14, 15, 9, 26]


def rounded(weights: torch.Tensor) -> torch.Tensor:
    """The weights that 4 bits stand for, group by group of 32: an fp16 minimum and up to 15 fp16 steps above it."""
    rows = np.zeros((len(weights), -(-weights.shape[1] // 32) * 32), np.float32)
    rows[:, : weights.shape[1]] = weights.float().cpu()
    for row in rows.reshape(-1, 32):
        step = np.float32(np.float16((row.max() - row.min()) / np.float32(15)))
        least = np.float32(np.float16(row.min()))
        quants = np.rint((row - least) * (np.float32(1) / step if step > 0 else np.float32(0)))
        row[:] = quants.clip(0, 15) * step + least
    return torch.from_numpy(rows[:, : weights.shape[1]]).to(weights.device)


def drawn(dtype: torch.dtype, *shape: int) -> Any:
    return torch.randn(shape).to(dtype)


def test_weights_that_came_from_blocks_of_four_bits_come_back() -> None:
    """Such as those of a Q4_1 file, and of a Q4_0 file, whose minimum is -8 steps."""
    quants = torch.randint(0, 16, (7, 5, 32))
    quants[..., 0], quants[..., 1] = 0, 15
    scales = torch.rand(7, 5).half() / 64
    for minima in (torch.randn(7, 5).half() / 8, -8 * scales):
        weights = quants * scales.float()[..., None] + minima.float()[..., None]
        found = quantise(weights.flatten(1))
        assert torch.equal(found.quants, quants.to(torch.uint8))
        assert torch.equal(found.minima, minima)
        assert torch.equal(found.widened(), weights.flatten(1)) and torch.equal(found.scales, scales)


def test_no_weight_is_off_by_more_than_half_a_step() -> None:
    weights = torch.cat([drawn(torch.bfloat16, 9, 70), torch.zeros(1, 70), torch.full((1, 70), 3.0)])
    found = quantise(weights)
    assert torch.equal(found.widened()[:, :70], rounded(weights))
    error = (found.widened()[:, :70] - weights.float()).abs()
    step = found.scales.float().repeat_interleave(32, 1)[:, :70]
    assert (error <= 0.51 * step + 2.0**-11 * weights.float().abs().max()).all()
    assert torch.equal(found.widened()[9:, :64], weights[9:, :64].float())  # groups of one value


@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "depth", "bias"),
    [
        (torch.float32, 1, 43, 70, True),
        (torch.float32, 65, 5, 300, False),
        (torch.float16, 17, 33, 256, False),
        (torch.bfloat16, 1, 33, 256, True),
        (torch.bfloat16, 65, 5, 300, True),
    ],
)
def test_a_product(dtype: torch.dtype, rows: int, columns: int, depth: int, bias: bool) -> None:
    x, weight = drawn(dtype, rows, depth), drawn(dtype, columns, depth)
    added = drawn(dtype, columns) if bias else None
    packed = int4.pack(weight)
    got = int4.linear(x, packed, added)
    true = x.float() @ rounded(weight).T + (0 if added is None else added.float())
    tolerance = TOLERANCE[dtype] * true.abs().max().item()
    torch.testing.assert_close(got.float(), true, rtol=0, atol=tolerance)
    assert got.dtype == dtype and torch.equal(int4.linear(x, packed, added), got)
    assert int4.linear(x[:0], packed).shape == (0, columns)
    assert packed.nbytes == -(-depth // 256) * 256 * columns * 5 // 8


def test_wide_tiles_sum_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(torch.bfloat16, 3, 70), int4.pack(drawn(torch.bfloat16, 140, 70))
    found = int4.linear(x, weight), int4.gated(x, weight)
    monkeypatch.setattr("tokenswift_py.kernels.triton.configs.WIDE", 1)
    for narrow, wide in zip(found, (int4.linear(x, weight), int4.gated(x, weight)), strict=True):
        torch.testing.assert_close(wide.float(), narrow.float(), rtol=1e-2, atol=1e-2)


def test_rows_that_are_no_numbers_stay_alone() -> None:
    x, weight = drawn(torch.float32, 3, 70), drawn(torch.float32, 9, 70)
    clean = int4.linear(x, int4.pack(weight))
    x[1] = torch.nan
    got = int4.linear(x, int4.pack(weight))
    assert got[1].isnan().all() and torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("dtype", "rows", "bias", "activation"), [(torch.float32, 17, True, "silu"), (torch.bfloat16, 1, False, "gelu")]
)
def test_gate_and_up(dtype: torch.dtype, rows: int, bias: bool, activation: str) -> None:
    """With the bits of two products and the activation behind them."""
    x, gate, up = drawn(dtype, rows, 70), drawn(dtype, 43, 70), drawn(dtype, 43, 70)
    biases = drawn(dtype, 86) if bias else None
    parts = [
        int4.linear(x, int4.pack(weight), None if biases is None else biases[43 * i :][:43].clone())
        for i, weight in enumerate((gate, up))
    ]
    together = int4.gated(x, int4.pack(gate, up), biases, activation)
    assert torch.equal(together, fused.glu(*parts, activation))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "kv_heads", "bias"), [(torch.float32, 16, 2, True), (torch.bfloat16, 80, 1, False)]
)
def test_queries_keys_and_values(dtype: torch.dtype, head_dim: int, kv_heads: int, bias: bool) -> None:
    """With the bits of three products, and of what rotates and writes them."""
    x, counts = drawn(dtype, 5, 40), (3 * kv_heads, kv_heads, kv_heads)
    weights = [drawn(dtype, count * head_dim, 40) for count in counts]
    biases = [drawn(dtype, len(weight)) if bias else None for weight in weights]
    parts = [
        int4.linear(x, int4.pack(weight), added).unflatten(1, (-1, head_dim))
        for weight, added in zip(weights, biases, strict=True)
    ]
    packed, added = int4.pack(*weights), torch.cat(biases) if bias else None
    for got, expected in zip(int4.qkv(x, packed, added, counts[0], head_dim), parts, strict=True):
        assert torch.equal(got, expected)
    angles, slots = torch.rand(5, head_dim // 2), torch.tensor([70, 5, -1, 3071, 64])
    turns = (angles.cos(), angles.sin(), slots)
    pools = [new_pool(kv_heads, head_dim, dtype, DEVICE) for _ in range(2)]
    rotated = fused.rope_write(*parts, *turns, pools[0].keys[1], pools[0].values[1])
    assert torch.equal(int4.qkv_rope_write(x, packed, added, turns, pools[1].keys[1], pools[1].values[1]), rotated)
    for one, other in ((pools[0].keys, pools[1].keys), (pools[0].values, pools[1].values)):
        assert torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))


def drafting(model: Any, **options: Any) -> Any:
    """A decoder for drafts with the model's weights in 4 bits."""
    decoder = decoder_of(model, attention="triton", ops=TritonOps(), draft=True, **options)
    decoder.ops = TritonOps().four_bits(list(four_bit_parts(decoder.spec, decoder.weights)))
    return decoder


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "qwen2_moe"])
def test_a_draft_pass_is_that_of_the_rounded_weights(family: str) -> None:
    """Hugging Face's model with the same matrices rounded. Its experts, routers and embedding keep theirs."""
    more = (
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3} if family == "gemma3_text" else {}
    )
    model = tiny_model(tiny_config(family, **SMALL, **more), torch.float32).to(DEVICE)
    decoder, ids = drafting(model), np.array(PROMPT, np.int32)
    got = decoder.forward([Segment(DraftTree.chain(ids), decoder.new_cache(), causal=True)])
    head = rounded(model.lm_head.weight.detach())
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(("mlp.gate", "shared_expert_gate")):
            module.weight.data = rounded(module.weight.data)
    with torch.inference_mode():
        hidden = model.model(torch.from_numpy(ids.astype(np.int64))[None].to(DEVICE)).last_hidden_state[0]
    torch.testing.assert_close(got.hidden, hidden, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.logits, hidden @ head.T, rtol=1e-3, atol=1e-3)
    assert "/int4" in decoder.ops.label


def test_what_a_draft_pass_launches_and_reads(reads: Reads) -> None:
    """As many launches as a pass of the target, and every packed matrix is read once."""
    model = tiny_model(tiny_config(**{**SMALL, "tie_word_embeddings": False}), torch.bfloat16).to(DEVICE)
    decoders = [drafting(model), decoder_of(model, attention="triton", ops=TritonOps())]
    names = []
    packed = [packed for packed, _ in decoders[0].ops._packed.values()]
    reads.spans = Reads(*(part for each in packed for part in (each.words, each.scales))).spans
    for decoder in decoders:
        cache = decoder.new_cache()
        with Tape() as tape:
            decoder.forward([Segment(DraftTree.chain([5, 6, 7]), cache)])
        names.append([launch.name for launch in tape.launches if launch.name.endswith("_kernel")])
    assert len(names[0]) == len(names[1])
    assert {name for name in names[0] if name.startswith("int4")} == {
        "int4_kernel", "int4_gated_kernel", "int4_heads_kernel",
    }  # fmt: skip
    assert not {"matmul_kernel", "gated_kernel", "heads_kernel"} & set(names[0])
    assert reads.bytes == decoders[0].ops.nbytes == sum(each.nbytes for each in packed)


def test_drafting_with_four_bits_over_int8_keys_changes_no_token() -> None:
    kv_dtype = torch.int8
    model = tiny_model(tiny_config("qwen3", **SMALL), torch.float32).to(DEVICE)
    decoder = decoder_of(model, attention="triton", ops=TritonOps(), kv_dtype=kv_dtype)
    params = SamplingParams(temperature=0.9, seed=1)
    plain, _, _ = write(decoder, PROMPT, 4, params)
    draft = drafting(model, kv_dtype=kv_dtype)
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
    assert first.ops is second.ops and isinstance(first.ops, FourBitOps)
    assert not isinstance(swift.executor.self_draft(rope, "auto").ops, FourBitOps)
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
    with pytest.raises(
        UserError, match=r"^draft_weights: 'int8' is not allowed; engine torch has bf16 or int4; .* int8$"
    ):
        swift.executor.self_draft(rope, "int8")
    other = TokenSwift.from_pretrained(str(tiny_folder), engine="torch", attention="sdpa", dtype="fp32").executor
    with pytest.raises(
        UserError, match=r"draft_weights: 'int4' .* bf16 alone with attention sdpa, and int4 with triton"
    ):
        other.self_draft(rope, "int4")
    fresh = TokenSwift.from_pretrained(
        str(tiny_folder), engine="torch", attention="triton", device=DEVICE.type, dtype="fp32"
    ).executor
    monkeypatch.setattr("tokenswift_py.memory.free_on", lambda device: 1000)
    with pytest.raises(UserError, match=r"memory: .* int4 weights for drafts must fit"):
        fresh.self_draft(rope, "int4")
