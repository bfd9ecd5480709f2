"""Statistics that policies read, on both executors: a row's queries, the bounds of a page's keys, their best scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from conftest import PLAIN, decoder_of, tiny_config, tiny_model, weights_of
from native_rows import int8_block
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.kernels.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec

try:
    from tokenswift_py.kernels.cpu import _native

    ISAS = _native.runnable_isas().split(", ")
except ImportError:
    ISAS = []

TREE = DraftTree(np.array([1, 2, 3, 4], np.int32), np.array([-1, 0, 0, 1], np.int32))


def native(config: Any, kv_dtype: torch.dtype) -> NativeDecoder:
    weights = weights_of(tiny_model(config, torch.float32))
    packed = NativeWeights(ModelSpec.from_config(config), weights, torch.float32, 2)
    return NativeDecoder(packed, rope_tables(config, 512), kv_dtype)


def on_torch(config: Any, kv_dtype: torch.dtype) -> Any:
    """The torch executor's cache has the weights' type."""
    return decoder_of(tiny_model(config, torch.float32).to(kv_dtype), 512)


EXECUTORS: dict[str, tuple[Callable[..., Any], torch.dtype, str]] = {
    "torch-fp32": (on_torch, torch.float32, ""),
    "torch-bf16": (on_torch, torch.bfloat16, ""),
    **{
        f"{isa}-kv-{name}": (native, kind, isa)
        for isa in ISAS
        for name, kind in {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}.items()
    },
}


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    make, kv_dtype, isa = EXECUTORS[request.param]
    monkeypatch.setenv("TOKENSWIFT_ISA", isa)
    return lambda config: make(config, kv_dtype)


def filled(decoder: Any, count: int, seed: int = 0) -> KVCache:
    cache = decoder.new_cache()
    extend(decoder, cache, count, seed)
    return cache


def extend(decoder: Any, cache: KVCache, count: int, seed: int = 0) -> None:
    ids = np.random.default_rng(seed).integers(0, 61, count).astype(np.int32)
    decoder.forward([Segment(DraftTree.chain(ids), cache, causal=True)], [])
    cache.commit(range(count))


def naive_queries(config: Any, ids: list[int]) -> torch.Tensor:
    """[tokens, layers, heads, head_dim], caught inside Hugging Face's own forward."""
    caught: list[torch.Tensor] = []
    model = tiny_model(config, torch.float32)

    def attention(module: Any, q: torch.Tensor, *rest: Any, **options: Any) -> Any:
        caught.append(q[0].transpose(0, 1))
        return sdpa_attention_forward(module, q, *rest, **options)

    AttentionInterface.register("catching", attention)
    model.set_attn_implementation("catching")
    with torch.inference_mode():
        model(torch.tensor([ids]))
    return torch.stack(caught, 1)


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("make", [on_torch, native])
def test_queries_are_those_of_hugging_face(make: Callable[..., Any], family: str) -> None:
    config = tiny_config(family)
    if make is native and not ISAS:
        pytest.skip("the native engine is not built")
    ids = np.random.default_rng(0).integers(0, 61, 20).tolist()
    decoder = make(config, torch.float32)
    output = decoder.forward([Segment(DraftTree.chain(ids), decoder.new_cache())], [], want_queries=True)
    assert output.queries.dtype == torch.float32
    torch.testing.assert_close(output.queries, naive_queries(config, ids), atol=1e-4, rtol=1e-4)


def test_asking_for_queries_changes_no_bit(executor: Callable[[Any], Any]) -> None:
    decoder = executor(tiny_config("qwen3"))
    cache = filled(decoder, 70)
    plain = decoder.forward([Segment(TREE, cache)])
    cache.drop_tail()
    asked = decoder.forward([Segment(TREE, cache)], want_queries=True)
    assert plain.queries is None
    assert asked.queries.shape == (4, 3, 6, 16)
    assert torch.equal(plain.logits, asked.logits)


