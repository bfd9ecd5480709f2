"""Soft caps: a score or a logit s is cap * tanh(s / cap), before masks and softmax, on every engine and backend, in
drafts and heads too."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import decoder_of, tiny_config, tiny_model, weights_of
from native_rows import CONTEXT, assert_row_law, extend, prefill, random_tree, tokens
from native_rows import isa as isa
from scenes import Scene, ladder, new_pool, prefilled, random_view
from tokenswift_py import registry
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.drafters.training import Candidates
from tokenswift_py.errors import UserError
from tokenswift_py.kernels import xformers
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.devices import choose_attention
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec, check_caps

REAL = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # of all Gemma 2 models
KERNELS = "tokenswift_py.kernels"


def sharp(**changes: Any) -> Any:
    """A Gemma 2 in fp32 whose scores and logits reach far beyond its caps."""
    config = tiny_config("gemma2", **{**REAL, "max_position_embeddings": CONTEXT, **changes})
    model = tiny_model(config, torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
        model.model.norm.weight.add_(1).mul_(8)
    return model


def spec_of(model: Any, **changes: Any) -> ModelSpec:
    return replace(ModelSpec.from_config(model.config), **changes)


def native(model: Any, dtype: torch.dtype = torch.float32, spec: ModelSpec | None = None, **options: Any) -> Any:
    packed = NativeWeights(spec or spec_of(model), weights_of(model), dtype, 2)
    return NativeDecoder(packed, rope_tables(model.config, CONTEXT), **options)


def in_torch(model: Any, attention: str, spec: ModelSpec | None = None) -> TorchDecoder:
    backend = registry.create(KERNELS, "BACKEND", "attention", attention)
    return TorchDecoder(spec or spec_of(model), weights_of(model), rope_tables(model.config, CONTEXT), backend)


ENGINES: dict[str, Callable[[Any, ModelSpec], Any]] = {
    "native": lambda model, spec: native(model, spec=spec),
    "sdpa": lambda model, spec: in_torch(model, "sdpa", spec),
    "naive": lambda model, spec: in_torch(model, "naive", spec),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_sharp_attention_is_capped_as_transformers_caps_it(engine: str) -> None:
    """Within 1e-3 in fp32; an engine that leaves out a cap, or the scale of queries, is far off. The right values are
    computed in fp64: in fp32, transformers' own are half as far from them as that."""
    model, ids = sharp(), tokens(150)
    with torch.inference_mode():
        expected = deepcopy(model).double()(torch.from_numpy(ids).long()[None]).logits[0]
    assert 29 < expected.abs().max() <= 30

    def error(**changes: Any) -> float:
        decoder = ENGINES[engine](model, spec_of(model, **changes))
        return float((extend(decoder, decoder.new_cache(), ids, [1, 63, 70]) - expected).abs().max())

    assert error() < 1e-3
    for fault in ({"attention_cap": 0.0}, {"logit_cap": 0.0}, {"query_scale": 1.0}, {"attention_cap": 30.0}):
        assert error(**fault) > 0.1, fault


def test_a_cap_is_the_tanh_of_torch(isa: str) -> None:
    """Over sixteen orders of magnitude, to some 1e-7 of the cap, with the cap itself at the ends; a pass's logits and
    those of a drafter's head are made alike."""
    model = sharp()
    capped, plain = native(model), native(model, spec=spec_of(model, logit_cap=0.0))
    rows = torch.randn(17, 48, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-8, 9)[:, None]
    found, logits = capped.project(rows), plain.project(rows).double()
    assert logits.abs().max() > 1e7
    expected = 30 * torch.tanh(logits / 30)
    assert (found.double() - expected).abs().max() < 3e-7 * 30
    assert set(found[-1].abs().tolist()) == {30.0}
    cache, _ = prefill(capped, tokens(70))
    output = capped.forward([Segment(random_tree(1, 20, 0.5), cache)])
    assert torch.equal(capped.project(output.hidden), output.logits)


TYPES = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None), "int8": (torch.int8, None),
         "kv-int8": (torch.bfloat16, torch.int8)}  # fmt: skip


@pytest.mark.parametrize("types", TYPES)
def test_a_rows_bits_are_its_own(isa: str, types: str) -> None:
    """Rows that are gathered, pages that are read in place, and those of a window's edge."""
    dtype, kv_dtype = TYPES[types]
    decoder = native(sharp(), dtype, kv_dtype=kv_dtype)
    assert_row_law(decoder, 60, random_tree(7, 80, 0.06))
    assert_row_law(decoder, 126, random_tree(8, 30, 0.7))


