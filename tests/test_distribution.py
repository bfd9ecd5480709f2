"""Plain and speculative decoding draw from the distribution the parameters define, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.drafters.base import Drafter, create
from tokenswift_py.sampling.reference import Sampler
from toys import MarkovModel, chi_square, pairs, transitions, write

VOCAB, SAMPLES = 7, 9_000


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
    p = transitions(params, model.table.numpy())
    assert chi_square(pairs([0, *tokens], VOCAB), p) > 0.001


def test_streams_are_independent_samples_of_one_prompt() -> None:
    """The first token over 9 000 streams of one seed."""
    model, counts = MarkovModel(), np.zeros(VOCAB)
    history, row = History([3]), model.table[3]
    for stream in range(9_000):
        counts[Sampler(SamplingParams(temperature=1.0, seed=5, stream=stream), VOCAB).choose(row, history)] += 1
    p = transitions(SamplingParams(temperature=1.0), model.table.numpy())[3]
    assert stats.chisquare(counts, p * counts.sum()).pvalue > 0.001
