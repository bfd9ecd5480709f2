"""Copies of the pages that drafts read: what they hold, what is computed with them, when they are made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tiny_model, weights_of
from native_rows import CONTEXT, config_of, int8_block, prefill, quantised, tokens
from native_rows import isa as isa
from tokenswift_py import TokenSwift
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.errors import UserError
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec


def decoders(threads: int = 2, **changes: Any) -> tuple[NativeDecoder, NativeDecoder]:
    """A target with a bf16 cache, and its draft that reads int8 pages of it."""
    config = config_of(**changes)
    packed = NativeWeights(
        ModelSpec.from_config(config), weights_of(tiny_model(config, torch.float32)), torch.float32, threads
    )
    rope = rope_tables(config, CONTEXT)
    return (
        NativeDecoder(packed, rope, torch.bfloat16),
        NativeDecoder(packed, rope, torch.bfloat16, draft=True, int8_pages=True),
    )


def view_of(decoder: NativeDecoder, pages: Any) -> PageView:
    """These pages in all layers and heads, or [layers * kv_heads, n] of them."""
    heads = (decoder.spec.layers, decoder.spec.kv_heads)
    pages = np.array(pages, np.int32)
    if pages.ndim == 1:
        return PageView(np.broadcast_to(pages, (*heads, len(pages))))
    return PageView(pages.reshape(*heads, -1))


def logits_of(decoder: NativeDecoder, cache: KVCache, view: PageView | None = None, rows: int = 3) -> torch.Tensor:
    cache.drop_tail()
    found = decoder.forward([Segment(DraftTree.chain(tokens(rows, 5)), cache, view)]).logits
    cache.drop_tail()
    return found


def values(block: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [64, padded head_dim] of a bf16 page."""
    keys, values = torch.from_numpy(block.copy()).view(torch.bfloat16).view(2, -1)
    return keys.view(-1, 64, 2).transpose(0, 1).flatten(1), values.view(32, -1, 2).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_a_copy_holds_the_nearest_multiples_of_each_tokens_own_scale(isa: str, head_dim: int) -> None:
    target, draft = decoders(head_dim=head_dim)
    cache, _ = prefill(target, tokens(150))
    pool: Any = cache.pool
    block = pool.native.block(1, 0, int(cache.pages[0])).view(np.uint16)
    for place, bits in ((3, 0x7FC0), (40, 0x7F80), (70, 0xFF80)):  # NaN and infinities
        block[place] = bits
    block[len(block) // 2 :][: len(block) // 64] = 1  # of two tokens: too small for a scale
    assert pool.native.copy(1, 0, int(cache.pages[0])) is None, "nobody drafted yet"
    logits_of(draft, cache)
    for layer in range(target.spec.layers):
        for head in range(target.spec.kv_heads):
            for page in cache.pages[:2]:
                own = values(pool.native.block(layer, head, int(page)))
                quants, scales = int8_block(pool.native.copy(layer, head, int(page)))
                for wanted, found, scale in zip(own, quants, scales, strict=True):
                    assert_quantised(wanted.float(), found, scale)
    assert pool.native.copy(0, 0, int(cache.pages[2])) is None, "a page that is not full is read as it is"


def assert_quantised(wanted: torch.Tensor, found: torch.Tensor, scale: torch.Tensor) -> None:
    quants, expected = quantised(wanted)
    usable = torch.isfinite(expected) & (expected >= torch.finfo(torch.float32).tiny)
    assert torch.equal(found, torch.where(usable, quants, 0))
    expected = torch.where(expected < torch.finfo(torch.float32).tiny, 0, expected)
    assert torch.equal(scale.nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("window", [None, 200])
def test_a_draft_over_copies_has_almost_the_target_s_logits(isa: str, window: int | None) -> None:
    target, draft = decoders(**({} if window is None else {"family": "mistral", "sliding_window": window}))
    cache, _ = prefill(target, tokens(300))
    view = view_of(target, [0, 2, 3])
    for pages in (None, view):
        exact, found = logits_of(target, cache, pages), logits_of(draft, cache, pages)
        error = (found - exact).abs().mean()
        assert 0 < error < 0.04 * exact.std(), error  # of keys, values, queries and weights as bytes


@pytest.mark.parametrize("head_dim", [8, 24, 80])
def test_a_view_of_many_splits_is_read_whole_whatever_the_heads_width(isa: str, head_dim: int) -> None:
    """Nine pages and more are two splits of a view's own: without the last page it would be farther from the target."""
    target, draft = decoders(head_dim=head_dim)
    cache, _ = prefill(target, tokens(CONTEXT - 70))
    pages = np.arange(cache.full_pages)
    for view in (pages, pages[-9:], pages[1:9], pages[:1]):
        exact = logits_of(target, cache, view_of(target, view))
        error, without = (
            float((logits_of(draft, cache, view_of(draft, seen)) - exact).abs().mean()) for seen in (view, view[:-1])
        )
        assert error < 0.04 * exact.std() and error < 0.7 * without, (view, error, without)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("window", [None, 64, 192])
def test_a_row_has_the_bits_it_has_alone(isa: str, window: int | None, kv_heads: int) -> None:
    """Whatever a tile's queries, and where the rows' windows begin on both sides of a page's edge."""
    changes: dict[str, Any] = {} if window is None else {"family": "mistral", "sliding_window": window}
    target, draft = decoders(num_key_value_heads=kv_heads, **changes)
    cache, _ = prefill(target, tokens(250))
    rows = 12
    for view in (None, view_of(draft, [0, 2])):
        cache.drop_tail()
        alone = []
        for row, token in enumerate(tokens(rows, 5)):
            segment = Segment(DraftTree.chain([int(token)]), cache, view, tuple(range(row)))
            alone.append(draft.forward([segment]).logits)
        for count in (2, 3, 5, rows):
            assert torch.equal(logits_of(draft, cache, view, count), torch.cat(alone[:count])), count


def test_threads_change_no_bit(isa: str) -> None:
    found = []
    for threads in (1, 2, 5):
        target, draft = decoders(threads)
        cache, _ = prefill(target, tokens(CONTEXT - 70))
        view = view_of(target, np.arange(1, cache.full_pages))
        found.append((logits_of(draft, cache, view), logits_of(draft, cache)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_the_largest_bytes_do_not_saturate(isa: str) -> None:
    """Quants of 127 in every lane, and equal weights."""
    target, draft = decoders(head_dim=64)
    cache, _ = prefill(target, tokens(300))
    pool: Any = cache.pool
    for layer in range(target.spec.layers):
        for head in range(target.spec.kv_heads):
            for page in cache.pages[: cache.full_pages]:
                keys, values = pool.native.block(layer, head, int(page)).view(np.uint16).reshape(2, -1)
                keys[:] = 0x4040  # 3, by which all lanes have one score
                values[:] = 0x4000  # 2
                values.reshape(32, 64, 2)[:, ::3] = 0xC000  # -2
    exact, found = logits_of(target, cache), logits_of(draft, cache)
    assert (found - exact).abs().mean() < 0.02 * exact.std()


def test_copies_change_no_bit_by_what_was_read_before() -> None:
    target, draft = decoders()
    cache, _ = prefill(target, tokens(CONTEXT - 70))
    rng = np.random.default_rng(0)
    pages = cache.full_pages
    for count in (2, 3, 2, 4, 1, pages, 3, 2):
        lists = target.spec.layers * target.spec.kv_heads
        view = view_of(target, [np.sort(rng.choice(pages, count, replace=False)) for _ in range(lists)])
        fresh, _ = prefill(target, tokens(CONTEXT - 70))
        assert torch.equal(logits_of(draft, cache, view), logits_of(draft, fresh, view))
    assert torch.equal(logits_of(draft, cache), logits_of(draft, fresh))


def test_a_page_that_another_text_took_is_copied_anew() -> None:
    target, draft = decoders()
    cache, _ = prefill(target, tokens(200))
    pool = cache.pool
    before = logits_of(draft, cache)
    other = cache.fork()
    assert torch.equal(logits_of(draft, other), before)
    other.release()
    cache.release()
    again = KVCache(pool, CONTEXT)
    target.forward([Segment(DraftTree.chain(tokens(200, 9)), again, causal=True)], [])
    again.commit(range(200))
    fresh, _ = prefill(target, tokens(200, 9))
    assert torch.equal(logits_of(draft, again), logits_of(draft, fresh))
    assert not torch.equal(logits_of(draft, again), before)


def test_a_text_of_less_than_a_page_has_nothing_to_copy() -> None:
    target, draft = decoders()
    cache, _ = prefill(target, tokens(20))
    assert torch.equal(logits_of(draft, cache), logits_of(target, cache))


def test_sequences_in_one_draft_pass_have_the_bits_of_each_alone() -> None:
    target, draft = decoders()
    first, _ = prefill(target, tokens(200))
    second = KVCache(first.pool, CONTEXT)
    target.forward([Segment(DraftTree.chain(tokens(140, 9)), second, causal=True)], [])
    second.commit(range(140))
    chain = DraftTree.chain(tokens(3, 5))
    view = view_of(target, [1])
    together = draft.forward([Segment(chain, first, view), Segment(chain, second)]).logits
    for cache in (first, second):
        cache.drop_tail()
    assert torch.equal(together[:3], logits_of(draft, first, view)) and torch.equal(
        together[3:], logits_of(draft, second)
    )


def test_only_a_draft_over_a_bf16_cache_reads_copies() -> None:
    config = config_of()
    packed = NativeWeights(
        ModelSpec.from_config(config), weights_of(tiny_model(config, torch.float32)), torch.float32, 2
    )
    rope = rope_tables(config, CONTEXT)
    assert not NativeDecoder(packed, rope, torch.bfloat16, int8_pages=True).int8_pages
    for kind in (torch.float32, torch.int8):
        target, draft = (NativeDecoder(packed, rope, kind, draft=draft, int8_pages=True) for draft in (False, True))
        cache, _ = prefill(target, tokens(200))
        assert torch.equal(logits_of(draft, cache), logits_of(target, cache))
        pool: Any = cache.pool
        assert pool.native.copy(0, 0, int(cache.pages[0])) is None


@pytest.mark.parametrize(
    ("kv_dtype", "kv", "copies"), [("bf16", "auto", True), ("bf16", "own", False), ("fp32", "auto", False)]
)
def test_who_reads_copies(tiny_folder: Path, kv_dtype: str, kv: str, copies: bool) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="bf16", kv_dtype=kv_dtype, engine="native")
    model: Any = swift.executor.self_draft(rope_tables(swift.checkpoint.config, 64), "auto", kv)
    assert model.int8_pages == copies


def test_copies_that_cannot_be_are_refused(tiny_folder: Path) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="bf16", kv_dtype="fp32", engine="native")
    rope = rope_tables(swift.checkpoint.config, 64)
    with pytest.raises(UserError, match=r"draft_kv: 'int8' is not allowed; copies are made of a bf16 cache only"):
        swift.executor.self_draft(rope, "auto", "int8")
    with pytest.raises(UserError, match=r"draft_kv: 'fp8' is not allowed; one of auto, own, int8"):
        swift.executor.self_draft(rope, "auto", "fp8")
    other = TokenSwift.from_pretrained(str(tiny_folder), dtype="bf16", engine="torch")
    with pytest.raises(UserError, match=r"draft_kv: 'int8' is not allowed; with engine torch only own"):
        other.executor.self_draft(rope, "auto", "int8")