def keys_of(decoder: Any, pool: Any, page: int) -> torch.Tensor:
    """[layers, kv_heads, PAGE_SIZE, head_dim] as attention reads them."""
    if not isinstance(decoder, NativeDecoder):
        return pool.keys[:, :, page].float()
    spec = decoder.spec
    blocks = [pool.native.block(layer, head, page) for layer in range(spec.layers) for head in range(spec.kv_heads)]
    keys = torch.stack([unpacked(torch.from_numpy(block), decoder.kv_dtype) for block in blocks])
    return keys.view(spec.layers, spec.kv_heads, PAGE_SIZE, -1)[..., : spec.head_dim]


def unpacked(block: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    if kind == torch.int8:
        quants, scales = int8_block(block.numpy())
        return quants[0] * scales[0]
    if kind == torch.bfloat16:
        return unpacked_pairs(block.view(torch.bfloat16))
    return block.view(torch.float32).view(2, -1, PAGE_SIZE)[0].T


def unpacked_pairs(block: torch.Tensor) -> torch.Tensor:
    return block.view(2, -1, PAGE_SIZE, 2)[0].transpose(0, 1).flatten(1).float()


@pytest.mark.parametrize("head_dim", [16, 12])
def test_bounds_are_the_least_and_the_greatest_keys(executor: Callable[[Any], Any], head_dim: int) -> None:
    decoder = executor(tiny_config("qwen3", head_dim=head_dim))
    cache = filled(decoder, 330)
    pages = cache.pages[: cache.full_pages].copy()
    for chosen in (pages, pages[[3, 0]], pages[2:4], pages[:0]):
        low, high = cache.pool.key_bounds(chosen)
        assert low.shape == high.shape == (3, 2, len(chosen), head_dim)
        assert low.dtype == high.dtype == torch.float32
        for i, page in enumerate(chosen):
            keys = keys_of(decoder, cache.pool, int(page))
            assert torch.equal(low[:, :, i], keys.amin(2))
            assert torch.equal(high[:, :, i], keys.amax(2))


def test_a_page_that_is_used_again_has_new_bounds(executor: Callable[[Any], Any]) -> None:
    decoder = executor(tiny_config())
    cache = filled(decoder, PAGE_SIZE)
    fork = cache.fork()
    page = cache.pages[:1].copy()
    before = cache.pool.key_bounds(page)[0].clone()
    cache.release()
    assert torch.equal(fork.pool.key_bounds(page)[0], before)  # the fork still holds it
    fork.release()
    extend(decoder, fork, PAGE_SIZE, seed=1)
    assert fork.pages[0] == page[0]
    low, _ = fork.pool.key_bounds(page)
    assert torch.equal(low[:, :, 0], keys_of(decoder, fork.pool, int(page[0])).amin(2))
    assert not torch.equal(low, before)


def test_bounds_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = on_torch(tiny_config(), torch.float32)
    cache = filled(decoder, 200)
    cache.pool.key_bounds(cache.pages[:2])
    computed: list[int] = []
    monkeypatch.setattr(cache.pool, "_bound_keys", lambda pages, low, high: computed.extend(pages.tolist()))
    cache.pool.key_bounds(cache.pages[:3])
    cache.pool.key_bounds(cache.pages[:3])
    assert computed == cache.pages[2:3].tolist()


@pytest.mark.parametrize("head_dim", [16, 12])
def test_keys_of_pages_are_those_that_attention_reads(executor: Callable[[Any], Any], head_dim: int) -> None:
    decoder = executor(tiny_config("qwen3", head_dim=head_dim))
    cache = filled(decoder, 330)
    pages = cache.pages[: cache.full_pages].copy()
    for chosen in (pages, pages[[3, 0]], pages[:0]):
        for layer in range(3):
            found = cache.pool.page_keys(layer, chosen)
            assert found.shape == (2, len(chosen), PAGE_SIZE, head_dim) and found.dtype == torch.float32
            for i, page in enumerate(chosen):
                assert torch.equal(found[:, i], keys_of(decoder, cache.pool, int(page))[layer])


@pytest.mark.parametrize("head_dim", [16, 12])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_scores_are_the_best_products_of_a_page(executor: Callable[[Any], Any], head_dim: int, kv_heads: int) -> None:
    decoder = executor(tiny_config("qwen3", head_dim=head_dim, num_key_value_heads=kv_heads))
    cache = filled(decoder, 330)
    queries = decoder.forward([Segment(TREE, cache)], want_queries=True).queries[3]
    pages = cache.pages[: cache.full_pages].copy()
    for chosen in (pages, pages[[3, 0]], pages[:0]):
        scores = cache.pool.key_scores(chosen, queries)
        assert scores.shape == (3, kv_heads, len(chosen)) and scores.dtype == torch.float32
        for i, page in enumerate(chosen):
            keys = keys_of(decoder, cache.pool, int(page))
            products = torch.einsum("lgtd,lghd->lgth", keys, queries.unflatten(1, (kv_heads, -1)))
            expected = products.sum(-1).amax(-1)
            largest = queries.norm(dim=-1).amax() * keys.norm(dim=-1).amax()
            rounds = any(part in decoder.numerics for part in ("/avx512bf16/", "/amx", "kv-int8"))  # queries
            rounding = 2**-8 if rounds else 1e-6
            assert (scores[:, :, i] - expected).abs().max() < rounding * 6 * largest


def test_the_upper_bound_of_quest_holds_for_every_key(executor: Callable[[Any], Any]) -> None:
    """The formula that `key_bounds` documents, against each product of a query with a key."""
    decoder = executor(tiny_config())
    cache = filled(decoder, 330)
    queries = decoder.forward([Segment(TREE, cache)], want_queries=True).queries[0].unflatten(1, (2, -1))
    pages = cache.pages[: cache.full_pages].copy()
    low, high = cache.pool.key_bounds(pages)
    upper = queries.clamp(min=0) @ high.mT + queries.clamp(max=0) @ low.mT  # [layers, kv_heads, group, n]
    for i, page in enumerate(pages):
        products = queries @ keys_of(decoder, cache.pool, int(page)).mT
        assert (products.amax(-1) <= upper[..., i] + 1e-4).all()
        naive = torch.maximum(queries * low[:, :, None, i], queries * high[:, :, None, i]).sum(-1)
        torch.testing.assert_close(upper[..., i], naive, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not ISAS, reason="the native engine is not built")
def test_malformed_statistics_are_refused() -> None:
    decoder = native(tiny_config(), torch.int8)
    cache = filled(decoder, 130)
    pool: Any = cache.pool
    engine = decoder.weights.native
    i32, pages = np.int32, np.array([0], np.int32)
    query, out = np.zeros((3, 2, 16), np.float32), np.zeros((3, 2, 1), np.float32)
    engine.key_scores(pool.native, pages, query, out)
    for bad in (np.array([-1], i32), np.array([1 << 29], i32), np.array([0.0]), np.zeros((1, 1), i32)):
        with pytest.raises((ValueError, TypeError)):
            engine.key_scores(pool.native, bad, query, out)
    for shapes in ((query[:2].copy(), out), (query[..., :8].copy(), out), (query, np.zeros((3, 2, 2), np.float32))):
        with pytest.raises(ValueError, match="are"):
            engine.key_scores(pool.native, pages, *shapes)
    keys = np.zeros((2, 1, PAGE_SIZE, 16), np.float32)
    engine.page_keys(pool.native, 2, pages, keys)
    for layer in (-1, 3):
        with pytest.raises(ValueError, match="no such layer"):
            engine.page_keys(pool.native, layer, pages, keys)
    for shape in ((2, 2, PAGE_SIZE, 16), (2, 1, 32, 16), (2, 1, PAGE_SIZE, 17), (3, 1, PAGE_SIZE, 16)):
        with pytest.raises(ValueError, match="keys are"):
            engine.page_keys(pool.native, 0, pages, np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="not in use"):
        engine.page_keys(pool.native, 0, np.array([1 << 29], i32), keys)
    total = decoder.new_pool(3)
    total.allocate()
    bounds = np.zeros((3, 2, 3, 8), np.float32)
    engine.key_bounds(total.native, pages, bounds, bounds.copy())
    for low, high in ((bounds[:, :, :2].copy(), bounds), (bounds, np.zeros((3, 2, 3, 7), np.float32))):
        with pytest.raises(ValueError, match="bounds are"):
            engine.key_bounds(total.native, pages, low, high)
    with pytest.raises(ValueError, match="bounds are"):
        engine.key_bounds(total.native, pages, np.zeros((3, 2, 3, 32), np.float32), np.zeros((3, 2, 3, 32), np.float32))
