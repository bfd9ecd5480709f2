"""Paged tree attention that keeps law 1: a row's bits depend on its own past, not on the rows that travel with it.

Keys are split by absolute page, whatever the pass (`splits`). Within a split the online softmax goes page by page, with
each key in the page and lane of its absolute position. Full committed pages are read in place, and rows behind them are
gathered by position. One kernel does both, so that a page gives the same bits either way. The partial state of the
split that holds the boundary is handed from the first launch to the second in fp32. A second kernel merges the splits
in fixed order.

The query heads of a KV head, and all rows of a tree, share a tile of fixed height. So each key is read once, and the
tensor cores see the same shape however many rows there are. Page masses are no matter of the binary: a pass that
reports them and one that does not run the same instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

import triton
import triton.language as tl
from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment, FarQueries, Room
from tokenswift_py.kernels.triton.runtime import (
    AMD,
    DTYPES,
    HEAD_DIMS,
    POINTERS,
    PRECISION,
    Variant,
    check_device,
    launch_options,
    padded,
    precision,
)
from tokenswift_py.kernels.triton.tables import (
    EVERYTHING,
    FIELDS,
    LAST_LEVEL,
    MOST_STATES,
    FixedPlan,
    Heads,
    Plan,
    splits,
)

LOG2_E = 1.4426950408889634
MERGED_AT_ONCE = 16  # splits that one step of the merge adds


@dataclass(frozen=True)
class Config:
    """The way the kernel is compiled for a type and head size: the same for every pass, or law 1 would not hold."""

    tile: int  # packed rows
    warps: int
    stages: int


def config(dtype: torch.dtype, head_dim: int, amd: bool = AMD, int8: bool = False) -> Config:
    """Returns the largest tile whose registers do not spill on the targets of `compile.py`.

    int8: whether keys and values are int8.
    """
    if dtype == torch.float32:  # for checks rather than for speed
        return Config(16, 4 if head_dim <= 64 or (amd and head_dim > 128) else 8, 1)
    if head_dim > 128:
        return Config(16, 4, 1)
    if int8:  # widening int8 takes registers of its own
        return Config(32, 4, 1)
    return Config(64, 4 if amd or head_dim <= 64 else 8, 2)


# A value of 1, or one that 16 divides, must not make another binary: row counts and layers change from pass to pass.
ATTEND_SCALARS = (
    "first_item", "first_row", "rows", "split_count", "layer", "window", "pool_pages", "heads", "group", "mass_pages",
    "block_pages",
)  # fmt: skip


@triton.jit(do_not_specialize=ATTEND_SCALARS)
def attend_kernel(
    q: tl.tensor,  # [R, kv_heads * group, HEAD_DIM]
    keys: tl.tensor,  # [kv_heads, pool_pages, PAGE, HEAD_DIM]
    values: tl.tensor,
    key_scales: tl.tensor,  # [kv_heads, pool_pages, PAGE] fp32 where keys are int8; else unused
    value_scales: tl.tensor,
    items: tl.tensor,  # [items, FIELDS]
    positions: tl.tensor,  # [R]
    numbers: tl.tensor,  # absolute numbers of the pages to attend to: lists of all segments, layers and heads
    bounds: tl.tensor,  # the first index of every split in each of these lists
    pages: tl.tensor,  # pages of the pool: lists of all segments
    tails: tl.tensor,  # slots by position: lists of all segments
    state: tl.tensor,  # [kv_heads, splits, rows, D] fp32
    state_max: tl.tensor,  # [kv_heads, splits, rows] fp32
    state_sum: tl.tensor,
    page_max: tl.tensor,  # [kv_heads, rows, mass_pages] fp32; unused where mass_pages is 0
    page_sum: tl.tensor,
    cos: tl.tensor,  # [context, HEAD_DIM / 2] fp32 where queries are moved for far keys; else unused
    sin: tl.tensor,
    shifts: tl.tensor,  # [blocks] int32
    scale: tl.tensor,
    first_item: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    split_count: tl.tensor,
    layer: tl.tensor,
    window: tl.tensor,
    pool_pages: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    mass_pages: tl.tensor,
    block_pages: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    INT8: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Updates a split's state (max, sum, sum of p v) for one tile of rows and one KV head. Exponents are base 2.

    FAR: whether q is not rotated yet. A split is no longer than a block, so a row meets its keys from one position.
    """
    item = items + (first_item + tl.program_id(0)) * FIELDS
    head = tl.program_id(1)
    source = tl.load(item)
    first = tl.load(item + 1)
    count = tl.load(item + 2)
    split = tl.load(item + 3)
    resume = tl.load(item + 4)
    a = tl.load(item + 5)
    b = tl.load(item + 6)
    c = tl.load(item + 7)
    d = tl.load(item + 8)
    e = tl.load(item + 9)
    tail = source == 1
    which = layer * heads + head
    at_bounds = bounds + c + which * d
    begin = tl.where(tail, c, tl.load(at_bounds, mask=source == 0, other=0))
    end = tl.where(tail, d, tl.load(at_bounds + 1, mask=source == 0, other=0))
    listed = numbers + a + which * b
    gathered = tails + a

    tile = tl.arange(0, TILE)
    lane = tl.arange(0, PAGE)
    column = tl.arange(0, D)
    packed = first + tile
    valid = tile < count
    row = packed // group
    inside = column < HEAD_DIM
    position = tl.load(positions + row, mask=valid, other=-1)
    lowest = tl.min(tl.where(valid, position, 0x3FFFFFFF), 0)
    at_q = (row * heads + head).to(tl.int64) * group + packed % group
    q_tile = tl.load(q + at_q[:, None] * HEAD_DIM + column[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
    if FAR:
        half: tl.constexpr = HEAD_DIM // 2
        behind = tl.maximum(position // PAGE // block_pages - tl.load(item + 10) // block_pages, 0)
        met = position - tl.load(shifts + behind, mask=valid, other=0)
        partner = tl.where(column < half, column + half, column - half)
        beside = tl.load(
            q + at_q[:, None] * HEAD_DIM + partner[None, :], mask=valid[:, None] & inside[None, :], other=0.0
        )
        angle = met[:, None].to(tl.int64) * half + (column % half)[None, :]
        cosine = tl.load(cos + angle, mask=valid[:, None] & inside[None, :], other=0.0)
        sine = tl.load(sin + angle, mask=valid[:, None] & inside[None, :], other=0.0)
        across = beside.to(tl.float32) * sine
        across = tl.where((column < half)[None, :], -across, across)
        q_tile = (q_tile.to(tl.float32) * cosine + across).to(q_tile.dtype)
    if PRECISION == "interpret":  # the interpreter's own product of bf16 is wrong
        q_tile = q_tile.to(tl.float32)
    plane = (head * pool_pages).to(tl.int64) * PAGE
    base = plane * HEAD_DIM
    local = (head * split_count + split).to(tl.int64) * rows + (packed - first_row)
    resumed = valid & (resume == 1)
    top = tl.load(state_max + local, mask=resumed, other=float("-inf"))
    total = tl.load(state_sum + local, mask=resumed, other=0.0)
    acc = tl.load(state + local[:, None] * D + column[None, :], mask=resumed[:, None], other=0.0)

    for index in range(begin, end):
        number = tl.where(tail, index, tl.load(listed + index, mask=source == 0, other=0))
        page = tl.load(pages + e + number, mask=source == 0, other=0)
        at = number * PAGE + lane
        by_position = tl.load(gathered + at, mask=tail & (at < b), other=-1)
        slot = tl.where(tail, by_position, page * PAGE + lane)
        # Lanes that no row of the tile sees may hold NaN, and 0 * NaN is not 0.
        seen = (slot >= 0) & (at > lowest - window)
        where = base + slot.to(tl.int64) * HEAD_DIM
        k = tl.load(keys + where[None, :] + column[:, None], mask=seen[None, :] & inside[:, None], other=0)
        if INT8:
            k = k.to(q_tile.dtype)
        if PRECISION == "interpret":
            scores = tl.dot(q_tile, k.to(tl.float32))
        else:
            scores = tl.dot(q_tile, k, input_precision=PRECISION)
        scores *= scale
        if INT8:
            scores *= tl.load(key_scales + plane + slot, mask=seen, other=0.0)[None, :]
        visible = seen[None, :] & (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        above = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp2(scores - finite[:, None])
        alpha = tl.exp2(top - finite)
        p_sum = tl.sum(p, 1)
        total = total * alpha + p_sum
        v = tl.load(values + where[:, None] + column[None, :], mask=seen[:, None] & inside[None, :], other=0)
        if INT8:  # a weight is multiplied with the value's scale before it is rounded
            v = v.to(q_tile.dtype)
            p *= tl.load(value_scales + plane + slot, mask=seen, other=0.0)[None, :]
        acc *= alpha[:, None]
        if PRECISION == "interpret":
            acc += tl.dot(p, v.to(tl.float32))
        else:
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = above
        told = valid & (p_sum > 0) & (number < mass_pages)
        at_page = (head * rows + packed - first_row).to(tl.int64) * mass_pages + number
        tl.store(page_max + at_page, finite, mask=told)
        tl.store(page_sum + at_page, p_sum, mask=told)

    tl.store(state_max + local, top, mask=valid)
    tl.store(state_sum + local, total, mask=valid)
    tl.store(state + local[:, None] * D + column[None, :], acc, mask=valid[:, None])


@triton.jit(do_not_specialize=["first_row", "rows", "split_count", "heads", "group"])
def merge_kernel(
    state: tl.tensor,
    state_max: tl.tensor,
    state_sum: tl.tensor,
    ranges: tl.tensor,  # [R, 2] each row's first split, and the one behind its last
    out: tl.tensor,  # [R, kv_heads * group, HEAD_DIM]
    lse: tl.tensor,  # [R, kv_heads * group] fp32, base 2
    first_row: tl.tensor,
    rows: tl.tensor,
    split_count: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Merges the splits of one packed row of one KV head. Splits outside its range weigh 0, and change no bit."""
    local = tl.program_id(0)
    head = tl.program_id(1)
    packed = first_row + local
    row = packed // group
    start = tl.load(ranges + 2 * row)
    stop = tl.load(ranges + 2 * row + 1)
    aligned = start // AT_ONCE * AT_ONCE
    step = tl.arange(0, AT_ONCE)
    column = tl.arange(0, D)

    tops = tl.full([AT_ONCE], float("-inf"), tl.float32)
    for split in range(aligned, stop, AT_ONCE):
        there = (split + step >= start) & (split + step < stop)
        at = (head * split_count + split + step).to(tl.int64) * rows + local
        tops = tl.maximum(tops, tl.load(state_max + at, mask=there, other=float("-inf")))
    top = tl.max(tops, 0)

    total = 0.0
    acc = tl.full([D], 0.0, tl.float32)
    for split in range(aligned, stop, AT_ONCE):
        there = (split + step >= start) & (split + step < stop)
        at = (head * split_count + split + step).to(tl.int64) * rows + local
        weight = tl.exp2(tl.load(state_max + at, mask=there, other=float("-inf")) - top)
        total += tl.sum(weight * tl.load(state_sum + at, mask=there, other=0.0), 0)
        part = tl.load(state + at[:, None] * D + column[None, :], mask=there[:, None], other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)

    if start == stop:  # a row that only pads the pass gets zeros
        top = 0.0
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
        acc += tl.exp2(part - tl.load(lse + (row * heads + head) * group + member))
    at_mass = mass + (row * heads + head).to(tl.int64) * mass_pages + page
    tl.store(at_mass, acc.to(mass.dtype.element_ty), mask=page < mass_pages)


class TritonAttention:
    name = "triton"
    reads_int8 = True
    moves_queries = True

    def prepare(self, segments: Sequence[AttentionSegment], device: torch.device) -> Plan:
        check_device(device)
        return Plan(segments, device)

    def prepare_fixed(self, room: Room, device: torch.device) -> FixedPlan | None:
        check_device(device)
        edges = splits(room.pages, min(LAST_LEVEL, room.block_pages or LAST_LEVEL))
        return FixedPlan(room, device) if room.rows * (len(edges) - 1) <= MOST_STATES else None

    def attend(
        self,
        plan: Plan | FixedPlan,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None = None,
        mass: torch.Tensor | None = None,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        far: FarQueries | None = None,
    ) -> torch.Tensor:
        return self.attend_with_lse(plan, layer, q, keys, values, window, mass, scales, far)[0]

    def attend_with_lse(
        self,
        plan: Plan | FixedPlan,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None = None,
        mass: torch.Tensor | None = None,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        far: FarQueries | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes `attend`, and the base-2 log-sum-exp of every row's scaled scores, [R, heads] fp32."""
        if q.dtype not in DTYPES:
            raise TypeError(f"Triton attention computes in {', '.join(map(str, DTYPES))}, not in {q.dtype}")
        kv_heads, pool_pages, _, head_dim = keys.shape
        group, depth = q.shape[1] // kv_heads, padded(head_dim)
        chosen = config(q.dtype, head_dim, int8=scales is not None)
        width = EVERYTHING if window is None else window
        block_pages = LAST_LEVEL if far is None else far.shifts.block // PAGE_SIZE
        heads = Heads(kv_heads, group, width, chosen.tile, 4 * kv_heads * group * depth, min(LAST_LEVEL, block_pages))
        tables = plan.table(heads)
        q = (q if far is None else far.q).contiguous()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        turns = (lse, lse, tables["positions"]) if far is None else (far.cos, far.sin, far.table)
        scale = head_dim**-0.5 * LOG2_E
        for launch in tables.launches:
            rows = (launch.stop - launch.first) * group
            shape = (kv_heads, launch.splits, rows)
            state = torch.empty((*shape, depth), dtype=torch.float32, device=q.device)
            state_max, state_sum = torch.empty((2, *shape), dtype=torch.float32, device=q.device)
            mass_pages = 0 if mass is None else mass.shape[-1]
            page_max = page_sum = lse
            if mass is not None:
                page_max = state.new_full((kv_heads, rows, mass_pages), -torch.inf)
                page_sum = torch.empty_like(page_max)
            for first, last in ((launch.prefix, launch.tail), (launch.tail, launch.end)):
                if first < last:
                    attend_kernel[(last - first, kv_heads)](
                        q, keys, values, *(scales or (lse, lse)), tables["items"], tables["positions"],
                        tables["numbers"], tables["bounds"], tables["pages"], tables["tails"], state, state_max,
                        state_sum, page_max, page_sum, *turns, scale, first,
                        launch.first * group, rows, launch.splits, layer, width, pool_pages, kv_heads, group,
                        mass_pages, block_pages, HEAD_DIM=head_dim, D=depth, TILE=chosen.tile, PAGE=PAGE_SIZE,
                        FIELDS=FIELDS, INT8=scales is not None, FAR=far is not None,
                        PRECISION=PRECISION,
                        **launch_options(chosen.warps, chosen.stages),
                    )  # fmt: skip
            merge_kernel[(rows, kv_heads)](
                state, state_max, state_sum, tables["ranges"], out, lse, launch.first * group, rows, launch.splits,
                kv_heads, group, HEAD_DIM=head_dim, D=depth, AT_ONCE=MERGED_AT_ONCE, **launch_options(4, 2),
            )  # fmt: skip
            if mass is not None:
                grid = (launch.stop - launch.first, kv_heads, triton.cdiv(mass_pages, 128))
                mass_kernel[grid](
                    page_max, page_sum, lse, mass, launch.first * group, rows, kv_heads, group, mass_pages,
                    BLOCK=128, **launch_options(4, 1),
                )  # fmt: skip
        return out, lse


def variants(amd: bool) -> Iterator[Variant]:
    """Yields the kernels for `compile.py`: every type and head size, as `attend_with_lse` launches them."""
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            depth = padded(head_dim)
            data, shape = POINTERS[dtype], {"HEAD_DIM": head_dim, "D": depth}
            for int8, far in product((False, True), repeat=2):
                chosen = config(dtype, head_dim, amd, int8)
                constants = {
                    **shape, "TILE": chosen.tile, "PAGE": PAGE_SIZE, "FIELDS": FIELDS, "INT8": int8, "FAR": far,
                    "PRECISION": precision(amd),
                }  # fmt: skip
                pool = dict.fromkeys(("keys", "values"), "*i8" if int8 else data)
                kinds = {"q": data, **pool, "scale": "fp32"}
                name = "attend" + ("+int8" if int8 else "") + ("+far" if far else "")
                yield Variant(name, attend_kernel, dtype, head_dim, kinds, constants, chosen.warps, chosen.stages)
            yield Variant(
                "merge", merge_kernel, dtype, head_dim, {"out": data}, {**shape, "AT_ONCE": MERGED_AT_ONCE}, 4, 2
            )
    yield Variant("mass", mass_kernel, torch.float32, None, {"mass": "*fp32"}, {"BLOCK": 128}, 4, 1)
