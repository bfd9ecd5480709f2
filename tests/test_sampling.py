"""A row of logits becomes a token: filters, noise, penalties and processors, each against its plain definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.special import logsumexp
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.errors import UserError
from tokenswift_py.sampling import noise
from tokenswift_py.sampling.penalties import DRY_LONGEST, dry_matches
from tokenswift_py.sampling.reference import NumericsError, Sampler, log_probability, nucleus_floor


def choose(logits: Any, history: Any = (), **params: Any) -> int:
    row = torch.as_tensor(logits)
    return Sampler(SamplingParams(**params), len(row)).choose(row, History(history))


@given(st.lists(st.integers(0, 99), max_size=60), st.data())
def test_a_history_grows_and_is_cut_back_like_a_list(start: list[int], data: Any) -> None:
    history, model = History(start), list(start)
    for _ in range(3):
        more = data.draw(st.lists(st.integers(0, 99), max_size=20)) * data.draw(st.sampled_from([1, 200]))
        history.extend(more)
        model += more
        cut = data.draw(st.integers(0, len(model)))
        history.truncate(cut)
        del model[cut:]
        assert len(history) == len(model) and history.tokens.tolist() == model
        assert not model or history[-1] == model[-1]
    with pytest.raises(ValueError, match="cannot cut"):
        history.truncate(len(model) + 1)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1, 0), (5, 1, 0), (1, 1, 0), (1000, 1, 0), (0, 0.9, 0), (0, 0.01, 0), (0, 0.9999, 0), (0, 1, 0.05),
     (0, 1, 1), (20, 0.8, 0), (20, 0.8, 0.1), (0, 0.95, 0.02), (3, 0.5, 0.5)],
)  # fmt: skip
def test_filters_keep_what_hugging_faces_keep(top_k: int, top_p: float, min_p: float) -> None:
    rng = np.random.default_rng(0)
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    sampler = Sampler(SamplingParams(1.0, top_k, top_p, min_p), 300)
    for spread in (0.01, 1.0, 3.0):
        for _ in range(10):
            scores = spread * rng.standard_normal(300)
            warped = warpers(torch.zeros(1, 0, dtype=torch.long), torch.from_numpy(scores)[None].clone())[0]
            assert sampler.candidates(scores).tolist() == torch.nonzero(warped > -torch.inf)[:, 0].tolist()


def test_tokens_of_equal_score_stay_or_go_together() -> None:
    scores = np.log(np.array([0.1, 0.3, 0.1, 0.3, 0.1, 0.1]))
    kept = {
        (2, 1): [1, 3],
        (1, 1): [1, 3],
        (3, 1): [0, 1, 2, 3, 4, 5],
        (0, 0.2): [1, 3],
        (0, 0.65): [0, 1, 2, 3, 4, 5],
    }
    for (top_k, top_p), tokens in kept.items():
        assert Sampler(SamplingParams(1.0, top_k, top_p), 6).candidates(scores).tolist() == tokens


def test_top_p_of_a_large_row_does_not_sort_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    scores = 2 * rng.standard_normal(150_000)
    scores -= scores.max()
    mass = np.sort(np.exp(scores))[::-1]
    wanted = int(np.searchsorted(np.cumsum(mass) / mass.sum(), 0.3)) + 1
    sorted_sizes: list[int] = []
    for name in ("argsort", "sort", "lexsort"):
        real = getattr(np, name)

        def counting(data: Any, *rest: Any, real: Any = real, **named: Any) -> Any:
            sorted_sizes.append(np.size(data))
            return real(data, *rest, **named)

        monkeypatch.setattr(np, name, counting)
    floor = nucleus_floor(scores, 0.3)
    monkeypatch.undo()
    assert (scores >= floor).sum() == wanted
    assert 256 < wanted <= sorted_sizes[-1] and sum(sorted_sizes) < 30_000


@pytest.mark.parametrize(("gap", "vocab", "temperature"), [(9.0, 20_000, 1.0), (900.0, 20_000, 100.0), (0.2, 500, 0.7)])
def test_leaving_out_what_noise_cannot_lift_changes_nothing(gap: float, vocab: int, temperature: float) -> None:
    """One favourite, a crowd that together is as probable, and a crowd without a chance."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(np.concatenate([[0.0], -gap + rng.standard_normal(vocab), np.full(999, -1e4)]))
    sampler = Sampler(SamplingParams(temperature), len(logits))
    assert len(sampler.candidates(logits.numpy() / temperature)) == vocab + 1
    chosen = []
    for seed in range(40):
        sampler.params = SamplingParams(temperature, seed=seed, stream=seed % 3)
        history = History([0] * (seed % 5))
        perturbed = logits.numpy() / temperature + noise.gumbel(seed, len(history), np.arange(len(logits)), seed % 3)
        ranked = np.lexsort((np.arange(len(logits)), -perturbed))
        chosen.append(sampler.choose(logits, history))
        assert chosen[-1] == ranked[0]
        assert sampler.rank(logits, history, 4) == ranked[:4].tolist()
    assert len(set(chosen)) > 5


