"""The best tokens of rows of scores on the GPU: the largest of score + Gumbel(seed, position, token), best first.

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
def gumbel(word: tl.tensor) -> tl.tensor:
    """Returns the Gumbel noise that 32 random bits, held in uint64, make."""
    u = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    return -log_polynomial(-log_polynomial(u))


@triton.jit
def perturbed(
    base: tl.tensor, at: tl.tensor, vocab: tl.tensor, floor: tl.tensor, word: tl.tensor, GREEDY: tl.constexpr
) -> tl.tensor:
    """Returns the scores of tokens `at` with their noise, -inf for a token below the floor and for none."""
    score = tl.load(base + at, mask=at < vocab, other=float("-inf"))
    return score if GREEDY else tl.where(score >= floor, score + gumbel(word), float("-inf"))


@triton.jit
def lowest(score: tl.tensor, top: tl.tensor, token: tl.tensor) -> tl.tensor:
    return tl.where(score == top, token, NO_TOKEN)


@triton.jit(do_not_specialize=["vocab", "blocks", "count"])
def best_kernel(
    scores: tl.tensor,  # [R, vocab] fp64
    floors: tl.tensor,  # [R] fp64
    positions: tl.tensor,  # [R] int32
    key: tl.tensor,  # [3] int64: low and high word of the seed, stream
    best_scores: tl.tensor,  # [R, blocks, count] fp64
    best_tokens: tl.tensor,  # [R, blocks, count] int32
    vocab: tl.tensor,
    blocks: tl.tensor,
    count: tl.tensor,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Finds the best of BLOCK tokens of a row, best first. Of equal ones the lowest token comes first. A lane has four
    tokens, which are those of one Philox call."""
    row = tl.program_id(0)
    counter = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    base = scores + row.to(tl.int64) * vocab
    at = counter * 4
    floor = tl.load(floors + row)
    w0, w1, w2, w3 = counter, counter, counter, counter
    if not GREEDY:
        c0 = tl.full(counter.shape, 0, tl.uint64) + tl.load(positions + row).to(tl.uint64)
        c2 = tl.full(counter.shape, 0, tl.uint64) + tl.load(key + 2).to(tl.uint64)
        c3 = tl.full(counter.shape, TOKEN_DOMAIN, tl.uint64)
        k0 = tl.load(key).to(tl.uint64)
        k1 = tl.load(key + 1).to(tl.uint64)
        w0, w1, w2, w3 = philox_words(c0, counter.to(tl.uint64), c2, c3, k0, k1)
    s0 = perturbed(base, at, vocab, floor, w0, GREEDY)
    s1 = perturbed(base, at + 1, vocab, floor, w1, GREEDY)
    s2 = perturbed(base, at + 2, vocab, floor, w2, GREEDY)
    s3 = perturbed(base, at + 3, vocab, floor, w3, GREEDY)
    place = (row * blocks + tl.program_id(1)) * count
    for rank in range(count):
        top = tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), 0)
        first = tl.minimum(lowest(s0, top, at), lowest(s1, top, at + 1))
        second = tl.minimum(lowest(s2, top, at + 2), lowest(s3, top, at + 3))
        token = tl.min(tl.minimum(first, second), 0)
        tl.store(best_scores + place + rank, top)
        tl.store(best_tokens + place + rank, token)
        s0 = tl.where(at == token, float("-inf"), s0)
        s1 = tl.where(at + 1 == token, float("-inf"), s1)
        s2 = tl.where(at + 2 == token, float("-inf"), s2)
        s3 = tl.where(at + 3 == token, float("-inf"), s3)


@triton.jit(do_not_specialize=["blocks", "count"])
def merge_kernel(
    best_scores: tl.tensor,
    best_tokens: tl.tensor,
    highest: tl.tensor,  # [R, blocks] fp64
    found: tl.tensor,  # [R, 1 + 2 count] fp64
    blocks: tl.tensor,
    count: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    """Merges the lists of a row's blocks, each the best first. A lane has the head of one."""
    row = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    there = lane < blocks
    base = (row * blocks + lane) * count
    taken = tl.full([WIDTH], 0, tl.int32)
    out = found + row * (1 + 2 * count)
    tl.store(out, tl.max(tl.load(highest + row * blocks + lane, mask=there, other=float("-inf")), 0))
    for rank in range(count):
        mask = there & (taken < count)
        score = tl.load(best_scores + base + taken, mask=mask, other=float("-inf"))
        token = tl.load(best_tokens + base + taken, mask=mask, other=NO_TOKEN)
        top = tl.max(score, 0)
        winner = tl.min(lowest(score, top, token), 0)
        tl.store(out + 1 + rank, winner.to(tl.float64))
        tl.store(out + 1 + count + rank, top)
        taken += (mask & (token == winner)).to(tl.int32)


def best(
    scores: torch.Tensor,
    positions: torch.Tensor,
    key: torch.Tensor | None = None,
    floors: torch.Tensor | None = None,
    count: int = 1,
    highest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Finds each row's `count` best tokens. Returns [R, 1 + 2 count] fp64: the largest of `highest`, the tokens, best
    first, and their scores with noise, which are -inf where fewer tokens are left.

    scores:    [R, vocab] fp64, divided by the temperature. -inf excludes a token.
    positions: [R] int32, absolute.
    key:       as `noise_key` makes it; None is greedy, without noise.
    floors:    [R] fp64. Tokens of lower scores are out. top-k, top-p and min-p are all floors.
    highest:   [R, blocks] fp64 numbers of which the largest is told.
    """
    rows, vocab = scores.shape
    blocks, device = triton.cdiv(vocab, BLOCK), scores.device
    if floors is None:
        floors = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
    lists = rows, blocks, count
    best_scores = torch.empty(lists, dtype=torch.float64, device=device)
    best_tokens = torch.empty(lists, dtype=torch.int32, device=device)
    best_kernel[(rows, blocks)](
        scores, floors, positions, best_tokens if key is None else key, best_scores, best_tokens, vocab, blocks, count,
        GREEDY=key is None, BLOCK=BLOCK, **launch_options(4, 1),
    )  # fmt: skip
    found = torch.empty((rows, 1 + 2 * count), dtype=torch.float64, device=device)
    merge_kernel[(rows,)](
        best_scores, best_tokens, best_scores.amax(2) if highest is None else highest, found, blocks, count,
        WIDTH=triton.next_power_of_2(blocks), **launch_options(4, 1),
    )  # fmt: skip
    return found


def noise_key(seed: int, stream: int, device: torch.device) -> torch.Tensor:
    """Returns what noise is made of beside the position, [3] int64."""
    return on_device(np.array([seed & 0xFFFFFFFF, seed >> 32, stream], np.int64), device)


def variants(target: str) -> Iterator[Variant]:
    doubles = dict.fromkeys(("scores", "floors", "best_scores", "highest", "found"), "*fp64")
    kinds = {**doubles, "key": "*i64", "best_tokens": "*i32"}
    for greedy in (False, True):
        name, constants = ("best" if greedy else "gumbel best"), {"GREEDY": greedy, "BLOCK": BLOCK}
        yield Variant(name, best_kernel, torch.float64, None, kinds, constants, 4, 1)
    yield Variant("best merge", merge_kernel, torch.float64, None, kinds, {"WIDTH": 128}, 4, 1)
