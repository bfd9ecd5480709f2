"""PyTorch's scaled_dot_product_attention: one call for each segment and layer, with the tree as a mask.

Masked gaps between a node and its ancestors change how sums round, so equality with plain decoding is *measured*.
Where queries are moved for far keys, or scores are capped, the products are made here, because PyTorch's function has
no place for either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment, FarQueries, capped
from tokenswift_py.kernels.naive import accumulator


@dataclass(frozen=True)
class TailColumns:
    """The slots after the full pages that any row of a segment attends to, and the mask of which row attends."""

    slots: torch.Tensor  # [t] ascending
    positions: torch.Tensor  # [t]
    mask: torch.Tensor  # [n, t]


@dataclass(frozen=True)
class SegmentPlan:
    segment: AttentionSegment
    positions: torch.Tensor  # [n]
    pages: torch.Tensor  # [full] pages of the pool
    view: torch.Tensor | None  # [layers, kv_heads, v] absolute pages
    tail: TailColumns
    contiguous: int | None  # the first slot, if all columns lie in one run of the pool


class SDPA:
    name = "sdpa"
    moves_queries = True
    reports_lse = True

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
        far: FarQueries | None = None,
        lse: torch.Tensor | None = None,
        cap: float = 0.0,
    ) -> torch.Tensor:
        kv_heads = keys.shape[0]
        group = q.shape[1] // kv_heads
        out = torch.empty_like(q)
        for part in plan:
            rows = part.segment.rows
            k, v, positions, mask = columns(part, layer, keys, values, window)
            if far is not None or cap:
                attend_whole(far, q, rows, k, v, positions, mask, cap, out, mass, lse)
                continue
            packed = pack(q[rows], kv_heads)
            bias = None if mask is None else mask.repeat(*([1] * (mask.ndim - 2)), group, 1)
            if lse is None:
                attended = F.scaled_dot_product_attention(packed[None], k[None], v[None], attn_mask=bias)[0]
            else:  # which PyTorch's function does not tell
                attended, total = with_lse(packed, k, v, bias)
                lse[rows] = unpacked(total[..., None], group)[..., 0]
            out[rows] = unpacked(attended, group).to(out.dtype)
            if mass is not None:
                mass[rows] = page_mass(packed, k, positions, bias, group, mass.shape[-1])
        return out


def plan_segment(segment: AttentionSegment, device: torch.device) -> SegmentPlan:
    def move(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, np.int64)).to(device)

    tail, boundary = segment.tail, segment.boundary
    slots, first = np.unique(tail, return_index=True)
    first = first[slots >= 0]
    slots = slots[slots >= 0]
    positions = boundary + first % tail.shape[1]
    if segment.causal:
        mask = positions[None, :] <= segment.positions[:, None]
    else:
        mask = np.zeros((len(tail), len(slots)), np.bool_)
        row, column = np.nonzero(tail >= 0)
        mask[row, np.searchsorted(slots, tail[row, column])] = True
    contiguous = None
    if segment.view is None:
        run = np.concatenate([segment.pages * PAGE_SIZE, slots[:1]])
        steps_by_page = (np.diff(run) == PAGE_SIZE).all()
        if steps_by_page and (np.diff(slots) == 1).all():
            contiguous = int(run[0])
    columns_of_tail = TailColumns(move(slots), move(positions), torch.from_numpy(mask).to(device))
    view = None if segment.view is None else move(segment.view)
    return SegmentPlan(segment, move(segment.positions), move(segment.pages), view, columns_of_tail, contiguous)


def columns(
    part: SegmentPlan, layer: int, keys: torch.Tensor, values: torch.Tensor, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns the keys and values that a segment's rows attend to in a layer.

    They are [kv_heads, T, head_dim] each. Their positions come third, [T] or [kv_heads, T], and the mask last, [n, T]
    or [kv_heads, n, T]. A mask of None says that every row sees all of them.
    """
    kv_heads = keys.shape[0]
    flat_k, flat_v = keys.flatten(1, 2), values.flatten(1, 2)  # [kv_heads, slots, head_dim]
    tail, lanes = part.tail, torch.arange(PAGE_SIZE, device=keys.device)
    n, prefix = len(part.positions), len(part.pages) * PAGE_SIZE
    if part.contiguous is not None:
        run = slice(part.contiguous, part.contiguous + prefix + len(tail.slots))
        k, v = flat_k[:, run], flat_v[:, run]
        positions = torch.cat([torch.arange(prefix, device=keys.device), tail.positions])
    elif part.view is None:
        at = torch.cat([(part.pages[:, None] * PAGE_SIZE + lanes).flatten(), tail.slots])
        k, v = flat_k[:, at], flat_v[:, at]
        positions = torch.cat([torch.arange(prefix, device=keys.device), tail.positions])
    else:
        chosen = part.view[layer]  # [kv_heads, v]
        prefix = chosen.shape[1] * PAGE_SIZE
        seen = (chosen[..., None] * PAGE_SIZE + lanes).flatten(1)
        slots = (part.pages[chosen][..., None] * PAGE_SIZE + lanes).flatten(1)
        at = torch.cat([slots, tail.slots.expand(kv_heads, -1)], dim=1)[..., None].expand(-1, -1, keys.shape[-1])
        k, v = flat_k.gather(1, at), flat_v.gather(1, at)
        positions = torch.cat([seen, tail.positions.expand(kv_heads, -1)], dim=1)
    if window is None and bool(tail.mask.all()):
        return k, v, positions, None
    mask = torch.cat([tail.mask.new_ones(n, prefix), tail.mask], dim=1)
    if window is not None:
        mask = mask & (positions[..., None, :] > part.positions[:, None] - window)
        unseen = ~mask.any(dim=-2)[..., None]  # these keys may hold NaN
        k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    return k, v, positions, mask


