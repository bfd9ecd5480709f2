"""Mixtures of experts: which experts a row takes, their products, and their sum, without a look from the host.

Rows choose one by one. Then every expert lists its pairs: pair i is the i % chosen-th expert of row i // chosen, in
ascending order of the experts' numbers. Products gather the rows of an expert into the tiles of `matmul.py`, so an
element is summed as by `linear`, whichever rows took the same expert. A row's experts are summed in ascending order.
Shapes and grids depend on the number of rows alone, so that a pass can be recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import triton
import triton.language as tl
from tokenswift_py.kernels.triton.configs import tiles
from tokenswift_py.kernels.triton.matmul import processors, product
from tokenswift_py.kernels.triton.projections import opened
from tokenswift_py.kernels.triton.runtime import DTYPES, POINTERS, PRECISION, Variant, launch_options, precision

BLOCK = 1024  # pairs, or columns of a row, that a program takes at a time


@dataclass(frozen=True, eq=False)
class Routes:
    """The experts that rows take.

    shares:  [R, chosen] fp32, by which the experts' results are multiplied.
    spans:   [count, 2] int32 where an expert's pairs begin in `sources`, and how many they are.
    sources: [R * chosen] int32 pairs, expert by expert, and those of one in ascending order.
    """

    shares: torch.Tensor
    spans: torch.Tensor
    sources: torch.Tensor


@triton.jit
def route_kernel(
    scores: tl.tensor,  # [R, COUNT]
    experts: tl.tensor,  # [R, CHOSEN] int32
    shares: tl.tensor,  # [R, CHOSEN] fp32
    COUNT: tl.constexpr,
    CHOSEN: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Chooses the experts of one row: those of the largest probabilities, of equal ones the lowest. They ascend.

    Where probabilities are no numbers, all count as 0, so the lowest experts are taken and the row stays no number.
    """
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    there = lane < COUNT
    score = tl.load(scores + row * COUNT + lane, mask=there, other=float("-inf")).to(tl.float32)
    p = tl.exp(score - tl.max(score, 0))
    p = p / tl.sum(p, 0)
    left = tl.where(there, tl.where(p == p, p, 0.0), -1.0)  # -1 is none, or taken
    for _ in range(CHOSEN):
        best = tl.min(tl.where(left == tl.max(left, 0), lane, BLOCK), 0)
        left = tl.where(lane == best, -1.0, left)
    taken = there & (left < 0.0)
    if NORMALISED:
        p = p / tl.sum(tl.where(taken, p, 0.0), 0)
    at = row * CHOSEN + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(experts + at, lane, mask=taken)
    tl.store(shares + at, p, mask=taken)


