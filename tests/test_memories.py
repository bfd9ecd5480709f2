"""What is evicted is folded into a memory: the text is that of a dense reference, whatever drafted it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import decoder_of, tiny_config, tiny_model, weights_of
from dense_memory import dense_logits
from scripted import Scripted, write
from tokenswift_py.core import DraftTree, SamplingParams, Segment
from tokenswift_py.decoding.eviction import Eviction
from tokenswift_py.drafters.base import create
from tokenswift_py.kernels.sdpa import SDPA
from tokenswift_py.kvcache.memories.base import Memory, Shape
from tokenswift_py.kvcache.memories.infini import Infini
from tokenswift_py.kvcache.memories.infini_linear import InfiniLinear
from tokenswift_py.kvcache.memories.linear import Linear
from tokenswift_py.kvcache.memories.performer import Performer, orthogonal_rows
from tokenswift_py.kvcache.policies.recent import Recent
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.remembering.reading import read_on

CONTEXT = 768
PROMPT = [int(t) for t in np.random.default_rng(7).integers(0, 61, 400)]
KINDS = ("linear", "performer", "infini", "infini_linear")
GATES = torch.from_numpy(np.random.default_rng(3).normal(0, 1, (2, 6)))
FEATURES = 16


def sharp_model() -> Any:
    """A random llama whose attention is sharp: most of a row's mass lies on a few keys."""
    model = tiny_model(tiny_config(max_position_embeddings=CONTEXT, num_hidden_layers=2))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(3)
    return model


SHARP = sharp_model()


@pytest.fixture(scope="module")
def sharp() -> Any:
    return decoder_of(SHARP, CONTEXT)


@pytest.fixture(scope="module")
def native() -> Any:
    return native_sharp(torch.float32)


def native_sharp(dtype: torch.dtype, kv_dtype: torch.dtype | None = None, **kind: bool) -> NativeDecoder:
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    weights = NativeWeights(ModelSpec.from_config(SHARP.config), weights_of(SHARP), dtype, 2)
    return NativeDecoder(weights, rope_tables(SHARP.config, CONTEXT), kv_dtype, **kind)


def memory(kind: str, model: Any) -> Memory:
    shape = model.remembers()
    if kind == "performer":
        plain: Memory = Performer(shape, FEATURES)
    elif kind == "linear":
        plain = Linear(shape)
    else:
        plain = (Infini if kind == "infini" else InfiniLinear)(shape, GATES)
    made: Memory = model.new_memory(plain, kind)
    return made


def evicting(kind: str, model: Any, budget: int = 256, period: int | None = None) -> Eviction:
    return Eviction(Recent(), budget, period, memory=memory(kind, model))


TEXT = [int(t) for t in np.random.default_rng(8).integers(0, 61, 460)]
BUDGET, PERIOD = 320, 2  # evictions at 320 and 448


@cache
def reference(kind: str) -> torch.Tensor:
    """Log-probabilities of the last tokens of TEXT, densely."""
    rows = orthogonal_rows(FEATURES, 8, 0) if kind == "performer" else None
    gates = GATES.sigmoid() if kind.startswith("infini") else None
    logits = dense_logits(weights_of(SHARP), SHARP.config, TEXT, kind, BUDGET, PERIOD, rows, gates)
    return logits[-LAST - 1 : -1].log_softmax(-1).gather(1, torch.tensor(TEXT[-LAST:])[:, None])[:, 0]


LAST = 160  # tokens compared, before and behind evictions


def read(model: Any, eviction: Eviction) -> torch.Tensor:
    read = list(read_on(model, eviction.new_cache(model), eviction, TEXT, LAST))
    return torch.cat([logits.log_softmax(-1).gather(1, after[:, None])[:, 0] for logits, after in read])


