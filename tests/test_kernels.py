"""Every attention backend computes what the textbook one does, and that one sees exactly a row's own past."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scenes import DEVICE, LAYERS, Scene, ladder, new_pool, prefilled, random_tree, random_view
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment
from tokenswift_py.kernels.naive import Naive, visible
from tokenswift_py.kernels.sdpa import SDPA
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.rows import lay_out

PREFIXES = (0, 1, 63, 64, 65, 200)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("window", [None, 5, 100])
def test_trees_chains_and_chunks_behind_any_prefix(prefix: int, window: int | None) -> None:
    rng = np.random.default_rng(prefix)
    for tree, causal in (
        (DraftTree.chain([0]), False),
        (DraftTree.chain([0] * 5), False),
        (random_tree(rng, 9), False),
        (DraftTree([0, 1, 2, 3], [-1, 0, 0, 0]), False),
        (DraftTree.chain([0] * 80), True),
    ):
        cache = prefilled(new_pool(2, 16), prefix)
        Scene.of([Segment(tree, cache, causal=causal)], 3).agree(window)
        for count in {0, 1, cache.full_pages}:
            cache.drop_tail()
            view = random_view(rng, cache, count)
            Scene.of([Segment(tree, cache, view, causal=causal)], 3).agree(window)


@pytest.mark.parametrize(("group", "head_dim"), [(1, 16), (3, 64), (4, 80)])
def test_grouped_queries_of_every_head_size(group: int, head_dim: int) -> None:
    rng = np.random.default_rng(group)
    cache = prefilled(new_pool(3, head_dim), 130)
    Scene.of([Segment(random_tree(rng, 12), cache)], group).agree()
    cache.drop_tail()
    Scene.of([Segment(random_tree(rng, 12), cache, random_view(rng, cache, 1))], group).agree()


def test_half_precision_is_accumulated_in_fp32() -> None:
    cache = prefilled(new_pool(2, 64, torch.bfloat16), 200)
    Scene.of([Segment(random_tree(np.random.default_rng(5), 7), cache)], 3).agree(tolerance=2e-2)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_draft_steps_build_on_provisional_rows(prefix: int) -> None:
    """The draft's own tree comes first, then two steps from two of its leaves, then a tree after those."""
    rng = np.random.default_rng(prefix)
    cache = prefilled(new_pool(2, 16), prefix)
    Scene.of([Segment(DraftTree([0, 1, 2, 3], [-1, 0, 0, 1]), cache)], 3).agree()
    view = random_view(rng, cache, 2)
    left = Segment(DraftTree.chain([0]), cache, view, tail=(0, 1, 3))
    right = Segment(DraftTree.chain([0]), cache, view, tail=(0, 2))
    Scene.of([left, right], 3).agree()
    Scene.of([Segment(random_tree(rng, 6), cache, view, tail=(0, 1, 3, 4))], 3).agree(window=70)


def test_several_sequences_share_a_pass_without_seeing_one_another() -> None:
    rng = np.random.default_rng(0)
    pool = new_pool(2, 16)
    first, second = prefilled(pool, 65), prefilled(pool, 200)
    third = second.fork()
    segments = [
        Segment(random_tree(rng, 6), first),
        Segment(DraftTree.chain([0] * 70), second, causal=True),
        Segment(random_tree(rng, 5), third, random_view(rng, third, 2)),
    ]
    together = Scene.of(segments, 3)
    together.agree()
    out, _ = together.attend(SDPA(), 0, None)
    for segment in together.segments:
        rows = range(len(segment.positions))
        alone = AttentionSegment(
            slice(0, len(rows)), segment.positions, segment.pages, segment.view, segment.tail, segment.causal
        )
        torch.testing.assert_close(
            Scene(pool, (alone,), together.q[segment.rows]).attend(SDPA(), 0, None)[0], out[segment.rows]
        )


def test_a_lone_sequence_in_one_run_of_the_pool_gives_the_same() -> None:
    pool = new_pool(2, 16)
    pool._free.sort(reverse=True)
    cache = prefilled(pool, 130)
    for tree, causal in ((DraftTree.chain([0]), False), (DraftTree.chain([0] * 70), True), (ladder(4), False)):
        cache.drop_tail()
        scene = Scene.of([Segment(tree, cache, causal=causal)], 3)
        assert SDPA().prepare(scene.segments, DEVICE)[0].contiguous == 0
        scene.agree()
        scene.agree(window=40)


