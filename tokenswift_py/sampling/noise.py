"""Noise that belongs to a position (law 2): one specification for Python, C++ and Triton.

Philox4x32-10 (Salmon et al. 2011), key = seed, counter = (position, token // 4, stream, domain), lane = token % 4;
u = (x + 1/2) 2^-32 in double; Gumbel = -log(-log u). Logarithm and exponential are the stated polynomials below,
evaluated in double by Horner's rule with every product and sum rounded (no fused multiply-add), so that their bits
are the same in every implementation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

TOKEN_DOMAIN = 0  # for choosing tokens; other uses of the generator have other domains
XTC_DOMAIN = 1  # for deciding whether XTC acts at a position

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

LN2 = 0.6931471805599453
SQRT_HALF = 0.7071067811865476
_LOG = [1.0 / (2 * k + 1) for k in range(11)]  # atanh(s) / s in powers of s^2
_EXP = [1.0]
for _k in range(1, 14):
    _EXP.append(_EXP[-1] / _k)  # 1 / k!, where each is the one before divided by k


def philox(counter: tuple[Any, Any, Any, Any], key: int) -> npt.NDArray[np.uint64]:
    """Returns [..., 4] 32-bit words (held in uint64) for four broadcastable 32-bit counter words and a 64-bit key."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _HALF) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _HALF) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def log(x: Any) -> Doubles:
    """Computes the natural logarithm of positive normal doubles: x = 2^e m, m in [sqrt 1/2, sqrt 2), s = (m - 1) / (m +
    1), e ln 2 + 2 s (1 + s^2/3 + ... + s^20/21)."""
    m, e = np.frexp(np.asarray(x, np.float64))
    small = m < SQRT_HALF
    m, e = np.where(small, m + m, m), e - small
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = np.full_like(z, _LOG[-1])
    for coefficient in _LOG[-2::-1]:
        series = series * z + coefficient
    return np.asarray(e * LN2 + (s + s) * series)


def exp(x: Any) -> Doubles:
    """Computes the exponential of doubles in [-700, 700]: n = rint(x / ln 2), r = x - n ln 2, 2^n (1 + r + ... + r^13 /
    13!)."""
    x = np.asarray(x, np.float64)
    n = np.rint(x / LN2)
    r = x - n * LN2
    series = np.full_like(r, _EXP[-1])
    for coefficient in _EXP[-2::-1]:
        series = series * r + coefficient
    return np.asarray(np.ldexp(series, n.astype(np.int32)))


def gumbel(seed: int, position: int, tokens: npt.NDArray[Any], stream: int = 0, domain: int = TOKEN_DOMAIN) -> Doubles:
    """Returns [n] Gumbel noise of token ids `tokens` ([n]) at an absolute position."""
    tokens = np.asarray(tokens, np.int64)
    blocks, at = np.unique(tokens // 4, return_inverse=True)
    words = philox((position, blocks, stream, domain), seed)
    x = words[at, tokens % 4]
    u = (x.astype(np.float64) + 0.5) * 2.0**-32
    return -log(-log(u))


def coin(seed: int, position: int, stream: int, domain: int) -> float:
    """Returns one u for a position, that of the first word of its first block."""
    return (float(philox((position, 0, stream, domain), seed)[0]) + 0.5) * 2.0**-32


HIGHEST = float(-log(-log((2.0**32 - 0.5) * 2.0**-32)))
LOWEST = float(-log(-log(0.5 * 2.0**-32)))
"""No Gumbel noise lies outside [LOWEST, HIGHEST]: a token whose score trails the best by more than their difference
can never be chosen, and needs no noise."""
