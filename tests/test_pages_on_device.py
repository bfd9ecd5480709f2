"""Pages are chosen where the attention mass lies: by the sums and choices of the host, which gets indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interpreter import DEVICE
from tokenswift_py.kvcache.base import PAGE_SIZE, Committed, PageStats, best, best_there, select
from tokenswift_py.kvcache.policies.mass import Mass
from transfers import Transfers

LAYERS, KV_HEADS = 3, 2


@settings(max_examples=100)
@given(pages=st.integers(0, 60), count=st.integers(0, 60), seed=st.integers(0, 1000))
def test_the_best_pages_are_those_that_the_host_chooses(pages: int, count: int, seed: int) -> None:
    """Scores have few values, so that most are equal."""
    scores = np.random.default_rng(seed).integers(-2, 3, (LAYERS, KV_HEADS, pages)).astype(np.float64)
    scores[scores == 2] = -np.inf if seed % 2 else np.nan
    count = min(count, pages)
    chosen = best_there(torch.from_numpy(scores).to(DEVICE), count)
    assert chosen.dtype == torch.int32 and chosen.tolist() == best(scores, count).tolist()


@pytest.mark.parametrize("decay", [0.9, 0.3, 1.0])
def test_sums_and_choices_are_those_of_the_host(decay: float) -> None:
    """Over pages that become more, sweeps of what has decayed, and pages that were evicted."""
    rng, start = np.random.default_rng(0), 0
    host, device = Mass(decay), Mass(decay)
    for pages in (1, 3, 64, 65, 200, 200, 200):
        rows = int(rng.integers(1, 120))
        mass = (rng.random((LAYERS, rows, KV_HEADS, pages)) ** 9).astype(np.float32)
        mass[..., : pages // 2] *= rng.random() < 0.5
        host.observe(Committed(start, rows, mass))
        device.observe_there(torch.from_numpy(mass).to(DEVICE))
        start += rows
        table = np.arange(pages, dtype=np.int32)
        for stats in (
            PageStats(pages, LAYERS, KV_HEADS),
            PageStats(pages, LAYERS, KV_HEADS, np.where(table % 3, table, -1)),
        ):
            assert device.score(stats).tolist() == host.score(stats).tolist()
            for budget in (64, 20 * PAGE_SIZE, 999 * PAGE_SIZE):
                assert np.array_equal(select(device, stats, budget), select(host, stats, budget))


def test_a_choice_reads_the_pages_alone() -> None:
    policy = Mass()
    with Transfers() as learning:
        policy.observe_there(torch.rand(LAYERS, 4, KV_HEADS, 300, device=DEVICE))
    with Transfers() as choosing:
        chosen = select(policy, PageStats(300, LAYERS, KV_HEADS), 8 * PAGE_SIZE)
    assert learning.reads == 0 and choosing.reads == 1
    assert choosing.read_bytes == chosen.nbytes == LAYERS * KV_HEADS * 8 * 4 and choosing.uploads == 0
