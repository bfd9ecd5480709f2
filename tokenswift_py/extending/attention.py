"""Shifted sparse attention (S2-Attn) of LongLoRA (arXiv 2309.12307, section 3.2), for training only.

Texts are cut into groups that attend to nothing outside of them. For half of the heads the groups are shifted by half a
group, so that what one group knows reaches the next. A model that is trained like this is used with full attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "tokenswift_s2"


def register() -> None:
    """Makes the attention known to transformers as `NAME`.

    It has no mask there, so rows attend by their order, whatever positions they have. With a mask, transformers would
    read a skipped position as the beginning of another text.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, s2_attention)


def s2_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    s2_group: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Computes causal attention in groups, or full causal attention where `s2_group` is None. There is no dropout.

    query: [B, H, N, D]; key, value: [B, KV, N, D]. Returns [B, N, H, D].
    The groups of the first half of the H heads (rounded down) begin at row 0. For the other heads the first group is
    half as long. The paper's own code rolls the rows of these heads instead. Their last group then joins the two ends
    of a text. Here the ends stay apart, because otherwise the first rows would see the last.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    group = query.shape[2] if s2_group is None else s2_group
    plain = query.shape[1] // 2
    heads = (slice(0, plain), slice(plain, None))
    if group >= query.shape[2]:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    else:
        out = torch.cat(
            [
                grouped(query[:, part], key[:, part], value[:, part], group, first, scaling)
                for part, first in zip(heads, (group, group // 2), strict=True)
            ],
            dim=1,
        )
    return out.transpose(1, 2).contiguous(), None


def grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: int, first: int, scaling: float | None
) -> torch.Tensor:
    """Computes causal attention inside of groups. The first group has `first` rows, the others have `group`, and the
    last may be shorter.

    query, key, value: [B, H, N, D]. Returns [B, H, N, D].
    """
    rows = query.shape[2]
    first = min(first, rows)
    rest = first + (rows - first) // group * group
    parts = []
    for start, end, size in ((0, first, first), (first, rest, group), (rest, rows, rows - rest)):
        if end > start:
            cut = (x[:, :, start:end] for x in (query, key, value))
            q, k, v = (x.unflatten(2, (-1, size)).movedim(2, 1).flatten(0, 1) for x in cut)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
            parts.append(out.unflatten(0, (query.shape[0], -1)).movedim(1, 2).flatten(2, 3))
    return torch.cat(parts, dim=2)
