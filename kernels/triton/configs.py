"""Says how kernels are compiled for each architecture: tiles, warps, stages. They are tuned here and nowhere else.
`make gpu` times the alternatives.

A choice is a function of architecture, type and head size alone. It is the same for every pass, or law 1 would not
hold; another choice gives other bits, so the numerics contract names it (`ops.configurations`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch

from tokenswift_py.kernels.triton.runtime import AMD, INTERPRET


@dataclass(frozen=True)
class Config:
    """The way attention is compiled.

    tile:   packed rows that meet a page together.
    stages: pages that are in flight or in use at a time.
    tiles:  most tiles that meet a page in turn once it is loaded.
    """

    tile: int
    warps: int
    stages: int
    tiles: int = 1


@dataclass(frozen=True)
class Tiles:
    """The way products are compiled. They are narrow in columns, so that one token's still fill a GPU."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Attention of 16-bit queries, by the largest head size. Nothing spills, and with heads up to 128 two blocks share a
# multiprocessor. At heads of 128 two tiles would spill on sm_90 (288 bytes a thread), and on sm_80 they would leave no
# room for pages in flight.
ATTENTION = {
    "sm_80": {64: Config(64, 4, 2), 128: Config(32, 4, 3), 256: Config(16, 4, 1)},
    "sm_90": {64: Config(64, 4, 3, tiles=2), 128: Config(64, 4, 3), 256: Config(16, 4, 1)},
    "sm_100": {64: Config(64, 4, 3), 128: Config(32, 4, 3), 256: Config(16, 4, 1)},
    "sm_120": {64: Config(64, 4, 2), 128: Config(32, 4, 3), 256: Config(16, 4, 1)},
    "gfx942": {64: Config(64, 4, 2), 128: Config(64, 4, 2), 256: Config(16, 4, 1)},
}
# Attention over int8 pages, which takes more registers to widen them.
INT8 = {
    "sm_80": {128: Config(32, 4, 3), 256: Config(16, 8, 1)},
    "sm_90": {128: Config(32, 4, 3), 256: Config(16, 8, 1)},
    "sm_100": {64: Config(32, 4, 3), 128: Config(16, 4, 3), 256: Config(16, 8, 1)},
    "sm_120": {64: Config(32, 4, 3), 128: Config(16, 4, 3), 256: Config(16, 8, 1)},
    "gfx942": {128: Config(32, 4, 1), 256: Config(16, 4, 1)},
}
# fp32 is for checks rather than for speed.
FP32 = {64: Config(16, 4, 1), 256: Config(16, 8, 1)}
FP32_AMD = {256: Config(16, 4, 1)}

# With 4 warps one variant would spill on sm_80, six on sm_100 and eight on sm_120.
PRODUCTS = {
    "sm_80": Tiles(64, 32, 64, 8, 4),
    "sm_90": Tiles(64, 32, 64, 4, 4),
    "sm_100": Tiles(64, 32, 64, 8, 4),
    "sm_120": Tiles(64, 32, 128, 4, 3),
    "gfx942": Tiles(64, 32, 64, 4, 2),
}
PRODUCTS_FP32 = Tiles(16, 32, 64, 4, 3)

# Products of up to 16 rows with weights of 4 or 8 bits, for drafts: those of few columns, and those of at least WIDE
# columns, which fill a GPU with wider tiles too. Then those of more rows. The packing gives what a step reads, so the
# depth is not used.
WIDE = 16_384
PACKED = {
    "sm_80": (Tiles(16, 32, 256, 4, 4), Tiles(16, 64, 256, 4, 3), Tiles(64, 32, 256, 4, 3)),
    "sm_90": (Tiles(16, 32, 256, 4, 4), Tiles(16, 64, 256, 4, 3), Tiles(64, 32, 256, 4, 3)),
    "sm_100": (Tiles(16, 32, 256, 4, 4), Tiles(16, 64, 256, 8, 3), Tiles(64, 32, 256, 4, 3)),
    "sm_120": (Tiles(16, 32, 256, 4, 4), Tiles(16, 32, 256, 4, 4), Tiles(16, 32, 256, 4, 4)),
    "gfx942": (Tiles(16, 32, 256, 4, 2), Tiles(16, 64, 256, 4, 2), Tiles(64, 32, 256, 4, 2)),
}
PACKED_FP32 = {4: Tiles(16, 32, 256, 4, 2), 8: Tiles(16, 16, 256, 4, 2)}  # by bits; others would spill

# `make gpu` times these beside the choice for 16-bit attention.
SWEPT = tuple(Config(*of) for of in product((32, 64), (4, 8), (3,), (1, 2)))


def here() -> str:
    """Returns the architecture whose choices hold for the current device; in the interpreter it is sm_90."""
    if AMD:
        return "gfx942"
    if INTERPRET or not torch.cuda.is_available():
        return "sm_90"
    major, _ = torch.cuda.get_device_capability()
    return max((name for name in PRODUCTS if name[:3] == "sm_" and int(name[3:-1]) <= major),
               key=lambda name: int(name[3:-1]), default="sm_80")  # fmt: skip


def config(
    dtype: torch.dtype, head_dim: int, int8: bool = False, architecture: str | None = None, more: bool = False
) -> Config:
    """Returns how attention is compiled.

    int8: whether keys and values are int8.
    more: whether queries are moved or scores capped, which leaves registers for one tile only.
    """
    chosen = architecture or here()
    table = ATTENTION[chosen]
    if dtype == torch.float32:
        table = FP32_AMD if chosen == "gfx942" else FP32
    elif int8:
        table = INT8[chosen]
    found = table[min((size for size in table if size >= head_dim), default=max(table))]
    return replace(found, tiles=1) if more else found


def tiles(dtype: torch.dtype, architecture: str | None = None) -> Tiles:
    """Returns how every product with a weight of this type is compiled."""
    return PRODUCTS_FP32 if dtype == torch.float32 else PRODUCTS[architecture or here()]


def packed_tiles(dtype: torch.dtype, bits: int, rows: int, columns: int, architecture: str | None = None) -> Tiles:
    """Returns how products of so many rows of this type with so many columns of weights of few bits are compiled."""
    if dtype == torch.float32:
        return PACKED_FP32[bits]
    narrow, wide, many = PACKED[architecture or here()]
    if rows > narrow.rows:
        return many
    return wide if columns >= WIDE else narrow
