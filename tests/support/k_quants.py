"""Weights in types of blocks that the gguf package reads but does not write: valid blocks, not the best ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
CODEBOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)  # of IQ4


def divided(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape, np.float32), where=b != 0)


def half(x: Floats) -> tuple[Floats, Bytes]:
    """Rounds to fp16, and returns the bytes [..., 2] too."""
    rounded = x.astype(np.float16)
    return rounded.astype(np.float32), rounded.view(np.uint8).reshape(*x.shape[:-1], 2)


def nibbles(low: Bytes, count: int) -> Bytes:
    """Packs [blocks, n] four bits each: the first `count` of each 2 * count in the low halves of bytes, the others
    high."""
    pairs = (low & 15).reshape(len(low), -1, 2, count)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(low), -1)


def with_minima(weights: Floats, bits: int) -> Bytes:
    """Packs Q4_K or Q5_K: eight scales s and minima t of 6 bits, w = d s q - dmin t."""
    parts = weights.reshape(-1, 8, 32)
    least = np.minimum(parts.min(-1), 0)
    steps = (parts.max(-1) - least) / (2**bits - 1)
    d, d_bytes = half(steps.max(-1, keepdims=True) / 63)
    dmin, dmin_bytes = half(-least.min(-1, keepdims=True) / 63)
    s, t = (np.rint(divided(x, y)).clip(0, 63).astype(np.uint8) for x, y in ((steps, d), (-least, dmin)))
    q = np.rint(divided(parts + (dmin * t)[..., None], (d * s)[..., None])).clip(0, 2**bits - 1).astype(np.uint8)
    six = [s[:, :4] | s[:, 4:] >> 4 << 6, t[:, :4] | t[:, 4:] >> 4 << 6, (s[:, 4:] & 15) | (t[:, 4:] & 15) << 4]
    fifth = [np.packbits(q >> 4, axis=1, bitorder="little").reshape(-1, 32)] if bits == 5 else []
    return np.concatenate([d_bytes, dmin_bytes, *six, *fifth, nibbles(q.reshape(-1, 256), 32)], -1)


def q6_k(weights: Floats) -> Bytes:
    """Packs Q6_K: sixteen signed scales, w = d s (q - 32)."""
    parts = weights.reshape(-1, 16, 16)
    steps = np.abs(parts).max(-1) / 31
    d, d_bytes = half(steps.max(-1, keepdims=True) / 127)
    s = np.rint(divided(steps, d)).clip(0, 127).astype(np.int8)
    q = (np.rint(divided(parts, (d * s)[..., None])).clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 256)
    high = (q >> 4).reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.concatenate(
        [nibbles(q, 64), np.bitwise_or.reduce(high, 2).reshape(-1, 64), s.view(np.uint8), d_bytes], -1
    )


def places(values: Floats) -> Bytes:
    """Returns the indices of the nearest values of the codebook."""
    return np.abs(values[..., None] - CODEBOOK).argmin(-1).astype(np.uint8)


def iq4_nl(weights: Floats) -> Bytes:
    parts = weights.reshape(-1, 32)
    d, d_bytes = half(np.abs(parts).max(-1, keepdims=True) / 113)
    return np.concatenate([d_bytes, nibbles(places(divided(parts, d)), 16)], -1)


def iq4_xs(weights: Floats) -> Bytes:
    """Packs IQ4_XS: eight scales s of 6 bits, w = d (s - 32) codebook[q]."""
    parts = weights.reshape(-1, 8, 32)
    steps = np.abs(parts).max(-1) / 113
    d, d_bytes = half(steps.max(-1, keepdims=True) / 31)
    s = np.rint(divided(steps, d)).clip(0, 31).astype(np.uint8)
    q, s = places(divided(parts, (d * s)[..., None])), s + 32
    upper = (s.astype(np.uint16) >> 4 << np.arange(0, 16, 2, dtype=np.uint16)).sum(-1, dtype=np.uint16, keepdims=True)
    lower = (s[:, ::2] & 15) | (s[:, 1::2] & 15) << 4
    return np.concatenate([d_bytes, upper.view(np.uint8), lower, nibbles(q.reshape(-1, 256), 16)], -1)


WRITERS = {
    "Q4_K": lambda weights: with_minima(weights, 4),
    "Q5_K": lambda weights: with_minima(weights, 5),
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
}


def quantised(weights: Floats, kind: str) -> Bytes:
    """Returns [rows, bytes of a row] of weights in a type of blocks."""
    return WRITERS[kind](weights).reshape(len(weights), -1)
