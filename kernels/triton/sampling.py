"""Tokens from processed logits on the GPU: argmax(scores / T + Gumbel(seed, position, token)).

The noise is bit for bit that of `tokenswift_py/sampling/noise.py`, which specifies Philox4x32-10, its counter and the
polynomial of the logarithm.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

import triton
import triton.language as tl
from tokenswift_py.kernels.base import on_device
from tokenswift_py.kernels.triton.runtime import Variant, launch_options

BLOCK = 1024  # tokens that a program looks at
LN2 = tl.constexpr(0.6931471805599453)
SQRT_HALF = tl.constexpr(0.7071067811865476)
TOKEN_DOMAIN = tl.constexpr(0)
NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def log_polynomial(x: tl.tensor) -> tl.tensor:
    """Computes the logarithm of positive normal doubles. Every product and sum is rounded by itself."""
    bits = x.to(tl.int64, bitcast=True)
    m = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)  # in [1/2, 1)
    e = ((bits >> 52) & 0x7FF) - 1022
    small = m < tl.full(m.shape, SQRT_HALF, tl.float64)  # a plain constant would be rounded to fp32 first
    m = tl.where(small, m + m, m)
    e = tl.where(small, e - 1, e)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = tl.full(s.shape, 1.0 / 21.0, tl.float64)
    for k in tl.static_range(10):
        series = series * z + 1.0 / (19.0 - 2.0 * k)
    return e.to(tl.float64) * LN2 + (s + s) * series


@triton.jit
def philox_words(c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor) -> tl.tensor:
    """Computes Philox4x32-10 on 32-bit words held in uint64."""
    low: tl.constexpr = 0xFFFFFFFF
    for _ in tl.static_range(10):
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0 = (p1 >> 32) ^ c1 ^ k0
        c2 = (p0 >> 32) ^ c3 ^ k1
        c1 = p1 & low
        c3 = p0 & low
        k0 = (k0 + 0x9E3779B9) & low
        k1 = (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


@triton.jit
def perturbed(scores: tl.tensor, floor: tl.tensor, temperature: tl.tensor, word: tl.tensor) -> tl.tensor:
    """Returns scores / T + Gumbel noise made of 32 random bits, and -inf where scores / T is below the floor."""
    u = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    noise = -log_polynomial(-log_polynomial(u))
    scaled = scores / temperature
    return tl.where(scaled >= floor, scaled + noise, float("-inf"))


@triton.jit(do_not_specialize=["vocab", "blocks"])
def choose_kernel(
    scores: tl.tensor,  # [R, vocab] fp32 or fp64
    floors: tl.tensor,  # [R] fp64, compared with scores / T
    positions: tl.tensor,  # [R] int32
    temperature: tl.tensor,  # [1] fp64
    key: tl.tensor,  # [3] int64: low and high word of the seed, stream
    best_scores: tl.tensor,  # [R, blocks] fp64
    best_tokens: tl.tensor,  # [R, blocks] int32
    vocab: tl.tensor,
    blocks: tl.tensor,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Finds the best of BLOCK tokens of a row, the lowest of equals. A lane has four tokens, of one Philox call."""
    row = tl.program_id(0)
    counter = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    base = scores + row.to(tl.int64) * vocab
    words = (counter, counter, counter, counter)
    if not GREEDY:
        heat = tl.load(temperature)
        floor = tl.load(floors + row)
        c0 = tl.full(counter.shape, 0, tl.uint64) + tl.load(positions + row).to(tl.uint64)
        c2 = tl.full(counter.shape, 0, tl.uint64) + tl.load(key + 2).to(tl.uint64)
        c3 = tl.full(counter.shape, TOKEN_DOMAIN, tl.uint64)
        k0 = tl.load(key).to(tl.uint64)
        k1 = tl.load(key + 1).to(tl.uint64)
        words = philox_words(c0, counter.to(tl.uint64), c2, c3, k0, k1)
    best = tl.full(counter.shape, float("-inf"), tl.float64)
    token = tl.full(counter.shape, NO_TOKEN, tl.int32)
    for lane in tl.static_range(4):
        at = counter * 4 + lane
        value = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float64)
        if not GREEDY:
            value = perturbed(value, floor, heat, words[lane])
        better = value > best
        best = tl.where(better, value, best)
        token = tl.where(better, at, token)
    top = tl.max(best, 0)
    place = row * blocks + tl.program_id(1)
    tl.store(best_scores + place, top)
    tl.store(best_tokens + place, tl.min(tl.where(best == top, token, NO_TOKEN), 0))


@triton.jit(do_not_specialize=["blocks"])
def reduce_kernel(
    best_scores: tl.tensor,
    best_tokens: tl.tensor,
    tokens: tl.tensor,  # [R] int32
    tops: tl.tensor,  # [R] fp64
    blocks: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    score = tl.load(best_scores + row * blocks + lane, mask=lane < blocks, other=float("-inf"))
    token = tl.load(best_tokens + row * blocks + lane, mask=lane < blocks, other=NO_TOKEN)
    top = tl.max(score, 0)
    tl.store(tops + row, top)
    tl.store(tokens + row, tl.min(tl.where(score == top, token, NO_TOKEN), 0))


def choose(
    scores: torch.Tensor,
    positions: torch.Tensor,
    temperature: float,
    seed: int = 0,
    stream: int = 0,
    floors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses each row's token. Returns tokens [R] int32 and their scores with noise [R] fp64, -inf for a row of -inf.

    scores:    [R, vocab] fp32 or fp64, processed. -inf excludes a token.
    positions: [R] int32, absolute.
    floors:    [R] fp64. Tokens whose score / T is below are out. top-k, top-p and min-p are all floors.
    """
    rows, vocab = scores.shape
    blocks, device = triton.cdiv(vocab, BLOCK), scores.device
    if floors is None:
        floors = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
    key = on_device(np.array([seed & 0xFFFFFFFF, seed >> 32, stream], np.int64), device)
    heat = torch.full((1,), temperature, dtype=torch.float64, device=device)
    best_scores = torch.empty((rows, blocks), dtype=torch.float64, device=device)
    best_tokens = torch.empty((rows, blocks), dtype=torch.int32, device=device)
    choose_kernel[(rows, blocks)](
        scores.contiguous(), floors, positions, heat, key, best_scores, best_tokens, vocab, blocks,
        GREEDY=temperature == 0, BLOCK=BLOCK, **launch_options(4, 1),
    )  # fmt: skip
    tokens = torch.empty(rows, dtype=torch.int32, device=device)
    tops = torch.empty(rows, dtype=torch.float64, device=device)
    reduce_kernel[(rows,)](
        best_scores, best_tokens, tokens, tops, blocks, WIDTH=triton.next_power_of_2(blocks), **launch_options(4, 1)
    )
    return tokens, tops


def variants(amd: bool) -> Iterator[Variant]:
    doubles = dict.fromkeys(("floors", "temperature", "best_scores", "tops"), "*fp64")
    kinds = {**doubles, "key": "*i64", "best_tokens": "*i32", "tokens": "*i32"}
    for dtype, pointer in ((torch.float32, "*fp32"), (torch.float64, "*fp64")):
        for greedy in (False, True):
            name, constants = ("argmax" if greedy else "gumbel argmax"), {"GREEDY": greedy, "BLOCK": BLOCK}
            yield Variant(name, choose_kernel, dtype, None, {**kinds, "scores": pointer}, constants, 4, 1)
    yield Variant("argmax merge", reduce_kernel, torch.float64, None, kinds, {"WIDTH": 256}, 4, 1)
