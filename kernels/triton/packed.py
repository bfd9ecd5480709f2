"""Products of few rows with weights of 4 or 8 bits, for drafts.

A pass of few rows takes as long as its weights are read. They are packed once (`pack`), and widened in registers: the
bits of a quant become an fp32 number, which one multiply-add turns into a weight. An element is summed over k in
ascending order, so that a product gives the same bits every time. But tiles grow with the number of rows, and nothing
that a draft's row computes is promised to a row of another pass (law 1 binds the target alone).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F

import triton
import triton.language as tl
from tokenswift_py.kernels._rounding import GROUP as GROUP_SIZE
from tokenswift_py.kernels._rounding import quantise
from tokenswift_py.kernels.triton.configs import WIDE, Tiles, packed_tiles
from tokenswift_py.kernels.triton.matmul import processors
from tokenswift_py.kernels.triton.projections import opened, store_heads
from tokenswift_py.kernels.triton.runtime import (
    DTYPES,
    HEAD_DIMS,
    POINTERS,
    PRECISION,
    Variant,
    launch_options,
    precision,
)

GROUP = tl.constexpr(GROUP_SIZE)
WORD = tl.constexpr(32)  # the bits of a word; each of its quants is of another group
PACKED_ROWS = 512  # how many rows are rounded at a time, which bounds the memory that it takes


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix of weights of few bits, packed along k in steps of as many groups of 32 as a word has quants (8 of 4
    bits, 4 of 8 bits), the last step filled with zeros.

    bits:   4 or 8.
    words:  [columns, steps * 32] int32. Bits `bits` i and up of word j of a step are weight j of its group i.
    scales: [groups, columns]. In 4 bits int32, of which the low half is a group's fp16 scale and the high half its fp16
            minimum. In 8 bits fp16.
    depth:  the weights of a row.
    """

    bits: int
    words: torch.Tensor
    scales: torch.Tensor
    depth: int

    @property
    def columns(self) -> int:
        return len(self.words)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes


def weights_a_step(bits: int) -> int:
    """Returns how many weights of a row are read together."""
    return GROUP_SIZE * 32 // bits


def pack(*matrices: torch.Tensor, bits: int) -> Packed:
    """Rounds matrices [columns, depth] of one depth to 4 or 8 bits and packs them as one, one behind the other."""
    device, depth = matrices[0].device, matrices[0].shape[1]
    columns, in_word = sum(map(len, matrices)), 32 // bits
    steps = triton.cdiv(depth, weights_a_step(bits))
    missing = steps * weights_a_step(bits) - depth
    shifts = torch.arange(0, 32, bits, device=device)[:, None]
    words = torch.empty((columns, steps * GROUP_SIZE), dtype=torch.int32, device=device)
    kind = torch.int32 if bits == 4 else torch.float16
    scales = torch.empty((steps * in_word, columns), dtype=kind, device=device)
    first = 0
    for matrix in matrices:
        for part in matrix.split(PACKED_ROWS):
            found = quantise(F.pad(part, (0, missing)), bits)
            own = slice(first, first + len(part))
            quants = found.quants.unflatten(1, (steps, in_word)).long() << shifts
            words[own] = quants.sum(2).to(torch.int32).flatten(1)
            of_groups = found.scales
            if bits == 4:
                of_groups = torch.stack((found.scales, found.minima), 2).view(torch.int32).squeeze(2)
            scales[:, own] = of_groups.T
            first = own.stop
    return Packed(bits, words, scales, depth)


@triton.jit
def half_of(word: tl.tensor) -> tl.tensor:
    """Returns the fp16 number in the low half of a word, in fp32."""
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def widened(
    words: tl.tensor, scales: tl.tensor, number: tl.constexpr, BITS: tl.constexpr, kind: tl.constexpr
) -> tl.tensor:
    """Returns [GROUP, BLOCK_N] the weights of a step's group of this number, in `kind`.

    A quant is moved to bits 12 or 16 of fp32, below the exponent of 2^11 or 2^7, whose last mantissa bits are worth so
    much that this is the number 2^11 + quant or 2^7 + quant. The quants of a byte share a shift. The numbers have at
    most 12 bits and a scale has 11, so their product is exact. In 8 bits the sum is exact, too. In 4 bits the minimum
    and what the quant was raised by are one number, which is rounded once, and the sum once more.
    """
    byte: tl.constexpr = number * BITS // 8
    bit: tl.constexpr = 12 + number * BITS % 8
    power: tl.constexpr = 2 ** (23 - bit)
    moved = words << (12 - 8 * byte) if byte < 2 else words >> (8 * byte - 12)
    raised = (moved & ((2**BITS - 1) << bit)) | ((150 - bit) << 23)
    if BITS == 4:
        scale = half_of(scales)
        offset = half_of(scales >> 16) - power * scale
    else:
        scale = scales.to(tl.float32)
        offset = -(power + 128) * scale
    return tl.fma(raised.to(tl.float32, bitcast=True), scale[None, :], offset[None, :]).to(kind)


