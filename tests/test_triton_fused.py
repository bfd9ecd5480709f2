"""The fused Triton kernels compute what torch and the reference sampler do; noise and copies to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

import triton
import triton.language as tl

from interpreter import DEVICE
from scenes import LAYERS, fill, new_pool
from tokenswift_py.core import DraftTree, SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.kernels.base import rotate
from tokenswift_py.kernels.triton import fused
from tokenswift_py.kernels.triton.runtime import launch_options
from tokenswift_py.kernels.triton.sampling import BLOCK, choose, log_polynomial
from tokenswift_py.kvcache.pages import TorchPagePool
from tokenswift_py.sampling import noise
from tokenswift_py.sampling.reference import NumericsError, Sampler
from tokenswift_py.sampling.triton import TritonSampler

# The interpreter cuts bf16 short instead of rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [48, 1025])
def test_norms_with_and_without_a_residual(dtype: torch.dtype, width: int) -> None:
    x, y = torch.randn(3, width).to(dtype), torch.randn(3, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": 3 * TOLERANCE[dtype]}
    for total in (x, x + y):
        wide = total.float()
        expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
        if total is x:
            torch.testing.assert_close(fused.norm(x, weight, 1e-5), expected, **tolerance)
        else:
            added, normed = fused.add_norm(x, y, weight, 1e-5)
            torch.testing.assert_close(added, total, **tolerance)
            torch.testing.assert_close(normed, expected, **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype: torch.dtype) -> None:
    gate, up = torch.randn(3, 700).to(dtype), torch.randn(3, 700).to(dtype)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": 2 * TOLERANCE[dtype]}
    torch.testing.assert_close(fused.swiglu(gate, up), torch.nn.functional.silu(gate) * up, **tolerance)


@pytest.mark.parametrize("head_dim", [16, 80])
def test_rotation_and_the_write_to_the_pages_are_torchs_to_the_bit(head_dim: int) -> None:
    pool = new_pool(2, head_dim, torch.float32, DEVICE)
    before = pool.keys.clone()
    q, k, v = torch.randn(3, 6, head_dim), torch.randn(3, 2, head_dim), torch.randn(3, 2, head_dim)
    angles = torch.rand(40, head_dim // 2)
    positions, slots = torch.tensor([0, 39, 7]), torch.tensor([70, 5, 3071])
    keys, values = pool.keys[1], pool.values[1]
    cos, sin = angles.cos()[positions], angles.sin()[positions]
    out = fused.rope_write(q, k, v, cos, sin, slots, keys, values)
    cos, sin = cos[:, None], sin[:, None]
    assert torch.equal(out, rotate(q, cos, sin))
    assert torch.equal(keys.flatten(1, 2)[:, slots], rotate(k, cos, sin).transpose(0, 1))
    assert torch.equal(values.flatten(1, 2)[:, slots], v.transpose(0, 1))
    untouched = torch.ones(48 * 64, dtype=torch.bool)
    untouched[slots] = False
    assert torch.equal(keys.flatten(1, 2)[:, untouched].isnan(), before[1].flatten(1, 2)[:, untouched].isnan())
    assert torch.equal(pool.keys[0].isnan(), before[0].isnan())


@pytest.mark.parametrize("head_dim", [16, 80])
def test_int8_pages_get_what_torch_makes_of_the_rows(head_dim: int) -> None:
    """To the bit; also of zeros, of what is too small for a scale, and of what is not finite. Slot -1 is nowhere."""
    pool, expected = (TorchPagePool(1, 2, head_dim, 3, torch.int8, DEVICE) for _ in range(2))
    for part in (pool, expected):
        part.keys.fill_(99)
        part.values.fill_(99)
        part.key_scales.fill_(-1)
        part.value_scales.fill_(-1)
    q, k, v = torch.randn(7, 4, head_dim), torch.randn(7, 2, head_dim), 100 * torch.randn(7, 2, head_dim)
    v[0, 0] = 0
    v[1, 0] = 1e-38
    k[2, 0, 3], v[2, 1, 5] = torch.inf, torch.nan
    angles = torch.rand(7, head_dim // 2)
    slots = torch.tensor([5, 64, 66, 190, 191, 0, -1])
    fused.rope_write(q, k, v, angles.cos(), angles.sin(), slots, pool.keys[0], pool.values[0], pool.scales_of(0))
    rotated = rotate(k, angles.cos()[:, None], angles.sin()[:, None])
    expected.write(0, slots[:6], rotated[:6], v[:6])
    for name in ("keys", "values", "key_scales", "value_scales"):
        got, true = getattr(pool, name), getattr(expected, name)
        assert torch.equal(got.nan_to_num(nan=7.0), true.nan_to_num(nan=7.0)), name
        assert (name == "keys") or (got != -1).any()
    back = pool.values[0].flatten(1, 2)[:, 5].float() * pool.value_scales[0].flatten(1, 2)[:, 5, None]
    assert (back - v[0]).abs().max() <= v[0].abs().max() / 127 / 2 * 1.001
    before = [part.clone().flatten(2, 3) for part in (pool.keys, pool.key_scales[..., None])]
    pool.move(np.array([5, 64]), np.array([64, 5]))
    for part, kept in zip((pool.keys, pool.key_scales[..., None]), before, strict=True):
        assert torch.equal(part.flatten(2, 3)[:, :, [64, 5]], kept[:, :, [5, 64]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_accepted_rows_move_as_if_read_before_any_is_written(dtype: torch.dtype, head_dim: int) -> None:
    """Compaction, where targets are other rows' sources; and a cycle, which no order of copies gets right."""
    pool = new_pool(2, head_dim, dtype, DEVICE)
    fill(pool, np.arange(200, dtype=np.int32))
    cases = [([130, 131, 140, 141, 170], [129, 130, 131, 132, 133]), ([3, 4, 5], [4, 5, 3]), ([7], [7])]
    for source, target in [*cases, (list(range(100, 140)), list(range(101, 141)))]:
        expected = [part.clone().flatten(2, 3) for part in (pool.keys, pool.values)]
        for part in expected:
            part[:, :, target] = part[:, :, source]
        indices = (torch.tensor(x) for x in (source, target))
        fused.move_rows(pool.keys, pool.values, *indices)
        for part, wanted in zip((pool.keys, pool.values), expected, strict=True):
            assert torch.equal(part.flatten(2, 3).view(torch.uint8), wanted.view(torch.uint8))
    assert LAYERS > 1


