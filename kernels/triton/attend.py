"""The kernel of paged tree attention: the state of one split of pages, for the rows and the KV head of a work item.

The query heads of a KV head, and rows of a tree, share a tile of fixed height. So the matrix units see the same shape
however many rows there are. A piece of several tiles loads a page once, and each of its tiles meets it in turn, with a
state of its own and by the very steps of a piece of one tile (`meet_all`). So a row has the same bits in any tile of
any piece. Programs are persistent: each takes items from the list of the pass, whose length is data.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weigh(
    q_tile: tl.tensor,  # [TILE, D]
    k: tl.tensor,  # [D, PAGE]
    key_scale: tl.tensor,  # [PAGE] where INT8; else unused
    visible: tl.tensor,  # [TILE, PAGE]
    scale: tl.tensor,
    cap: tl.tensor,
    top: tl.tensor,  # [TILE]
    INT8: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Returns a state's new maximum, the factor on its sums, p of a page, its own maximum and the sum of p."""
    if PRECISION == "interpret":  # the interpreter's own product of bf16 is wrong
        scores = tl.dot(q_tile, k.to(tl.float32))
    else:
        scores = tl.dot(q_tile, k, input_precision=PRECISION)
    scores *= scale
    if INT8:
        scores *= key_scale[None, :]
    if CAPPED:  # tanh y = 1 - 2 / (1 + exp 2 y), right where the exponential is 0 or infinite too
        scores = cap - 2 * cap / (1 + tl.exp2(scores))
    scores = tl.where(visible, scores, float("-inf"))
    above = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(above == float("-inf"), 0.0, above)
    p = tl.exp2(scores - finite[:, None])
    alpha = tl.exp2(top - finite)
    return above, alpha, p, finite, tl.sum(p, 1)


