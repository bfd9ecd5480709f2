"""flash-attn over the committed prefix, and a small masked product over the tree after it; see `_prefix.py`.

There are two vendor's functions, each in a package of its own that installs into the folder `flash_attn`:
- flash-attn 2, `flash_attn.flash_attn_with_kvcache` (any NVIDIA GPU since Ampere). Its page tables want pages of 256
  tokens, so keys go in as one run a KV head.
- flash-attn 4, `flash_attn.cute.flash_attn_varlen_func` (as of 4.0.0b36). It takes page tables with pages of any size
  on Hopper and on data-centre Blackwells, so pages are read where they lie, those of a view too. It splits the keys of
  few rows over the GPU on those Blackwells only.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from tokenswift_py.errors import UserError
from tokenswift_py.kernels._prefix import PrefixAndTail
from tokenswift_py.kernels.base import PAGE_SIZE

DTYPES = (torch.bfloat16, torch.float16)
PAGED = (9, 10, 11)  # compute capabilities where flash-attn 4 takes page tables
SPLIT = (10, 11)  # and where it splits keys
TAKEN = {"seqused_k", "page_table", "num_splits", "return_lse", "softcap"}


def create() -> PrefixAndTail:
    """Makes a backend of whichever version is installed: 4 before 2 on GPUs where 4 splits keys, else 2 before 4.

    Raises UserError with the lines that install them where neither is installed.
    """
    capability = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    reasons = []
    for version in (4, 2) if capability in SPLIT else (2, 4):
        try:
            return with_varlen(varlen_func(), capability) if version == 4 else with_kvcache(kvcache_func())
        except ImportError as error:
            reasons.append(f"flash-attn {version}: {' '.join(str(error).split())}")
    lines = "pip install 'tokenswift-py[flash]' for flash-attn 2 or pip install 'tokenswift-py[flash4]' for 4"
    raise UserError(f"attention: 'flash' is not allowed; it needs flash_attn: {lines} ({'; '.join(reasons)})")


def kvcache_func() -> Any:
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache


def varlen_func() -> Any:
    from flash_attn.cute import flash_attn_varlen_func

    missing = TAKEN - set(inspect.signature(flash_attn_varlen_func).parameters)
    if missing:
        raise ImportError(f"it is too old, flash_attn_varlen_func has no {', '.join(sorted(missing))}")
    return flash_attn_varlen_func


def with_kvcache(function: Any) -> PrefixAndTail:
    """Makes a backend of `function`: flash_attn_with_kvcache, or one that keeps its contract."""

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # One head: [batch, rows, 1, head_dim]; lse is [batch, 1, rows].
        q, k, v = (x.unsqueeze(2) for x in (q, k, v))
        out, lse = function(q, k, v, causal=False, return_softmax_lse=True, **options)
        return out.squeeze(2), lse.squeeze(1)

    return PrefixAndTail("flash-2", kernel, DTYPES, caps=True)


def with_varlen(function: Any, capability: int) -> PrefixAndTail:
    """Makes a backend of `function`: flash_attn_varlen_func of flash-attn 4, or one that keeps its contract.

    capability: major compute capability of the GPU.
    """
    splits = 0 if capability in SPLIT else 1  # 0 means as many as fill the GPU

    def call(*qkv: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = function(*(x.unsqueeze(2) for x in qkv), num_splits=splits, return_lse=True, **options)
        return out.squeeze(2), lse.squeeze(1)

    def paged(
        q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, **options: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        used = torch.full((len(table),), table.shape[1] * PAGE_SIZE, dtype=torch.int32, device=table.device)
        return call(q, keys, values, seqused_k=used, page_table=table, **options)

    if capability in PAGED:
        return PrefixAndTail("flash-4", paged, DTYPES, paged=True, caps=True)
    return PrefixAndTail("flash-4", call, DTYPES, caps=True)


BACKEND = create
NEEDS_GPU = True
CAPS_SCORES = True
