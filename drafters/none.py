"""No draft. The tree is the pending token alone, which is plain autoregressive decoding."""

from __future__ import annotations

from tokenswift_py.core import DraftTree
from tokenswift_py.decoding.passes import without_passes
from tokenswift_py.drafters.base import Context, Drafter


class NoDraft(Drafter):
    name = "none"

    @without_passes
    def propose(self, context: Context, budget: int) -> DraftTree:
        return DraftTree.chain([context.history[-1]])


DRAFTER = NoDraft
