"""The pages of the target's cache that draft passes see, their number, and the cost of passes that see them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tokenswift_py.core import Acceptance, Output
from tokenswift_py.drafters.base import VIEWS, Context, show
from tokenswift_py.drafters.chain import Chain, Confidence, Experience
from tokenswift_py.kvcache.base import PAGE_SIZE, EvictionPolicy, select, select_there
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.clock import Lap
from tokenswift_py.planning.costs import PassCost
from tokenswift_py.planning.planner import Gain, Plan


class View(Confidence):
    """The figures of drafting with views of so many tokens."""

    def __init__(self, tokens: int, width: int, family: Experience):
        super().__init__(width, family)
        self.tokens = tokens

    def set_text(self, text: int, temperature: float) -> None:
        """Expects the errors of a view of a text of so many tokens, most of which it leaves out."""
        self.expect(SPREAD * max(1.0, text / self.tokens) ** GROWTH, temperature)


class Views:
    """The pages that draft passes see, chosen by a policy, and the size of view that pays most.

    policy:  scores pages.
    tokens:  budget of a view; None tries VIEWS and keeps to the one that pays most.
    width:   see `Confidence`.
    refresh: committed tokens after which pages are chosen anew; they also are after a wrong guess.

    sizes:   what is known of each size of view.
    now:     the size that is used.
    cost:    cost of a draft pass, by its rows and the keys that each of them attends to.
    keys:    keys that a row of this round attends to.
    """

    def __init__(self, policy: EvictionPolicy, tokens: int | None, width: int, refresh: int, cost: PassCost | None):
        family = Experience()
        self.policy, self.refresh = policy, refresh
        self.sizes = [View(size, width, family) for size in ((tokens,) if tokens else VIEWS)]
        self.now = self.sizes[0]
        self.cost, self._alone = cost or PassCost(), cost is None
        self.cost.octaves = True
        self.keys = 0
        self._text = self._length = 0  # tokens that the cache holds in full pages, and all, when the round began
        self._round = 0
        self._chosen: PageView | None = None
        self._chosen_at = (-1, -1)  # full pages and committed tokens when the view's pages were chosen
        self._missed = False  # whether a guess under them was wrong
        self._passed = 0  # the size of the view of the latest draft pass

    def prefill(self, context: Context, output: Output | None) -> None:
        """Shows the policy rows that were committed without a draft, none where the output is None. The pages are
        chosen anew for the next draft."""
        self._chosen = None
        if output is None:
            return
        rows = len(output.hidden)
        show(self.policy, output, range(rows), context.cache.length - rows)

    def begin_round(self, context: Context) -> None:
        """Changes to the size of view that pays most by now.

        It tells the plan the rate to expect: at first in every round, later when the size may change.
        """
        self.look(context)
        self._round += 1
        self.cost.load = context.plan.load
        if self._alone:
            self.cost.shapes = tuple(context.self_draft.row_shapes)
        for size in self.sizes:
            size.set_text(self._text, context.sampler.params.temperature)
        if self._round % VIEW_ROUNDS == 0 or self._round <= VIEW_ROUNDS:
            best = self._best_size(context.plan)
            if best is not self.now:
                self.now, self._chosen = best, None
            if self.cost.measured:
                context.plan.expect_rate(self.rate(context.plan, best))
        self.keys = self._keys_of(self.now)

    def look(self, context: Context) -> None:
        """Takes in how long the text is by now."""
        self._text, self._length = held(context.cache), context.cache.length

    def _best_size(self, plan: Plan) -> View:
        """Returns, every so many rounds, the size whose drafts pay most, out of the present one and those next to
        it."""
        if self._round == 1:
            least = FIRST_VIEW * self._text**0.5
            return next((size for size in self.sizes if size.tokens >= least), self.sizes[-1])
        if self._round % VIEW_ROUNDS or not self.cost.measured:
            return self.now
        now = self.sizes.index(self.now)
        # A view that holds all of the text already gains nothing from being larger.
        fitting = [i for i in range(len(self.sizes)) if not i or self.sizes[i - 1].tokens < self._text]
        near = [self.sizes[i] for i in fitting if abs(i - now) <= 1]
        return max(near, key=lambda size: self.rate(plan, size), default=self.sizes[fitting[-1]])

    def rate(self, plan: Plan, size: View) -> float:
        """Returns the tokens per millisecond that drafting with views of this size promises."""
        return plan.best_rate(size.next, plan.draft_ms(self.cost, 1, self._keys_of(size)))

    def _keys_of(self, size: View) -> int:
        return min(size.tokens, self._text) + PAGE_SIZE // 2

    def pages(self, cache: KVCache) -> PageView | None:
        """Returns the pages of this round; None, which is all of them, where they fit the budget."""
        if held(cache) <= self.now.tokens:
            return None
        full, length = cache.full_pages, cache.length
        old = self._missed or full != self._chosen_at[0] or length >= self._chosen_at[1] + self.refresh
        if self._chosen is None or old:
            stats, budget = cache.page_stats(), self.now.tokens
            there = select_there(self.policy, stats, budget)
            self._chosen = PageView(select(self.policy, stats, budget) if there is None else there)
            self._chosen_at, self._missed = (full, length), False
        return self._chosen

    def pass_ms(self, plan: Plan, rows: int) -> float:
        """Returns what a draft pass of so many rows costs."""
        return plan.draft_ms(self.cost, rows, self.keys)

    def price(self, plan: Plan) -> float | None:
        """Returns the time that a token of the text takes, in draft passes; None where that is not known yet."""
        token_ms = plan.token_ms(1.0)
        return token_ms / self.pass_ms(plan, 1) if self.cost.measured and token_ms < math.inf else None

    def row_gain(self, saved_ms: float) -> Gain:
        """Returns the gain of one more row of a draft pass, whose guess saves so many milliseconds if it is right."""
        return lambda chance, rows: chance * saved_ms - self.cost.row_ms(rows, self.keys)

    def timed(self, rows: int, lap: Lap, agreed: Callable[[float], float], passes: int = 1) -> None:
        """Ends the lap of draft passes and learns the cost of one. The first pass of a size tells nothing, because it
        may have had many pages to copy.

        agreed: see `Context`.
        """
        if self._passed == self.now.tokens:
            lap.stop()
            self.cost.observe(rows, self.keys, agreed(lap.ms / passes))
        self._passed = self.now.tokens

    def observe(self, chain: Chain, taken: Acceptance, output: Output) -> None:
        """Learns from the part of the chain that verification took, and shows the policy the rows that were committed.

        output: output of the verify pass.
        """
        self._missed |= not self.now.learn(chain.draft, chain.nodes, taken)
        show(self.policy, output, taken.path, self._length)

    def explain(self) -> dict[str, Any]:
        """Returns what a line of the trace says of the view."""
        chosen = self._chosen
        return {
            "view_tokens": self.now.tokens,
            "view_pages": 0 if chosen is None else chosen.shape[-1],
            "view_age": None if chosen is None else self._length - self._chosen_at[1],
        }


def held(cache: KVCache) -> int:
    """Returns the tokens of the full pages that a cache still holds."""
    return (cache.full_pages - cache.evicted) * PAGE_SIZE


VIEW_ROUNDS = 8
FIRST_VIEW = 13  # times the root of the text is the least view that is tried before any cost is known (from sweeps)
SPREAD = 0.07  # spread of the errors of scores (logits) under a view of the whole text; int8 weights make them
# The spread grows by this power of text / view. Both numbers are fits with `chain.wrong` to results/acceptance.md,
# where four times the view of a text has half of the spread (four policies; powers of 0.24 to 0.89 for `mass`).
GROWTH = 0.5
