"""The kernels that choose tokens: their noise, masses and choices are the reference's to the bit, for every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

import triton
import triton.language as tl

from interpreter import DEVICE
from tokenswift_py.core import DraftTree, SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.kernels.triton.nucleus import exp_polynomial, nucleus_floors
from tokenswift_py.kernels.triton.runtime import launch_options
from tokenswift_py.kernels.triton.sampling import BLOCK, best, log_polynomial, noise_key
from tokenswift_py.kernels.triton.shapes import ceilings, sigma_floors, typical
from tokenswift_py.sampling import noise
from tokenswift_py.sampling.filters import NEGLIGIBLE, nucleus_floor, sigma_floor, typical_excess, xtc_ceiling
from tokenswift_py.sampling.reference import NumericsError, Sampler
from tokenswift_py.sampling.triton import TritonSampler
from transfers import Transfers
from triton_scenes import seeded as seeded


def history(length: int) -> History:
    return History([0] * length)


# Noise, and the best of a row


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_best_of_a_row_are_the_references_with_their_scores(temperature: float) -> None:
    """Sizes that are no multiple of four or of a block, exclusions, and every part of the noise's counter."""
    vocab, lengths = 2 * BLOCK + 3, (1, 77, 2**20)
    scores = 3 * torch.randn(3, vocab, dtype=torch.float64)
    scores[:, ::5] = -torch.inf
    for seed, stream in ((0, 0), (2**64 - 1, 3)):
        sampler = Sampler(SamplingParams(temperature=temperature, seed=seed, stream=stream), vocab)
        key = noise_key(seed, stream, DEVICE) if temperature else None
        for count in (64,) if stream else (1, 5):
            found = best(scores, torch.tensor(lengths, dtype=torch.int32), key, count=count).cpu().numpy()
            for row, length in zip(range(3), lengths, strict=True):
                wanted = sampler.ranked_scores(scores[row].cpu().numpy(), length, count)
                got = zip(found[row, 1 : 1 + count].tolist(), found[row, 1 + count :].tolist(), strict=True)
                assert list(got) == wanted


def test_the_noise_is_the_specification_to_the_bit() -> None:
    """Each token alone: the score of a row with one candidate at 0 is its noise."""
    tokens = [0, 1, 2, 3, 7, 1021, 1022, 1023]
    scores = torch.full((len(tokens), 1024), -torch.inf, dtype=torch.float64)
    scores[range(len(tokens)), tokens] = 0
    for position in (0, 123456):
        positions = torch.full((len(tokens),), position, dtype=torch.int32)
        found = best(scores, positions, noise_key(99, 0, DEVICE))
        assert found[:, 1].tolist() == tokens
        assert found[:, 2].tolist() == noise.gumbel(99, position, np.array(tokens)).tolist()


