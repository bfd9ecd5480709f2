"""Verification is a walk (law 3): one choice per node, from the root, as long as a child carries what was chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenswift_py.core import Acceptance, DraftTree, Likeliest
from tokenswift_py.decoding.history import History
from tokenswift_py.sampling.reference import NumericsError, Sampler, likeliest, log_probability


def walk(
    tree: DraftTree,
    logits: torch.Tensor,
    sampler: Sampler,
    history: History,
    ending: Callable[[History], str | None],
    want_logprobs: bool = False,
    top_logprobs: int = 0,
) -> Acceptance:
    """Chooses tokens down the tree and appends them to `history`, whose last token is the tree's root.

    logits: [len(tree), vocab_size].
    ending: function that returns why the text ends after the latest token, or None. It is asked after every token, and
            nothing past an ending is chosen.
    top_logprobs: number of other tokens whose log-probabilities are wanted beside each chosen one.

    Raises NumericsError where nothing can be chosen at the root. Below it the walk ends there: the tokens before are
    written, as plain decoding would have done, and the next round raises it.
    """
    path, tokens = [0], list[int]()
    logprobs, likely = list[float](), list[Likeliest]()
    choose = sampler.chooser(tree, logits, history)

    def known() -> tuple[tuple[float, ...] | None, tuple[Likeliest, ...] | None]:
        return (tuple(logprobs), tuple(likely) or None) if want_logprobs else (None, None)

    while True:
        try:
            token = choose(path[-1])
        except NumericsError:
            if not tokens:
                raise
            return Acceptance(tuple(path[:-1]), tuple(tokens), None, *known())
        history.append(token)
        tokens.append(token)
        if want_logprobs:
            logprobs.append(log_probability(logits[path[-1]], token))
        if want_logprobs and top_logprobs:
            likely.append(likeliest(logits[path[-1]], top_logprobs))
        reason = ending(history)
        child = tree.children[path[-1]].get(token)
        if reason is not None or child is None:
            return Acceptance(tuple(path), tuple(tokens), reason, *known())
        path.append(child)
