"""The three samplers agree where numbers end: tiny temperatures, ties at an edge, -0, denormals, infinities.

The right choice is told from the rules in `sampling`'s docstring, one token at a time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper

from tokenswift_py.core import GREEDY_BELOW, DraftTree, SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.verify import walk
from tokenswift_py.errors import UserError
from tokenswift_py.sampling import noise
from tokenswift_py.sampling.reference import NumericsError, Sampler

SAMPLERS: list[Any] = [Sampler]
try:
    from tokenswift_py.sampling.native import NativeSampler

    NativeSampler(SamplingParams(), 4)
    SAMPLERS.append(NativeSampler)
except ImportError:
    pass
try:
    import triton  # noqa: F401

    from interpreter import DEVICE
    from tokenswift_py.sampling.triton import TritonSampler

    SAMPLERS.append(TritonSampler)
except ImportError:
    pass

BIG, TINY, DENORMAL = 3.4028234663852886e38, 1.1754943508222875e-38, 1e-45  # of fp32
LOGITS = [
    0.0,
    -0.0,
    DENORMAL,
    -DENORMAL,
    TINY,
    -TINY,
    1.0,
    1.0000001,
    -1.0,
    25.0,
    1e4,
    BIG,
    -BIG,
    -math.inf,
    math.inf,
    math.nan,
]


def by_definition(row: list[float], position: int, params: SamplingParams, recent: set[int]) -> int | None:
    """The choice, or None where there is none."""
    if any(math.isnan(x) or x == math.inf for x in row) or max(row) == -math.inf:
        return None
    scores = []
    for token, logit in enumerate(row):
        score = logit
        if token in recent and params.penalty != 1:
            score = score / params.penalty if score > 0 else score * params.penalty
        score += params.logit_bias.get(token, 0.0)
        scores.append(-math.inf if token in params.ban else score)
    if max(scores) == -math.inf:
        return None
    if params.temperature:
        scores = [score / params.temperature for score in scores]
        floors = [-math.inf]
        if 0 < params.top_k < len(row):
            floors.append(sorted(scores, reverse=True)[params.top_k - 1])
        if params.min_p:
            floors.append(max(scores) + float(noise.log(params.min_p)))
        gumbel = noise.gumbel(params.seed, position, np.arange(len(row)), params.stream)
        scores = [s + float(g) if s >= max(floors) else -math.inf for s, g in zip(scores, gumbel, strict=True)]
    return scores.index(max(scores))


def chosen(kind: Any, row: list[float], history: list[int], params: SamplingParams) -> int | None:
    logits = torch.tensor(row, dtype=torch.float32, device=DEVICE if kind.__name__ == "TritonSampler" else "cpu")
    try:
        return int(kind(params, len(row)).choose(logits, History(history)))
    except NumericsError:
        return None


@pytest.mark.parametrize("kind", SAMPLERS, ids=lambda kind: kind.__name__)
@settings(max_examples=150)
@given(
    row=st.lists(st.one_of(st.sampled_from(LOGITS[:-2]), st.sampled_from(LOGITS)), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, -0.0, 5e-324, 1e-308, 1e-30, 9.9e-6, 1e-5, 1e-3, 0.7, 1.0, 100.0]),
    top_k=st.integers(0, 5),
    min_p=st.sampled_from([0.0, 5e-324, 0.2, 1.0]),
    penalty=st.sampled_from([1.0, 1.5, 100.0]),
    ban=st.sampled_from([(), (0,), (0, 1, 2)]),
    bias=st.sampled_from([{}, {0: BIG}, {0: -BIG, 1: 2.0}, {0: DENORMAL}]),
    seed=st.integers(0, 50),
)
@example([0.0, -0.0, 0.0], 1e-308, 1, 0.0, 1.5, (), {}, 1)
@example([1.0, 0.5], 1e-308, 0, 0.0, 1.0, (), {}, 1)
def test_every_sampler_keeps_to_the_rules(
    kind: Any,
    row: list[float],
    temperature: float,
    top_k: int,
    min_p: float,
    penalty: float,
    ban: Any,
    bias: Any,
    seed: int,
) -> None:
    ban = tuple(token for token in ban if token < len(row))
    bias = {token: value for token, value in bias.items() if token < len(row)}
    params = SamplingParams(
        temperature, top_k, min_p=min_p, penalty=penalty, ban=ban, logit_bias=bias, seed=seed, dry_multiplier=0.0
    )
    row = [float(np.float32(x)) for x in row]
    history = [0, len(row) - 1]
    assert chosen(kind, row, history, params) == by_definition(row, len(history), params, set(history))


@pytest.mark.parametrize("kind", SAMPLERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-308, 1e-20, 0.99 * GREEDY_BELOW])
def test_a_temperature_too_low_to_divide_by_is_greedy(kind: Any, temperature: float) -> None:
    assert SamplingParams(temperature).temperature == 0
    for seed in range(20):
        params = SamplingParams(temperature, top_k=3, top_p=0.5, min_p=0.1, seed=seed)
        assert chosen(kind, [1.0, 1.0000001, 1.0000001, -5.0], [1], params) == 1
    assert SamplingParams(GREEDY_BELOW).temperature == GREEDY_BELOW


@pytest.mark.parametrize("kind", SAMPLERS, ids=lambda kind: kind.__name__)
def test_ties_at_the_edge_of_top_k_stay_as_hugging_face_has_them(kind: Any) -> None:
    row = [2.0, 1.0, -0.0, 0.0, 1.0, 0.0, -1.0, 1.0]
    for top_k, min_p in ((2, 0.0), (7, 0.985)):
        warpers = LogitsProcessorList(
            [TemperatureLogitsWarper(100.0), TopKLogitsWarper(top_k), MinPLogitsWarper(min_p)]
        )
        warped = warpers(torch.zeros(1, 1, dtype=torch.long), torch.tensor([row]))[0]
        params = [SamplingParams(100.0, top_k, min_p=min_p, seed=seed) for seed in range(40)]
        wanted = set(torch.nonzero(warped > -torch.inf)[:, 0].tolist())
        assert {chosen(kind, row, [1], each) for each in params} == wanted and len(wanted) == 4


@pytest.mark.parametrize("bias", [1e39, -1e308, math.inf, math.nan, 10**400])
def test_a_bias_that_fp32_cannot_hold_is_refused(bias: float) -> None:
    with pytest.raises(UserError, match=r"^logit_bias: .* finite numbers that fp32 can hold"):
        SamplingParams(logit_bias={1: bias})


@pytest.mark.parametrize("kind", SAMPLERS)
def test_what_cannot_be_chosen_costs_no_token_before_it(kind: Any) -> None:
    """As plain decoding, which writes the tokens before and then meets it. The next round's root does, too."""
    logits = torch.zeros(3, 9, device=DEVICE if kind.__name__ == "TritonSampler" else "cpu")
    logits[0, 6] = 9.0
    logits[1] = torch.nan
    sampler, history = kind(SamplingParams(), 9), History([5])
    taken = walk(DraftTree.chain([5, 6, 7]), logits, sampler, history, lambda _: None, True, 2)
    assert (taken.tokens, taken.path, taken.ending) == ((6,), (0,), None)
    assert taken.logprobs is not None and taken.top_logprobs is not None
    assert len(taken.logprobs) == len(taken.top_logprobs) == 1
    assert list(history.tokens) == [5, 6]
    with pytest.raises(NumericsError, match="position 2"):
        walk(DraftTree.chain([6, 7]), logits[1:], sampler, history, lambda _: None)
    assert list(history.tokens) == [5, 6]
