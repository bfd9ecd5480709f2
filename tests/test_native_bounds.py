"""Sizes that lie are refused where Python calls the engine: shapes of models and pools, experts, weights in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from conftest import tiny_model, weights_of
from native_rows import CONTEXT, _native, config_of, native_of
from native_rows import isa as isa
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.models.blocks import FORMATS
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec

MOST = 2**31 - 1
HIDDEN, FFN, EXPERTS, EXPERT_FFN, SHARED_FFN = 256, 80, 4, 40, 32


def decoder(**changes: Any) -> Any:
    """An engine of one dense layer and one mixture, or what `changes` make of it."""
    shape: dict[str, Any] = {
        "vocab": 61, "hidden": HIDDEN, "ffn": FFN, "heads": 4, "kv_heads": 2, "head_dim": 8, "norm_eps": 1e-6,
        "tied": True, "qk_norm": False, "layers": [(0, 0, False), (0, 0, True)],
        "experts": (EXPERTS, 2, EXPERT_FFN, True, SHARED_FFN), "post_norms": False, "gelu": False,
        "embedding_scale": 1.0, "score_scale": 1.0, "attention_cap": 0.0, "logit_cap": 0.0, "dtype": "q8",
        "team": _native.Team(1),
    }  # fmt: skip
    return _native.Decoder(**{**shape, **changes})


DENSE = [(0, 0, False)]
SIZES, TAKEN, COUNT, COLUMNS = "a model's sizes are", "a row takes", "experts: ", "columns of an expert"
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "a mixture without experts": ("a mixture needs experts", {"experts": None}),
    "zero experts": (TAKEN, {"experts": (0, 0, EXPERT_FFN, True, 0)}),
    "zero experts, one taken": (TAKEN, {"experts": (0, 1, EXPERT_FFN, True, 0)}),
    "no expert taken": (TAKEN, {"experts": (EXPERTS, 0, EXPERT_FFN, True, 0)}),
    "fewer than no expert taken": (TAKEN, {"experts": (EXPERTS, -1, EXPERT_FFN, True, 0)}),
    "more taken than there are": (TAKEN, {"experts": (EXPERTS, EXPERTS + 1, EXPERT_FFN, True, 0)}),
    "more taken, and no mixture": (TAKEN, {"experts": (1, 2, EXPERT_FFN, True, 0), "layers": DENSE}),
    "fewer than no experts": (COUNT, {"experts": (-EXPERTS, 1, EXPERT_FFN, True, 0)}),
    "fewer than no experts, and no mixture": (COUNT, {"experts": (-EXPERTS, 1, 8, True, 0), "layers": DENSE}),
    "as many experts as an int can count": (COUNT, {"experts": (MOST, 1, EXPERT_FFN, True, 0)}),
    "experts without columns": ("experts without columns", {"experts": (EXPERTS, 2, 0, True, 0)}),
    "experts of as many columns as an int can count": (COLUMNS, {"experts": (EXPERTS, 2, MOST, True, 0)}),
    "the same without a mixture": (COLUMNS, {"experts": (EXPERTS, 2, MOST, True, 0), "layers": DENSE}),
    "a shared expert of negative columns": (COLUMNS, {"experts": (EXPERTS, 2, EXPERT_FFN, True, -1)}),
    "a shared expert of as many as an int can count": (COLUMNS, {"experts": (EXPERTS, 2, EXPERT_FFN, True, MOST)}),
    "no layers": (SIZES, {"layers": []}),
    "a negative window": ("a window must not be negative", {"layers": [(-1, 0, False)]}),
    "tables that there are not": ("ropes are -1, 0 or 1", {"layers": [(0, 2, False)]}),
    "no heads": (SIZES, {"heads": 0}),
    "scores times zero": ("scale of scores", {"score_scale": 0.0}),
    "scores times infinity": ("scale of scores", {"score_scale": float("inf")}),
    "a negative cap of scores": ("a soft cap is 0 or from", {"attention_cap": -1.0}),
    "a cap of logits that is too small": ("a soft cap is 0 or from", {"logit_cap": 1e-30}),
    "a cap of logits that is no number": ("a soft cap is 0 or from", {"logit_cap": float("nan")}),
    "no keys' heads": (SIZES, {"kv_heads": 0}),
    "heads that do not share keys evenly": ("heads must be a multiple", {"heads": 5}),
    "an odd head": ("head_dim 7", {"head_dim": 7}),
    "a head of as many values as an int can count": ("head_dim 2147483646", {"head_dim": MOST - 1}),
    "heads whose values an int cannot count": ("heads of 512 values", {"heads": 2**24, "kv_heads": 1, "head_dim": 512}),
    **{f"{name} as large as an int": (SIZES, {name: MOST}) for name in ("vocab", "hidden", "ffn", "heads")},
    **{
        f"{name} and hidden whose product is 2^60": (SIZES, {name: 2**30, "hidden": 2**30}) for name in ("vocab", "ffn")
    },
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_cannot_be_are_refused(case: str) -> None:
    says, changes = SHAPES[case]
    with pytest.raises(ValueError, match=says):
        decoder(**changes)


def test_a_model_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(MemoryError):
        decoder(vocab=2**24, hidden=2**24)


POSITIVE, LARGE, MULTIPLE = "sizes must be positive", "is too large", "a multiple of 16 up to 512"
POOLS: dict[str, tuple[str, dict[str, int]]] = {
    "no layers": (POSITIVE, {"layers": 0}),
    "fewer than no heads": (POSITIVE, {"kv_heads": -1}),
    "no pages": (POSITIVE, {"pages": 0}),
    "pages whose slots an int cannot count": (POSITIVE, {"pages": MOST}),
    "half a vector": (MULTIPLE, {"head_dim": 24}),
    "a head whose bytes an int cannot count": (MULTIPLE, {"head_dim": 2**24}),
    "a page whose bytes nothing can count": (LARGE, {"layers": 2**24, "kv_heads": 2**24}),
    "as many layers as an int can count": (LARGE, {"layers": MOST, "kv_heads": MOST}),
}


@pytest.mark.parametrize("case", POOLS)
def test_pools_that_cannot_be_are_refused(case: str) -> None:
    says, changes = POOLS[case]
    with pytest.raises(ValueError, match=says):
        _native.Pool(**{**{"layers": 2, "kv_heads": 2, "head_dim": 16, "dtype": "bf16", "pages": 3}, **changes})


NO_PARTS = (
    *("experts.4.gate", "experts.-1.gate", "experts.01.gate", "experts.18446744073709551616.gate", "experts..gate"),
    *("experts.gate", "experts.0.", "experts.0.router", "experts.0.0.gate", "shared.router", "shared", ".gate", ""),
)


@pytest.mark.parametrize("part", NO_PARTS)
def test_experts_that_there_are_not_are_refused(part: str) -> None:
    engine = decoder()
    with pytest.raises(ValueError, match="unknown"):
        engine.set_matrix(part, 1, np.zeros((EXPERT_FFN, HIDDEN), np.float32))
    with pytest.raises(ValueError, match="unknown"):
        engine.set_blocks(part, 1, "q4_k", np.zeros((EXPERT_FFN, 144), np.uint8))
    with pytest.raises(ValueError, match="unknown"):
        engine.set_vector(f"{part}_bias", 1, np.zeros(EXPERT_FFN, np.float32))


@pytest.mark.parametrize(
    "part", ["router_bias", "shared_gate_bias", "head_bias", "embed_bias", "_bias", "gate", "neck"]
)
def test_vectors_that_nothing_would_add_are_refused(part: str) -> None:
    for count in (1, EXPERTS, 61):
        with pytest.raises(ValueError, match="unknown"):
            decoder().set_vector(part, 1, np.zeros(count, np.float32))


@pytest.mark.parametrize("layer", [-1, 2, MOST, -MOST - 1])
def test_layers_that_there_are_not_are_refused(layer: int) -> None:
    engine = decoder()
    with pytest.raises(ValueError, match=f"layer {layer} of 2"):
        engine.set_matrix("experts.0.gate", layer, np.zeros((EXPERT_FFN, HIDDEN), np.float32))
    with pytest.raises(ValueError, match=f"layer {layer} of 2"):
        engine.set_vector("input_norm", layer, np.zeros(HIDDEN, np.float32))


def test_a_dense_layer_has_no_experts_and_a_mixture_nothing_else() -> None:
    engine = decoder()
    with pytest.raises(ValueError, match=r"unknown part 'experts\.0\.gate'"):
        engine.set_matrix("experts.0.gate", 0, np.zeros((EXPERT_FFN, HIDDEN), np.float32))
    with pytest.raises(ValueError, match="unknown part 'router'"):
        engine.set_matrix("router", 0, np.zeros((EXPERTS, HIDDEN), np.float32))
    with pytest.raises(ValueError, match="unknown part 'gate'"):
        engine.set_matrix("gate", 1, np.zeros((FFN, HIDDEN), np.float32))
    with pytest.raises(ValueError, match=r"unknown part 'shared\.gate'"):
        decoder(experts=(EXPERTS, 2, EXPERT_FFN, True, 0)).set_matrix(
            "shared.gate", 1, np.zeros((SHARED_FFN, HIDDEN), np.float32)
        )


MATRICES: dict[str, tuple[str, tuple[int, int]]] = {
    "one expert too few in the router": ("router", (EXPERTS - 1, HIDDEN)),
    "one too many": ("router", (EXPERTS + 1, HIDDEN)),
    "two gates of the shared expert": ("shared_gate", (2, HIDDEN)),
    "a down projection that lies the other way": ("experts.3.down", (EXPERT_FFN, HIDDEN)),
    "the shared expert's columns": ("experts.0.gate", (SHARED_FFN, HIDDEN)),
    "no rows": ("experts.0.gate", (0, HIDDEN)),
    "no columns": ("experts.0.gate", (EXPERT_FFN, 0)),
}


@pytest.mark.parametrize("case", MATRICES)
def test_matrices_of_other_sizes_are_refused(case: str) -> None:
    part, shape = MATRICES[case]
    with pytest.raises(ValueError, match=part):
        decoder().set_matrix(part, 1, np.zeros(shape, np.float32), fewest_bits=part.startswith("experts"))


def test_the_router_takes_values_of_fp32_alone() -> None:
    engine = decoder()
    with pytest.raises(ValueError, match="router: values of a type that this matrix cannot hold"):
        engine.set_matrix("router", 1, np.zeros((EXPERTS, HIDDEN), np.uint16))
    with pytest.raises(ValueError, match="router: values of a type that this matrix cannot hold"):
        engine.set_blocks("router", 1, "q8", np.zeros((EXPERTS, HIDDEN // 32 * 34), np.uint8))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", ["experts.0.gate", "shared.up", "q"])
def test_counts_of_blocks_that_disagree_are_refused(kind: str, part: str) -> None:
    engine, form = decoder(), FORMATS[kind]
    rows = {"experts.0.gate": EXPERT_FFN, "shared.up": SHARED_FFN, "q": 4 * 8}[part]
    count = HIDDEN // form.weights
    engine.set_blocks(part, 1, kind, np.zeros((rows, count * form.stored), np.uint8))
    for shape in [(rows, (count + 1) * form.stored), (rows, (count - 1) * form.stored), (rows, 0), (0, 0),
                  (rows - 1, count * form.stored), (rows + 1, count * form.stored), (rows, count * form.stored - 1),
                  (rows, HIDDEN)]:  # fmt: skip
        with pytest.raises(ValueError, match=r"values for a matrix of|rows of blocks must be whole"):
            engine.set_blocks(part, 1, kind, np.zeros(shape, np.uint8))


def test_blocks_that_would_end_inside_a_row_are_refused() -> None:
    """Columns of the down projection: 40 are no whole blocks of 32, and 80 none of 256."""
    engine = decoder()
    for part, rows, kind, stored in [("experts.0.down", HIDDEN, "q8", 34), ("experts.0.down", HIDDEN, "q4_k", 144)]:
        for count in (0, 1, 2):
            with pytest.raises(ValueError, match="values for a matrix of"):
                engine.set_blocks(part, 1, kind, np.zeros((rows, count * stored), np.uint8))


ROOMS = [(64, (3, 34)), (64, (3, 102)), (64, (2, 68)), (40, (3, 34)), (0, (3, 34))]


@pytest.mark.parametrize(("columns", "shape"), ROOMS)
def test_rounding_into_other_room_is_refused(columns: int, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="blocks"):
        _native.quantise(np.zeros((3, columns), np.float32), np.zeros(shape, np.uint8))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_scores_that_are_no_numbers_choose_experts_that_there_are(isa: str, family: str) -> None:
    """And spoil no other text of the pass."""
    config = config_of(family=family)
    weights = weights_of(tiny_model(config, torch.float32))
    weights["model.embed_tokens.weight"][60] = torch.nan
    broken = NativeDecoder(
        NativeWeights(ModelSpec.from_config(config), weights, torch.float32, 2), rope_tables(config, CONTEXT)
    )
    pool = broken.new_pool(2)
    chains = [DraftTree.chain(ids) for ids in ([60, 5], [3, 7, 9])]
    together = broken.forward([Segment(chain, KVCache(pool, CONTEXT)) for chain in chains]).logits
    sound = native_of(config, torch.float32)
    assert together[:2].isnan().all()
    assert torch.equal(together[2:], sound.forward([Segment(chains[1], sound.new_cache())]).logits)
