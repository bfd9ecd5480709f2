"""Paged tree attention that keeps law 1: a row's bits depend on its own past, not on the rows that travel with it.

Which pages are summed together is a matter of absolute pages and of the row's position alone (`items.py`). Within a
split the online softmax goes page by page, with each key in the page and lane of its absolute position. Full committed
pages are read in place, and the rows after them are gathered by position. Both go through the same steps (`meet`), so
a page gives the same bits either way. A second kernel merges the splits in fixed order.

The query heads of a KV head, and rows of a tree, share a tile of fixed height. So each key is read once for a tile, and
the matrix units see the same shape however many rows there are. Programs are persistent: each takes items from the
list of the pass, whose length is data. A pass that reports page masses and one that does not run the same binary and
the same instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch

import triton
import triton.language as tl
from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment, FarQueries, Room
from tokenswift_py.kernels.triton.configs import config
from tokenswift_py.kernels.triton.items import EVERYTHING, FIELDS, LAST_LEVEL, NEAR, Heads, splits
from tokenswift_py.kernels.triton.matmul import processors
from tokenswift_py.kernels.triton.merge import MERGED_AT_ONCE, mass_kernel, merge_kernel
from tokenswift_py.kernels.triton.runtime import (
    DTYPES,
    HEAD_DIMS,
    POINTERS,
    PRECISION,
    Variant,
    check_device,
    launch_options,
    new_rows,
    padded,
    precision,
)
from tokenswift_py.kernels.triton.tables import MOST_STATES, FixedPlan, Plan

LOG2_E = 1.4426950408889634


@triton.jit
def meet(
    q_tile: tl.tensor,  # [TILE, D]
    keys: tl.tensor,  # the keys of the KV head, [pool_slots, HEAD_DIM]
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    slot: tl.tensor,  # [PAGE]
    seen: tl.tensor,  # [PAGE] lanes that some row of the tile sees. Others may hold NaN, and 0 * NaN is not 0.
    visible: tl.tensor,  # [TILE, PAGE]
    scale: tl.tensor,
    cap: tl.tensor,
    top: tl.tensor,  # [TILE]
    total: tl.tensor,
    acc: tl.tensor,  # [TILE, D]
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    INT8: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Adds a page to a state (max, sum, sum of p v). Returns it with the page's own maximum and sum of p."""
    column = tl.arange(0, D)
    inside = column < HEAD_DIM
    where = slot.to(tl.int64) * HEAD_DIM
    k = tl.load(keys + where[None, :] + column[:, None], mask=seen[None, :] & inside[:, None], other=0)
    if INT8:
        k = k.to(q_tile.dtype)
    if PRECISION == "interpret":
        scores = tl.dot(q_tile, k.to(tl.float32))
    else:
        scores = tl.dot(q_tile, k, input_precision=PRECISION)
    scores *= scale
    if INT8:
        scores *= tl.load(key_scales + slot, mask=seen, other=0.0)[None, :]
    if CAPPED:  # tanh y = 1 - 2 / (1 + exp 2 y), right where the exponential is 0 or infinite too
        scores = cap - 2 * cap / (1 + tl.exp2(scores))
    scores = tl.where(visible & seen[None, :], scores, float("-inf"))
    above = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(above == float("-inf"), 0.0, above)
    p = tl.exp2(scores - finite[:, None])
    alpha = tl.exp2(top - finite)
    p_sum = tl.sum(p, 1)
    v = tl.load(values + where[:, None] + column[None, :], mask=seen[:, None] & inside[None, :], other=0)
    if INT8:  # a weight is multiplied with the value's scale before it is rounded
        v = v.to(q_tile.dtype)
        p *= tl.load(value_scales + slot, mask=seen, other=0.0)[None, :]
    acc *= alpha[:, None]
    if PRECISION == "interpret":  # the interpreter's own product of bf16 is wrong
        acc += tl.dot(p, v.to(tl.float32))
    else:
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return above, total * alpha + p_sum, acc, finite, p_sum


