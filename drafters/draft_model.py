"""A smaller model with the same vocabulary drafts, over its own KV cache (Leviathan et al. 2023, arXiv 2211.17192)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tokenswift_py.core import Acceptance, DraftTree, Model, Output, Segment
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.passes import Pass, Passes
from tokenswift_py.drafters.base import Context, Drafter, Resources, width_of
from tokenswift_py.drafters.chain import Chain, Confidence
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE, select
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.kvcache.policies.recent import Recent
from tokenswift_py.options import Options
from tokenswift_py.planning.costs import PassCost
from tokenswift_py.planning.planner import Plan


class DraftModel(Drafter):
    """A chain of the draft model's guesses, chosen with the target's noise and processors, with runners-up beside it
    where they are worth a row. The chain ends where one more guess would not pay for its pass.

    The draft's cache holds the text as far as the draft has read it. The rest (forced tokens, tokens that the target
    chose instead of a guess, the pending token) is read in the pass that makes the first guess. While no draft pays,
    nothing is read. Rows of accepted guesses stay, those of the others are dropped.

    model:       the draft, with RoPE tables for the target's context.
    keep_tokens: rows that its cache keeps, its first page and the latest ones (StreamingLLM); None is all.
    width:       guesses a node has at most, runners-up included; 1 is a plain chain.
    vocab_sizes: rows of the draft's and of the target's embedding, which differ where one is padded; None: they do not.
    """

    name = "draft_model"
    has_second_model = True

    def __init__(
        self,
        model: Model,
        keep_tokens: int | None = None,
        width: int = 3,
        vocab_sizes: tuple[int, int] | None = None,
    ):
        check(keep_tokens is None or keep_tokens >= PAGE_SIZE, "draft_budget", keep_tokens, "at least 64, one page")
        check(width >= 1, "width", width, "at least 1")
        self.model, self.keep_tokens, self.width, self.vocab_sizes = model, keep_tokens, width, vocab_sizes
        self.cache = model.new_cache() if keep_tokens is None else bounded_cache(model, keep_tokens)
        self._policy = Recent()
        self._cost = PassCost(model.row_shapes)
        self._confidence = Confidence(width)
        self._chain = Chain(0, 1)  # the chain of the last proposal
        self._text = 0  # how many tokens the text had when the last tree was proposed
        self._read = 0  # how many provisional rows of the last proposal are of the text, not of guesses

    def prefill(self, context: Context, output: Output) -> Passes[None]:
        yield from self._catch_up(context.history, len(context.history))

    def propose(self, context: Context, budget: int) -> Passes[DraftTree]:
        plan, history = context.plan, context.history
        self._cost.load = plan.load
        self._chain, self._text = Chain(history[-1], budget), len(history)
        self._confidence.expect(SPREAD, context.sampler.params.temperature)
        self.cache.drop_tail()
        self._read = len(history) - self.cache.length
        longest = plan.longest_chain(budget, self.width)
        if self._cost.measured:
            plan.expect_rate(plan.best_rate(self._confidence.next, self._pass_ms(plan, 1)))
        with history.guesses():
            while True:
                self._chain.force(context)
                if len(self._chain) >= longest or not self._pays(plan):
                    break
                token = yield from self._guess(context)
                if token is None:
                    break
        return self._chain.build(context)

    def observe(self, taken: Acceptance, output: Output) -> None:
        chain = self._chain
        chain.draft.learn(taken)
        self._confidence.learn(chain.draft, chain.nodes, taken)
        accepted = sum(node in taken.after for node in chain.nodes[1:])
        self._commit(min(self._read + accepted, self.cache.tail_length))

    def explain(self) -> dict[str, Any]:
        return {
            "kept_tokens": self._kept,
            "expected_acceptance": round(self._confidence.next, 4),
            **self._chain.explain(),
        }

    def _pays(self, plan: Plan) -> bool:
        """Returns whether the next guess pays for its pass. The text has to be read for any later draft as well. So
        reading it is no cost of this guess, unless the guess is only a probe."""
        chance = self._chain.chance * self._confidence.next
        row_ms = plan.row_ms(len(self._chain.draft))
        if plan.worth(chance, self._pass_ms(plan, 1) + row_ms):
            return True
        return not self.cache.tail_length and plan.may_probe(self._pass_ms(plan, self._read) + row_ms)

    def _pass_ms(self, plan: Plan, rows: int) -> float:
        """Returns what a pass of the draft model costs."""
        return plan.draft_ms(self._cost, rows, self._kept)

    def _guess(self, context: Context) -> Passes[int | None]:
        """Computes the rows that the cache lacks in one pass. Returns the guess of the last of them, if anything can be
        chosen."""
        if not self.cache.tail_length:
            yield from self._catch_up(context.history, self._text)
        lap = context.timer.start(self.model)
        rows, kept = len(context.history) - self.cache.length - self.cache.tail_length, self._kept
        logits = yield from self._forward(context.history, rows)
        ranks = self._confidence.ranks
        token = self._chain.guess(
            self._confidence, context, lambda: context.sampler.ranked(logits, context.history, ranks)
        )
        lap.stop()
        self._cost.observe(rows, kept, lap.ms)  # rank 0 alone has this drafter, so there is nobody to agree with
        return token

    def _catch_up(self, history: History, stop: int) -> Passes[None]:
        """Reads the text, which ends before position `stop`, except for so few rows that the pass of the first guess
        takes them along."""
        while (missing := stop - self.cache.length) > JOINED:
            rows = min(CHUNK, missing - JOINED)
            yield from self._forward(history, rows)
            self._commit(rows)
        self._read = missing

    def _forward(self, history: History, rows: int) -> Passes[torch.Tensor]:
        """Computes the next rows that the cache lacks. Returns the last one's logits, [vocab_size] of the target's
        vocabulary."""
        cache = self.cache
        known = cache.length + cache.tail_length
        tokens = history.tokens[known : known + rows]
        if self.vocab_sizes is not None:  # tokens of the target's padding mean no text, so any row will do
            tokens = np.minimum(tokens, self.vocab_sizes[0] - 1)
        tail, read = tuple(range(cache.tail_length)), rows > JOINED  # a pass that guesses has a fixed shape on a GPU
        segment = Segment(DraftTree.chain(tokens), cache, tail=tail, causal=read)
        output = yield Pass(self.model, segment, [rows - 1])
        logits = output.logits[0]
        if self.vocab_sizes is None:
            return logits
        return F.pad(logits, (0, self.vocab_sizes[1] - len(logits)), value=-torch.inf)

    def _commit(self, rows: int) -> None:
        """Keeps the first provisional rows. After that it keeps only as many full pages as the budget allows."""
        cache = self.cache
        cache.commit(range(rows))
        if self.keep_tokens is not None and (cache.full_pages - cache.evicted) * PAGE_SIZE > self.keep_tokens:
            chosen = select(self._policy, cache.page_stats(), self.keep_tokens)[0, 0]  # all layers and heads agree
            cache.evict(np.setdiff1d(cache.kept, chosen).tolist())

    @property
    def _kept(self) -> int:
        """Committed rows that the draft attends to."""
        return self.cache.length - self.cache.evicted * PAGE_SIZE


def bounded_cache(model: Model, tokens: int) -> KVCache:
    """Makes a cache whose pool has room for so many rows and a chunk, whatever the context."""
    return KVCache(model.new_pool(pages_for(min(tokens + CHUNK, model.context))), model.context)


SPREAD = 1.0  # the expected spread of a smaller model's errors, in units of logit
CHUNK = 512  # the rows of a pass that only reads
JOINED = 32  # the most rows that the first guess's pass reads beside the pending token's


def create(options: Options, resources: Resources) -> DraftModel:
    kept = options.draft_budget or options.kv_budget
    return DraftModel(keep_tokens=kept, **width_of(options), **resources.second_model)


DRAFTER = DraftModel
