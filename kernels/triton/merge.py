"""The kernels that run after attention to the splits. They merge the splits and compute the masses of pages."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import triton
import triton.language as tl
from tokenswift_py.kernels.triton.items import NEAR
from tokenswift_py.kernels.triton.runtime import DTYPES, HEAD_DIMS, POINTERS, Variant, padded

MERGED_AT_ONCE = 16  # splits that one step of the merge adds


@triton.jit(do_not_specialize=["first_row", "rows", "states", "heads", "group"])
def merge_kernel(
    state: tl.tensor,
    state_max: tl.tensor,
    state_sum: tl.tensor,
    ranges: tl.tensor,  # [R, 3] each row's first split, the one after its last, and how many pages are near
    out: tl.tensor,  # [R, kv_heads * group, HEAD_DIM]
    lse: tl.tensor,  # [R, kv_heads * group] fp32, base 2
    first_row: tl.tensor,
    rows: tl.tensor,
    states: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    AT_ONCE: tl.constexpr,
    NEAR: tl.constexpr,
) -> None:
    """Merges the splits of one packed row of one KV head. Splits outside its range weigh 0, and change no bit."""
    local = tl.program_id(0)
    head = tl.program_id(1)
    packed = first_row + local
    row = packed // group
    start = tl.load(ranges + 3 * row)
    stop = tl.load(ranges + 3 * row + 1)
    near = tl.load(ranges + 3 * row + 2)
    aligned = start // AT_ONCE * AT_ONCE
    step = tl.arange(0, AT_ONCE)
    column = tl.arange(0, D)
    beside = (step >= NEAR - near) & (step < NEAR)  # the first states are near pages; the row's own page is last
    at_near = (head * states + step).to(tl.int64) * rows + local

    tops = tl.load(state_max + at_near, mask=beside, other=float("-inf"))
    for split in range(aligned, stop, AT_ONCE):
        there = (split + step >= start) & (split + step < stop)
        at = (head * states + NEAR + split + step).to(tl.int64) * rows + local
        tops = tl.maximum(tops, tl.load(state_max + at, mask=there, other=float("-inf")))
    top = tl.max(tops, 0)
    if near == 0:  # a row that only pads the pass gets zeros
        top = 0.0

    total = 0.0
    acc = tl.full([D], 0.0, tl.float32)
    for split in range(aligned, stop, AT_ONCE):
        there = (split + step >= start) & (split + step < stop)
        at = (head * states + NEAR + split + step).to(tl.int64) * rows + local
        weight = tl.exp2(tl.load(state_max + at, mask=there, other=float("-inf")) - top)
        total += tl.sum(weight * tl.load(state_sum + at, mask=there, other=0.0), 0)
        part = tl.load(state + at[:, None] * D + column[None, :], mask=there[:, None], other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
    weight = tl.exp2(tl.load(state_max + at_near, mask=beside, other=float("-inf")) - top)
    total += tl.sum(weight * tl.load(state_sum + at_near, mask=beside, other=0.0), 0)
    part = tl.load(state + at_near[:, None] * D + column[None, :], mask=beside[:, None], other=0.0)
    acc += tl.sum(weight[:, None] * part, 0)

    if near == 0:
        total = 1.0
    at_row = (row * heads + head).to(tl.int64) * group + packed % group
    tl.store(out + at_row * HEAD_DIM + column, (acc / total).to(out.dtype.element_ty), mask=column < HEAD_DIM)
    tl.store(lse + at_row, top + tl.log2(total))


@triton.jit(do_not_specialize=["first_row", "rows", "heads", "group", "mass_pages"])
def mass_kernel(
    page_max: tl.tensor,  # -inf where a page's sum was not written
    page_sum: tl.tensor,
    lse: tl.tensor,
    mass: tl.tensor,  # [R, kv_heads, mass_pages]
    first_row: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    mass_pages: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Sums the attention probability on each page over the heads of a group, in order."""
    row = first_row // group + tl.program_id(0)
    head = tl.program_id(1)
    page = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for member in range(0, group):
        local = tl.program_id(0) * group + member
        at = (head * rows + local).to(tl.int64) * mass_pages + page
        top = tl.load(page_max + at, mask=page < mass_pages, other=float("-inf"))
        there = top > float("-inf")
        part = top + tl.log2(tl.load(page_sum + at, mask=there, other=1.0))
        tl.store(page_max + at, float("-inf"), mask=page < mass_pages)  # the next layer needs it so
        acc += tl.exp2(part - tl.load(lse + (row * heads + head) * group + member))
    at_mass = mass + (row * heads + head).to(tl.int64) * mass_pages + page
    tl.store(at_mass, acc.to(mass.dtype.element_ty), mask=page < mass_pages)


def variants(target: str) -> Iterator[Variant]:
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            shape = {"HEAD_DIM": head_dim, "D": padded(head_dim), "AT_ONCE": MERGED_AT_ONCE, "NEAR": NEAR}
            yield Variant("merge", merge_kernel, dtype, head_dim, {"out": POINTERS[dtype]}, shape, 4, 2)
    yield Variant("mass", mass_kernel, torch.float32, None, {"mass": "*fp32"}, {"BLOCK": 128}, 4, 1)
