"""No draft: the pending token alone, which is plain autoregressive decoding."""

from __future__ import annotations

from tokenswift_py.core import Acceptance, DraftTree, Output
from tokenswift_py.drafters.base import Context


class NoDraft:
    name = "none"
    needs: frozenset[str] = frozenset()

    def prefill(self, context: Context, output: Output) -> None:
        pass

    def propose(self, context: Context, budget: int) -> DraftTree:
        return DraftTree.chain([context.history[-1]])

    def observe(self, taken: Acceptance, output: Output) -> None:
        pass


DRAFTER = NoDraft
