"""xformers over the committed prefix, and a small masked product over the tree after it; see `_prefix.py`.

The vendor's function is `xformers.ops.fmha.memory_efficient_attention_partial`.
"""

from __future__ import annotations

from typing import Any

import torch

from tokenswift_py.errors import need_extra
from tokenswift_py.kernels._prefix import PrefixAndTail


def create() -> PrefixAndTail:
    """Makes the backend. Raises UserError with the line that installs xformers where it is missing."""
    need_extra("attention", "xformers", "xformers")
    from xformers.ops.fmha import memory_efficient_attention_partial

    return with_function(memory_efficient_attention_partial)


def with_function(function: Any) -> PrefixAndTail:
    """Makes a backend of `function`: memory_efficient_attention_partial, or one that keeps its contract."""

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The function takes [batch, rows, 1, head_dim]. Its lse is [batch, 1, rows], which some of its kernels pad.
        out, lse = function(*(x.unsqueeze(2) for x in (q, k, v)))
        return out.squeeze(2), lse.squeeze(1)[:, : q.shape[1]]

    return PrefixAndTail("xformers", kernel, (torch.bfloat16, torch.float16, torch.float32))


BACKEND = create
NEEDS_GPU = True
