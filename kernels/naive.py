"""Textbook attention, row by row and head by head. It is slow. It is the ground truth for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment, FarQueries, capped


class Naive:
    name = "naive"
    moves_queries = True
    reports_lse = True

    def prepare(self, segments: Sequence[AttentionSegment], device: torch.device) -> Sequence[AttentionSegment]:
        return segments

    def attend(
        self,
        plan: Sequence[AttentionSegment],
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
        kv_heads, _, _, head_dim = keys.shape
        group = q.shape[1] // kv_heads
        out = torch.empty_like(q)
        for segment in plan:
            for index in range(len(segment.positions)):
                row = segment.rows.start + index
                for head in range(kv_heads):
                    positions, slots = visible(segment, layer, head, index, window)
                    at = torch.from_numpy(slots).to(q.device)
                    k = accumulator(keys[head].reshape(-1, head_dim)[at])  # [T, head_dim]
                    v = accumulator(values[head].reshape(-1, head_dim)[at])
                    heads = slice(head * group, (head + 1) * group)
                    if far is None:
                        scores = accumulator(q[row, heads]) @ k.T * head_dim**-0.5  # [group, T]
                    else:
                        met = [far.met(slice(row, row + 1), b)[0, heads] for b in positions // far.shifts.block]
                        scores = (accumulator(torch.stack(met, 1)) * k).sum(-1) * head_dim**-0.5
                    scores = capped(scores, cap)
                    if lse is not None:
                        lse[row, heads] = scores.logsumexp(-1)
                    p = scores.softmax(dim=-1)
                    out[row, heads] = (p @ v).to(q.dtype)
                    if mass is not None:
                        pages = torch.from_numpy(positions // PAGE_SIZE).to(q.device)
                        mass[row, head] = mass.new_zeros(mass.shape[-1]).index_add(0, pages, p.sum(0).to(mass.dtype))
        return out


def accumulator(x: torch.Tensor) -> torch.Tensor:
    """Returns the tensor in fp32 if its own type is narrower."""
    return x if x.dtype == torch.float64 else x.float()


def visible(
    segment: AttentionSegment, layer: int, head: int, index: int, window: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions that a row attends to, ascending, and their slots in the pool, both [T] int64."""
    chosen = np.arange(len(segment.pages)) if segment.view is None else segment.view[layer, head]
    lanes = np.arange(PAGE_SIZE)
    tail = segment.tail_of(index)
    positions = np.concatenate(
        [(chosen[:, None] * PAGE_SIZE + lanes).ravel(), segment.boundary + np.arange(len(tail))], dtype=np.int64
    )
    slots = np.concatenate([(segment.pages[chosen][:, None] * PAGE_SIZE + lanes).ravel(), tail], dtype=np.int64)
    if window is not None:
        inside = positions > int(segment.positions[index]) - window
        positions, slots = positions[inside], slots[inside]
    return positions, slots


BACKEND = Naive
CAPS_SCORES = True
