"""Drafts with the model itself, over a small part of its own KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tokenswift_py import registry
from tokenswift_py.core import Acceptance, Chooser, DraftTree, IntArray, Output, Segment
from tokenswift_py.decoding.passes import Pass, Passes, without_passes
from tokenswift_py.drafters.base import Context, Draft, Drafter, Resources, width_of
from tokenswift_py.drafters.chain import Chain, Ranked
from tokenswift_py.drafters.heads import Heads
from tokenswift_py.drafters.ngram import Match, NGram
from tokenswift_py.drafters.views import Views
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import MOST_LINKS, PAGE_SIZE, EvictionPolicy
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import SPARE_PAGES
from tokenswift_py.options import POLICIES, Options
from tokenswift_py.planning.costs import PassCost
from tokenswift_py.planning.vocabulary import DraftVocabulary


class OwnChain(Chain):
    """A chain that grows by draft passes over the target's cache.

    match: place where its end occurred in the text before.
    tail:  the provisional rows of the cache that hold its tokens, except the last one's.
    """

    def __init__(self, pending: int, budget: int, match: Match):
        super().__init__(pending, budget)
        self.match = match
        self.tail: tuple[int, ...] = ()

    def room(self, cache: KVCache) -> int:
        """Returns the rows that the next draft pass may have. Rows of wrong guesses take room as well."""
        rejected = cache.tail_length - len(self.tail)
        return min(cache.limit - cache.length - len(self.tail), 1 + SPARE_PAGES * PAGE_SIZE - rejected)


class Partial(Drafter):
    """A chain of the model's own guesses under a page view, chosen with the target's noise, with runners-up of the same
    perturbed scores beside it where they are worth a row. The chain ends where one more guess would not pay for its
    pass.

    policy:      decides which pages are in the view.
    view_tokens: budget of the view; None tries VIEWS and keeps to the one that pays most.
    width:       guesses a node has at most, runners-up included; 1 is a plain chain.
    refresh:     committed tokens after which the view is chosen anew; it also is after a wrong guess.
    reuse:       repeats of the text that a draft pass checks several at a time.
    heads:       heads that guess what follows the last row of a pass, for the next draft pass to check, or for the
                 target.
    cost:        cost of draft passes, where that is known.
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
        cost: PassCost | None = None,
    ):
        check(view_tokens is None or view_tokens >= 64, "draft_budget", view_tokens, "at least 64 tokens, one page")
        check(width >= 1, "width", width, "at least 1")
        check(refresh >= 1, "refresh", refresh, "at least 1")
        chosen: EvictionPolicy = registry.create(POLICIES, "POLICY", "draft_policy", policy)
        self._policy_needs, self._resting = chosen.needs, False
        self.width, self.reuse, self.heads = width, reuse, heads
        self.views = Views(chosen, view_tokens, width, refresh, cost)
        self._chain = Chain(0, 1)  # the chain of the last proposal
        self._idle = 0  # how many rounds ago the latest draft pass was
        self._vocabulary: DraftVocabulary | None = None  # that of draft passes, and how much of the text it has read
        self._read = 0
        self._price: float | None = None  # the time that a token of the text takes, in draft passes
        self._row: torch.Tensor | None = None  # the state that heads read from the row that gave the latest token

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the policy has to be shown; nothing while the company rests (see `Probes.rests`). Then it goes on with
        what it has seen before."""
        return frozenset() if self._resting else self._policy_needs

    @without_passes
    def prefill(self, context: Context, output: Output) -> None:
        resting, self._resting = self._resting, False
        if self.reuse is not None:
            self.reuse.read(context.history)
        self._see(output, -1)
        self.views.prefill(context, None if resting else output)

    def read_ahead(self, tokens: IntArray) -> None:
        if self.reuse is not None:
            self.reuse.read_ahead(tokens)

    def propose(self, context: Context, budget: int) -> Passes[DraftTree]:
        self._resting = context.plan.rests
        if self._resting:
            self._chain = resting = OwnChain(context.history[-1], budget, (0, 0))
            self.views.look(context)
            with context.history.guesses():
                resting.force(context)
            return resting.draft.build()
        match = (0, 0) if self.reuse is None else self.reuse.read(context.history)
        self._chain = chain = OwnChain(context.history[-1], budget, match)
        self.views.begin_round(context)
        self._read_text(context)
        with context.history.guesses():
            yield from self._grow(context, chain)
            self._hang_heads(context, chain)
        follow = None if self.reuse is None else self.reuse.push(chain.candidates, chain.end, chain.match)
        return chain.build(context, follow)

    def observe(self, taken: Acceptance, output: Output) -> None:
        if not self._resting:
            self._chain.draft.learn(taken)
            if self.heads is not None:
                self.heads.learn(taken.tokens)
            if self._vocabulary is not None:
                self._vocabulary.walked(len(taken.path) - 1, taken.tokens, self._price)
            self.views.observe(self._chain, taken, output)
        self._see(output, taken.path[-1])

    def alike(self) -> object:
        return None if self.heads is None else self.heads.alike()

    def explain(self) -> dict[str, Any]:
        expected = {"expected_acceptance": round(self.views.now.next, 4)}
        logits = {} if self._vocabulary is None else {"logits": self._vocabulary.count}
        return {**self.views.explain(), **logits, **expected, **self._chain.explain()}

    def _read_text(self, context: Context) -> None:
        """Tells the vocabulary of draft passes, where they do not compute all logits, what the text has grown by."""
        self._vocabulary = getattr(context.self_draft, "vocabulary", None)
        if self._vocabulary is not None:
            self._vocabulary.read(context.history.tokens[self._read :])
            self._read, self._price = len(context.history), self.views.price(context.plan)

    def _see(self, output: Output, row: int) -> None:
        """Keeps the state that heads would read next. It comes from the row after which they would guess."""
        if self.heads is not None:
            self._row = self.heads.weights.reads(output, row)

    def _grow(self, context: Context, chain: OwnChain) -> Passes[None]:
        """Goes on guessing, pass by pass, as long as that pays. The history grows with the chain."""
        plan, cache = context.plan, context.cache
        cache.drop_tail()
        self._idle += 1
        if self._idle > IDLE_ROUNDS and self._idle % IDLE_STEP and not plan.probing():
            self._force(context, chain)
            return  # a pass is unlikely to pay now, and the host would need a while to find that out
        longest = plan.longest_chain(chain.draft.budget, self.width)
        while True:
            self._force(context, chain)
            # The last token and, before it, those that a grammar forced, which have no row yet either.
            unread = context.history.tokens[cache.length + len(chain.tail) :].tolist()
            room = chain.room(cache) - len(unread) + 1
            if len(chain) >= longest or room < 1:
                return
            ahead = self._look_ahead(context, chain, room)
            ms = self.views.pass_ms(plan, len(ahead) + len(unread) - 1)
            if not self._pays(context, chain, ahead, ms) and (chain.tail or not plan.may_probe(ms)):
                return
            self._ask_heads(context, chain, ahead)
            self._idle = 0
            links = self._links(context, chain, ms, min(room, longest - len(chain)))
            chooser = self._chooser(context) if links > 1 and len(ahead) == len(unread) == 1 else None
            if chooser is not None:
                going = yield from self._draft_chain(context, chain, links, chooser)
            else:
                going = yield from self._draft_pass(context, chain, ahead, unread[:-1], longest)
            if not going:
                return

    def _force(self, context: Context, chain: OwnChain) -> None:
        """Lets the tokens that a grammar forces join the chain without a pass."""
        for token in chain.force(context):
            self._row = None  # nothing is known of the row that gives the latest token
            if self.reuse is not None:
                chain.match = self.reuse.step(chain.match, token)

    def _look_ahead(self, context: Context, chain: OwnChain, room: int) -> Draft:
        """Returns the chain's last token and the repeats after it that are likely enough to save a draft pass of their
        own, at most `room` nodes."""
        ahead = Draft(context.history[-1], min(1 + AHEAD, room))
        if self.reuse is not None and self.views.cost.measured:
            pass_ms = self.views.pass_ms(context.plan, 1)
            self.reuse.extend(ahead, chain.match, self.views.row_gain(pass_ms))
        return ahead

    def _pays(self, context: Context, chain: OwnChain, ahead: Draft, ms: float) -> bool:
        """Returns whether one more draft pass of so many milliseconds saves more time than repeats would without it.

        A pass makes a guess at its first row, and at each later row that the guesses `ahead` lead to.
        """
        plan, rows, chance = context.plan, len(chain.draft), self.views.now.next
        tokens = 0.0
        for reached, depth in zip(ahead.chances, ahead.build().depth.tolist(), strict=True):
            tokens += chain.chance * reached * chance ** (1 + depth)
            ms += reached * plan.shared_row_ms(rows + depth)
        free = self._repeats(context, chain).chances[1:]
        return plan.worth(tokens, ms, sum(plan.gain_ms(chain.chance * c, rows + i) for i, c in enumerate(free)))

    def _links(self, context: Context, chain: OwnChain, ms: float, most: int) -> int:
        """Returns how many draft passes of one row, the next one included, are likely to pay for their time.

        ms: milliseconds of a pass. most: guesses that the chain has room for.
        """
        plan, rows, chance = context.plan, len(chain.draft), self.views.now.next
        most, links = min(most, MOST_LINKS, PAGE_SIZE - len(chain.tail)), 1
        while links < most and plan.worth(chain.chance * chance ** (1 + links), ms + plan.shared_row_ms(rows + links)):
            links += 1
        return links

    def _chooser(self, context: Context) -> Chooser | None:
        """Returns what chooses the tokens of draft passes where their logits lie, so that the host is asked nothing
        between them. None where the host is needed: passes of several texts travel together, rows read a memory of
        evicted ones, or the executor or the sampler cannot do without (see `Model` and `Sampler.chain`)."""
        model: Any = context.self_draft
        if not (context.timer.alone and getattr(model, "chains", False) and context.cache.memory is None):
            return None
        return context.sampler.chain(context.history, self.views.now.ranks, model.device)

    def _repeats(self, context: Context, chain: OwnChain) -> Draft:
        """Returns the repeats after the chain's end that are worth the target's rows without a draft pass."""
        path, rows, gain_ms = chain.chance, len(chain.draft), context.plan.gain_ms
        free = Draft(chain.draft.tokens[chain.end], min(MOST_REPEATS, 1 + chain.draft.budget - rows))
        if self.reuse is not None:
            self.reuse.extend(free, chain.match, lambda chance, more: gain_ms(path * chance, rows + more - 1))
        return free

    def _ask_heads(self, context: Context, chain: OwnChain, ahead: Draft) -> None:
        """Adds guesses of heads for a draft pass to check, where that saves more time in passes than it takes.

        A right guess brings the next token, too. That saves a pass where one would have been made for it, and is never
        worth more than the token.
        """
        if self.heads is None or self._row is None:
            return
        chance_behind = chain.chance * self.views.now.next**2
        token_ms = context.plan.gain_ms(chance_behind, len(chain.draft) + 1)
        gain = self.views.row_gain(min(self.views.cost(1, self.views.keys), token_ms))
        self.heads.extend(ahead, 0, self._row, context, gain, next_chance(ahead))

    def _hang_heads(self, context: Context, chain: OwnChain) -> None:
        """Adds guesses of heads after the chain's end, for the target to check."""
        if self.heads is not None and self._row is not None:
            known = next_chance(self._repeats(context, chain))
            gain, pending = context.plan.gain_ms, chain.end == 0
            self.heads.extend(chain.draft, chain.end, self._row, context, gain, known, pending)

    def _draft_pass(
        self, context: Context, chain: OwnChain, ahead: Draft, unread: Sequence[int], longest: int
    ) -> Passes[bool]:
        """Computes the chain's last token and the guesses `ahead` in one draft pass, and grows the chain along those
        that are right. Returns whether it may go on.

        unread: the tokens before the last one that have no row yet.
        """
        model, cache, tree = context.self_draft, context.cache, ahead.build().below(unread)
        lap, first = context.timer.start(model), cache.tail_length
        output = yield Pass(model, Segment(tree, cache, self.views.pages(cache), chain.tail))
        chain.tail = (*chain.tail, *range(first, first + len(unread)))
        taken = self._follow(context, chain, ahead.build(), output.logits[len(unread) :], first + len(unread), longest)
        if taken is None:
            self._row = None
            return False
        ahead.learn(taken)
        self._see(output, len(unread) + taken.path[-1])
        self.views.timed(len(tree), lap, context.agreed)  # this includes the guesses, which cost as much every time
        return True

    def _draft_chain(self, context: Context, chain: OwnChain, links: int, chooser: Chooser) -> Passes[bool]:
        """Computes the chain's last token and the guesses after it in as many draft passes, between which the host is
        asked nothing, and grows the chain by them. Returns whether it may go on."""
        model, cache = context.self_draft, context.cache
        lap, first = context.timer.start(model), cache.tail_length
        tree = DraftTree.chain([context.history[-1]] + [0] * (links - 1))
        output = yield Pass(model, Segment(tree, cache, self.views.pages(cache), chain.tail), chooser=chooser)
        ranked = chooser.read(links)
        self._see(output, -1)
        for link in range(links):
            if self._guess(context, chain, partial(ranked, link)) is None:
                self._row = None
                return False
            chain.tail = (*chain.tail, first + link)
        self.views.timed(1, lap, context.agreed, links)
        return True

    def _follow(
        self,
        context: Context,
        chain: OwnChain,
        tree: DraftTree,
        logits: torch.Tensor,
        first: int,
        longest: int,
    ) -> Acceptance | None:
        """Walks the tree of guesses of a draft pass by the draft's own choices, each of which joins the chain. Returns
        the nodes that it took, None where nothing could be chosen.

        logits: [len(tree), V] of the pass. first: the provisional row of the tree's root.
        """
        rows, tokens = [0], []  # type: list[int], list[int]
        ranker = context.sampler.ranker(tree, logits, context.history, self.views.now.ranks)
        while (token := self._guess(context, chain, partial(ranker, rows[-1]))) is not None:
            chain.tail = (*chain.tail, first + rows[-1])
            tokens.append(token)
            child = tree.children[rows[-1]].get(token)
            if child is None or len(chain) >= longest:
                return Acceptance(tuple(rows), tuple(tokens))
            rows.append(child)
        return None

    def _guess(self, context: Context, chain: OwnChain, ranked: Callable[[], Ranked]) -> int | None:
        """Adds one more token to the chain, which `Confidence.guess` finds, and returns it."""
        reuse, match = self.reuse, chain.match
        more = None if reuse is None else lambda other: reuse.step(match, other)
        token = chain.guess(self.views.now, context, ranked, more)
        if token is not None and reuse is not None:
            chain.match = reuse.step(match, token)
        return token


def next_chance(draft: Draft) -> float:
    """Returns the chance that the token after a draft's root is among its guesses."""
    return sum(chance for chance, parent in zip(draft.chances, draft.parents, strict=True) if parent == 0)


IDLE_ROUNDS = 16  # after so many rounds without a draft pass it is asked only every IDLE_STEP rounds whether one pays
IDLE_STEP = 4
AHEAD = 6  # how many repeats one draft pass checks
MOST_REPEATS = 17  # the most nodes, the root included, of the repeats that a draft pass is weighed against


def create(options: Options, resources: Resources) -> Partial:
    width = width_of(options)
    return Partial(options.draft_policy, options.draft_budget, cost=resources.draft_cost, **width)


DRAFTER = Partial
