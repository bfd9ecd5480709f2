"""top-n-sigma, typical-p and XTC on the GPU, with the bits of `tokenswift_py/sampling/filters.py`.

Masses are integers, whose sums no order can change. Sums of doubles are by halving, over the tokens that are left,
closed up: their order in the vocabulary says where each of them goes, and zeros behind them change no sum. Every
product, quotient and sum is an operation of its own, and nothing is divided by a number of the host's, for which torch
would multiply by its reciprocal.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import triton
import triton.language as tl
from tokenswift_py.kernels.triton.nucleus import UNIT, exp_polynomial
from tokenswift_py.kernels.triton.runtime import Variant, launch_options
from tokenswift_py.kernels.triton.sampling import BLOCK

DEEPEST = tl.constexpr(700.0)  # the exponential of a score further below the best is taken for 0
WIDTH = 1024  # how many sums of a row are left for the last launch
COLUMNS = 16  # how many sums a program of the first launch makes


@triton.jit(do_not_specialize=["vocab"])
def weights_kernel(
    scores: tl.tensor,  # [R, vocab] fp64
    tops: tl.tensor,  # [R] fp64
    floors: tl.tensor,  # [R] fp64
    weights: tl.tensor,  # [R, vocab] fp64
    vocab: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Computes probabilities relative to the best, 0 for tokens below the floor, of no score, or too deep."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < vocab
    score = tl.load(scores + row * vocab + at, mask=there, other=float("-inf"))
    depth = tl.load(tops + row) - score
    deepest = tl.full(depth.shape, DEEPEST, tl.float64)
    near = there & (score >= tl.load(floors + row)) & (depth >= 0) & (depth <= deepest)  # this excludes NaN, too
    weight = exp_polynomial(tl.where(near, -depth, 0.0))
    tl.store(weights + row * vocab + at, tl.where(near, weight, 0.0), mask=there)


@triton.jit(do_not_specialize=["width"])
def halving_kernel(
    values: tl.tensor,  # [R, HEIGHT, width] fp64
    sums: tl.tensor,  # [R, width] fp64
    width: tl.tensor,
    HEIGHT: tl.constexpr,
    LEVELS: tl.constexpr,  # HEIGHT is 2 to its power
    COLUMNS: tl.constexpr,
) -> None:
    """Sums over HEIGHT: the second half is added to the first until one is left."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    height = tl.arange(0, HEIGHT)
    left = tl.load(values + (row * HEIGHT + height[:, None]) * width + column[None, :])
    for level in tl.static_range(LEVELS):
        halves = tl.reshape(left, [2, HEIGHT >> (level + 1), COLUMNS])
        first, second = tl.split(tl.permute(halves, (1, 2, 0)))
        left = first + second
    tl.store(sums + row * width + column, tl.reshape(left, [COLUMNS]))


@triton.jit
def sigmas_kernel(
    squares: tl.tensor,  # [R] fp64, the sum of squared distances from the mean
    counts: tl.tensor,  # [R] fp64
    scales: tl.tensor,  # [R] fp64, in units of which distances are
    tops: tl.tensor,  # [R] fp64
    sigmas: tl.tensor,  # [] fp64
    floors: tl.tensor,  # [R] fp64
) -> None:
    """Computes the floor so many standard deviations below the best. torch's root may be rounded otherwise."""
    row = tl.program_id(0)
    deviation = tl.sqrt(tl.load(squares + row) / tl.load(counts + row)) * tl.load(scales + row)
    tl.store(floors + row, tl.load(tops + row) - tl.load(sigmas) * deviation)


