"""Mixtures of experts in Triton's kernels: what rows choose, and that a row's bits are its own whoever chose alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from interpreter import DEVICE, INTERPRETED
from recording import Tape
from tokenswift_py.kernels.triton import experts, projections
from tokenswift_py.kernels.triton.matmul import linear
from tokenswift_py.kernels.triton.ops import TritonOps
from tokenswift_py.models.families.base import Experts
from tokenswift_py.models.ops import ExpertWeights, Ops, TorchOps, expert_weights
from triton_scenes import seeded as seeded

COUNT, CHOSEN, HIDDEN, WIDTH = 6, 3, 40, 43
MIXTURE = Experts(COUNT, CHOSEN, WIDTH, normalised=False)


def weights(dtype: torch.dtype) -> ExpertWeights:
    shapes = (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    return expert_weights(*([torch.randn(shape).to(dtype) / 4 for _ in range(COUNT)] for shape in shapes))


def mixed(ops: Ops, x: torch.Tensor, scores: torch.Tensor, own: ExpertWeights, shared: Any = None) -> torch.Tensor:
    routes = ops.route(scores, MIXTURE)
    return ops.mix(ops.linear_experts(ops.gated_experts(x, routes, own, "silu"), routes, own), routes, shared)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("count", "chosen"), [(6, 3), (60, 4), (5, 5), (1, 1)])
def test_rows_choose_as_in_torch(count: int, chosen: int, normalised: bool) -> None:
    """Many scores are equal. Pairs are listed expert by expert, each once."""
    scores = torch.randn(50, count).mul(2).round() / 2
    wanted = TorchOps().route(scores, Experts(count, chosen, 8, normalised))
    routes = experts.route(scores, chosen, normalised)
    torch.testing.assert_close(routes.shares, wanted.shares)
    listed = wanted.experts.flatten()
    assert torch.equal(routes.sources.long(), listed.argsort(stable=True))
    assert torch.equal(routes.spans[:, 1].long(), listed.bincount(minlength=count))
    assert torch.equal(routes.spans[:, 0].long(), routes.spans[:, 1].long().cumsum(0) - routes.spans[:, 1])


def test_pairs_of_more_than_one_block_are_listed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "BLOCK", 16)
    scores = torch.randn(15, COUNT)
    listed = TorchOps().route(scores, MIXTURE).experts.flatten()
    assert torch.equal(experts.route(scores, CHOSEN, False).sources.long(), listed.argsort(stable=True))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_no_numbers_choose_experts_that_there_are(wrong: float) -> None:
    """Each row by itself; the others are as ever."""
    scores = torch.randn(3, COUNT)
    alone = experts.route(scores[2:], CHOSEN, True)
    scores[0], scores[1, 2] = wrong, wrong
    routes = experts.route(scores, CHOSEN, True)
    assert torch.equal(routes.sources.sort().values.long(), torch.arange(3 * CHOSEN))
    assert routes.spans[:, 1].sum() == 3 * CHOSEN
    assert routes.shares[0].isnan().all() and torch.equal(routes.shares[2:], alone.shares)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "with_shared"), [(torch.float32, 1e-5, True), (torch.bfloat16, 5e-2, False)]
)
def test_a_mixture_is_torchs_and_a_rows_bits_are_its_own(
    dtype: torch.dtype, tolerance: float, with_shared: bool
) -> None:
    """Alone, beside a few, and where so many rows choose the same experts that they fill several tiles."""
    own, rows = weights(dtype), 70
    x, scores = torch.randn(rows, HIDDEN).to(dtype), torch.randn(rows, COUNT).to(dtype)
    scores[3:40] = scores[3]
    shared: Any = (torch.randn(rows, 1).to(dtype), torch.randn(rows, HIDDEN).to(dtype)) if with_shared else None
    together = mixed(TritonOps(), x, scores, own, shared)
    torch.testing.assert_close(together, mixed(TorchOps(), x, scores, own, shared), rtol=tolerance, atol=tolerance)
    for part in (slice(0, 1), slice(5, 6), slice(5, 9), slice(69, 70), slice(2, 43)):
        few = None if shared is None else (shared[0][part], shared[1][part])
        assert torch.equal(mixed(TritonOps(), x[part], scores[part], own, few), together[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_have_the_bits_of_an_expert_alone(dtype: torch.dtype) -> None:
    own, x = weights(dtype), torch.randn(5, HIDDEN).to(dtype)
    scores = torch.randn(5, COUNT)
    chosen, routes = TorchOps().route(scores, MIXTURE).experts, experts.route(scores, CHOSEN, False)
    opened = TritonOps().gated_experts(x, routes, own, "silu")
    closed = TritonOps().linear_experts(opened, routes, own)
    for pair, expert in enumerate(chosen.flatten().tolist()):
        row = x[pair // CHOSEN][None]
        alone = projections.gated(row, own.gates[expert], own.ups[expert])
        assert torch.equal(opened[pair], alone[0])
        assert torch.equal(closed[pair], linear(alone, own.downs[expert])[0])


@pytest.mark.skipif(not INTERPRETED, reason="records launches in the interpreter; test_triton_gpu.py replays")
def test_recorded_launches_serve_whatever_rows_choose() -> None:
    """The host is asked nothing: launched again over other rows, they compute those."""
    own, ops = weights(torch.float32), TritonOps()
    x, scores = torch.randn(8, HIDDEN, device=DEVICE), torch.randn(8, COUNT)
    with Tape() as tape:
        out = mixed(ops, x, scores, own)
    x.copy_(torch.randn(8, HIDDEN))
    scores.copy_(torch.tensor([9.0, 8, 7, 0, 0, 0]).expand(8, COUNT))  # all rows choose the same
    tape.replay()
    assert torch.equal(out, mixed(ops, x, scores, own))