def history(length: int) -> History:
    made = History()
    made.extend([0] * length)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_the_reference_samplers_token_is_chosen(dtype: torch.dtype, temperature: float) -> None:
    """Sizes that are no multiple of four or of a block, exclusions, and every part of the noise's counter."""
    vocab, lengths = 2 * BLOCK + 3, (1, 77, 2**20)
    logits = 3 * torch.randn(3, vocab, dtype=dtype)
    logits[:, ::5] = -torch.inf
    for seed, stream in ((0, 0), (2**64 - 1, 3)):
        sampler = Sampler(SamplingParams(temperature=temperature, seed=seed, stream=stream), vocab)
        positions = torch.tensor(lengths, dtype=torch.int32)
        tokens, scores = choose(logits, positions, temperature, seed, stream)
        for row, length in enumerate(lengths):
            rows = logits[row]
            assert int(tokens[row]) == sampler.choose(rows, history(length))
            expected = float(rows[tokens[row]].double())
            if temperature:
                expected = (
                    expected / temperature + noise.gumbel(seed, length, tokens[row : row + 1].cpu().numpy(), stream)[0]
                )
            assert float(scores[row]) == expected  # to the bit


def test_the_noise_is_the_specification_to_the_bit() -> None:
    """Each token alone: the score of a row with one candidate at 0 is its noise."""
    tokens = [0, 1, 2, 3, 7, 1021, 1022, 1023]
    scores = torch.full((len(tokens), 1024), -torch.inf)
    scores[range(len(tokens)), tokens] = 0
    for position in (0, 123456):
        got = choose(scores, torch.full((len(tokens),), position, dtype=torch.int32), 1.0, seed=99)
        assert got[0].tolist() == tokens
        assert got[1].tolist() == noise.gumbel(99, position, np.array(tokens)).tolist()


