"""The backends on flash-attn and xformers, whose functions need a GPU: here stand-ins compute what is documented of
them, naively, so that packing, cutting at windows and merging are what is tested. Nothing here runs a vendor's code."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from scenes import Scene, ladder, new_pool, prefilled, random_tree, random_view
from tokenswift_py import registry
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.errors import UserError
from tokenswift_py.kernels import flash, xformers
from tokenswift_py.kernels._prefix import PrefixAndTail, merge
from tokenswift_py.models.devices import check_attention


def documented(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [batch, rows, heads, head_dim], k, v: [batch, keys, heads, head_dim]; out like q, lse [batch, heads, rows]."""
    assert q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape and k.stride(-1) == v.stride(-1) == 1
    assert q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and k.shape[1] > 0
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    scores = (scores / softcap).tanh() * softcap if softcap else scores
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float())
    return out.to(q.dtype), scores.logsumexp(-1)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    causal: bool,
    return_softmax_lse: bool,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-in by the docstring of flash-attn 2.8, without a page table and cache_seqlens: all keys count."""
    assert not causal and return_softmax_lse
    assert q.dtype in (torch.bfloat16, torch.float16), "FlashAttention only supports fp16 and bf16"
    return documented(q, k_cache, v_cache, softcap)


def memory_efficient_attention_partial(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-in by the docstrings of xformers 0.0.35; some of its kernels pad the rows of the log-sum-exp."""
    out, lse = documented(query, key, value)
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    num_splits: int = 1,
    return_lse: bool = False,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-in by docstring and assertions of flash-attn 4.0.0b36, in the layout (batch, seqlen, heads, hdim)."""
    assert return_lse and q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    if page_table is None:
        return documented(q, k, v, softcap)
    assert k.shape == v.shape and k.is_contiguous() and v.is_contiguous()  # or the whole pool would be copied
    assert page_table.dtype == torch.int32 and page_table.stride(-1) == 1 and len(page_table) == len(q)
    assert seqused_k is not None and seqused_k.dtype == torch.int32 and seqused_k.shape == (len(q),)
    runs = [
        [x[table.long()].flatten(0, 1)[:used] for x in (k, v)]
        for table, used in zip(page_table, seqused_k.tolist(), strict=True)
    ]
    keys, values = (torch.stack(x) for x in zip(*runs, strict=True))
    return documented(q, keys, values, softcap)


FLASH, FLASH4, FLASH4_UNPAGED, XFORMERS = (
    flash.with_kvcache(flash_attn_with_kvcache),
    flash.with_varlen(flash_attn_varlen_func, 9),
    flash.with_varlen(flash_attn_varlen_func, 8),
    xformers.with_function(memory_efficient_attention_partial),
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        (XFORMERS, torch.float32, 2e-6),
        (XFORMERS, torch.bfloat16, 2e-2),
        (FLASH, torch.bfloat16, 2e-2),
        (FLASH4, torch.bfloat16, 2e-2),
        (FLASH4, torch.float16, 4e-3),
        (FLASH4_UNPAGED, torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize("prefix", [0, 63, 64, 200])
@pytest.mark.parametrize("window", [None, 5, 100])
def test_prefix_and_tail_merge_to_the_whole(
    backend: PrefixAndTail, dtype: torch.dtype, tolerance: float, prefix: int, window: int | None
) -> None:
    """Every lane that is not written is NaN."""
    rng = np.random.default_rng(prefix)
    for tree, causal in (
        (DraftTree.chain([0]), False),
        (random_tree(rng, 9), False),
        (DraftTree.chain([0] * 80), True),
    ):
        cache = prefilled(new_pool(2, 16, dtype), prefix)
        Scene.of([Segment(tree, cache, causal=causal)], 3).agree(window, tolerance, backend)
        cache.drop_tail()
        Scene.of([Segment(tree, cache, random_view(rng, cache, 2), causal=causal)], 3).agree(window, tolerance, backend)


@pytest.mark.parametrize("window", [None, 40, 90])
def test_a_lone_sequence_is_read_in_place(window: int | None) -> None:
    pool = new_pool(2, 16, torch.float32)
    pool._free.sort(reverse=True)
    scene = Scene.of([Segment(ladder(3), prefilled(pool, 200))], 3)
    scene.agree(window, 2e-6, XFORMERS)
    storages = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        storages.extend([k.untyped_storage().data_ptr(), v.untyped_storage().data_ptr()])
        return memory_efficient_attention_partial(q, k, v)

    scene.agree(window, 2e-6, xformers.with_function(spy))
    pools = {part.untyped_storage().data_ptr() for part in (pool.keys, pool.values)}
    assert set(storages) == pools


@pytest.mark.parametrize("window", [None, 90])
def test_pages_are_read_where_they_lie(window: int | None) -> None:
    """flash-attn 4: scattered pages, and those of a view, go in as a table into the layer's pool; none is copied."""
    cache = prefilled(new_pool(2, 16, torch.bfloat16), 200)
    tables, storages = [], set()

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> Any:
        storages.update({k.untyped_storage().data_ptr(), v.untyped_storage().data_ptr()})
        tables.append(more["page_table"])
        return flash_attn_varlen_func(q, k, v, **more)

    Scene.of([Segment(ladder(3), cache)], 3).agree(window, 2e-2, flash.with_varlen(spy, 10))
    assert storages == {part.untyped_storage().data_ptr() for part in (cache.pool.keys, cache.pool.values)}
    whole = cache.pages[0 if window is None else 2 : 3]  # of the window's edge no page is seen whole
    for table in tables:
        assert (table % cache.pool.keys.shape[2]).tolist() == [whole.tolist()] * 2