@pytest.mark.parametrize(("kind", "attention"), [*((kind, "sdpa") for kind in KINDS), ("performer", "naive")])
def test_rows_read_what_a_dense_reference_reads(kind: str, attention: str) -> None:
    model = decoder_of(SHARP, CONTEXT, attention)
    eviction = evicting(kind, model, BUDGET, PERIOD)
    found = read(model, eviction)
    assert eviction.evictions == 2
    assert (found - reference(kind)).abs().max() < 1e-4  # keys are folded in fp32, and rotated in fp32
    assert (found - read(model, Eviction(Recent(), BUDGET, PERIOD))).abs().max() > 1e-2  # the memory changes the logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_native_engine_reads_what_the_dense_reference_reads(native: Any, kind: str) -> None:
    eviction = evicting(kind, native, BUDGET, PERIOD)
    found = read(native, eviction).double()
    assert eviction.evictions == 2
    assert (found - reference(kind)).abs().max() < 2e-3  # in fp32, and scales of linear in steps
    assert (found - read(native, Eviction(Recent(), BUDGET, PERIOD))).abs().max() > 1e-2


@pytest.mark.parametrize(("engine", "kind"), [*(("native", kind) for kind in KINDS), ("torch", "performer")])
def test_a_familys_scale_of_scores_is_one_of_queries(engine: str, kind: str) -> None:
    """Gemma 2 scales scores otherwise than by head_dim. Halved queries under twice the scale are the same attention."""
    spec = replace(ModelSpec.from_config(SHARP.config), query_scale=2.0)
    halved = {name: weight / 2 if "q_proj" in name else weight for name, weight in weights_of(SHARP).items()}
    tables = rope_tables(SHARP.config, CONTEXT)
    if engine == "native":
        pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
        model: Any = NativeDecoder(NativeWeights(spec, halved, torch.float32, 2), tables)
    else:
        model = TorchDecoder(spec, halved, tables, SDPA())
    found = read(model, evicting(kind, model, BUDGET, PERIOD)).double()
    assert (found - reference(kind)).abs().max() < 2e-3