def pack(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Turns queries [n, heads, head_dim] into [kv_heads, group * n, head_dim].

    The query heads of a KV head become rows, so that no key is repeated.
    """
    packed: torch.Tensor = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).reshape(kv_heads, -1, q.shape[-1])
    return packed


def unpacked(packed: torch.Tensor, group: int) -> torch.Tensor:
    """Turns [kv_heads, group * n, size] back into [n, heads, size]."""
    rows: torch.Tensor = packed.unflatten(1, (group, -1))
    return rows.permute(2, 0, 1, 3).flatten(1, 2)


def with_lse(
    packed: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, cap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns attention [kv_heads, group * n, head_dim] and its log-sum-exp [kv_heads, group * n], in fp32 or better.

    packed: [kv_heads, group * n, head_dim]. mask: true where a row attends; every row sees itself, so no sum is empty.
    """
    scores = capped(accumulator(packed) @ accumulator(k).transpose(1, 2) * packed.shape[-1] ** -0.5, cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ accumulator(v), lse


def attend_whole(
    far: FarQueries | None,
    q: torch.Tensor,
    rows: slice,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    cap: float,
    out: torch.Tensor,
    mass: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    """Writes these rows of out, of mass and of lse, where queries are moved for far keys or scores are capped.

    It takes a few rows at a time, because the probabilities are held whole. The other arguments are from `columns`.
    """
    at_once = max(1, MOST_WEIGHTS // (q.shape[1] * k.shape[1]))
    for first in range(rows.start, rows.stop, at_once):
        some = slice(first, min(first + at_once, rows.stop))
        seen = None if mask is None else mask[..., some.start - rows.start : some.stop - rows.start, :]
        if far is None:
            scores = accumulator(pack(q[some], len(k))) @ accumulator(k).transpose(1, 2)
        else:
            scores = far_scores(far, some, k, positions)
        scores = masked(scores.unflatten(1, (-1, some.stop - some.start)) * q.shape[-1] ** -0.5, cap, seen)
        weights = scores.softmax(-1)
        if lse is not None:
            lse[some] = scores.logsumexp(-1).permute(2, 0, 1).flatten(1)
        out[some] = (weights @ accumulator(v)[:, None]).permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
        if mass is not None:
            mass[some] = summed_by_page(weights, positions, mass.shape[-1]).to(mass.dtype)


MOST_WEIGHTS = 2**25  # attention probabilities held at a time


def masked(scores: torch.Tensor, cap: float, mask: torch.Tensor | None) -> torch.Tensor:
    """Returns scaled scores [kv_heads, group, n, T], capped, with -inf where a mask as `columns` has it is false."""
    scores = capped(scores, cap)
    return scores if mask is None else scores.masked_fill(~(mask[:, None] if mask.ndim == 3 else mask), -torch.inf)


def far_scores(far: FarQueries, rows: slice, k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns the products of keys with queries that are moved for each block of keys, [kv_heads, group * n, T].

    Each block that any head has keys of gets its own product, over the range of columns where the block occurs. The
    product is kept where the key is of that block. k: [kv_heads, T, head_dim]. positions: [T] or [kv_heads, T].
    """
    kv_heads, count, _ = k.shape
    blocks = (positions // far.shifts.block).expand(kv_heads, count)
    n = rows.stop - rows.start
    scores = accumulator(k).new_empty(kv_heads, far.q.shape[1] // kv_heads * n, count)
    for block in torch.unique(blocks).tolist():
        columns = (blocks == block).any(0).nonzero()[:, 0]
        inside = slice(int(columns[0]), int(columns[-1]) + 1)
        products = accumulator(pack(far.met(rows, block), kv_heads)) @ accumulator(k[:, inside]).transpose(1, 2)
        scores[..., inside] = torch.where((blocks[:, inside] == block)[:, None], products, scores[..., inside])
    return scores


def page_mass(
    packed: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
    pages: int,
    cap: float = 0.0,
) -> torch.Tensor:
    """Returns the attention mass on each page, [n, kv_heads, pages].

    Vendors' functions do not return their probabilities, so they are computed again.
    """
    scores = capped(accumulator(packed) @ accumulator(k).transpose(1, 2) * packed.shape[-1] ** -0.5, cap)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf)
    return summed_by_page(scores.softmax(-1).unflatten(1, (group, -1)), positions, pages)


def summed_by_page(weights: torch.Tensor, positions: torch.Tensor, pages: int) -> torch.Tensor:
    """Sums probabilities [kv_heads, group, n, T] by the page of their keys: [n, kv_heads, pages].

    positions: [T] or [kv_heads, T] of the keys.
    """
    p: torch.Tensor = weights.sum(1)
    at = (positions // PAGE_SIZE).expand(p.shape[0], -1)[:, None].expand_as(p)
    return p.new_zeros(*p.shape[:2], pages).scatter_add(2, at, p).transpose(0, 1)


BACKEND = SDPA
CAPS_SCORES = True
