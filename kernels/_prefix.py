"""Attention in two parts, for kernels that know no trees.

A vendor's kernel attends to the committed prefix, and a small masked product to the rows after it. Their log-sum-exp
merges the two. Equality with plain decoding is measured, not bitwise (law 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tokenswift_py.errors import check
from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment
from tokenswift_py.kernels.naive import accumulator
from tokenswift_py.kernels.sdpa import SegmentPlan, columns, pack, page_mass, plan_segment, unpacked, with_lse


class PrefixKernel(Protocol):
    """A vendor's attention of all rows to all keys, with its log-sum-exp."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the attention [kv_heads, n, head_dim] and its log-sum-exp [kv_heads, n] fp32, natural logarithm.

        q: [kv_heads, n, head_dim]. k, v: [kv_heads, T, head_dim], T > 0; the last stride is 1, the others are any.
        Scores are scaled by head_dim ** -0.5. A kernel that caps them takes `softcap` (see `capped`) by name.
        """


class PagedKernel(Protocol):
    """A vendor's attention to pages in place, with its log-sum-exp."""

    def __call__(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the same as `PrefixKernel`.

        keys, values: [kv_heads * pages, PAGE_SIZE, head_dim], a layer's whole pool. table: [kv_heads, n] int32, n > 0:
        the pages in it of each KV head, full and in order.
        """


@dataclass(frozen=True)
class Pieces:
    """The keys and values of a segment, cut into those that every row attends to and the rest.

    prefix:             keys and values for every row, as the kernel takes them. Empty where there are none.
    masked_k, masked_v: [kv_heads, t, head_dim] those to which only some rows attend.
    mask:               [n, t] or [kv_heads, n, t], true where a row attends to one of these.
    """

    prefix: tuple[torch.Tensor, ...]
    masked_k: torch.Tensor
    masked_v: torch.Tensor
    mask: torch.Tensor


class PrefixAndTail:
    """An attention backend that joins a vendor's kernel over the prefix with a masked product over the tail.

    The query heads of a KV head are rows to `kernel`, so that each key is read once. KV heads are its batch, so that
    each has pages of its own. A kernel without page tables (`paged`) reads the pages of a lone sequence in place, for
    they lie in one run of the pool. Other pages, and those of a view, are gathered first. caps: whether the kernel caps
    scores.
    """

    def __init__(
        self,
        name: str,
        kernel: PrefixKernel | PagedKernel,
        dtypes: Sequence[torch.dtype],
        paged: bool = False,
        caps: bool = False,
    ):
        self.name, self.dtypes, self.caps = name, tuple(dtypes), caps
        self.kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]] = kernel
        self.reports_lse = True
        self.pieces = paged_pieces if paged else pieces

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
        lse: torch.Tensor | None = None,
        cap: float = 0.0,
    ) -> torch.Tensor:
        allowed = f"attention {self.name} computes in {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}"
        check(q.dtype in self.dtypes, "dtype", str(q.dtype).removeprefix("torch."), allowed)
        check(self.caps or not cap, "attention", self.name, "it has no soft cap of scores")
        options = {"softcap": cap} if cap else {}
        kv_heads = keys.shape[0]
        group = q.shape[1] // kv_heads
        out = torch.empty_like(q)
        for part in plan:
            rows = part.segment.rows
            packed = pack(q[rows], kv_heads)
            cut = self.pieces(part, layer, keys, values, window)
            attended, total = masked_attention(packed, cut, group, cap)
            if cut.prefix:
                of_prefix, lse_of_prefix = self.kernel(packed, *cut.prefix, **options)
                attended = merge(attended, total, of_prefix, lse_of_prefix)
                total = torch.logaddexp(total, lse_of_prefix)
            out[rows] = unpacked(attended, group).to(q.dtype)
            if lse is not None:
                lse[rows] = unpacked(total[..., None], group)[..., 0]
            if mass is not None:
                k, _, positions, mask = columns(part, layer, keys, values, window)
                bias = None if mask is None else mask.repeat(*([1] * (mask.ndim - 2)), group, 1)
                mass[rows] = page_mass(packed, k, positions, bias, group, mass.shape[-1], cap).to(mass.dtype)
        return out


def pieces(part: SegmentPlan, layer: int, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> Pieces:
    """Cuts out what all rows of a segment attend to. The rest is the tail, and under a window the first pages seen."""
    if window is not None and part.view is not None:  # each head has other pages at the window's edge
        k, v, _, mask = columns(part, layer, keys, values, window)
        assert mask is not None
        return Pieces((), k, v, mask)
    k, v, _, _ = columns(part, layer, keys, values, None)
    prefix, tail = k.shape[1] - len(part.tail.slots), part.tail.mask
    if window is None:
        return Pieces((k[:, :prefix], v[:, :prefix]) if prefix else (), k[:, prefix:], v[:, prefix:], tail)
    first, common = (min(prefix, position) for position in window_starts(part, window))
    some_k, some_v = (torch.cat([x[:, first:common], x[:, prefix:]], dim=1) for x in (k, v))
    masked = windowed(part, window, torch.arange(first, common, device=k.device), some_k, some_v)
    return Pieces((k[:, common:prefix], v[:, common:prefix]) if common < prefix else (), *masked)


def paged_pieces(part: SegmentPlan, layer: int, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> Pieces:
    """Cuts like `pieces`, with a page table of the whole pages that all rows of a segment attend to."""
    if window is not None and part.view is not None:
        return pieces(part, layer, keys, values, window)
    kv_heads, pages = keys.shape[:2]
    chosen = part.pages.expand(kv_heads, -1) if part.view is None else part.pages[part.view[layer]]
    common, slots, edge = 0, part.tail.slots, part.tail.slots[:0]
    if window is not None:
        first, start = window_starts(part, window)
        common = min(chosen.shape[1], -(-start // PAGE_SIZE))
        edge = torch.arange(min(first, common * PAGE_SIZE), common * PAGE_SIZE, device=keys.device)
        slots = torch.cat([part.pages[edge // PAGE_SIZE] * PAGE_SIZE + edge % PAGE_SIZE, slots])
    some_k, some_v = (x.flatten(1, 2)[:, slots] for x in (keys, values))
    masked = (some_k, some_v, part.tail.mask) if window is None else windowed(part, window, edge, some_k, some_v)
    heads = torch.arange(kv_heads, device=keys.device)[:, None]
    table = (heads * pages + chosen[:, common:]).to(torch.int32)
    return Pieces((keys.flatten(0, 1), values.flatten(0, 1), table) if table.shape[1] else (), *masked)


def window_starts(part: SegmentPlan, window: int) -> tuple[int, int]:
    """Returns the first position that any row of a segment sees, and the first that all rows see."""
    positions = part.segment.positions
    return max(0, int(positions.min()) - window + 1), max(0, int(positions.max()) - window + 1)


def windowed(
    part: SegmentPlan, window: int, edge: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns k and v with keys that no row sees set to 0, and the mask [n, t] of what each row sees.

    edge: positions in the prefix that only some rows see. k, v: [kv_heads, t, head_dim] of these and of the tail.
    """
    tail = part.tail
    at = torch.cat([edge, tail.positions])
    mask = torch.cat([tail.mask.new_ones(len(tail.mask), len(edge)), tail.mask], dim=1)
    mask = mask & (at[None, :] > part.positions[:, None] - window)
    unseen = ~mask.any(0)[:, None]  # memory that no row sees may hold NaN, and 0 * NaN is not 0
    return k.masked_fill(unseen, 0), v.masked_fill(unseen, 0), mask


def masked_attention(packed: torch.Tensor, cut: Pieces, group: int, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns attention under the mask and its log-sum-exp, in fp32. packed: [kv_heads, group * n, head_dim]."""
    mask = cut.mask.repeat(*([1] * (cut.mask.ndim - 2)), group, 1)
    return with_lse(packed, cut.masked_k, cut.masked_v, mask, cap)


def merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Merges attention to two sets of keys into attention to both.

    out, other: [..., head_dim]. lse, other_lse: [...], natural logarithm.
    Source: Hydragen (arXiv 2402.05099), attention decomposition.
    """
    total = torch.logaddexp(lse, other_lse)
    return out * (lse - total).exp()[..., None] + accumulator(other) * (other_lse - total).exp()[..., None]


def join_recalled(
    out: torch.Tensor, recalled: torch.Tensor, weight: torch.Tensor, lse: torch.Tensor | None
) -> torch.Tensor:
    """Joins attention to the pages kept with what a memory recalls of those that are gone.

    out, recalled: [n, heads, head_dim]. weight: [n, heads], the memory's log-sum-exp beside `lse`, that of the pages;
    where that is None, the memory's share of the whole.
    """
    if lse is None:
        return torch.lerp(out.to(recalled.dtype), recalled, weight[..., None]).to(out.dtype)
    return merge(accumulator(out), lse, recalled, weight).to(out.dtype)
