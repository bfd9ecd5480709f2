"""The parts of a decoder's layer as fused kernels; see `Ops` in tokenswift_py/models/ops.py."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F

import triton
from tokenswift_py.kernels.base import PAGE_SIZE
from tokenswift_py.kernels.triton import attention, fused, matmul, tables
from tokenswift_py.kernels.triton.matmul import linear
from tokenswift_py.kernels.triton.runtime import AMD


def configurations() -> str:
    """Returns eight hexadecimal digits that stand for the way the kernels of a pass are compiled.

    They cover tiles, warps, stages, precision and the splits of attention. Other choices give other bits.
    """
    modules = (attention, fused, matmul)
    chosen = [
        (v.name, str(v.dtype), v.head_dim, sorted(v.constants.items()), v.warps, v.stages)
        for module in modules
        for v in module.variants(AMD)
    ]
    splits = (PAGE_SIZE, tables.SPLIT_LEVELS, tables.LAST_LEVEL)
    return hashlib.sha256(repr((chosen, splits)).encode()).hexdigest()[:8]


class TritonOps:
    """`Ops` by Triton's kernels.

    deterministic: whether matrix products keep law 1 too. Else they are cuBLAS's.
    """

    pads = True

    def __init__(self, deterministic: bool):
        self.deterministic = deterministic
        self.guarantee = "bitwise, unverified on hardware" if deterministic else "measured"
        kernels = f"triton-{triton.__version__}/kernels-{configurations()}"
        self.label = f"{kernels}/fixed-tiles" if deterministic else kernels

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, weight, bias) if self.deterministic else F.linear(x, weight, bias)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return fused.norm(x, weight, eps)

    def add_norm(
        self, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (x, fused.norm(x, weight, eps)) if y is None else fused.add_norm(x, y, weight, eps)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return fused.swiglu(gate, up)

    def geglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate, approximate="tanh") * up

    def rope_write(
        self,
        pool: Any,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        return fused.rope_write(q, k, v, cos, sin, slots, pool.keys[layer], pool.values[layer], pool.scales_of(layer))

    def move_rows(self, keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        fused.move_rows(keys, values, source, target)
