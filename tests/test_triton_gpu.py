"""Law 1 on hardware: what the interpreter cannot tell of the matrix units, at the sizes they are used for."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from conftest import decoder_of, tiny_config, tiny_model
from interpreter import INTERPRETED
from scenes import Scene, fill, random_tree
from tokenswift_py.core import DraftTree, SamplingParams, Segment
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.passes import Timer
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.drafters.base import create
from tokenswift_py.kernels._rounding import quantise
from tokenswift_py.kernels.naive import Naive
from tokenswift_py.kernels.triton import packed
from tokenswift_py.kernels.triton.matmul import linear
from tokenswift_py.kernels.triton.ops import TritonOps
from tokenswift_py.kernels.triton.products import LIBRARY, TILES, Blocks, blocks_on
from tokenswift_py.kernels.triton.row_test import Matrix
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import TorchPagePool
from tokenswift_py.models.captured import ROWS, Recorder, recorder_for
from tokenswift_py.models.ops import matrices_of
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.sampling.reference import Sampler
from tokenswift_py.sampling.triton import TritonSampler
from triton_scenes import TRITON, as_if_committed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a GPU")]


def library_blocks(model: Any) -> Blocks:
    """The card's own library in blocks, for a model in bf16. A library that computes graphs otherwise is not taken."""
    matrices = tuple(Matrix(*matrix) for matrix in matrices_of(ModelSpec.from_config(model.config), apart=True))
    blocks = blocks_on(matrices, torch.bfloat16, torch.device("cuda"), recorder_for=recorder_for)
    if any("capture" in fault for fault in blocks.verdict.faults):
        pytest.skip(f"the row test refuses this library: {blocks.verdict.faults}")
    return blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "head_dim"), [(3, 64), (4, 128), (7, 128)])
@pytest.mark.parametrize("prefix", [1000, 8190])
def test_tree_rows_have_the_bits_of_plain_decoding(dtype: torch.dtype, group: int, head_dim: int, prefix: int) -> None:
    torch.manual_seed(0)
    pool = TorchPagePool(1, 2, head_dim, 700, dtype, torch.device("cuda"))  # the prefix, and thrice again
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    cache = KVCache(pool, 16384)
    fill(pool, cache.append(np.arange(prefix, dtype=np.int32), True))
    cache.commit(range(prefix))
    scene = Scene.of([Segment(random_tree(np.random.default_rng(0), 24), cache)], group)
    (segment,) = scene.segments
    together, _ = scene.attend(TRITON, 0, None)
    true, _ = scene.attend(Naive(), 0, None)
    torch.testing.assert_close(together, true, rtol=2e-2, atol=2e-2)
    for index in (0, 5, 23):
        alone, _ = as_if_committed(scene, segment, index).attend(TRITON, 0, None)
        assert torch.equal(alone[0], together[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("columns", "depth"), [(4096, 4096), (1024, 4096), (576, 1536)])
def test_a_products_rows_are_their_own(dtype: torch.dtype, columns: int, depth: int) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, depth, device="cuda").to(dtype) for n in (200, columns))
    together = linear(x, weight)
    exact = x.double() @ weight.double().T
    assert ((together.double() - exact).abs().max() / exact.abs().max()) < (1e-5 if dtype == torch.float32 else 1e-2)
    for rows in (1, 16, 65):
        assert torch.equal(linear(x[:rows], weight), together[:rows])
        assert torch.equal(linear(x[-rows:], weight), together[-rows:])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "depth"), [(4096, 4096), (28_672, 4096), (576, 1500)])
def test_products_with_weights_of_few_bits(columns: int, depth: int, bits: int) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, depth, device="cuda").bfloat16() for n in (64, columns))
    few = packed.pack(weight, bits=bits)
    eye = torch.eye(depth, device="cuda", dtype=torch.bfloat16)[:64]
    numbers = quantise(weight, bits).widened()[:, :depth]
    if bits == 8:  # their fp32 numbers are exact
        assert torch.equal(packed.linear(eye, few), numbers.bfloat16()[:, :64].T)
    exact = x.double() @ numbers.double().T
    for rows in (1, 16, 64):
        got = packed.linear(x[:rows], few)
        assert ((got.double() - exact[:rows]).abs().max() / exact.abs().max()) < 1e-2
        assert torch.equal(packed.linear(x[:rows], few), got)


@pytest.mark.parametrize(
    ("way", "kv_dtype"), [("tiles", None), ("library", None), ("blocks", None), ("tiles", torch.int8)]
)
def test_a_captured_step_gives_the_bits_of_one_that_is_not(way: str, kv_dtype: torch.dtype | None) -> None:
    """It runs after texts of other lengths and for other trees of its shape, and the host never waits for the GPU."""
    model = tiny_model(tiny_config("qwen3"), torch.bfloat16).to("cuda")
    products: Any = {"tiles": TILES, "library": LIBRARY}.get(way) or library_blocks(model)
    made = {"attention": "triton", "ops": TritonOps(products), "kv_dtype": kv_dtype}
    captured, plain = (decoder_of(model, **made) for _ in range(2))
    plain.recorder = Recorder(None)
    caches = [decoder.new_cache() for decoder in (captured, plain)]
    for round_ in range(4):
        outputs = []
        for decoder, cache in zip((captured, plain), caches, strict=True):
            segment = Segment(random_tree(np.random.default_rng(round_), 5 + round_ % 3), cache)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if round_ == 3 else "default")
            outputs.append(decoder.forward([segment], want_mass=True))
            torch.cuda.set_sync_debug_mode("default")
            cache.drop_tail()
            decoder.forward([Segment(DraftTree.chain(np.arange(30, dtype=np.int32)), cache, causal=True)])
            cache.commit(range(30))
        for name in ("hidden", "logits", "page_mass", "residual"):
            assert torch.equal(*(getattr(output, name) for output in outputs))
    for decoder, cache, graphs in zip((captured, plain), caches, (len(ROWS), 0), strict=True):
        steps = decoder.steps_over(cache.pool).steps.values()
        assert sum(step is not None and step.replayed.recorded is not None for step in steps) == graphs


