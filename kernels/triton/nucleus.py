"""top-p on the GPU finds each row's lowest score inside the nucleus. It sums integer masses, which no order can change.

A token's mass is floor(exp(score - best) 2^40), with the exponential of `tokenswift_py/sampling/noise.py` bit for bit.
The nucleus ends at the largest mass m for which the masses of at least m add up to top_p of all (sums as doubles). The
search for m is by digits: a histogram of the mass by the first digit shows in which bin m lies, one of that bin by the
second digit shows the next, and so on. Many programs read a row once a digit, and nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import triton
import triton.language as tl
from tokenswift_py.kernels.triton.runtime import Variant, launch_options
from tokenswift_py.kernels.triton.sampling import BLOCK, LN2

NEGLIGIBLE = -28.0  # e^-28 < 2^-40: such a token has no mass
UNIT = tl.constexpr(2.0**40)  # the mass of the best token
MOST = tl.constexpr(2**40)
ROUNDER = tl.constexpr(1.5 * 2.0**52)  # a double to which it is added, and taken away again, is rounded to an integer
DIGITS = tl.constexpr(5)
DIGIT_BITS = tl.constexpr(9)
BINS = tl.constexpr(512)

_factors = [1.0]  # 1 / k!, where each is the one before divided by k
for _k in range(1, 14):
    _factors.append(_factors[-1] / _k)
FACTORS = tl.constexpr(tuple(_factors))


@triton.jit
def exp_polynomial(x: tl.tensor) -> tl.tensor:
    """Computes the exponential of doubles in [-700, 700]. Every product and sum is rounded by itself."""
    rounder = tl.full(x.shape, ROUNDER, tl.float64)
    ln2 = tl.full(x.shape, LN2, tl.float64)
    n = (x / ln2 + rounder) - rounder
    r = x - n * ln2
    series = tl.full(x.shape, FACTORS[13], tl.float64)
    for k in tl.static_range(13):
        series = series * r + tl.full(x.shape, FACTORS[12 - k], tl.float64)
    power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return series * power


@triton.jit
def key_of(mass: tl.tensor) -> tl.tensor:
    """Returns the floating-point bits of masses of 1 to 2^40, without those that are always the same.

    They have the order of the masses, and spread these over the bins of a digit more evenly than their own bits do. Of
    the 45 bits the first digit has exponent and three bits of the fraction.
    """
    return (mass.to(tl.float64).to(tl.int64, bitcast=True) >> 13) - (1023 << 39)


@triton.jit
def crossing(
    histograms: tl.tensor, keys: tl.tensor, above: tl.tensor, top_p: tl.tensor, row: tl.tensor, DIGIT: tl.constexpr
) -> tl.tensor:
    """Returns the first DIGIT digits of the key that the nucleus ends at, and the mass of all keys whose first digits
    are larger. keys, above: the same for one digit less."""
    bins = tl.arange(0, BINS)
    first = tl.load(histograms + row * DIGITS * BINS + bins)
    wanted = tl.load(top_p) * tl.sum(first, 0).to(tl.float64)
    mass = tl.load(histograms + (row * DIGITS + DIGIT - 1) * BINS + bins)
    key = tl.load(keys + row * (DIGITS + 1) + DIGIT - 1)
    beyond = tl.load(above + row * (DIGITS + 1) + DIGIT - 1)
    reached = beyond + tl.sum(mass, 0) - tl.cumsum(mass, 0) + mass  # the mass from each bin up, `above` included
    digit = tl.max(tl.where(reached.to(tl.float64) >= wanted, bins, 0), 0)
    return (key << DIGIT_BITS) + digit, beyond + tl.sum(tl.where(bins > digit, mass, 0), 0)


@triton.jit(do_not_specialize=["vocab"])
def mass_kernel(
    scores: tl.tensor,  # [R, vocab] fp64
    floors: tl.tensor,  # [R] fp64, below which a token is out
    tops: tl.tensor,  # [R] fp64
    masses: tl.tensor,  # [R, vocab] int64
    histograms: tl.tensor,  # [R, DIGITS, BINS] int64, all zero at first
    vocab: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Computes masses, and their histogram by the first digit."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < vocab
    score = tl.load(scores + row * vocab + at, mask=there, other=float("-inf"))
    depth = tl.load(tops + row) - score
    live = there & (score >= tl.load(floors + row)) & (depth >= 0)  # this excludes NaN, too
    mass = (exp_polynomial(tl.where(live, -depth, 0.0)) * UNIT).to(tl.int64)
    mass = tl.where(live, mass, 0)
    tl.store(masses + row * vocab + at, mass, mask=there)
    digit = key_of(tl.maximum(mass, 1)) >> ((DIGITS - 1) * DIGIT_BITS)
    tl.atomic_add(histograms + row * DIGITS * BINS + digit, mass, mask=mass > 0, sem="relaxed")


@triton.jit(do_not_specialize=["vocab"])
def digit_kernel(
    masses: tl.tensor,
    histograms: tl.tensor,
    keys: tl.tensor,  # [R, DIGITS + 1] int64
    above: tl.tensor,  # [R, DIGITS + 1] int64
    top_p: tl.tensor,  # [1] fp64
    vocab: tl.tensor,
    DIGIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Computes the histogram by digit DIGIT of those masses whose digits before it are those of the nucleus's end."""
    row = tl.program_id(0).to(tl.int64)
    key, beyond = crossing(histograms, keys, above, top_p, row, DIGIT)
    if tl.program_id(1) == 0:
        tl.store(keys + row * (DIGITS + 1) + DIGIT, key)
        tl.store(above + row * (DIGITS + 1) + DIGIT, beyond)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mass = tl.load(masses + row * vocab + at, mask=at < vocab, other=0)
    digits = key_of(tl.maximum(mass, 1)) >> ((DIGITS - 1 - DIGIT) * DIGIT_BITS)
    inside = (mass > 0) & ((digits >> DIGIT_BITS) == key)
    place = (row * DIGITS + DIGIT) * BINS + (digits & (BINS - 1))
    tl.atomic_add(histograms + place, mass, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["vocab", "blocks"])
