"""Three tiers: repeats of the text propose, the model over a small view of its cache checks several of them a draft
pass and goes on where they end, the full cache verifies the lot. The middle tier is TriForce's and SpecPV's idea (arXiv
2404.11912); here the walk over the full cache decides alone, so nothing is lost.
"""

from __future__ import annotations

from typing import Any

from tokenswift_py.drafters.ngram import NGram
from tokenswift_py.drafters.partial import Partial


class Cascade(Partial):
    """Each tier is used as far as the planner finds it worth its milliseconds, down to none at all."""

    name = "cascade"

    def __init__(self, shortest: int = 2, **settings: Any):
        super().__init__(**settings, reuse=NGram(shortest))


DRAFTER = Cascade
