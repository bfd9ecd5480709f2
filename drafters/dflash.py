"""DFlash drafts over a bounded window: a few decoder layers of their own guess a block of tokens in one pass (Chen et
al. 2026, arXiv 2602.06036).

The layers attend to a text's latest rows, for the reason that `eagle` does.
"""

from __future__ import annotations

from functools import partial

import torch

from tokenswift_py.core import DraftTree
from tokenswift_py.decoding.passes import without_passes
from tokenswift_py.drafters.base import Context, Resources, width_of
from tokenswift_py.drafters.dflash_layers import DFlashLayers, read_dflash
from tokenswift_py.drafters.draft_folders import FIELD, folder_for, shared
from tokenswift_py.drafters.own_layers import Windowed
from tokenswift_py.errors import check
from tokenswift_py.options import Options
from tokenswift_py.planning.planner import Plan


class DFlash(Windowed):
    """A chain of the block's guesses, each chosen with the target's noise and processors at its position, with
    runners-up beside it where they are worth a row. Nothing is guessed where the block's pass would not pay."""

    name = "dflash"
    runs_target = True

    def __init__(self, layers: DFlashLayers, window: int | None = None, width: int = 3):
        super().__init__(layers, layers.shape.layers, window, width)
        self.layers = layers

    def take(self, taps: torch.Tensor, following: torch.Tensor) -> None:
        states = self.layers.fuse(taps)
        for layer, window in enumerate(self.windows):
            window.append(*self.layers.keys_values(layer, states))

    @without_passes
    def propose(self, context: Context, budget: int) -> DraftTree:
        plan, longest = context.plan, 0
        if self.begin(context, budget):
            longest = min(plan.longest_chain(budget, self.width), self.layers.shape.block - 1)
        with context.history.guesses():
            self._chain.force(context)
            forced = len(self._chain)
            wanted = self._wanted(plan, longest - forced)
            if wanted:
                self._guess(context, forced, wanted)
        return self._chain.build(context)

    def _wanted(self, plan: Plan, most: int) -> int:
        """Returns how many guesses of a block are worth a row of the target, 0 where the block's pass does not pay."""
        chance, rows, tokens, ms, wanted = self.chance, len(self._chain.draft), 0.0, 0.0, 0
        reached = self._chain.chance
        while wanted < most and (not wanted or plan.gain_ms(reached * chance, rows + wanted) > 0):
            reached *= chance
            tokens += reached
            ms += plan.row_ms(rows + wanted)
            wanted += 1
        if not wanted:
            return 0
        pass_ms = plan.draft_ms(self._cost, wanted, self.known)
        if self._cost.measured:
            plan.expect_rate((1 + tokens) / max(pass_ms + plan.target_ms(1 + wanted), 1e-9))
        return wanted if plan.worth(tokens, pass_ms + ms) or plan.may_probe(pass_ms + ms) else 0

    @torch.inference_mode()
    def _guess(self, context: Context, forced: int, count: int) -> None:
        """Grows the chain by up to `count` guesses of one block. forced: its first tokens, which a grammar forced."""
        self.catch_up()  # no part of a pass's cost
        lap = context.timer.start(context.model)
        states = self.layers.guess(self.windows, context.history[self._text - 1])
        logits = context.self_draft.project(states[forced : forced + count])
        ranks = self._confidence.ranks
        for row in logits:
            ranked = partial(context.sampler.ranked, row, context.history, ranks)
            if self._chain.guess(self._confidence, context, ranked) is None:
                break
        lap.stop()
        self._cost.observe(count, len(self.windows[0]), context.agreed(lap.ms))


def for_checkpoint(options: Options, resources: Resources) -> DFlash:
    """Makes the drafter of the folder that `draft_heads` names. Texts of one model share its layers."""
    named = options.draft_heads
    check(named not in (None, "auto"), FIELD, named, "for drafter dflash the folder of a DFlash draft")
    assert named is not None
    folder = folder_for("dflash", named)
    return DFlash(shared("dflash", folder, resources, read_dflash), options.draft_budget, **width_of(options))


create = for_checkpoint
DRAFTER = DFlash
