"""What drafters share that guess token after token by the target's own noise: how sure a guess is, what it is worth."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from tokenswift_py.core import Acceptance
from tokenswift_py.drafters.base import Candidates, Context, Draft
from tokenswift_py.planner import Odds
from tokenswift_py.sampling import NumericsError


class Confidence:
    """How often the guesses of one draft are right.

    The lead of a guess's perturbed score over the next one's says how sure the draft is of it. Target and draft share
    their noise, so only the error of the draft's scores can make it wrong, and a large lead outlives that.

    width: guesses a node has at most, runners-up included.
    """

    def __init__(self, width: int):
        self.width = width
        self.first = [Odds(1 - 0.45 * 0.6**i) for i in range(len(LEADS) + 1)]
        self.others = [[Odds(0.25 * 0.6**i / rank) for i in range(len(LEADS) + 1)] for rank in range(1, width)]
        self.next = Odds(0.9)  # of a guess not made yet

    def guess(
        self,
        context: Context,
        candidates: Candidates,
        end: int,
        logits: torch.Tensor,
        more: Callable[[int], Any] | None = None,
    ) -> int | None:
        """The best token behind node `end` becomes its child and joins the history, the runners-up become candidates
        beside it. Returns the child; None for logits that nobody can choose from: whether the text comes that far is
        for the target to say.

        more: what a candidate's token brings along, see `Candidates.push`.
        """
        try:
            ranked = context.sampler.ranked(logits, context.history, max(2, self.width))
        except NumericsError:
            return None
        lead = bisect(LEADS, ranked[0][1] - ranked[1][1]) if len(ranked) > 1 else len(LEADS)
        token = ranked[0][0]
        node = candidates.draft.guess(end, token, self.first[lead])
        assert node is not None
        for rank, (other, score) in enumerate(ranked[1 : self.width]):
            odds = self.others[rank][bisect(LEADS, ranked[0][1] - score)]
            candidates.push(end, other, odds, None if more is None else more(other))
        context.history.append(token)
        return node

    def learn(self, draft: Draft, chain: Sequence[int], taken: Acceptance) -> bool:
        """Count the guesses of a chain that were put to the test; whether all of them were right.

        chain: its nodes, the root first.
        """
        for node, guess in pairwise(chain):
            if node not in taken.after:
                break
            right = draft.tokens[guess] == taken.after[node]
            self.next.learn(right)
            if not right:
                return False
        return True


LEADS = (0.05, 0.15, 0.3, 0.6, 1.0, 1.6, 2.5, 4.0)  # of perturbed scores, in units of logit / temperature
