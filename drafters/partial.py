"""The model drafts for itself, over a small part of its own KV cache."""

from __future__ import annotations

import time
from typing import Any

import torch

from tokenswift_py import registry
from tokenswift_py.core import Acceptance, DraftTree, Output, Segment
from tokenswift_py.drafters.base import Candidates, Context, Draft, Drafter, committed
from tokenswift_py.drafters.chain import Confidence
from tokenswift_py.drafters.ngram import NGram, Place
from tokenswift_py.errors import check
from tokenswift_py.history import History
from tokenswift_py.kvcache.base import PAGE_SIZE, select
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.planner import Planner


class View(Confidence):
    """What is known of drafting with views of so many tokens."""

    def __init__(self, tokens: int, width: int):
        super().__init__(width)
        self.tokens = tokens


class Partial(Drafter):
    """A chain of the model's own guesses under a page view, chosen with the target's noise, and runners-up of the same
    perturbed scores beside it where they are worth a row. The chain ends where one more guess would not pay for its
    pass.

    policy:      which pages are in the view.
    view_tokens: budget of the view; None tries VIEWS and keeps to the one that pays most.
    width:       guesses a node has at most, runners-up included; 1 is a plain chain.
    refresh:     committed tokens after which the view is chosen anew; it also is after a wrong guess.
    reuse:       repeats of the text that a draft pass checks several at a time.
    """

    name = "partial"

    def __init__(
        self,
        policy: str = "mass",
        view_tokens: int | None = None,
        width: int = 3,
        refresh: int = 8,
        reuse: NGram | None = None,
    ):
        check(view_tokens is None or view_tokens >= 64, "draft_budget", view_tokens, "at least 64 tokens, one page")
        check(width >= 1, "width", width, "at least 1")
        check(refresh >= 1, "refresh", refresh, "at least 1")
        self.policy = registry.create("tokenswift_py.kvcache.policies", "POLICY", "draft_policy", policy)
        self.needs = self.policy.needs
        self.width, self.refresh, self.reuse = width, refresh, reuse
        self.views = [View(tokens, width) for tokens in ((view_tokens,) if view_tokens else VIEWS)]
        self._now = self.views[0]
        self._chosen: PageView | None = None
        self._chosen_at = (-1, -1)  # full pages and committed tokens then
        self._missed = False  # a guess under it was wrong
        self._length = 0  # of the cache when the last tree was proposed
        self._round = 0
        self._draft: Draft | None = None
        self._chain: list[int] = []

    def prefill(self, context: Context, output: Output) -> None:
        self._chosen = None
        if self.reuse is not None:
            self.reuse.prefill(context, output)
        rows = len(output.hidden)
        self.policy.observe(committed(output, range(rows), context.cache.length - rows))

    def propose(self, context: Context, budget: int) -> DraftTree:
        planner, self._length = context.planner, context.cache.length
        draft = Draft(context.history[-1], budget)
        candidates = Candidates(draft)
        place = self.reuse.read(context.history) if self.reuse is not None else (0, 0)
        place = self._grow_chain(context, draft, candidates, place)
        follow = None
        if self.reuse is not None:
            follow = self.reuse.push(candidates, self._chain[-1], place)
        draft.fill(planner, lambda worth: candidates.take(worth, follow))
        self._draft = draft
        return draft.build()

    def observe(self, taken: Acceptance, output: Output) -> None:
        assert self._draft is not None
        self._draft.learn(taken)
        self._missed |= not self._now.learn(self._draft, self._chain, taken)
        self.policy.observe(committed(output, taken.path, self._length))

    def explain(self) -> dict[str, Any]:
        pages = 0 if self._chosen is None else int(self._chosen.pages.shape[-1])
        return {
            "view_tokens": self._now.tokens,
            "view_pages": pages,
            "view_age": None if self._chosen is None else self._length - self._chosen_at[1],
            "chain": len(self._chain) - 1,
            "expected_acceptance": round(self._now.next.chance, 4),
            "expected_tokens": round(sum(self._draft.chances), 3) if self._draft else None,
        }

    def _grow_chain(self, context: Context, draft: Draft, candidates: Candidates, place: Place) -> Place:
        """Guess on, pass by pass, as long as it pays. Returns where the chain's end occurred in the text before."""
        history, cache, planner = context.history, context.cache, context.planner
        start, tail = len(history), ()  # type: int, tuple[int, ...]
        self._chain = [0]
        self._choose_view_size(context)
        keys = min(self._now.tokens, self._held(context)) + PAGE_SIZE // 2
        length = (draft.budget - 1) // self.width if planner.fixed else draft.budget - 1
        cache.drop_tail()
        while len(self._chain) <= length:
            room = cache.limit - cache.length - len(tail)
            ahead = self._look_ahead(history, place, planner, keys, room)
            tree = ahead.build()
            ms = planner.draft_ms(len(ahead), keys) + planner.row_ms(len(draft))
            gain = draft.chances[self._chain[-1]] * self._gain(ahead, tree, planner, place)
            if not planner.worth(gain, ms) and (tail or not planner.may_probe(ms)):
                break
            clock = time.perf_counter()
            first = cache.tail_length
            logits = context.draft_model.forward([Segment(tree, cache, self._view(context), tail)]).logits
            rows, tokens = [0], []  # type: list[int], list[int]
            while True:
                token = self._guess(context, candidates, logits[rows[-1]], place)
                if token is None:
                    history.truncate(start)
                    return place
                tail = (*tail, first + rows[-1])
                tokens.append(token)
                place = self.reuse.step(place, tokens[-1]) if self.reuse is not None else place
                child = tree.children[rows[-1]].get(tokens[-1])
                if child is None or len(self._chain) > length:
                    break
                rows.append(child)
            ahead.learn(Acceptance(tuple(rows), tuple(tokens)))
            planner.draft.observe(len(tree), keys, 1e3 * (time.perf_counter() - clock))
        history.truncate(start)
        return place

    def _look_ahead(self, history: History, place: Place, planner: Planner, keys: int, room: int) -> Draft:
        """The last token and the repeats behind it that are likely enough to save a pass of their own, up to `room`."""
        ahead = Draft(history[-1], min(1 + AHEAD, room))
        if self.reuse is not None and planner.draft.measured:
            pass_ms = planner.draft(1, keys)
            self.reuse.extend(
                ahead,
                place,
                lambda chance: chance * pass_ms > planner.draft(len(ahead) + 1, keys) - planner.draft(len(ahead), keys),
            )
        return ahead

    def _gain(self, ahead: Draft, tree: DraftTree, planner: Planner, place: Place) -> float:
        """Tokens that one more draft pass should bring, less those that repeats would bring without it, if the text
        comes as far as the chain does.

        A pass makes a guess at its first row, and at each row behind it that the guesses lead to.
        """
        chance = self._now.next.chance
        if self.reuse is None or planner.fixed:
            return chance
        gain = sum(c * chance ** (1 + int(depth)) for c, depth in zip(ahead.chances, tree.depth, strict=True))
        free = Draft(ahead.tokens[0], FREE)
        self.reuse.extend(free, place, lambda chance: planner.worth_row(chance, len(free)))
        return float(gain - (sum(free.chances) - 1))

    def _guess(self, context: Context, candidates: Candidates, logits: torch.Tensor, place: Place) -> int | None:
        """One more token of the chain, as `Confidence.guess` finds it."""
        reuse = self.reuse
        more = None if reuse is None else lambda other: reuse.step(place, other)
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
        """Every so many rounds: the size whose drafts pay most, as far as is known; one that was never tried first."""
        self._round += 1
        if len(self.views) == 1 or self._round % VIEW_ROUNDS or not context.planner.draft.measured:
            return
        planner, text = context.planner, self._held(context)
        fitting = [view for i, view in enumerate(self.views) if not i or self.views[i - 1].tokens < text]

        hopes: list[float] = []
        for view in fitting:  # a larger view never tried is hoped to miss fewer guesses than the smaller one before it
            hopes.append(view.next.hope if view.next.tried or not hopes else 1 - HOPE * (1 - hopes[-1]))

        def rate(i: int) -> float:
            return planner.best_rate(hopes[i], planner.draft_ms(1, min(fitting[i].tokens, text) + PAGE_SIZE // 2))

        best = fitting[max(range(len(fitting)), key=rate)]
        if best is not self._now:
            self._now, self._chosen = best, None


VIEWS = (1024, 2048, 4096, 8192)  # tokens
VIEW_ROUNDS = 8
HOPE = 0.6  # of the wrong guesses of a view, those still wrong under the next larger one
AHEAD = 6  # repeats checked by one draft pass
FREE = 17  # nodes, the root included, of the repeats that a draft pass is weighed against

DRAFTER = Partial
