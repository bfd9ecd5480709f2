"""Pieces of several row tiles load a page once, and every row keeps the bits that it has in a piece of one tile."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from interpreter import DEVICE
from scenes import LAYERS, Scene, new_pool, prefilled, random_tree, random_view
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.kernels.base import PAGE_SIZE
from tokenswift_py.kernels.naive import Naive
from tokenswift_py.kernels.triton import attention, configs, items
from tokenswift_py.kvcache.pages import TorchPagePool
from triton_scenes import TRITON, Reads, as_if_committed
from triton_scenes import reads as reads
from triton_scenes import seeded as seeded

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

GROUP = 3  # does not divide a tile, so that a row's query heads lie in two of them


def set_tiles(monkeypatch: pytest.MonkeyPatch, tiles: int) -> None:
    monkeypatch.setattr(attention, "config", lambda *of, **kind: replace(configs.config(*of, **kind), tiles=tiles))


@pytest.fixture
def fine_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of two pages and of one, so that short texts have many."""
    monkeypatch.setattr(items, "SPLIT_LEVELS", ((1, 2),))
    monkeypatch.setattr(items, "LAST_LEVEL", 1)


def scene_of(kind: str, dtype: torch.dtype) -> Scene:
    rng = np.random.default_rng(5)
    cache = prefilled(new_pool(1, 16, dtype, DEVICE), 135)
    if kind == "chunk":
        segment = Segment(DraftTree.chain([0] * 12), cache, causal=True)
    else:
        segment = Segment(random_tree(rng, 6), cache, random_view(rng, cache, 1) if kind == "view" else None)
    return Scene.of([segment], GROUP)


@pytest.mark.usefixtures("fine_splits")
@pytest.mark.parametrize(("kind", "window", "tiles"), [("tree", None, 2), ("view", None, 2), ("chunk", 66, 3)])
def test_the_number_of_tiles_changes_no_bit(
    kind: str, window: int | None, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 16 packed rows, the last not full, in one piece or in one each. Rows agree with the textbook's."""
    scene = scene_of(kind, torch.float32)
    found = []
    for most in (1, tiles):
        set_tiles(monkeypatch, most)
        found.append(scene.attend(TRITON, 0, window))
    for one, several, true in zip(*found, scene.attend(Naive(), 0, window), strict=True):
        assert torch.equal(one, several)
        torch.testing.assert_close(one, true, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fine_splits")
def test_a_row_of_any_tile_has_the_bits_of_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 1, of the first tile, the third, and a row that lies in two."""
    set_tiles(monkeypatch, 3)
    scene = scene_of("chunk", torch.float32)
    (segment,) = scene.segments
    together = scene.attend(TRITON, 0, None)[0]
    for index in (5, 11):
        assert torch.equal(as_if_committed(scene, segment, index).attend(TRITON, 0, None)[0][0], together[index])


def test_pages_of_bytes_are_met_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = TorchPagePool(LAYERS, 1, 16, 48, torch.int8, DEVICE)
    scene, slots = scene_of("tree", torch.float32), torch.arange(48 * PAGE_SIZE)
    pool.write(0, slots, torch.randn(len(slots), 1, 16), torch.randn(len(slots), 1, 16))
    found = []
    for tiles in (1, 2):
        set_tiles(monkeypatch, tiles)
        plan = TRITON.prepare(scene.segments, DEVICE)
        parts = pool.keys[0], pool.values[0]
        found.append(TRITON.attend(plan, 0, scene.q, *parts, scales=pool.scales_of(0)))
    assert found[0].isfinite().all() and all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_piece_reads_its_pages_once(reads: Reads, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 packed rows are two tiles of 16: one piece, or two that each read the three full pages."""
    set_tiles(monkeypatch, tiles)
    pool = new_pool(1, 16, torch.float32, DEVICE)
    scene = Scene.of([Segment(DraftTree.chain(range(8)), prefilled(pool, 3 * PAGE_SIZE))], 4)
    reads.spans = Reads(pool.keys[0], pool.values[0]).spans
    TRITON.attend(TRITON.prepare(scene.segments, DEVICE), 0, scene.q, pool.keys[0], pool.values[0])
    token = 2 * 16 * 4
    assert reads.bytes == token * (3 * PAGE_SIZE * 2 // tiles + 4 + 8), "the tail is gathered for four rows at a time"
