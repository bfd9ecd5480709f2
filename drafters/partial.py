"""The model drafts for itself, over a small part of its own KV cache."""

from __future__ import annotations

from typing import Any

import torch

from tokenswift_py import registry
from tokenswift_py.core import Acceptance, DraftTree, Output, Segment
from tokenswift_py.drafters.base import VIEWS, Candidates, Context, Draft, Drafter, Resources, committed, width_of
from tokenswift_py.drafters.chain import Confidence, Experience
from tokenswift_py.drafters.heads import Gain, Heads
from tokenswift_py.drafters.ngram import Match, NGram
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE, select
from tokenswift_py.kvcache.pages import SPARE_PAGES
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.options import POLICIES, Options
from tokenswift_py.planning.planner import Planner


class View(Confidence):
    """What is known of drafting with views of so many tokens."""

    def __init__(self, tokens: int, width: int, family: Experience):
        super().__init__(width, family)
        self.tokens = tokens

    def set_text(self, text: int, temperature: float) -> None:
        """A text of so many tokens, most of which the view leaves out."""
        self.expect(SPREAD * max(1.0, text / self.tokens) ** GROWTH, temperature)


class Partial(Drafter):
    """A chain of the model's own guesses under a page view, chosen with the target's noise, and runners-up of the same
    perturbed scores beside it where they are worth a row. The chain ends where one more guess would not pay for its
    pass.

    policy:      which pages are in the view.
    view_tokens: budget of the view; None tries VIEWS and keeps to the one that pays most.
    width:       guesses a node has at most, runners-up included; 1 is a plain chain.
    refresh:     committed tokens after which the view is chosen anew; it also is after a wrong guess.
    reuse:       repeats of the text that a draft pass checks several at a time.
    heads:       guess what follows the last row of a pass, for the next draft pass to check, or for the target.
    """

    name = "partial"
    runs_target = sees_views = True

    def __init__(
        self,
        policy: str = "mass",
        view_tokens: int | None = None,
        width: int = 3,
        refresh: int = 8,
        reuse: NGram | None = None,
        heads: Heads | None = None,
    ):
        check(view_tokens is None or view_tokens >= 64, "draft_budget", view_tokens, "at least 64 tokens, one page")
        check(width >= 1, "width", width, "at least 1")
        check(refresh >= 1, "refresh", refresh, "at least 1")
        self.policy = registry.create(POLICIES, "POLICY", "draft_policy", policy)
        self.needs = self.policy.needs
        self.width, self.refresh, self.reuse, self.heads = width, refresh, reuse, heads
        family = Experience()
        self.views = [View(tokens, width, family) for tokens in ((view_tokens,) if view_tokens else VIEWS)]
        self._now = self.views[0]
        self._chosen: PageView | None = None
        self._chosen_at = (-1, -1)  # full pages and committed tokens then
        self._missed = False  # a guess under it was wrong
        self._passed = 0  # view tokens of the latest draft pass
        self._length = 0  # of the cache when the last tree was proposed
        self._round = 0
        self._draft: Draft | None = None
        self._chain: list[int] = []
        self._row: torch.Tensor | None = None  # what heads read of the row that gave the latest token

    def prefill(self, context: Context, output: Output) -> None:
        self._chosen = None
        if self.reuse is not None:
            self.reuse.prefill(context, output)
        rows = len(output.hidden)
        self._see(output, -1)
        self.policy.observe(committed(output, range(rows), context.cache.length - rows))

    def propose(self, context: Context, budget: int) -> DraftTree:
        planner, history, self._length = context.planner, context.history, context.cache.length
        draft = Draft(history[-1], budget)
        candidates = Candidates(draft)
        match = self.reuse.read(history) if self.reuse is not None else (0, 0)
        with history.guesses():
            match = self._grow_chain(context, draft, candidates, match)
            if self.heads is not None and self._row is not None:
                gain = Gain(next_chance(self._repeats(draft, planner, match)), planner.gain_ms)
                self.heads.extend(draft, self._chain[-1], self._row, context, gain)
        follow = None
        if self.reuse is not None:
            follow = self.reuse.push(candidates, self._chain[-1], match)
        draft.fill(planner, lambda worth: candidates.take(worth, follow))
        draft.force_last(context)
        self._draft = draft
        return draft.build()

    def observe(self, taken: Acceptance, output: Output) -> None:
        assert self._draft is not None
        self._draft.learn(taken)
        self._missed |= not self._now.learn(self._draft, self._chain, taken)
        self._see(output, taken.path[-1])
        self.policy.observe(committed(output, taken.path, self._length))

    def alike(self) -> object:
        return None if self.heads is None else self.heads.alike()

    def _see(self, output: Output, row: int) -> None:
        if self.heads is not None:
            self._row = self.heads.weights.reads(output, row)

    def explain(self) -> dict[str, Any]:
        pages = 0 if self._chosen is None else int(self._chosen.pages.shape[-1])
        return {
            "view_tokens": self._now.tokens,
            "view_pages": pages,
            "view_age": None if self._chosen is None else self._length - self._chosen_at[1],
            "chain": len(self._chain) - 1,
            "expected_acceptance": round(self._now.next, 4),
            "expected_tokens": round(sum(self._draft.chances), 3) if self._draft else None,
        }

    def _grow_chain(self, context: Context, draft: Draft, candidates: Candidates, match: Match) -> Match:
        """Guess on, pass by pass, as long as it pays; the history grows with the chain. Returns where the chain's end
        occurred in the text before."""
        cache, planner = context.cache, context.planner
        tail: tuple[int, ...] = ()
        self._chain = [0]
        self._choose_view_size(context)
        keys = min(self._now.tokens, self._held(context)) + PAGE_SIZE // 2
        length = (draft.budget - 1) // self.width if planner.fixed else draft.budget - 1
        cache.drop_tail()
        while True:
            match = self._force(context, draft, match)
            if len(self._chain) > length:
                break
            # The last token and, before it, those that a grammar forced, which have no row yet either.
            unread = context.history.tokens[cache.length + len(tail) :].tolist()
            rejected = cache.tail_length - len(tail)  # rows, which take room as well
            room = min(cache.limit - cache.length - len(tail), 1 + SPARE_PAGES * PAGE_SIZE - rejected) - len(unread) + 1
            if room < 1:
                break
            ahead = self._look_ahead(context, match, keys, room)
            ms = planner.draft_ms(len(ahead) + len(unread) - 1, keys)
            if not self._pays(draft, ahead, ms, planner, match) and (tail or not planner.may_probe(ms)):
                break
            tree = self._ask_heads(context, draft, ahead, keys).build().below(unread[:-1])
            lap = context.draft_model.clock.start()
            first, last = cache.tail_length, len(unread) - 1
            output = context.draft_model.forward([Segment(tree, cache, self._view(context), tail)])
            tail = (*tail, *range(first, first + last))
            rows, tokens = [last], []  # type: list[int], list[int]
            while True:
                token = self._guess(context, candidates, output.logits[rows[-1]], match)
                if token is None:
                    self._row = None
                    return match
                tail = (*tail, first + rows[-1])
                tokens.append(token)
                match = self.reuse.step(match, tokens[-1]) if self.reuse is not None else match
                child = tree.children[rows[-1]].get(tokens[-1])
                if child is None or len(self._chain) > length:
                    break
                rows.append(child)
            ahead.learn(Acceptance(tuple(row - last for row in rows), tuple(tokens)))
            self._see(output, rows[-1])
            if self._passed == self._now.tokens:  # the first pass of a size may have many pages to copy
                lap.stop()  # behind the guesses, which cost as much every time
                planner.draft.observe(len(tree), keys, lap.ms)
            self._passed = self._now.tokens
        return match

    def _force(self, context: Context, draft: Draft, match: Match) -> Match:
        """What a grammar forces joins the chain without a pass. Returns where its end occurred in the text before."""
        for node in draft.force(context, self._chain[-1]):
            self._chain.append(node)
            self._row = None  # of the row that gives the latest token nothing is known
            match = self.reuse.step(match, draft.tokens[node]) if self.reuse is not None else match
        return match

    def _look_ahead(self, context: Context, match: Match, keys: int, room: int) -> Draft:
        """The last token and the repeats behind it that are likely enough to save a pass of their own, up to `room`."""
        planner = context.planner
        ahead = Draft(context.history[-1], min(1 + AHEAD, room))
        if self.reuse is not None and planner.draft.measured:
            pass_ms = planner.draft(1, keys)
            self.reuse.extend(
                ahead,
                match,
                lambda chance: chance * pass_ms > planner.draft(len(ahead) + 1, keys) - planner.draft(len(ahead), keys),
            )
        return ahead

    def _pays(self, draft: Draft, ahead: Draft, ms: float, planner: Planner, match: Match) -> bool:
        """Whether one more draft pass of so many milliseconds saves more time than repeats would without it.

        A pass makes a guess at its first row, and at each row behind it that the guesses lead to.
        """
        if planner.fixed:
            return True
        path, rows, chance = draft.chances[self._chain[-1]], len(draft), self._now.next
        tokens = 0.0
        for c, depth in zip(ahead.chances, ahead.build().depth.tolist(), strict=True):
            tokens += path * c * chance ** (1 + depth)
            ms += c * planner.shared_row_ms(rows + depth)
        free = self._repeats(draft, planner, match).chances[1:]
        return planner.token_ms(tokens) - ms > sum(planner.gain_ms(path * c, rows + i) for i, c in enumerate(free))

    def _repeats(self, draft: Draft, planner: Planner, match: Match) -> Draft:
        """Those behind the chain's end that are worth the target's rows without a draft pass."""
        end, rows = self._chain[-1], len(draft)
        free = Draft(draft.tokens[end], min(MOST_REPEATS, 1 + draft.budget - rows))
        if self.reuse is not None:
            path = draft.chances[end]
            self.reuse.extend(free, match, lambda chance: planner.worth_row(path * chance, rows + len(free) - 1))
        return free

    def _ask_heads(self, context: Context, draft: Draft, ahead: Draft, keys: int) -> Draft:
        """More for a draft pass to check, where it saves more time in passes than it takes.

        A right guess brings the token behind it, too. That saves a pass where one would have been made for it, and is
        never worth more than the token.
        """
        if self.heads is not None and self._row is not None:
            planner, cost = context.planner, context.planner.draft
            chance_behind = draft.chances[self._chain[-1]] * self._now.next**2
            saved_ms = min(cost(1, keys), planner.gain_ms(chance_behind, len(draft) + 1))

            def gain_ms(chance: float, rows: int) -> float:
                return chance * saved_ms - (cost(rows + 1, keys) - cost(rows, keys))

            self.heads.extend(ahead, 0, self._row, context, Gain(next_chance(ahead), gain_ms))
        return ahead

    def _guess(self, context: Context, candidates: Candidates, logits: torch.Tensor, match: Match) -> int | None:
        """One more token of the chain, as `Confidence.guess` finds it."""
        reuse = self.reuse
        more = None if reuse is None else lambda other: reuse.step(match, other)
        node = self._now.guess(context, candidates, self._chain[-1], logits, more)
        if node is None:
            return None
        self._chain.append(node)
        return candidates.draft.tokens[node]

    def _view(self, context: Context) -> PageView | None:
        """The pages of this round; None, which is all of them, where they fit the budget."""
        cache = context.cache
        pages, length = cache.full_pages, cache.length
        if self._held(context) <= self._now.tokens:
            return None
        old = self._missed or pages != self._chosen_at[0] or length >= self._chosen_at[1] + self.refresh
        if self._chosen is None or old:
            chosen = PageView(select(self.policy, cache.page_stats(), self._now.tokens))
            self._chosen, self._chosen_at, self._missed = chosen, (pages, length), False
        return self._chosen

    @staticmethod
    def _held(context: Context) -> int:
        """Tokens of the full pages that the target's cache still holds."""
        return (context.cache.full_pages - context.cache.evicted) * PAGE_SIZE

    def _choose_view_size(self, context: Context) -> None:
        """Every so many rounds: the size whose drafts pay most, of the present one and those next to it; and tell the
        planner what it promises, at first in every round."""
        planner, text = context.planner, self._held(context)
        for view in self.views:
            view.set_text(text, context.sampler.params.temperature)
        self._round += 1
        often = self._round % VIEW_ROUNDS == 0
        if not (often or self._round <= VIEW_ROUNDS):
            return

        def rate(i: int) -> float:
            keys = min(self.views[i].tokens, text) + PAGE_SIZE // 2
            return planner.best_rate(self.views[i].next, planner.draft_ms(1, keys))

        best = now = self.views.index(self._now)
        if self._round == 1:
            best = sum(view.tokens < FIRST_VIEW * text**0.5 for view in self.views[:-1])
        elif often and planner.draft.measured:
            # one that holds all of the text already gains nothing from being larger
            fitting = [i for i, view in enumerate(self.views) if not i or self.views[i - 1].tokens < text]
            best = max((i for i in fitting if abs(i - now) <= 1), key=rate, default=fitting[-1])
        if best != now:
            self._now, self._chosen = self.views[best], None
        if planner.draft.measured:
            planner.expect_rate(rate(best))


def next_chance(draft: Draft) -> float:
    """That the token behind a draft's root is among its guesses."""
    return sum(chance for chance, parent in zip(draft.chances, draft.parents, strict=True) if parent == 0)


VIEW_ROUNDS = 8
FIRST_VIEW = 13  # times the root of the text: the least view that is tried before any cost is known, as sweeps had it
SPREAD = 0.11  # of the errors of scores under a view of the whole text (logits), which then are those of int8 weights
GROWTH = 0.7  # by this power of text / view; both fitted with `chain.wrong`
AHEAD = 6  # repeats checked by one draft pass
MOST_REPEATS = 17  # nodes, the root included, of the repeats that a draft pass is weighed against


def create(options: Options, resources: Resources) -> Partial:
    return Partial(options.draft_policy, options.draft_budget, **width_of(options))


DRAFTER = Partial