@triton.jit
def log_kernel(x: tl.tensor, out: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    tl.store(out + at, log_polynomial(tl.load(x + at)))


def test_the_logarithm_at_the_edge_of_its_interval_is_the_specification_to_the_bit() -> None:
    """Words whose u lies between the root of 1/2 and what that is in fp32, and those around them: the mantissa must be
    compared in double. The interpreter does so whatever the kernel says: test_triton_compile.py reads its binary."""
    words = np.arange(3037000448, 3037000512)
    u = (words + 0.5) * 2.0**-32
    got = torch.empty(len(u), dtype=torch.float64)
    log_kernel[(1,)](torch.from_numpy(u).to(DEVICE), got, BLOCK=len(u), **launch_options(4, 1))
    assert got.tolist() == noise.log(u).tolist()
    assert (u < noise.SQRT_HALF).any() and (u >= noise.SQRT_HALF).any()


def test_ties_go_to_the_lowest_id_and_floors_exclude() -> None:
    scores = torch.zeros(2, 3000, dtype=torch.float64)
    scores[0, 1500] = scores[0, 2999] = 1
    positions = torch.zeros(2, dtype=torch.int32)
    assert choose(scores, positions, 0.0)[0].tolist() == [1500, 0]
    scores = torch.randn(2, 3000)
    for temperature, min_p in ((0.8, 0.3), (1.0, 0.9)):
        params = SamplingParams(temperature=temperature, min_p=min_p, seed=5)
        sampler = Sampler(params, 3000)
        floors = scores.double().amax(1) / temperature + float(noise.log(min_p))
        tokens, _ = choose(scores, positions + 9, temperature, 5, floors=floors)
        assert tokens.tolist() == [sampler.choose(row, history(9)) for row in scores]


def test_a_row_without_a_token_says_so() -> None:
    scores = torch.full((1, 10), -torch.inf)
    assert choose(scores, torch.zeros(1, dtype=torch.int32), 1.0)[1].item() == -torch.inf


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"temperature": 0.0, "penalty": 1.3}, {"top_k": 20, "min_p": 0.1}, {"top_k": 5, "temperature": 1.7},
        {"penalty": 1.2, "penalty_window": 3, "ban": (4, 5), "logit_bias": {9: 3.5, 11: -1.0}},
        {"top_p": 0.8}, {"dry_multiplier": 0.8}, {"repetition_penalty": 1.3, "penalty": 1.2, "penalty_window": 2},
        {"typical_p": 0.7, "xtc_probability": 0.5, "frequency_penalty": 0.4, "no_repeat_ngram_size": 2},
    ],
)  # fmt: skip
def test_the_sampler_on_the_gpu_is_the_reference(changes: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 0.8, "seed": 3, **changes})
    made = history(0)
    made.extend([1, 2, 9, 2, 1, 2])
    for first_end in (0, 100):
        samplers = [kind(params, 300, eos=[7, 8], first_end=first_end) for kind in (Sampler, TritonSampler)]
        for _ in range(3):
            logits = 2 * torch.randn(300)
            logits[[7, 8]] = 8
            reference, on_device = (sampler.choose(logits, made) for sampler in samplers)
            assert reference == on_device
            assert (reference in (7, 8)) <= (first_end == 0)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"temperature": 0.0}, {"penalty": 1.4, "penalty_window": 3, "top_k": 30}, {"top_p": 0.8},
        {"min_p": 0.05, "ban": (4, 5), "logit_bias": {9: 3.5}}, {"repetition_penalty": 1.3, "penalty": 1.1},
    ],
)  # fmt: skip
def test_the_nodes_of_a_tree_are_chosen_for_as_each_would_be(changes: dict[str, Any]) -> None:
    """Each behind its own path, which penalties see; where the text may not end yet depends on its depth."""
    params = SamplingParams(**{"temperature": 0.8, "seed": 3, **changes})
    tree = DraftTree([2, 9, 7, 9, 3], [-1, 0, 0, 2, 3])
    logits = 2 * torch.randn(len(tree), 300)
    logits[:, [7, 8]] = 8
    made = history(0)
    made.extend([1, 2, 9, 2])
    reference, on_device = (kind(params, 300, eos=[7, 8], first_end=6) for kind in (Sampler, TritonSampler))
    choose = on_device.chooser(tree, logits, made)
    for node in range(len(tree)):
        made.extend(tree.tokens[tree.path(node)[1:]])
        assert choose(node) == reference.choose(logits[node], made)
        made.truncate(4)


def test_only_nodes_that_are_asked_for_can_be_refused() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, torch.nan]])
    choose = TritonSampler(SamplingParams(), 2).chooser(DraftTree.chain([1, 0]), logits, history(4))
    assert choose(0) == 1
    with pytest.raises(NumericsError, match="logits for position 5 are not finite"):
        choose(1)


def test_the_sampler_on_the_gpu_refuses_what_the_reference_refuses() -> None:
    sampler = TritonSampler(SamplingParams(temperature=1.0, ban=(0, 1)), 2)
    with pytest.raises(NumericsError, match="logits for position 4 are not finite"):
        sampler.choose(torch.tensor([torch.nan, 1.0]), history(4))
    with pytest.raises(NumericsError, match="no token is left to choose from at position 4"):
        sampler.choose(torch.tensor([2.0, 1.0]), history(4))