@triton.jit(do_not_specialize=["pairs"])
def group_kernel(
    experts: tl.tensor,  # [pairs] int32
    spans: tl.tensor,  # [count, 2] int32
    sources: tl.tensor,  # [pairs] int32
    pairs: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Lists the pairs of one expert behind those of all experts before it."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.full([BLOCK], 0, tl.int32)
    for first in range(0, pairs, BLOCK):
        number = tl.load(experts + first + lane, mask=first + lane < pairs, other=2147483647)
        before += (number < expert).to(tl.int32)
    start = tl.sum(before, 0)
    end = start
    for first in range(0, pairs, BLOCK):
        number = tl.load(experts + first + lane, mask=first + lane < pairs, other=2147483647)
        own = (number == expert).to(tl.int32)
        tl.store(sources + end + tl.cumsum(own, 0) - 1, first + lane, mask=own == 1)
        end += tl.sum(own, 0)
    tl.store(spans + 2 * expert, start)
    tl.store(spans + 2 * expert + 1, end - start)


def route(scores: torch.Tensor, chosen: int, normalised: bool) -> Routes:
    """Chooses the experts of every row. scores: [R, count] of the router. normalised: whether shares sum to 1."""
    rows, count = scores.shape
    experts, sources = (torch.empty(rows * chosen, dtype=torch.int32, device=scores.device) for _ in range(2))
    shares = torch.empty((rows, chosen), dtype=torch.float32, device=scores.device)
    spans = torch.empty((count, 2), dtype=torch.int32, device=scores.device)
    if rows:
        route_kernel[(rows,)](
            scores.contiguous(), experts, shares, COUNT=count, CHOSEN=chosen, NORMALISED=normalised,
            BLOCK=triton.next_power_of_2(count), **launch_options(1, 1),
        )  # fmt: skip
    group_kernel[(count,)](experts, spans, sources, rows * chosen, BLOCK=BLOCK, **launch_options(4, 1))
    return Routes(shares, spans, sources)


@triton.jit
def matrix(address: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """Returns the pointer that is stored there. torch's memory is aligned, which a launch tells of arguments only."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(kind)), 16)


@triton.jit(do_not_specialize=["columns", "count", "chosen", "programs"])
def experts_kernel(
    x: tl.tensor,  # [pairs / chosen, depth]
    addresses: tl.tensor,  # [1 or 2, count] int64 of matrices [columns, depth]
    spans: tl.tensor,  # [count, 2] int32
    sources: tl.tensor,  # [pairs] int32
    out: tl.tensor,  # [pairs, columns]
    columns: tl.tensor,
    depth: tl.tensor,
    count: tl.tensor,
    chosen: tl.tensor,
    programs: tl.tensor,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Multiplies the row of every pair by a matrix of its expert; GATED by two, whose products go on as in `gated`."""
    column_tiles = tl.cdiv(columns, BLOCK_N)
    kind = out.dtype.element_ty
    for tile in range(tl.program_id(0), count * column_tiles, programs):
        expert = tile // column_tiles
        column = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        there = column < columns
        start = tl.load(spans + 2 * expert)
        own = tl.load(spans + 2 * expert + 1)
        weight = matrix(addresses + expert, kind)
        for first in range(0, own, BLOCK_M):
            place = first + tl.arange(0, BLOCK_M)
            kept = place < own
            pair = tl.load(sources + start + place, mask=kept, other=0)
            row = pair // chosen
            result = product(x, weight, row, column, kept, there, depth, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
            if GATED:
                up = matrix(addresses + count + expert, kind)
                wide = product(x, up, row, column, kept, there, depth, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
                result = opened(result, wide, kind, GELU)
            target = out + pair.to(tl.int64)[:, None] * columns + column[None, :]
            tl.store(target, result.to(kind), mask=kept[:, None] & there[None, :])


def multiplied(
    x: torch.Tensor, addresses: torch.Tensor, routes: Routes, columns: int, gated: bool, activation: str = "silu"
) -> torch.Tensor:
    """Returns [R * chosen, columns] each pair's row times the matrix of its expert, with the bits of `linear`.

    x: [R, depth], or [R * chosen, depth] a row for each pair. addresses: [1, count] of contiguous matrices [columns,
    depth] of x's type; with `gated` [2, count], for act(x @ gate.T) * (x @ up.T) with the bits of `gated`.
    """
    pairs, count, chosen = len(routes.sources), len(routes.spans), tiles(x.dtype)
    out = torch.empty((pairs, columns), dtype=x.dtype, device=x.device)
    most = count * triton.cdiv(columns, chosen.columns)
    if not pairs or not most:
        return out
    programs = min(most, processors(x.device))
    experts_kernel[(programs,)](
        x.contiguous(), addresses, routes.spans, routes.sources, out, columns, x.shape[1], count, pairs // len(x),
        programs, GATED=gated, GELU=activation == "gelu", BLOCK_M=chosen.rows, BLOCK_N=chosen.columns,
        BLOCK_K=chosen.depth, PRECISION=PRECISION, **launch_options(chosen.warps, chosen.stages),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["columns"])
def mix_kernel(
    parts: tl.tensor,  # [R * CHOSEN, columns]
    shares: tl.tensor,  # [R, CHOSEN] fp32
    score: tl.tensor,  # [R]; unused without SHARED
    shared: tl.tensor,  # [R, columns]; unused without SHARED
    out: tl.tensor,  # [R, columns]
    columns: tl.tensor,
    CHOSEN: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sums one row's experts in ascending order, each times its share, in fp32, which is rounded at the end."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    total = tl.full([BLOCK], 0.0, tl.float32)
    for i in range(CHOSEN):
        pair = row * CHOSEN + i
        part = tl.load(parts + pair * columns + column, mask=there, other=0.0).to(tl.float32)
        total += part * tl.load(shares + pair)
    if SHARED:
        part = tl.load(shared + row * columns + column, mask=there, other=0.0).to(tl.float32)
        total += part / (1.0 + tl.exp(-tl.load(score + row).to(tl.float32)))
    tl.store(out + row * columns + column, total.to(out.dtype.element_ty), mask=there)


def mix(parts: torch.Tensor, routes: Routes, shared: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """Returns [R, columns] the sum of each row's experts, each times its share.

    parts: [R * chosen, columns]. shared: [R, 1] and [R, columns] score and result of one expert more, whose share is
    the score's sigmoid.
    """
    (rows, chosen), columns = routes.shares.shape, parts.shape[1]
    out = parts.new_empty(rows, columns)
    if out.numel():
        score, part = shared or (parts, parts)
        mix_kernel[(rows, triton.cdiv(columns, BLOCK))](
            parts, routes.shares, score.contiguous(), part.contiguous(), out, columns, CHOSEN=chosen,
            SHARED=shared is not None, BLOCK=BLOCK, **launch_options(4, 1),
        )  # fmt: skip
    return out


def variants(target: str) -> Iterator[Variant]:
    """Yields the kernels for 128 experts, of which a row takes 8."""
    tables = {"spans": "*i32", "sources": "*i32", "experts": "*i32", "shares": "*fp32", "addresses": "*i64"}
    constants: dict[str, Any] = {"BLOCK": BLOCK}
    yield Variant("group", group_kernel, DTYPES[0], None, tables, constants, 4, 1)
    for dtype in DTYPES:
        data, chosen = POINTERS[dtype], tiles(dtype, target)
        kinds = {**tables, "scores": data}
        for normalised in (False, True):
            constants = {"COUNT": 128, "CHOSEN": 8, "NORMALISED": normalised, "BLOCK": 128}
            yield Variant(f"route{'+sum' * normalised}", route_kernel, dtype, None, kinds, constants, 1, 1)
        kinds = {**tables, **dict.fromkeys(("x", "out"), data)}
        for name, gated in (("experts", False), ("experts+gated", True)):
            constants = {
                "GATED": gated, "GELU": False, "BLOCK_M": chosen.rows, "BLOCK_N": chosen.columns,
                "BLOCK_K": chosen.depth, "PRECISION": precision(target),
            }  # fmt: skip
            launch = (chosen.warps, chosen.stages, ("depth",))
            yield Variant(name, experts_kernel, dtype, None, kinds, constants, *launch)
        kinds = {**tables, **dict.fromkeys(("parts", "score", "shared", "out"), data)}
        for shared in (False, True):
            constants = {"CHOSEN": 8, "SHARED": shared, "BLOCK": BLOCK}
            yield Variant(f"mix{'+shared' * shared}", mix_kernel, dtype, None, kinds, constants, 4, 1)