def test_runners_up_are_ranked_however_far_behind_the_best_they_are() -> None:
    row = torch.tensor([-200.0, -150.0, 0.0, -500.0, -100.0])
    assert Sampler(SamplingParams(1.0), 5).rank(row, History(), 4) == [2, 4, 1, 0]


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    st.integers(1, 50),
    st.sampled_from([0.0, 0.5, 5.0]),
    st.integers(0, 10),
    st.sampled_from([0.3, 1.0]),
)
def test_the_first_of_a_ranking_is_the_choice(
    logits: list[int], count: int, temperature: float, top_k: int, top_p: float
) -> None:
    row = torch.tensor(logits, dtype=torch.float32)
    sampler = Sampler(SamplingParams(temperature, top_k, top_p, seed=4), len(row))
    ranked = sampler.rank(row, History([1, 2]), count)
    assert ranked[0] == sampler.choose(row, History([1, 2]))
    assert len(set(ranked)) == len(ranked) <= count
    if temperature == 0:
        assert ranked == sorted(range(len(row)), key=lambda token: (-logits[token], token))[:count]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_greedy_takes_the_largest_and_of_equals_the_lowest_id(dtype: torch.dtype) -> None:
    assert choose(torch.tensor([1, 3, 2, 3, 3], dtype=dtype)) == 1
    assert choose(torch.tensor([-5, -7], dtype=dtype)) == 0


def test_of_equal_perturbed_scores_the_lowest_id_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "gumbel", lambda seed, position, tokens, stream: np.zeros(len(tokens)))
    sampler = Sampler(SamplingParams(1.0), 5)
    row = torch.tensor([1.0, 2.0, 0.0, 2.0, 2.0])
    assert sampler.choose(row, History()) == 1
    assert sampler.rank(row, History(), 2) == [1, 3] and sampler.rank(row, History(), 5) == [1, 3, 4, 0, 2]


def test_bans_and_biases() -> None:
    row = torch.tensor([1.0, 3.0, 2.0])
    assert choose(row, ban=(1,)) == 2
    assert choose(row, logit_bias={0: 2.5}) == 0
    assert choose(row, ban=(0,), logit_bias={0: 100.0}) == 1
    assert all(choose(row, ban=(1,), temperature=50.0, seed=seed) != 1 for seed in range(50))


