"""The emulated tile registers have the hardware's bits, and both have those of the rule in tiles/hardware.h."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from native_rows import assert_row_law, config_of, native_of, random_tree
from tokenswift_py.models.devices import compute_as, tell_of_refused_tiles

_native = pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")

RUNNABLE = _native.runnable_isas().split(", ")
ROWS = COLUMNS = 16
TINY = 2.0**-126  # the least normal float


def rounded(exact: Fraction) -> float:
    """The nearest float of 24 bits, ties to even; what is less than the least normal one after that is zero."""
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    if abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (exponent - 23)
    nearest = round(exact / step) * step
    sign = -1.0 if exact < 0 else 1.0
    if abs(nearest) < Fraction(TINY):
        return sign * 0.0
    return sign * math.inf if abs(nearest) >= Fraction(2) ** 128 else float(nearest)


def fused(a: float, b: float, c: float) -> float:
    """a b + c of floats, rounded once. Doubles say which sums are zero and which are not finite."""
    product = a * b  # exact
    if not math.isfinite(product + c) or product + c == 0:
        return product + c
    return rounded(Fraction(product) + Fraction(c))


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def widened(bf16: np.ndarray) -> np.ndarray:
    return (bf16.astype(np.uint32) << 16).view(np.float32)


def by_the_rule(c: np.ndarray, a: np.ndarray, b: np.ndarray, row: int, column: int) -> float:
    """One element of c + a b, where a is [16, 32] and b [16, 16, 2]."""
    left, right = flushed(widened(a[row])).tolist(), flushed(widened(b[:, column].reshape(-1))).tolist()
    sums = [0.0, 0.0]
    for k in range(32):
        sums[k % 2] = fused(left[k], right[k], sums[k % 2])
    return fused(1.0, float(flushed(c[row, column])), fused(1.0, sums[0], sums[1]))


def why_no_hardware() -> str:
    zeros = np.zeros((16, 64), np.uint8)
    try:
        _native.tile_dot("bf16", np.zeros((16, 16), np.float32), zeros, zeros, emulated=False)
    except ValueError as error:
        return str(error)
    return ""


WHY = why_no_hardware()
on_hardware = pytest.mark.skipif(bool(WHY), reason=WHY)
everywhere = pytest.mark.parametrize("emulated", [True, pytest.param(False, marks=on_hardware)])


def dot(kind: str, c: np.ndarray, a: np.ndarray, b: np.ndarray, *, emulated: bool) -> np.ndarray:
    out = c.copy()
    bytes_of_both = [np.ascontiguousarray(x).view(np.uint8).reshape(16, 64) for x in (a, b)]
    _native.tile_dot(kind, out, *bytes_of_both, emulated=emulated)
    return out


def bits(x: np.ndarray) -> np.ndarray:
    """All NaNs are one."""
    return np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))


def bf16_between(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Values with biased exponents in [low, high), a tenth of them zeros; 0 is denormal, 255 infinite or NaN."""
    signs, fractions = rng.integers(0, 2, shape) << 15, rng.integers(0, 128, shape)
    values = signs | rng.integers(low, high, shape) << 7 | fractions
    return np.where(rng.random(shape) < 0.1, signs, values).astype(np.uint16)


def float_between(rng: np.random.Generator, low: int, high: int) -> np.ndarray:
    signs, fractions = rng.integers(0, 2, (16, 16)) << 31, rng.integers(0, 2**23, (16, 16))
    return (signs | rng.integers(low, high, (16, 16)) << 23 | fractions).astype(np.uint32).view(np.float32)


# Exponents of a, of b and of c.
RANGES = {
    "weights and activations": ((110, 130), (110, 130), (110, 135)),
    "everything": ((0, 256), (0, 256), (0, 256)),
    "cancellation": ((126, 128), (126, 128), (126, 133)),
    "the flush edge": ((60, 68), (60, 68), (0, 4)),
    "products far below it": ((1, 130), (1, 60), (0, 30)),
    "beside tiny products": ((48, 66), (48, 66), (1, 2)),
    "overflow": ((186, 196), (186, 192), (250, 255)),
    "products beyond all floats": ((0, 255), (200, 255), (200, 255)),
    "denormals": ((0, 2), (120, 130), (0, 2)),
}


