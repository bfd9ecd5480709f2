"""The statistics of a run: acceptance by vLLM's names, diversity of the text, and loops where there are some."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenswift_py.core import Acceptance, DraftTree
from tokenswift_py.decoding.statistics import (
    GenerationStats,
    Loop,
    LoopDetector,
    distinct_n,
    find_loop,
    memory_bandwidth,
)
from tokenswift_py.runs.report import resident_peak


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_distinct_n_is_different_ngrams_over_all_ngrams(tokens: list[int], n: int) -> None:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    assert distinct_n(tokens, n) == (len(set(grams)) / len(grams) if grams else None)


def noise_of(count: int, seed: int) -> list[int]:
    return (1000 + np.random.default_rng(seed).integers(0, 40, count)).tolist()


@pytest.mark.parametrize(("period", "rounds"), [(1, 64), (1, 400), (7, 10), (40, 4), (130, 5), (512, 4)])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (333, 0), (0, 90), (50, 51)])
def test_a_planted_loop_is_found_where_it_is(period: int, rounds: int, before: int, after: int) -> None:
    block = list(range(period))
    text = [*noise_of(before, 1), *(block * rounds), *noise_of(after, 2)]
    assert find_loop(text) == Loop(before, before + period * rounds, period)


def test_a_broken_round_at_the_end_belongs_to_the_loop() -> None:
    assert find_loop([99, *([1, 2, 3] * 30), 1, 2, 98]) == Loop(1, 93, 3)


def test_the_longest_of_several_loops_is_told() -> None:
    text = [*([1] * 70), *noise_of(30, 1), *([1, 2] * 60), *noise_of(30, 2), *([3] * 80)]
    assert find_loop(text) == Loop(100, 220, 2)


@pytest.mark.parametrize(
    "text",
    [
        [],
        [1],
        [1] * 63,
        list(range(30)) * 3,
        list(range(513)) * 4,
        noise_of(5000, 3),
        (np.random.default_rng(4).integers(0, 2, 5000)).tolist(),
    ],
)
def test_short_rare_long_and_random_repeats_are_no_loop(text: Sequence[int]) -> None:
    assert find_loop(text) is None


def test_what_counts_as_a_loop_can_be_chosen() -> None:
    text = [9, *([1, 2, 3] * 3), 8]
    assert find_loop(text, least=9, rounds=3) == Loop(1, 10, 3)
    assert find_loop(text, least=10, rounds=3) is None
    assert find_loop(text, least=9, rounds=4) is None
    assert find_loop(text, least=9, rounds=3, longest_period=2) is None


loopy_texts = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(1, 9)), max_size=12
).map(lambda parts: [token for block, rounds in parts for token in block * rounds])


@given(loopy_texts, st.integers(1, 20), st.integers(2, 5), st.integers(1, 12))
def test_token_by_token_the_verdict_is_find_loops_on_every_prefix(
    text: list[int], least: int, rounds: int, longest_period: int
) -> None:
    detector = LoopDetector(least, rounds, longest_period)
    for count, token in enumerate(text, start=1):
        known = len(detector.loops)
        found = detector.push(token)
        assert detector.longest == find_loop(text[:count], least, rounds, longest_period)
        assert (found is not None) == (len(detector.loops) > known)
        if found:
            assert found.stop == count and found == detector.loops[-1]
    for loop in detector.loops:
        stretch, period = text[loop.start : loop.stop], loop.period
        assert len(stretch) >= max(least, rounds * period) and period <= longest_period
        assert stretch[period:] == stretch[:-period]
        # It begins where it begins, and as long as it was followed nothing shorter explained it.
        assert loop.start == 0 or text[loop.start - 1] != text[loop.start - 1 + period]
        assert all(stretch[shorter:] != stretch[:-shorter] for shorter in range(1, period))


@pytest.mark.parametrize(("period", "rounds"), [(1, 64), (7, 10), (130, 5), (512, 4)])
def test_a_loop_is_told_once_at_the_first_token_that_makes_it_one(period: int, rounds: int) -> None:
    before, block = noise_of(100, 1), list(range(period))
    detector = LoopDetector()
    found = [detector.push(token) for token in [*before, *(block * rounds), *noise_of(100, 2)]]
    told = [loop for loop in found if loop]
    least = max(64, 4 * period)
    assert told == [Loop(100, 100 + least, period)] and found[100 + least - 1]
    assert detector.loops == [Loop(100, 100 + period * rounds, period)] == [detector.longest]


def test_a_loop_that_comes_again_is_told_again_and_one_inside_another_is_not() -> None:
    block = [*([7] * 80), *range(20)]  # itself a loop of one token, until the block is seen to come round
    detector = LoopDetector()
    for token in [*(block * 6), *noise_of(50, 1), *([7] * 90)]:
        detector.push(token)
    assert [loop.period for loop in detector.loops] == [1, 1, 1, 1, 100, 1]
    assert detector.loops[4] == Loop(0, 600, 100) and detector.loops[5] == Loop(650, 740, 1)


def test_acceptance_is_counted_by_vllms_names() -> None:
    stats = GenerationStats(first_tokens=1)
    tree = DraftTree([0, 1, 2, 3], [-1, 0, 0, 1])
    stats.record(tree, Acceptance((0, 1, 3), (1, 3, 9)))
    stats.record(tree, Acceptance((0,), (7,)))
    stats.record(DraftTree.chain([7]), Acceptance((0,), (8,)))
    assert stats.to_dict() == {
        "num_spec_steps": 3,
        "num_draft_tokens": 6,
        "num_accepted_draft_tokens": 2,
        "mean_acceptance_length": 1 + 2 / 3,
        "draft_acceptance_rate": 2 / 6,
        "acceptance_histogram": {"0": 2, "2": 1},
    }
    assert stats.step_tokens == 5 and stats.new_tokens == 6


def test_before_the_first_step_there_are_no_ratios() -> None:
    stats = GenerationStats()
    report = stats.to_dict()
    assert report["mean_acceptance_length"] is None and report["draft_acceptance_rate"] is None
    assert stats.ms_per_token is None


def test_time_is_added_up_by_phase_and_decoding_is_all_but_prefill() -> None:
    stats = GenerationStats(step_tokens=4, phase_ms={"prefill": 100.0, "draft": 1.0, "verify": 6.0})
    assert stats.decode_ms == 7.0 and stats.ms_per_token == 1.75
    stats.spent("verify", 2.0)
    stats.spent("accept", 3.0)
    assert stats.phase_ms == {"prefill": 100.0, "draft": 1.0, "verify": 8.0, "accept": 3.0}
    assert stats.latest_ms == {"verify": 2.0, "accept": 3.0}


def test_memory_bandwidth_is_a_rate_a_machine_can_have() -> None:
    assert 1e8 < memory_bandwidth(8) < 1e13


def test_memory_bandwidth_of_a_gpu_is_its_own_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 GB, of which the host sees no more than that it asked: on `meta`, which has no memory to read at all."""
    laps = iter([8.0, 4.0, 1.0, 2.0, 4.0, 4.0, 4.0, 4.0])
    lap = SimpleNamespace(stop=lambda: None)
    clock = SimpleNamespace(start=lambda: SimpleNamespace(stop=lap.stop, ms=next(laps)))
    monkeypatch.setattr("tokenswift_py.decoding.statistics.clock_of", lambda device: clock)
    assert memory_bandwidth(device=torch.device("meta")) == pytest.approx(2**31 / 1e-3)
    with pytest.raises(StopIteration):
        next(laps)


def test_peak_memory_is_the_processes_own(tmp_path: Path) -> None:
    """Not that of the process which started it: ru_maxrss goes on from there."""
    code = "from tokenswift_py.runs.report import resident_peak; print(resident_peak())"
    large = bytearray(b"x") * (600 * 2**20)
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    out, _ = child.communicate()
    assert 50 * 2**20 < int(out) < len(large)
    assert resident_peak() > len(large)
    other = resident_peak(tmp_path / "none")
    assert other >= len(large)  # without /proc