@pytest.mark.parametrize(
    ("field", "value"),
    [("ban", (3,)), ("ban", (-1,)), ("logit_bias", {3: 1.0}), ("dry_breakers", (1, 7))],
)
def test_token_ids_the_model_does_not_have_are_refused(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^{field}: .*token ids are 0 to 2$"):
        Sampler(SamplingParams(**{field: value}), 3)


def test_an_end_of_text_that_no_vocabulary_has_bans_nothing() -> None:
    """Checkpoints write -1, or an id of a larger vocabulary, where no token ends a text."""
    sampler = Sampler(SamplingParams(), 4, eos=[-1, 4, 7], first_end=5)
    assert sampler.choose(torch.tensor([0.0, 1.0, 2.0, 3.0]), History([0])) == 3


def test_no_end_of_sequence_before_the_first_position_it_is_allowed_at() -> None:
    sampler = Sampler(SamplingParams(), 4, eos=[3, 1], first_end=5)
    row = torch.tensor([0.0, 2.0, 1.0, 3.0])
    assert sampler.choose(row, History([3] * 4)) == 2
    assert sampler.choose(row, History([3] * 5)) == 3


def test_no_chapter_ends_before_it_has_its_tokens() -> None:
    """Asked in any order: the chapters are those that the positions lie in."""
    sampler = Sampler(SamplingParams(), 4, eos=[3, 1], first_end=5, chapter_tokens=3)
    for position in (2, 10, 20):
        sampler.begin_chapter(position)
    row = torch.tensor([0.0, 2.0, 1.0, 3.0])
    may_end = [position for position in reversed(range(25)) if sampler.choose(row, History([0] * position)) == 3]
    assert may_end == [24, 23, *range(19, 12, -1), *range(9, 4, -1)]


def test_processors_see_the_text_and_the_penalised_scores_before_the_temperature() -> None:
    seen = []

    def remember(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append((ids.clone(), scores.clone()))
        return scores + torch.tensor([0.0, 0.0, 10.0])

    params = SamplingParams(temperature=2.0, penalty=2.0, ban=(1,))
    sampler = Sampler(params, 3, processors=[remember, remember])
    assert sampler.choose(torch.tensor([4.0, 9.0, -8.0]), History([0, 2])) == 2
    (ids, scores), (_, again) = seen
    assert ids.dtype == torch.int64 and ids.tolist() == [[0, 2]]
    assert scores.tolist() == [[2.0, -torch.inf, -16.0]] and again.tolist() == [[2.0, -torch.inf, -6.0]]


def test_a_processor_of_hugging_faces_works_as_it_does_there() -> None:
    sampler = Sampler(SamplingParams(), 3, processors=[NoRepeatNGramLogitsProcessor(2)])
    row = torch.tensor([1.0, 3.0, 2.0])
    assert sampler.choose(row, History([0, 1, 0])) == 2
    assert sampler.choose(row, History([0, 2, 0])) == 1


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error_with_their_position(wrong: float) -> None:
    with pytest.raises(NumericsError, match="position 3 are not finite"):
        choose([0.0, wrong, 1.0], [1, 1, 1])
    with pytest.raises(NumericsError, match="position 0 are not finite"):
        choose([-torch.inf, -torch.inf])
    assert choose([-torch.inf, 0.0], temperature=1.0) == 1


def test_nothing_left_to_choose_from_is_an_error_with_its_position() -> None:
    with pytest.raises(NumericsError, match="no token is left to choose from at position 2"):
        choose([0.0, 1.0], [1, 1], ban=(0, 1))
    with pytest.raises(NumericsError, match="at position 1"):
        Sampler(SamplingParams(), 2, processors=[lambda ids, scores: scores * torch.nan]).choose(
            torch.zeros(2), History([0])
        )


@given(
    st.lists(st.integers(0, 7), max_size=30),
    st.integers(1, 40),
    st.floats(1, 5),
    st.lists(st.floats(-9, 9), min_size=8, max_size=8),
)
@example([0, 1, 2, 1], 3, 2.0, [3.0, -3.0] * 4)
def test_the_contextual_penalty_touches_each_token_of_the_window_once(
    tokens: list[int], window: int, theta: float, logits: list[float]
) -> None:
    sampler = Sampler(SamplingParams(penalty=theta, penalty_window=window), 8)
    scores = sampler.process(torch.tensor(logits, dtype=torch.float64), History(tokens))
    for token, logit in enumerate(logits):
        inside = token in tokens[max(0, len(tokens) - window) :]
        assert scores[token] == ((logit / theta if logit > 0 else logit * theta) if inside else logit)


def dry_by_definition(tokens: list[int], shortest: int, breakers: list[int]) -> dict[int, int]:
    """For every earlier place, how far back it equals the text's end; the longest for each token that followed."""
    longest: dict[int, int] = {}
    for end in range(1, len(tokens)):
        before, text, matched = tokens[:end], tokens, 0
        while (
            matched < min(end, DRY_LONGEST)
            and before[-1 - matched] == text[-1 - matched]
            and text[-1 - matched] not in breakers
        ):
            matched += 1
        if matched >= shortest and tokens[end] not in breakers:
            longest[tokens[end]] = max(matched, longest.get(tokens[end], 0))
    return longest


repetitive = st.builds(
    lambda block, rounds, end: block * rounds + end,
    st.lists(st.integers(0, 3), max_size=30),
    st.integers(0, 6),
    st.lists(st.integers(0, 3), max_size=6),
)


@given(repetitive, st.integers(1, 5), st.lists(st.integers(0, 3), max_size=2))
def test_dry_finds_the_longest_match_before_every_token(tokens: list[int], shortest: int, breakers: list[int]) -> None:
    following, matched = dry_matches(np.array(tokens, np.int32), shortest, np.array(breakers, np.int32))
    assert dict(zip(following.tolist(), matched.tolist(), strict=True)) == dry_by_definition(tokens, shortest, breakers)


def test_dry_counts_no_further_than_its_longest_match() -> None:
    text = np.zeros(3 * DRY_LONGEST, np.int32)
    for shortest in (1, DRY_LONGEST):
        following, matched = dry_matches(text, shortest, np.array([], np.int32))
        assert following.tolist() == [0] and matched.tolist() == [DRY_LONGEST]


def test_dry_subtracts_what_grows_with_the_match() -> None:
    params = SamplingParams(dry_multiplier=0.5, dry_base=3.0, dry_length=2)
    text = [1, 2, 3, 4, 9, 2, 3, 5, 9, 1, 2, 3]
    scores = Sampler(params, 10).process(torch.zeros(10), History(text))
    assert {token: score for token, score in enumerate(scores) if score} == {4: -0.5 * 3.0, 5: -0.5}
    for window, found in ((12, {4: -0.5 * 3.0, 5: -0.5}), (11, {4: -0.5, 5: -0.5}), (9, {5: -0.5}), (3, {})):
        near = dataclasses.replace(params, dry_window=window)
        scores = Sampler(near, 10).process(torch.zeros(10), History(text))
        assert {token: score for token, score in enumerate(scores) if score} == found, window
    harsh = SamplingParams(dry_multiplier=1000.0, dry_base=16.0, dry_length=1)
    assert Sampler(harsh, 2).choose(torch.tensor([1e3, 0.0]), History([0] * 200)) == 1


def test_the_log_probability_is_the_models_own() -> None:
    row = torch.tensor([1.0, -2.0, 700.0, 699.0])
    for token in range(4):
        wanted = float(row[token]) - float(logsumexp(row.double().numpy()))
        assert log_probability(row, token) == pytest.approx(wanted, rel=1e-12, abs=1e-12)