@triton.jit
def function_kernel(x: tl.tensor, out: tl.tensor, EXP: tl.constexpr, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.store(out + at, exp_polynomial(value) if EXP else log_polynomial(value))


def on_gpu(x: Any, is_exp: bool) -> list[float]:
    got = torch.empty(len(x), dtype=torch.float64)
    at = torch.from_numpy(x).to(DEVICE)
    function_kernel[(1,)](at, got, EXP=is_exp, BLOCK=len(x), **launch_options(4, 1))
    return list(got.tolist())


def test_the_logarithm_at_the_edge_of_its_interval_is_the_specification_to_the_bit() -> None:
    """Words whose u lies between the root of 1/2 and what that is in fp32, and those around them: the mantissa must be
    compared in double. The interpreter does so whatever the kernel says: test_triton_compile.py reads its binary."""
    words = np.arange(3037000448, 3037000512)
    u = (words + 0.5) * 2.0**-32
    assert on_gpu(u, False) == noise.log(u).tolist()
    assert (u < noise.SQRT_HALF).any() and (u >= noise.SQRT_HALF).any()


def test_the_exponential_is_the_specification_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    halves = (np.arange(-40, 1) + 0.5) * noise.LN2  # where a quotient is rounded to the one side or the other
    x = np.concatenate([halves, np.nextafter(halves, 0), [0.0, -28.0], -28 * rng.random(428)])
    assert on_gpu(x, True) == noise.exp(x).tolist()


def test_ties_go_to_the_lowest_id() -> None:
    scores = torch.zeros(2, 3000, dtype=torch.float64)
    scores[0, 1500] = scores[0, 2999] = 1
    found = best(scores, torch.zeros(2, dtype=torch.int32), count=4)
    assert found[:, 1:5].tolist() == [[1500, 2999, 0, 1], [0, 1, 2, 3]]


def test_a_row_with_fewer_tokens_than_asked_for_says_so() -> None:
    scores = torch.full((2, 10), -torch.inf, dtype=torch.float64)
    scores[1, 7] = 0.5
    for key in (None, noise_key(1, 0, DEVICE)):
        found = best(scores, torch.zeros(2, dtype=torch.int32), key, count=3)
        assert (found[:, 4:] > -torch.inf).tolist() == [[False] * 3, [True, False, False]] and found[1, 1] == 7


# The nucleus

PARTS = st.sampled_from([0.0, -0.0, -1e-300, -1e-9, -0.7, -1.0, -3.0, -27.7, -27.9, -28.0, -28.1, -1e4, -np.inf])


@settings(max_examples=40)
@given(
    st.lists(st.one_of(PARTS, st.floats(-30, 0)), min_size=1, max_size=60),
    st.sampled_from([1e-12, 0.1, 0.5, 0.9, 0.999999999]),
    st.sampled_from([-np.inf, -5.0, -0.7, 0.0]),
    st.sampled_from([0.0, 1e3, -1e-3]),
)
@example([-1.0] * 50, 0.5, -np.inf, 0.0)
def test_the_nucleus_ends_where_the_reference_ends_it(
    depths: list[float], top_p: float, floor: float, shift: float
) -> None:
    """Ties, scores without mass, a floor that top-k has set already, one word left."""
    scores = np.array([depths, sorted(depths)]) + shift
    if scores.max() == -np.inf:
        return
    top = scores[0].max()
    floor += top
    massive = scores[0][scores[0] >= max(floor, top + NEGLIGIBLE)]
    rows = torch.from_numpy(scores).to(DEVICE)
    found = nucleus_floors(
        rows, rows.amax(1), torch.tensor([top_p], dtype=torch.float64), torch.tensor([floor] * 2, dtype=torch.float64)
    )
    assert found.tolist() == [nucleus_floor(massive, top_p)] * 2


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_the_nucleus_of_a_row_of_several_blocks(spread: float) -> None:
    scores = spread * np.random.default_rng(0).standard_normal((2, 5000))
    rows = torch.from_numpy(scores).to(DEVICE)
    for top_p in (0.3, 0.95):
        found = nucleus_floors(rows, rows.amax(1), torch.tensor([top_p], dtype=torch.float64))
        assert found.tolist() == [nucleus_floor(row[row >= row.max() + NEGLIGIBLE], top_p) for row in scores]


# top-n-sigma, typical-p and XTC


def drawn_rows(depths: list[float], shift: float) -> tuple[Any, torch.Tensor]:
    scores = np.array([depths, sorted(depths), depths[::-1]]) + shift
    return scores, torch.from_numpy(scores).to(DEVICE)


DEPTHS = st.lists(st.one_of(PARTS, st.floats(-30, 0)), min_size=1, max_size=60)
SHIFTS = st.sampled_from([0.0, 1e3, -1e-3])


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@settings(max_examples=30)
@given(DEPTHS, st.sampled_from([1e-12, 0.5, 1.0, 3.0]), SHIFTS)
@example([-1.0] * 7, 1.0, 0.0)
@example([0.0, -np.inf], 1.0, 1e3)
def test_deviations_are_those_of_the_reference(depths: list[float], sigmas: float, shift: float) -> None:
    scores, rows = drawn_rows(depths, shift)
    if scores.max() > -np.inf:
        found = sigma_floors(rows, rows.amax(1), number(sigmas))
        assert found.tolist() == [sigma_floor(row, sigmas) for row in scores]


@settings(max_examples=30)
@given(DEPTHS, st.sampled_from([1e-12, 0.2, 0.9, 0.999999999]), st.sampled_from([-np.inf, -5.0, -0.7, 0.0]), SHIFTS)
@example([0.0, -800.0, -699.0, -1e4], 0.9, -np.inf, 0.0)
def test_the_typical_set_is_the_references(depths: list[float], mass: float, floor: float, shift: float) -> None:
    scores, rows = drawn_rows(depths, shift)
    if scores.max() == -np.inf:
        return
    tops = rows.amax(1)
    found = typical(rows, tops, tops + floor, number(mass)).cpu().numpy()
    for row, inside in zip(scores, found, strict=True):
        kept = (row >= row.max() + floor) & (row > -np.inf)
        assert (inside[kept] == (typical_excess(row[kept], mass) <= 0)).all()


@settings(max_examples=30)
@given(DEPTHS, st.sampled_from([0.0, 0.01, 0.1, 0.5]), SHIFTS)
@example([0.0, 0.0], 0.5, 0.0)
def test_the_choices_that_xtc_leaves_out_are_the_references(
    depths: list[float], threshold: float, shift: float
) -> None:
    scores, rows = drawn_rows(depths, shift)
    if scores.max() > -np.inf:
        wanted = [xtc_ceiling(row[row > -np.inf], threshold) for row in scores]
        assert ceilings(rows, number(threshold)).tolist() == wanted


def test_sums_of_a_row_of_several_blocks_are_the_references() -> None:
    scores = 3 * np.random.default_rng(0).standard_normal((2, 5000))
    scores[:, ::7] = -np.inf
    rows = torch.from_numpy(scores).to(DEVICE)
    tops = rows.amax(1)
    assert sigma_floors(rows, tops, number(1.5)).tolist() == [sigma_floor(row, 1.5) for row in scores]
    found = typical(rows, tops, tops - 9, number(0.6)).cpu().numpy()
    for row, inside in zip(scores, found, strict=True):
        kept = row >= row.max() - 9
        assert (inside[kept] == (typical_excess(row[kept], 0.6) <= 0)).all()
    assert ceilings(rows, number(0.02)).tolist() == [xtc_ceiling(row[row > -np.inf], 0.02) for row in scores]


# The sampler

RULES = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 0, 1, 20, 400]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05]),
    penalty=st.sampled_from([1.0, 1.2]),
    penalty_window=st.sampled_from([2, 8, 2**40]),
    dry_multiplier=st.sampled_from([0.0, 0.8]),
    dry_length=st.sampled_from([1, 2, 5]),
    dry_window=st.sampled_from([0, 4, 30, 2**40]),
    dry_breakers=st.sampled_from([(), (0, 3)]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.9]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    presence_penalty=st.sampled_from([0.0, -0.2]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 1, 3, 70]),
    ban_words=st.sampled_from([(), ((1, 2), (0,), (2, 2, 1))]),
    ban=st.sampled_from([(), (1,)]),
    logit_bias=st.sampled_from([{}, {0: 2.5, 2: -1.0}]),
    top_n_sigma=st.sampled_from([0.0, 0.0, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.9, 0.2]),
    xtc_probability=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    xtc_threshold=st.sampled_from([0.01, 0.1]),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2),
)


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the result of a call, or the error that it raises."""
    try:
        return call(*arguments)
    except NumericsError as error:
        return str(error)


@settings(max_examples=10)
@given(st.data(), RULES, st.sampled_from([4, 61, 257, 1100]))
def test_every_node_of_a_tree_has_the_references_choice_and_ranking(
    data: Any, params: SamplingParams, vocab: int
) -> None:
    """Texts repeat themselves and go on after guesses and turns, with ties, exclusions and logits nobody can use."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    reference, sampler = samplers = [kind(params, vocab, eos=[0], first_end=40) for kind in (Sampler, TritonSampler)]
    text = History(rng.integers(0, 4, rng.integers(0, 60)).tolist())
    for each in samplers:
        each.begin_chapter(len(text), len(text))
    for round_ in range(3):
        text.extend(rng.integers(0, 4, rng.integers(1, 5)).tolist())
        if round_ == 2:
            for each in samplers:
                each.begin_chapter(len(text), 1)
        tree = drawn_tree(rng)
        logits = torch.from_numpy(rng.choice([1, 4]) * rng.standard_normal((len(tree), vocab))).float().to(DEVICE)
        if data.draw(st.booleans()):
            logits = logits.round()
        logits[0, 0] = data.draw(st.sampled_from([0.0, 0.0, torch.nan, torch.inf, -torch.inf]))
        count = data.draw(st.sampled_from([1, 3, 8]))
        chooser = sampler.chooser(tree, logits, text)
        ranker = sampler.ranker(tree, logits, text, count)
        for node in range(len(tree)):
            with text.guesses():
                text.extend(tree.tokens[tree.path(node)[1:]].tolist())
                ranked = outcome(reference.ranked, logits[node], text, count)
                assert outcome(ranker, node) == ranked
                if node == len(tree) - 1:
                    assert outcome(sampler.ranked, logits[node], text, count) == ranked
                assert outcome(chooser, node) == outcome(reference.choose, logits[node], text)