def test_a_captured_pass_of_several_texts_has_the_bits_of_each_alone() -> None:
    """Law 9 in a replay, whatever the mixture: the same graph serves three texts and then two others."""
    model = tiny_model(tiny_config("qwen3"), torch.bfloat16).to("cuda")
    decoder = decoder_of(model, attention="triton", ops=TritonOps())
    pool, rng = decoder.new_pool(60), np.random.default_rng(0)
    caches = []
    for length in (5, 64, 190, 300):
        caches.append(KVCache(pool, decoder.context))
        decoder.forward([Segment(DraftTree.chain(np.arange(length, dtype=np.int32) % 61), caches[-1], causal=True)])
        caches[-1].commit(range(length))
    for chosen in ((0, 1, 2), (3, 1)):
        segments = [Segment(random_tree(rng, 5), caches[i]) for i in chosen]
        whole, start = decoder.forward(segments), 0
        for segment in segments:
            segment.cache.drop_tail()
            alone, stop = decoder.forward([segment]), start + len(segment.tree)
            segment.cache.drop_tail()
            assert torch.equal(alone.hidden, whole.hidden[start:stop])
            assert torch.equal(alone.logits, whole.logits[start:stop])
            start = stop
    assert all(step is None or step.replayed.recorded for step in decoder.steps_over(pool).steps.values())


class InCompany(Timer):
    alone = False


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_a_captured_chain_drafts_what_the_host_drafts_pass_by_pass(kv_dtype: torch.dtype | None) -> None:
    """The trees of every round are alike, though neither changes the text."""
    model = tiny_model(tiny_config("qwen3"), torch.bfloat16).to("cuda")
    params = SamplingParams(temperature=0.9, top_p=0.9, dry_multiplier=0.5, repetition_penalty=1.1, seed=1)
    trees: list[list[Any]] = []
    for timer in (Timer(), InCompany()):
        decoder = decoder_of(model, attention="triton", ops=TritonOps(), kv_dtype=kv_dtype)
        drafter, lines = create("partial", view_tokens=64, width=2), []  # type: Any, list[dict[str, Any]]
        loop = DecodeLoop(
            decoder,
            drafter,
            TritonSampler(params, 61),
            Stops(200, ()),
            draft_tokens=22,
            timer=timer,
            trace=lines.append,
        )
        list(loop.run([3, 14, 15, 9, 26]))
        trees.append([line["tree"] for line in lines])
        chains = decoder.steps_over(loop.cache.pool).chains.values()
        assert [part.recorded is not None for chain in chains for part in chain.parts.values()] == [True] * 4 * len(
            chains
        )
        assert (len(chains) > 0) == timer.alone
    assert trees[0] == trees[1]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, top_p=0.9, top_k=200, seed=1),
        SamplingParams(
            temperature=0.8, top_p=0.95, dry_multiplier=0.8, repetition_penalty=1.1, frequency_penalty=0.2, seed=2,
            no_repeat_ngram_size=6, ban_words=((5, 6),), min_p=0.001,
        ),
    ],
)  # fmt: skip
def test_a_large_vocabulary_has_the_references_choices_in_one_wait(params: SamplingParams) -> None:
    vocab, rng = 128_256, np.random.default_rng(0)
    text = History(np.tile(rng.integers(0, 900, 1000), 3)[:2900].tolist())
    tree = DraftTree.chain([text[-1], *(text[i - 1000] for i in range(len(text), len(text) + 5))])
    logits = 3 * torch.randn(len(tree), vocab, generator=torch.Generator().manual_seed(0))
    reference, sampler = Sampler(params, vocab), TritonSampler(params, vocab)
    placed = logits.to("cuda")
    sampler.ranker(tree, placed, text, 4)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            ranker = sampler.ranker(tree, placed, text, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1
    for node in range(len(tree)):
        with text.guesses():
            text.extend(tree.tokens[1 : 1 + node].tolist())
            assert ranker(node) == reference.ranked(logits[node], text, 4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_gpu_than_the_current_one() -> None:
    """Kernels, graphs, the sampler and commits run where their tensors are."""
    texts = []
    for device in ("cuda:0", "cuda:1"):
        model = tiny_model(tiny_config("qwen3"), torch.bfloat16).to(device)
        decoder = decoder_of(model, attention="triton", ops=TritonOps())
        sampler = TritonSampler(SamplingParams(temperature=0.9, seed=1), 61)
        loop = DecodeLoop(decoder, create("ngram", shortest=1), sampler, Stops(80, ()), draft_tokens=4)
        texts.append([token for step in loop.run([3, 14, 15, 9, 26]) for token in step.tokens])
    assert torch.cuda.current_device() == 0 and texts[0] == texts[1]
