"""Kernels that multiply one input by several weights, and do what a layer does with the elements, in one launch.

The weights stay where they are: a program's tile is of one of them. Elements are summed and rounded as `linear` does
it. What follows is done as the kernels of `fused.py` do it, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

import triton
import triton.language as tl
from tokenswift_py.kernels.triton.configs import tiles
from tokenswift_py.kernels.triton.fused import activated
from tokenswift_py.kernels.triton.matmul import processors, product
from tokenswift_py.kernels.triton.runtime import (
    DTYPES,
    HEAD_DIMS,
    POINTERS,
    PRECISION,
    Variant,
    launch_options,
    precision,
)


@triton.jit
def opened(gate: tl.tensor, up: tl.tensor, kind: tl.constexpr, GELU: tl.constexpr) -> tl.tensor:
    """Returns act(gate) * up in `kind`, with the bits of `glu_kernel` behind two products of that type."""
    wide = activated(gate.to(kind).to(tl.float32), GELU).to(kind).to(tl.float32)
    return (wide * up.to(kind).to(tl.float32)).to(kind)


@triton.jit(do_not_specialize=["rows", "columns", "programs"])
def gated_kernel(
    x: tl.tensor,  # [rows, depth]
    gate: tl.tensor,  # [columns, depth]
    up: tl.tensor,
    gate_bias: tl.tensor,  # [columns]; unused without BIAS
    up_bias: tl.tensor,
    out: tl.tensor,  # [rows, columns]
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    programs: tl.tensor,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Computes act(x @ gate.T) * (x @ up.T), with both products rounded to x's type first."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    for tile in range(tl.program_id(0), row_tiles * tl.cdiv(columns, BLOCK_N), programs):
        row = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        kept, there = row < rows, column < columns
        g = product(x, gate, row, column, kept, there, depth, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        u = product(x, up, row, column, kept, there, depth, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        if BIAS:
            g += tl.load(gate_bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
            u += tl.load(up_bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
        target = out + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(target, opened(g, u, out.dtype.element_ty, GELU), mask=kept[:, None] & there[None, :])


def gated(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """Computes act(x @ gate.T) * (x @ up.T) in x's type, with the bits of `linear` and `glu`.

    x: [R, depth]. gate, up: [columns, depth], contiguous. activation: silu, or gelu by its tanh.
    """
    rows, depth = x.shape
    columns = len(gate)
    chosen = tiles(x.dtype)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    count = triton.cdiv(rows, chosen.rows) * triton.cdiv(columns, chosen.columns)
    if not count:
        return out
    programs = min(count, processors(x.device))
    gated_kernel[(programs,)](
        x.contiguous(), gate, up, *(biases or (gate, up)), out, rows, columns, depth, programs, BIAS=biases is not None,
        GELU=activation == "gelu", BLOCK_M=chosen.rows, BLOCK_N=chosen.columns, BLOCK_K=chosen.depth,
        PRECISION=PRECISION, **launch_options(chosen.warps, chosen.stages),
    )  # fmt: skip
    return out


@triton.jit
def store_heads(
    acc: tl.tensor,  # [BLOCK_M, BLOCK_N] fp32, both halves of some of a head's pairs, side by side
    q: tl.tensor,  # from here to `slots`: see `heads_kernel`
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    row: tl.tensor,  # [BLOCK_M]
    kept: tl.tensor,  # [BLOCK_M] whether there is such a row
    which: tl.tensor,  # number of the head among those of queries, keys and values
    part: tl.tensor,  # number of the tile in the head
    heads: tl.tensor,
    kv_heads: tl.tensor,
    pool_pages: tl.tensor,
    ROPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Stores a tile of a query, a key or a value where it belongs, with ROPE after the rotation."""
    half: tl.constexpr = HEAD_DIM // 2
    pairs: tl.constexpr = BLOCK_N // 2
    kind = q.dtype.element_ty
    is_q = which < heads
    is_v = which >= heads + kv_heads
    head = tl.where(is_q, which, tl.where(is_v, which - heads - kv_heads, which - heads))
    lane = tl.arange(0, BLOCK_N)
    pair = part * pairs + lane // 2
    column = pair + lane % 2 * half
    result = acc.to(kind)
    mask = kept[:, None] & (pair < half)[None, :]
    if ROPE:
        # Values are not rotated. The rotation is computed for them too, but `tl.where` does not choose it.
        first, second = tl.split(tl.reshape(result.to(tl.float32), [BLOCK_M, pairs, 2]))
        turn = part * pairs + tl.arange(0, pairs)
        angle = row.to(tl.int64)[:, None] * half + turn[None, :]
        shown = kept[:, None] & (turn < half)[None, :]
        c = tl.load(cos + angle, mask=shown, other=0.0)
        s = tl.load(sin + angle, mask=shown, other=0.0)
        turned = tl.join(first * c - second * s, second * c + first * s)
        result = tl.where(is_v, result, tl.reshape(turned, [BLOCK_M, BLOCK_N]).to(kind))
    at_q = (row.to(tl.int64) * heads + head) * HEAD_DIM
    if ROPE:
        slot = tl.load(slots + row, mask=kept, other=-1)
        at_kv = (head.to(tl.int64) * pool_pages * PAGE + slot) * HEAD_DIM
        written = mask & (slot >= 0)[:, None]
    else:
        at_kv = (row.to(tl.int64) * kv_heads + head) * HEAD_DIM
        written = mask
    if is_q:
        tl.store(q + at_q[:, None] + column[None, :], result, mask=mask)
    elif is_v:
        tl.store(v + at_kv[:, None] + column[None, :], result, mask=written)
    else:
        tl.store(k + at_kv[:, None] + column[None, :], result, mask=written)


