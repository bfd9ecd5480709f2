"""The Triton kernels compute what they should, on a GPU or, where there is none, in Triton's interpreter on the CPU."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scenes
from interpreter import DEVICE, INTERPRETED
from scenes import LAYERS, Scene, fill, ladder, prefilled, random_tree, random_view
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment
from tokenswift_py.kernels.naive import Naive, visible
from tokenswift_py.kernels.triton import fused, items, tables
from tokenswift_py.kernels.triton.attention import LOG2_E
from tokenswift_py.kernels.triton.compile import MODULES, variants_of
from tokenswift_py.kernels.triton.items import EVERYTHING, FIELDS, Heads, TableBuilder, splits
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import TorchPagePool
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.rows import lay_out
from triton_scenes import TRITON, Reads, as_if_committed
from triton_scenes import reads as reads

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def new_pool(kv_heads: int, head_dim: int, dtype: torch.dtype) -> TorchPagePool:
    return scenes.new_pool(kv_heads, head_dim, dtype, DEVICE)


def agree(scene: Scene, window: int | None = None, tolerance: float = 1e-5, layer: int = 0, cap: float = 0.0) -> None:
    scene.agree(window, tolerance, TRITON, [layer], cap)


@pytest.mark.parametrize(
    ("prefix", "window"), [(0, None), (1, 5), (63, None), (64, 5), (65, 100), (260, None), (260, 100)]
)
def test_trees_chains_and_chunks_behind_any_prefix(prefix: int, window: int | None) -> None:
    rng = np.random.default_rng(prefix)
    for tree, causal in ((DraftTree.chain([0]), False), (random_tree(rng, 4), False), (DraftTree.chain([0] * 9), True)):
        cache = prefilled(new_pool(2, 16, torch.float32), prefix)
        agree(Scene.of([Segment(tree, cache, causal=causal)], 2), window)
    cache.drop_tail()
    agree(Scene.of([Segment(random_tree(rng, 4), cache, random_view(rng, cache, 2))], 2), window, layer=1)


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (4, 80), (7, 96), (2, 128), (5, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_head_size_and_group(group: int, head_dim: int, dtype: torch.dtype) -> None:
    """The interpreter cuts bf16 short instead of rounding, which the tolerance allows for."""
    cache = prefilled(new_pool(1, head_dim, dtype), 70)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    agree(Scene.of([Segment(ladder(1), cache)], group), tolerance=tolerance)


@pytest.mark.parametrize("window", [None, 40])
def test_scores_are_capped(window: int | None) -> None:
    rng = np.random.default_rng(0)
    cache = prefilled(new_pool(2, 16, torch.float32), 130)
    agree(Scene.of([Segment(random_tree(rng, 4), cache)], 2), window, cap=0.7)
    cache.drop_tail()
    scene = Scene.of([Segment(random_tree(rng, 4), cache, random_view(rng, cache, 1))], 2)
    scene.q *= 40  # scores of some hundreds, where the tanh is 1 and its exponential is 0
    agree(scene, window, cap=50.0)


@pytest.mark.parametrize(("dtype", "cap"), [(torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.float32, 0.7)])
def test_int8_pages_read_as_what_they_stand_for(dtype: torch.dtype, cap: float) -> None:
    """Against the textbook on keys and values times their scales; lanes that nobody attends to have NaN for theirs."""
    wide = new_pool(2, 16, dtype)
    pool = TorchPagePool(LAYERS, 2, 16, 48, torch.int8, DEVICE)
    pool._free = wide._free
    for scales in (pool.key_scales, pool.value_scales):
        scales.fill_(torch.nan)
    cache = KVCache(pool, 512)
    tree = ladder(1)
    for part in (DraftTree.chain([0] * 130), tree):
        rows = lay_out([Segment(part, cache)])
        k, v = torch.randn(2, len(part), 2, 16, device=DEVICE)
        pool.write(0, torch.from_numpy(rows.slots.astype(np.int64)), k, 3 * v)
        if part is not tree:
            cache.commit(range(130))
    for full, quants, scales in (
        (wide.keys, pool.keys, pool.key_scales),
        (wide.values, pool.values, pool.value_scales),
    ):
        full.copy_(quants * scales[..., None])
    scene = Scene(wide, rows.segments, torch.randn(len(tree), 6, 16, device=DEVICE).to(dtype))
    true, true_mass = scene.attend(Naive(), 0, None, cap)
    mass = torch.full_like(true_mass, torch.nan)
    plan = TRITON.prepare(rows.segments, DEVICE)
    out = TRITON.attend(plan, 0, scene.q, pool.keys[0], pool.values[0], None, mass, pool.scales_of(0), cap=cap)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(out, true, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mass, true_mass, rtol=tolerance, atol=tolerance)


def test_draft_steps_build_on_provisional_rows() -> None:
    cache = prefilled(new_pool(2, 16, torch.float32), 62)
    agree(Scene.of([Segment(DraftTree([0, 1, 2, 3], [-1, 0, 0, 1]), cache)], 3))
    left = Segment(DraftTree.chain([0]), cache, tail=(0, 1, 3))
    right = Segment(DraftTree.chain([0]), cache, tail=(0, 2))
    agree(Scene.of([left, right], 3))


def test_several_sequences_share_a_pass() -> None:
    rng = np.random.default_rng(0)
    pool = new_pool(2, 16, torch.float32)
    first, second = prefilled(pool, 65), prefilled(pool, 200)
    third = second.fork()
    segments = [
        Segment(random_tree(rng, 4), first),
        Segment(DraftTree.chain([0] * 7), second, causal=True),
        Segment(random_tree(rng, 3), third, random_view(rng, third, 2)),
    ]
    agree(Scene.of(segments, 3), layer=1)


@pytest.mark.parametrize("count", [None, 2])
def test_lanes_that_no_row_attends_to_may_hold_anything(count: int | None) -> None:
    rng = np.random.default_rng(3)
    cache = prefilled(new_pool(2, 16, torch.float32), 250)
    view = None if count is None else random_view(rng, cache, count)
    scene = Scene.of([Segment(random_tree(rng, 4), cache, view)], 2)
    (segment,) = scene.segments
    for window in (150, 20, 1):
        for head in range(2):
            seen = np.concatenate([visible(segment, 0, head, row, window)[1] for row in range(4)])
            unseen = np.setdiff1d(np.arange(48 * PAGE_SIZE), seen)
            for part in (scene.pool.keys, scene.pool.values):
                part[0, head].flatten(0, 1)[torch.from_numpy(unseen)] = torch.nan
        agree(scene, window)


def test_splits_are_a_function_of_absolute_pages() -> None:
    longest = splits(5000)
    assert longest[0] == 0 and (np.diff(longest) > 0).all() and longest[-1] >= 5000
    for pages in (1, 4, 5, 64, 65, 192, 193, 448, 449, 1563):
        ends = splits(pages)
        assert (ends == longest[: len(ends)]).all()
        assert ends[-2] < pages <= ends[-1]


def test_the_longest_splits_begin_first() -> None:
    """Programs begin in the order of their items: a long one at the end would keep the GPU waiting."""
    segment = AttentionSegment(
        slice(0, 1), np.array([99_999], np.int32), np.arange(1562, dtype=np.int32), None, np.arange(32)[None], False
    )
    builder = TableBuilder(Heads(1, 4, EVERYTHING, 64, 1), 1 << 40)
    builder.add(segment)
    builder.joined()
    ((items,),) = builder.items
    edges = splits(1561)
    far = items[items[:, 2] >= 0]
    pages = [int(edges[split - 1] - edges[split - 2]) for split in far[:, 2]]
    assert len(far) == len(edges) - 1 and 1561 <= sum(pages) < 1561 + 16
    assert pages == sorted(pages, reverse=True) and max(pages) == 16
    assert (items[len(far) :, FIELDS - 1] == 1).all() and len(items) == len(far) + 2, "its page and the one before it"


@pytest.fixture
def fine_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of two pages and of one, so that short texts have many."""
    monkeypatch.setattr(items, "SPLIT_LEVELS", ((1, 2),))
    monkeypatch.setattr(items, "LAST_LEVEL", 1)