def drawn_tree(rng: np.random.Generator) -> DraftTree:
    nodes: dict[tuple[int, int], int] = {(-1, int(rng.integers(0, 4))): 0}
    for _ in range(int(rng.integers(0, 7))):
        nodes.setdefault((int(rng.integers(0, len(nodes))), int(rng.integers(0, 4))), len(nodes))
    return DraftTree(np.array([token for _, token in nodes]), np.array([parent for parent, _ in nodes]))


EVERYTHING = SamplingParams(
    temperature=0.8, seed=3, top_k=400, top_p=0.9, min_p=0.001, penalty=1.2, penalty_window=30, repetition_penalty=1.1,
    frequency_penalty=0.1, presence_penalty=0.2, dry_multiplier=0.8, dry_breakers=(11,), no_repeat_ngram_size=4,
    ban_words=((5, 6),), ban=(9,), logit_bias={3: 1.5}, top_n_sigma=3.0, typical_p=0.95, xtc_probability=0.5,
    xtc_threshold=0.05,
)  # fmt: skip


@pytest.mark.parametrize(
    "params", [EVERYTHING, SamplingParams(1.1, top_p=0.95), SamplingParams(repetition_penalty=1.2)]
)
def test_a_large_vocabulary_and_a_long_text(params: SamplingParams) -> None:
    """Both of several blocks; and a path that crosses from one block of the text into the next."""
    vocab, rng = 5003, np.random.default_rng(0)
    text = History(np.tile(rng.integers(0, 40, 100), 11)[: BLOCK - 2].tolist())
    tree = DraftTree.chain([text[-1], *(text[i - 100] for i in range(len(text), len(text) + 4))])
    logits = 2 * torch.randn(len(tree), vocab)
    logits[:, :40] += 4
    reference, sampler = (kind(params, vocab) for kind in (Sampler, TritonSampler))
    ranker = sampler.ranker(tree, logits, text, 5)
    for node in range(len(tree)):
        with text.guesses():
            text.extend(tree.tokens[1 : 1 + node].tolist())
            assert ranker(node) == reference.ranked(logits[node], text, 5)


