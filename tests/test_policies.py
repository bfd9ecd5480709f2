"""Policies against their formulas, and the promises of all of them.

No bit depends on how rows were grouped into passes, the first and the recent pages are in every view, pages that rows
attend to are kept, and no token of the text changes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from conftest import tiny_config, tiny_model, weights_of
from scripted import Scripted, write
from tokenswift_py import TokenSwift, registry
from tokenswift_py.core import Acceptance, DraftTree, Output, SamplingParams, Segment
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.passes import Passes, without_passes
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.drafters.base import Context, committed
from tokenswift_py.drafters.base import create as create_drafter
from tokenswift_py.errors import UserError
from tokenswift_py.kvcache.base import PAGE_SIZE, RECENT_PAGES, Committed, FloatArray, PageStats, best, select
from tokenswift_py.kvcache.policies.clusters import ROUNDS, k_means
from tokenswift_py.kvcache.policies.mass import Mass
from tokenswift_py.kvcache.policies.snapkv import SnapKV
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.runs.plan import kept_of_keys
from tokenswift_py.sampling.reference import Sampler

LAYERS, KV_HEADS, GROUP, HEAD_DIM = 2, 3, 2, 16
FOLDER = "tokenswift_py.kvcache.policies"
NAMES = registry.names(FOLDER)


def create(name: str, **settings: Any) -> Any:
    return registry.create(FOLDER, "POLICY", "draft_policy", name, **settings)


LEARNING = [name for name in NAMES if create(name).needs]


class Text:
    """A text of `count` rows from position `start` on, with random causal attention, queries and keys.

    It is its own pool, with pages in reverse order.
    """

    layers = LAYERS

    def __init__(self, start: int, count: int, seed: int = 0, dtype: type = np.float32):
        rng = np.random.default_rng(seed)
        self.start, self.count = start, count
        self.pages = -(-(start + count) // PAGE_SIZE)
        mass = rng.random((LAYERS, count, KV_HEADS, self.pages)) ** 4
        own = (start + np.arange(count)) // PAGE_SIZE
        mass[np.broadcast_to((np.arange(self.pages) > own[:, None])[None, :, None], mass.shape)] = 0
        self.mass = (GROUP * mass / mass.sum(-1, keepdims=True)).astype(dtype)
        self.queries = rng.standard_normal((count, LAYERS, KV_HEADS * GROUP, HEAD_DIM)).astype(dtype)
        self.keys = rng.standard_normal((LAYERS, KV_HEADS, self.pages, PAGE_SIZE, HEAD_DIM)).astype(np.float32)

    def stats(self, stop: int) -> PageStats:
        """Returns the statistics after the row at position `stop - 1`."""
        full = stop // PAGE_SIZE
        table = np.arange(self.pages - 1, -1, -1, dtype=np.int32)[:full]
        return PageStats(full, LAYERS, KV_HEADS, table, self)

    def passes(self, sizes: Sequence[int]) -> Iterator[Committed]:
        """Yields the rows in passes of these sizes, over and over.

        A pass reports pages up to its last row's, and some more for rows that were not committed, padded like the
        native engine's.
        """
        row = 0
        for turn, size in enumerate(itertools.cycle(sizes)):
            rows = slice(row, min(row + size, self.count))
            pages = (self.start + rows.stop - 1) // PAGE_SIZE + 1
            mass = np.zeros((LAYERS, rows.stop - row, KV_HEADS, pages + 16), self.mass.dtype)
            mass[..., :pages] = self.mass[:, rows, :, :pages]
            queries = self.queries[rows].copy()
            yield Committed(self.start + row, rows.stop - row, mass[..., : pages + turn % 3], queries)
            mass[:] = queries[:] = np.nan  # a policy must keep copies
            if (row := rows.stop) == self.count:
                return

    def key_bounds(self, pages: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self.keys[:, :, self.pages - 1 - pages]
        return torch.from_numpy(keys.min(3)), torch.from_numpy(keys.max(3))

    def key_scores(self, pages: np.ndarray, queries: torch.Tensor) -> torch.Tensor:
        keys = torch.from_numpy(self.keys[:, :, self.pages - 1 - pages])
        summed = queries.float().view(LAYERS, KV_HEADS, GROUP, HEAD_DIM).sum(2)
        return torch.einsum("lhptd,lhd->lhpt", keys, summed).amax(-1)

    def page_keys(self, layer: int, pages: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.keys[layer][:, self.pages - 1 - pages])


def learnt(policy: Any, text: Text, sizes: Sequence[int] = (5,)) -> FloatArray:
    for rows in text.passes(sizes):
        policy.observe(rows)
    scores: FloatArray = policy.score(text.stats(text.start + text.count))
    return scores


def mean_since_full(text: Text, full: int) -> FloatArray:
    """H2O's rate is the mean mass on a page over the rows after its last token."""
    rates = np.zeros((LAYERS, KV_HEADS, full))
    for page in range(full):
        later = text.start + np.arange(text.count) >= (page + 1) * PAGE_SIZE
        if later.any():
            rates[..., page] = text.mass[..., page][:, later].astype(float).mean(1)
    return rates


