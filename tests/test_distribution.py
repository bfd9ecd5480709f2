"""Plain and speculative decoding draw from the distribution the parameters define, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from scripted import write
from tokenswift_py.core import Output, SamplingParams, Segment
from tokenswift_py.drafters.base import Drafter, create
from tokenswift_py.history import History
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import TorchPagePool, pages_for
from tokenswift_py.models.rows import lay_out
from tokenswift_py.sampling import Sampler

VOCAB, SAMPLES = 7, 21_000


class MarkovModel:
    """Logits that depend on the row's own token only: every transition of a long text is an independent sample."""

    numerics, guarantee, row_shapes = "table", "bitwise", ()

    def __init__(self) -> None:
        self.table = torch.from_numpy(np.random.default_rng(0).normal(0, 1.5, (VOCAB, VOCAB)))

    def new_cache(self) -> KVCache:
        context = SAMPLES + 100
        pool = TorchPagePool(1, 1, 1, pages_for(context), torch.float32, torch.device("cpu"))
        return KVCache(pool, context)

    def forward(
        self,
        segments: Sequence[Segment],
        logit_rows: Sequence[int] | None = None,
        want_mass: bool = False,
        want_queries: bool = False,
    ) -> Output:
        logits = self.table[torch.from_numpy(lay_out(segments).tokens.astype(np.int64))]
        return Output(logits, logits if logit_rows is None else logits[list(logit_rows)])


def expected(params: SamplingParams, table: np.ndarray) -> np.ndarray:
    """[VOCAB, VOCAB] transition probabilities by definition: top-k, then top-p, then min-p."""
    p = np.exp(table / params.temperature)
    for row in p:
        if params.top_k:
            row[row < np.sort(row)[-params.top_k]] = 0
        order = np.argsort(-row)
        before = np.cumsum(row[order]) - row[order]
        row[order[before >= params.top_p * row.sum()]] = 0
        row[row < params.min_p * row.max()] = 0
    return np.asarray(p / p.sum(1, keepdims=True))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=11),
        SamplingParams(temperature=0.8, top_k=5, top_p=0.9, min_p=0.1, seed=12),
    ],
    ids=["plain", "filtered"],
)
@pytest.mark.parametrize("drafter", ["none", "ngram", "partial"])
def test_transitions_have_the_exact_distribution(drafter: str, params: SamplingParams) -> None:
    model = MarkovModel()
    settings: dict[str, Any] = {"policy": "recent", "width": 2} if drafter == "partial" else {}
    made: Drafter = create(drafter, **settings)
    tokens, _, _ = write(model, [0], SAMPLES, params, made, vocab=VOCAB, draft_tokens=6)
    text = [0, *tokens]
    seen = np.zeros((VOCAB, VOCAB))
    np.add.at(seen, (text[:-1], text[1:]), 1)
    p = expected(params, model.table.numpy().copy())
    assert not seen[p == 0].any()
    wanted = p * seen.sum(1, keepdims=True)
    possible = p > 0
    statistic = ((seen - wanted)[possible] ** 2 / wanted[possible]).sum()
    freedom = int((possible.sum(1) - 1).sum())
    assert stats.chi2.sf(statistic, freedom) > 0.001


def test_streams_are_independent_samples_of_one_prompt() -> None:
    """The first token over 20 000 streams of one seed."""
    model, counts = MarkovModel(), np.zeros(VOCAB)
    history, row = History([3]), model.table[3]
    for stream in range(20_000):
        counts[Sampler(SamplingParams(temperature=1.0, seed=5, stream=stream), VOCAB).choose(row, history)] += 1
    p = expected(SamplingParams(temperature=1.0), model.table.numpy().copy())[3]
    assert stats.chisquare(counts, p * counts.sum()).pvalue > 0.001
