"""Attention in two parts, for kernels that know no tree: the committed prefix by a vendor's kernel, the rows behind it
by a small masked product, merged by their log-sum-exp. Measured, not bitwise: see law 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tokenswift_py.errors import check
from tokenswift_py.kernels.base import AttentionSegment
from tokenswift_py.kernels.naive import accumulator
from tokenswift_py.kernels.sdpa import SegmentPlan, columns, page_mass, plan_segment


class PrefixKernel(Protocol):
    """Attention of all rows to all keys, with its log-sum-exp."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q: [kv_heads, n, head_dim]. k, v: [kv_heads, T, head_dim], T > 0; any strides but the last's, which is 1.
        Scores are scaled by head_dim ** -0.5. Returns [kv_heads, n, head_dim] and [kv_heads, n] fp32, natural log."""


@dataclass(frozen=True)
class Pieces:
    """k, v: [kv_heads, T, head_dim] what every row attends to; masked_k, masked_v, mask: what only some do. mask is
    [n, t] or [kv_heads, n, t]."""

    k: torch.Tensor
    v: torch.Tensor
    masked_k: torch.Tensor
    masked_v: torch.Tensor
    mask: torch.Tensor


class PrefixAndTail:
    """The query heads of a KV head are rows to `kernel`, so that each key is read once; KV heads are its batch, so that
    each has pages of its own. The pages of a lone sequence lie in one run of the pool and are read in place; those of
    others, and those of a view, are gathered first, for no vendor's kernel takes pages of 64 tokens."""

    def __init__(self, name: str, kernel: PrefixKernel, dtypes: Sequence[torch.dtype]):
        self.name, self.kernel, self.dtypes = name, kernel, tuple(dtypes)

    def prepare(self, segments: Sequence[AttentionSegment], device: torch.device) -> list[SegmentPlan]:
        return [plan_segment(segment, device) for segment in segments]

    def attend(
        self,
        plan: Sequence[SegmentPlan],
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None = None,
        mass: torch.Tensor | None = None,
    ) -> torch.Tensor:
        allowed = f"attention {self.name} computes in {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}"
        check(q.dtype in self.dtypes, "dtype", str(q.dtype).removeprefix("torch."), allowed)
        kv_heads, _, _, head_dim = keys.shape
        group = q.shape[1] // kv_heads
        out = torch.empty_like(q)
        for part in plan:
            n, rows = len(part.segment.positions), part.segment.rows
            packed = q[rows].unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).reshape(kv_heads, group * n, head_dim)
            cut = pieces(part, layer, keys, values, window)
            attended, lse = masked_attention(packed, cut, group)
            if cut.k.shape[1]:
                attended = merge(attended, lse, *self.kernel(packed, cut.k, cut.v))
            out[rows] = attended.unflatten(1, (group, n)).permute(2, 0, 1, 3).reshape(n, -1, head_dim).to(q.dtype)
            if mass is not None:
                k, _, positions, mask = columns(part, layer, keys, values, window)
                bias = None if mask is None else mask.repeat(*([1] * (mask.ndim - 2)), group, 1)
                mass[rows] = page_mass(packed, k, positions, bias, group, mass.shape[-1]).to(mass.dtype)
        return out


def pieces(part: SegmentPlan, layer: int, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> Pieces:
    """What all rows of a segment attend to, and the rest: the tail, and under a window the prefix's first pages."""
    if window is not None and part.view is not None:  # each head has other pages at the window's edge
        k, v, _, mask = columns(part, layer, keys, values, window)
        assert mask is not None
        return Pieces(k[:, :0], v[:, :0], k, v, mask)
    k, v, _, _ = columns(part, layer, keys, values, None)
    prefix, tail = k.shape[1] - len(part.tail.slots), part.tail.mask
    if window is None:
        return Pieces(k[:, :prefix], v[:, :prefix], k[:, prefix:], v[:, prefix:], tail)
    positions = part.segment.positions
    first = min(prefix, max(0, int(positions.min()) - window + 1))  # of what any row sees
    common = min(prefix, max(0, int(positions.max()) - window + 1))  # of what all rows see
    edge = torch.arange(first, common, device=k.device)
    at = torch.cat([edge, part.tail.positions])
    mask = torch.cat([tail.new_ones(len(positions), len(edge)), tail], dim=1)
    mask = mask & (at[None, :] > part.positions[:, None] - window)
    unseen = ~mask.any(0)[:, None]  # what lies there must not become 0 * NaN
    some_k, some_v = (torch.cat([x[:, first:common], x[:, prefix:]], dim=1).masked_fill(unseen, 0) for x in (k, v))
    return Pieces(k[:, common:prefix], v[:, common:prefix], some_k, some_v, mask)


def masked_attention(packed: torch.Tensor, cut: Pieces, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The part under the mask, in fp32. packed: [kv_heads, group * n, head_dim]. Every row sees itself."""
    scores = accumulator(packed) @ accumulator(cut.masked_k).transpose(1, 2) * packed.shape[-1] ** -0.5
    mask = cut.mask.repeat(*([1] * (cut.mask.ndim - 2)), group, 1)
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ accumulator(cut.masked_v), lse


def merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Attention to the keys of both. out, other: [..., head_dim]; lse: [...], natural log.

    Source: Hydragen (arXiv 2402.05099), attention decomposition.
    """
    total = torch.logaddexp(lse, other_lse)
    return out * (lse - total).exp()[..., None] + accumulator(other) * (other_lse - total).exp()[..., None]