@pytest.mark.parametrize("count", [None, 2])
def test_lanes_that_no_row_attends_to_may_hold_anything(count: int | None) -> None:
    """All that lies outside every row's window and view is poisoned; half of it in the tail's own page."""
    rng = np.random.default_rng(3)
    cache = prefilled(new_pool(2, 16), 250)
    view = None if count is None else random_view(rng, cache, count)
    scene = Scene.of([Segment(random_tree(rng, 5), cache, view)], 3)
    (segment,) = scene.segments
    for window in (150, 20, 1):
        for layer in range(LAYERS):
            for head in range(2):
                seen = np.concatenate([visible(segment, layer, head, row, window)[1] for row in range(5)])
                unseen = np.setdiff1d(np.arange(48 * PAGE_SIZE), seen)
                for part in (scene.pool.keys, scene.pool.values):
                    part[layer, head].flatten(0, 1)[torch.from_numpy(unseen)] = torch.nan
        scene.agree(window)


@pytest.mark.parametrize("backend", [Naive(), SDPA()])
def test_a_view_of_all_pages_is_no_view(backend: Naive | SDPA) -> None:
    cache = prefilled(new_pool(2, 16), 200)
    scene = Scene.of([Segment(ladder(3), cache)], 3)
    (segment,) = scene.segments
    view = PageView.all(LAYERS, 2, cache.full_pages).pages
    viewed = AttentionSegment(segment.rows, segment.positions, segment.pages, view, segment.tail, segment.causal)
    for layer in range(LAYERS):
        for window in (None, 90):
            plain = scene.attend(backend, layer, window)
            seen = Scene(scene.pool, (viewed,), scene.q).attend(backend, layer, window)
            if isinstance(backend, Naive):
                assert torch.equal(plain[0], seen[0]) and torch.equal(plain[1], seen[1])
            torch.testing.assert_close(seen, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 20, 100])
@pytest.mark.parametrize("prefix", [0, 63, 200])
def test_a_row_sees_its_own_path_and_the_past_inside_window_and_view(prefix: int, window: int | None) -> None:
    rng = np.random.default_rng(prefix)
    cache = prefilled(new_pool(2, 16), prefix)
    first = DraftTree([0, 1, 2], [-1, 0, 0])
    tail = (0, 2)
    lay_out([Segment(first, cache)])
    tree, view = random_tree(rng, 8), random_view(rng, cache, 1)
    rows = lay_out([Segment(tree, cache, view, tail=tail)])
    (segment,) = rows.segments
    slot_of = {position: slot for position, slot in enumerate(cache.slots(np.arange(prefix, dtype=np.int32)))}
    tail_slots = cache.slots(prefix + np.array(tail, np.int32))
    for layer in range(LAYERS):
        for head in range(2):
            for node in range(len(tree)):
                ancestors = [rows.slots[step] for step in tree.path(node)]
                everything = slot_of | dict(enumerate([*tail_slots, *ancestors], start=prefix))
                own = max(everything)
                pages = {*view.pages[layer, head].tolist(), *range(cache.full_pages, own // PAGE_SIZE + 1)}
                wanted = {
                    position: slot
                    for position, slot in everything.items()
                    if position // PAGE_SIZE in pages and (window is None or own - window < position <= own)
                }
                assert rows.positions[node] == own == prefix + 2 + tree.depth[node]
                positions, slots = visible(segment, layer, head, node, window)
                assert positions.tolist() == sorted(wanted)
                assert slots.tolist() == [wanted[position] for position in positions]


def test_a_view_of_pages_that_are_not_full_and_a_tail_that_is_not_there_are_refused() -> None:
    cache = prefilled(new_pool(2, 16), 100)
    with pytest.raises(ValueError, match="page 1 of 1 full pages"):
        lay_out([Segment(DraftTree.chain([0]), cache, PageView.all(LAYERS, 2, 2))])
    cache.drop_tail()
    with pytest.raises(ValueError, match="not among 0 provisional"):
        lay_out([Segment(DraftTree.chain([0]), cache, tail=(0,))])
