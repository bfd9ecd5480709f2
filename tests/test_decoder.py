"""The torch executor computes what Hugging Face's own models compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from conftest import PLAIN, decoder_of, tiny_config, tiny_model
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.errors import UserError
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.spec import ModelSpec

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}  # fmt: skip


def tokens(count: int, vocab: int = 61, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, count).astype(np.int32)


def chunked_logits(decoder: Any, ids: np.ndarray, chunks: list[int]) -> torch.Tensor:
    cache, logits, start = decoder.new_cache(), [], 0
    for size in [*chunks, len(ids) - sum(chunks)]:
        chunk = DraftTree.chain(ids[start : start + size])
        logits.append(decoder.forward([Segment(chunk, cache, causal=True)]).logits)
        cache.commit(range(size))
        start += size
    return torch.cat(logits)


def assert_equals_hf(model: Any, count: int, context: int = 512) -> None:
    ids = tokens(count)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    for attention in ("sdpa", "naive"):
        got = chunked_logits(decoder_of(model, context, attention), ids, [1, 63, 70])
        assert (got - expected).abs().max() < 1e-3


@pytest.mark.parametrize("rope", ["default", "yarn"])
@pytest.mark.parametrize("family", PLAIN)
def test_every_family_equals_hugging_face(family: str, rope: str) -> None:
    tied = family in ("llama", "qwen2")
    config = tiny_config(family, tie_word_embeddings=tied, rope_parameters=ROPES[rope])
    assert_equals_hf(tiny_model(config, torch.float32), 200)


@pytest.mark.parametrize("rope", ["linear", "llama3"])
def test_every_rope_type_equals_hugging_face(rope: str) -> None:
    assert_equals_hf(tiny_model(tiny_config(rope_parameters=ROPES[rope]), torch.float32), 200)


def test_dynamic_rope_is_hugging_face_at_the_full_context() -> None:
    """HF grows the base with the sequence; ours is frozen at N, so both agree on a pass that fills N."""
    config = tiny_config(rope_parameters=ROPES["dynamic"], max_position_embeddings=128)
    assert_equals_hf(tiny_model(config, torch.float32), 200, context=200)


def test_biases_of_llama_and_mlp() -> None:
    assert_equals_hf(tiny_model(tiny_config(attention_bias=True, mlp_bias=True), torch.float32), 150)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_past_its_width(family: str) -> None:
    changes: dict[str, Any] = {"sliding_window": 70}
    if family != "mistral":
        changes |= {"use_sliding_window": True, "max_window_layers": 1}
    config = tiny_config(family, **changes)
    assert set(ModelSpec.from_config(config).windows) == ({70} if family == "mistral" else {None, 70})
    assert_equals_hf(tiny_model(config, torch.float32), 200)


def test_llama_has_no_window_whatever_its_config_says() -> None:
    config = tiny_config(sliding_window=70)
    assert set(ModelSpec.from_config(config).windows) == {None}
    assert_equals_hf(tiny_model(config, torch.float32), 200)


@pytest.mark.parametrize("width", [0, -1])
def test_a_window_of_no_width_is_refused(width: Any) -> None:
    config = tiny_config("mistral", sliding_window=70)
    config.sliding_window = width
    with pytest.raises(UserError, match="sliding_window"):
        ModelSpec.from_config(config)


def test_tree_rows_equal_the_same_tokens_decoded_one_by_one() -> None:
    decoder = decoder_of(tiny_model(tiny_config(sliding_window=None)))
    prompt = tokens(125)  # the tree crosses the page boundary at 128
    cache = decoder.new_cache()
    decoder.forward([Segment(DraftTree.chain(prompt), cache, causal=True)])
    cache.commit(range(125))
    rng = np.random.default_rng(1)
    parents = np.array([-1] + [int(rng.integers(max(0, i - 4), i)) for i in range(1, 40)], np.int32)
    tree = DraftTree(np.arange(40, dtype=np.int32), parents)
    logits = decoder.forward([Segment(tree, cache)]).logits
    for node in range(40):
        path = tree.path(node)
        alone = decoder.new_cache()
        ids = np.concatenate([prompt, tree.tokens[path]])
        expected = decoder.forward([Segment(DraftTree.chain(ids), alone, causal=True)], [len(ids) - 1]).logits[0]
        assert (logits[node] - expected).abs().max() < 1e-9


def test_draft_steps_on_a_tail_equal_one_pass_and_cannot_be_committed_under_a_view() -> None:
    decoder = decoder_of(tiny_model(tiny_config()))
    prompt, draft = tokens(140), tokens(6, seed=3)
    cache = decoder.new_cache()
    decoder.forward([Segment(DraftTree.chain(prompt), cache, causal=True)])
    cache.commit(range(140))
    whole = decoder.forward([Segment(DraftTree.chain(draft), cache)]).logits
    cache.drop_tail()
    everything = PageView.all(3, 2, 2)
    for view in (None, everything):
        for index, token in enumerate(draft):
            segment = Segment(DraftTree.chain([int(token)]), cache, view, tuple(range(index)))
            assert (decoder.forward([segment]).logits[0] - whole[index]).abs().max() < 1e-9
        if view is None:
            cache.drop_tail()
    with pytest.raises(ValueError, match="partial view"):
        cache.commit(range(6))


def test_several_sequences_in_one_pass() -> None:
    decoder = decoder_of(tiny_model(tiny_config()))
    first = decoder.new_cache()
    decoder.forward([Segment(DraftTree.chain(tokens(100)), first, causal=True)])
    first.commit(range(100))
    second = first.fork()
    trees = [DraftTree.chain(tokens(3, seed=5)), DraftTree.chain(tokens(70, seed=6))]
    alone = []
    for tree in trees:
        alone.append(decoder.forward([Segment(tree, first)]).logits)
        first.drop_tail()
    together = decoder.forward([Segment(tree, cache) for tree, cache in zip(trees, (first, second), strict=True)])
    assert (together.logits - torch.cat(alone)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (tiny_config(hidden_act="gelu"), "hidden_act"),
        (tiny_config("qwen2", layer_types=["full_attention", "linear_attention", "full_attention"]), "layer_types"),
    ],
)
def test_what_is_not_supported_is_named(config: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ModelSpec.from_config(config)
