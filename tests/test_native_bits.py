"""The numerics contract names the bits: a variant of the C++ engine computes the same ones on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from block_products import VOCAB, decoder_with
from conftest import tiny_config
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.kernels.base import PAGE_SIZE, BlockShifts
from tokenswift_py.models.blocks import FORMATS, Blocks
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import RopeTables
from tokenswift_py.models.spec import ModelSpec

_native = pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")

CONTEXT = 256
ISAS = [*_native.runnable_isas().split(", "), *_native.runnable_isas(emulated=True).split(", ")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# A change here changes what every seed writes with that variant; "generic-fma" is aarch64, or x86 compiled with -mfma.
BITS = {
    ("amx", "fp32"): "f452e9c2580651ee",
    ("amx", "bf16"): "05d2221089f2cfcb",
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


def contract(isa: str) -> str:
    """An emulation has the bits of what it emulates, and a variant with other instructions for bytes those of the one
    without."""
    return isa.removesuffix("-emulated").removesuffix("-vnni")


def numbers(*shape: int, start: int) -> torch.Tensor:
    """A Weyl sequence over [-1/2, 1/2): exact in fp32, and without a library's function that may differ."""
    words = (np.arange(start, start + int(np.prod(shape)), dtype=np.uint64) * 2654435761) % 2**32
    return torch.from_numpy(((words >> 20).astype(np.float32) / 4096 - 0.5).reshape(shape))


# The same with queries moved for far keys. What no machine here could run is not recorded yet.
MOVED_BITS = {
    ("amx", "fp32"): "e58f868efdb7fbd8",
    ("amx", "bf16"): "a3c8a0b9fd1fed4d",
    ("avx512bf16", "fp32"): "e58f868efdb7fbd8",
    ("avx512bf16", "bf16"): "794ddfa4a6690e5c",
    ("avx512", "fp32"): "e58f868efdb7fbd8",
    ("avx512", "bf16"): "b03b64a733e672b8",
    ("avx2", "fp32"): "3327a8a5f550e636",
    ("avx2", "bf16"): "4d3bc2b59a3b901b",
    ("generic", "fp32"): "6adba824c4195095",
    ("generic", "bf16"): "81231a40b61cade5",
}


# With keys and values of int8.
INT8_BITS = {
    ("amx", "fp32"): "17e9dc3b56f83603",
    ("amx", "bf16"): "71933d78f2433182",
    ("avx512bf16", "fp32"): "17e9dc3b56f83603",
    ("avx512bf16", "bf16"): "f30da267ded4d833",
    ("avx512", "fp32"): "17e9dc3b56f83603",
    ("avx512", "bf16"): "51d68ff680be4228",
    ("avx2", "fp32"): "ba62a8e5b1c3a3a1",
    ("avx2", "bf16"): "8a0e811cb640be8d",
    ("generic", "fp32"): "a684cc525e8038cb",
    ("generic", "bf16"): "e098712be493bfc7",
}