def edge_kernel(
    scores: tl.tensor,
    masses: tl.tensor,
    histograms: tl.tensor,
    keys: tl.tensor,
    above: tl.tensor,
    top_p: tl.tensor,
    least: tl.tensor,  # [R, blocks] fp64
    vocab: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Finds the lowest score of a block's tokens whose mass is not below that of the nucleus's end; inf if none is."""
    row = tl.program_id(0).to(tl.int64)
    key, _ = crossing(histograms, keys, above, top_p, row, DIGITS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mass = tl.load(masses + row * vocab + at, mask=at < vocab, other=0)
    inside = (mass > 0) & (key_of(tl.maximum(mass, 1)) >= key)
    score = tl.load(scores + row * vocab + at, mask=inside, other=float("inf"))
    tl.store(least + row * blocks + tl.program_id(1), tl.min(score, 0))


def nucleus_floors(
    scores: torch.Tensor, tops: torch.Tensor, top_p: torch.Tensor, floors: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns [R] fp64 the lowest score of each row's nucleus.

    scores: [R, vocab] fp64, divided by the temperature; NaN only in rows that cannot be chosen from.
    tops:   [R] fp64, the best score of each row.
    top_p:  [1] fp64.
    floors: [R] fp64, below which tokens are out already.
    """
    rows, vocab = scores.shape
    grid, device = (rows, triton.cdiv(vocab, BLOCK)), scores.device
    least_with_mass = tops + NEGLIGIBLE
    if floors is not None:
        least_with_mass = torch.maximum(floors, least_with_mass)
    masses = torch.empty(scores.shape, dtype=torch.int64, device=device)
    histograms = torch.zeros((rows, DIGITS.value, BINS.value), dtype=torch.int64, device=device)
    state = torch.zeros((2, rows, DIGITS.value + 1), dtype=torch.int64, device=device)
    least = torch.empty(grid, dtype=torch.float64, device=device)
    options = {"BLOCK": BLOCK, **launch_options(4, 1)}
    mass_kernel[grid](scores, least_with_mass, tops, masses, histograms, vocab, **options)
    for digit in range(1, DIGITS.value):
        digit_kernel[grid](masses, histograms, state[0], state[1], top_p, vocab, DIGIT=digit, **options)
    edge_kernel[grid](scores, masses, histograms, state[0], state[1], top_p, least, vocab, grid[1], **options)
    return least.amin(1)


def variants(target: str) -> Iterator[Variant]:
    doubles = dict.fromkeys(("scores", "floors", "tops", "top_p", "least"), "*fp64")
    kinds = {**doubles, **dict.fromkeys(("masses", "histograms", "keys", "above"), "*i64")}
    kernels: tuple[tuple[str, Any, dict[str, int]], ...] = (
        ("mass", mass_kernel, {}),
        ("digit", digit_kernel, {"DIGIT": 1}),
        ("edge", edge_kernel, {}),
    )
    for name, kernel, constants in kernels:
        yield Variant(f"nucleus {name}", kernel, torch.float64, None, kinds, {**constants, "BLOCK": BLOCK}, 4, 1)