def test_mass_is_that_of_capped_scores_and_changes_no_bit() -> None:
    model = sharp()
    tree, outputs = random_tree(2, 12, 0.5), []
    for decoder in (native(model), in_torch(model, "naive"), in_torch(model, "sdpa")):
        cache, _ = prefill(decoder, tokens(200))
        plain = decoder.forward([Segment(tree, cache)])
        cache.drop_tail()
        outputs.append(decoder.forward([Segment(tree, cache)], want_mass=True))
        assert torch.equal(plain.logits, outputs[-1].logits) or decoder.guarantee == "measured"
    for other in outputs[1:]:
        torch.testing.assert_close(outputs[0].page_mass, other.page_mass, atol=1e-4, rtol=0)


def test_drafts_over_int8_copies_are_capped(isa: str) -> None:
    """Near to what the target computes, where a draft without the cap is not; a row's bits are its own there, too."""
    model = sharp()
    target, tree = native(model, kv_dtype=torch.bfloat16), DraftTree.chain(tokens(3, 5))
    cache, _ = prefill(target, tokens(300))
    view = PageView(np.broadcast_to(np.arange(4, dtype=np.int32), (3, 2, 4)))

    def logits(decoder: NativeDecoder, rows: DraftTree = tree) -> torch.Tensor:
        found = decoder.forward([Segment(rows, cache, view)]).logits
        cache.drop_tail()
        return found

    draft = {"kv_dtype": torch.bfloat16, "draft": True, "int8_pages": True}
    expected, found = logits(target), logits(native(model, **draft))
    uncapped = logits(native(model, spec=spec_of(model, attention_cap=0.0), **draft))
    assert torch.equal(logits(native(model, **draft), DraftTree.chain(tokens(3, 5)[:1])), found[:1])
    errors = [(other - expected).pow(2).mean() for other in (found, uncapped)]
    assert errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize("scheme", ["self-extend", "log-extend", "yarn"])
def test_far_keys_are_met_under_the_cap(scheme: str) -> None:
    """Beyond the trained length, where queries are moved for blocks of keys."""
    model, ids = sharp(max_position_embeddings=256), tokens(450)
    tables = rope_tables(model.config, 512, Positions(scheme))
    one = NativeDecoder(NativeWeights(spec_of(model), weights_of(model), torch.float32, 2), tables)
    found = extend(one, one.new_cache(), ids, [200])
    other = decoder_of(model, rope=tables)
    assert (found - extend(other, other.new_cache(), ids, [200])).abs().max() < 5e-3
    assert_row_law(one, 400, random_tree(3, 20, 0.3))


@pytest.mark.parametrize("window", [None, 40])
def test_sdpa_caps_scores_as_the_textbook_does(window: int | None) -> None:
    torch.manual_seed(0)
    cache = prefilled(new_pool(2, 16), 200)
    for view in (None, random_view(np.random.default_rng(0), cache, 2)):
        Scene.of([Segment(ladder(3), cache, view)], 3).agree(window, cap=0.7)
        cache.drop_tail()
    scene, sdpa = Scene.of([Segment(ladder(3), cache)], 3), registry.create(KERNELS, "BACKEND", "attention", "sdpa")
    assert (scene.attend(sdpa, 0, window)[0] - scene.attend(sdpa, 0, window, 0.7)[0]).abs().max() > 0.1


def test_attention_without_a_cap_refuses_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """And `auto` goes on to one that has it."""
    spec = spec_of(sharp())
    says = r"^attention: 'xformers' is not allowed; it has no soft cap of scores"
    with pytest.raises(UserError, match=says + r" \(gemma2\); sdpa, flash and triton have one$"):
        check_caps(spec, "xformers")
    for attention in ("naive", "sdpa", "flash", "triton"):
        check_caps(spec, attention)
    check_caps(replace(spec, attention_cap=0.0), "xformers")
    scene = Scene.of([Segment(ladder(1), prefilled(new_pool(2, 16, torch.float32), 70))], 3)
    with pytest.raises(UserError, match=says):
        scene.attend(xformers.with_function(None), 0, None, 2.0)
    cuda, installed = torch.device("cuda"), ["xformers"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    assert choose_attention(cuda, spec) == "sdpa"
    assert choose_attention(cuda, replace(spec, attention_cap=0.0)) == "xformers"
    installed.append("flash_attn")
    assert choose_attention(cuda, spec) == "flash"


def test_heads_learn_under_the_cap_of_the_logits_that_they_guess() -> None:
    """The loss is the cross entropy of capped logits, where every token is a candidate."""
    numbers = torch.Generator().manual_seed(0)
    head, states = 4 * torch.randn(40, 16, generator=numbers), torch.randn(5, 16, generator=numbers)
    likely = torch.arange(20).reshape(5, 4)
    chances = torch.full((5, 4), 0.25)
    logits = (states.bfloat16() @ head.bfloat16().T).float()
    for cap in (0.0, 5.0):
        wanted = 5 * torch.tanh(logits / 5) if cap else logits
        expected = -(wanted.log_softmax(-1).gather(-1, likely).mean(-1)).mean()
        found = Candidates(head, likely, torch.arange(40), numbers, cap).loss(states, likely, chances)
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