# By family: layers without RoPE, norms after layers, soft caps, mixtures without and with an expert that every row
# takes.
FAMILY_BITS: dict[str, dict[tuple[str, str], str]] = {
    "smollm3": {
        ("amx", "fp32"): "26c27f6f5bfba386",
        ("amx", "int8"): "8df9be6e1dec91aa",
        ("avx512bf16", "fp32"): "26c27f6f5bfba386",
        ("avx512bf16", "int8"): "33dc8f418064c3c0",
        ("avx512", "fp32"): "26c27f6f5bfba386",
        ("avx512", "int8"): "64be41bb5ff3fa48",
        ("avx2", "fp32"): "9a2604a6019cef4c",
        ("avx2", "int8"): "f61e7fcc1c3da870",
        ("generic", "fp32"): "7b3f955cb84c40e9",
        ("generic", "int8"): "6a39e79b85c261a5",
    },
    "gemma3_text": {
        ("amx", "fp32"): "b9c8b8c0fe1eb78d",
        ("amx", "int8"): "b462a8bb3b10e95d",
        ("avx512bf16", "fp32"): "b9c8b8c0fe1eb78d",
        ("avx512bf16", "int8"): "814dc8fd04be5235",
        ("avx512", "fp32"): "b9c8b8c0fe1eb78d",
        ("avx512", "int8"): "c2931f664cbaa21a",
        ("avx2", "fp32"): "15560b6d6933cacc",
        ("avx2", "int8"): "6f45bf6e99402bdb",
        ("generic", "fp32"): "ca79b23d4ba7ddb4",
        ("generic", "int8"): "0bdf77cc8138e55d",
    },
    "gemma2": {
        ("amx", "fp32"): "4f93422e5b3f4dba",
        ("amx", "int8"): "62869cb336755103",
        ("avx512bf16", "fp32"): "4f93422e5b3f4dba",
        ("avx512bf16", "int8"): "f2b37bb15bbd3421",
        ("avx512", "fp32"): "4f93422e5b3f4dba",
        ("avx512", "int8"): "ee4e60b32da07501",
        ("avx2", "fp32"): "4e17b73f6bb9859b",
        ("avx2", "int8"): "a70c79c6a59c679d",
        ("generic", "fp32"): "1385765510647cc4",
        ("generic", "int8"): "2944da0622be7979",
    },
    "mixtral": {
        ("amx", "fp32"): "8a0b7597cf3498e1",
        ("amx", "int8"): "a70c4668cb3185bf",
        ("avx512bf16", "fp32"): "8a0b7597cf3498e1",
        ("avx512bf16", "int8"): "b1306f6e8df71a4b",
        ("avx512", "fp32"): "8a0b7597cf3498e1",
        ("avx512", "int8"): "ee5eea66b7245225",
        ("avx2", "fp32"): "a7129674765bc902",
        ("avx2", "int8"): "e9c9d330b825c2c1",
        ("generic", "fp32"): "ee5a3e0ca67ac3e0",
        ("generic", "int8"): "39e3c606cbf0e0a4",
    },
    "qwen2_moe": {
        ("amx", "fp32"): "9320a3ac3801487e",
        ("amx", "int8"): "188751166121545c",
        ("avx512bf16", "fp32"): "9320a3ac3801487e",
        ("avx512bf16", "int8"): "f43fab36eca552eb",
        ("avx512", "fp32"): "9320a3ac3801487e",
        ("avx512", "int8"): "26d46db8ecdaa0df",
        ("avx2", "fp32"): "e354a146c8694392",
        ("avx2", "int8"): "87b003deefa89524",
        ("generic", "fp32"): "f1d9d322d7501481",
        ("generic", "int8"): "bca8eceade2bf737",
    },
}

# Of products with weights in blocks: where products and sums are fused, and on "generic".
PRODUCT_BITS = {
    "q8": ("4faa9e7fddbc5d23", "721b7e26351b154d"),
    "q4": ("ef9081332880f10f", "509ec5127e077f84"),
    "q4_0": ("7c37ea015687f31d", "36964904540037bc"),
    "q5_0": ("bc24a62ada92d022", "6733569e6fe42378"),
    "q5_1": ("9d4657857053e1a0", "d3402f56e012a27c"),
    "q4_k": ("247129c3d0d826a6", "833db8d166a47b79"),
    "q5_k": ("2d96f003b0e5a150", "529bdf2937bd91aa"),
    "q6_k": ("bc1ed82defeda282", "47bf07a6bc4dcc9f"),
    "iq4_nl": ("747d546c6406d0c7", "bb47d9933974be2e"),
    "iq4_xs": ("378616e84a9af2b9", "3b32f7d829c22395"),
}


