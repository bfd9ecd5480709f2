"""Schemes for positions that a model was not trained for (law 8), and the arithmetic of Self-Extend."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenswift_py.errors import check
from tokenswift_py.sampling import noise

STRETCHES = ("linear", "ntk", "yarn")  # schemes that change the frequencies
STEP, LARGEST = 16, 2**18  # log-extend's scale is a multiple of STEP, so that runs of similar length share numerics
Shifts = npt.NDArray[np.int32]

EXTENSIONS = ("self-extend", "log-extend")  # schemes that move queries
SCHEMES = ("auto", "trained", *STRETCHES, *EXTENSIONS)
# Whole pages, and never more than a split of the CPU engine's attention. Larger blocks cost little: SmolLM2-135M read
# documentation after 7 K at 1.37 nats a token with blocks of 64, and at 1.43 with 1 024 (Self-Extend, G = 16).
BLOCKS = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Positions:
    """The scheme for the positions of a run, and its settings.

    scheme: auto        the config's own tables where they reach the context, else log-extend;
            trained     the config's own tables, however long the context;
            linear, ntk, yarn  frequencies stretched by the least whole factor that reaches the context, which the
                        weights were not trained for (position interpolation, arXiv 2306.15595; NTK-aware base; YaRN,
                        arXiv 2309.00071);
            self-extend the config's own tables; a query meets far keys at grouped distances (arXiv 2401.01325);
            log-extend  the same, with distances that grow ever slower, by a logarithm that begins at true distances.
    window: positions of an extension's window. Nearer blocks of keys keep their true distances. None is a quarter of
            the trained length.
    block:  positions that an extension moves together. None is an eighth of the trained length, at most 1 024.
    """

    scheme: str = "auto"
    window: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        check(self.scheme in SCHEMES, "positions", self.scheme, f"one of {', '.join(SCHEMES)}")
        extends = self.scheme in ("auto", *EXTENSIONS)
        for name, value in (("positions_window", self.window), ("positions_block", self.block)):
            check(value is None or extends, name, value, f"only with positions {', '.join(EXTENSIONS)} or auto")
        blocks = ", ".join(map(str, BLOCKS))
        check(self.block is None or self.block in BLOCKS, "positions_block", self.block, f"one of {blocks}")
        wide = self.window is None or self.window >= BLOCKS[0]
        check(wide, "positions_window", self.window, f"at least {BLOCKS[0]}, and a multiple of the block")


def extent(trained: int, positions: Positions) -> tuple[int, int]:
    """Returns window and block of an extension. Raises UserError where no trained distances are left beyond them."""
    few = f"{trained} trained positions are too few; positions trained goes beyond them"
    check(trained > 2 * BLOCKS[0], "positions", positions.scheme, few)
    block = positions.block
    if block is None:
        block = max((size for size in BLOCKS if 8 * size <= trained), default=BLOCKS[0])
    few = f"with {trained} trained positions below {trained // 2}, to leave distances beyond a window of one block"
    check(2 * block < trained, "positions_block", block, few)
    window = positions.window or max(block, trained // 4 // block * block)
    check(window % block == 0, "positions_window", window, f"a multiple of the block ({block})")
    most = trained - 1 - block
    allowed = f"at most {most}: with a block of {block} more leaves none of the {trained} trained distances"
    check(window <= most, "positions_window", window, allowed)
    return window, block


def group_size(context: int, trained: int, window: int, block: int) -> int:
    """Returns the least G for which the largest distance is below the trained length.

    The largest distance is W + (blocks beyond) B / G + B - 1.
    """
    beyond = int(distances_beyond(context, window, block)[-1])
    return max(1, math.ceil(beyond / (trained - window - block)))


def grouped_shifts(context: int, window: int, block: int, group: int) -> Shifts:
    """Returns how far a query is moved towards a key's block, [blocks] by how many blocks d it is before the row's.

    Beyond the n blocks of the window that is floor((d - n) B (G - 1) / G), within them 0.
    """
    beyond = distances_beyond(context, window, block)
    return (beyond * (group - 1) // group).astype(np.int32)


def log_scale(context: int, trained: int, window: int, block: int) -> int:
    """Returns the largest scale s for which the largest distance is below the trained length.

    It is a multiple of STEP, up to LARGEST. The largest distance is W + s ln(1 + x / s) + B - 1, for the last block's x
    positions beyond the window.
    """
    beyond, room = distances_beyond(context, window, block)[-1:], trained - window - block
    scales = np.arange(STEP, LARGEST + STEP, STEP)
    fitting = scales[np.ceil(slowed(beyond, scales)) <= room]
    few = f"{context} positions are too many for {room} trained distances beyond window and block; self-extend goes on"
    check(len(fitting) > 0, "positions", "log-extend", few)
    return int(fitting[-1])


def log_shifts(context: int, window: int, block: int, scale: int) -> Shifts:
    """Returns shifts like `grouped_shifts`. x positions beyond the window are met at a distance of s ln(1 + x / s)."""
    beyond = distances_beyond(context, window, block)
    return np.floor(beyond - slowed(beyond, np.array(scale))).astype(np.int32)


def distances_beyond(context: int, window: int, block: int) -> npt.NDArray[np.int64]:
    """Returns by block distance how many positions a block lies beyond the window, [blocks], 0 for those within."""
    blocks = np.arange((context - 1) // block + 1, dtype=np.int64)
    return np.maximum(blocks - window // block, 0) * block


def slowed(beyond: npt.NDArray[np.int64], scale: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Computes s ln(1 + x / s), by the noise's own logarithm, which gives the same doubles on every machine."""
    return scale * noise.log(1.0 + beyond / scale)