def attend(scene: Scene, window: int | None = None, view: PageView | None = None) -> torch.Tensor:
    return scene.attend(TRITON, 0, window)[0]


@pytest.mark.usefixtures("fine_splits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 66])
def test_tree_rows_have_the_bits_of_plain_decoding(dtype: torch.dtype, window: int | None) -> None:
    """Law 1. The tree crosses a page boundary, which is also one of splits; its siblings leave gaps between them."""
    tree = random_tree(np.random.default_rng(2), 7).merge(DraftTree.chain(range(6)))
    scene = Scene.of([Segment(tree, prefilled(new_pool(2, 16, dtype), 189))], 3)
    (segment,) = scene.segments
    assert segment.positions.min() < 192 < segment.positions.max()
    together = attend(scene, window)
    for index in range(len(tree)):
        alone = as_if_committed(scene, segment, index)
        assert torch.equal(attend(alone, window)[0], together[index])


@pytest.mark.usefixtures("fine_splits")
def test_a_chunks_rows_have_the_bits_of_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the workspace holds the state of four rows only, so that the chunk takes many launches."""
    scene = Scene.of(
        [Segment(DraftTree.chain([0] * 20), prefilled(new_pool(2, 16, torch.float32), 120), causal=True)], 3
    )
    (segment,) = scene.segments
    together = attend(scene)
    for index in (0, 6, 7, 8, 12, 19):
        assert torch.equal(attend(as_if_committed(scene, segment, index))[0], together[index])
    monkeypatch.setattr(tables, "WORKSPACE_BYTES", 4 * 3 * 4 * 2 * 3 * 16)
    heads = Heads(2, 3, EVERYTHING, 16, 4 * 2 * 3 * 16)
    table = TRITON.prepare(scene.segments, DEVICE).table(heads)
    assert len(table.launches) == 5
    assert torch.equal(attend(scene), together)


@pytest.mark.usefixtures("fine_splits")
def test_a_rows_bits_do_not_depend_on_the_others_in_its_pass() -> None:
    rng = np.random.default_rng(4)
    pool = new_pool(2, 16, torch.float32)
    segments = [Segment(random_tree(rng, 4), prefilled(pool, 100)), Segment(ladder(2), prefilled(pool, 300))]
    scene = Scene.of(segments, 3)
    together = attend(scene)
    for segment in scene.segments:
        n = len(segment.positions)
        alone = AttentionSegment(
            slice(0, n), segment.positions, segment.pages, segment.view, segment.tail, segment.causal
        )
        assert torch.equal(attend(Scene(pool, (alone,), scene.q[segment.rows])), together[segment.rows])


@pytest.mark.usefixtures("fine_splits")
def test_a_view_of_all_pages_and_a_wide_window_change_no_bit() -> None:
    cache = prefilled(new_pool(2, 16, torch.float32), 250)
    scene = Scene.of([Segment(ladder(2), cache)], 3)
    (segment,) = scene.segments
    view = PageView.all(LAYERS, 2, cache.full_pages).pages
    viewed = AttentionSegment(segment.rows, segment.positions, segment.pages, view, segment.tail, segment.causal)
    for window in (None, 90):
        plain = scene.attend(TRITON, 0, window)
        seen = Scene(scene.pool, (viewed,), scene.q).attend(TRITON, 0, window)
        assert torch.equal(plain[0], seen[0]) and torch.equal(plain[1], seen[1])
    assert torch.equal(attend(scene, 1000), attend(scene))


def test_the_log_sum_exp_is_that_of_the_scores() -> None:
    cache = prefilled(new_pool(2, 16, torch.float32), 100)
    scene = Scene.of([Segment(ladder(2), cache)], 3)
    plan = TRITON.prepare(scene.segments, DEVICE)
    _, lse = TRITON.attend_with_lse(plan, 0, scene.q, scene.pool.keys[0], scene.pool.values[0])
    for row in range(len(scene.q)):
        for head in range(6):
            _, slots = visible(scene.segments[0], 0, head // 3, row, None)
            k = scene.pool.keys[0, head // 3].flatten(0, 1)[torch.from_numpy(slots)]
            expected = torch.logsumexp(scene.q[row, head] @ k.T * 16**-0.5, 0) * LOG2_E
            torch.testing.assert_close(lse[row, head], expected, rtol=1e-5, atol=1e-5)


class FarPool(TorchPagePool):
    """int8 pages of two KV heads; the second's last two are more than 2^31 elements into the pool. The system gives
    memory page by page as it is written."""

    def __init__(self, pages: int):
        super().__init__(1, 2, 64, 1, torch.int8, DEVICE)
        self.keys, self.values = (torch.empty((1, 2, pages, PAGE_SIZE, 64), dtype=torch.int8) for _ in range(2))
        self.key_scales, self.value_scales = (torch.empty((1, 2, pages, PAGE_SIZE)) for _ in range(2))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU would reserve the whole of it")
def test_offsets_do_not_overflow() -> None:
    """Rows written, moved and attended to at the far end of a pool of more elements than 32 bits can count."""
    near, far = 3, 2**18 + 3
    written = []
    for pages in (near, far):
        pool = FarPool(pages)
        assert pages == near or pool.keys[0, 1, pages - 2].storage_offset() > 2**31
        last = pages - 1
        q, k, v = torch.manual_seed(1) and (torch.randn(3, heads, 64) for heads in (4, 2, 2))
        angles = torch.zeros(3, 32)
        slots = torch.tensor([last * 64, last * 64 + 1, last * 64 - 2])
        keys, values, scales = pool.keys[0], pool.values[0], pool.scales_of(0)
        fused.rope_write(q, k, v, angles + 1, angles, slots, keys, values, scales)
        moved = slots[2:], slots[:1] + 2
        fused.move_rows(pool.keys, pool.values, *moved)
        fused.move_rows(pool.key_scales[..., None], pool.value_scales[..., None], *moved)
        tail = np.array([[last * 64, last * 64 + 1, last * 64 + 2]], np.int32)
        segment = AttentionSegment(slice(0, 3), np.arange(3, dtype=np.int32), np.zeros(0, np.int32), None, tail, True)
        plan = TRITON.prepare([segment], DEVICE)
        attended = TRITON.attend(plan, 0, q, keys, values, scales=scales)
        one_page = AttentionSegment(
            slice(0, 1), np.array([64], np.int32), np.array([last], np.int32), None, tail[:, 2:], False
        )
        pool.keys[0, :, last, 3:], pool.values[0, :, last, 3:] = 0, 0
        pool.key_scales[0, :, last, 3:], pool.value_scales[0, :, last, 3:] = 0, 0
        committed = TRITON.attend(TRITON.prepare([one_page], DEVICE), 0, q[:1], keys, values, scales=scales)
        written.append((keys[:, last, :3].clone(), attended, committed))
    for a, b in zip(*written, strict=True):
        assert torch.equal(a, b) and a.any()


@pytest.mark.parametrize("prefix", [1000, 1984])
def test_every_key_and_value_is_read_once(reads: Reads, prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of eight rows and four query heads a KV head reads each key once. In a tree every node gathers the tail
    for itself: the committed lanes of the last page and its own path."""
    pool = new_pool(1, 16, torch.bfloat16)
    cache = KVCache(pool, 4096)
    fill(pool, cache.append(np.arange(prefix, dtype=np.int32), True))
    cache.commit(range(prefix))
    for tree in (DraftTree.chain(range(8)), random_tree(np.random.default_rng(0), 8)):
        cache.drop_tail()
        scene = Scene.of([Segment(tree, cache)], 4)
        reads.bytes, reads.spans = 0, Reads(pool.keys[0], pool.values[0]).spans
        TRITON.attend(TRITON.prepare(scene.segments, DEVICE), 0, scene.q, pool.keys[0], pool.values[0])
        token = 2 * 16 * 2
        if tree.is_chain:
            assert reads.bytes == token * (prefix + 8)
        else:
            behind = prefix % PAGE_SIZE * 8 + int((tree.depth + 1).sum())
            assert reads.bytes == token * (prefix - prefix % PAGE_SIZE + behind)


def roofline() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).resolve().parent.parent / "experiments" / "kernel_roofline.py"))


