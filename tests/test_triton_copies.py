"""int8 copies of the pages that drafts read on Triton: what they hold, what is computed with them, and who has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from conftest import decoder_of, tiny_config, tiny_model
from drawn import SMALL
from interpreter import DEVICE
from native_rows import quantised
from scenes import Scene, new_pool, prefilled, random_tree, random_view
from scripted import write
from tokenswift_py import TokenSwift
from tokenswift_py.core import DraftTree, SamplingParams, Segment
from tokenswift_py.drafters.base import create
from tokenswift_py.errors import UserError
from tokenswift_py.kernels.naive import Naive
from tokenswift_py.kernels.triton.copies import copy_pages
from tokenswift_py.kernels.triton.ops import TritonOps
from tokenswift_py.kvcache import pages
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.rope import rope_tables
from triton_scenes import TRITON, seeded

__all__ = ["seeded"]  # the fixture


def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest multiples of each row's own scale; a scale below fp32's normal numbers is 0, and no number stays."""
    quants, scales = quantised(rows.float())
    tiny, scales = torch.finfo(torch.float32).tiny, scales[..., 0]
    usable = scales.isfinite() & (scales >= tiny)
    return torch.where(usable[..., None], quants, 0), torch.where(scales < tiny, 0, scales)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 24), (torch.bfloat16, 16), (torch.float16, 80)])
def test_a_copy_holds_the_nearest_multiples_of_each_rows_own_scale(dtype: torch.dtype, head_dim: int) -> None:
    keys, values = torch.randn(2, 2, 3, 4, 64, head_dim).mul(5).to(dtype)
    keys[0, 1, 2, 5, 3], values[1, 2, 2, 7, 1], values[1, 0, 0, 9, 0] = torch.nan, torch.inf, -torch.inf
    keys[0, 0, 2, 11], keys[1, 0, 0, 12] = 0, 1e-42
    for copy in (copy_pages, pages.copy_pages):
        copies: Any = tuple(torch.full_like(part, 77, dtype=torch.int8) for part in (keys, values))
        copies += tuple(torch.full(keys.shape[:-1], 77.0) for _ in range(2))
        copy(keys, values, copies, torch.tensor([2, 0], dtype=torch.int32))
        for own, quants, scales in zip((keys, values), copies[:2], copies[2:], strict=True):
            wanted, by = rounded(own[:, :, [0, 2]])
            assert torch.equal(quants[:, :, [0, 2]], wanted)
            assert torch.equal(scales[:, :, [0, 2]].nan_to_num(-1), by.nan_to_num(-1))
            assert (quants[:, :, [1, 3]] == 77).all() and (scales[:, :, [1, 3]] == 77).all(), "nobody asked for these"


@pytest.mark.parametrize("kind", ["tree", "view", "chunk", "no full page"])
@pytest.mark.parametrize("window", [None, 100])
def test_full_pages_are_read_as_their_copies_and_all_others_as_they_are(kind: str, window: int | None) -> None:
    """The textbook's attention over a pool whose full pages hold what the copies stand for."""
    rng = np.random.default_rng(3)
    cache = prefilled(new_pool(2, 16, torch.float32, DEVICE), 40 if kind == "no full page" else 230)
    chunk = Segment(DraftTree.chain([0] * 9), cache, causal=True)
    tree = Segment(random_tree(rng, 5), cache, random_view(rng, cache, 2) if kind == "view" else None)
    scene = Scene.of([chunk if kind == "chunk" else tree], 3)
    pool = scene.pool
    pool.copy_pages(scene.segments, copy_pages)
    plan = TRITON.prepare(scene.segments, DEVICE)
    mass = scene.q.new_full((len(scene.q), 2, 5), torch.nan)
    found = TRITON.attend(plan, 0, scene.q, pool.keys[0], pool.values[0], window, mass, **pool.beside(0, True))
    for part in (pool.keys, pool.values):
        held = cache.pages[: cache.full_pages]
        quants, scales = rounded(part[:, :, held])
        part[:, :, held] = quants * scales[..., None]
    exact, true_mass = scene.attend(Naive(), 0, window)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mass[..., : true_mass.shape[-1]], true_mass, rtol=1e-5, atol=1e-5)


