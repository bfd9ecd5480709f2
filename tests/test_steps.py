"""Passes of fixed shapes: what one launched serves every text of its shape, and padding changes no bit."""

from __future__ import annotations

import gc
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import InterpretedFunction

from conftest import decoder_of, tiny_config, tiny_model
from drawn import SMALL, drawn_cache, new_decoder
from interpreter import DEVICE, INTERPRETED
from recording import Tape, record
from scripted import Scripted, write
from tokenswift_py.core import DraftTree, Output, SamplingParams, Segment
from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.passes import Pass, compute
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.drafters.base import create
from tokenswift_py.drafters.none import NoDraft
from tokenswift_py.kernels.base import AttentionSegment, Room
from tokenswift_py.kernels.triton.items import EVERYTHING, NEAR, Heads, splits
from tokenswift_py.kernels.triton.ops import TritonOps
from tokenswift_py.kernels.triton.products import TILES, Blocks
from tokenswift_py.kernels.triton.row_test import Matrix, Verdict
from tokenswift_py.kernels.triton.tables import FixedTables
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.captured import ChainStep, Recorder, Replayed, Step, cuda_graphs
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.ops import join_weights, matrices_of
from tokenswift_py.models.rows import lay_out
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.sampling.triton import TritonSampler
from tokenswift_py.serving.scheduler import Scheduler
from tokenswift_py.serving.sharing import OwnTime
from tokenswift_py.serving.together import together
from tokenswift_py.serving.work import LoopWork
from transfers import Transfers
from triton_scenes import Reads, reads

__all__ = ["reads"]  # the fixture

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="records launches in the interpreter; test_triton_gpu.py replays"
)

TREES = {
    "three nodes": DraftTree([9, 8, 7], [-1, 0, 0]),
    "four nodes": DraftTree([1, 5, 6, 7], [-1, 0, 1, 1]),
    "a chain": DraftTree.chain([2, 3, 4]),
    "one node": DraftTree.chain([5]),
}
CHAIN, BUSH = DraftTree.chain(range(8)), DraftTree(range(8), [-1, 0, 0, 1, 1, 2, 2, 3])


def one_launch_blocks(spec: ModelSpec) -> Blocks:
    """Blocks of torch's own product, which is one launch."""
    matrices = [Matrix(*matrix) for matrix in matrices_of(spec, apart=False)]
    return Blocks(matrices, torch.float32, Verdict((), "00000000"))


def drawn_caches(decoder: TorchDecoder, lengths: list[int], pool: Any) -> list[KVCache]:
    """Several texts of one pool, drawn as by `drawn_cache`."""
    caches, noise = [KVCache(pool, 8192) for _ in lengths], torch.Generator().manual_seed(0)
    for part in (pool.keys, pool.values):
        part.fill_(torch.nan)
    for cache, length in zip(caches, lengths, strict=True):
        slots = cache.append(np.arange(length, dtype=np.int32), True)
        cache.commit(range(length))
        for part in (pool.keys, pool.values):
            part.flatten(2, 3)[:, :, slots] = torch.randn(2, 1, length, part.shape[-1], generator=noise)
    return caches


def step_of(decoder: TorchDecoder, segment: Segment, **needs: bool) -> tuple[Step, Any]:
    """The step that runs a segment, and the rows it runs."""
    rows = lay_out([segment])
    wants = {"logits": True, "mass": False, "queries": False, **needs}
    step = decoder.steps_over(segment.cache.pool).find(rows, **wants)
    assert step is not None
    return step, rows


def assert_same(got: Output, expected: Output) -> None:
    for name in ("hidden", "logits", "page_mass", "queries", "residual"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and not a.isnan().any()), name


def without_steps(
    decoder: TorchDecoder, segments: list[Segment], monkeypatch: pytest.MonkeyPatch, **wants: bool
) -> Output:
    """The pass as it is, not padded."""
    with monkeypatch.context() as patch:
        patch.setattr("tokenswift_py.models.captured.ROWS", (0,))
        return decoder.forward(segments, **wants)


