"""Matrix products whose rows keep law 1. They have one tile size and one order of summation, however many rows there
are.

cuBLAS picks a kernel by shape, so a row's bits change with the number of rows. Here every element is summed over K in
ascending blocks of `BLOCK_K`, in a tile of fixed height. Programs are persistent: each walks over tiles, and takes
those of one block of weights one after the other, so that weights are read from memory once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import triton
import triton.language as tl
from tokenswift_py.kernels.triton.configs import tiles
from tokenswift_py.kernels.triton.runtime import (
    DTYPES,
    INTERPRET,
    POINTERS,
    PRECISION,
    Variant,
    launch_options,
    precision,
)


@triton.jit
def product(
    x: tl.tensor,  # [rows, depth]
    weight: tl.tensor,  # [columns, depth]
    row: tl.tensor,  # [BLOCK_M]
    column: tl.tensor,  # [BLOCK_N] rows of the weight, in any order
    kept: tl.tensor,  # [BLOCK_M] whether there is such a row of x
    there: tl.tensor,  # [BLOCK_N] whether there is such a row of the weight
    depth: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Returns a tile of x @ weight.T in fp32. Every kernel that multiplies by a weight uses this sum."""
    step = tl.arange(0, BLOCK_K)
    left = x + row.to(tl.int64)[:, None] * depth + step[None, :]
    right = weight + column.to(tl.int64)[None, :] * depth + step[:, None]
    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = start + step < depth
        a = tl.load(left + start, mask=kept[:, None] & inside[None, :], other=0.0)
        b = tl.load(right + start, mask=there[None, :] & inside[:, None], other=0.0)
        if PRECISION == "interpret":
            acc += tl.dot(a.to(tl.float32), b.to(tl.float32))
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows", "columns", "programs"])
def matmul_kernel(
    x: tl.tensor,  # [rows, depth]
    weight: tl.tensor,  # [columns, depth]
    bias: tl.tensor,  # [columns]; unused without BIAS
    out: tl.tensor,  # [rows, columns]
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    programs: tl.tensor,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    row_tiles = tl.cdiv(rows, BLOCK_M)
    for tile in range(tl.program_id(0), row_tiles * tl.cdiv(columns, BLOCK_N), programs):
        row = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        kept, there = row < rows, column < columns
        acc = product(x, weight, row, column, kept, there, depth, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        if BIAS:
            acc += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
        target = out + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=kept[:, None] & there[None, :])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes x @ weight.T + bias in x's type, accumulated in fp32.

    x: [R, depth]. weight: [columns, depth], contiguous.
    """
    rows, depth = x.shape
    columns = len(weight)
    chosen = tiles(x.dtype)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    count = triton.cdiv(rows, chosen.rows) * triton.cdiv(columns, chosen.columns)
    programs = min(count, processors(x.device))
    if not count:
        return out
    matmul_kernel[(programs,)](
        x.contiguous(), weight, weight if bias is None else bias, out, rows, columns, depth, programs,
        BIAS=bias is not None, BLOCK_M=chosen.rows, BLOCK_N=chosen.columns, BLOCK_K=chosen.depth, PRECISION=PRECISION,
        **launch_options(chosen.warps, chosen.stages),
    )  # fmt: skip
    return out


def processors(device: torch.device) -> int:
    """Returns how many programs fill the GPU twice. No result depends on it."""
    return 2 if INTERPRET else 2 * torch.cuda.get_device_properties(device).multi_processor_count


def variants(target: str) -> Iterator[Variant]:
    for dtype in DTYPES:
        chosen = tiles(dtype, target)
        for bias in (False, True):
            constants = {
                "BIAS": bias, "BLOCK_M": chosen.rows, "BLOCK_N": chosen.columns, "BLOCK_K": chosen.depth,
                "PRECISION": precision(target),
            }  # fmt: skip
            kinds = dict.fromkeys(("x", "weight", "bias", "out"), POINTERS[dtype])
            name = "matmul+bias" if bias else "matmul"
            aligned = ("depth",)  # this holds for every supported model; others compile a second binary
            yield Variant(name, matmul_kernel, dtype, None, kinds, constants, chosen.warps, chosen.stages, aligned)
