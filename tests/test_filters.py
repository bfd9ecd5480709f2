"""Filters by more than a floor: each keeps what its definition keeps, and the coin of XTC belongs to a position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.sampling import noise
from tokenswift_py.sampling.filters import halving_sum
from tokenswift_py.sampling.reference import Sampler


def rows(count: int, vocab: int = 300) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [spread * rng.standard_normal(vocab) for spread in (0.01, 1.0, 3.0) for _ in range(count)]


@pytest.mark.parametrize(
    ("mass", "temperature", "top_k", "top_p", "min_p"),
    [(0.9, 1.0, 0, 1.0, 0.0), (0.2, 1.0, 0, 1.0, 0.0), (0.999, 1.0, 0, 1.0, 0.0), (1e-6, 1.0, 0, 1.0, 0.0),
     (0.7, 1.3, 50, 0.95, 0.01), (0.5, 0.6, 0, 0.9, 0.0)],
)  # fmt: skip
def test_typical_p_is_transformers_and_comes_last_of_theirs(
    mass: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    warpers.append(TypicalLogitsWarper(mass))
    sampler = Sampler(SamplingParams(temperature, top_k, top_p, min_p, typical_p=mass), 300)
    for row in rows(8):
        warped = warpers(torch.zeros(1, 0, dtype=torch.long), torch.from_numpy(row)[None].clone())[0]
        kept = sampler.candidates(row / temperature).tolist()
        assert kept == torch.nonzero(warped > -torch.inf)[:, 0].tolist()


@pytest.mark.parametrize("sigmas", [0.5, 1.0, 2.0])
def test_top_n_sigma_keeps_what_is_near_the_best(sigmas: float) -> None:
    """logit >= max - n * sigma, sigma the standard deviation of all logits that are not excluded."""
    for row in rows(8):
        row[::7] = -np.inf
        live = row[row > -np.inf]
        wanted = np.flatnonzero(row >= live.max() - sigmas * live.std()).tolist()
        for temperature in (0.5, 1.0, 3.0):
            sampler = Sampler(SamplingParams(temperature, top_n_sigma=sigmas), 300)
            assert sampler.candidates(row / temperature).tolist() == wanted


def test_top_p_counts_the_mass_that_top_n_sigma_left() -> None:
    """Tokens have 0.5, 0.3, 0.15, many next to nothing. The first three are near, and two have 84 % of them."""
    row = np.log(np.array([0.5, 0.3, 0.15, *([0.05 / 500] * 500)]))
    wide = Sampler(SamplingParams(1.0, top_n_sigma=5.0), len(row))
    both = Sampler(SamplingParams(1.0, top_p=0.83, top_n_sigma=5.0), len(row))
    alone = Sampler(SamplingParams(1.0, top_p=0.83), len(row))
    assert wide.candidates(row).tolist() == [0, 1, 2]
    assert both.candidates(row).tolist() == [0, 1] and alone.candidates(row).tolist() == [0, 1, 2]


def test_xtc_leaves_out_all_but_the_least_of_the_probable() -> None:
    row = np.log(np.array([0.4, 0.05, 0.3, 0.15, 0.1]))
    for threshold, kept in ((0.12, [1, 3, 4]), (0.2, [1, 2, 3, 4]), (0.35, [0, 1, 2, 3, 4]), (0.5, [0, 1, 2, 3, 4])):
        sampler = Sampler(SamplingParams(1.0, xtc_threshold=threshold, xtc_probability=1.0), 5)
        assert sampler.candidates(row).tolist() == kept


def test_xtc_sees_what_the_other_filters_left() -> None:
    """If 0.4, 0.3 and 0.15 are left, the last has 0.176 of the mass."""
    row = np.log(np.array([0.4, 0.05, 0.3, 0.15, 0.1]))
    sampler = Sampler(SamplingParams(1.0, top_k=3, xtc_threshold=0.17, xtc_probability=1.0), 5)
    assert sampler.candidates(row).tolist() == [3]


def test_the_coin_of_xtc_is_noise_of_the_position_of_a_domain_of_its_own() -> None:
    row, acted = np.log(np.array([0.6, 0.4])), []
    for position in range(4000):
        sampler = Sampler(SamplingParams(1.0, xtc_threshold=0.2, xtc_probability=0.3, seed=7, stream=2), 2)
        acted.append(sampler.candidates(row, position=position).tolist() == [1])
        word = int(noise.philox((position, 0, 2, noise.XTC_DOMAIN), 7)[0])
        assert acted[-1] == ((word + 0.5) / 2**32 < 0.3)
    assert abs(np.mean(acted) - 0.3) < 0.03 and noise.XTC_DOMAIN != noise.TOKEN_DOMAIN


@settings(max_examples=60)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=40), st.sampled_from([0.3, 0.9]), st.integers(0, 99))
def test_ties_stay_or_go_together(row: list[int], mass: float, position: int) -> None:
    scores = np.array(row, np.float64)
    sampler = Sampler(SamplingParams(1.0, typical_p=mass, xtc_threshold=0.1, xtc_probability=0.5), len(row))
    kept = set(sampler.candidates(scores, position=position).tolist())
    assert kept and all(
        (a in kept) == (b in kept) for a in range(len(row)) for b in range(len(row)) if row[a] == row[b]
    )


@given(st.lists(st.floats(-1e6, 1e6), max_size=70))
def test_a_sum_by_halving_is_a_sum(values: list[float]) -> None:
    assert halving_sum(np.array(values)) == pytest.approx(float(np.sum(values)), rel=1e-9, abs=1e-6)


def test_greedy_knows_no_filters() -> None:
    params = SamplingParams(0.0, typical_p=0.1, top_n_sigma=0.1, xtc_threshold=0.0, xtc_probability=1.0)
    assert Sampler(params, 4).choose(torch.tensor([1.0, 3.0, 2.0, 2.9]), History([1])) == 1


@pytest.mark.parametrize("settings", [{"typical_p": 0.5}, {"xtc_probability": 1.0, "xtc_threshold": 0.05}])
def test_what_is_behind_the_choice_has_a_margin_and_a_slack(settings: dict[str, Any]) -> None:
    row, history = torch.from_numpy(rows(1)[2]), History([1, 2])
    sampler = Sampler(SamplingParams(1.0, seed=3, **settings), 300)
    choice = sampler.choose(row, history)
    assert sampler.behind(row, history, choice) == (0.0, 0.0)
    kept = sampler.candidates(row.numpy(), position=2).tolist()
    for token in range(0, 300, 7):
        margin, slack = sampler.behind(row, history, token)
        assert slack >= margin and (slack > 0) == (token != choice)
        assert token in kept or slack > 0
