"""Filters: which tokens may be chosen, by scores divided by the temperature (-inf excludes a token).

Sums are of integers, or by halving (`halving_sum`), so that every implementation has the same bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokenswift_py.sampling import noise

Doubles = npt.NDArray[np.float64]

MASS_BITS = 40  # probabilities relative to the best are summed as integers of this many bits
NEGLIGIBLE = -28.0  # e^-28 < 2^-40: such a token has no mass
DEEPEST = 700.0  # the exponential of a score further below the best is taken for 0


def masses(depths: Doubles) -> npt.NDArray[np.int64]:
    """Returns [n] probabilities of scores so far below the best, relative to it."""
    return np.floor(noise.exp(-depths) * 2.0**MASS_BITS).astype(np.int64)


def halving_sum(values: Doubles) -> float:
    """Returns the sum of [n] doubles. The second half is added to the first, element by element, until one is left.
    Halves are of the next power of two, and missing elements are 0."""
    count = 1 << max(0, len(values) - 1).bit_length()
    row = np.zeros(count)
    row[: len(values)] = values
    while len(row) > 1:
        half = len(row) // 2
        row = row[:half] + row[half:]
    return float(row[0])


def nucleus_floor(scores: Doubles, top_p: float) -> float:
    """Returns the score of the last token of the nucleus, the smallest set of best tokens with at least top_p of the
    mass.

    scores: [n] > the best + NEGLIGIBLE. The row is never sorted as a whole. A growing head of it is, until that holds
            the mass.
    """
    mass = masses(scores.max() - scores)
    wanted = top_p * float(mass.sum())
    head = 256
    while True:
        order = np.argpartition(mass, -head)[-head:] if head < len(mass) else np.arange(len(mass))
        order = order[np.argsort(-mass[order], kind="stable")]
        reached = np.searchsorted(np.cumsum(mass[order]).astype(np.float64), wanted)
        if reached < len(order) or head >= len(mass):
            smallest = mass[order[min(int(reached), len(order) - 1)]]
            return float(scores[mass >= smallest].min())
        head *= 8


def sigma_floor(scores: Doubles, sigmas: float) -> float:
    """Returns the best score less so many standard deviations (of the population) of all scores that are not -inf.

    Source: top-n-sigma (arXiv 2411.07641), like llama.cpp's. It is the same before and after the temperature.
    """
    top = float(scores.max())
    depths = top - scores[scores > -np.inf]
    scale = float(depths.max()) or 1.0  # squares of what fp32 holds are beyond a double's reach in no case
    depths = depths / scale
    mean = halving_sum(depths) / len(depths)
    apart = depths - mean
    deviation = float(np.sqrt(halving_sum(apart * apart) / len(depths))) * scale
    return top - sigmas * deviation


def typical_excess(scores: Doubles, mass: float) -> Doubles:
    """Returns [n] how far beyond the edge of the typical set a token's surprise is, at most 0 inside.

    The typical set has the tokens whose surprise is nearest to its mean, the entropy, until they have this much mass;
    of equal distance all. Source: locally typical sampling (arXiv 2202.00666), like Hugging Face's implementation.
    Depths below the best stand for surprises: they differ by the same number everywhere.
    """
    depths = scores.max() - scores
    near = np.flatnonzero(depths <= DEEPEST)
    weights = noise.exp(-depths[near])
    mean = halving_sum(weights * depths[near]) / halving_sum(weights)
    distances = np.abs(depths - mean)
    relative = masses(depths[near])
    order = np.argsort(distances[near], kind="stable")
    order = order[relative[order] > 0]
    reached = np.searchsorted(np.cumsum(relative[order]).astype(np.float64), mass * float(relative.sum()))
    edge = distances[near[order[min(int(reached), len(order) - 1)]]]
    return np.asarray(distances - edge)


def xtc_ceiling(scores: Doubles, threshold: float) -> float:
    """Returns the score above which XTC leaves tokens out. It is that of the least probable of those that have at least
    this probability among all, and inf where fewer than two have.

    Source: exclude top choices (text-generation-webui#6335), like llama.cpp's.
    """
    depths = scores.max() - scores
    near = np.flatnonzero(depths <= DEEPEST)
    mass = masses(depths[near])
    top = near[mass.astype(np.float64) >= threshold * float(mass.sum())]
    return float(scores[top].min()) if len(top) > 1 else float("inf")
