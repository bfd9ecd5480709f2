"""Rows of the native engine: tiny decoders, caches filled in chunks or row by row, and the row law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tiny_config, tiny_model, weights_of
from tokenswift_py.core import DraftTree, Output, Segment
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec

_native = pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the native engine is not built")
ISAS = _native.runnable_isas().split(", ")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
CONTEXT = 2048


def native_of(config: Any, dtype: torch.dtype = torch.bfloat16, threads: int = 2, **options: Any) -> NativeDecoder:
    weights = weights_of(tiny_model(config, torch.float32))
    tables = rope_tables(config, CONTEXT)
    packed = NativeWeights(ModelSpec.from_config(config), weights, dtype, threads)
    return NativeDecoder(packed, tables, **options)


def config_of(**changes: Any) -> Any:
    return tiny_config(**{"max_position_embeddings": CONTEXT, **changes})


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TOKENSWIFT_ISA", request.param)
    return str(request.param)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, count).astype(np.int32)


def prefill(decoder: Any, ids: np.ndarray, chunks: Sequence[int] = ()) -> tuple[KVCache, torch.Tensor]:
    cache = decoder.new_cache()
    return cache, extend(decoder, cache, ids, chunks)


def extend(decoder: Any, cache: KVCache, ids: np.ndarray, chunks: Sequence[int] = ()) -> torch.Tensor:
    """Commits `ids` in chunks of these sizes, the rest in one, and returns all logits."""
    logits, start = [], 0
    for size in [*chunks, len(ids) - sum(chunks)]:
        if size:
            chain = DraftTree.chain(ids[start : start + size])
            logits.append(decoder.forward([Segment(chain, cache, causal=True)]).logits)
            cache.commit(range(size))
            start += size
    return torch.cat(logits)


def one_by_one(decoder: Any, cache: KVCache, ids: Sequence[int]) -> Output:
    """Decodes plainly on a copy of the cache. Every row of a tree must reproduce this output."""
    copy, outputs = cache.fork(), []
    for token in ids:
        outputs.append(decoder.forward([Segment(DraftTree.chain([token]), copy)]))
        copy.commit([0])
    copy.release()
    return Output(torch.cat([o.hidden for o in outputs]), torch.cat([o.logits for o in outputs]))


def int8_block(block: np.ndarray) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Quants of keys and values [64, padded head_dim] of an int8 page or copy, and the scales [2, 64, 1] of both."""
    data = torch.from_numpy(block.copy())
    keys, fours = data[:-512].view(2, -1)
    lanes = [[t + part for part in (0, 16, 8, 24)] for t in (*range(8), *range(32, 40))]
    values = (
        fours.view(torch.int8).view(16, -1, 4).transpose(1, 2).flatten(0, 1)[torch.tensor(lanes).view(-1).argsort()]
    )
    keys = (keys.to(torch.int16) - 128).to(torch.int8).view(-1, 64, 4).transpose(0, 1).flatten(1)
    return (keys, values), data[-512:].view(torch.float32).view(2, 64, 1)


def random_tree(seed: int, nodes: int, branching: float) -> DraftTree:
    """Makes a random tree, mostly deep for a small `branching`, mostly wide for a large one."""
    rng = np.random.default_rng(seed)
    parents = [-1] + [i - 1 if rng.random() > branching else int(rng.integers(0, i)) for i in range(1, nodes)]
    siblings = [parents[:node].count(parent) for node, parent in enumerate(parents)]
    return DraftTree(np.array(siblings, np.int32) % 61, np.array(parents, np.int32))


def assert_row_law(decoder: Any, prefix: int, tree: DraftTree) -> None:
    cache, _ = prefill(decoder, tokens(prefix), [prefix // 2])
    output = decoder.forward([Segment(tree, cache)])
    cache.drop_tail()
    leaves = set(range(len(tree))) - set(tree.parents.tolist())
    for leaf in leaves:
        path = tree.path(leaf)
        alone = one_by_one(decoder, cache, tree.tokens[path].tolist())
        assert torch.equal(output.logits[path], alone.logits)
        assert torch.equal(output.hidden[path], alone.hidden)


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns int8 values and their scale along the last dimension, by the rule that kv_dtype int8 promises."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).nan_to_num().round().to(torch.int8), scale
