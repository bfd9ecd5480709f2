"""Kernels that do in one launch what torch does in several.

They are norms with their residual, rotation with the norm before it and the write to the KV pages, SwiGLU and GeGLU,
and the copy of accepted rows. Each element depends on its own row only.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

import triton
import triton.language as tl
from tokenswift_py.kernels.triton.runtime import DTYPES, HEAD_DIMS, POINTERS, Variant, launch_options, new_rows

BLOCK = 1024
ROW_BYTES = 64  # bytes of a row that a program copies at a time
FLOAT_MIN = tl.constexpr(1.1754943508222875e-38)  # the least and the greatest normal fp32
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def weighted(x: tl.tensor, weight: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """Returns x times the weight in `kind`. x is in fp32, and rounded to `kind` first where that is the weight's."""
    if weight.dtype == kind:
        x = x.to(kind).to(tl.float32)
    return (x * weight.to(tl.float32)).to(kind)


@triton.jit
def norm_kernel(
    x: tl.tensor,  # [R, width]
    y: tl.tensor,  # [R, width], which is added to x first; unused without ADD
    weight: tl.tensor,  # [width]
    total: tl.tensor,  # [R, width], x + y; unused without ADD
    out: tl.tensor,  # [R, width]
    eps: tl.tensor,
    WIDTH: tl.constexpr,  # compiled in, so that loads are as wide as it allows
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Computes RMSNorm of one row. The mean is summed in fp32, lane by lane over blocks, then over lanes.

    A weight of a wider type than x multiplies before x is rounded.
    """
    at = tl.program_id(0).to(tl.int64) * WIDTH
    lane = tl.arange(0, BLOCK)
    squares = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, WIDTH, BLOCK):
        inside = start + lane < WIDTH
        row = tl.load(x + at + start + lane, mask=inside, other=0.0)
        if ADD:
            other = tl.load(y + at + start + lane, mask=inside, other=0.0)
            row = (row.to(tl.float32) + other.to(tl.float32)).to(row.dtype)
            tl.store(total + at + start + lane, row, mask=inside)
        row = row.to(tl.float32)
        squares += row * row
    scale = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
    for start in range(0, WIDTH, BLOCK):
        inside = start + lane < WIDTH
        row = tl.load(x + at + start + lane, mask=inside, other=0.0)
        if ADD:  # the sums are computed again, because the stored ones may not be visible to every thread yet
            other = tl.load(y + at + start + lane, mask=inside, other=0.0)
            row = (row.to(tl.float32) + other.to(tl.float32)).to(row.dtype)
        w = tl.load(weight + start + lane, mask=inside, other=0.0)
        scaled = row.to(tl.float32) * scale
        tl.store(out + at + start + lane, weighted(scaled, w, row.dtype), mask=inside)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Computes RMSNorm over the last dimension. weight: of x's type, or fp32, which is not rounded to x's."""
    x = x.contiguous()
    out = new_rows(x)
    width = x.shape[-1]
    norm_kernel[(x.numel() // width,)](
        x, x, weight, x, out, eps, WIDTH=width, ADD=False, BLOCK=BLOCK, **launch_options(4, 1)
    )
    return out


def add_norm(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x + y and its RMSNorm. x, y: [R, width], contiguous."""
    total, out = torch.empty_like(x), new_rows(x)
    norm_kernel[(len(x),)](
        x, y, weight, total, out, eps, WIDTH=x.shape[1], ADD=True, BLOCK=BLOCK, **launch_options(4, 1)
    )  # fmt: skip
    return total, out


@triton.jit
def activated(x: tl.tensor, GELU: tl.constexpr) -> tl.tensor:
    """Returns SiLU, or GELU by its tanh, which is written as x times a sigmoid: (1 + tanh(y)) / 2 = 1 / (1 + exp(-2y)).

    x: fp32. Source of GELU's formula: arXiv 1606.08415, section 2, with 2 sqrt(2 / pi) multiplied in.
    """
    opened = x
    if GELU:
        opened = x * (1.5957691216057308 + 0.07135481627260025 * (x * x))
    return x / (1.0 + tl.exp(-opened))


@triton.jit
def glu_kernel(
    gate: tl.tensor,  # [R, columns], whose rows lie `stride` apart
    up: tl.tensor,
    out: tl.tensor,  # [R, columns]
    columns: tl.tensor,
    stride: tl.tensor,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(gate + row * stride + column, mask=inside, other=0.0)
    u = tl.load(up + row * stride + column, mask=inside, other=0.0)
    opened = activated(g.to(tl.float32), GELU).to(g.dtype)
    tl.store(out + row * columns + column, (opened.to(tl.float32) * u.to(tl.float32)).to(g.dtype), mask=inside)


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """Computes act(gate) * up. Both are [R, columns] with contiguous rows, which lie as far apart in the one as in the
    other. activation: silu, or gelu by its tanh."""
    rows, columns = gate.shape
    out = new_rows(gate)
    grid = (rows, triton.cdiv(columns, BLOCK))
    glu_kernel[grid](
        gate, up, out, columns, gate.stride(0), GELU=activation == "gelu", BLOCK=BLOCK, **launch_options(4, 1)
    )
    return out


@triton.jit
def int8_scale(most: tl.tensor, numbers: tl.tensor) -> tl.tensor:
    """Returns the scale of values of which `most` is the greatest size, as `quantise` of kvcache/pages.py has it. It is
    NaN unless all of them are numbers, which `numbers` says by 1."""
    return tl.where(numbers == 1, tl.div_rn(most, 127.0), float("nan"))


@triton.jit
def in_scale(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Returns x over its scale as whole numbers; 0 where the scale is of no use."""
    usable = (scale >= FLOAT_MIN) & (scale <= FLOAT_MAX)
    # Adding 1.5 * 2^23 pushes the fraction out of the mantissa, which rounds to the nearest whole number.
    return tl.where(usable, tl.div_rn(x, tl.where(usable, scale, 1.0)) + 12582912.0 - 12582912.0, 0.0)


@triton.jit
def kept_scale(scale: tl.tensor) -> tl.tensor:
    """Returns a scale as it is stored."""
    return tl.where(scale < FLOAT_MIN, 0.0, scale)


@triton.jit
def store_head(
    target: tl.tensor,
    scale_at: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INT8: tl.constexpr,
) -> None:
    """Stores both fp32 halves of a head in the type of `target`, int8 as `quantise` of kvcache/pages.py does."""
    lane = tl.arange(0, HALF)
    inside = lane < HEAD_DIM // 2
    if INT8:
        most = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 0)
        scale = int8_scale(most, tl.min(tl.where((first == first) & (second == second), 1, 0), 0))
        first, second = in_scale(first, scale), in_scale(second, scale)
        tl.store(scale_at, kept_scale(scale))
    tl.store(target + lane, first.to(target.dtype.element_ty), mask=inside)
    tl.store(target + HEAD_DIM // 2 + lane, second.to(target.dtype.element_ty), mask=inside)


@triton.jit
def head_scale(source: tl.tensor, eps: tl.tensor, HEAD_DIM: tl.constexpr, HALF: tl.constexpr) -> tl.tensor:
    """Returns the factor by which RMSNorm multiplies a head, summed as `norm_kernel` sums a row."""
    lane = tl.arange(0, 2 * HALF)
    whole = tl.load(source + lane, mask=lane < HEAD_DIM, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(whole * whole, 0) / HEAD_DIM + eps)


@triton.jit
def normed(x: tl.tensor, scale: tl.tensor, weight: tl.tensor, inside: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """Returns x times the factor and the weight, rounded to `kind` as by `norm_kernel`, in fp32."""
    return weighted(x * scale, tl.load(weight, mask=inside, other=0.0), kind).to(tl.float32)


@triton.jit(do_not_specialize=["heads", "kv_heads", "pool_pages"])
def rope_kernel(
    q: tl.tensor,  # [R, heads, HEAD_DIM], whose rows lie `q_stride` apart
    k: tl.tensor,  # [R, kv_heads, HEAD_DIM], as v, whose rows lie `kv_stride` apart
    v: tl.tensor,
    cos: tl.tensor,  # [R, HEAD_DIM / 2]
    sin: tl.tensor,
    slots: tl.tensor,  # [R], -1 for a row that is not written
    rotated: tl.tensor,  # [R, heads, HEAD_DIM]
    keys: tl.tensor,  # [kv_heads, pool_pages, PAGE, HEAD_DIM]
    values: tl.tensor,
    key_scales: tl.tensor,  # [kv_heads, pool_pages, PAGE] fp32 where keys are int8; else unused
    value_scales: tl.tensor,
    q_norm: tl.tensor,  # [HEAD_DIM]; unused without NORM
    k_norm: tl.tensor,
    eps: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    pool_pages: tl.tensor,
    q_stride: tl.tensor,
    kv_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    INT8: tl.constexpr,
    NORM: tl.constexpr,
) -> None:
    """Handles one head of one row: rotates a query head, or rotates a key and writes it to its page with its value.

    NORM: whether queries and keys are normed first.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    lane = tl.arange(0, HALF)
    inside = lane < HEAD_DIM // 2
    angle = row * (HEAD_DIM // 2) + lane
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    if head < heads:
        source = q + row.to(tl.int64) * q_stride + head * HEAD_DIM
    else:
        source = k + row.to(tl.int64) * kv_stride + (head - heads) * HEAD_DIM
    first = tl.load(source + lane, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HEAD_DIM // 2 + lane, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        weight = q_norm
        if head >= heads:
            weight = k_norm
        scale = head_scale(source, eps, HEAD_DIM, HALF)
        first = normed(first, scale, weight + lane, inside, q.dtype.element_ty)
        second = normed(second, scale, weight + HEAD_DIM // 2 + lane, inside, q.dtype.element_ty)
    turned = first * c - second * s
    other = second * c + first * s
    if head < heads:
        target = rotated + (row * heads + head).to(tl.int64) * HEAD_DIM
        store_head(target, key_scales, turned, other, HEAD_DIM, HALF, False)
    else:
        slot = tl.load(slots + row)
        if slot >= 0:
            at = (head - heads).to(tl.int64) * pool_pages * PAGE + slot
            from_value = v + row.to(tl.int64) * kv_stride + (head - heads) * HEAD_DIM + lane
            first = tl.load(from_value, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(from_value + HEAD_DIM // 2, mask=inside, other=0.0).to(tl.float32)
            store_head(keys + at * HEAD_DIM, key_scales + at, turned, other, HEAD_DIM, HALF, INT8)
            store_head(values + at * HEAD_DIM, value_scales + at, first, second, HEAD_DIM, HALF, INT8)


def rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Returns q rotated, and writes k rotated and v to their slots of one layer's pages.

    q: [R, heads, head_dim]. k, v: [R, kv_heads, head_dim]. Their rows may lie apart. cos, sin: [R, head_dim / 2] fp32.
    slots: [R] int64, -1 for rows that are not written. keys, values: [kv_heads, pages, PAGE_SIZE, head_dim]. scales:
    [kv_heads, pages, PAGE_SIZE] fp32, for int8 pages. norms: weights [head_dim] of RMSNorms of q and k that come first.
    """
    rows, heads, head_dim = q.shape
    kv_heads, pool_pages, page, _ = keys.shape
    rotated = torch.empty_like(q, memory_format=torch.contiguous_format)
    q, k, v = (part if part.stride()[1:] == (head_dim, 1) else part.contiguous() for part in (q, k, v))
    if k.stride(0) != v.stride(0):
        k, v = k.contiguous(), v.contiguous()
    rope_kernel[(rows, heads + kv_heads)](
        q, k, v, cos, sin, slots, rotated, keys, values, *(scales or (cos, cos)), *(norms or (q, q)), eps, heads,
        kv_heads, pool_pages, q.stride(0), k.stride(0), HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2), PAGE=page, INT8=scales is not None, NORM=norms is not None,
        **launch_options(1, 1),
    )  # fmt: skip
    return rotated


@triton.jit(do_not_specialize=["count", "pool_slots"])
def move_kernel(
    keys: tl.tensor,  # [layers * kv_heads, pool_slots, HEAD_DIM]
    values: tl.tensor,
    source: tl.tensor,  # [count] slots
    target: tl.tensor,
    count: tl.tensor,
    pool_slots: tl.tensor,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Copies some columns of all rows, for one layer and KV head. Everything is read before anything is written."""
    row = tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = row < count
    mask = there[:, None] & (column < HEAD_DIM)[None, :]
    plane = tl.program_id(0).to(tl.int64) * pool_slots
    reading = (plane + tl.load(source + row, mask=there, other=0))[:, None] * HEAD_DIM + column[None, :]
    writing = (plane + tl.load(target + row, mask=there, other=0))[:, None] * HEAD_DIM + column[None, :]
    k = tl.load(keys + reading, mask=mask)
    v = tl.load(values + reading, mask=mask)
    tl.debug_barrier()  # one row's target may be another's source, which other threads read
    tl.store(keys + writing, k, mask=mask)
    tl.store(values + writing, v, mask=mask)


def move_rows(keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies rows between slots of all layers and KV heads, with the result of reading all before writing any.

    keys, values: [layers, kv_heads, pages, PAGE_SIZE, head_dim]. source, target: [n] int64 slots.
    """
    layers, kv_heads, pages, page, head_dim = keys.shape
    columns = min(ROW_BYTES // keys.element_size(), triton.next_power_of_2(head_dim))
    grid = (layers * kv_heads, triton.cdiv(head_dim, columns))
    rows = triton.next_power_of_2(max(16, len(source)))
    move_kernel[grid](
        keys, values, source, target, len(source), pages * page, HEAD_DIM=head_dim, ROWS=rows, COLUMNS=columns,
        **launch_options(move_warps(rows), 1),
    )  # fmt: skip


def move_warps(rows: int) -> int:
    """Returns so many warps that a thread holds no more than two kilobytes of the rows."""
    return min(16, max(1, rows // 32))


def variants(target: str) -> Iterator[Variant]:
    for dtype in DTYPES:
        data = POINTERS[dtype]
        wider = (False, True) if dtype != torch.float32 else (False,)  # whether a norm's weight is fp32 beside others
        for add, wide in product((False, True), wider):
            kinds = dict.fromkeys(("x", "y", "total", "out"), data)
            kinds |= {"weight": "*fp32" if wide else data, "eps": "fp32"}
            constants = {"WIDTH": 4096, "ADD": add, "BLOCK": BLOCK}
            name = f"{'add_' * add}norm{'+wide' * wide}"
            yield Variant(name, norm_kernel, dtype, None, kinds, constants, 4, 1)
        kinds = dict.fromkeys(("gate", "up", "out"), data)
        for gelu in (False, True):
            name, constants = "geglu" if gelu else "swiglu", {"GELU": gelu, "BLOCK": BLOCK}
            yield Variant(name, glu_kernel, dtype, None, kinds, constants, 4, 1, ("columns", "stride"))
        for head_dim in HEAD_DIMS:
            half = triton.next_power_of_2(head_dim // 2)
            for int8, norm in product((False, True), ("", "+norm", "+wide")[: 1 + len(wider)]):
                pool = dict.fromkeys(("keys", "values"), "*i8" if int8 else data)
                whole = dict.fromkeys(("q", "k", "v", "rotated"), data)
                norms = dict.fromkeys(("q_norm", "k_norm"), "*fp32" if norm == "+wide" else data)
                kinds = {**whole, **norms, **pool, "slots": "*i64", "eps": "fp32"}
                constants = {"HEAD_DIM": head_dim, "HALF": half, "PAGE": 64, "INT8": int8, "NORM": bool(norm)}
                name = f"rope_write{norm}{'+int8' * int8}"
                yield Variant(name, rope_kernel, dtype, head_dim, kinds, constants, 1, 1, ("q_stride", "kv_stride"))
        for rows in (16, 64, 512):  # for the commit of a small tree, a fork, and the deepest chain
            constants = {"HEAD_DIM": 128, "ROWS": rows, "COLUMNS": ROW_BYTES // dtype.itemsize}
            kinds = {"keys": data, "values": data, "source": "*i64", "target": "*i64"}
            yield Variant(f"move x{rows}", move_kernel, dtype, 128, kinds, constants, move_warps(rows), 1)
