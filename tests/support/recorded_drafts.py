"""A drafter that keeps what it proposes."""

from __future__ import annotations

from typing import Any

from tokenswift_py.core import DraftTree
from tokenswift_py.decoding.passes import Passes
from tokenswift_py.drafters.base import Context, Drafter


class Recorded(Drafter):
    """Keeps every proposal of the drafter that stands behind it in a class's bases, with the text before it."""

    def __init__(self, *settings: Any, **named: Any):
        super().__init__(*settings, **named)
        self.seen: list[tuple[list[int], list[int]]] = []

    def propose(self, context: Context, budget: int) -> Passes[DraftTree]:
        text = context.history.tokens.tolist()
        tree = yield from super().propose(context, budget)
        self.seen.append((text, tree.tokens.tolist()))
        return tree
