"""Passes of several texts in one forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from tokenswift_py.core import Model, Output
from tokenswift_py.decoding.passes import Pass
from tokenswift_py.kvcache.base import PAGE_SIZE


def together(model: Model, passes: Sequence[Pass]) -> list[Output]:
    """Returns the outputs of passes of one model, computed in one forward pass."""
    if len(passes) == 1:
        return [passes[0].compute()]
    sizes = [len(asked.segment.tree) for asked in passes]
    starts = [0, *itertools.accumulate(sizes)]
    wanted: list[Sequence[int]] = [
        range(size) if asked.logit_rows is None else asked.logit_rows for asked, size in zip(passes, sizes, strict=True)
    ]
    every = all(asked.logit_rows is None for asked in passes)
    whole = model.forward(
        [asked.segment for asked in passes],
        None if every else [start + row for start, rows in zip(starts, wanted, strict=False) for row in rows],
        want_mass=any(asked.want_mass for asked in passes),
        want_queries=any(asked.want_queries for asked in passes),
    )
    outputs, logits = [], 0
    for asked, start, size, rows in zip(passes, starts, sizes, wanted, strict=False):
        own = slice(start, start + size)
        outputs.append(
            Output(
                whole.hidden[own],
                whole.logits[logits : logits + len(rows)],
                own_mass(whole.page_mass, own, asked) if asked.want_mass else None,
                whole.queries[own] if whole.queries is not None and asked.want_queries else None,
                whole.residual[own] if whole.residual is not None else None,
                whole.turns,
            )
        )
        logits += len(rows)
    return outputs


def own_mass(mass: torch.Tensor | None, own: slice, asked: Pass) -> torch.Tensor | None:
    """Returns [layers, rows, kv_heads, pages] of one segment's rows, with as many pages as they would have alone."""
    if mass is None:
        return None
    segment = asked.segment
    last = segment.cache.length + len(segment.tail) + int(segment.tree.depth.max())
    return mass[:, own, :, : last // PAGE_SIZE + 1]