def test_the_device_follows_texts_that_are_cut_and_others() -> None:
    params = SamplingParams(frequency_penalty=1.5, repetition_penalty=1.3)
    reference, sampler = (kind(params, 12) for kind in (Sampler, TritonSampler))
    rng, logits = np.random.default_rng(0), torch.randn(12)
    for length in (3, 300, 310, 250, 5, 2000, 2100):
        text = History(rng.integers(0, 12, length).tolist())
        for _ in range(2):
            assert sampler.chooser(DraftTree.chain([0]), logits[None], text)(0) == reference.choose(logits, text)
            text.truncate(length - length // 3)
            assert sampler.ranked(logits, text, 3) == reference.ranked(logits, text, 3)


def test_only_nodes_that_are_asked_for_can_be_refused() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, torch.nan]])
    choose = TritonSampler(SamplingParams(), 2).chooser(DraftTree.chain([1, 0]), logits, history(4))
    assert choose(0) == 1
    with pytest.raises(NumericsError, match="logits for position 5 are not finite"):
        choose(1)


def test_the_sampler_on_the_gpu_refuses_what_the_reference_refuses() -> None:
    sampler = TritonSampler(SamplingParams(temperature=1.0, ban=(0, 1)), 2)
    with pytest.raises(NumericsError, match="logits for position 4 are not finite"):
        sampler.choose(torch.tensor([torch.nan, 1.0]), history(4))
    with pytest.raises(NumericsError, match="no token is left to choose from at position 4"):
        sampler.choose(torch.tensor([2.0, 1.0]), history(4))


def test_no_row_of_logits_comes_to_the_host_and_no_text_goes_twice() -> None:
    """Whatever the rules: three numbers a row for a choice, one and two a candidate for a ranking, in one wait; and of
    the text its new tokens alone go to the device."""
    vocab, rows, text = 1503, 4, History(np.arange(1000) % 50)
    sampler, logits = TritonSampler(EVERYTHING, vocab), torch.randn(4, vocab)
    tree = DraftTree([text[-1], 1, 2, 3], [-1, 0, 1, 0])
    with Transfers() as first:
        sampler.chooser(tree, logits, text)
    text.extend([7, 8])
    with Transfers() as later:
        sampler.chooser(tree, logits, text)(0)
    with Transfers() as ranking:
        sampler.ranker(tree, logits, text, 3)(0)
    assert (first.reads, later.reads, ranking.reads) == (1, 1, 1)
    assert first.read_bytes == later.read_bytes == rows * 3 * 8
    assert ranking.read_bytes == rows * (1 + 2 * 3) * 8
    assert later.uploads <= 2 and later.upload_bytes < 2048 < 3 * 4 * 1000 < first.upload_bytes
    assert ranking.uploads == 1 and ranking.upload_bytes < 2048
