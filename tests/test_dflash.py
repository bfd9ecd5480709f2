"""DFlash drafts: their arithmetic, the window, the folders they come from; they change no token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_config, tiny_model
from random_dflash import BLOCK, KV_HEADS, MASK, ROPE, config_for, random_dflash
from random_eagle import save_eagle
from recorded_drafts import Recorded
from samplings import PROMPT, samplers
from scripted import write
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.drafters.base import Resources, for_run
from tokenswift_py.drafters.dflash import DFlash
from tokenswift_py.drafters.dflash_layers import DFlashLayers, read_dflash, usual_ids
from tokenswift_py.options import Options
from tokenswift_py.sampling.reference import Sampler

V = 61


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    """The model of `tiny_decoder`, by transformers."""
    return tiny_model(tiny_config())


def embedding_of(model: Any) -> torch.Tensor:
    return model.weights["model.embed_tokens.weight"]


def dense(layers: DFlashLayers, model: Any, text: Sequence[int], window: int) -> torch.Tensor:
    """[BLOCK - 1, V] logits of the block after a text, by the published rules: in double, at the text's own positions,
    with what transformers' model reports, and its LM head."""
    s, t = layers.shape, {name: tensor.double() for name, tensor in layers.tensors.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return t[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + s.eps).sqrt()

    def turned(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(-1, (2, -1))  # first and second halves are the parts of complex numbers
        angles = at[:, None] * ROPE["rope_theta"] ** (-torch.arange(x.shape[-1], dtype=torch.double) / x.shape[-1])
        return torch.complex(x[:, :, 0], x[:, :, 1]) * torch.polar(torch.ones_like(angles), angles)[:, None]

    reported = model(torch.tensor([list(text[:-1])]), output_hidden_states=True).hidden_states
    joined = torch.cat([reported[tap][0].double() for tap in s.taps], 1)
    rows = norm(joined @ t["fc.weight"].T, "hidden_norm")[-window:]
    at = torch.arange(len(text) - 1 - len(rows), len(text) - 1 + s.block).double()
    x = layers.embedding[[text[-1], *[MASK] * (s.block - 1)]].double()
    for layer in range(s.layers):
        part = f"layers.{layer}."
        y = norm(x, f"{part}input_layernorm")
        q = norm((y @ t[f"{part}self_attn.q_proj.weight"].T).view(len(y), s.heads, -1), f"{part}self_attn.q_norm")
        both = torch.cat([rows, y])
        k, v = ((both @ t[f"{part}self_attn.{c}_proj.weight"].T).view(len(both), KV_HEADS, -1) for c in "kv")
        keys = turned(norm(k, f"{part}self_attn.k_norm"), at)
        queries = turned(q, at[-s.block :]).view(s.block, KV_HEADS, -1, s.head_dim // 2)
        scores = torch.einsum("qhgd,khd->hgqk", queries, keys.conj()).real * s.head_dim**-0.5
        mixed = torch.einsum("hgqk,khd->qhgd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ t[f"{part}self_attn.o_proj.weight"].T
        y = norm(x, f"{part}post_attention_layernorm")
        gate, up = (y @ t[f"{part}mlp.{c}_proj.weight"].T for c in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ t[f"{part}mlp.down_proj.weight"].T
    return norm(x[1:], "norm") @ model.lm_head.weight.double().T


class RecordedDFlash(Recorded, DFlash):
    pass


@pytest.mark.parametrize("window", [1000, 24])
@torch.inference_mode()
def test_blocks_are_those_of_the_published_rules(tiny_decoder: Any, hugging_face: Any, window: int) -> None:
    """Every block of a text: after the prompt, which is read in chunks, after accepted rows and after dropped ones."""
    layers = random_dflash(embedding_of(tiny_decoder))
    drafter = RecordedDFlash(layers, window, width=1)
    params = SamplingParams(temperature=3.0, seed=3)
    _, loop, _ = write(tiny_decoder, PROMPT, 100, params, drafter, draft_tokens=9, prefill_chunk=7)
    assert 10 < loop.stats.num_accepted_draft_tokens < loop.stats.num_draft_tokens - 10
    sampler = Sampler(params, V)
    for text, drafted in drafter.seen[::6]:
        assert drafted[0] == text[-1]
        assert len(drafted) == BLOCK or len(text) + BLOCK > len(PROMPT) + 100
        logits = dense(layers, hugging_face, text, window)
        for step, token in enumerate(drafted[1:]):
            assert token == sampler.choose(logits[step], History([*text, *drafted[1 : 1 + step]]))


def test_the_window_bounds_what_is_kept(tiny_decoder: Any) -> None:
    drafter = DFlash(random_dflash(embedding_of(tiny_decoder)), 24)
    write(tiny_decoder, PROMPT * 4, 150, SamplingParams(temperature=1.0), drafter, draft_tokens=4)
    for window in drafter.windows:
        assert len(window) == 24
        assert window.keys.untyped_storage().nbytes() == window.keys.numel() * 4
    assert len(drafter.layers.cos) == 256, "no position is that of the text"


@settings(max_examples=8, deadline=None)
@given(
    params=samplers,
    seed=st.integers(0, 20),
    window=st.sampled_from([1, 30, 500]),
    size=st.none() | st.integers(1, 12),
    chunk=st.integers(1, 80),
    count=st.integers(1, 90),
)
def test_dflash_changes_no_token(
    tiny_decoder: Any, native_decoder: Any, params: SamplingParams, seed: int, window: int, size: int | None,
    chunk: int, count: int,
) -> None:  # fmt: skip
    embedding = embedding_of(tiny_decoder)
    for model in (tiny_decoder, native_decoder):
        plain, _, _ = write(model, PROMPT, count, params)
        drafter = DFlash(random_dflash(embedding, seed=seed), window)
        drafted, loop, _ = write(model, PROMPT, count, params, drafter, draft_tokens=size, prefill_chunk=chunk)
        assert drafted == plain
        assert loop.cache.pool.in_use == 0


@pytest.fixture
def checkpoint(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    return open_checkpoint(str(tiny_folder))


def test_a_folder_is_read_and_drafts(tiny_swift: TokenSwift, checkpoint: Checkpoint, tmp_path: Path) -> None:
    layers = random_dflash(checkpoint.tensors()["model.embed_tokens.weight"])
    folder = save_eagle(tmp_path / "draft", config_for(layers), layers.tensors)
    found = read_dflash(folder, checkpoint)
    assert found.shape.taps == layers.shape.taps and found.shape.mask == MASK and found.shape.block == BLOCK
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in layers.tensors.items())
    made = [
        for_run(Options(drafter=name, draft_heads=str(folder), draft_budget=64), Resources(checkpoint))
        for name in ("dflash", "heads", "auto")
    ]
    assert all(isinstance(drafter, DFlash) and drafter.window == 64 for drafter in made)
    asked: dict[str, Any] = {"max_new_tokens": 90, "seed": 5, "temperature": 1.2, "draft_tokens": 4}
    plain = tiny_swift.generate("the cat", drafter="none", ignore_eos=True, **asked)
    drafted = tiny_swift.generate("the cat", draft_heads=str(folder), ignore_eos=True, **asked)
    assert drafted.tokens == plain.tokens
    assert drafted.report["drafter"] == "dflash" and drafted.report["num_draft_tokens"] > 0


def test_the_authors_layers() -> None:
    """Those that the configs of published drafts name for models of 36 layers."""
    assert usual_ids(36, 5) == [1, 9, 17, 25, 33]
    assert usual_ids(40, 1) == [20]


def test_other_folders_are_refused_in_one_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    layers = random_dflash(checkpoint.tensors()["model.embed_tokens.weight"])
    config, own = config_for(layers), config_for(layers)["dflash_config"]
    norm = "layers.1.self_attn.q_norm.weight"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"fc.weight": torch.zeros(48, 48)}, "tensor fc.weight: (48, 48) is not allowed; it must be (48, 96)"),
        ({}, {norm: None}, f"tensor {norm}: None"),
        ({}, {"lm_head.weight": torch.zeros(61, 48)}, "no draft of this config has it"),
        ({"num_hidden_layers": 1}, {}, "no draft of this config has it"),
        ({"hidden_size": 64}, {}, "hidden_size: 64 is not allowed; the model's is 48"),
        ({"block_size": 1}, {}, "block_size: 1"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, {}, "only full_attention"),
        ({"dflash_config": {}}, {}, "mask_token_id: None"),
        ({"dflash_config": {**own, "mask_token_id": 10**6}}, {}, "mask_token_id: 1000000"),
        ({"dflash_config": {**own, "target_layer_ids": [0, 2]}}, {}, "2 that ascend, of 0 to 2"),
        ({"dflash_config": {**own, "target_layer_ids": "last"}}, {}, "target_layer_ids: 'last'"),
        ({"dflash_config": {**own, "projector_type": "domino"}}, {}, "projector_type: 'domino'"),
        ({"dflash_config": {**own, "shift_label": True}}, {}, "shift_label: True"),
        ({"hidden_act": "gelu"}, {}, "hidden_act: 'gelu'"),
    ]  # fmt: skip
    for number, (changes, others, says) in enumerate(cases):
        held = {name: tensor for name, tensor in {**layers.tensors, **others}.items() if tensor is not None}
        folder = save_eagle(tmp_path / str(number), {**config, **changes}, held)
        with pytest.raises(UserError) as error:
            read_dflash(folder, checkpoint)
        assert says in str(error.value) and "\n" not in str(error.value), str(error.value)
    says = "for drafter eagle a folder whose config.json is an EAGLE-3 draft's"
    with pytest.raises(UserError, match=says):
        for_run(Options(drafter="eagle", draft_heads=str(folder)), Resources(checkpoint))
    with pytest.raises(UserError, match="the folder of a DFlash draft"):
        for_run(Options(drafter="dflash"), Resources(checkpoint))