def test_pages_of_another_shape_are_not_folded(native: Any) -> None:
    """Of other heads: the engine would read past their blocks."""
    from tokenswift_py.kernels.cpu import _native

    spec, engine = native.spec, native.weights.native
    made = _native.Memory(
        engine, "infini", np.ones(spec.layers, np.int32), None, np.zeros((spec.layers, spec.heads), np.float32)
    )
    number, table = np.zeros(1, np.int32), np.zeros((CONTEXT, spec.head_dim // 2), np.float32)
    right = -(-spec.head_dim // 16) * 16
    for head_dim, says in ((right + 16, "shape"), (right, None)):
        pool = _native.Pool(spec.layers, spec.kv_heads, head_dim, "fp32", 1)
        pool.reserve(0)
        with pytest.raises(ValueError, match=says) if says else nullcontext():
            made.fold(engine, pool, number, number, table, table, None, None)


def twice(fold: Any) -> Any:
    return lambda self, pool, numbers, pages: [fold(self, pool, numbers, pages) for _ in range(2)]


def backwards(fold: Any) -> Any:
    return lambda self, pool, numbers, pages: fold(self, pool, numbers[::-1].copy(), pages[::-1].copy())


@pytest.mark.parametrize(
    ("kind", "fault"), [("linear", twice), ("performer", twice), ("infini", twice), ("infini", backwards)]
)
def test_a_planted_fault_is_seen(sharp: Any, kind: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "fold", fault(Memory.fold))
    assert (read(sharp, evicting(kind, sharp, BUDGET, PERIOD)) - reference(kind)).abs().max() > 1e-3


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([0.0, 0.9]),
    drafter=st.sampled_from(["ngram", "partial", "never", "always"]),
    size=st.integers(1, 30),
    chunk=st.integers(5, 300),
    budget=st.sampled_from([(256, 1), (512, 3)]),
    length=st.integers(200, 400),
)
def test_drafting_changes_no_token(
    sharp: Any, kind: str, temperature: float, drafter: str, size: int, chunk: int, budget: Any, length: int
) -> None:
    params, prompt, count = SamplingParams(temperature=temperature, seed=size), PROMPT[:length], 140
    plain, _, _ = write(sharp, prompt, count, params, eviction=evicting(kind, sharp, *budget))
    if drafter in ("never", "always"):
        made: Any = Scripted(prompt + plain, 61, right=float(drafter == "always"), width=2, seed=size)
    else:
        made = create(drafter, **({"view_tokens": 64} if drafter == "partial" else {"shortest": 1}))
    text, loop, _ = write(
        sharp, prompt, count, params, made, draft_tokens=size, prefill_chunk=chunk,
        eviction=evicting(kind, sharp, *budget),
    )  # fmt: skip
    assert text == plain and loop.cache.pool.in_use == 0


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    types=st.sampled_from([(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.int8)]),
    temperature=st.sampled_from([0.0, 0.9]),
    drafter=st.sampled_from(["ngram", "partial", "never", "always"]),
    size=st.integers(1, 60),
    chunk=st.integers(1, 300),
    budget=st.sampled_from([(256, 1), (512, 3)]),
    length=st.integers(200, 400),
)
def test_drafting_changes_no_bit_on_the_native_engine(
    kind: str, types: Any, temperature: float, drafter: str, size: int, chunk: int, budget: Any, length: int
) -> None:
    model, prompt, count = native_sharp(*types), PROMPT[:length], 140
    params = SamplingParams(temperature=temperature, seed=size)
    plain, _, steps = write(model, prompt, count, params, eviction=evicting(kind, model, *budget), want_logprobs=True)
    if drafter in ("never", "always"):
        made: Any = Scripted(prompt + plain, 61, right=float(drafter == "always"), width=3, seed=size)
    else:
        made = create(drafter, **({"view_tokens": 64} if drafter == "partial" else {"shortest": 1}))
    copies = types == (torch.bfloat16, None)
    text, _, drafted = write(
        model, prompt, count, params, made, draft_tokens=size, prefill_chunk=chunk, want_logprobs=True,
        eviction=evicting(kind, model, *budget),
        self_draft=native_draft(model) if copies and drafter == "partial" else None,
    )  # fmt: skip
    assert text == plain
    assert [x for step in drafted for x in step.logprobs] == [x for step in steps for x in step.logprobs]


def native_draft(model: NativeDecoder) -> NativeDecoder:
    """The same model for drafts, which reads int8 copies of the pages that it sees."""
    return NativeDecoder(model.weights, rope_tables(SHARP.config, CONTEXT), draft=True, int8_pages=True)


@pytest.mark.parametrize("executor", ["sharp", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_goes_on_as_it_would_have_from_any_point(
    executor: str, kind: str, request: pytest.FixtureRequest
) -> None:
    """A memory is a function of the tokens: prefilling the text up to a point folds the same."""
    model = request.getfixturevalue(executor)
    params = SamplingParams(temperature=1.0, seed=3)
    whole, _, _ = write(model, PROMPT[:250], 120, params, eviction=evicting(kind, model))
    for cut in (7, 70, 100):  # evictions are at 256 and 320
        rest, _, _ = write(model, PROMPT[:250] + whole[:cut], 120 - cut, params, eviction=evicting(kind, model))
        assert rest == whole[cut:]


@pytest.mark.parametrize("executor", ["sharp", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_fits_the_budget_is_the_lossless_one(
    executor: str, kind: str, request: pytest.FixtureRequest
) -> None:
    sharp = request.getfixturevalue(executor)
    params = SamplingParams(temperature=1.0, seed=9)
    whole, _, _ = write(sharp, PROMPT[:200], 100, params)
    text, loop, _ = write(sharp, PROMPT[:200], 100, params, eviction=evicting(kind, sharp, 512))
    assert text == whole and loop.eviction.evictions == 0


def prefilled(model: Any, kind: str, length: int = 300, chunk: int = 50) -> tuple[Any, Eviction]:
    eviction = evicting(kind, model)
    cache = eviction.new_cache(model)
    while cache.length < length:
        count = min(chunk, length - cache.length, cache.limit - cache.length)
        segment = Segment(DraftTree.chain(PROMPT[cache.length :][:count]), cache, causal=True)
        output = model.forward([segment], [], want_queries=True)
        cache.commit(range(count))
        eviction.committed(cache, range(count), output)
    return cache, eviction


@pytest.mark.parametrize("executor", ["sharp", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_has_a_memory_of_its_own_and_rolling_back_leaves_it(
    executor: str, kind: str, request: pytest.FixtureRequest
) -> None:
    check_fork(request.getfixturevalue(executor), kind)


def check_fork(sharp: Any, kind: str) -> None:
    cache, eviction = prefilled(sharp, kind)
    tree = DraftTree.chain([5, 6])

    def logits() -> torch.Tensor:
        found = sharp.forward([Segment(tree, cache)]).logits.clone()
        cache.drop_tail()  # rolls the rows back
        return found

    before = logits()
    fork = cache.fork()
    assert torch.equal(sharp.forward([Segment(tree, fork)]).logits, before)
    fork.drop_tail()
    while fork.length < 330:  # which is beyond the next eviction
        count = min(20, fork.limit - fork.length)
        output = sharp.forward([Segment(DraftTree.chain(PROMPT[:count]), fork, causal=True)], [], want_queries=True)
        fork.commit(range(count))
        eviction.committed(fork, range(count), output)
    assert (fork.memory.folded, cache.memory.folded) == (2, 1)
    assert torch.equal(logits(), before)
    fork.release()
    assert torch.equal(logits(), before) and fork.memory.folded == 0
    cache.release()


def test_a_fork_that_shares_its_memory_is_seen(sharp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Infini, "copy", lambda self: self)
    with pytest.raises(AssertionError):
        check_fork(sharp, "infini")


@pytest.mark.parametrize("executor", ["sharp", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_released_cache_begins_anew(executor: str, kind: str, request: pytest.FixtureRequest) -> None:
    sharp = request.getfixturevalue(executor)
    cache, eviction = prefilled(sharp, kind)
    first = sharp.forward([Segment(DraftTree.chain([5, 6]), cache)]).logits.clone()
    cache.release()
    cache.limit = eviction.budget
    while cache.length < 300:
        count = min(50, 300 - cache.length, cache.limit - cache.length)
        segment = Segment(DraftTree.chain(PROMPT[cache.length :][:count]), cache, causal=True)
        output = sharp.forward([segment], [], want_queries=True)
        cache.commit(range(count))
        eviction.committed(cache, range(count), output)
    again = sharp.forward([Segment(DraftTree.chain([5, 6]), cache)]).logits
    # Torch's attention may round otherwise where pages lie in another order.
    assert torch.equal(again, first) if executor == "native" else (again - first).abs().max() < 1e-9
    cache.release()


class Stored:
    """Pages of given keys and values, [kv_heads, pages, 64, head_dim]."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values = keys, values

    def page_keys(self, layer: int, pages: Any) -> torch.Tensor:
        return self.keys[:, torch.from_numpy(pages).long()]

    def page_values(self, layer: int, pages: Any) -> torch.Tensor:
        return self.values[:, torch.from_numpy(pages).long()]


def drawn(size: float = 1.0, pages: int = 2, head_dim: int = 8) -> tuple[Stored, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    keys, values, queries = (
        torch.randn(shape, generator=draw, dtype=torch.float64) * scale
        for shape, scale in (((1, pages, 64, head_dim), size), ((1, pages, 64, head_dim), 1), ((5, 2, head_dim), size))
    )
    return Stored(keys, values), queries


SHAPE = Shape((True,), 1, 2, 8, torch.float64, tables=[None])
FIRST = np.arange(2, dtype=np.int32)


def test_performer_converges_to_the_softmax() -> None:
    """Its estimate is unbiased: the mean over many draws is the softmax's own sum, and so is one with many features."""
    pool, queries = drawn(0.7)
    scores = queries @ pool.keys.flatten(0, 2).T * 8**-0.5
    exact = scores.softmax(-1) @ pool.values.flatten(0, 2)
    errors = {}
    for features in (64, 65536):
        memory = Performer(SHAPE, features)
        memory.fold(pool, FIRST, FIRST)
        values, lse = memory.read(0, queries)
        errors[features] = float((values - exact).abs().max())
        if features > 64:
            assert (lse - scores.logsumexp(-1)).abs().max() < 0.05
    assert errors[65536] < 0.05 < errors[64]
    masses = []
    for seed in range(600):
        memory = Performer(SHAPE, 16, seed)
        memory.fold(pool, FIRST, FIRST)
        masses.append(memory.read(0, queries)[1].exp())
    ratio = torch.stack(masses) / scores.logsumexp(-1).exp()
    deviations = (ratio.mean(0) - 1) / (ratio.std(0) / 600**0.5)
    assert deviations.abs().max() < 4


def test_random_rows_are_orthogonal_and_as_long_as_normal_ones() -> None:
    rows = orthogonal_rows(20, 8, 0)
    products = rows[:8] @ rows[:8].T
    assert (products - products.diagonal().diag()).abs().max() < 1e-12
    assert rows.shape == (20, 8) and torch.equal(rows, orthogonal_rows(20, 8, 0))
    assert not torch.equal(rows, orthogonal_rows(20, 8, 1))
    many = orthogonal_rows(8000, 8, 3).square().sum(1)  # chi-square with 8 degrees of freedom
    assert abs(float(many.mean()) - 8) < 0.2 and abs(float(many.var()) - 16) < 1.5


@pytest.mark.parametrize("kind", [Performer, Linear])
def test_nothing_overflows_however_large_keys_are(kind: Any) -> None:
    pool, queries = drawn(60.0)
    memory = kind(Shape((True,), 1, 2, 8, tables=[None]))
    if kind is Linear:
        memory.queries = queries[:, None].float().numpy()
    memory.fold(pool, FIRST, FIRST)
    values, lse = memory.read(0, queries.float())
    assert values.isfinite().all() and lse.isfinite().all()
    assert float(values.abs().max()) <= 1.0001 * float(pool.values.abs().max())  # a weighted mean


def recalled(kind: Any, pool: Stored, queries: torch.Tensor, *orders: list[int]) -> torch.Tensor:
    memory = kind(SHAPE, torch.zeros(1, 2)) if issubclass(kind, Infini) else kind(SHAPE)
    for order in orders:
        pages = np.array(order, np.int32)
        memory.fold(pool, pages, pages)
    found: torch.Tensor = memory.read(0, queries)[0]
    return found


def test_the_delta_rule_adds_nothing_that_is_known() -> None:
    """Bound to one key again and again, a value is recalled as it is, and the order in which pages come counts."""
    pool, queries = drawn()
    pool.keys[:], pool.values[:] = pool.keys[:, :1, :1], pool.values[:, :1, :1]
    once, twice = (recalled(Infini, pool, queries, *folds) for folds in ([[0]], [[0], [1]]))
    value = pool.values[0, 0, 0].expand_as(once)
    assert (once - value).abs().max() < 1e-12
    assert (recalled(InfiniLinear, pool, queries, [0], [1]) - value).abs().max() < 1e-12
    assert (twice - value / 2).abs().max() < 1e-12  # M stays as it was, while z grows
    pool, queries = drawn()
    assert (recalled(Infini, pool, queries, [0, 1]) - recalled(Infini, pool, queries, [1, 0])).abs().max() > 1e-3
    both = [recalled(InfiniLinear, pool, queries, order) for order in ([0, 1], [1, 0])]
    assert (both[0] - both[1]).abs().max() < 1e-12


def test_layers_with_a_sliding_window_have_no_memory() -> None:
    config = tiny_config("mistral", sliding_window=100, max_position_embeddings=CONTEXT)
    assert decoder_of(tiny_model(config), CONTEXT).remembers().keeps == (False,) * 3