def tiles_of(name: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    of_a, of_b, of_c = RANGES[name]
    rng = np.random.default_rng(seed)
    return float_between(rng, *of_c), bf16_between(rng, (16, 32), *of_a), bf16_between(rng, (16, 16, 2), *of_b)


@pytest.fixture(params=[False, True], ids=["denormals kept", "denormals flushed"])
def settings(request: pytest.FixtureRequest) -> Iterator[None]:
    """The calling thread's settings, which must not matter."""
    if not torch.set_flush_denormal(request.param) and request.param:
        pytest.skip("torch cannot flush denormals here")
    yield
    torch.set_flush_denormal(False)


@everywhere
@pytest.mark.parametrize("name", RANGES)
def test_products_of_bf16_are_summed_by_the_rule(name: str, emulated: bool, settings: None) -> None:
    for seed in range(8):
        c, a, b = tiles_of(name, seed)
        with_settings = bits(dot("bf16", c, a, b, emulated=emulated))
        torch.set_flush_denormal(False)  # the reference needs its denormals
        for row, column in np.random.default_rng(seed).integers(0, 16, (24, 2)):
            expected = np.float32(by_the_rule(c, a, b, row, column))
            assert with_settings[row, column] == bits(np.array(expected))


@on_hardware
@pytest.mark.parametrize("name", RANGES)
def test_the_emulation_has_the_bits_of_the_hardware(name: str, settings: None) -> None:
    for seed in range(300):
        c, a, b = tiles_of(name, 1000 + seed)
        there, here = (bits(dot("bf16", c, a, b, emulated=emulated)) for emulated in (False, True))
        np.testing.assert_array_equal(here, there)


def bf16(x: float) -> int:
    return int(np.float32(x).view(np.uint32)) >> 16


# Pairs of factors, which come last in k of the even or of the odd sum; c; and the bits of the result.
DIRECTED = {
    "a quarter of a step below the edge": ([(2.0**-63, 2.0**-63), (-(2.0**-76), 2.0**-76)], 0.0, 0x00800000),
    "half a step below it": ([(2.0**-63, 2.0**-63), (-(2.0**-75), 2.0**-76)], 0.0, 0x00800000),
    "more than that": ([(2.0**-63, 2.0**-63), (-1.5 * 2.0**-75, 2.0**-76)], 0.0, 0x00000000),
    "a tiny product": ([(2.0**-64, 1.5 * 2.0**-63)], 0.0, 0x00000000),
    "a tiny sum with c": ([(2.0**-63, 1.5 * 2.0**-63)], -TINY, 0x00000000),
    "a denormal c": ([(2.0**-63, 2.0**-63)], 0.75 * TINY, 0x00800000),
    "a denormal factor": ([(0.5 * TINY, 2.0**100)], 1.0, 0x3F800000),
    "zeros of both signs": ([(0.0, 0.0)], -0.0, 0x00000000),
    "rounded after each product": ([(1.0, 1.0), (2.0**-12, 2.0**-12), (-1.0, 1.0)], 0.0, 0x00000000),
    "a product that no float holds": ([(-(2.0**127), 1.0), (2.0**100, 2.0**28)], 0.0, 0x7F000000),
    "a sum that none holds": ([(2.0**100, 2.0**100), (-(2.0**100), 2.0**100)], 0.0, 0x7F800000),
    "infinity": ([(math.inf, 2.0)], 1.0, 0x7F800000),
    "infinity times zero": ([(math.inf, 0.0)], 1.0, 0x7FC00000),
    "infinity times a denormal": ([(math.inf, 0.5 * TINY)], 1.0, 0x7FC00000),
    "infinities of both signs": ([(math.inf, 1.0), (math.inf, -1.0)], 1.0, 0x7FC00000),
    "NaN in a": ([(math.nan, 0.0)], 1.0, 0x7FC00000),
    "NaN in b": ([(0.0, math.nan)], 1.0, 0x7FC00000),
    "NaN in c": ([(1.0, 1.0)], math.nan, 0x7FC00000),
}


def one_sum(pairs: list[tuple[float, float]], parities: list[int], start: float, emulated: bool) -> str:
    a, b, c = np.zeros((16, 32), np.uint16), np.zeros((16, 16, 2), np.uint16), np.zeros((16, 16), np.float32)
    for parity in parities:
        for at, (left, right) in enumerate(pairs, 16 - len(pairs)):
            a[3, 2 * at + parity], b[at, 5, parity] = bf16(left), bf16(right)
    c[3, 5] = start
    return hex(bits(dot("bf16", c, a, b, emulated=emulated))[3, 5])


@everywhere
@pytest.mark.parametrize("parity", [0, 1], ids=["even", "odd"])
@pytest.mark.parametrize("name", DIRECTED)
def test_a_sum_at_an_edge(name: str, parity: int, emulated: bool) -> None:
    pairs, start, expected = DIRECTED[name]
    assert one_sum(pairs, [parity], start, emulated) == hex(expected)


@everywhere
def test_a_flushed_sum_keeps_its_sign(emulated: bool) -> None:
    tiny = [(2.0**-64, -(2.0**-63))]
    assert one_sum(tiny, [0, 1], -0.0, emulated) == hex(0x80000000)
    assert one_sum(tiny, [0, 1], -0.5 * TINY, emulated) == hex(0x80000000)
    assert one_sum(tiny, [0, 1], 0.5 * TINY, emulated) == "0x0"
    assert one_sum(tiny, [0], -0.0, emulated) == "0x0"  # the odd sum is +0


@everywhere
def test_a_row_has_the_same_bits_alone_and_among_sixteen(emulated: bool) -> None:
    for seed in range(20):
        c, a, b = tiles_of("everything" if seed % 2 else "weights and activations", seed)
        together = bits(dot("bf16", c, a, b, emulated=emulated))
        for row in (0, 7, 15):
            alone, start = np.zeros_like(a), np.zeros_like(c)
            alone[row], start[row] = a[row], c[row]
            np.testing.assert_array_equal(bits(dot("bf16", start, alone, b, emulated=emulated))[row], together[row])


@everywhere
def test_zeros_behind_the_last_k_change_nothing(emulated: bool) -> None:
    c, a, b = tiles_of("weights and activations", 3)
    a[:, 20:] = 0
    cut = b.copy()
    cut[10:] = 0
    whole, padded = (bits(dot("bf16", c, a, x, emulated=emulated)) for x in (b, cut))
    np.testing.assert_array_equal(whole, padded)


@everywhere
@pytest.mark.parametrize(("kind", "of_a", "of_b"), [("signed_unsigned", "i1", "u1"), ("unsigned_signed", "u1", "i1")])
def test_products_of_bytes_are_whole_numbers_that_wrap(kind: str, of_a: str, of_b: str, emulated: bool) -> None:
    rng = np.random.default_rng(4)
    for largest in (1000, 2**31 - 1):
        c = rng.integers(-largest - 1, largest + 1, (16, 16), dtype=np.int32)
        a, b = rng.integers(0, 256, (16, 64), dtype=np.uint8), rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
        a[0], b[:, 0] = 128, 255  # the largest sums
        c[:, 0] = [2**31 - 1, -(2**31)] * 8
        left, right = a.view(of_a).astype(np.int64), b.view(of_b).astype(np.int64)
        expected = (c + np.einsum("irp,rjp->ij", left.reshape(16, 16, 4), right)).astype(np.int32)
        assert largest == 1000 or (expected != c + left.reshape(16, 16, 4).sum()).any()
        np.testing.assert_array_equal(dot(kind, c, a, b, emulated=emulated), expected)


def test_arrays_of_other_types_and_shapes_are_refused() -> None:
    sums, numbers, tile = np.zeros((16, 16), np.float32), np.zeros((16, 16), np.int32), np.zeros((16, 64), np.uint8)
    refused = [
        (("bf17", sums, tile, tile), ValueError, "bf16, signed_unsigned and unsigned_signed"),
        (("bf16", numbers, tile, tile), ValueError, "float32 with bf16"),
        (("signed_unsigned", sums, tile, tile), ValueError, "int32 with bytes"),
        (("bf16", sums[:15], tile, tile), ValueError, "c is"),
        (("bf16", sums, tile[:, :32].copy(), tile), ValueError, "a is"),
        (("bf16", sums, tile, tile[:8]), ValueError, "b is"),
        (("bf16", sums, tile[:, ::-1], tile), TypeError, "incompatible"),
        (("bf16", sums, tile.view(np.int8), tile), TypeError, "incompatible"),
    ]
    for arguments, error, message in refused:
        with pytest.raises(error, match=message):
            _native.tile_dot(*arguments, emulated=True)


@pytest.mark.parametrize(
    ("numerics", "chosen"),
    [
        ("native-0.1.0/amx/bf16/kv-bf16/rope", "amx" if "amx" in RUNNABLE else "amx-emulated"),
        ("native-0.1.0/avx2/bf16/kv-bf16/rope", next((isa for isa in RUNNABLE if isa.startswith("avx2")), None)),
        (f"native-0.1.0/{RUNNABLE[-1]}/bf16/kv-bf16/rope", RUNNABLE[-1]),
        ("native-0.1.0/of another age/bf16/kv-bf16/rope", None),
        ("torch-2.13/bf16", None),
    ],
)
def test_a_recorded_variant_computes_on(numerics: str, chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a journal names is what a run goes on with, emulated where the machine has other cores."""
    monkeypatch.setenv("TOKENSWIFT_ISA", "generic")
    compute_as(numerics)
    assert os.environ["TOKENSWIFT_ISA"] == "generic", "whoever names one gets it"
    monkeypatch.delenv("TOKENSWIFT_ISA")
    compute_as(numerics)
    assert os.environ.get("TOKENSWIFT_ISA") == chosen
    monkeypatch.setenv("TOKENSWIFT_ISA", "")  # so that it is as before afterwards


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_rows_of_an_emulation_keep_the_row_law(kv_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests of rows run on variants that the machine has instructions for."""
    monkeypatch.setenv("TOKENSWIFT_ISA", "amx-emulated")
    assert_row_law(native_of(config_of(), kv_dtype=kv_dtype), 60, random_tree(60, 40, 0.1))


@pytest.mark.parametrize(("isa", "label"), [("amx-emulated", "amx"), ("avx2-vnni", "avx2")])
def test_a_variant_has_the_label_of_the_one_whose_bits_it_has(
    isa: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa not in (*RUNNABLE, "amx-emulated"):
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("TOKENSWIFT_ISA", isa)
    assert f"/{label}/" in native_of(config_of()).numerics


def test_refused_tiles_are_told_in_a_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(_native, "refused_tiles", lambda: "the system does not allow AMX: no")
    tell_of_refused_tiles.cache_clear()
    tell_of_refused_tiles()
    tell_of_refused_tiles()
    (line,) = caplog.messages
    assert line.startswith("the processor has AMX, which would be faster, but the system does not allow AMX: no; ")
    tell_of_refused_tiles.cache_clear()
