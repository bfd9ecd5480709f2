"""Reads a given text with a bounded cache, as the lossy mode would have met it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.decoding.eviction import STATISTICS_ROWS, Eviction
from tokenswift_py.kvcache.cache import KVCache

CHUNK = 256  # rows of a pass


def read_on(
    model: Any, cache: KVCache, eviction: Eviction | None, tokens: Sequence[int], scored: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields logits [n, vocab] of the rows that predict the last `scored` tokens, with these tokens [n] int64.

    It goes chunk by chunk. The cache, which holds a beginning of the tokens, grows by all but the last, and evicts as
    the eviction says.
    """
    first = len(tokens) - scored - 1  # the row that predicts the first scored token
    needs = eviction.needs if eviction else frozenset()
    most = STATISTICS_ROWS if needs else CHUNK
    while (at := cache.length) < len(tokens) - 1:
        chunk = tokens[at : len(tokens) - 1][: min(most, cache.limit - at)]
        rows = range(max(0, first - at), len(chunk))
        segment = Segment(DraftTree.chain(chunk), cache, causal=True)
        output = model.forward([segment], list(rows), "mass" in needs, "queries" in needs)
        cache.commit(range(len(chunk)))
        if eviction is not None:
            eviction.committed(cache, range(len(chunk)), output)
        after = torch.tensor([tokens[at + row + 1] for row in rows], dtype=torch.int64, device=output.logits.device)
        yield output.logits, after


def nats(model: Any, cache: KVCache, eviction: Eviction | None, tokens: Sequence[int], scored: int) -> float:
    """Returns the mean of minus the log-probability of the last `scored` tokens."""
    losses = [
        float(F.cross_entropy(logits.double(), after, reduction="sum"))
        for logits, after in read_on(model, cache, eviction, tokens, scored)
        if len(after)
    ]
    return sum(losses) / scored
