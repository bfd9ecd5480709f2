"""Three tiers: repeats of the text and heads propose, the model over a small view of its cache checks several guesses a
draft pass and goes on where they end, the full cache verifies the lot. The middle tier is TriForce's and SpecPV's idea
(arXiv 2404.11912); here the walk over the full cache decides alone, so nothing is lost.
"""

from __future__ import annotations

from typing import Any

from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.drafters.heads import Heads
from tokenswift_py.drafters.heads import for_checkpoint as heads_for
from tokenswift_py.drafters.ngram import NGram
from tokenswift_py.drafters.partial import Partial


class Cascade(Partial):
    """Each tier is used as far as the planner finds it worth its milliseconds, down to none at all."""

    name = "cascade"

    def __init__(self, shortest: int = 2, heads: Heads | None = None, **settings: Any):
        super().__init__(**settings, reuse=NGram(shortest), heads=heads)


def for_checkpoint(checkpoint: Checkpoint | None = None, path: str | None = None, **settings: Any) -> Cascade:
    """The drafter with the heads that `path` names, see `heads.find_heads`; with none for None: those of the default
    model do not pay beside the other tiers (`results/ablations.md`). Raises UserError where there are no such heads."""
    heads = None if checkpoint is None or path is None else heads_for(checkpoint, path)
    return Cascade(heads=heads, **settings)


DRAFTER = for_checkpoint
