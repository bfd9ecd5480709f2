"""Drafts in tiers.

Repeats of the text and heads propose. The model over a small view of its cache checks several guesses a draft pass, and
goes on where they end. The full cache verifies all of them. The middle tier is TriForce's and SpecPV's idea (arXiv
2404.11912). Here the walk over the full cache decides alone, so nothing is lost.
"""

from __future__ import annotations

from typing import Any

from tokenswift_py.drafters.base import Drafter, Resources, width_of
from tokenswift_py.drafters.heads import Heads, with_own_layers
from tokenswift_py.drafters.heads import for_checkpoint as heads_for
from tokenswift_py.drafters.ngram import NGram
from tokenswift_py.drafters.partial import Partial
from tokenswift_py.errors import check
from tokenswift_py.options import Options


class Cascade(Partial):
    """Each tier is used as far as the planner finds it worth its milliseconds, down to none at all."""

    name = "cascade"

    def __init__(self, shortest: int = 2, heads: Heads | None = None, **settings: Any):
        super().__init__(**settings, reuse=NGram(shortest), heads=heads)


def create(options: Options, resources: Resources) -> Drafter:
    """Makes the drafter, with heads where they are asked for. Those of the default model do not pay beside the other
    tiers (`results/ablations.md`). A draft with layers of its own is another drafter, which
    auto then means.

    Raises UserError where there are no such heads.
    """
    named = options.draft_heads
    if (other := with_own_layers(options, resources)) is not None:
        check(options.drafter == "auto", "draft_heads", named, f"this draft is for drafter {other.name}, heads or auto")
        return other
    heads = None if named is None else heads_for(resources, named)
    settings = {"policy": options.draft_policy, "view_tokens": options.draft_budget, **width_of(options)}
    return Cascade(heads=heads, cost=resources.draft_cost, **settings)


DRAFTER = Cascade
