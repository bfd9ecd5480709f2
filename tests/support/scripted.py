"""A drafter whose acceptance is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenswift_py.core import Acceptance, DraftTree, Output, TreeBuilder
from tokenswift_py.decoding.passes import without_passes
from tokenswift_py.drafters.base import Context, Drafter
from toys import write as write


class Scripted(Drafter):
    """Drafts random trees in which the right path is planted at random.

    truth: every token of the text by plain decoding, prompt included.
    right: chance that a level of the tree holds the true token.
    """

    name = "scripted"
    needs: frozenset[str] = frozenset()

    def __init__(self, truth: Sequence[int], vocab: int, right: float, width: int = 3, seed: int = 0):
        self.truth, self.vocab, self.right, self.width = list(truth), vocab, right, width
        self.rng = np.random.default_rng(seed)

    @without_passes
    def prefill(self, context: Context, output: Output) -> None:
        pass

    @without_passes
    def propose(self, context: Context, budget: int) -> DraftTree:
        assert context.history.tokens.tolist() == self.truth[: len(context.history)]
        builder, node = TreeBuilder(context.history[-1], budget), 0
        for position in range(len(context.history), len(self.truth)):
            wrong = [t for t in self.rng.permutation(self.vocab).tolist() if t != self.truth[position]]
            level = wrong[: self.width]
            if self.rng.random() < self.right:
                level[self.rng.integers(len(level))] = self.truth[position]
            children = [builder.add(node, token) for token in level]
            if self.truth[position] in level and children[level.index(self.truth[position])] is not None:
                node = children[level.index(self.truth[position])] or 0
            elif not any(children):
                break
            else:
                node = next(child for child in children if child)
        return builder.build()

    def observe(self, taken: Acceptance, output: Output) -> None:
        pass