def logits_of(
    dtype: torch.dtype,
    shifts: BlockShifts | None = None,
    family: str = "qwen3",
    kv_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A prefill that crosses page borders, and a tree after it."""
    spec = ModelSpec.from_config(tiny_config(family=family))
    weights = {
        name: numbers(*shape, start=1_000_000 * part) for part, (name, shape) in enumerate(spec.shapes().items())
    }
    angles = [2 * numbers(CONTEXT, spec.head_dim // 2, start=start) for start in (7, 11, 13, 17)]
    tables = RopeTables(*angles[:2], label="bits", shifts=shifts, local=RopeTables(*angles[2:], label="local"))
    decoder = NativeDecoder(NativeWeights(spec, weights, dtype, threads=2), tables, kv_dtype)
    cache = decoder.new_cache()
    prompt = DraftTree.chain(np.arange(200, dtype=np.int32) * 17 % spec.vocab_size)
    prefill = decoder.forward([Segment(prompt, cache, causal=True)]).logits
    cache.commit(range(200))
    tree = DraftTree(np.arange(20, dtype=np.int32), np.arange(-1, 19, dtype=np.int32) // 2)
    return torch.cat([prefill, decoder.forward([Segment(tree, cache)]).logits])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_variant_has_its_bits(isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSWIFT_ISA", isa)
    assert hashed(logits_of(DTYPES[dtype])) == BITS[contract(isa), dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_variant_has_its_bits_where_queries_are_moved(isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSWIFT_ISA", isa)
    shifts = BlockShifts(PAGE_SIZE, np.array([0, 0, 40, 90], np.int32), 64)
    bits = hashed(logits_of(DTYPES[dtype], shifts))
    assert bits != BITS[contract(isa), dtype]
    if (contract(isa), dtype) not in MOVED_BITS:
        pytest.skip(f"the bits of {isa} are not recorded yet: {bits}")
    assert bits == MOVED_BITS[contract(isa), dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_variant_has_its_bits_with_int8_keys_and_values(
    isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENSWIFT_ISA", isa)
    bits = hashed(logits_of(DTYPES[dtype], kv_dtype=torch.int8))
    if (contract(isa), dtype) not in INT8_BITS:
        pytest.skip(f"the bits of {isa} are not recorded yet: {bits}")
    assert bits == INT8_BITS[contract(isa), dtype]


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("family", FAMILY_BITS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_variant_has_its_bits_in_other_families(
    isa: str, family: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENSWIFT_ISA", isa)
    bits = hashed(logits_of({**DTYPES, "int8": torch.int8}[dtype], family=family))
    if (contract(isa), dtype) not in FAMILY_BITS[family]:
        pytest.skip(f"the bits of {isa} are not recorded yet: {bits}")
    assert bits == FAMILY_BITS[family][contract(isa), dtype]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_products_with_blocks_have_one_set_of_bits(isa: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant that fuses products with sums computes the same."""
    monkeypatch.setenv("TOKENSWIFT_ISA", isa)
    fused, separate = PRODUCT_BITS[kind]
    product = decoder_with(blocks_of(kind)).project(numbers(9, 512, start=5))
    assert hashed(product) == (separate if isa == "generic" else fused)


def blocks_of(kind: str) -> Blocks:
    """Bytes of a Weyl sequence, with scales and minima of both signs."""
    form = FORMATS[kind]
    shape = VOCAB, 512 // form.weights, form.stored
    words = (np.arange(np.prod(shape), dtype=np.uint64) * 2654435761) % 2**32
    raw = (words >> 24).astype(np.uint8).reshape(shape)
    for number, at in enumerate(form.halves):
        halves = numbers(*shape[:2], 1, start=100 * number).numpy().astype(np.float16)
        raw[..., at : at + 2] = halves.view(np.uint8)
    return Blocks(kind, raw.reshape(VOCAB, -1))


def hashed(logits: torch.Tensor) -> str:
    assert logits.isfinite().all() and logits.std() > 0.1
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]
