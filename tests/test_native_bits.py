"""The numerics contract names the bits: a variant of the C++ engine computes the same ones on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from conftest import tiny_config
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.kernels.base import PAGE_SIZE, BlockShifts
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import RopeTables
from tokenswift_py.models.spec import ModelSpec

_native = pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")

CONTEXT = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# A change here changes what every seed writes with that variant; "generic-fma" is aarch64, or x86 compiled with -mfma.
BITS = {
    ("avx512bf16", "fp32"): "f452e9c2580651ee",
    ("avx512bf16", "bf16"): "c4429cdbd45fa897",
    ("avx512", "fp32"): "f452e9c2580651ee",
    ("avx512", "bf16"): "c5a58ecd2b4c41ba",
    ("avx2", "fp32"): "ba9a183232c4be8c",
    ("avx2", "bf16"): "fe1162fc336c4253",
    ("generic-fma", "fp32"): "323322f13f1d5b9a",
    ("generic-fma", "bf16"): "762410b3e5f32928",
    ("generic", "fp32"): "1ae16b072e5f5551",
    ("generic", "bf16"): "e4bfdb0639ecbe68",
}


def numbers(*shape: int, start: int) -> torch.Tensor:
    """A Weyl sequence over [-1/2, 1/2): exact in fp32, and without a library's function that may differ."""
    words = (np.arange(start, start + int(np.prod(shape)), dtype=np.uint64) * 2654435761) % 2**32
    return torch.from_numpy(((words >> 20).astype(np.float32) / 4096 - 0.5).reshape(shape))


# The same with queries moved for far keys. What a machine here could not run is not recorded yet.
MOVED_BITS = {
    ("avx2", "fp32"): "3327a8a5f550e636",
    ("avx2", "bf16"): "4d3bc2b59a3b901b",
    ("generic", "fp32"): "6adba824c4195095",
    ("generic", "bf16"): "81231a40b61cade5",
}


def logits_of(dtype: torch.dtype, shifts: BlockShifts | None = None) -> torch.Tensor:
    """A prefill that crosses page borders, and a tree behind it."""
    spec = ModelSpec.from_config(tiny_config(family="qwen3"))
    weights = {
        name: numbers(*shape, start=1_000_000 * part) for part, (name, shape) in enumerate(spec.shapes().items())
    }
    angles = [2 * numbers(CONTEXT, spec.head_dim // 2, start=start) for start in (7, 11)]
    tables = RopeTables(*angles, label="bits", shifts=shifts)
    decoder = NativeDecoder(NativeWeights(spec, weights, dtype, threads=2), tables)
    cache = decoder.new_cache()
    prompt = DraftTree.chain(np.arange(200, dtype=np.int32) * 17 % spec.vocab_size)
    prefill = decoder.forward([Segment(prompt, cache, causal=True)]).logits
    cache.commit(range(200))
    tree = DraftTree(np.arange(20, dtype=np.int32), np.arange(-1, 19, dtype=np.int32) // 2)
    return torch.cat([prefill, decoder.forward([Segment(tree, cache)]).logits])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", _native.runnable_isas().split(", "))
def test_a_variant_has_its_bits(isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSWIFT_ISA", isa)
    assert hashed(logits_of(DTYPES[dtype])) == BITS[isa, dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", _native.runnable_isas().split(", "))
def test_a_variant_has_its_bits_where_queries_are_moved(isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSWIFT_ISA", isa)
    shifts = BlockShifts(PAGE_SIZE, np.array([0, 0, 40, 90], np.int32), 64)
    bits = hashed(logits_of(DTYPES[dtype], shifts))
    assert bits != BITS[isa, dtype]
    if (isa, dtype) not in MOVED_BITS:
        pytest.skip(f"the bits of {isa} are not recorded yet: {bits}")
    assert bits == MOVED_BITS[isa, dtype]


def hashed(logits: torch.Tensor) -> str:
    assert logits.isfinite().all() and logits.std() > 0.1
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]