def halving_sums(values: torch.Tensor) -> torch.Tensor:
    """Returns [R] what `halving_sum` makes of each row. values: [R, n] fp64, n a power of two of at least WIDTH."""
    rows = len(values)
    while (count := values.shape[1]) > 1:
        height, columns = (count // WIDTH, COLUMNS) if count > WIDTH else (WIDTH, 1)
        sums = values.new_empty(rows, count // height)
        halving_kernel[(rows, sums.shape[1] // columns)](
            values, sums, sums.shape[1], HEIGHT=height, LEVELS=height.bit_length() - 1, COLUMNS=columns,
            **launch_options(4, 1),
        )  # fmt: skip
        values = sums
    return values[:, 0]


def closed_up(places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns [R, n] the values that have places, there, and zeros; n is a power of two.

    places: [R, vocab] int64, -1 for none. values: [R, vocab].
    """
    room = max(WIDTH, triton.next_power_of_2(values.shape[1]))
    found = values.new_zeros(len(values), room + 1)
    found.scatter_(1, torch.where(places < 0, room, places), values)
    return found[:, :room].contiguous()


def places_of(kept: torch.Tensor) -> torch.Tensor:
    """Returns [R, vocab] int64 the place of each token among those that are kept, -1 for others."""
    return torch.where(kept, kept.cumsum(1) - 1, -1)


def sigma_floors(scores: torch.Tensor, tops: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Returns [R] what `sigma_floor` makes of each row.

    scores: [R, vocab] fp64. tops: [R] fp64, the best of each. sigmas: [] fp64.
    """
    live = scores > -torch.inf
    count, places = live.sum(1).double(), places_of(live)
    depths = torch.where(live, tops[:, None] - scores, 0.0)
    scale = depths.amax(1)
    scale = torch.where(scale == 0, 1.0, scale)
    depths = depths / scale[:, None]
    mean = halving_sums(closed_up(places, depths)) / count
    apart = depths - mean[:, None]
    squares, floors = halving_sums(closed_up(places, apart * apart)).contiguous(), torch.empty_like(tops)
    sigmas_kernel[(len(tops),)](squares, count, scale, tops, sigmas, floors, **launch_options(1, 1))
    return floors


def weights_of(scores: torch.Tensor, tops: torch.Tensor, floors: torch.Tensor) -> torch.Tensor:
    """Returns [R, vocab] fp64 probabilities relative to the best, 0 for those too deep and for tokens below a floor."""
    rows, vocab = scores.shape
    weights = torch.empty_like(scores)
    weights_kernel[(rows, triton.cdiv(vocab, BLOCK))](
        scores, tops, floors, weights, vocab, BLOCK=BLOCK, **launch_options(4, 1)
    )
    return weights


def typical(scores: torch.Tensor, tops: torch.Tensor, floors: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Returns [R, vocab] whether a token is in the typical set (`typical_excess`) of those that are not below a floor.

    scores: [R, vocab] fp64. tops, floors: [R] fp64. mass: [] fp64.
    """
    weights = weights_of(scores, tops, floors)
    near = weights > 0
    depths, places = tops[:, None] - scores, places_of(near)
    surprise = closed_up(places, torch.where(near, weights * depths, 0.0))
    mean = halving_sums(surprise) / halving_sums(closed_up(places, weights))
    distances = (depths - mean[:, None]).abs()
    relative = (weights * UNIT.value).long()
    ordered, order = torch.where(relative > 0, distances, torch.inf).sort(1)
    reached = relative.gather(1, order).cumsum(1).double() < (mass * relative.sum(1).double())[:, None]
    last = torch.minimum(reached.sum(1), (relative > 0).sum(1) - 1).clamp(min=0)
    return distances <= ordered.gather(1, last[:, None])


def ceilings(scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Returns [R] what `xtc_ceiling` makes of the tokens of each row that have a score.

    scores: [R, vocab] fp64, -inf for none. threshold: [] fp64.
    """
    tops = scores.amax(1)
    weights = weights_of(scores, tops, torch.full_like(tops, -torch.inf))
    mass = (weights * UNIT.value).long()
    likely = (weights > 0) & (mass.double() >= (threshold * mass.sum(1).double())[:, None])
    least = torch.where(likely, scores, torch.inf).amin(1)
    return torch.where(likely.sum(1) > 1, least, torch.inf)


def variants(target: str) -> Iterator[Variant]:
    names = ("scores", "tops", "floors", "weights", "values", "sums", "squares", "counts", "scales", "sigmas")
    kinds = dict.fromkeys(names, "*fp64")
    yield Variant("sigmas", sigmas_kernel, torch.float64, None, kinds, {}, 1, 1)
    yield Variant("weights", weights_kernel, torch.float64, None, kinds, {"BLOCK": BLOCK}, 4, 1)
    for height, columns in ((128, COLUMNS), (WIDTH, 1)):
        constants = {"HEIGHT": height, "LEVELS": height.bit_length() - 1, "COLUMNS": columns}
        yield Variant(f"halving x{height}", halving_kernel, torch.float64, None, kinds, constants, 4, 1)
