"""The native CPU engine: a row's bits depend on its own ancestors only, its values agree with torch, and nothing
that comes through the boundary can crash it."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import PLAIN, decoder_of, tiny_model
from native_rows import (
    CONTEXT,
    DTYPES,
    _native,
    assert_row_law,
    config_of,
    extend,
    native_of,
    one_by_one,
    prefill,
    random_tree,
    tokens,
)
from native_rows import isa as isa
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.errors import UserError
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.devices import available_threads
from tokenswift_py.models.native import NativeDecoder
from tokenswift_py.models.spec import ModelSpec

TYPES = {"bf16": (torch.bfloat16, None), "fp32": (torch.float32, None), "kv-int8": (torch.bfloat16, torch.int8)}
WIDE = DraftTree(np.arange(40, dtype=np.int32), np.array([-1] + [0] * 20 + [1 + i % 20 for i in range(19)], np.int32))


@pytest.fixture(scope="module", params=[None, torch.int8], ids=["kv-bf16", "kv-int8"])
def decoder(request: pytest.FixtureRequest) -> NativeDecoder:
    return native_of(config_of(), kv_dtype=request.param)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("prefix", [60, 1020])
def test_tree_rows_have_the_bits_of_tokens_decoded_one_by_one(isa: str, types: str, prefix: int) -> None:
    dtype, kv_dtype = TYPES[types]
    decoder = native_of(config_of(), dtype, kv_dtype=kv_dtype)
    assert_row_law(decoder, prefix, random_tree(prefix, 100, 0.06))  # deep: crosses one page border or two
    assert_row_law(decoder, prefix, random_tree(prefix, 50, 0.7))
    assert_row_law(decoder, prefix, WIDE)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("window", [5, 64, 100])
def test_row_law_with_a_sliding_window(isa: str, window: int, kv_dtype: torch.dtype | None) -> None:
    decoder = native_of(config_of(family="mistral", sliding_window=window), kv_dtype=kv_dtype)
    assert_row_law(decoder, 190, random_tree(3, 90, 0.1))


@pytest.mark.parametrize("head_dim", [32, 80, 128, 256])
@pytest.mark.parametrize("kv_heads", [1, 6])
def test_row_law_with_other_heads(head_dim: int, kv_heads: int) -> None:
    for kv_dtype in (None, torch.int8):
        config = config_of(family="qwen3", head_dim=head_dim, num_key_value_heads=kv_heads)
        assert_row_law(native_of(config, kv_dtype=kv_dtype), 120, random_tree(4, 40, 0.3))


def test_a_tree_of_512_rows_keeps_the_row_law(decoder: NativeDecoder) -> None:
    assert_row_law(decoder, 30, random_tree(5, 512, 0.02))


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), max_size=6),
    threads=st.integers(1, 4),
    kv_dtype=st.sampled_from([torch.bfloat16, torch.int8]),
)
def test_prefill_has_the_same_bits_in_any_chunks_on_any_threads(
    sizes: list[int], threads: int, kv_dtype: torch.dtype
) -> None:
    ids, expected = tokens(1100), CHUNKS_REFERENCE.logits(kv_dtype)
    chunks = [size for i, size in enumerate(sizes) if sum(sizes[: i + 1]) <= len(ids)]
    _, logits = prefill(CHUNKS_REFERENCE.decoder(threads, kv_dtype), ids, chunks)
    assert torch.equal(logits, expected)


class ChunksReference:
    """One token at a time, made once for all examples."""

    def __init__(self) -> None:
        self._decoders: dict[tuple[int, torch.dtype], NativeDecoder] = {}
        self._logits: dict[torch.dtype, torch.Tensor] = {}

    def decoder(self, threads: int, kv_dtype: torch.dtype) -> NativeDecoder:
        key = threads, kv_dtype
        if key not in self._decoders:
            self._decoders[key] = native_of(config_of(), threads=threads, kv_dtype=kv_dtype)
        return self._decoders[key]

    def logits(self, kv_dtype: torch.dtype) -> torch.Tensor:
        if kv_dtype not in self._logits:
            decoder = self.decoder(1, kv_dtype)
            self._logits[kv_dtype] = one_by_one(decoder, decoder.new_cache(), tokens(1100).tolist()).logits
        return self._logits[kv_dtype]


CHUNKS_REFERENCE = ChunksReference()


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_sequences_in_one_pass_have_the_bits_of_each_alone(threads: int, kv_dtype: torch.dtype | None) -> None:
    decoder = native_of(config_of(), threads=threads, kv_dtype=kv_dtype)
    pool = decoder.new_pool(200)
    segments, alone = [], []
    for seed, length in enumerate([3, 64, 130, 1100]):
        cache = KVCache(pool, CONTEXT)
        extend(decoder, cache, tokens(length, seed))
        tree = random_tree(seed, 8 * seed + 1, 0.5)
        alone.append(decoder.forward([Segment(tree, cache)]).logits)
        cache.drop_tail()
        segments.append(Segment(tree, cache))
    together = decoder.forward(segments).logits
    assert torch.equal(together, torch.cat(alone))
    single = native_of(config_of(), threads=1, kv_dtype=kv_dtype)
    cache, _ = prefill(single, tokens(1100, 3))
    assert torch.equal(together[-len(segments[3].tree) :], single.forward([Segment(segments[3].tree, cache)]).logits)


def test_a_view_of_all_pages_has_the_bits_of_no_view(decoder: NativeDecoder) -> None:
    cache, _ = prefill(decoder, tokens(1500))
    spec, tree = decoder.spec, random_tree(0, 9, 0.5)
    whole = decoder.forward([Segment(tree, cache)]).logits
    cache.drop_tail()
    view = PageView.all(spec.layers, spec.kv_heads, cache.full_pages)
    assert torch.equal(decoder.forward([Segment(tree, cache, view=view)]).logits, whole)


def test_a_row_under_a_view_has_the_same_bits_in_a_tree_and_alone(decoder: NativeDecoder) -> None:
    cache, _ = prefill(decoder, tokens(1300))
    view = random_view(decoder.spec, cache, 6)
    tree = random_tree(1, 30, 0.4)
    output = decoder.forward([Segment(tree, cache, view=view)])
    cache.drop_tail()
    for node in range(len(tree)):
        path = tree.path(node)
        chain = DraftTree.chain(tree.tokens[path])
        alone = decoder.forward([Segment(chain, cache, view=view)], [len(path) - 1])
        cache.drop_tail()
        assert torch.equal(output.logits[node], alone.logits[0])


def random_view(spec: ModelSpec, cache: KVCache, count: int) -> PageView:
    rng = np.random.default_rng(count)
    lists = [np.sort(rng.choice(cache.full_pages, count, replace=False)) for _ in range(spec.layers * spec.kv_heads)]
    return PageView(np.array(lists, np.int32).reshape(spec.layers, spec.kv_heads, count))


def test_rows_built_on_a_tail_have_the_bits_of_one_chain(decoder: NativeDecoder) -> None:
    cache, _ = prefill(decoder, tokens(100))
    ids = tokens(90, 1)
    chain = decoder.forward([Segment(DraftTree.chain(ids), cache)]).logits
    cache.drop_tail()
    steps = [decoder.forward([Segment(DraftTree.chain(ids[:1]), cache)]).logits]
    decoder.forward([Segment(DraftTree.chain([ids[0] ^ 1]), cache)])  # a sibling's slot stands between
    tail = [0]
    for i in range(1, len(ids)):
        steps.append(decoder.forward([Segment(DraftTree.chain(ids[i : i + 1]), cache, tail=tuple(tail))]).logits)
        tail.append(i + 1)
    assert torch.equal(torch.cat(steps), chain)


def test_committing_a_path_leaves_the_cache_that_plain_decoding_leaves(decoder: NativeDecoder) -> None:
    cache, _ = prefill(decoder, tokens(50))
    other = cache.fork()
    tree = random_tree(9, 60, 0.1)
    path = tree.path(len(tree) - 1)
    decoder.forward([Segment(tree, cache)])
    cache.commit(path)
    extend(decoder, other, tree.tokens[path])
    following = DraftTree.chain(tokens(40, 2))
    assert torch.equal(
        decoder.forward([Segment(following, cache)]).logits, decoder.forward([Segment(following, other)]).logits
    )


def test_a_fork_goes_its_own_way(decoder: NativeDecoder) -> None:
    cache, _ = prefill(decoder, tokens(100))
    fork = cache.fork()
    extend(decoder, fork, tokens(60, 1))
    continued = extend(decoder, cache, tokens(60, 2))
    _, expected = prefill(decoder, np.concatenate([tokens(100), tokens(60, 2)]))
    assert torch.equal(continued, expected[100:])


@pytest.mark.parametrize("window", [None, 70])
def test_mass_is_an_option_that_changes_no_bit(window: int | None) -> None:
    config = config_of(family="mistral", sliding_window=window)
    decoder, reference = (
        native_of(config, torch.float32),
        decoder_of(tiny_model(config, torch.float32), CONTEXT, "naive"),
    )
    tree = random_tree(2, 12, 0.5)
    cache, _ = prefill(decoder, tokens(300))
    plain = decoder.forward([Segment(tree, cache)])
    cache.drop_tail()
    with_mass = decoder.forward([Segment(tree, cache)], want_mass=True)
    assert torch.equal(plain.logits, with_mass.logits)
    cache, _ = prefill(reference, tokens(300))
    expected = reference.forward([Segment(tree, cache)], want_mass=True).page_mass
    assert with_mass.page_mass is not None and expected is not None
    torch.testing.assert_close(with_mass.page_mass, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize(("family", "window"), [("mistral", None), ("mistral", 5), ("mistral", 100), ("gemma2", 5)])
def test_memory_that_nobody_attends_to_may_hold_nan(
    family: str, window: int | None, kv_dtype: torch.dtype | None, isa: str
) -> None:
    decoder = native_of(config_of(family=family, sliding_window=window), kv_dtype=kv_dtype)
    ids, tree = tokens(200), random_tree(6, 30, 0.3)
    expected = run_and_draft(decoder, decoder.new_cache(), ids, tree)
    poisoned = decoder.new_cache()
    native = poisoned.pool.native  # type: ignore[attr-defined]
    for page in range(8):
        native.reserve(page)
        for layer in range(decoder.spec.layers):
            for head in range(decoder.spec.kv_heads):
                native.block(layer, head, page)[:] = 0xFF
    assert torch.equal(run_and_draft(decoder, poisoned, ids, tree), expected)


def run_and_draft(decoder: NativeDecoder, cache: KVCache, ids: np.ndarray, tree: DraftTree) -> torch.Tensor:
    extend(decoder, cache, ids, [7, 100])
    return decoder.forward([Segment(tree, cache)]).logits


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_lanes_behind_a_sliding_window_may_hold_nan(kv_dtype: torch.dtype | None) -> None:
    decoder = native_of(config_of(family="mistral", sliding_window=40), kv_dtype=kv_dtype)
    cache, _ = prefill(decoder, tokens(200))
    tree = random_tree(6, 30, 0.3)
    expected = decoder.forward([Segment(tree, cache)]).logits
    cache.drop_tail()
    first = 200 - 40 + 1  # the oldest position that the first row sees, in page 2
    poison_positions(decoder, cache, range(first))
    assert torch.equal(decoder.forward([Segment(tree, cache)]).logits, expected)


def poison_positions(decoder: NativeDecoder, cache: KVCache, positions: range) -> None:
    """Copies slots of a page of NaN over these positions."""
    pool: Any = cache.pool
    page = pool.allocate()
    for layer in range(decoder.spec.layers):
        for head in range(decoder.spec.kv_heads):
            pool.native.block(layer, head, page)[:] = 0xFF
    target = cache.slots(np.arange(len(positions)) + positions.start)
    pool.move(np.full(len(target), page * 64, np.int32), target)


@pytest.mark.parametrize("rope", ["default", "yarn"])
@pytest.mark.parametrize("family", PLAIN)
def test_every_family_agrees_with_torch(isa: str, family: str, rope: str) -> None:
    parameters = {"rope_type": rope, "rope_theta": 10_000.0}
    if rope == "yarn":
        parameters |= {"factor": 16.0, "original_max_position_embeddings": 128}
    window = {"sliding_window": 50} if family == "mistral" else {}
    config = config_of(
        family=family, tie_word_embeddings=family in ("llama", "qwen2"), rope_parameters=parameters, **window
    )
    assert_agrees_with_torch(config)


@pytest.mark.parametrize("head_dim", [8, 12, 16, 48, 64, 80, 96, 128, 256])
def test_every_head_size_agrees_with_torch(isa: str, head_dim: int) -> None:
    assert_agrees_with_torch(config_of(family="qwen3", head_dim=head_dim))


def test_nothing_behind_a_row_is_multiplied(isa: str) -> None:
    """Heads of 12 values leave room in a row's buffer. What lies there is other memory, NaN for instance: the test
    fills much of it before each decoder is made."""
    for _ in range(5):
        held = [np.full(size, np.nan, np.float32) for size in (64, 96, 160, 1 << 10, 1 << 12, 1 << 14) * 8]
        del held
        assert_agrees_with_torch(config_of(family="qwen3", head_dim=12))


def test_odd_sizes_agree_with_torch(isa: str) -> None:
    sizes = {"hidden_size": 42, "intermediate_size": 71, "vocab_size": 67, "head_dim": 16, "mlp_bias": True}
    assert_agrees_with_torch(config_of(attention_bias=True, **sizes))


def assert_agrees_with_torch(config: Any) -> None:
    reference = decoder_of(tiny_model(config, torch.float32), CONTEXT, "naive")
    exact, half = native_of(config, torch.float32), native_of(config, torch.bfloat16)
    ids, tree = tokens(150), random_tree(1, 20, 0.4)
    expected = run_and_draft(reference, reference.new_cache(), ids, tree)
    assert (run_and_draft(exact, exact.new_cache(), ids, tree) - expected).abs().max() < 1e-4
    error = run_and_draft(half, half.new_cache(), ids, tree) - expected
    assert error.pow(2).mean() < 0.05**2 * expected.pow(2).mean()


def test_a_view_agrees_with_torch() -> None:
    config = config_of()
    reference, decoder = (
        decoder_of(tiny_model(config, torch.float32), CONTEXT, "naive"),
        native_of(config, torch.float32),
    )
    logits = []
    for model in (reference, decoder):
        cache, _ = prefill(model, tokens(700))
        view = random_view(decoder.spec, cache, 4)
        logits.append(model.forward([Segment(random_tree(1, 20, 0.4), cache, view=view)]).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("kv_dtype", DTYPES.values(), ids=DTYPES)
def test_a_page_takes_the_memory_that_is_asked_for(kv_dtype: torch.dtype, head_dim: int) -> None:
    decoder = native_of(config_of(head_dim=head_dim), kv_dtype=kv_dtype)
    assert decoder.new_pool(3).page_bytes == decoder.spec.kv_bytes(PAGE_SIZE, kv_dtype)


def test_logits_come_for_the_rows_asked_for(decoder: NativeDecoder) -> None:
    cache, _ = prefill(decoder, tokens(20))
    every = decoder.forward([Segment(WIDE, cache)])
    cache.drop_tail()
    some = decoder.forward([Segment(WIDE, cache)], [5, 0, 5])
    assert torch.equal(some.logits, every.logits[[5, 0, 5]])
    cache.drop_tail()
    assert decoder.forward([Segment(WIDE, cache)], []).logits.shape == (0, 61)


def test_numerics_name_what_the_bits_depend_on(isa: str) -> None:
    decoder = native_of(config_of(), kv_dtype=torch.float32)
    assert f"/{isa.removesuffix('-vnni')}/bf16/kv-fp32/rope-default" in decoder.numerics
    assert decoder.guarantee == "bitwise"


def test_an_unknown_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSWIFT_ISA", "mmx")
    with pytest.raises(UserError, match="TOKENSWIFT_ISA: 'mmx' is not allowed; this machine runs"):
        native_of(config_of())


def test_threads_that_the_system_does_not_give_are_refused() -> None:
    """In a process of its own, whose limit of threads is reached."""
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a sanitizer's own memory is beyond any limit")
    code = (
        "import resource, threading\n"
        "from tokenswift_py.kernels.cpu import _native\n"
        "from tokenswift_py.models.devices import made\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"  # stacks of 8 MiB: room for some hundred
        "try:\n"
        "    made(_native.Team, 1024)\n"
        "except ValueError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    most = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = 2**23 if most < 0 else min(2**23, most)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, (stack, most)),
    )  # fmt: skip
    assert done.stdout.startswith("UserError threads: 1024 is not allowed; the system gives "), done.stderr


def malformed(name: str, value: Any) -> dict[str, Any]:
    """A good call of the native forward, one argument replaced."""
    i32 = np.int32
    call: dict[str, Any] = {
        "tokens": np.zeros(2, i32),
        "positions": np.arange(2, dtype=i32),
        "slots": np.arange(2, dtype=i32),
        "segments": [(np.arange(2, dtype=i32), np.zeros(0, i32), None, np.arange(2, dtype=i32)[None])],
        "logit_rows": np.zeros(1, i32),
        "cos": np.ones((CONTEXT, 4), np.float32),
        "sin": np.ones((CONTEXT, 4), np.float32),
        "hidden": np.zeros((2, 48), np.float32),
        "residual": np.zeros((2, 48), np.float32),
        "logits": np.zeros((1, 61), np.float32),
        "mass": None,
        "queries": None,
        "shifts": None,
        "int8_pages": False,
    }
    return {**call, name: value} if name else call


def segment(
    positions: Sequence[int] = (0, 1), pages: Sequence[int] = (), view: Any = None, tail: Any = ((0, 1),)
) -> list[Any]:
    return [
        (
            np.array(positions, np.int32),
            np.array(pages, np.int32),
            view,
            np.array(tail, np.int32).reshape(len(tail), -1),
        )
    ]


BAD = {
    "no rows": ("tokens", np.zeros(0, np.int32)),
    "token": ("tokens", np.array([0, 61], np.int32)),
    "negative token": ("tokens", np.array([0, -1], np.int32)),
    "floating tokens": ("tokens", np.zeros(2, np.float32)),
    "strided tokens": ("tokens", np.zeros(4, np.int32)[::2]),
    "null": ("tokens", None),
    "position": ("positions", np.array([0, CONTEXT], np.int32)),
    "slot outside": ("slots", np.array([0, 1 << 30], np.int32)),
    "negative slot": ("slots", np.array([-1, 0], np.int32)),
    "no segments": ("segments", []),
    "two segments": ("segments", segment() + segment()),
    "short segment": ("segments", segment(positions=[0], tail=[[0]])),
    "other positions": ("segments", segment(positions=[1, 2], tail=[[0, 1, 1]])),
    "page not in use": ("segments", segment(pages=[40])),
    "negative page": ("segments", segment(pages=[-1])),
    "tail slot": ("segments", segment(tail=[[0, 1 << 30]])),
    "missing ancestor": ("segments", segment(tail=[[-1, 1]])),
    "short tail": ("segments", segment(tail=[[0]])),
    "tail rows": ("segments", segment(tail=[[0, 1]] * 3)),
    "view past the full pages": ("segments", segment(view=np.zeros((3, 2, 1), np.int32))),
    "view's shape": ("segments", segment(view=np.zeros((1, 2, 0), np.int32))),
    "logit row": ("logit_rows", np.array([2], np.int32)),
    "negative logit row": ("logit_rows", np.array([-1], np.int32)),
    "short tables": ("cos", np.ones((CONTEXT - 1, 4), np.float32)),
    "tables' width": ("sin", np.ones((CONTEXT, 8), np.float32)),
    "hidden's shape": ("hidden", np.zeros((1, 48), np.float32)),
    "residual's shape": ("residual", np.zeros((1, 48), np.float32)),
    "logits' shape": ("logits", np.zeros((1, 60), np.float32)),
    "double logits": ("logits", np.zeros((1, 61))),
    "mass's shape": ("mass", np.zeros((3, 2, 2, 0), np.float32)),
    "unpadded mass": ("mass", np.zeros((3, 2, 2, 1), np.float32)),
    "queries' shape": ("queries", np.zeros((2, 3, 6, 7), np.float32)),
    "no shifts": ("shifts", (64, np.zeros(0, np.int32), 64)),
    "shifts of too few blocks": ("shifts", (64, np.zeros(CONTEXT // 64 - 1, np.int32), 64)),
    "blocks of no page": ("shifts", (0, np.zeros(CONTEXT, np.int32), 64)),
    "blocks of half a page": ("shifts", (32, np.zeros(CONTEXT, np.int32), 64)),
    "negative blocks": ("shifts", (-64, np.zeros(CONTEXT, np.int32), 64)),
    "huge blocks": ("shifts", (2**31 - 64, np.zeros(CONTEXT, np.int32), 64)),
    "a negative shift": ("shifts", (64, np.full(CONTEXT, -1, np.int32), 64)),
    "a shift before the text": ("shifts", (64, np.full(CONTEXT, 65, np.int32), 64)),
    "wide shifts": ("shifts", (64, np.zeros(CONTEXT, np.int64), 64)),
    "strided shifts": ("shifts", (64, np.zeros(2 * CONTEXT, np.int32)[::2], 64)),
    "double queries": ("queries", np.zeros((2, 3, 6, 8))),
    "tapped layer": ("taps", (np.array([0, 3], np.int32), np.zeros((2, 2, 48), np.float32))),
    "negative tapped layer": ("taps", (np.array([-1], np.int32), np.zeros((2, 1, 48), np.float32))),
    "a layer tapped twice": ("taps", (np.array([1, 1], np.int32), np.zeros((2, 2, 48), np.float32))),
    "taps' rows": ("taps", (np.array([1], np.int32), np.zeros((1, 1, 48), np.float32))),
    "taps' layers": ("taps", (np.array([1], np.int32), np.zeros((2, 2, 48), np.float32))),
    "taps' width": ("taps", (np.array([1], np.int32), np.zeros((2, 1, 47), np.float32))),
    "double taps": ("taps", (np.array([1], np.int32), np.zeros((2, 1, 48)))),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_input_is_refused(decoder: NativeDecoder, case: str) -> None:
    pool = decoder.new_pool(40)
    pool.allocate()
    name, value = BAD[case]
    with pytest.raises((ValueError, TypeError)):
        decoder.weights.native.forward(pool=pool.native, **malformed(name, value))


def test_more_logits_than_rows_are_refused(decoder: NativeDecoder) -> None:
    """Each row has room for its operands once, whatever the caller's array of logits has room for."""
    pool = decoder.new_pool(40)
    pool.allocate()
    rows, logits = np.zeros(3, np.int32), np.zeros((3, 61), np.float32)
    engine, states = decoder.weights.native, np.zeros((2, 48), np.float32)
    with pytest.raises(ValueError, match="logits of 3 rows of 2"):
        engine.forward(pool=pool.native, **{**malformed("logit_rows", rows), "logits": logits})
    with pytest.raises(ValueError, match="logits of 3 rows of 2"):
        engine.close(stream=states, logit_rows=rows, hidden=states.copy(), residual=states.copy(), logits=logits)
    with pytest.raises(ValueError, match="logit row 2 of 2"):
        engine.close(
            stream=states, logit_rows=np.array([2], np.int32), hidden=states.copy(), residual=states.copy(),
            logits=logits[:1],
        )  # fmt: skip


