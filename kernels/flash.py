"""flash-attn 2 over the committed prefix, the tree behind it by a small masked product.

The vendor's function is `flash_attn.flash_attn_with_kvcache`. Its own page tables want pages of 256 tokens, so keys go
in as one run a KV head; see `_prefix.py`. flash-attn 4 installs a folder of the same name without that function and
is not meant here.
"""

from __future__ import annotations

from typing import Any

import torch

from tokenswift_py.errors import UserError, need_extra
from tokenswift_py.kernels._prefix import PrefixAndTail


def create() -> PrefixAndTail:
    """Raises UserError with the line that installs flash-attn where it is missing."""
    need_extra("attention", "flash", "flash_attn")
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as error:
        allowed = "the flash_attn that is installed has no flash_attn_with_kvcache: pip install 'tokenswift-py[flash]'"
        raise UserError(f"attention: 'flash' is not allowed; {allowed}") from error
    return with_function(flash_attn_with_kvcache)


def with_function(function: Any) -> PrefixAndTail:
    """function: flash_attn_with_kvcache, or what keeps its contract."""

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # One head: [batch, rows, 1, head_dim]; lse is [batch, 1, rows].
        q, k, v = (x.unsqueeze(2) for x in (q, k, v))
        out, lse = function(q, k, v, causal=False, return_softmax_lse=True)
        return out.squeeze(2), lse.squeeze(1)

    return PrefixAndTail("flash", kernel, (torch.bfloat16, torch.float16))


BACKEND = create
