"""Passes of several texts in one forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from tokenswift_py.core import Model, Output, Segment
from tokenswift_py.decoding.passes import Pass
from tokenswift_py.kvcache.base import PAGE_SIZE


def begin_together(model: Model, passes: Sequence[Pass]) -> Callable[[], list[Output]]:
    """Begins passes of one model in one forward pass, and returns the function that waits for their outputs. A model
    that is not spread over a pipeline has computed them by then."""
    begin = getattr(model, "begin", None)
    if begin is None:
        outputs = together(model, passes)
        return lambda: outputs
    flight = begin(*joined(passes))
    return lambda: parted(passes, flight.wait())


def together(model: Model, passes: Sequence[Pass]) -> list[Output]:
    """Returns the outputs of passes of one model, computed in one forward pass."""
    if len(passes) == 1:
        return [passes[0].compute()]
    return parted(passes, model.forward(*joined(passes)))


def joined(passes: Sequence[Pass]) -> tuple[list[Segment], list[int] | None, bool, bool, list[int]]:
    """Returns the arguments of the forward pass that computes these passes."""
    assert all(asked.chooser is None for asked in passes), "a chain travels alone"
    starts, wanted = places(passes)
    every = all(asked.logit_rows is None for asked in passes)
    rows = None if every else [start + row for start, rows in zip(starts, wanted, strict=True) for row in rows]
    mass, queries = any(asked.want_mass for asked in passes), any(asked.want_queries for asked in passes)
    return [asked.segment for asked in passes], rows, mass, queries, tapped(passes)


def tapped(passes: Sequence[Pass]) -> list[int]:
    """Returns the layers that any of these passes reports."""
    return sorted({layer for asked in passes for layer in asked.taps})


def places(passes: Sequence[Pass]) -> tuple[list[int], list[Sequence[int]]]:
    """Returns the first row of each pass, and which of its rows' logits are wanted."""
    sizes = [len(asked.segment.tree) for asked in passes]
    starts = [0, *itertools.accumulate(sizes)][:-1]
    wanted: list[Sequence[int]] = [
        range(size) if asked.logit_rows is None else asked.logit_rows for asked, size in zip(passes, sizes, strict=True)
    ]
    return starts, wanted


def parted(passes: Sequence[Pass], whole: Output) -> list[Output]:
    """Returns the output of each pass that was computed in one forward pass."""
    outputs, logits, layers = [], 0, tapped(passes)
    for asked, start, rows in zip(passes, *places(passes), strict=True):
        own = slice(start, start + len(asked.segment.tree))
        outputs.append(
            Output(
                whole.hidden[own],
                whole.logits[logits : logits + len(rows)],
                own_mass(whole.page_mass, own, asked) if asked.want_mass else None,
                whole.queries[own] if whole.queries is not None and asked.want_queries else None,
                whole.residual[own] if whole.residual is not None else None,
                whole.turns,
                own_taps(whole.taps, own, [layers.index(layer) for layer in asked.taps]),
            )
        )
        logits += len(rows)
    return outputs


def own_taps(taps: torch.Tensor | None, own: slice, asked: list[int]) -> torch.Tensor | None:
    """Returns [rows, asked, hidden_size] of one segment's rows. asked: places of the layers that it asked for."""
    return None if taps is None or not asked else taps[own][:, asked]


def own_mass(mass: torch.Tensor | None, own: slice, asked: Pass) -> torch.Tensor | None:
    """Returns [layers, rows, kv_heads, pages] of one segment's rows, with as many pages as they would have alone."""
    if mass is None:
        return None
    segment = asked.segment
    last = segment.cache.length + len(segment.tail) + int(segment.tree.depth.max())
    return mass[:, own, :, : last // PAGE_SIZE + 1]
