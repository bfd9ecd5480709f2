"""The fused Triton kernels compute what torch does; copies to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from interpreter import DEVICE
from scenes import LAYERS, fill, new_pool
from tokenswift_py.kernels.base import rotate
from tokenswift_py.kernels.triton import fused
from tokenswift_py.kvcache.pages import TorchPagePool
from tokenswift_py.models.ops import TorchOps
from triton_scenes import seeded as seeded

# The interpreter cuts bf16 short instead of rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(("dtype", "wide"), [*((dtype, False) for dtype in TOLERANCE), (torch.bfloat16, True)])
@pytest.mark.parametrize("width", [48, 1025])
def test_norms_with_and_without_a_residual(dtype: torch.dtype, wide: bool, width: int) -> None:
    """A weight in fp32 beside rows of 16 bits, as Gemma has it, multiplies before they are rounded."""
    x, y = torch.randn(3, width).to(dtype), torch.randn(3, width).to(dtype)
    weight = torch.randn(width).to(torch.float32 if wide else dtype)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": 3 * TOLERANCE[dtype]}
    for total in (x, x + y):
        expected = TorchOps().norm(total, weight, 1e-5)
        if total is x:
            torch.testing.assert_close(fused.norm(x, weight, 1e-5), expected, **tolerance)
        else:
            added, normed = fused.add_norm(x, y, weight, 1e-5)
            torch.testing.assert_close(added, total, **tolerance)
            torch.testing.assert_close(normed, expected, **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu_and_geglu(dtype: torch.dtype) -> None:
    """Also far from zero, where one of GELU's terms is no number of the type any more."""
    gate, up = torch.randn(3, 700).to(dtype), torch.randn(3, 700).to(dtype)
    gate[0, :4] = torch.tensor([1e4, -1e4, 90.0, -90.0])
    tolerance = {"rtol": TOLERANCE[dtype], "atol": 2 * TOLERANCE[dtype]}
    torch.testing.assert_close(fused.glu(gate, up), F.silu(gate) * up, **tolerance)
    torch.testing.assert_close(fused.glu(gate, up, "gelu"), F.gelu(gate, approximate="tanh") * up, **tolerance)


@pytest.mark.parametrize("head_dim", [16, 80])
def test_rotation_and_the_write_to_the_pages_are_torchs_to_the_bit(head_dim: int) -> None:
    pool = new_pool(2, head_dim, torch.float32, DEVICE)
    before = pool.keys.clone()
    q, k, v = torch.randn(3, 6, head_dim), torch.randn(3, 2, head_dim), torch.randn(3, 2, head_dim)
    angles = torch.rand(40, head_dim // 2)
    positions, slots = torch.tensor([0, 39, 7]), torch.tensor([70, 5, 3071])
    keys, values = pool.keys[1], pool.values[1]
    cos, sin = angles.cos()[positions], angles.sin()[positions]
    out = fused.rope_write(q, k, v, cos, sin, slots, keys, values)
    cos, sin = cos[:, None], sin[:, None]
    assert torch.equal(out, rotate(q, cos, sin))
    assert torch.equal(keys.flatten(1, 2)[:, slots], rotate(k, cos, sin).transpose(0, 1))
    assert torch.equal(values.flatten(1, 2)[:, slots], v.transpose(0, 1))
    untouched = torch.ones(48 * 64, dtype=torch.bool)
    untouched[slots] = False
    assert torch.equal(keys.flatten(1, 2)[:, untouched].isnan(), before[1].flatten(1, 2)[:, untouched].isnan())
    assert torch.equal(pool.keys[0].isnan(), before[0].isnan())


@pytest.mark.parametrize("head_dim", [16, 80])
def test_int8_pages_get_what_torch_makes_of_the_rows(head_dim: int) -> None:
    """To the bit; also of zeros, of what is too small for a scale, and of what is not finite. Slot -1 is nowhere."""
    pool, expected = (TorchPagePool(1, 2, head_dim, 3, torch.int8, DEVICE) for _ in range(2))
    for part in (pool, expected):
        part.keys.fill_(99)
        part.values.fill_(99)
        part.key_scales.fill_(-1)
        part.value_scales.fill_(-1)
    q, k, v = torch.randn(7, 4, head_dim), torch.randn(7, 2, head_dim), 100 * torch.randn(7, 2, head_dim)
    v[0, 0] = 0
    v[1, 0] = 1e-38
    k[2, 0, 3], v[2, 1, 5] = torch.inf, torch.nan
    angles = torch.rand(7, head_dim // 2)
    slots = torch.tensor([5, 64, 66, 190, 191, 0, -1])
    fused.rope_write(q, k, v, angles.cos(), angles.sin(), slots, pool.keys[0], pool.values[0], pool.scales_of(0))
    rotated = rotate(k, angles.cos()[:, None], angles.sin()[:, None])
    expected.write(0, slots[:6], rotated[:6], v[:6])
    for name in ("keys", "values", "key_scales", "value_scales"):
        got, true = getattr(pool, name), getattr(expected, name)
        assert torch.equal(got.nan_to_num(nan=7.0), true.nan_to_num(nan=7.0)), name
        assert (name == "keys") or (got != -1).any()
    back = pool.values[0].flatten(1, 2)[:, 5].float() * pool.value_scales[0].flatten(1, 2)[:, 5, None]
    assert (back - v[0]).abs().max() <= v[0].abs().max() / 127 / 2 * 1.001
    before = [part.clone().flatten(2, 3) for part in (pool.keys, pool.key_scales[..., None])]
    pool.move(np.array([5, 64]), np.array([64, 5]))
    for part, kept in zip((pool.keys, pool.key_scales[..., None]), before, strict=True):
        assert torch.equal(part.flatten(2, 3)[:, :, [64, 5]], kept[:, :, [5, 64]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_accepted_rows_move_as_if_read_before_any_is_written(dtype: torch.dtype, head_dim: int) -> None:
    """Compaction, where targets are other rows' sources; and a cycle, which no order of copies gets right."""
    pool = new_pool(2, head_dim, dtype, DEVICE)
    fill(pool, np.arange(200, dtype=np.int32))
    cases = [([130, 131, 140, 141, 170], [129, 130, 131, 132, 133]), ([3, 4, 5], [4, 5, 3]), ([7], [7])]
    for source, target in [*cases, (list(range(100, 140)), list(range(101, 141)))]:
        expected = [part.clone().flatten(2, 3) for part in (pool.keys, pool.values)]
        for part in expected:
            part[:, :, target] = part[:, :, source]
        indices = (torch.tensor(x) for x in (source, target))
        fused.move_rows(pool.keys, pool.values, *indices)
        for part, wanted in zip((pool.keys, pool.values), expected, strict=True):
            assert torch.equal(part.flatten(2, 3).view(torch.uint8), wanted.view(torch.uint8))
    assert LAYERS > 1