@pytest.mark.parametrize(("start", "count"), [(0, 200), (70, 300), (640, 40), (63, 1)])
def test_mass_is_the_decayed_mean(start: int, count: int) -> None:
    text = Text(start, count)
    for decay in (0.9, 0.5, 1.0):
        weights = decay ** np.arange(count)[::-1]
        expected = np.einsum("lrhp,r->lhp", text.mass.astype(float), weights / weights.sum())
        full = (start + count) // PAGE_SIZE
        np.testing.assert_allclose(learnt(create("mass", decay=decay), text), expected[..., :full], rtol=1e-12)


@pytest.mark.parametrize(("start", "count"), [(0, 200), (70, 300), (640, 40), (63, 1)])
def test_h2o_is_the_cumulative_mass_per_row_that_could_see_the_page(start: int, count: int) -> None:
    text = Text(start, count)
    expected = mean_since_full(text, (start + count) // PAGE_SIZE)
    np.testing.assert_allclose(learnt(create("h2o"), text), expected, rtol=1e-12)


def test_h2o_prefers_no_page_for_its_age() -> None:
    """Three pages that every later row hits alike, one of which is nine times as old, score alike."""
    text = Text(0, 20 * PAGE_SIZE)
    own = np.arange(text.count) // PAGE_SIZE
    text.mass[:] = 0.001
    for page in (1, 9, 17):
        text.mass[:, own > page, :, page] = 0.2
        text.mass[:, own == page, :, page] = 0.9 - 0.05 * page  # a page's own rows do not count
    scores = learnt(create("h2o"), text)
    np.testing.assert_allclose(scores[..., [1, 9, 17]], 0.2, rtol=1e-6)
    assert (np.delete(scores, [1, 9, 17], axis=-1) < 0.01).all()


@pytest.mark.parametrize(("start", "count"), [(0, 200), (70, 300), (640, 20), (63, 1)])
@pytest.mark.parametrize(("window", "pooling"), [(32, 3), (1, 1), (50, 1), (7, 5)])
def test_snapkv_is_the_mean_of_the_window_pooled(start: int, count: int, window: int, pooling: int) -> None:
    text = Text(start, count)
    full = (start + count) // PAGE_SIZE
    mean = text.mass[:, -window:, :, :full].astype(float).mean(1)
    padded = np.pad(mean, ((0, 0), (0, 0), (pooling // 2, pooling // 2)))
    expected = np.lib.stride_tricks.sliding_window_view(padded, pooling, axis=-1).mean(-1)
    scores = learnt(create("snapkv", window=window, pooling=pooling), text)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_quest_bounds_what_any_key_of_the_page_can_give() -> None:
    text = Text(64, 300)
    scores = learnt(create("quest"), text)
    query = text.queries[-1].reshape(LAYERS, KV_HEADS, GROUP, HEAD_DIM)
    for layer, head, page in np.ndindex(scores.shape):
        keys = text.keys[layer, head, page]
        of_group = [np.maximum(q * keys.min(0), q * keys.max(0)).sum() for q in query[layer, head]]
        assert scores[layer, head, page] == pytest.approx(max(of_group), rel=1e-5)
        assert scores[layer, head, page] >= (keys @ query[layer, head].T).max()


def test_importance_is_the_best_product_of_the_page_summed_over_the_group() -> None:
    text = Text(64, 300)
    scores = learnt(create("importance"), text)
    query = text.queries[-1].reshape(LAYERS, KV_HEADS, GROUP, HEAD_DIM)
    for layer, head, page in np.ndindex(scores.shape):
        products = text.keys[layer, head, page] @ query[layer, head].T  # [PAGE_SIZE, GROUP]
        assert scores[layer, head, page] == pytest.approx(products.sum(1).max(), rel=1e-5)


def test_a_cluster_for_every_key_gives_the_attention_mass_itself() -> None:
    """The dense softmax over all keys, summed by page and over the group. Centroids are rounded to bf16."""
    text = Text(64, 300)
    scores = learnt(create("clusters", clusters=PAGE_SIZE), text)
    query = text.queries[-1].reshape(LAYERS, KV_HEADS, GROUP, HEAD_DIM)
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        keys = text.keys[layer, head, : scores.shape[-1]].reshape(-1, HEAD_DIM)
        weights = np.exp(query[layer, head] @ keys.T / np.sqrt(HEAD_DIM))  # [GROUP, T]
        mass = (weights / weights.sum(1, keepdims=True)).sum(0).reshape(-1, PAGE_SIZE).sum(1)
        np.testing.assert_allclose(scores[layer, head], mass, rtol=0.02)
    np.testing.assert_allclose(scores.sum(-1), GROUP, rtol=1e-5)


@pytest.mark.parametrize("clusters", [1, 4])
def test_clusters_are_lloyds_and_estimate_by_centroid_and_size(clusters: int) -> None:
    """SciPy's k-means of the keys of 16, 4 and one page from the same first keys, rounded to bf16 in every round."""
    text = Text(0, 21 * PAGE_SIZE)
    scores = learnt(create("clusters", clusters=clusters), text)
    query = text.queries[-1].reshape(LAYERS, KV_HEADS, GROUP, HEAD_DIM)
    weights = np.zeros((LAYERS, KV_HEADS, GROUP, 21))
    for pages in (slice(0, 16), slice(16, 20), slice(20, 21)):
        for layer, head in np.ndindex(LAYERS, KV_HEADS):
            keys = as_bf16(text.keys[layer, head, pages]).reshape(-1, HEAD_DIM).numpy()
            centroids = keys[:: PAGE_SIZE // clusters]
            for _ in range(ROUNDS):
                centroids, labels = kmeans2(keys, centroids, iter=1, minit="matrix")
                centroids = as_bf16(centroids).numpy()
            of_keys = np.exp(query[layer, head] @ centroids.T / np.sqrt(HEAD_DIM))[:, labels]
            weights[layer, head, :, pages] = of_keys.reshape(GROUP, -1, PAGE_SIZE).sum(-1)
    np.testing.assert_allclose(scores, (weights / weights.sum(-1, keepdims=True)).sum(2), rtol=1e-4)


def as_bf16(keys: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(keys).to(torch.bfloat16).double()


def test_no_cluster_depends_on_the_order_of_a_sum() -> None:
    """Over threads and libraries orders differ. Here that of the dimensions does, and that of the keys after the
    first ones."""
    text = Text(0, 8 * PAGE_SIZE)
    keys = as_bf16(text.keys[0] * 10.0 ** np.random.default_rng(2).integers(-3, 2, HEAD_DIM)).flatten(1, 2)
    centroids, nearest = k_means(keys, 32)
    dimensions, rows = torch.randperm(HEAD_DIM), torch.arange(keys.shape[1]).view(32, 16)
    rows[:, 1:] = rows[:, 1:].flip(1)
    again, found = k_means(keys[:, rows.flatten()][..., dimensions], 32)
    assert torch.equal(again, centroids[..., dimensions])
    assert torch.equal(found, nearest[:, rows.flatten()])


def test_the_index_makes_segments_of_full_pages_and_drops_evicted_ones() -> None:
    text, policy, read = Text(0, 8 * PAGE_SIZE), create("clusters"), []

    class Read:
        layers = LAYERS

        def page_keys(self, layer: int, pages: np.ndarray) -> torch.Tensor:
            if layer == 0:
                read.append([text.pages - 1 - page for page in pages.tolist()])
            return text.page_keys(layer, pages)

    def scores(stats: PageStats, *evicted: int) -> FloatArray:
        assert stats.table is not None
        table = stats.table.copy()
        table[[*evicted]] = -1
        found: FloatArray = policy.score(replace(stats, table=table, pool=Read()))
        return found

    for rows in text.passes([PAGE_SIZE]):
        policy.observe(rows)
        stats = text.stats(rows.start + rows.rows)
        whole = scores(stats)
    assert read == [[0], [1], [2], [0, 1, 2, 3], [4], [5], [6], [4, 5, 6, 7]]
    assert np.array_equal(whole, learnt(create("clusters"), text)), "asked once or page by page"
    heads, counts = LAYERS * KV_HEADS, 4 * 4
    assert policy.nbytes == heads * 8 * (4 * 2 * HEAD_DIM + counts)
    left = scores(stats, 1)
    assert len(read) == 8 and policy.nbytes == heads * (8 * 4 * 2 * HEAD_DIM + 7 * counts)
    assert (left[..., 1] == 0).all()
    assert (np.delete(left, 1, -1) > np.delete(whole, 1, -1)).all(), "the others share what was its"
    left = scores(stats, 1, 2, 4, 5, 6, 7)
    assert read[8:] == [[0, 3]] and policy.nbytes == heads * 2 * (4 * 2 * HEAD_DIM + 2 * 4)
    assert (left[..., [0, 3]] > 0).all()
    np.testing.assert_allclose(left.sum(-1), GROUP, rtol=1e-5)


def test_the_memory_check_knows_the_size_of_an_index() -> None:
    text, policy = Text(0, 64 * PAGE_SIZE), create("clusters")
    learnt(policy, text, [PAGE_SIZE])
    assert policy.nbytes == LAYERS * KV_HEADS * 64 * type(policy).index_bytes(HEAD_DIM)
    bounds = 2 * 4 * HEAD_DIM
    assert kept_of_keys(HEAD_DIM, "mass", None) == 0
    assert kept_of_keys(HEAD_DIM, "quest", "quest") == bounds
    assert kept_of_keys(HEAD_DIM, "quest", "clusters") == bounds + type(policy).index_bytes(HEAD_DIM)


def test_an_estimate_is_nearer_to_the_mass_than_a_bound_of_keys() -> None:
    """Keys in bundles: the best of each dimension together are no key of the page."""
    text = Text(0, 20 * PAGE_SIZE)
    rng = np.random.default_rng(1)
    bundles = rng.standard_normal((LAYERS, KV_HEADS, text.pages, 4, 1, HEAD_DIM)) * 2
    noise = 0.2 * rng.standard_normal((LAYERS, KV_HEADS, text.pages, 4, PAGE_SIZE // 4, HEAD_DIM))
    text.keys = (bundles + noise).reshape(text.keys.shape).astype(np.float32)
    query = torch.from_numpy(text.queries[-1]).view(LAYERS, KV_HEADS, GROUP, HEAD_DIM)
    keys = torch.from_numpy(text.keys).flatten(2, 3)
    mass = (query @ keys.mT / HEAD_DIM**0.5).softmax(-1).sum(2).unflatten(2, (-1, PAGE_SIZE)).sum(-1)
    kept = {}
    for name in ("clusters", "quest"):
        chosen = torch.from_numpy(best(learnt(create(name), text), 6)).long()
        kept[name] = mass.gather(-1, chosen).sum(-1).mean()
    most = mass.gather(-1, torch.from_numpy(best(mass.numpy(), 6)).long()).sum(-1).mean()
    assert kept["quest"] < kept["clusters"] and kept["clusters"] > 0.98 * most


@settings(max_examples=60)
@given(
    name=st.sampled_from(LEARNING),
    start=st.integers(0, 400),
    count=st.integers(1, 700),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    seed=st.integers(0, 100),
)
def test_no_bit_depends_on_how_rows_came_in_passes(
    name: str, start: int, count: int, sizes: list[int], seed: int
) -> None:
    text = Text(start, count, seed)
    one_by_one, grouped = create(name), create(name)
    expected = learnt(one_by_one, text, [1])
    for turn, rows in enumerate(text.passes(sizes)):
        grouped.observe(rows)
        if turn % 3 == seed % 3:  # asking for scores in between changes nothing
            grouped.score(text.stats(rows.start + rows.rows))
    assert np.array_equal(grouped.score(text.stats(start + count)), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pages", [0, 1, 9])
def test_before_the_first_row_the_latest_pages_are_kept(name: str, pages: int) -> None:
    stats = PageStats(pages, LAYERS, KV_HEADS)
    assert np.array_equal(select(create(name), stats, 256), select(create("recent"), stats, 256))


@pytest.mark.parametrize("name", ["mass", "h2o", "snapkv"])
def test_pages_no_seen_row_attended_to_score_nothing(name: str) -> None:
    """Pages that were evicted, and pages of rows that no policy was shown, score 0 or are not chosen."""
    policy, mass = create(name), np.zeros((LAYERS, 2, KV_HEADS, 11), np.float32)
    mass[..., :2] = 1
    policy.observe(Committed(640, 2, mass))
    scores = policy.score(PageStats(20, LAYERS, KV_HEADS))
    assert (scores[..., :2] > 0).all()
    assert (scores[..., 3:] == 0).all()


@settings(max_examples=100)
@given(pages=st.integers(0, 60), budget=st.integers(1, 70 * PAGE_SIZE), seed=st.integers(0, 1000))
def test_a_selection_is_the_best_pages_of_equals_the_later(pages: int, budget: int, seed: int) -> None:
    """The choice is that of a full sort. Scores have few values, so that most are equal."""
    scores = np.random.default_rng(seed).integers(-2, 3, (LAYERS, KV_HEADS, pages)).astype(np.float32)
    scores[scores == 2] = -np.inf if seed % 2 else np.nan

    class Fixed:
        name, needs = "fixed", frozenset[str]()

        def observe(self, committed: Committed) -> None: ...

        def score(self, stats: PageStats) -> FloatArray:
            return scores

    before = scores.copy()
    chosen = select(Fixed(), PageStats(pages, LAYERS, KV_HEADS), budget)
    count = min(max(1, budget // PAGE_SIZE), pages)
    assert chosen.shape == (LAYERS, KV_HEADS, count)
    assert chosen.dtype == np.int32
    assert np.array_equal(scores, before, equal_nan=True)
    PageView(chosen)  # ascending, without repeats
    recent = min(count, max(1, min(RECENT_PAGES, count // 4)))
    always = set(range(pages - recent, pages)) | ({0} if count > recent else set())
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        worth = np.nan_to_num(scores[layer, head], nan=-np.inf, neginf=-np.inf).tolist()
        others = sorted(set(range(pages)) - always, key=lambda page: (worth[page], page))
        expected = sorted(always | set(others[len(others) - (count - len(always)) :]))
        assert chosen[layer, head].tolist() == expected


@pytest.mark.parametrize("name", NAMES)
def test_an_old_page_that_gets_all_the_attention_is_kept_by_all_that_learn(name: str) -> None:
    text = Text(0, 40 * PAGE_SIZE)
    text.mass *= 0.2
    text.mass[:, 8 * PAGE_SIZE :, :, 7] = 0.8 * GROUP
    text.queries[-1] = 1
    text.keys[..., 7, 20, :] = 5
    policy = create(name)
    for rows in text.passes([5]):
        policy.observe(rows)
    chosen = select(policy, text.stats(text.count), 512)
    assert (chosen[..., 0] == 0).all()
    assert (chosen[..., -2:] == [38, 39]).all()
    assert (chosen == 7).any(-1).all() == (name in LEARNING)


def test_learning_are_all_that_do_not_choose_by_place() -> None:
    assert set(NAMES) - set(LEARNING) == {"block", "local", "recent"}


@pytest.mark.parametrize("count", [1, 4, 5, 8, 13, 16, 40])
@pytest.mark.parametrize("pages", [1, 7, 40, 64, 131])
def test_block_is_every_sth_page_and_the_latest_of_those_between(pages: int, count: int) -> None:
    """The always chosen ones apart, by the plain rule: all multiples of the least power of two of which all fit, then
    the latest multiples of half of it."""
    chosen = select_from("block", Text(0, 1), count * PAGE_SIZE, pages)
    count = min(count, pages)
    recent = min(count, max(1, min(RECENT_PAGES, count // 4)))
    kept = set(range(pages - recent, pages)) | ({0} if count > recent else set())
    left, stride = count - len(kept), 1
    while left and len(set(range(0, pages, stride)) - kept) > left:
        stride *= 2
    kept |= set(range(0, pages, stride)) if left else set()
    between = sorted(set(range(0, pages, max(1, stride // 2))) - kept)
    expected = sorted(kept | set(between[len(between) - (count - len(kept)) :]))
    assert (chosen == expected).all()


def test_local_takes_as_many_pages_at_each_doubling_of_the_distance() -> None:
    chosen = select_from("local", Text(0, 1), 44 * PAGE_SIZE, 1024)
    distances = 1024 - chosen[0, 0]
    assert (chosen == chosen[0, 0]).all()
    counts = [int(((distances > 2**n) & (distances <= 2 ** (n + 1))).sum()) for n in range(3, 10)]
    assert max(counts) - min(counts) <= 1 and min(counts) >= 4
    assert set(range(1, 9)) <= set(distances.tolist()) and 1024 in distances


def test_mass_and_snapkv_forget_and_h2o_remembers() -> None:
    """A page that half of all rows hit, all of them long ago."""
    text = Text(0, 40 * PAGE_SIZE)
    text.mass *= 0.1
    text.mass[..., 7] = 0
    text.mass[:, 8 * PAGE_SIZE : 30 * PAGE_SIZE, :, 7] = 1
    kept = {name: (select_from(name, text, 512) == 7).any() for name in ("mass", "snapkv", "h2o")}
    assert kept == {"mass": False, "snapkv": False, "h2o": True}


def select_from(name: str, text: Text, budget: int, pages: int | None = None) -> np.ndarray:
    """Returns the pages that a policy chooses after a text. pages: how many there are, if not those of the text."""
    policy = create(name)
    for rows in text.passes([64]):
        policy.observe(rows)
    stats = text.stats(text.start + text.count)
    return select(policy, PageStats(pages, LAYERS, KV_HEADS) if pages else stats, budget)


def test_what_has_decayed_is_swept_away() -> None:
    """A page that no row hits any more (out of a sliding window, or evicted) must not fill the sums with denormals."""
    policy = create("mass", decay=0.5)
    policy.observe(Committed(0, 1, np.ones((1, 1, 1, 2), np.float32)))
    later = np.zeros((1, 1000, 1, 2), np.float32)
    later[..., 1] = 1
    policy.observe(Committed(1, 1000, later))
    assert policy.score(PageStats(2, 1, 1)).tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mass(decay=0), "decay: 0 is not allowed"),
        (lambda: Mass(decay=1.01), "decay: 1.01 is not allowed"),
        (lambda: Mass(decay=float("nan")), "decay: nan is not allowed"),
        (lambda: create("clusters", clusters=0), "clusters: 0 is not allowed"),
        (lambda: create("clusters", clusters=65), "clusters: 65 is not allowed; between 1 and 64"),
        (lambda: SnapKV(window=0), "window: 0 is not allowed"),
        (lambda: SnapKV(pooling=2), "pooling: 2 is not allowed"),
        (lambda: SnapKV(pooling=-1), "pooling: -1 is not allowed"),
    ],
)
def test_wrong_settings_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


PROMPT = [int(t) for t in np.random.default_rng(6).integers(0, 61, 400)]
SAMPLED = SamplingParams(temperature=1.0, seed=5)


@functools.cache
def native_decoder() -> NativeDecoder:
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the native engine is not built")
    config = tiny_config()
    weights = weights_of(tiny_model(config, torch.float32))
    return NativeDecoder(
        NativeWeights(ModelSpec.from_config(config), weights, torch.bfloat16, 2), rope_tables(config, 512)
    )


@pytest.fixture(scope="module", params=["torch", "native"])
def decoder(request: pytest.FixtureRequest) -> Any:
    return native_decoder() if request.param == "native" else request.getfixturevalue("tiny_decoder")


@pytest.fixture(scope="module")
def plain(decoder: Any) -> list[int]:
    return write(decoder, PROMPT, 80, SAMPLED)[0]


@pytest.mark.parametrize("name", NAMES)
def test_no_policy_changes_a_token(decoder: Any, plain: list[int], name: str) -> None:
    for size, width in [(3, 1), (9, 2)]:
        drafter = create_drafter("partial", policy=name, view_tokens=192, width=width)
        assert write(decoder, PROMPT, 80, SAMPLED, drafter, draft_tokens=size)[0] == plain


class Watching(Scripted):
    """Drafts by the script, and shows policies the committed rows."""

    needs = frozenset({"mass", "queries"})

    def __init__(self, *script: Any, width: int = 1):
        super().__init__(*script, width=width)
        self.policies = {name: create(name) for name in LEARNING}

    @without_passes
    def prefill(self, context: Context, output: Output) -> None:
        rows = len(output.hidden)
        self.show(committed(output, range(rows), context.cache.length - rows))

    def propose(self, context: Context, budget: int) -> Passes[DraftTree]:
        self.start = context.cache.length
        return super().propose(context, budget)

    def observe(self, taken: Acceptance, output: Output) -> None:
        self.show(committed(output, taken.path, self.start))

    def show(self, rows: Committed) -> None:
        for policy in self.policies.values():
            policy.observe(rows)


def test_no_bit_of_a_score_depends_on_the_trees_that_were_drafted() -> None:
    """On the native engine, whose rows report the same in any pass, every way to write teaches a policy the same.

    The ways are plain decoding, and chains and trees that are right, wrong, or both.
    """
    decoder = native_decoder()
    plain, _, _ = write(decoder, PROMPT, 90, SAMPLED)
    learnt: dict[str, list[FloatArray]] = {name: [] for name in LEARNING}
    for size, right, width in [(0, 0.0, 1), (1, 1.0, 1), (4, 0.8, 1), (40, 0.9, 3), (12, 0.0, 2)]:
        drafter = Watching(PROMPT + plain, 61, right, width=width)
        loop = DecodeLoop(decoder, drafter, Sampler(SAMPLED, 61), Stops(90), draft_tokens=size)
        written = 0
        for step in loop.run(PROMPT):
            written += len(step.tokens)
            if written == 90:  # the cache is not given back yet
                for name, policy in drafter.policies.items():
                    learnt[name].append(policy.score(loop.cache.page_stats()))
    for scores in learnt.values():
        assert len(scores) == 5
        assert all(np.array_equal(s, scores[0]) for s in scores)
        assert np.ptp(scores[0], axis=-1).all()


@pytest.mark.model
def test_mass_drafts_better_than_recent_on_source_code() -> None:
    """More next tokens are those of the whole cache, by the same noise, under a view by mass than under one by recent.

    A view has 512 tokens and is chosen anew every four tokens. The text is real, and 1 500 tokens of it come before.
    """
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    swift = TokenSwift.from_pretrained(engine="native")
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    tokens = list(swift.tokenizer(text).input_ids)[:1800]
    assert len(tokens) == 1800
    model = swift.executor.model(rope_tables(swift.checkpoint.config, 2048))
    sampler = swift.executor.sampler(SamplingParams(temperature=0.8, min_p=0.05), swift.checkpoint.spec.vocab_size)
    cache = model.new_cache()
    policies = {name: create(name) for name in ("mass", "recent")}
    agreed = dict.fromkeys(policies, 0)
    model.forward([Segment(DraftTree.chain(tokens[:1468]), cache, causal=True)], [])
    cache.commit(range(1468))
    for start, stop in [(1468, 1500), *((at, at + 4) for at in range(1500, 1800, 4))]:
        tree, rows = DraftTree.chain(tokens[start:stop]), range(stop - start)
        views = {name: PageView(select(policy, cache.page_stats(), 512)) for name, policy in policies.items()}
        drafts = {}
        for name, view in views.items():
            drafts[name] = model.forward([Segment(tree, cache, view)]).logits
            cache.drop_tail()
        output = model.forward([Segment(tree, cache)], want_mass=True)
        cache.commit(rows)
        for row in rows:
            history = History(tokens[: start + row + 1])
            chosen = sampler.choose(output.logits[row], history)
            for name, logits in drafts.items():
                agreed[name] += start >= 1500 and sampler.choose(logits[row], history) == chosen
        for policy in policies.values():
            policy.observe(committed(output, rows, start))
    assert agreed["mass"] > agreed["recent"], agreed


def test_committed_rows_are_the_path_through_the_tree() -> None:
    mass, queries = torch.rand(LAYERS, 5, KV_HEADS, 3), torch.rand(5, LAYERS, 6, HEAD_DIM, dtype=torch.bfloat16)
    output = Output(torch.zeros(5, 1), torch.zeros(5, 1), mass, queries)
    tree = committed(output, (0, 2, 4), 70)
    assert (tree.start, tree.rows) == (70, 3)
    assert np.array_equal(tree.mass, mass[:, [0, 2, 4]])
    assert np.array_equal(tree.queries, queries[[0, 2, 4]].float())
    chain = committed(output, (0, 1, 2), 70)
    assert np.array_equal(chain.mass, mass[:, :3])
    assert np.shares_memory(chain.mass, mass.numpy())  # a chain's rows are not copied
    assert committed(Output(torch.zeros(5, 1), torch.zeros(5, 1)), (0,), 0) == Committed(0, 1)