@triton.jit
def meet_all(
    tiles: tl.tuple,  # of each tile: its queries, and the packed rows, positions and first near pages that go with them
    states: tl.tuple,
    slot: tl.tensor,  # [PAGE], that of each lane behind `pool`
    seen: tl.tensor,  # [PAGE] lanes that some row of the piece sees. Others may hold NaN, and 0 * NaN is not 0.
    number: tl.tensor,  # of the page
    pool: tl.tuple,  # keys and values of the KV head, [slots, HEAD_DIM], and their scales
    masses: tl.tuple,
    is_near: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    PAGE: tl.constexpr,
    INT8: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tuple:
    """Adds a page to the states of a piece's tiles. It is loaded once. A lane that a row sees is among those seen."""
    keys, values, key_scales, value_scales = pool
    page_max, page_sum, mass_pages = masses
    lane = tl.arange(0, PAGE)
    column = tl.arange(0, D)
    where = slot * HEAD_DIM
    inside = column < HEAD_DIM
    if D == HEAD_DIM:
        k = tl.load(keys + where[None, :] + column[:, None], mask=seen[None, :], other=0)
    else:
        k = tl.load(keys + where[None, :] + column[:, None], mask=seen[None, :] & inside[:, None], other=0)
    key_scale, value_scale = seen, seen
    if INT8:
        k = k.to(tiles[0][0].dtype)
        key_scale = tl.load(key_scales + slot, mask=seen, other=0.0)
    met = ()  # Triton's tuples know no star
    for index in tl.static_range(TILES):
        q_tile, valid, position, first_near, at_mass = tiles[index]
        top, total, acc = states[index]
        mine = valid & ((number >= first_near) == is_near)
        last = position - number * PAGE  # the last lane that the row sees
        visible = mine[:, None] & (lane[None, :] <= last[:, None]) & (lane[None, :] > last[:, None] - window)
        top, alpha, p, finite, p_sum = weigh(q_tile, k, key_scale, visible, scale, cap, top, INT8, CAPPED, PRECISION)
        if index == 0:  # values are not in registers before they are needed
            if D == HEAD_DIM:
                v = tl.load(values + where[:, None] + column[None, :], mask=seen[:, None], other=0)
            else:
                v = tl.load(values + where[:, None] + column[None, :], mask=seen[:, None] & inside[None, :], other=0)
            if INT8:
                v = v.to(tiles[0][0].dtype)
                value_scale = tl.load(value_scales + slot, mask=seen, other=0.0)
        if INT8:  # a weight is multiplied with the value's scale before it is rounded
            p *= value_scale[None, :]
        acc *= alpha[:, None]
        if PRECISION == "interpret":
            acc += tl.dot(p, v.to(tl.float32))
        else:
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        total = total * alpha + p_sum
        told = (p_sum > 0) & (number < mass_pages)
        tl.store(page_max + at_mass + number, finite, mask=told)
        tl.store(page_sum + at_mass + number, p_sum, mask=told)
        met = met + ((top, total, acc),)  # type: ignore[assignment] # noqa: RUF005
    return met


@triton.jit
def attend_piece(
    item: tl.tensor,
    head: tl.tensor,
    q: tl.tensor,
    pool: tl.tuple,  # of the KV head: keys and values of gathered pages, and the scales of both
    listed_pool: tl.tuple,  # the same of listed pages
    masses: tl.tuple,
    turns: tl.tuple,
    tables: tl.tuple,
    out: tl.tuple,
    numbers: tl.tuple,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PAGE: tl.constexpr,
    NEAR: tl.constexpr,
    INT8: tl.constexpr,
    COPIES: tl.constexpr,
    FAR: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Computes the states of an item's rows, which are up to TILES tiles. An item of several tiles gathers no pages."""
    keys, values, key_scales, value_scales = listed_pool
    mass_pages = masses[2]
    cos, sin, shifts = turns
    positions, lists = tables
    state, state_max, state_sum = out
    scale, cap, first_row, rows, states, layer, window, heads, group, block_pages = numbers
    lane = tl.arange(0, PAGE)
    column = tl.arange(0, D)
    inside = column < HEAD_DIM
    half: tl.constexpr = HEAD_DIM // 2
    split = tl.load(item + 2)
    first_page = tl.load(item + 12)
    is_near = split < 0
    tiles, kept_states = (), ()
    lowest = tl.full([], 0x3FFFFFFF, tl.int32)
    for index in tl.static_range(TILES):
        place = index * TILE + tl.arange(0, TILE)
        packed = tl.load(item) + place
        valid = place < tl.load(item + 1)
        row = packed // group
        position = tl.load(positions + row, mask=valid, other=-1)
        lowest = tl.minimum(lowest, tl.min(tl.where(valid, position, 0x3FFFFFFF), 0))
        first_near = position // PAGE - (NEAR - 1)  # it is below 0 at the beginning of a text
        at_q = (row * heads + head).to(tl.int64) * group + packed % group
        shown = valid[:, None] & inside[None, :]
        q_tile = tl.load(q + at_q[:, None] * HEAD_DIM + column[None, :], mask=shown, other=0.0)
        if FAR:
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
        at_mass = (head * rows + packed - first_row).to(tl.int64) * mass_pages
        tiles = tiles + ((q_tile, valid, position, first_near, at_mass),)  # type: ignore[assignment] # noqa: RUF005
        top = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.full([TILE], 0.0, tl.float32)
        acc = tl.full([TILE, D], 0.0, tl.float32)
        kept_states = kept_states + ((top, total, acc),)  # type: ignore[assignment] # noqa: RUF005

    which = layer * heads + head
    at_bounds = tl.load(item + 5)
    listed = lists + tl.load(item + 3) + which * tl.load(item + 4)
    bounds = lists + at_bounds + which * tl.load(item + 6)
    pages = lists + tl.load(item + 7)
    begin = tl.load(bounds, mask=at_bounds >= 0, other=0)
    end = tl.load(bounds + 1, mask=at_bounds >= 0, other=0)
    # A page's number and its place are loaded one page ahead. So Triton sees no index that the copies of a page would
    # have to wait for, and keeps those of the next pages in flight.
    number = tl.load(listed + begin, mask=begin < end, other=0)
    page = tl.load(pages + number, mask=begin < end, other=0)
    for index in range(begin, end):
        of_page = page.to(tl.int64) * PAGE
        there = (keys + of_page * HEAD_DIM, values + of_page * HEAD_DIM, key_scales + of_page, value_scales + of_page)
        kept_states = meet_all(
            tiles, kept_states, lane, lane > lowest - window - number * PAGE, number, there, masses, is_near, window,
            scale, cap, HEAD_DIM, D, TILES, PAGE, INT8, CAPPED, PRECISION,
        )  # fmt: skip
        number = tl.load(listed + index + 1, mask=index + 1 < end, other=0)
        page = tl.load(pages + number, mask=index + 1 < end, other=0)
    if TILES == 1:
        gathered = lists + tl.load(item + 8)
        above = tl.minimum(tl.load(item + 9), tl.max(position, 0) + 1)  # a chain's row ends before its list does
        for number in range(tl.load(item + 10), tl.load(item + 11)):
            at = number * PAGE + lane
            slot = tl.load(gathered + at, mask=at < above, other=-1)
            kept_states = meet_all(
                tiles, kept_states, slot.to(tl.int64), (slot >= 0) & (at > lowest - window), number, pool, masses,
                is_near, window, scale, cap, HEAD_DIM, D, TILES, PAGE, INT8 and not COPIES, CAPPED, PRECISION,
            )  # fmt: skip

    for index in tl.static_range(TILES):
        top, total, acc = kept_states[index]
        place = index * TILE + tl.arange(0, TILE)  # computed again, not kept in registers while pages are met
        packed = tl.load(item) + place
        valid = place < tl.load(item + 1)
        position = tl.load(positions + packed // group, mask=valid, other=-1)
        which_near = first_page - (position // PAGE - (NEAR - 1))  # the number of a near page among the row's near ones
        kept = valid & ((split >= 0) | ((which_near >= 0) & (which_near < NEAR)))
        place = tl.where(is_near, which_near, split)
        local = (head * states + place).to(tl.int64) * rows + (packed - first_row)
        tl.store(state_max + local, top, mask=kept)
        tl.store(state_sum + local, total, mask=kept)
        tl.store(state + local[:, None] * D + column[None, :], acc, mask=kept[:, None])


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
    key_copies: tl.tensor,  # int8 copies of keys and values, from which full pages are read; unused without COPIES
    value_copies: tl.tensor,
    key_scales: tl.tensor,  # [kv_heads, pool_pages, PAGE] fp32 where what is read is int8; else unused
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
    TILES: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    NEAR: tl.constexpr,
    INT8: tl.constexpr,
    COPIES: tl.constexpr,
    FAR: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Computes the state of a split for a piece of rows and a KV head, item by item. Exponents are base 2.

    scale:  factor on products; log2(e) is included, and where CAPPED also 2 / cap.
    cap:    soft cap of scores with log2(e) included, where CAPPED.
    TILES:  most tiles of a piece. Items of one tile take a way of their own, with fewer registers.
    INT8:   whether full pages are read as int8, and with COPIES from copies: then gathered rows are not int8.
    FAR:    whether q is not rotated yet. A split is no longer than a block, so a row meets its keys from one position.
    """
    at_items = tl.load(counts + 2 * launch)
    count_items = tl.load(counts + 2 * launch + 1)
    for work in range(tl.program_id(0), count_items * heads, programs):
        item = lists + at_items + work // heads * FIELDS  # the heads of an item are neighbours
        head = work % heads
        plane = (head * pool_pages).to(tl.int64) * PAGE
        pool = (keys + plane * HEAD_DIM, values + plane * HEAD_DIM, key_scales + plane, value_scales + plane)
        copied = pool
        if COPIES:
            of_head = plane * HEAD_DIM
            copied = (key_copies + of_head, value_copies + of_head, key_scales + plane, value_scales + plane)
        masses = (page_max, page_sum, mass_pages)
        turns = (cos, sin, shifts)
        tables, out = (positions, lists), (state, state_max, state_sum)
        numbers = (scale, cap, first_row, rows, states, layer, window, heads, group, block_pages)
        if TILES == 1:
            attend_piece(
                item, head, q, pool, copied, masses, turns, tables, out, numbers, HEAD_DIM, D, TILE, 1, PAGE, NEAR,
                INT8, COPIES, FAR, CAPPED, PRECISION,
            )  # fmt: skip
        else:
            if tl.load(item + 1) <= TILE:
                attend_piece(
                    item, head, q, pool, copied, masses, turns, tables, out, numbers, HEAD_DIM, D, TILE, 1, PAGE, NEAR,
                    INT8, COPIES, FAR, CAPPED, PRECISION,
                )  # fmt: skip
            else:
                attend_piece(
                    item, head, q, pool, copied, masses, turns, tables, out, numbers, HEAD_DIM, D, TILE, TILES, PAGE,
                    NEAR, INT8, COPIES, FAR, CAPPED, PRECISION,
                )  # fmt: skip
