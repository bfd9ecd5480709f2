"""int8 copies of full pages, which drafts read in place of the pages: half the bytes, and no row law binds a draft.

A copy's numbers are those that the page would have in an int8 cache, see `quantise` in kvcache/pages.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import triton
import triton.language as tl
from tokenswift_py.kernels.base import PAGE_SIZE, Copies
from tokenswift_py.kernels.triton.fused import in_scale, int8_scale, kept_scale
from tokenswift_py.kernels.triton.runtime import DTYPES, HEAD_DIMS, POINTERS, Variant, launch_options, padded

WARPS = 4


@triton.jit
def copy_rows(
    source: tl.tensor,  # [PAGE, HEAD_DIM]
    target: tl.tensor,
    scales: tl.tensor,  # [PAGE]
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """Stores a page's rows as int8 with a scale each."""
    lane, column = tl.arange(0, PAGE), tl.arange(0, D)
    at = lane[:, None] * HEAD_DIM + column[None, :]
    inside = column[None, :] < HEAD_DIM
    x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    scale = int8_scale(tl.max(tl.abs(x), 1), tl.min(tl.where(x == x, 1, 0), 1))
    whole = in_scale(x, tl.broadcast_to(scale[:, None], (PAGE, D)))
    tl.store(target + at, whole.to(tl.int8), mask=inside)
    tl.store(scales + lane, kept_scale(scale))


@triton.jit(do_not_specialize=["pool_pages"])
def copy_kernel(
    keys: tl.tensor,  # [lists, pool_pages, PAGE, HEAD_DIM]
    values: tl.tensor,
    key_copies: tl.tensor,  # int8, of the same shape
    value_copies: tl.tensor,
    key_scales: tl.tensor,  # [lists, pool_pages, PAGE]
    value_scales: tl.tensor,
    which: tl.tensor,  # [n] int32 pages
    pool_pages: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """Copies a page of one layer and KV head."""
    row = (tl.program_id(1).to(tl.int64) * pool_pages + tl.load(which + tl.program_id(0))) * PAGE
    at = row * HEAD_DIM
    copy_rows(keys + at, key_copies + at, key_scales + row, HEAD_DIM, D, PAGE)
    copy_rows(values + at, value_copies + at, value_scales + row, HEAD_DIM, D, PAGE)


def copy_pages(keys: torch.Tensor, values: torch.Tensor, copies: Copies, pages: torch.Tensor) -> None:
    """Copies some pages of all layers and KV heads.

    keys, values: [layers, kv_heads, pages, PAGE_SIZE, head_dim]. copies: int8 of this shape twice, and fp32 without
    head_dim twice. pages: [n] int32.
    """
    layers, kv_heads, pool_pages, _, head_dim = keys.shape
    copy_kernel[(len(pages), layers * kv_heads)](
        keys, values, *copies, pages, pool_pages, HEAD_DIM=head_dim, D=padded(head_dim), PAGE=PAGE_SIZE,
        **launch_options(WARPS, 1),
    )  # fmt: skip


def variants(target: str) -> Iterator[Variant]:
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            kinds = dict.fromkeys(("keys", "values"), POINTERS[dtype])
            kinds |= {"key_copies": "*i8", "value_copies": "*i8", "which": "*i32"}
            constants = {"HEAD_DIM": head_dim, "D": padded(head_dim), "PAGE": PAGE_SIZE}
            yield Variant("copy_pages", copy_kernel, dtype, head_dim, kinds, constants, WARPS, 1)
