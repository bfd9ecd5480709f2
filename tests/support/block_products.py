"""Products with weights in blocks by the documented formula (kernels/cpu/math/quant.h), block after block, on numbers
that the gguf package takes out of the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from conftest import tiny_config, tiny_model, weights_of
from tokenswift_py.models.blocks import FORMATS, Blocks
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

VOCAB = 83  # panels of every width, the last one not full
TYPES = {kind: GGMLQuantizationType[{"q8": "Q8_0", "q4": "Q4_1"}.get(kind, kind.upper())] for kind in FORMATS}
SIXES = bytes([1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1])  # eight scales of 1 and minima of 0 in Q4_K and Q5_K
# (place, bytes) of blocks of 256 that make every scale 1, (first, last, byte) that make every weight `unit` times it.
SCALES: dict[str, tuple[tuple[int, bytes], tuple[int, int, int], int]] = {
    "q4_k": ((4, SIXES), (16, 144, 0x11), 1),
    "q5_k": ((4, SIXES), (16, 176, 0xFF), 31),
    "q6_k": ((192, bytes([1] * 16)), (0, 192, 0), -32),
    "iq4_xs": ((2, bytes([0xAA, 0xAA, 0x11, 0x11, 0x11, 0x11])), (8, 136, 0x88), 1),
}


@dataclass(frozen=True)
class Numbers:
    """The numbers of blocks.

    d, minimum: [rows, blocks of 32].
    scales: [rows, blocks of 32, 2], one for each 16.
    quants: [rows, blocks of 32, 32], less their zero.
    """

    d: Floats
    scales: Floats
    minimum: Floats | None
    quants: npt.NDArray[np.int64]  # [rows, blocks of 32, 32]


def dequantised(blocks: Blocks) -> Floats:
    """Returns the values of blocks by the gguf package."""
    return dequantize(blocks.data, TYPES[blocks.kind]).astype(np.float32).reshape(blocks.shape)


def numbers(blocks: Blocks) -> Numbers:
    kind, form = blocks.kind, FORMATS[blocks.kind]
    raw = blocks.data.reshape(-1, form.stored)

    def whole(halves: tuple[float, float], first: int = 0, changes: bytes = b"") -> npt.NDArray[np.int64]:
        """Returns the values of blocks with these d and minimum, and the bytes from `first` on changed: whole
        numbers."""
        changed = raw.copy()
        changed[:, first : first + len(changes)] = np.frombuffer(changes, np.uint8)
        for at, half in zip(form.halves, halves, strict=False):
            changed[:, at : at + 2] = np.array([half], np.float16).view(np.uint8)
        found = dequantised(Blocks(kind, changed.reshape(blocks.data.shape)))
        return np.rint(found).astype(np.int64).reshape(rows, -1, 32)

    rows, many = len(blocks.data), form.weights // 32
    halves = [raw[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in form.halves]
    d, *minima = (half.reshape(rows, -1).repeat(many, -1) for half in halves)
    if kind not in SCALES:
        return Numbers(d, np.ones((*d.shape, 2), np.float32), minima[0] if minima else None, whole((1, 0)))
    (place, unit_scales), (first, last, byte), unit = SCALES[kind]
    scales = whole((1, 0), first, bytes([byte] * (last - first)))[..., ::16] / unit
    minimum = minima[0] * whole((0, 1))[..., 0].astype(np.float32) if minima else None
    return Numbers(d, scales.astype(np.float32), minimum, whole((1, 0), place, unit_scales))


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """Returns a b + c rounded once. The product is exact in double; its sum with c is rounded to odd, then to fp32."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    of_c = total - product
    rest = (product - (total - of_c)) + (c - of_c)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(rest > 0, np.inf, -np.inf))
    return np.where((rest != 0) & even, odd, total).astype(np.float32)


def rounded(x: Floats, blocks: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Returns activations rounded for a product: scales [rows, blocks] and quants [rows, blocks, 32]."""
    padded = np.zeros((len(x), blocks * 32), np.float32)
    padded[:, : x.shape[1]] = x
    rows = padded.reshape(len(x), -1, 32)
    top = np.abs(rows).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    return (top / np.float32(127))[..., 0], np.rint(rows * inverse).astype(np.int64)


def product(blocks: Blocks, x: Floats) -> Floats:
    """Computes the documented formula, block after block."""
    found = numbers(blocks)
    scale, factors = rounded(x, found.quants.shape[1])
    parts = 2 if blocks.kind == "q6_k" else 1
    acc = np.zeros((len(x), len(found.d)), np.float32)
    for block in range(found.quants.shape[1]):
        for part in range(parts):
            ks = slice(32 // parts * part, 32 // parts * (part + 1))
            dot = (factors[:, block, ks] @ found.quants[:, block, ks].T).astype(np.float32)
            d = found.d[:, block] * found.scales[:, block, part]
            acc = fma(d[None, :] * scale[:, block, None], dot, acc)
        if found.minimum is not None:
            total = scale[:, block] * factors[:, block].sum(-1).astype(np.float32)
            acc = fma(found.minimum[None, :, block], total[:, None], acc)
    return acc


def random_blocks(kind: str, columns: int, seed: int) -> Blocks:
    """Makes blocks with scales from subnormal to large, and every quant there is."""
    rng, form = np.random.default_rng(seed), FORMATS[kind]
    raw = rng.integers(0, 256, (VOCAB, columns // form.weights, form.stored)).astype(np.uint8)
    tens = 10.0 ** rng.integers(-7, 3, len(form.halves))
    scales = (rng.normal(size=(*raw.shape[:2], len(form.halves))) * tens).astype(np.float16)
    for at, halves in zip(
        form.halves, scales.view(np.uint8).reshape(*raw.shape[:2], -1, 2).swapaxes(0, 2), strict=True
    ):
        raw[..., at : at + 2] = halves.swapaxes(0, 1)
    return Blocks(kind, raw.reshape(VOCAB, -1))


def decoder_with(head: torch.Tensor | Blocks, threads: int = 2, **others: Any) -> NativeDecoder:
    """Makes a model whose LM head is `head`. `project` is then one product with it. others: more weights by their
    names, with one underscore for each dot."""
    config = tiny_config(hidden_size=head.shape[1], vocab_size=VOCAB, num_attention_heads=2, tie_word_embeddings=False)
    weights: dict[str, Any] = weights_of(tiny_model(config, torch.float32))
    packed = NativeWeights(
        ModelSpec.from_config(config), weights | {"lm_head.weight": head} | others, torch.int8, threads
    )
    return NativeDecoder(packed, rope_tables(config, 512))


def assert_product(isa: str, decoder: NativeDecoder, blocks: Blocks, x: Floats) -> None:
    logits, expected = decoder.project(torch.from_numpy(x)).numpy(), product(blocks, x)
    if isa != "generic":  # which rounds products on machines without fused multiply-add
        assert np.array_equal(logits, expected)
    assert np.allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
