"""What a drafter is; the registry is this folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tokenswift_py import registry
from tokenswift_py.core import Acceptance, DraftTree, Model, Output
from tokenswift_py.history import History
from tokenswift_py.kvcache.base import Committed, FloatArray
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.sampling import Sampler


@dataclass(frozen=True)
class Context:
    """What a drafter may look at. The last token of `history` is pending: it is the root of the next tree, and the
    cache holds everything before it.

    draft_model: the model with the draft's weights, over the same cache; none of its rows can be committed.

    A drafter may push guesses onto the history (to see their processed logits) and write provisional rows into the
    cache; it must cut the history back before it returns. It never commits.
    """

    history: History
    cache: KVCache
    model: Model
    sampler: Sampler
    draft_model: Model


class Drafter(Protocol):
    """Proposes trees and owns whatever state that takes. It changes how fast a text is written, never the text.

    needs: of "mass" and "queries", what the passes it sees the output of must report.
    """

    name: str
    needs: frozenset[str]

    def prefill(self, context: Context, output: Output) -> None:
        """The history has grown by tokens that no tree proposed; `output` is of the last rows that were committed
        before the pending token, up to `engine.SEEN_ROWS` of them."""

    def propose(self, context: Context, budget: int) -> DraftTree:
        """A tree of at most `budget` nodes (at least 1) hanging from the pending token."""

    def observe(self, taken: Acceptance, output: Output) -> None:
        """What verification took from the last proposal, and the pass that said so."""


def committed(output: Output, rows: Sequence[int], start: int) -> Committed:
    """What a policy learns from: those rows of a pass that were committed, at positions `start` and on.

    Views of the output where the rows are its first ones (every chunk of a prefill, every chain), else copies.
    """
    first = list(rows) == list(range(len(rows)))
    kept = slice(len(rows)) if first else list(rows)
    mass, queries = (None if x is None else host_array(x) for x in (output.page_mass, output.queries))
    return Committed(
        start, len(rows), None if mass is None else mass[:, kept], None if queries is None else queries[kept]
    )


def host_array(x: torch.Tensor) -> FloatArray:
    """On the CPU, in a type that numpy has."""
    array: FloatArray = (x if x.dtype == torch.float64 else x.float()).cpu().numpy()
    return array


def create(name: str, **settings: Any) -> Drafter:
    """The drafter called `name`. Raises UserError for a name that no file carries."""
    drafter: Drafter = registry.create("tokenswift_py.drafters", "DRAFTER", "drafter", name, **settings)
    return drafter