@triton.jit
def packed_product(
    x: tl.tensor,  # [rows, depth]
    words: tl.tensor,  # [all columns, steps * GROUP] int32
    scales: tl.tensor,  # [groups, all columns]
    row: tl.tensor,  # [BLOCK_M]
    column: tl.tensor,  # [BLOCK_N] rows of the weight, in any order
    kept: tl.tensor,  # [BLOCK_M] whether there is such a row of x
    there: tl.tensor,  # [BLOCK_N] whether there is such a row of the weight
    columns: tl.tensor,  # how many the weight has
    depth: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,  # whether the depth is a number of whole steps
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Returns a tile of x @ weight.T in fp32, like `product` of matmul.py."""
    in_word: tl.constexpr = WORD // BITS
    lane = tl.arange(0, GROUP)
    steps = tl.cdiv(depth, in_word * GROUP)
    left = x + row.to(tl.int64)[:, None] * depth + lane[None, :]
    right = words + column.to(tl.int64)[None, :] * (steps * GROUP) + lane[:, None]
    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for step in range(0, steps):
        packed = tl.load(right + step * GROUP, mask=there[None, :], other=0)
        for number in tl.static_range(in_word):
            group = step * in_word + number
            scale = tl.load(scales + group * columns + column, mask=there, other=0)
            if WHOLE:
                a = tl.load(left + group * GROUP, mask=kept[:, None], other=0.0)
            else:
                inside = group * GROUP + lane < depth
                a = tl.load(left + group * GROUP, mask=kept[:, None] & inside[None, :], other=0.0)
            b = widened(packed, scale, number, BITS, x.dtype.element_ty)
            if PRECISION == "interpret":
                acc += tl.dot(a.to(tl.float32), b.to(tl.float32))
            else:
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows", "columns", "programs"])
def packed_kernel(
    x: tl.tensor,  # [rows, depth]
    words: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,  # [columns]; unused without BIAS
    out: tl.tensor,  # [rows, columns]
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    programs: tl.tensor,
    BITS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    row_tiles = tl.cdiv(rows, BLOCK_M)
    for tile in range(tl.program_id(0), row_tiles * tl.cdiv(columns, BLOCK_N), programs):
        row = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        kept, there = row < rows, column < columns
        acc = packed_product(
            x, words, scales, row, column, kept, there, columns, depth, BITS, BLOCK_M, BLOCK_N, WHOLE, PRECISION
        )
        if BIAS:
            acc += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
        target = out + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=kept[:, None] & there[None, :])


def linear(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes x @ weight.T + bias in x's type, accumulated in fp32. x: [R, depth]."""
    out = x.new_empty(len(x), weight.columns)
    chosen = packed_tiles(x.dtype, weight.bits, len(x), weight.columns)
    count = triton.cdiv(len(x), chosen.rows) * triton.cdiv(weight.columns, chosen.columns)
    if count:
        programs = min(count, processors(x.device))
        packed_kernel[(programs,)](
            x.contiguous(), weight.words, weight.scales, x if bias is None else bias, out, len(x), weight.columns,
            weight.depth, programs, BIAS=bias is not None, **compiled_with(chosen, weight),
        )  # fmt: skip
    return out


def compiled_with(chosen: Tiles, weight: Packed) -> dict[str, object]:
    """Returns the constants and options that all launches here have."""
    return {
        "BITS": weight.bits, "BLOCK_M": chosen.rows, "BLOCK_N": chosen.columns,
        "WHOLE": weight.depth % weights_a_step(weight.bits) == 0, "PRECISION": PRECISION,
        **launch_options(chosen.warps, chosen.stages),
    }  # fmt: skip


@triton.jit(do_not_specialize=["rows", "columns", "programs"])
def packed_gated_kernel(
    x: tl.tensor,  # [rows, depth]
    words: tl.tensor,  # those of gate, then of up
    scales: tl.tensor,
    bias: tl.tensor,  # [2 * columns]; unused without BIAS
    out: tl.tensor,  # [rows, columns]
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    programs: tl.tensor,
    BITS: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Computes act(x @ gate.T) * (x @ up.T), with both products rounded to x's type first.

    A tile has columns of the gate and of up side by side.
    """
    pairs: tl.constexpr = BLOCK_N // 2
    row_tiles = tl.cdiv(rows, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    for tile in range(tl.program_id(0), row_tiles * tl.cdiv(columns, pairs), programs):
        row = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        pair = tile // row_tiles * pairs + lane // 2
        column = pair + lane % 2 * columns
        kept, there = row < rows, pair < columns
        acc = packed_product(
            x, words, scales, row, column, kept, there, 2 * columns, depth, BITS, BLOCK_M, BLOCK_N, WHOLE, PRECISION
        )
        if BIAS:
            acc += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
        gate, up = tl.split(tl.reshape(acc, [BLOCK_M, pairs, 2]))
        place = tile // row_tiles * pairs + tl.arange(0, pairs)
        target = out + row.to(tl.int64)[:, None] * columns + place[None, :]
        mask = kept[:, None] & (place < columns)[None, :]
        tl.store(target, opened(gate, up, out.dtype.element_ty, GELU), mask=mask)


def gated(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None = None, activation: str = "silu") -> torch.Tensor:
    """Computes act(x @ gate.T) * (x @ up.T) in x's type. weight, bias: those of gate, then of up."""
    columns = weight.columns // 2
    out = x.new_empty(len(x), columns)
    chosen = packed_tiles(x.dtype, weight.bits, len(x), weight.columns)
    count = triton.cdiv(len(x), chosen.rows) * triton.cdiv(columns, chosen.columns // 2)
    if count:
        programs = min(count, processors(x.device))
        packed_gated_kernel[(programs,)](
            x.contiguous(), weight.words, weight.scales, x if bias is None else bias, out, len(x), columns,
            weight.depth, programs, BIAS=bias is not None, GELU=activation == "gelu", **compiled_with(chosen, weight),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "heads", "kv_heads", "pool_pages", "programs"])
def packed_heads_kernel(
    x: tl.tensor,  # [rows, depth]
    words: tl.tensor,  # those of queries, then of keys, then of values
    scales: tl.tensor,
    bias: tl.tensor,  # [(heads + 2 * kv_heads) * HEAD_DIM]; unused without BIAS
    q: tl.tensor,  # these are the same as in `heads_kernel`
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    depth: tl.tensor,
    pool_pages: tl.tensor,
    programs: tl.tensor,
    BITS: tl.constexpr,
    BIAS: tl.constexpr,
    ROPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Computes queries, keys and values like `heads_kernel` of projections.py."""
    half: tl.constexpr = HEAD_DIM // 2
    pairs: tl.constexpr = BLOCK_N // 2
    parts: tl.constexpr = (half + pairs - 1) // pairs
    row_tiles = tl.cdiv(rows, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    every = (heads + 2 * kv_heads) * HEAD_DIM
    for tile in range(tl.program_id(0), row_tiles * (heads + 2 * kv_heads) * parts, programs):
        row = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        part = tile // row_tiles % parts
        which = tile // row_tiles // parts
        pair = part * pairs + lane // 2
        column = which * HEAD_DIM + pair + lane % 2 * half
        kept, there = row < rows, pair < half
        acc = packed_product(
            x, words, scales, row, column, kept, there, every, depth, BITS, BLOCK_M, BLOCK_N, WHOLE, PRECISION
        )
        if BIAS:
            acc += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
        store_heads(
            acc, q, k, v, cos, sin, slots, row, kept, which, part, heads, kv_heads, pool_pages, ROPE, HEAD_DIM, PAGE,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip


def qkv(
    x: torch.Tensor, weight: Packed, bias: torch.Tensor | None, heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns queries [R, heads, head_dim], keys and values [R, kv_heads, head_dim]. weight: theirs, in this order."""
    kv_heads = (weight.columns // head_dim - heads) // 2
    q, k, v = (x.new_empty(len(x), count, head_dim) for count in (heads, kv_heads, kv_heads))
    launch_heads(x, weight, bias, (q, k, v), None, 0, 1)
    return q, k, v


def qkv_rope_write(
    x: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    turns: Sequence[torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Returns rotated queries, and writes rotated keys and values to pages.

    turns: cos, sin [R, head_dim / 2] fp32 and slots [R]. keys, values: [kv_heads, pages, PAGE_SIZE, head_dim].
    """
    kv_heads, pool_pages, page, head_dim = keys.shape
    q = x.new_empty(len(x), weight.columns // head_dim - 2 * kv_heads, head_dim)
    launch_heads(x, weight, bias, (q, keys, values), turns, pool_pages, page)
    return q


def launch_heads(
    x: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    targets: Sequence[torch.Tensor],
    turns: Sequence[torch.Tensor] | None,
    pool_pages: int,
    page: int,
) -> None:
    _, heads, head_dim = targets[0].shape
    kv_heads = (weight.columns // head_dim - heads) // 2
    chosen = packed_tiles(x.dtype, weight.bits, len(x), weight.columns)
    parts = triton.cdiv(head_dim // 2, chosen.columns // 2)
    count = triton.cdiv(len(x), chosen.rows) * (heads + 2 * kv_heads) * parts
    if not count:
        return
    programs = min(count, processors(x.device))
    packed_heads_kernel[(programs,)](
        x.contiguous(), weight.words, weight.scales, x if bias is None else bias, *targets, *(turns or (x, x, x)),
        len(x), heads, kv_heads, weight.depth, pool_pages, programs, BIAS=bias is not None, ROPE=turns is not None,
        HEAD_DIM=head_dim, PAGE=page, **compiled_with(chosen, weight),
    )  # fmt: skip


def variants(target: str) -> Iterator[Variant]:
    """Yields the kernels for few rows, then those for few rows of many columns and for many rows, without biases and
    GELU, which change little. Only the plain product is compiled for depths of no whole steps, too."""
    for bits, dtype in product((4, 8), DTYPES):
        data = POINTERS[dtype]
        tables = {"words": "*i32", "scales": "*i32" if bits == 4 else "*fp16"}
        for end, rows, columns in (("", 1, 1), (" x16 wide", 16, WIDE), (" x64", 64, 1)):
            chosen = packed_tiles(dtype, bits, rows, columns, target)
            shape = {
                "BITS": bits, "BLOCK_M": chosen.rows, "BLOCK_N": chosen.columns, "WHOLE": True,
                "PRECISION": precision(target),
            }  # fmt: skip
            launch, few = (chosen.warps, chosen.stages, ("depth",)), not end
            kinds = {**tables, **dict.fromkeys(("x", "bias", "out"), data)}
            for more, own in (("", {}), *((" x1 cut", {"WHOLE": False}), ("+bias", {"BIAS": True}))[: 2 * few]):
                constants = {"BIAS": False, **shape, **own}
                yield Variant(f"int{bits}{end}{more}", packed_kernel, dtype, None, kinds, constants, *launch)
            for gelu in (False, True)[: 1 + few]:
                name, constants = f"int{bits}_gated{'+gelu' * gelu}{end}", {"BIAS": False, "GELU": gelu, **shape}
                yield Variant(name, packed_gated_kernel, dtype, None, kinds, constants, *launch)
            if columns == WIDE:
                continue  # no model has so many heads
            kinds = {**tables, **dict.fromkeys(("x", "bias", "q", "k", "v"), data), "slots": "*i64"}
            for head_dim in HEAD_DIMS:
                constants = {"BIAS": False, **shape, "HEAD_DIM": head_dim, "ROPE": True, "PAGE": 64}
                name = f"int{bits}_qkv_rope{end}"
                yield Variant(name, packed_heads_kernel, dtype, head_dim, kinds, constants, *launch)
            if few:
                kinds = {**kinds, **dict.fromkeys(("cos", "sin", "slots"), data)}
                constants = {"BIAS": False, **shape, "HEAD_DIM": 128, "ROPE": False, "PAGE": 1}
                yield Variant(f"int{bits}_qkv", packed_heads_kernel, dtype, 128, kinds, constants, *launch)
