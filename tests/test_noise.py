"""The noise is the specified function of (seed, position, token, stream), bit for bit, and is Gumbel distributed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tokenswift_py.sampling import noise

RANDOM123 = [
    ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), RANDOM123)
def test_the_known_answers_of_random123(counter: tuple[int, int, int, int], key: int, words: str) -> None:
    assert " ".join(f"{int(word):08x}" for word in noise.philox(counter, key)) == words


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**18),
    st.integers(0, 2**32 - 1),
    st.integers(0, 3),
)
def test_position_token_stream_and_domain_are_the_counter(
    seed: int, position: int, token: int, stream: int, domain: int
) -> None:
    word = int(noise.philox((position, token // 4, stream, domain), seed)[token % 4])
    wanted = -math.log(-math.log((word + 0.5) / 2**32))
    got = noise.gumbel(seed, position, np.array([token]), stream, domain)[0]
    assert got == pytest.approx(wanted, rel=1e-13, abs=1e-13)


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_a_tokens_noise_does_not_depend_on_which_others_are_asked_for(
    seed: int, position: int, tokens: list[int]
) -> None:
    everything = noise.gumbel(seed, position, np.arange(1001))
    assert (noise.gumbel(seed, position, np.array(tokens)) == everything[tokens]).all()


def test_every_part_of_the_counter_changes_all_of_the_noise() -> None:
    tokens = np.arange(100)
    base = noise.gumbel(1, 1, tokens)
    for other in (
        noise.gumbel(2, 1, tokens),
        noise.gumbel(1 + 2**32, 1, tokens),
        noise.gumbel(1, 2, tokens),
        noise.gumbel(1, 1, tokens, stream=1),
        noise.gumbel(1, 1, tokens, domain=1),
        noise.gumbel(1, 1, tokens + 100),
    ):
        assert (base != other).all()


def test_logarithm_and_exponential_are_accurate() -> None:
    """The logarithm to 3 units in the last place. The exponential reduces by a one-word ln 2, so its relative error
    grows with |x|, to some 2^-52 (1 + |x|)."""
    rng = np.random.default_rng(0)
    x = np.concatenate([np.exp(rng.uniform(-700, 700, 20000)), 1 + rng.uniform(-1e-8, 1e-8, 1000), [1, 0.5, 2]])
    true = np.array([math.log(value) for value in x])
    assert (np.abs(noise.log(x) - true) <= 3 * np.spacing(np.abs(true))).all()
    for x in (rng.uniform(-0.34, 0.34, 20000), rng.uniform(-700, 700, 20000)):
        true = np.array([math.exp(value) for value in x])
        assert (np.abs(noise.exp(x) - true) <= 2**-52 * (1 + np.abs(x)) * true).all()
    assert noise.log(1.0) == 0 and noise.exp(0.0) == 1


def test_no_noise_lies_outside_the_bounds_that_pruning_relies_on() -> None:
    """Both ends of the generator's range, and a million draws between."""
    ends = np.concatenate([np.arange(5000.0), 2.0**32 - 1 - np.arange(5000.0)])
    values = -noise.log(-noise.log((ends + 0.5) * 2.0**-32))
    assert values.min() == noise.LOWEST == values[0] and values.max() == noise.HIGHEST == values[5000]
    drawn = noise.gumbel(3, 0, np.arange(1_000_000))
    assert noise.LOWEST <= drawn.min() < -2.5 and 12 < drawn.max() <= noise.HIGHEST
    assert pytest.approx(33 * math.log(2), rel=1e-9) == noise.HIGHEST
    assert pytest.approx(-math.log(33 * math.log(2)), rel=1e-12) == noise.LOWEST


def test_the_noise_is_gumbel_distributed_over_tokens_and_over_positions() -> None:
    over_tokens = noise.gumbel(5, 17, np.arange(20000))
    over_positions = np.array([noise.gumbel(5, position, np.array([17]))[0] for position in range(4000)])
    for sample in (over_tokens, over_positions):
        assert stats.kstest(sample, "gumbel_r").pvalue > 0.01
    assert abs(np.corrcoef(over_tokens[:-1], over_tokens[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(over_positions[:-1], over_positions[1:])[0, 1]) < 0.06


def bits(values: np.ndarray) -> list[str]:
    return [float(value).hex() for value in values]


def test_the_specification_has_not_drifted() -> None:
    """Bit patterns that every implementation must give; a change here changes what every seed writes."""
    assert bits(noise.gumbel(0, 0, np.arange(6))) == [
        "0x1.5b6c7ac8fd9dcp-4",
        "0x1.07e48418102fap+1",
        "0x1.2e620091dacd7p+0",
        "0x1.611f4827b3c8cp-1",
        "0x1.13a3ebe49d0c1p-3",
        "0x1.3543f6641a411p+1",
    ]
    assert bits(noise.gumbel(2**64 - 1, 123456, np.array([0, 7, 151935]), stream=3)) == [
        "0x1.4c12201f128fbp-2",
        "0x1.b38ec42482c1cp+1",
        "-0x1.c59155470dd7cp-1",
    ]
    assert bits(noise.log(np.array([1e-300, 0.1, 0.7071067811865475, 3.0]))) == [
        "-0x1.5963447f87fb5p+9",
        "-0x1.26bb1bbb55515p+1",
        "-0x1.62e42fefa39f1p-2",
        "0x1.193ea7aad030ap+0",
    ]
    assert bits(noise.exp(np.array([-27.5, -1.0, 0.3, 700.0]))) == [
        "0x1.40e111f58fa5bp-40",
        "0x1.78b56362cef38p-2",
        "0x1.599058c8c1a96p+0",
        "0x1.d945df4f8ee2dp+1009",
    ]
    assert bits(np.array([noise.LOWEST, noise.HIGHEST])) == ["-0x1.90a3aa15a0b5dp+1", "0x1.6dfb516f1cbbep+4"]