@pytest.mark.parametrize("way", ["tiles", "blocks", "library"])
def test_a_step_recorded_once_serves_every_text_of_its_shape(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records the launches of one shape, changes the memory they read, launches them again, and compares with a step
    that nothing was recorded of. With torch's own products too: on a GPU they are cuBLAS's, and recorded as well."""
    monkeypatch.setattr("tokenswift_py.models.captured.ROWS", (4,))
    decoder = new_decoder(way=way)
    tapes = []

    def noted(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        tapes.append(Tape())
        with tapes[-1]:
            result = function()
        return result, tapes[-1].replay

    cache = drawn_cache(decoder, 62)
    fresh = decoder.new_pool(80)
    decoder.steps_over(cache.pool).recorder = Recorder(noted)
    passes = ((62, "three nodes"), (62, "four nodes"), (65, "a chain"), (130, "three nodes"), (700, "four nodes"))
    for length, name in passes if way == "tiles" else passes[1:4]:
        cache.release()
        cache = drawn_cache(decoder, length, cache.pool)
        again = drawn_cache(decoder, length, fresh)
        got = decoder.forward([Segment(TREES[name], cache)], want_mass=True)
        step, rows = step_of(decoder, Segment(TREES[name], again), mass=True)
        assert step.replayed.recorder.record is None
        assert_same(got, step.run(rows))
        again.release()
    assert len(tapes) == 1
    names = [launch.name for launch in tapes[0].launches]
    assert names.count("attend_kernel") == 2 and names.count("rope_kernel") == 2


MIXTURES = (
    ((62, "three nodes"), (130, "a chain")),
    ((64, "one node"), (5, "three nodes"), (700, "one node"), (1, "one node")),
)


def test_a_step_recorded_once_serves_any_mixture_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 9: how many texts there are, where they lie and which rows are whose is data. Every row has the bits that it
    has where its text is alone, and so have the page masses."""
    monkeypatch.setattr("tokenswift_py.models.captured.ROWS", (8,))
    decoder, tapes = new_decoder(), []

    def noted(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        tapes.append(Tape())
        with tapes[-1]:
            result = function()
        return result, tapes[-1].replay

    pool = decoder.new_pool(80)
    decoder.steps_over(pool).recorder = Recorder(noted)
    for mixture in MIXTURES:
        caches = drawn_caches(decoder, [length for length, _ in mixture], pool)
        segments = [Segment(TREES[name], cache) for cache, (_, name) in zip(caches, mixture, strict=True)]
        asked = [Pass(decoder, segment, want_mass=True) for segment in segments]
        outputs = together(decoder, asked)
        for cache, segment, got in zip(caches, segments, outputs, strict=True):
            cache.drop_tail()
            alone = without_steps(decoder, [segment], monkeypatch, want_mass=True)
            assert_same(got, alone)
            cache.release()
    assert len(tapes) == 1
    names = [launch.name for launch in tapes[0].launches]
    assert names.count("attend_kernel") == names.count("merge_kernel") == 2, "one of each layer, for all texts"


def test_drafts_of_several_texts_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each under a view of its own, on provisional rows of its own, and beside one without a view."""
    decoder = new_decoder()
    caches = drawn_caches(decoder, [300, 200, 70], decoder.new_pool(80))
    views = [PageView(np.array([[[0, 2, 3]], [[0, 1, 3]]])), PageView(np.array([[[1]], [[2]]])), None]
    before = [Segment(DraftTree.chain([4, 5]), cache, view) for cache, view in zip(caches, views, strict=True)]
    asked = [Segment(DraftTree.chain([6]), cache, view, (0, 1)) for cache, view in zip(caches, views, strict=True)]
    decoder.forward(before)
    whole = decoder.forward(asked)
    assert len(decoder.steps_over(caches[0].pool).steps) == 2
    for row, (cache, segment) in enumerate(zip(caches, asked, strict=True)):
        cache.drop_tail(2)
        alone = without_steps(decoder, [segment], monkeypatch)
        assert torch.equal(alone.hidden[0], whole.hidden[row]) and torch.equal(alone.logits[0], whole.logits[row])


class Work(LoopWork):
    """A text as the scheduler sees it."""

    def __init__(self, model: TorchDecoder, pool: Any, prompt: list[int], drafter: str):
        time, params = OwnTime(lambda: 0.0), SamplingParams(temperature=0.9, seed=len(prompt))
        loop = DecodeLoop(
            model, create(drafter), TritonSampler(params, 61), Stops(4, ()), draft_tokens=2,
            cache=KVCache(pool, model.context), timer=time,
        )  # fmt: skip
        super().__init__(loop, prompt, time)
        self.written: list[int] = []

    def tell(self, step: Any) -> None:
        self.written.extend(step.tokens)

    def end(self, error: BaseException | None) -> None:
        assert error is None


def test_texts_written_in_company_share_recorded_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 9 by the scheduler: their verifications are replayed together, and each is what it is alone."""
    monkeypatch.setattr("tokenswift_py.models.captured.ROWS", (8,))
    texts = (([3, 14, 15, 9, 26], "none"), ([5, 6, 5, 6, 5, 6], "ngram"))
    decoder, replayed = new_decoder("llama"), []

    def counted(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        result, replay = record(function)
        return result, lambda: (replayed.append(1), replay())[1]

    decoder.recorder = Recorder(counted)
    scheduler = Scheduler(decoder, decoder.new_pool(80), lambda: 0.0, 4, most_rows=40)
    works = [Work(decoder, scheduler.pool, *text) for text in texts]
    for work in works:
        scheduler.add(work)
    while scheduler.seats:
        scheduler.step()
    rounds = sum(work.loop.stats.num_spec_steps for work in works)
    assert 0 < len(replayed) < rounds, "several texts in a replay"
    scheduler.close()
    for work in works:
        params = work.loop.sampler.params
        assert work.written == write(new_decoder("llama"), work.prompt, 4, params)[0]


def test_what_a_step_launches_does_not_depend_on_the_text() -> None:
    """Kernels, grids, scalars and shapes: of three nodes after 62 tokens and of four after 4000. One page more than
    there is room for is another shape, with room for twice as many."""
    decoder = new_decoder()
    launched, steps = [], []
    pool = decoder.new_pool(80)
    for length, tree in ((62, TREES["three nodes"]), (4000, TREES["four nodes"]), (4094, TREES["four nodes"])):
        cache = drawn_cache(decoder, length, pool)
        step, rows = step_of(decoder, Segment(tree, cache))
        steps.append(step)
        if length < 4094:
            step.run(rows)  # which fills the memory that is read
            with Tape() as tape:
                step.replayed.function()
            launched.append([(launch.name, launch.grid, launch.numbers) for launch in tape.launches])
        cache.release()
    assert steps[0] is steps[1] and launched[0] == launched[1]
    assert (steps[1].shape.room.pages, steps[2].shape.room.pages) == (64, 128)


@pytest.mark.parametrize("length", [62, 191])
def test_padding_changes_no_bit(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 1 for the rows that pad. The pool that they write nowhere in keeps its bits."""
    decoder = new_decoder()
    for tree in (DraftTree.chain([5]), DraftTree([1, 5, 6, 7, 8], [-1, 0, 0, 1, 3])):
        caches = [drawn_cache(decoder, length) for _ in range(2)]
        wants = {"want_mass": True, "want_queries": True}
        padded = decoder.forward([Segment(tree, caches[0])], **wants)
        assert_same(padded, without_steps(decoder, [Segment(tree, caches[1])], monkeypatch, **wants))
        assert len(padded.hidden) == len(padded.logits) == len(tree)
        for name in ("keys", "values"):
            a, b = (getattr(cache.pool, name) for cache in caches)
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_rows_do_not_move_what_kernels_are_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a pointer at a multiple of 16 bytes apart from others. So one row and several must have each at
    the same, with three KV heads and with any number of tokens: or they would run other binaries, which law 1 is not
    proven for, and a text would wait for a compiler. (On a GPU memory itself begins at a multiple of 256.)"""
    run, found = InterpretedFunction.run, defaultdict(set)

    def noted(kernel: Any, *args: Any, grid: Any, **options: Any) -> None:
        for place, value in enumerate(tree_flatten(args)[0]):
            if isinstance(value, torch.Tensor):
                found[kernel.__name__, place, len(args)].add(value.storage_offset() * value.element_size() % 16 == 0)
        run(kernel, *args, grid=grid, **options)

    config = tiny_config(
        "qwen2_moe", **{**SMALL, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144}
    )
    decoder = decoder_of(tiny_model(config, torch.float32), context=512, attention="triton", ops=TritonOps(TILES))
    monkeypatch.setattr(InterpretedFunction, "run", noted)
    for length in (62, 130):
        for tree in (DraftTree.chain([5]), DraftTree.chain([5, 6]), DraftTree.chain([5, 6, 7])):
            decoder.forward([Segment(tree, drawn_cache(decoder, length))], want_mass=True)
    assert {where for where, classes in found.items() if len(classes) > 1} == set()
    assert len({kernel for kernel, _, _ in found}) > 5


@pytest.mark.parametrize(
    ("family", "way", "wanted"),
    [
        ("llama", "tiles", {False: 8, True: 9}),
        ("llama", "blocks", {False: 10}),
        ("gemma3_text", "tiles", {False: 11}),
        ("mixtral", "tiles", {False: 12}),
        ("qwen2_moe", "tiles", {False: 15}),
    ],
)
def test_launches_of_a_layer(
    record_property: Any, monkeypatch: pytest.MonkeyPatch, family: str, way: str, wanted: dict[bool, int]
) -> None:
    """How many nodes of a graph a layer costs, page masses wanted or not: the difference of one layer more. Blocks copy
    no rows."""
    counts = {}
    monkeypatch.setattr("tokenswift_py.kernels.triton.products.ALIGNED", 4)  # a CPU's memory is aligned less
    for mass in wanted:
        names = []
        for layers in (1, 2):
            config = tiny_config(family, **{**SMALL, "num_hidden_layers": layers, "layer_types": None})
            spec, model = ModelSpec.from_config(config), tiny_model(config, torch.float32)
            ops = TritonOps(one_launch_blocks(spec) if way == "blocks" else TILES)
            decoder = decoder_of(model, context=256, attention="triton", ops=ops)
            if ops.joins:
                join_weights(decoder.weights, spec)
                decoder._heads = [decoder._head_weights(f"{spec.at(layer)}self_attn.") for layer in range(layers)]
            cache = decoder.new_cache()
            step, rows = step_of(decoder, Segment(TREES["a chain"], cache), mass=mass)
            step.run(rows)
            with Tape() as tape:
                step.replayed.run()
            names.append([launch.name for launch in tape.launches])
        counts[mass] = len(names[1]) - len(names[0])
        print(
            f"launches of a layer of {family}, {way}, page masses {'wanted' if mass else 'not wanted'}: {counts[mass]}"
        )
        record_property(f"launches of a layer of {family}, {way}, mass {mass}", counts[mass])
    assert counts == wanted


@pytest.mark.parametrize(("length", "tree"), [(1000, CHAIN), (1984, CHAIN), (1984, BUSH), (4100, BUSH)])
def test_a_verification_reads_little_more_than_it_must(reads: Reads, length: int, tree: DraftTree) -> None:
    """Every matrix once, and every key and value once, but for what each node of a bush gathers for itself after the
    last full page: within 2 % of the minimum. Rows and pages that pad cost nothing."""
    decoder = new_decoder("llama")
    cache = drawn_cache(decoder, length)
    step, rows = step_of(decoder, Segment(tree, cache))
    matrices = [weight for weight in decoder.weights.values() if weight.ndim == 2]
    reads.spans = Reads(*matrices, cache.pool.keys, cache.pool.values).spans
    step.run(rows)
    read_once = sum(weight.nbytes for weight in matrices)
    if not decoder.spec.tied:
        read_once -= decoder.weights["model.embed_tokens.weight"].nbytes
    minimum = read_once + 2 * 2 * 16 * 4 * (length + len(tree))
    assert minimum <= reads.bytes <= 1.02 * minimum


def test_views_and_tails_of_draft_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer and head has pages of its own, after provisional rows."""
    decoder = new_decoder()
    outputs = []
    pages = np.array([[[0, 2, 3]], [[0, 1, 3]]], np.int32)
    padded, unpadded = decoder.forward, lambda *a: without_steps(decoder, *a, monkeypatch)
    there = PageView(torch.from_numpy(pages).to(DEVICE))
    for run, view in ((padded, PageView(pages)), (unpadded, PageView(pages)), (padded, there), (unpadded, there)):
        cache = drawn_cache(decoder, 300)
        run([Segment(DraftTree.chain([4, 5]), cache, view)])
        outputs.append(run([Segment(DraftTree.chain([6]), cache, view, (0, 1))]))
        shapes = decoder.steps_over(cache.pool).steps
        assert len(shapes) == (2 if run is padded else 0)
        assert all(shape.room.viewed == 16 for shape in shapes)
        assert_same(outputs[0], outputs[-1])
    assert "pages" not in vars(there), "the host has not asked for them"


def test_only_the_logits_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = new_decoder("llama")
    tree = TREES["a chain"]
    cache = drawn_cache(decoder, 10)
    whole = decoder.forward([Segment(tree, cache)])
    for wanted in ([1], []):
        cache.drop_tail()
        assert torch.equal(decoder.forward([Segment(tree, cache)], wanted).logits, whole.logits[wanted])


def test_what_stays_as_it_is() -> None:
    """Prefills, more rows than the largest shape, tails longer than there is room for, backends and
    operations that know no fixed shapes."""
    decoder = new_decoder("llama")
    cache, other = drawn_cache(decoder, 70), decoder.new_cache()
    chain = DraftTree.chain
    odd = [
        [Segment(chain([1, 2]), cache, causal=True)],
        [Segment(chain(range(61)).merge(DraftTree([0] + [9] * 1 + [3] * 3, [-1, 0, 0, 1, 2])), cache)],
        [Segment(chain([1]), cache, tail=range(200))],
    ]
    cache.append(np.arange(70, 270, dtype=np.int32), False)
    steps = decoder.steps_over(cache.pool)
    for segments in odd:
        rows = lay_out(segments)
        assert (steps.find(rows, True, False, False) is None) == (len(rows.tokens) != 64)
    plain = decoder_of(tiny_model(tiny_config("llama", **SMALL), torch.float32), attention="sdpa")
    unpadded = decoder_of(tiny_model(tiny_config("llama", **SMALL), torch.float32), attention="triton")
    for model in (plain, unpadded):
        cache = drawn_cache(model, 5, model.new_pool(2))
        rows = lay_out([Segment(chain([1]), cache)])
        assert model.steps_over(cache.pool).find(rows, True, False, False) is None
    assert other.length == 0


def test_shapes_are_recorded_before_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain decoding needs one; a tree of two rows brings all with it; a longer text those that it had. Each is warmed
    up thrice; the pass that waits for it is no measure, and every other one is."""
    monkeypatch.setattr("tokenswift_py.models.captured.ROWS", (1, 2, 4))
    monkeypatch.setattr("tokenswift_py.models.captured.MOST_DRAFT_ROWS", 2)
    decoder, recorded, computed = new_decoder("llama"), [], []

    def compute(pool: Any, plan: Any, places: torch.Tensor, *rest: Any, taps: Any = ()) -> Output:
        computed.append(places.shape[1])
        return Output(torch.zeros(places.shape[1], 32), torch.zeros(places.shape[1], 61))

    monkeypatch.setattr(decoder, "compute", compute)

    def noted(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        result = function()
        recorded.append(len(result.hidden))
        return result, lambda: None

    decoder.recorder = Recorder(noted)
    pool = decoder.new_pool(160)
    view = PageView(np.zeros((2, 1, 1), np.int32))

    def run(length: int, rows: int, view: PageView | None = None) -> tuple[list[int], list[int], bool]:
        recorded.clear()
        computed.clear()
        cache, lap = drawn_cache(decoder, length, pool), decoder.clock.start()
        decoder.forward([Segment(DraftTree.chain(range(rows)), cache, view)])
        lap.stop()
        cache.release()
        return list(recorded), list(computed), bool(np.isnan(lap.ms))

    assert run(70, 1) == ([1], [1] * 4, True)
    assert run(71, 1) == ([], [], False)
    assert run(71, 2) == ([2, 4], [2] * 4 + [4] * 4, True)
    assert run(72, 4) == run(73, 3) == run(4000, 1) == ([], [], False)
    assert run(4096, 1)[0] == [1, 2, 4], "room for twice as many pages"
    assert run(100, 1, view) == ([1], [1] * 4, True)
    assert run(100, 2, view)[0] == [2], "draft passes have few rows"
    assert run(100, 4, view)[0] == [4], "but may have more"
    assert run(4096, 2, view)[0] == [1, 2, 4]


def test_recording_writes_nothing_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a pool and what a pass says of a text are the same whether shapes were recorded beside it or not."""
    monkeypatch.setattr("tokenswift_py.models.captured.ROWS", (1, 2, 4))
    outputs, pools = [], []
    for recorder in (Recorder(None), Recorder(record)):
        decoder = new_decoder("llama")
        decoder.recorder = recorder
        cache = drawn_cache(decoder, 130)
        outputs.append(decoder.forward([Segment(TREES["three nodes"], cache)], want_mass=True))
        pools.append(cache.pool)
    assert_same(*outputs)
    for one, other in ((pools[0].keys, pools[1].keys), (pools[0].values, pools[1].values)):
        assert torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))


def test_a_text_written_by_recorded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop with drafts of changing shapes."""
    monkeypatch.setattr("tokenswift_py.models.captured.ROWS", (1, 2, 4))
    params = SamplingParams(temperature=0.9, seed=1)
    prompt = [3, 14, 15, 9, 26]
    plain = write(new_decoder("llama"), prompt, 9, params)[0]
    decoder = new_decoder("llama")
    replays = []

    def counted(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        result, replay = record(function)
        return result, lambda: (replays.append(1), replay())[1]

    decoder.recorder = Recorder(counted)
    drafted, engine, _ = write(decoder, prompt, 9, params, Scripted(prompt + plain, 61, 0.4, width=2), draft_tokens=3)
    assert drafted == plain
    assert replays and engine.stats.num_accepted_draft_tokens > 0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.9, penalty=1.2, min_p=0.01, top_k=9),
        SamplingParams(temperature=0.8, top_p=0.9, dry_multiplier=0.8, repetition_penalty=1.1, frequency_penalty=0.1),
    ],
)
def test_a_round_reads_from_the_device_once(params: SamplingParams) -> None:
    """However many tokens are accepted: the chosen tokens of all nodes come over together."""
    prompt = [3, 14, 15, 9, 26]
    sampler = TritonSampler(params, 61)
    plain = DecodeLoop(new_decoder("llama"), NoDraft(), sampler, Stops(9, ()))
    text = [token for step in plain.run(prompt) for token in step.tokens]
    loop = DecodeLoop(new_decoder("llama"), Scripted(prompt + text, 61, 1.0, 1), sampler, Stops(9, ()), draft_tokens=3)
    compute(loop.force(prompt))
    for _ in range(2):
        with Transfers() as reads:
            step = compute(loop.round())
        assert len(step.tokens) == 4 and reads.reads == 1


def test_a_draft_reads_from_the_device_once_a_chain() -> None:
    """Its runners-up and their scores come over, and no row of logits. The verification is the round's other wait."""
    sampler = TritonSampler(SamplingParams(temperature=0.8, top_p=0.9, seed=1), 61)
    drafter = create("partial", policy="recent", view_tokens=64, width=2)
    loop = DecodeLoop(new_decoder("llama"), drafter, sampler, Stops(40, ()), draft_tokens=4)
    compute(loop.force([3, 14, 15, 9, 26]))
    rows: list[int] = []

    def counted(passes: Any) -> Any:
        output: Any = None
        while True:
            try:
                asked = passes.send(output)
            except StopIteration as done:
                return done.value
            rows.append(len(asked.segment.tree))
            output = asked.compute()

    with Transfers() as reads:
        counted(loop.round())
    *drafted, verified = rows
    assert drafted == [2] and reads.reads == len(rows) == 2
    assert reads.read_bytes == 8 * (5 * sum(drafted) + 3 * verified)


def test_a_capture_that_fails_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    attempts = []

    def failing(function: Callable[[], Any]) -> Any:
        attempts.append(1)
        raise RuntimeError("operation not permitted\nwhen a stream is capturing")

    recorder = Recorder(failing)
    runs = [Replayed(lambda i=i: i, recorder) for i in range(2)]
    with caplog.at_level(logging.WARNING, "tokenswift"):
        for run in runs:
            run.record()
        assert [run.run() for _ in range(3) for run in runs] == [0, 1] * 3
    assert len(attempts) == 1
    (line,) = caplog.messages
    assert "operation not permitted" in line and "\n" not in line


class FakeCuda:
    """The streams and captures of two devices, as torch has them: a capture that fails raises as it ends, and leaves
    its stream current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.waited, self.made = {0: "first", 1: "second"}, [], []
        cuda = self

        class Graph:
            def __init__(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str):
                self.stream, self.before = stream, cuda.current[stream[0]]

            def __enter__(self) -> None:
                cuda.current[self.stream[0]] = self.stream

            def __exit__(self, kind: Any, *rest: Any) -> None:
                if kind is not None:
                    raise RuntimeError("the capture was invalidated")
                cuda.current[self.stream[0]] = self.before

        class CUDAGraph:
            replayed = 0

            def replay(self) -> None:
                self.replayed += 1

        def stream(device: torch.device) -> Any:
            cuda.made.append(device.index)
            return (device.index, f"stream {len(cuda.made)}")

        names = {
            "graph_pool_handle": object, "Stream": stream, "graph": Graph, "CUDAGraph": CUDAGraph,
            "current_stream": lambda device: cuda.current[device.index],
            "set_stream": lambda before: cuda.current.update({{"first": 0, "second": 1}[before]: before}),
            "synchronize": lambda device: cuda.waited.append(device.index),
        }  # fmt: skip
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), KeyboardInterrupt()])
def test_a_capture_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The stream is the one from before, and nothing of the capture is still running."""
    cuda = FakeCuda(monkeypatch)
    records = [cuda_graphs(torch.device("cuda", index)) for index in (0, 1)]
    assert cuda.made == [0, 1], "a stream for each device"

    def failing() -> None:
        assert cuda.current[1] == (1, "stream 2")
        raise error

    with pytest.raises(RuntimeError, match="invalidated"):
        records[1](failing)
    assert cuda.current == {0: "first", 1: "second"} and cuda.waited == [1]
    result, replay = records[1](lambda: "done")
    replay()
    assert result == "done" and cuda.current == {0: "first", 1: "second"} and cuda.waited == [1]
    run = Replayed(lambda: 5, Recorder(records[0]))
    run.record()
    assert run.recorded is not None and run.run() == 5


def test_a_pool_goes_with_its_cache() -> None:
    """Steps know their pool, and keep neither its memory nor the decoder's."""
    decoder = new_decoder("llama")
    cache = drawn_cache(decoder, 5)
    decoder.forward([Segment(TREES["a chain"], cache)])
    pool, weak = ref(cache.pool), ref(decoder)
    gc.disable()
    try:
        del cache
        assert pool() is None
        del decoder
        assert weak() is None
    finally:
        gc.enable()


def test_a_graph_goes_with_its_step() -> None:
    """At once: the memory of a graph is the GPU's, which Python does not see when it looks for cycles."""
    decoder = new_decoder("llama")
    cache = drawn_cache(decoder, 5)
    decoder.forward([Segment(TREES["a chain"], cache)])
    (steps,) = decoder._steps.values()
    chain = ChainStep(decoder, cache.pool, None, None, Recorder(None))  # type: ignore[arg-type]
    held = [ref(step) for step in steps.steps.values() if step is not None] + [ref(chain)]
    gc.disable()
    try:
        steps.steps.clear()
        del chain
        assert len(held) > 1 and all(step() is None for step in held)
    finally:
        gc.enable()


def test_every_shape_has_room_for_its_longest_text() -> None:
    """The tables of the fullest pass: a tree of 64 rows in every place of a page, after all pages there are."""
    rng = np.random.default_rng(0)
    for pages, viewed in ((64, None), (2048, None), (128, 32)):
        room = Room(64, pages, viewed, layers=3)
        tables = FixedTables(room, Heads(2, 4, EVERYTHING, 64, 1024), DEVICE)
        for full in (0, 1, pages // 2, pages - 3):
            for committed in (0, 1, 63):
                depth = np.minimum(np.arange(64), 63 + 64 - committed)
                positions = (full * 64 + committed + depth).astype(np.int32)
                tail = np.where(
                    np.arange(room.tail) <= (committed + depth)[:, None], rng.integers(0, 99, room.tail), -1
                )
                tail[:, 0] = np.arange(64)  # no chain
                view = None
                if viewed is not None:
                    shape = (3, 2, min(viewed, full))
                    view = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
                part = AttentionSegment(slice(0, 64), positions, np.arange(full), view, tail.astype(np.int32), False)
                tables.fill([part])
        assert tables.tables.launches[0].states == NEAR + len(splits(pages)) - 1
