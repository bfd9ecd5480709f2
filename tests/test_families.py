"""Every family computes what transformers computes, on both engines; keeps the row law; is written the same however it
is drafted; and is read from files as it was written there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAMILIES, decoder_of, tiny_config, tiny_model
from native_rows import CONTEXT, assert_row_law, extend, native_of, random_tree, tokens
from samplings import PROMPT
from scripted import Scripted, write
from tokenswift_py.core import SamplingParams
from tokenswift_py.drafters.base import create
from tokenswift_py.models.spec import ModelSpec

pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the native engine is not built")

# What differs among the models of a family, by the family.
CASES: dict[str, dict[str, Any]] = {
    "smollm3": {},
    "smollm3, tied, biases, windows where nothing rotates": {
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "use_sliding_window": True,
        "sliding_window": 40,
    },
    "smollm3, every fourth layer, yarn": {
        "no_rope_layers": None, "num_hidden_layers": 5,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
                            "original_max_position_embeddings": 128},
    },
}  # fmt: skip


def config_of(case: str, **changes: Any) -> Any:
    sizes = {"max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 2}
    return tiny_config(case.partition(",")[0], **{**sizes, **CASES[case], **changes})


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    """In fp32, over several pages, in chunks, on both engines."""
    config = config_of(case)
    model = tiny_model(config, torch.float32)
    ids = tokens(200)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids).long()[None]).logits[0]
    for decoder in (decoder_of(model), decoder_of(model, attention="naive"), native_of(config, torch.float32)):
        found = extend(decoder, decoder.new_cache(), ids, [1, 63, 70])
        assert (found - expected).abs().max() < 1e-3, decoder.numerics


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("case", CASES)
def test_a_rows_bits_are_its_own(case: str, dtype: torch.dtype) -> None:
    """Whatever else is in the pass, on any number of threads."""
    decoder = native_of(config_of(case), dtype, threads=3)
    assert_row_law(decoder, 60, random_tree(7, 40, 0.2))
    assert_row_law(decoder, 126, random_tree(8, 30, 0.7))


@pytest.mark.parametrize("case", CASES)
def test_drafting_changes_no_token(case: str) -> None:
    decoder = native_of(config_of(case))
    params = SamplingParams(temperature=0.9, seed=8)
    plain, _, _ = write(decoder, PROMPT, 90, params)
    assert len(set(plain)) > 10
    assert write(decoder, PROMPT, 90, params, Scripted(PROMPT + plain, 61, 0.8), draft_tokens=30)[0] == plain
    for name in ("partial", "ngram"):
        assert write(decoder, PROMPT, 90, params, create(name))[0] == plain


def test_every_family_is_here_or_has_nothing_of_its_own() -> None:
    plain = {"llama", "mistral", "qwen2", "qwen3"}  # test_decoder.py and test_native.py have them
    assert set(FAMILIES) == plain | {case.partition(",")[0] for case in CASES}


def test_the_page_on_adding_shows_a_family_as_it_is() -> None:
    root = Path(__file__).resolve().parent.parent
    family = (root / "tokenswift_py/models/families/qwen3.py").read_text(encoding="utf-8")
    assert f"```python\n{family}```" in (root / "docs/adding.md").read_text(encoding="utf-8")


def test_layers_without_rope_are_known() -> None:
    spec = ModelSpec.from_config(config_of("smollm3, every fourth layer, yarn"))
    assert [layer.rope for layer in spec.layer_specs] == ["global"] * 3 + [None, "global"]