@pytest.mark.parametrize(
    ("capability", "installed", "name"),
    [(9, "24", "flash-2"), (10, "24", "flash-4"), (12, "24", "flash-2"), (9, "4", "flash-4"), (10, "2", "flash-2"),
     (9, "2old", "flash-2"), (10, "2old", "flash-2"), (9, "old", None)],
)  # fmt: skip
def test_which_flash_attention_is_taken(
    capability: int, installed: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flash-attn 4 first where it splits keys, 2 first elsewhere, the other where only that is there. flash-attn 2.8
    brings an early flash_attn.cute without page tables."""
    two, four = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    if "2" in installed:
        two.flash_attn_with_kvcache = flash_attn_with_kvcache
    if "4" in installed:
        four.flash_attn_varlen_func = flash_attn_varlen_func
    if "old" in installed:
        four.flash_attn_varlen_func = lambda q, k, v, seqused_k=None: None
    two.cute = four
    monkeypatch.setitem(sys.modules, "flash_attn", two)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", four)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    if name is not None:
        assert flash.create().name == name
    else:
        with pytest.raises(UserError, match=r"py\[flash4\]' for 4 .*has no num_splits, page_table, return_lse"):
            flash.create()


@pytest.mark.parametrize("backend", [FLASH, FLASH4, FLASH4_UNPAGED])
@pytest.mark.parametrize("window", [None, 100])
def test_prefix_and_tail_are_capped_alike(backend: PrefixAndTail, window: int | None) -> None:
    cache = prefilled(new_pool(2, 16, torch.bfloat16), 200)
    Scene.of([Segment(ladder(3), cache)], 3).agree(window, 2e-2, backend, cap=0.7)


def test_merging_weighs_by_mass() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    even, none = torch.tensor([0.0]), torch.tensor([-torch.inf])
    assert merge(a, even, b, even).tolist() == [[0.5, 0.5]]
    assert merge(a, even, b, none).tolist() == [[1.0, 0.0]]
    far = merge(a, torch.tensor([1000.0]), b, torch.tensor([1000.0]) + float(np.log(3)))
    torch.testing.assert_close(far, torch.tensor([[0.25, 0.75]]), rtol=1e-4, atol=0)


def test_types_that_flash_attention_does_not_compute_in_are_refused() -> None:
    cache = prefilled(new_pool(2, 16, torch.float32), 100)
    with pytest.raises(UserError, match="dtype: 'float32' is not allowed; attention flash"):
        Scene.of([Segment(DraftTree.chain([0]), cache)], 3).agree(backend=FLASH)


@pytest.mark.parametrize(("name", "package"), [("flash", "flash_attn"), ("xformers", "xformers"), ("triton", "triton")])
def test_a_backend_that_is_not_installed_says_how_it_would_be(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name in registry.names("tokenswift_py.kernels")
    if importlib.util.find_spec(package):
        for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"attention: '{name}' .*pip install 'tokenswift-py\[{name}\]'"):
        registry.create("tokenswift_py.kernels", "BACKEND", "attention", name)


def test_on_a_cpu_they_are_refused() -> None:
    for name in ("flash", "xformers"):
        with pytest.raises(UserError, match=f"attention: '{name}' is not allowed; its kernels need a GPU"):
            check_attention(name, torch.device("cpu"))
        check_attention(name, torch.device("cuda"))
    check_attention("sdpa", torch.device("cpu"))