def test_the_good_call_that_malformed_ones_start_from_is_good(decoder: NativeDecoder) -> None:
    pool = decoder.new_pool(40)
    pool.allocate()
    decoder.weights.native.forward(pool=pool.native, **malformed("", None))


def test_a_pool_of_another_shape_is_refused(decoder: NativeDecoder) -> None:
    other = _native.Pool(layers=1, kv_heads=2, head_dim=16, dtype="bf16", pages=2)
    other.reserve(0)
    with pytest.raises(ValueError, match="shape"):
        decoder.weights.native.forward(pool=other, **malformed("", None))


def test_pool_indices_are_checked(decoder: NativeDecoder) -> None:
    pool = decoder.new_pool(4)
    for page in (-1, 4):
        with pytest.raises(ValueError, match="page"):
            pool.native.reserve(page)
    with pytest.raises(ValueError, match="page"):
        pool.move(np.array([0], np.int32), np.array([64 * 4], np.int32))
    with pytest.raises(ValueError, match="in use"):
        pool.native.block(0, 0, 0)
    with pytest.raises(ValueError, match="head_dim"):
        _native.Pool(layers=1, kv_heads=1, head_dim=20, dtype="bf16", pages=1)


def busy_loop() -> None:
    while True:
        pass


def test_a_busy_machine_does_not_stall_a_pass(decoder: NativeDecoder) -> None:
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=busy_loop, daemon=True) for _ in range(2)]
    cache, _ = prefill(decoder, tokens(600))
    for other in others:
        other.start()
    try:
        slowest = 0.0
        for _ in range(50):
            start = time.perf_counter()
            decoder.forward([Segment(WIDE, cache)])
            slowest = max(slowest, time.perf_counter() - start)
            cache.drop_tail()
    finally:
        for other in others:
            other.kill()
            other.join()
    assert slowest < 1.0


def test_threads_follow_the_quota(tmp_path: Any) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert available_threads(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_threads(tmp_path) >= 1