# A value of 1, or one that 16 divides, must not make another binary: row counts and layers change from pass to pass.
ATTEND_SCALARS = (
    "launch", "first_row", "rows", "states", "layer", "window", "pool_pages", "heads", "group", "mass_pages",
    "block_pages", "programs",
)  # fmt: skip


@triton.jit(do_not_specialize=ATTEND_SCALARS)
def attend_kernel(
    q: tl.tensor,  # [R, kv_heads * group, HEAD_DIM]
    keys: tl.tensor,  # [kv_heads, pool_pages, PAGE, HEAD_DIM]
    values: tl.tensor,
    key_scales: tl.tensor,  # [kv_heads, pool_pages, PAGE] fp32 where keys are int8; else unused
    value_scales: tl.tensor,
    counts: tl.tensor,  # [launches, 2] place and number of each launch's items
    positions: tl.tensor,  # [R]
    lists: tl.tensor,  # items [items, FIELDS], and what they point into
    state: tl.tensor,  # [kv_heads, states, rows, D] fp32
    state_max: tl.tensor,  # [kv_heads, states, rows] fp32
    state_sum: tl.tensor,
    page_max: tl.tensor,  # [kv_heads, rows, mass_pages] fp32; unused where mass_pages is 0
    page_sum: tl.tensor,
    cos: tl.tensor,  # [context, HEAD_DIM / 2] fp32 where queries are moved for far keys; else unused
    sin: tl.tensor,
    shifts: tl.tensor,  # [blocks] int32
    scale: tl.tensor,
    cap: tl.tensor,
    launch: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    states: tl.tensor,
    layer: tl.tensor,
    window: tl.tensor,
    pool_pages: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    mass_pages: tl.tensor,
    block_pages: tl.tensor,
    programs: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    NEAR: tl.constexpr,
    INT8: tl.constexpr,
    FAR: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Computes the state of a split for a tile of rows and a KV head, item by item. Exponents are base 2.

    scale:  factor on products; log2(e) is included, and where CAPPED also 2 / cap.
    cap:    soft cap of scores with log2(e) included, where CAPPED.
    FAR:    whether q is not rotated yet. A split is no longer than a block, so a row meets its keys from one position.
    """
    at_items = tl.load(counts + 2 * launch)
    count_items = tl.load(counts + 2 * launch + 1)
    tile = tl.arange(0, TILE)
    lane = tl.arange(0, PAGE)
    column = tl.arange(0, D)
    inside = column < HEAD_DIM
    for work in range(tl.program_id(0), count_items * heads, programs):
        item = lists + at_items + work // heads * FIELDS  # the heads of an item are neighbours
        head = work % heads
        packed = tl.load(item) + tile
        valid = tile < tl.load(item + 1)
        split = tl.load(item + 2)
        first_page = tl.load(item + 12)
        is_near = split < 0
        row = packed // group
        position = tl.load(positions + row, mask=valid, other=-1)
        lowest = tl.min(tl.where(valid, position, 0x3FFFFFFF), 0)
        first_near = position // PAGE - (NEAR - 1)  # it is below 0 at the beginning of a text
        at_q = (row * heads + head).to(tl.int64) * group + packed % group
        shown = valid[:, None] & inside[None, :]
        q_tile = tl.load(q + at_q[:, None] * HEAD_DIM + column[None, :], mask=shown, other=0.0)
        if FAR:
            half: tl.constexpr = HEAD_DIM // 2
            behind = tl.maximum(position // PAGE // block_pages - first_page // block_pages, 0)
            met = position - tl.load(shifts + behind, mask=valid, other=0)
            partner = tl.where(column < half, column + half, column - half)
            beside = tl.load(q + at_q[:, None] * HEAD_DIM + partner[None, :], mask=shown, other=0.0)
            angle = met[:, None].to(tl.int64) * half + (column % half)[None, :]
            cosine = tl.load(cos + angle, mask=shown, other=0.0)
            sine = tl.load(sin + angle, mask=shown, other=0.0)
            across = beside.to(tl.float32) * sine
            across = tl.where((column < half)[None, :], -across, across)
            q_tile = (q_tile.to(tl.float32) * cosine + across).to(q_tile.dtype)
        if PRECISION == "interpret":
            q_tile = q_tile.to(tl.float32)
        plane = (head * pool_pages).to(tl.int64) * PAGE
        own_keys = keys + plane * HEAD_DIM
        own_values = values + plane * HEAD_DIM
        top = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.full([TILE], 0.0, tl.float32)
        acc = tl.full([TILE, D], 0.0, tl.float32)
        at_mass = (head * rows + packed - first_row).to(tl.int64) * mass_pages

        which = layer * heads + head
        at_bounds = tl.load(item + 5)
        listed = lists + tl.load(item + 3) + which * tl.load(item + 4)
        bounds = lists + at_bounds + which * tl.load(item + 6)
        pages = lists + tl.load(item + 7)
        begin = tl.load(bounds, mask=at_bounds >= 0, other=0)
        end = tl.load(bounds + 1, mask=at_bounds >= 0, other=0)
        for index in range(begin, end):
            number = tl.load(listed + index)
            slot = tl.load(pages + number) * PAGE + lane
            at = number * PAGE + lane
            mine = valid & ((number >= first_near) == is_near)
            visible = mine[:, None] & (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window)
            top, total, acc, finite, p_sum = meet(
                q_tile, own_keys, own_values, key_scales + plane, value_scales + plane, slot, at > lowest - window,
                visible, scale, cap, top, total, acc, HEAD_DIM, D, INT8, CAPPED, PRECISION,
            )  # fmt: skip
            told = (p_sum > 0) & (number < mass_pages)
            tl.store(page_max + at_mass + number, finite, mask=told)
            tl.store(page_sum + at_mass + number, p_sum, mask=told)

        gathered = lists + tl.load(item + 8)
        above = tl.minimum(tl.load(item + 9), tl.max(position, 0) + 1)  # the row of a chain ends before its list does
        for number in range(tl.load(item + 10), tl.load(item + 11)):
            at = number * PAGE + lane
            slot = tl.load(gathered + at, mask=at < above, other=-1)
            mine = valid & ((number >= first_near) == is_near)
            visible = mine[:, None] & (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window)
            top, total, acc, finite, p_sum = meet(
                q_tile, own_keys, own_values, key_scales + plane, value_scales + plane, slot,
                (slot >= 0) & (at > lowest - window), visible, scale, cap, top, total, acc, HEAD_DIM, D, INT8, CAPPED,
                PRECISION,
            )  # fmt: skip
            told = (p_sum > 0) & (number < mass_pages)
            tl.store(page_max + at_mass + number, finite, mask=told)
            tl.store(page_sum + at_mass + number, p_sum, mask=told)

        which_near = first_page - first_near  # the number of a near page among the row's near ones
        kept = valid & ((split >= 0) | ((which_near >= 0) & (which_near < NEAR)))
        place = tl.where(is_near, which_near, split)
        local = (head * states + place).to(tl.int64) * rows + (packed - first_row)
        tl.store(state_max + local, top, mask=kept)
        tl.store(state_sum + local, total, mask=kept)
        tl.store(state + local[:, None] * D + column[None, :], acc, mask=kept[:, None])


class TritonAttention:
    name = "triton"
    reads_int8 = True
    moves_queries = views_there = True

    def prepare(self, segments: Sequence[AttentionSegment], device: torch.device) -> Plan:
        check_device(device)
        return Plan(segments, device)

    def prepare_fixed(self, room: Room, device: torch.device) -> FixedPlan | None:
        check_device(device)
        edges = splits(room.pages, min(LAST_LEVEL, room.block_pages or LAST_LEVEL))
        return FixedPlan(room, device) if room.rows * (len(edges) - 1 + NEAR) <= MOST_STATES else None

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
        cap: float = 0.0,
    ) -> torch.Tensor:
        return self.attend_with_lse(plan, layer, q, keys, values, window, mass, scales, far, cap)[0]

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
        cap: float = 0.0,
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
        out = new_rows(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        positions, ranges, lists = (tables.buffer[place:] for place in tables.places)
        turns = (lse, lse, positions) if far is None else (far.cos, far.sin, far.table)
        scale = head_dim**-0.5 * LOG2_E * (2 / cap if cap else 1)
        mass_pages = 0 if mass is None else mass.shape[-1]
        for number, launch in enumerate(tables.launches):
            rows, first = (launch.stop - launch.first) * group, launch.first * group
            shape = (kv_heads, launch.states, rows)
            state = torch.empty((*shape, depth), dtype=torch.float32, device=q.device)
            state_max, state_sum = torch.empty((2, *shape), dtype=torch.float32, device=q.device)
            page_max = page_sum = lse
            if mass is not None:
                page_max, page_sum = plan.masses.of((kv_heads, rows, mass_pages), q.device)
            programs = min(launch.items * kv_heads, processors(q.device))
            attend_kernel[(programs,)](
                q, keys, values, *(scales or (lse, lse)), tables.buffer, positions, lists, state, state_max, state_sum,
                page_max, page_sum, *turns, scale, cap * LOG2_E, number, first, rows, launch.states, layer, width,
                pool_pages, kv_heads, group, mass_pages, block_pages, programs, HEAD_DIM=head_dim, D=depth,
                TILE=chosen.tile, PAGE=PAGE_SIZE, FIELDS=FIELDS, NEAR=NEAR, INT8=scales is not None,
                FAR=far is not None, CAPPED=cap > 0, PRECISION=PRECISION, **launch_options(chosen.warps, chosen.stages),
            )  # fmt: skip
            merge_kernel[(rows, kv_heads)](
                state, state_max, state_sum, ranges, out, lse, first, rows, launch.states, kv_heads, group,
                HEAD_DIM=head_dim, D=depth, AT_ONCE=MERGED_AT_ONCE, NEAR=NEAR, **launch_options(4, 2),
            )  # fmt: skip
            if mass is not None:
                grid = (launch.stop - launch.first, kv_heads, triton.cdiv(mass_pages, 128))
                mass_kernel[grid](
                    page_max, page_sum, lse, mass, first, rows, kv_heads, group, mass_pages, BLOCK=128,
                    **launch_options(4, 1),
                )  # fmt: skip
        return out, lse


def variants(target: str) -> Iterator[Variant]:
    """Yields the kernels for `compile.py`: every type and head size, as `attend_with_lse` launches them."""
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            depth = padded(head_dim)
            data, shape = POINTERS[dtype], {"HEAD_DIM": head_dim, "D": depth}
            for int8, far, capped in product((False, True), repeat=3):
                if capped and int8 != far:
                    continue  # what a cap needs is seen beside both and beside neither
                chosen = config(dtype, head_dim, int8, target)
                constants = {
                    **shape, "TILE": chosen.tile, "PAGE": PAGE_SIZE, "FIELDS": FIELDS, "NEAR": NEAR, "INT8": int8,
                    "FAR": far, "CAPPED": capped, "PRECISION": precision(target),
                }  # fmt: skip
                pool = dict.fromkeys(("keys", "values"), "*i8" if int8 else data)
                kinds = {"q": data, **pool, "scale": "fp32", "cap": "fp32"}
                name = "attend" + ("+int8" if int8 else "") + ("+far" if far else "") + ("+cap" if capped else "")
                yield Variant(name, attend_kernel, dtype, head_dim, kinds, constants, chosen.warps, chosen.stages)