def test_a_page_is_copied_once_and_anew_when_it_is_another_texts() -> None:
    pool, made = new_pool(1, 16, torch.float32, DEVICE), []

    def copy(keys: torch.Tensor, values: torch.Tensor, copies: Any, chosen: torch.Tensor) -> None:
        made.append(sorted(chosen.tolist()))
        copy_pages(keys, values, copies, chosen)

    cache = prefilled(pool, 200)
    full = sorted(cache.pages[:3].tolist())
    (segment,) = Scene.of([Segment(DraftTree.chain([0]), cache)], 1).segments
    pool.copy_pages([segment, replace(segment, pages=np.append(segment.pages, -1))], copy)
    pool.copy_pages([segment], copy)
    assert made == [full], "an evicted page is none"
    before = [part.clone() for part in pool.beside(0, True)["copies"]]
    cache.release()
    again = prefilled(pool, 130)
    (segment,) = Scene.of([Segment(DraftTree.chain([0]), again)], 1).segments
    pool.copy_pages([segment], copy)
    assert made[1:] == [sorted(again.pages[:2].tolist())] and set(made[1]) <= {*full, *again.pages.tolist()}
    page = next(iter(set(made[1]) & set(full)))
    wanted, _ = rounded(pool.keys[0, :, page])
    assert torch.equal(pool.beside(0, True)["copies"][0][:, page], wanted)
    assert not torch.equal(before[0][:, page], wanted)


def drafting(model: Any) -> TorchDecoder:
    own = decoder_of(model, attention="triton", ops=TritonOps(), draft=True)
    own.int8_pages = True
    return own


def test_drafting_over_copies_changes_no_token() -> None:
    """The text is the one by torch's own operations."""
    model = tiny_model(tiny_config("qwen3", **SMALL), torch.float32).to(DEVICE)
    decoder = decoder_of(model, attention="triton", ops=TritonOps())
    prompt, params = [7 * i % 61 for i in range(66)], SamplingParams(temperature=0.9, seed=1)
    plain, _, _ = write(decoder_of(model), prompt, 4, params)
    partial = create("partial", policy="recent", view_tokens=64, width=1)
    drafted, loop, _ = write(decoder, prompt, 4, params, partial, draft_tokens=2, self_draft=drafting(model))
    assert drafted == plain and loop.stats.num_draft_tokens > 0
    pool: Any = loop.cache.pool
    assert pool._copied.sum() == 1, "the full page was read as a copy"


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(
        str(tiny_folder), engine="torch", attention="triton", device=DEVICE.type, dtype="fp32"
    )


def test_the_flag_reaches_the_drafts(swift: TokenSwift, tiny_folder: Path) -> None:
    rope = rope_tables(swift.checkpoint.config, 512)
    for kv, copies in (("int8", True), ("own", False), ("auto", False)):
        made: Any = swift.executor.self_draft(rope, "auto", kv)
        assert made.int8_pages == swift.executor.reads_copies(kv) == copies
    for kv_dtype, attention, allowed in (
        ("int8", "triton", r"the cache itself is int8 \(kv_dtype\)"),
        ("fp32", "sdpa", "with engine torch only own, or int8 with attention triton"),
    ):
        device = DEVICE.type if attention == "triton" else "cpu"
        other = TokenSwift.from_pretrained(
            str(tiny_folder), engine="torch", attention=attention, device=device, dtype="fp32", kv_dtype=kv_dtype
        )
        with pytest.raises(UserError, match=f"^draft_kv: 'int8' is not allowed; {allowed}"):
            other.executor.self_draft(rope, "auto", "int8")
