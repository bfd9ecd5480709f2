"""The study of a middle tier: pages are rounded where keys and values lie, and choices are compared row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import middle_tier
from experiment_runs import runner
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.models.executors import NativeExecutor
from tokenswift_py.models.rope import rope_tables


@pytest.mark.parametrize("axis", [-1, -2])
def test_values_are_rounded_to_even_distances_along_the_axis(axis: int) -> None:
    x = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    rounded = middle_tier.nearest(x, 2, axis).movedim(axis, -1)
    low, high = x.movedim(axis, -1).aminmax(dim=-1, keepdim=True)
    levels = torch.stack([low + (high - low) * i / 3 for i in range(4)], -1)
    error, at = (x.movedim(axis, -1)[..., None] - levels).abs().min(-1)
    assert (rounded - levels.expand(*rounded.shape, 4).gather(-1, at[..., None])[..., 0]).abs().max() < 5e-3
    assert ((rounded - x.movedim(axis, -1)).abs() - error).abs().max() < 5e-3
    assert (middle_tier.nearest(x, 8, axis) - x).abs().max() < 0.02
    assert torch.equal(middle_tier.nearest(torch.full((2, 4), 0.5), 4, -1), torch.full((2, 4), 0.5))


@pytest.mark.parametrize(("keys", "axis"), [("by channel", -2), ("by token", -1)])
def test_the_engine_reads_the_rounded_keys_and_values(tiny_folder: Path, keys: str, axis: int) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", threads=1)
    model: Any = swift.executor.model(rope_tables(swift.checkpoint.config, 256))
    cache = model.new_cache()
    model.forward([Segment(DraftTree.chain(list(range(3, 3 + PAGE_SIZE))), cache, causal=True)], [])
    cache.commit(range(PAGE_SIZE))
    spec, pool, place = swift.checkpoint.spec, cache.pool, cache.pages[:1].copy()

    def read() -> torch.Tensor:
        return torch.stack([pool.page_keys(layer, place) for layer in range(spec.layers)])  # [layers, heads, 1, 64, d]

    def values() -> Any:
        """The values as fp32 pages have them: behind the keys, token by token, channels padded to 16."""
        block = pool.dump(int(place[0])).view(np.float32).reshape(spec.layers * spec.kv_heads, 2, PAGE_SIZE, 16)
        return block[:, 1, :, : spec.head_dim], block[:, 1, :, spec.head_dim :]

    before, own = read(), torch.from_numpy(values()[0].copy())
    pool.restore(int(place[0]), middle_tier.few_bits(pool.dump(int(place[0])), spec, 3, keys))
    found = read()
    assert torch.allclose(found, middle_tier.nearest(before, 3, axis), atol=1e-6) and not torch.equal(found, before)
    rounded, padding = values()
    assert np.allclose(rounded, middle_tier.nearest(own, 3, -1), atol=1e-6) and not np.allclose(rounded, own, atol=1e-3)
    assert not padding.any()
    pool.move(cache.slots(np.array([5], np.int32)), cache.slots(np.array([9], np.int32)))
    assert np.array_equal(values()[0][:, 9], rounded[:, 5]), "a token's values lie where the test looks for them"


def test_choices_are_the_tokens_that_plain_decoding_writes(tiny_folder: Path) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", threads=1)
    settings = {"temperature": 0.8, "min_p": 0.05, "seed": 3}
    with swift.stream(
        "the cat", raw=True, drafter="none", max_new_tokens=60, ignore_eos=True, top_p=1.0, **settings
    ) as text:
        for _ in text:
            pass
        tokens, sampling = [*text.run.prompt, *text.tokens], text.run.sampling
    model: Any = swift.executor.model(rope_tables(swift.checkpoint.config, 256))
    sampler = swift.executor.sampler(sampling, swift.checkpoint.spec.vocab_size)
    logits = model.forward([Segment(DraftTree.chain(tokens), model.new_cache(), causal=True)]).logits
    first = len(tokens) - 60
    assert middle_tier.choices(sampler, tokens, first, logits[first:])[:-1] == tokens[first + 1 :]


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    flags = ["--workloads", "docs", "--lengths", "256", "--new", "96"]
    return runner(middle_tier, tiny_folder, tmp_path, monkeypatch, *flags)


def test_fewer_bits_agree_less_and_read_less(run: Any, tmp_path: Path) -> None:
    rows = {(row["bits"], row["keys"]): row for row in run("--bits", "8,1")}
    assert set(rows) == {(16, None), *((bits, keys) for bits in (8, 1) for keys in middle_tier.KEYS)}
    for keys in middle_tier.KEYS:
        chain = [rows[16, None], rows[8, keys], rows[1, keys]]
        assert chain[0]["agreement"] >= 0.9 and chain[2]["agreement"] < chain[0]["agreement"]
        assert chain[0]["read_of_whole"] > chain[1]["read_of_whole"] > chain[2]["read_of_whole"]
    assert np.isclose(rows[8, "by channel"]["agreement"], rows[16, None]["agreement"], atol=0.05)
    assert (tmp_path / "middle_tier.png").read_bytes().startswith(b"\x89PNG")


def test_with_the_models_own_weights_the_copy_as_it_was_agrees_always(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So rows that follow are copied into it where they belong."""
    made = NativeExecutor.self_draft
    monkeypatch.setattr(
        NativeExecutor, "self_draft", lambda self, rope, weights, *more: made(self, rope, "bf16", *more)
    )
    assert {row["bits"]: row["agreement"] for row in run("--bits", "1")}[16] == 1


def test_what_cannot_be_measured_is_refused(run: Any) -> None:
    for flags, says in [
        (["--lengths", "250"], "lengths: 250 is not allowed; a multiple of 64"),
        (["--bits", "9"], "bits: 9 is not allowed"),
        (["--new", "100"], "new: 100 is not allowed"),
        (["--new", "0"], "new: 0 is not allowed"),
        (["--lengths", "0"], "lengths: 0 is not allowed"),
        (["--workloads", "story"], "workloads: 'story' is not allowed"),
    ]:
        with pytest.raises(UserError, match=says):
            run(*flags)
