"""The model drafts for itself, over a small part of its own KV cache."""

from __future__ import annotations

from tokenswift_py import registry
from tokenswift_py.core import Acceptance, DraftTree, Output, Segment, TreeBuilder
from tokenswift_py.drafters.base import Context, committed
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import select
from tokenswift_py.kvcache.view import PageView


class Partial:
    """A chain of the model's own guesses under a page view, chosen with the target's noise, and beside each guess
    the runners-up of the same perturbed scores.

    view_tokens: budget of the view in tokens.
    width:       children of each node of the chain; 1 is a plain chain.
    """

    name = "partial"

    def __init__(self, policy: str = "recent", view_tokens: int = 1024, width: int = 1):
        check(view_tokens >= 64, "draft_budget", view_tokens, "at least 64 tokens, one page")
        check(width >= 1, "width", width, "at least 1")
        self.policy = registry.create("tokenswift_py.kvcache.policies", "POLICY", "draft_policy", policy)
        self.needs: frozenset[str] = self.policy.needs
        self.view_tokens = view_tokens
        self.width = width
        self.length = 0  # of the cache when the last tree was proposed

    def prefill(self, context: Context, output: Output) -> None:
        rows = len(output.hidden)
        self.policy.observe(committed(output, range(rows), context.cache.length - rows))

    def propose(self, context: Context, budget: int) -> DraftTree:
        history, cache = context.history, context.cache
        start = len(history)
        self.length = cache.length
        builder, node = TreeBuilder(history[-1], budget), 0
        view = self.view(context)
        cache.drop_tail()
        tail: tuple[int, ...] = ()
        while len(builder) < budget:
            segment = Segment(DraftTree.chain([history[-1]]), cache, view, tail)
            logits = context.draft_model.forward([segment]).logits
            guesses = context.sampler.rank(logits[0], history, self.width)
            children = [builder.add(node, guess) for guess in guesses]
            assert children[0] is not None
            node, tail = children[0], (*tail, len(tail))
            history.append(guesses[0])
        history.truncate(start)
        return builder.build()

    def view(self, context: Context) -> PageView:
        return PageView(select(self.policy, context.cache.page_stats(), self.view_tokens))

    def observe(self, taken: Acceptance, output: Output) -> None:
        self.policy.observe(committed(output, taken.path, self.length))


DRAFTER = Partial
