"""How a run meets positions that its model was not trained for (law 8): the scheme, and Self-Extend's arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenswift_py.errors import check

STRETCHES = ("linear", "ntk", "yarn")  # schemes that change the frequencies
SCHEMES = ("auto", "trained", *STRETCHES, "self-extend")
BLOCKS = (64, 128, 256, 512, 1024)  # whole pages, and never more than a split of the CPU engine's attention


@dataclass(frozen=True)
class Positions:
    """Which scheme meets the positions of a run.

    scheme: auto        the config's own tables where they reach the context, else Self-Extend;
            trained     the config's own tables, however long the context;
            linear, ntk, yarn  frequencies stretched by the least whole factor that reaches the context, which the
                        weights were not trained for (position interpolation, arXiv 2306.15595; NTK-aware base; YaRN,
                        arXiv 2309.00071);
            self-extend the config's own tables; a query meets far keys at grouped distances (arXiv 2401.01325).
    window: of Self-Extend, in positions: nearer blocks of keys keep their true distances. None is a quarter of the
            trained length.
    block:  of Self-Extend: positions that are moved together. None is 1 024, or an eighth of a short trained length.
    """

    scheme: str = "auto"
    window: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        check(self.scheme in SCHEMES, "positions", self.scheme, f"one of {', '.join(SCHEMES)}")
        extends = self.scheme in ("auto", "self-extend")
        for name, value in (("positions_window", self.window), ("positions_block", self.block)):
            check(value is None or extends, name, value, "only with positions self-extend or auto")
        blocks = ", ".join(map(str, BLOCKS))
        check(self.block is None or self.block in BLOCKS, "positions_block", self.block, f"one of {blocks}")
        wide = self.window is None or self.window >= BLOCKS[0]
        check(wide, "positions_window", self.window, f"at least {BLOCKS[0]}, and a multiple of the block")


def extent(trained: int, positions: Positions) -> tuple[int, int]:
    """Window and block of Self-Extend. Raises UserError where they leave no room for distances beyond them."""
    few = f"{trained} trained positions are too few; positions trained, linear, ntk and yarn go beyond them"
    check(trained > 2 * BLOCKS[0], "positions", "self-extend", few)
    block = positions.block
    if block is None:
        block = max((size for size in BLOCKS if 8 * size <= trained), default=BLOCKS[0])
    window = positions.window or max(block, trained // 4 // block * block)
    check(window % block == 0, "positions_window", window, f"a multiple of the block ({block})")
    most = trained - 1 - block
    allowed = f"at most {most}: with a block of {block} more leaves none of the {trained} trained distances"
    check(window <= most, "positions_window", window, allowed)
    return window, block


def group_size(context: int, trained: int, window: int, block: int) -> int:
    """The least G for which the largest distance, W + (blocks beyond) B / G + B - 1, is below the trained length."""
    beyond = max(0, (context - 1) // block * block - window)
    return max(1, math.ceil(beyond / (trained - window - block)))


def grouped_shifts(context: int, window: int, block: int, group: int) -> npt.NDArray[np.int32]:
    """[blocks] int32: by how many blocks a key's block lies behind the row's, how far the row's query is moved towards
    it: floor((d - n) B (G - 1) / G) beyond the n blocks of the window."""
    beyond = np.maximum(np.arange((context - 1) // block + 1, dtype=np.int64) - window // block, 0)
    return (beyond * block * (group - 1) // group).astype(np.int32)