@triton.jit(do_not_specialize=["rows", "heads", "kv_heads", "pool_pages", "programs"])
def heads_kernel(
    x: tl.tensor,  # [rows, depth]
    q_weight: tl.tensor,  # [heads * HEAD_DIM, depth]
    k_weight: tl.tensor,  # [kv_heads * HEAD_DIM, depth]
    v_weight: tl.tensor,
    q_bias: tl.tensor,  # as long as each weight; unused without BIAS
    k_bias: tl.tensor,
    v_bias: tl.tensor,
    q: tl.tensor,  # [rows, heads, HEAD_DIM]
    k: tl.tensor,  # [rows, kv_heads, HEAD_DIM]; keys [kv_heads, pool_pages, PAGE, HEAD_DIM] with ROPE
    v: tl.tensor,
    cos: tl.tensor,  # [rows, HEAD_DIM / 2] fp32; unused without ROPE
    sin: tl.tensor,
    slots: tl.tensor,  # [rows], -1 for a row that is not written; unused without ROPE
    rows: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    depth: tl.tensor,
    pool_pages: tl.tensor,
    programs: tl.tensor,
    BIAS: tl.constexpr,
    ROPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Computes queries, keys and values. A tile has both halves of some of a head's pairs, side by side.

    ROPE: whether queries are rotated, and keys rotated and written to their pages with their values.
    """
    half: tl.constexpr = HEAD_DIM // 2
    pairs: tl.constexpr = BLOCK_N // 2
    parts: tl.constexpr = (half + pairs - 1) // pairs
    row_tiles = tl.cdiv(rows, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    for tile in range(tl.program_id(0), row_tiles * (heads + 2 * kv_heads) * parts, programs):
        row = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        part = tile // row_tiles % parts
        which = tile // row_tiles // parts
        is_q = which < heads
        is_v = which >= heads + kv_heads
        head = tl.where(is_q, which, tl.where(is_v, which - heads - kv_heads, which - heads))
        pair = part * pairs + lane // 2
        column = pair + lane % 2 * half
        kept, there = row < rows, pair < half
        weight = q_weight
        bias = q_bias
        if is_v:
            weight = v_weight
            bias = v_bias
        elif which >= heads:
            weight = k_weight
            bias = k_bias
        from_weight = head * HEAD_DIM + column
        acc = product(x, weight, row, from_weight, kept, there, depth, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        if BIAS:
            acc += tl.load(bias + from_weight, mask=there, other=0.0).to(tl.float32)[None, :]
        store_heads(
            acc, q, k, v, cos, sin, slots, row, kept, which, part, heads, kv_heads, pool_pages, ROPE, HEAD_DIM, PAGE,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip


Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def qkv(x: torch.Tensor, weights: Three, biases: Three | None, head_dim: int) -> Three:
    """Returns queries [R, heads, head_dim], keys and values [R, kv_heads, head_dim], with the bits of `linear`.

    x: [R, depth]. weights: those of queries, keys and values, [columns, depth] each, contiguous.
    """
    q, k, v = (x.new_empty(len(x), len(weight) // head_dim, head_dim) for weight in weights)
    launch_heads(x, weights, biases, (q, k, v), None, head_dim, 0, 1)
    return q, k, v


def qkv_rope_write(
    x: torch.Tensor,
    weights: Three,
    biases: Three | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Returns rotated queries, and writes rotated keys and values to pages, with the bits of `qkv` and `rope_write`.

    keys, values: [kv_heads, pages, PAGE_SIZE, head_dim] of x's type.
    """
    _, pool_pages, page, head_dim = keys.shape
    q = x.new_empty(len(x), len(weights[0]) // head_dim, head_dim)
    launch_heads(x, weights, biases, (q, keys, values), (cos, sin, slots), head_dim, pool_pages, page)
    return q


def launch_heads(
    x: torch.Tensor,
    weights: Three,
    biases: Sequence[torch.Tensor] | None,
    targets: Three,
    turns: Three | None,
    head_dim: int,
    pool_pages: int,
    page: int,
) -> None:
    rows, depth = x.shape
    heads, kv_heads = (len(weight) // head_dim for weight in weights[:2])
    chosen = tiles(x.dtype)
    parts = triton.cdiv(head_dim // 2, chosen.columns // 2)
    count = triton.cdiv(rows, chosen.rows) * (heads + 2 * kv_heads) * parts
    if not count:
        return
    programs = min(count, processors(x.device))
    heads_kernel[(programs,)](
        x.contiguous(), *weights, *(biases or weights), *targets, *(turns or (x, x, x)), rows, heads, kv_heads, depth,
        pool_pages, programs, BIAS=biases is not None, ROPE=turns is not None, HEAD_DIM=head_dim, PAGE=page,
        BLOCK_M=chosen.rows, BLOCK_N=chosen.columns, BLOCK_K=chosen.depth, PRECISION=PRECISION,
        **launch_options(chosen.warps, chosen.stages),
    )  # fmt: skip


def variants(target: str) -> Iterator[Variant]:
    for dtype in DTYPES:
        data, chosen = POINTERS[dtype], tiles(dtype, target)
        shape = {
            "BLOCK_M": chosen.rows, "BLOCK_N": chosen.columns, "BLOCK_K": chosen.depth, "PRECISION": precision(target),
        }  # fmt: skip
        launch = (chosen.warps, chosen.stages, ("depth",))
        for bias in (False, True):
            more, constants = "+bias" if bias else "", {"BIAS": bias, **shape}
            kinds = dict.fromkeys(("x", "gate", "up", "gate_bias", "up_bias", "out"), data)
            for gelu in (False, True):
                name = f"gated{'+gelu' * gelu}{more}"
                yield Variant(name, gated_kernel, dtype, None, kinds, {"GELU": gelu, **constants}, *launch)
            matrices = [f"{part}_{what}" for part in "qkv" for what in ("weight", "bias")]
            kinds = dict.fromkeys(("x", *matrices, "q", "k", "v"), data)
            for head_dim in HEAD_DIMS:
                sizes = {**constants, "HEAD_DIM": head_dim}
                turned = {**sizes, "ROPE": True, "PAGE": 64}
                plain = {**sizes, "ROPE": False, "PAGE": 1}
                unused = dict.fromkeys(("cos", "sin", "slots"), data)
                yield Variant(
                    f"qkv_rope{more}", heads_kernel, dtype, head_dim, {**kinds, "slots": "*i64"}, turned, *launch
                )
                yield Variant(f"qkv{more}", heads_kernel, dtype, head_dim, {**kinds, **unused}, plain, *launch)
