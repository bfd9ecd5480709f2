"""The lossy mode bounds the cache at fixed positions, so that the text still does not depend on how it was drafted."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import decoder_of, tiny_config, tiny_model, weights_of
from scripted import Scripted, write
from tokenswift_py import registry
from tokenswift_py.core import DraftTree, SamplingParams, Segment
from tokenswift_py.decoding.eviction import Eviction, pooled
from tokenswift_py.decoding.passes import Passes
from tokenswift_py.drafters.base import create
from tokenswift_py.errors import UserError
from tokenswift_py.kvcache.base import PAGE_SIZE, Committed, FloatArray, PageStats, best
from tokenswift_py.kvcache.pages import SPARE_PAGES
from tokenswift_py.kvcache.policies.recent import Recent
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.rows import Rows
from tokenswift_py.models.spec import ModelSpec

CONTEXT = 1024
PROMPT = [int(t) for t in np.random.default_rng(7).integers(0, 61, 400)]


class Attended:
    """The smallest policy that learns from passes. It sums attention mass row by row."""

    name = "attended"
    needs = frozenset({"mass"})

    def __init__(self) -> None:
        self.sums = np.zeros((3, 2, CONTEXT // PAGE_SIZE))
        self.rows = 0

    def observe(self, committed: Committed) -> None:
        assert committed.mass is not None and committed.start == self.rows
        self.rows += committed.rows
        for row in range(committed.rows):
            self.sums[..., : committed.mass.shape[-1]] += committed.mass[:, row]

    def score(self, stats: PageStats) -> FloatArray:
        return self.sums[..., : stats.pages]


class Fickle(Attended):
    """Chooses by the last bits of its sums. Had it seen another row, or one other bit, other pages would go."""

    name = "fickle"

    def score(self, stats: PageStats) -> FloatArray:
        scores: FloatArray = np.modf(super().score(stats) * 2.0**24)[0]
        return scores


class Scattered(Recent):
    """Scores pages in an order of its own, so that holes lie anywhere."""

    name = "scattered"

    def score(self, stats: PageStats) -> FloatArray:
        order = np.random.default_rng(stats.layers).permutation(CONTEXT // PAGE_SIZE)[: stats.pages]
        return np.broadcast_to(order.astype(np.float64), (stats.layers, stats.kv_heads, stats.pages))


FOLDER = "tokenswift_py.kvcache.policies"
POLICIES: dict[str, Any] = {"recent": Recent, "attended": Attended, "scattered": Scattered}
BITWISE = {  # models for which equal means bit for bit
    **POLICIES,
    "fickle": Fickle,
    **{name: partial(registry.create, FOLDER, "POLICY", "kv_policy", name) for name in registry.names(FOLDER)},
}
drafters = st.one_of(
    st.just(("ngram", {"shortest": 1})),
    st.builds(lambda view, width: ("partial", {"view_tokens": view, "width": width}),
              st.sampled_from([64, 256]), st.integers(1, 3)),
    st.builds(lambda right, width: ("scripted", {"right": right, "width": width}),
              st.sampled_from([0.0, 0.7, 1.0]), st.integers(1, 4)),
)  # fmt: skip
budgets = st.sampled_from([(256, 1), (320, 2), (512, 1), (512, 5)])


def native_decoder(dtype: torch.dtype = torch.bfloat16) -> NativeDecoder:
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    config = tiny_config(max_position_embeddings=CONTEXT)
    weights = NativeWeights(ModelSpec.from_config(config), weights_of(tiny_model(config, torch.float32)), dtype, 2)
    return NativeDecoder(weights, rope_tables(config, CONTEXT))


@pytest.fixture(scope="module")
def native() -> NativeDecoder:
    return native_decoder()


@pytest.fixture(scope="module")
def in_float64() -> Any:
    return decoder_of(tiny_model(tiny_config(max_position_embeddings=CONTEXT)), CONTEXT)


def evicting(budget: int, period: int | None = None, policy: str = "recent") -> Eviction:
    return Eviction(BITWISE[policy](), budget, period)


def assert_same_text(
    model: Any,
    params: SamplingParams,
    drafter: tuple[str, dict[str, Any]],
    size: int,
    chunk: int,
    budget: tuple[int, int],
    policy: str,
    length: int,
    count: int,
) -> None:
    """Every drafter writes plain decoding's text of the same mode, token for token, and on native bit for bit."""
    prompt = PROMPT[:length]
    ar, plain, steps = write(model, prompt, count, params, eviction=evicting(*budget, policy), want_logprobs=True)
    name, config = drafter
    made = Scripted(prompt + ar, 61, **config, seed=count) if name == "scripted" else create(name, **config)
    evictor = evicting(*budget, policy)
    text, engine, drafted = write(
        model, prompt, count, params, made, draft_tokens=size, prefill_chunk=chunk, eviction=evictor, want_logprobs=True
    )
    assert text == ar
    assert (
        evictor.evictions
        == plain.eviction.evictions
        == max(0, (length + count - 1 - budget[0]) // PAGE_SIZE // budget[1] + 1)
    )
    if isinstance(model, NativeDecoder):
        assert [x for step in drafted for x in step.logprobs] == [x for step in steps for x in step.logprobs]
    if policy in ("attended", "fickle"):
        assert engine.eviction.policy.rows == length + count - 1
    assert engine.cache.pool.in_use == 0


@settings(max_examples=8, deadline=None)
@given(
    temperature=st.sampled_from([0.0, 0.9]),
    drafter=drafters,
    size=st.integers(1, 30),
    chunk=st.integers(5, 300),
    budget=budgets,
    policy=st.sampled_from(sorted(POLICIES)),
    length=st.integers(200, 400),
)
def test_drafting_changes_no_token(
    in_float64: Any, temperature: float, drafter: Any, size: int, chunk: int, budget: Any, policy: str, length: int
) -> None:
    params = SamplingParams(temperature=temperature, seed=size)
    assert_same_text(in_float64, params, drafter, size, chunk, budget, policy, length, 140)


@settings(max_examples=12, deadline=None)
@given(
    temperature=st.sampled_from([0.0, 0.9]),
    drafter=drafters,
    size=st.integers(1, 100),
    chunk=st.integers(1, 300),
    budget=budgets,
    policy=st.sampled_from(sorted(BITWISE)),
    length=st.integers(1, 400),
    count=st.integers(1, 600),
)
def test_drafting_changes_no_bit_on_the_native_engine(
    native: Any, temperature: float, drafter: Any, size: int, chunk: int, budget: Any, policy: str, length: int,
    count: int,
) -> None:  # fmt: skip
    params = SamplingParams(temperature=temperature, seed=size)
    assert_same_text(native, params, drafter, size, chunk, budget, policy, length, count)


@settings(max_examples=8, deadline=None)
@given(cut=st.integers(1, 399), budget=budgets, policy=st.sampled_from(sorted(BITWISE)))
def test_a_text_goes_on_as_it_would_have_from_any_point(native: Any, cut: int, budget: Any, policy: str) -> None:
    """Evictions are a function of the tokens: prefilling the text up to a point evicts the same pages."""
    params = SamplingParams(temperature=1.0, seed=3)
    whole, _, _ = write(native, PROMPT[:150], 400, params, eviction=evicting(*budget, policy))
    rest, _, _ = write(native, PROMPT[:150] + whole[:cut], 400 - cut, params, eviction=evicting(*budget, policy))
    assert rest == whole[cut:]


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_rows_see_what_was_kept_and_nothing_else(attention: str) -> None:
    """Logits are those of Hugging Face's own forward, with the mask that follows from the positions of eviction."""
    reference = tiny_model(tiny_config(max_position_embeddings=CONTEXT))
    model = decoder_of(reference, CONTEXT, attention)
    budget, period, prompt = 256, 1, PROMPT[:270]
    text, _, steps = write(model, prompt, 80, eviction=evicting(budget, period), draft_tokens=8, want_logprobs=True,
                           drafter=create("ngram", shortest=1), prefill_chunk=50)  # fmt: skip
    ids = torch.tensor([prompt + text])
    position, page = np.arange(ids.shape[1])[:, None], np.arange(ids.shape[1])[None] // PAGE_SIZE
    evictions = np.maximum(0, (position - budget) // (period * PAGE_SIZE) + 1)
    first_kept = np.where(evictions > 0, 1 + evictions * period, 0)  # page 0 and the latest pages are kept
    mask = torch.from_numpy(((page == 0) | (page >= first_kept)) & (position >= position.T))
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    with torch.inference_mode():
        places = torch.arange(ids.shape[1])[None]
        logits = reference(ids, attention_mask=bias[None, None], position_ids=places).logits[0]
        whole = reference(ids).logits[0]
    rows = slice(len(prompt) - 1, -1)
    assert logits[rows].argmax(-1).tolist() == text
    expected = logits[rows].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    written = torch.tensor([x for step in steps for x in step.logprobs or ()], dtype=torch.float64)
    assert (written - expected).abs().max() < 2e-5  # the reference rotates in fp32
    assert (whole - logits)[rows].abs().max() > 1e-2  # evictions change the logits


@pytest.mark.parametrize("drafter", ["none", "ngram", "partial"])
@pytest.mark.parametrize("policy", ["attended", "h2o", "quest"])
def test_memory_is_bounded(native: Any, drafter: str, policy: str) -> None:
    eviction = evicting(300, policy=policy)
    assert eviction.budget == 256
    most, lengths = 0, []

    class Watched(type(create(drafter))):  # type: ignore[misc]
        def propose(self, context: Any, budget: int) -> Passes[DraftTree]:
            nonlocal most
            cache = context.cache
            lengths.append(cache.length)
            held = cache.length - cache.evicted * PAGE_SIZE
            assert held <= eviction.budget and cache.nbytes == cache.pool.in_use * cache.pool.page_bytes
            tree: DraftTree = yield from super().propose(context, budget)
            most = max(most, cache.pool.in_use)
            return tree

    text, engine, _ = write(native, PROMPT, 500, SamplingParams(temperature=1.0), Watched(), eviction=eviction)
    assert len(text) == 500 and lengths[-1] > 800
    assert 4 <= most <= 256 // PAGE_SIZE + 1
    for _ in range(256 // PAGE_SIZE + SPARE_PAGES):
        engine.cache.pool.allocate()
    with pytest.raises(MemoryError):
        engine.cache.pool.allocate()


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("executor", ["native", "in_float64"])
def test_a_text_that_fits_the_budget_is_the_lossless_one(
    executor: str, policy: str, request: pytest.FixtureRequest
) -> None:
    model, params = request.getfixturevalue(executor), SamplingParams(temperature=1.0, seed=9)
    prompt = PROMPT[:200]
    whole, _, steps = write(model, prompt, 200, params, want_logprobs=True)
    text, engine, others = write(model, prompt, 120, params, create("ngram"), eviction=evicting(320, None, policy),
                                 want_logprobs=True)  # fmt: skip
    assert text == whole[:120] and engine.eviction.evictions == 0
    if executor == "native":
        assert [x for s in others for x in s.logprobs] == [x for s in steps for x in s.logprobs][:120]
    longer, engine, _ = write(model, prompt, 200, params, create("ngram"), eviction=evicting(320, 2, policy))
    assert longer[:121] == whole[:121] and engine.eviction.evictions == 1


@pytest.mark.parametrize("turn", [7, 64, 150])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_chapters_are_forced_across_evictions(native: Any, turn: int, policy: str) -> None:
    params, prompt = SamplingParams(temperature=1.0, seed=4), PROMPT[:220]
    plain, _, _ = write(native, prompt, 60, params, eviction=evicting(256, 1, policy))
    settings: dict[str, Any] = {"eos": [plain[20]], "turns": [PROMPT[:turn], PROMPT[turn : 2 * turn]]}
    texts = [
        write(
            native,
            prompt,
            150,
            params,
            create(name),
            eviction=evicting(256, 1, policy),
            prefill_chunk=chunk,
            **settings,
        )
        for name, chunk in (("none", 512), ("none", 3), ("ngram", 40), ("partial", 33))
    ]
    text, engine, _ = texts[0]
    assert all(other == text for other, _, _ in texts)
    assert engine.stats.forced_tokens >= turn and engine.eviction.evictions > 0


def test_sliding_windows_and_evictions(native: Any) -> None:
    config = tiny_config("mistral", sliding_window=100, max_position_embeddings=CONTEXT)
    weights = NativeWeights(ModelSpec.from_config(config), weights_of(tiny_model(config, torch.float32)), torch.float32)
    model, params = NativeDecoder(weights, rope_tables(config, CONTEXT)), SamplingParams(temperature=1.0, seed=4)
    full, _, _ = write(model, PROMPT[:200], 300, params)
    # Recent pages reach further back than the windows, so no row loses anything that it sees ...
    assert write(model, PROMPT[:200], 300, params, create("ngram"), eviction=evicting(512, 1))[0] == full
    # ... and pages evicted inside a window are lost to every drafter alike.
    lossy, _, _ = write(model, PROMPT[:200], 300, params, eviction=evicting(256, 1, "scattered"))
    drafted = write(model, PROMPT[:200], 300, params, create("partial"), eviction=evicting(256, 1, "scattered"))[0]
    assert drafted == lossy


@pytest.mark.parametrize("executor", ["native", "in_float64"])
def test_a_draft_view_names_kept_pages_only(executor: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(executor)
    cache = model.new_cache()
    model.forward([Segment(DraftTree.chain(PROMPT[:300]), cache, causal=True)], [])
    cache.commit(range(300))
    cache.evict([1])
    tree, heads = DraftTree.chain([5, 6]), (3, 2)
    seen = model.forward([Segment(tree, cache)], want_mass=True)
    mass = seen.page_mass
    assert mass is not None and (mass[..., 1] == 0).all() and (mass[..., [0, 2, 3, 4]] > 0).all()
    cache.drop_tail()
    kept = PageView(np.broadcast_to(np.array([0, 2, 3], np.int32), (*heads, 3)))
    same = model.forward([Segment(tree, cache, kept)])
    assert torch.equal(same.logits, seen.logits)
    cache.drop_tail()
    with pytest.raises(ValueError, match="page 1, which was evicted"):
        model.forward([Segment(tree, cache, PageView.all(*heads, 4))])


@pytest.mark.parametrize(
    ("pages", "view", "says"),
    [
        ([0, 1], None, None),
        ([-1, 1], [1], None),
        ([-1, 1], None, "a page that is not in use: -1"),
        ([-1, 1], [0, 1], "a page that was evicted: 0"),
        ([-2, 1], [1], "a page that is not in use: -2"),
    ],
)
def test_the_native_boundary_refuses_evicted_pages(
    native: Any, monkeypatch: pytest.MonkeyPatch, pages: list[int], view: list[int] | None, says: str | None
) -> None:
    cache = native.new_cache()
    native.forward([Segment(DraftTree.chain(PROMPT[:130]), cache, causal=True)], [])
    cache.commit(range(130))

    def altered(rows: Rows) -> list[Any]:
        segment = rows.segments[0]
        chosen = None if view is None else np.tile(np.array(view, np.int32), (3, 2, 1))
        return [(segment.positions, np.array(pages, np.int32), chosen, segment.tail)]

    monkeypatch.setattr("tokenswift_py.models.native.attention_arrays", altered)
    with pytest.raises(ValueError, match=says) if says else nullcontext():
        native.forward([Segment(DraftTree.chain([5]), cache)])


def test_every_head_counts_alike_whatever_its_policys_unit() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 2, 12))
    keep = 8
    chosen = best(pooled(scores, keep), keep).tolist()
    scaled = scores * np.array([[[1e-6], [1.0]], [[50.0], [1e9]]]) - 7
    assert best(pooled(scaled, keep), keep).tolist() == chosen
    assert {0, 10, 11} <= set(chosen) and len(chosen) == keep
    scores[..., [0, 11]] = 1e9  # kept anyway, and so no measure for the others
    assert best(pooled(scores, keep), keep).tolist() == chosen
    flat = np.full((2, 2, 12), 0.1)
    assert (pooled(flat, keep) == 0).all()
    flat[1, 1, 5] = 0.2
    assert best(pooled(flat, 4), 4).tolist() == [0, 5, 10, 11]


@pytest.mark.parametrize(("budget", "period"), [(255, None), (0, None), (256, 2), (256, 0), (512, 6)])
def test_what_is_no_budget(budget: int, period: int | None) -> None:
    with pytest.raises(UserError, match=r"kv_budget|period"):
        evicting(budget, period)


@pytest.mark.parametrize(("budget", "period"), [(256, 1), (700, 2), (1024, 4), (9999, 4)])
def test_a_small_budget_evicts_fewer_pages_at_a_time(budget: int, period: int) -> None:
    assert evicting(budget).period == period
