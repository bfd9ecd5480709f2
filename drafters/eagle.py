"""EAGLE-3 drafts over a bounded window: a decoder layer of its own guesses token after token from states of the target
(Li et al. 2025, arXiv 2503.01840).

The layer attends to a text's latest rows alone. Without that bound such drafts fall below plain decoding at long
contexts, for they are trained on short ones (OWL, Lee et al. 2025, arXiv 2510.07535).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenswift_py.core import DraftTree
from tokenswift_py.decoding.passes import without_passes
from tokenswift_py.drafters.base import Context, Resources, width_of
from tokenswift_py.drafters.draft_folders import shared
from tokenswift_py.drafters.eagle_files import find_folder, read_eagle
from tokenswift_py.drafters.eagle_layer import Ahead, EagleLayer
from tokenswift_py.drafters.own_layers import Windowed
from tokenswift_py.options import Options
from tokenswift_py.planning.planner import Plan


class Eagle(Windowed):
    """A chain of the layer's guesses, chosen with the target's noise and processors, with runners-up beside it where
    they are worth a row. The chain ends where one more guess would not pay for its pass over the layer."""

    name = "eagle"

    def __init__(self, layer: EagleLayer, window: int | None = None, width: int = 3):
        super().__init__(layer, 1, window, width)
        self.layer, (self.rows,) = layer, self.windows
        self.state = torch.empty(0)  # [1, hidden] the target's at the last row that is known

    def take(self, taps: torch.Tensor, following: torch.Tensor) -> None:
        states = self.layer.fuse(taps)
        self.rows.append(*self.layer.keys_values(self.layer.inputs(following, states)[0]))
        self.state = states[-1:].clone()

    @without_passes
    def propose(self, context: Context, budget: int) -> DraftTree:
        plan = context.plan
        longest = plan.longest_chain(budget, self.width) if self.begin(context, budget) else 0
        if self.news and self._cost.measured:
            plan.expect_rate(plan.best_rate(self.chance, self._pass_ms(plan)))
        guessing = Guessing(self, budget)
        with context.history.guesses():
            while True:
                self._chain.force(context)
                if len(self._chain) >= longest or not self._pays(plan, not guessing.read):
                    break
                if self._guess(context, guessing) is None:
                    break
        return self._chain.build(context)

    def _pays(self, plan: Plan, first: bool) -> bool:
        """Returns whether the next guess pays for its pass over the layer. first: whether it is the draft's first."""
        ms = self._pass_ms(plan) + plan.row_ms(len(self._chain.draft))
        if plan.worth(self._chain.chance * self.chance, ms):
            return True
        return first and plan.may_probe(ms)

    def _pass_ms(self, plan: Plan) -> float:
        return plan.draft_ms(self._cost, 1, self.known)

    def _guess(self, context: Context, guessing: Guessing) -> int | None:
        """Computes the rows of the tokens that the draft has not read. Returns the guess of the last of them, if
        anything can be chosen."""
        guessing.begin()  # what the text has grown by since the latest draft is no part of a pass's cost
        lap = context.timer.start(context.model)
        unread = context.history.tokens[self._text - 1 + guessing.read :].tolist()
        logits = guessing.logits(unread)
        ranks = self._confidence.ranks
        token = self._chain.guess(
            self._confidence, context, lambda: context.sampler.ranked(logits, context.history, ranks)
        )
        lap.stop()
        self._cost.observe(len(unread), len(self.rows), context.agreed(lap.ms))
        return token


class Guessing:
    """The layer's rows of one proposal.

    drafter: whose rows and state are those of the text. read: how many tokens from the pending one on have their row.
    """

    def __init__(self, drafter: Eagle, budget: int):
        self.drafter, self.budget, self.read = drafter, budget, 0

    @torch.inference_mode()
    def begin(self) -> None:
        """Reads the text up to the pending token, before the first guess: a draft that does not begin costs nothing."""
        if not self.read:
            self.drafter.catch_up()
            self.ahead = Ahead(self.drafter.layer, self.drafter.rows, self.budget)
            self.state = self.drafter.state

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Computes the rows before which these tokens stand. Returns the last one's logits, [vocab]."""
        layer = self.drafter.layer
        for token in tokens:
            h = self.ahead.step(token, self.state)
            self.state = layer.handed_on(h)
        self.read += len(tokens)
        return layer.logits(h)[0]


def for_checkpoint(options: Options, resources: Resources) -> Eagle:
    """Makes the drafter of the folder that `draft_heads` names. Texts of one model share its layer."""
    folder = find_folder(resources.checkpoint, options.draft_heads)
    return Eagle(shared("eagle", folder, resources, read_eagle), options.draft_budget, **width_of(options))


create = for_checkpoint
DRAFTER = Eagle
