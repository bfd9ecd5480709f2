"""The C++ sampler chooses what the Python reference chooses, token for token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.sampling.reference import NumericsError, Sampler

pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
from tokenswift_py.sampling.native import NativeSampler

VOCAB = 1500

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 5, 700, VOCAB]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    penalty=st.sampled_from([1.0, 1.3]),
    penalty_window=st.sampled_from([1, 20, 10_000]),
    dry_multiplier=st.sampled_from([0.0, 0.8]),
    dry_length=st.integers(1, 4),
    dry_window=st.sampled_from([0, 3, 20, 2**40]),
    dry_breakers=st.sampled_from([(), (1,), (0, 2)]),
    ban=st.sampled_from([(), (3, 4)]),
    logit_bias=st.sampled_from([{}, {5: 2.5, 1: -1.0}]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3, -0.1]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 1, 2, 5]),
    ban_words=st.sampled_from([(), ((1, 0), (0,), (0, 0, 3), (1, 2, 3))]),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
)


def outcome(sampler: Sampler, logits: torch.Tensor, history: History, count: int) -> Any:
    """The ranking, or what is said where no token is left, as where every one has been written."""
    try:
        return sampler.ranked(logits, history, count)
    except NumericsError as error:
        return str(error)


@settings(max_examples=400, deadline=None)
@given(
    params=params,
    row=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 0.5, 3.0, 12.0]),
    coarse=st.booleans(),
    alphabet=st.sampled_from([2, 4, VOCAB]),
    length=st.integers(1, 300),
    count=st.sampled_from([1, 1, 2, 3, 2000]),
)
def test_every_choice_is_the_references(
    params: SamplingParams, row: int, spread: float, coarse: bool, alphabet: int, length: int, count: int
) -> None:
    """Coarse logits have many ties, small alphabets many repeats."""
    rng = np.random.default_rng(row)
    logits = (rng.normal(0, 1, VOCAB) * spread).astype(np.float32)
    if coarse:
        logits = np.round(logits)
    history = History(rng.integers(0, alphabet, length).tolist())
    arguments: Any = (params, VOCAB, [7, 9], int(rng.integers(0, 400)))
    kept = torch.from_numpy(logits.copy())
    given = torch.from_numpy(logits)
    native, reference = NativeSampler(*arguments), Sampler(*arguments)
    if length > 40:  # a prompt of ten tokens, and a turn of five
        for sampler in (native, reference):
            sampler.begin_chapter(10, 10)
            sampler.begin_chapter(30, 5)
    assert outcome(native, given, history, count) == outcome(reference, kept, history, count)
    assert torch.equal(given, kept)  # the logits are put back


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("peaks", [0, 3])
def test_tokens_that_are_spared_the_noise_would_not_be_chosen(temperature: float, peaks: int) -> None:
    """A whole vocabulary without floors: of hardly any token the logarithms are computed. At each of many positions the
    ranking is the reference's, also where a token far below the best wins, and where few are near the best."""
    vocab, rng = 40_000, np.random.default_rng(7)
    native, reference = (
        kind(SamplingParams(temperature=temperature, seed=11), vocab) for kind in (NativeSampler, Sampler)
    )
    deep = 0
    for length in range(1, 41):
        row = rng.normal(0, 2.5, vocab).astype(np.float32)
        row[rng.integers(0, vocab, peaks)] += 20 if length % 2 else 8
        logits, history = torch.from_numpy(row), History(range(length))
        for count in (1, 3, 50):
            ranked = native.ranked(logits, history, count)
            assert ranked == reference.ranked(logits, history, count)
        deep += row[ranked[0][0]] < row.max() - 3 * temperature
    assert deep or peaks


def test_a_sampler_is_used_again_and_again() -> None:
    rng = np.random.default_rng(0)
    settings = SamplingParams(temperature=0.9, penalty=1.2, penalty_window=30, dry_multiplier=0.8, min_p=0.02, seed=3)
    native, reference, history = NativeSampler(settings, VOCAB), Sampler(settings, VOCAB), History([1, 2, 3])
    for _ in range(400):
        logits = torch.from_numpy(rng.normal(0, 2, VOCAB).astype(np.float32))
        token = native.choose(logits, history)
        assert token == reference.choose(logits, history)
        history.append(token)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 700, 1499])
def test_logits_nobody_can_choose_from(bad: float, where: int) -> None:
    logits = torch.zeros(VOCAB)
    logits[where] = bad
    with pytest.raises(NumericsError, match="position 2"):
        NativeSampler(SamplingParams(), VOCAB).choose(logits, History([1, where]))
    with pytest.raises(NumericsError, match="position 2"):
        NativeSampler(SamplingParams(penalty=1.5), VOCAB).choose(logits, History([1, where]))
    with pytest.raises(NumericsError, match="no token is left"):
        NativeSampler(SamplingParams(ban=tuple(range(VOCAB))), VOCAB).choose(torch.zeros(VOCAB), History([1]))


def test_chapters_have_their_least_length_here_too() -> None:
    arguments: Any = (SamplingParams(temperature=0.5, seed=1), VOCAB, [7, 9], 4, (), 6)
    native, reference = NativeSampler(*arguments), Sampler(*arguments)
    logits = torch.zeros(VOCAB)
    logits[7] = 20.0
    for position in (3, 12):
        native.begin_chapter(position)
        reference.begin_chapter(position)
    chosen = [native.choose(logits, History([1] * position)) for position in (20, 3, 8, 9, 11, 12, 17, 18)]
    assert [token == 7 for token in chosen] == [True, False, False, True, True, False, False, True]
    assert chosen[1:3] == [reference.choose(logits, History([1] * position)) for position in (3, 8)]


def test_malformed_input_is_refused() -> None:
    sampler = NativeSampler(SamplingParams(penalty=1.5), VOCAB)._native
    logits, history = np.zeros(VOCAB, np.float32), np.array([1, 2], np.int32)
    for wrong in ([VOCAB], [-1], [2**31 - 1]):
        with pytest.raises(ValueError, match="vocabulary"):
            sampler.rank(logits, np.array(wrong, np.int32), 1)
    assert not logits.any()
    for arguments in [(logits[:-1], history, 1), (logits, history, 0)]:
        with pytest.raises(ValueError, match=r"vocab|count"):
            sampler.rank(*arguments)
    for arguments in [
        (logits.astype(np.float64), history, 1),
        (logits, history.astype(np.int64), 1),
        (None, history, 1),
    ]:
        with pytest.raises(TypeError):
            sampler.rank(*arguments)
