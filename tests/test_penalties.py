"""Penalties and bans of what was written: each has the values of transformers' processor or of vLLM's formula."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.errors import UserError
from tokenswift_py.options import Options
from tokenswift_py.sampling.reference import Sampler
from tokenswift_py.text import word_ids

VOCAB = 12
ROW = torch.tensor(np.random.default_rng(0).normal(0, 3, VOCAB))
texts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)
words = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=6)


def processed(tokens: list[int], **params: Any) -> np.ndarray:
    return Sampler(SamplingParams(**params), VOCAB).process(ROW, History(tokens))


def theirs(tokens: list[int], *processors: Any) -> np.ndarray:
    return LogitsProcessorList(processors)(torch.tensor([tokens]), ROW[None].clone())[0].numpy()


@given(texts, st.floats(0.1, 5))
def test_the_repetition_penalty_is_transformers(tokens: list[int], theta: float) -> None:
    wanted = theirs(tokens, RepetitionPenaltyLogitsProcessor(theta))
    np.testing.assert_allclose(processed(tokens, repetition_penalty=theta), wanted, rtol=1e-12)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 5))
@example([1, 2, 1], 2)
def test_no_ngram_comes_twice_as_transformers_has_it(tokens: list[int], size: int) -> None:
    wanted = theirs(tokens, NoRepeatNGramLogitsProcessor(size))
    np.testing.assert_array_equal(processed(tokens, no_repeat_ngram_size=size), wanted)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), words)
@example([1, 2], [[1, 2, 3], [2, 4], [9, 9, 9, 9], [7]])
def test_banned_words_are_transformers(tokens: list[int], banned: list[list[int]]) -> None:
    wanted = theirs(tokens, NoBadWordsLogitsProcessor(banned))
    np.testing.assert_array_equal(processed(tokens, ban_words=tuple(map(tuple, banned))), wanted)


@given(texts, texts, texts, st.floats(-2, 2), st.floats(-2, 2))
def test_frequency_and_presence_count_what_the_model_wrote(
    prompt: list[int], chapter: list[int], turn: list[int], frequency: float, presence: float
) -> None:
    """vLLM's formula, logits - frequency * count - presence, of the tokens that were chosen: neither those of the
    prompt nor those of a turn."""
    sampler = Sampler(SamplingParams(frequency_penalty=frequency, presence_penalty=presence), VOCAB)
    sampler.begin_chapter(len(prompt), len(prompt))
    sampler.begin_chapter(len(prompt + chapter + turn), len(turn))
    for own in ([], [3, 3, 4]):
        scores = sampler.process(ROW, History([*prompt, *chapter, *turn, *own]))
        counts = Counter([*chapter, *own])
        wanted = [float(x) - frequency * counts[t] - presence * (counts[t] > 0) for t, x in enumerate(ROW)]
        np.testing.assert_allclose(scores, wanted, rtol=1e-12, atol=1e-12)
    inside = sampler.process(ROW, History([*prompt, *chapter]))  # asked again later, as an audit asks
    counts = Counter(chapter)
    wanted = [float(x) - frequency * counts[t] - presence * (counts[t] > 0) for t, x in enumerate(ROW)]
    np.testing.assert_allclose(inside, wanted, rtol=1e-12, atol=1e-12)


def test_penalties_act_in_the_order_that_is_told() -> None:
    """Repetition, contextual, frequency, presence, DRY, bias, bans: each by hand, on a token that was written twice."""
    params = SamplingParams(
        repetition_penalty=1.5, penalty=1.25, frequency_penalty=0.5, presence_penalty=0.25, dry_multiplier=0.75,
        dry_length=1, logit_bias={2: 0.125, 3: 9.0}, ban=(3,),
    )  # fmt: skip
    scores = Sampler(params, VOCAB).process(torch.full((VOCAB,), 8.0), History([1, 2, 1, 2, 1]))
    assert scores[2] == 8.0 / 1.5 / 1.25 - 0.5 * 2 - 0.25 - 0.75 * 1.75**2 + 0.125
    assert scores[3] == -np.inf and scores[5] == 8.0


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"presence_penalty": 3}, "presence_penalty: 3 is not allowed; between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty: 0 is not allowed; above 0, at most 100"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: -1 is not allowed; at least 0"),
        ({"typical_p": 0}, "typical_p: 0 is not allowed; above 0, at most 1"),
        ({"xtc_threshold": 0.6}, "xtc_threshold: 0.6 is not allowed; between 0 and 0.5"),
        ({"ban_words": [[]]}, r"ban_words: \[\] is not allowed; lists of token ids"),
        ({"ban_words": "word"}, "ban_words: 'word' is not allowed; a list of texts"),
    ],
)
def test_wrong_values_are_told_in_one_line(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        Options(**asked)


def test_a_word_is_banned_as_it_stands_alone_and_behind_a_space() -> None:
    class Letters:
        """A tokenizer whose tokens are letters, except for those after a space."""

        def __call__(self, text: str, **settings: Any) -> Any:
            glued = text.startswith(" ")
            ids = [ord(c) for c in text.strip()]
            return type("Ids", (), {"input_ids": [1000 + ids[0], *ids[1:]] if glued else ids})

    assert word_ids(Letters(), "ab") == [(97, 98), (1097, 98)]
    assert word_ids(Letters(), [5, 6]) == [(5, 6)]