def test_the_roofline_has_every_kernel() -> None:
    script = roofline()
    works = [
        work
        for model in ("qwen2.5-7b", "qwen3-30b-a3b")  # a dense one, and mixtures of experts
        for work in script["analytical"](script["SHAPES"][model], [100], [3])
    ]
    said = [name for work in works for name in work.kernel.split(", ")]
    for name in {variant.name for module in MODULES for variant in variants_of(module, "sm_90")}:
        kernel = name.removesuffix("+bias").split(" x")[0]
        assert any(other == kernel or other.startswith(f"{kernel} ") for other in said), name
    assert all(work.read + work.written >= work.minimum > 0 for work in works)


def test_the_roofline_counts_what_attention_reads(reads: Reads) -> None:
    """The arithmetic of experiments/kernel_roofline.py against every byte loaded: tables of a pass, and the maxima that
    the merge looks at twice, are the few percent it leaves out."""
    script = roofline()
    shape = script["Shape"](64, 64, heads=8, kv_heads=2, head_dim=64, vocab=1)
    pool = new_pool(2, 64, torch.bfloat16)
    cache = KVCache(pool, 4096)
    fill(pool, cache.append(np.arange(1000, dtype=np.int32), True))
    cache.commit(range(1000))
    scene = Scene.of([Segment(DraftTree.chain(range(4)), cache)], 4)
    reads.spans = [(0, 2**63)]
    TRITON.attend(TRITON.prepare(scene.segments, DEVICE), 0, scene.q, pool.keys[0], pool.values[0])
    work = script["attention_work"](shape, 1000, 4)
    assert work.read <= reads.bytes <= 1.02 * work.read
    assert work.minimum == 2 * 2 * 64 * 2 * 1004 + 2 * 4 * 8 * 64 * 2
