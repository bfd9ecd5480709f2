"""The operations of a decoder's layer apart from attention: in torch here, as fused kernels in `kernels/triton`."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from tokenswift_py.kernels.base import rotate
from tokenswift_py.kvcache.pages import TorchPagePool, move_rows


class Ops(Protocol):
    """The operations of a layer, on R rows at a time.

    guarantee: label of the equality of plain and speculative decoding, given attention that keeps law 1.
    label:     part of the numerics contract.
    pads:      whether `rope_write` skips rows of slot -1, which pad a pass to a fixed shape, and writes the scales of
               int8 pages too.
    """

    guarantee: str
    label: str
    pads: bool

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Computes x @ weight.T + bias. x: [R, in]. weight: [out, in]."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Computes RMSNorm over the last dimension. A weight of a wider type than x multiplies before the rounding."""

    def add_norm(
        self, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x + y (None is 0) and its RMSNorm. x, y: [R, hidden]."""

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Computes silu(gate) * up."""

    def geglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """gelu(gate) * up, the gelu by its approximation with tanh."""

    def rope_write(
        self,
        pool: TorchPagePool,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Returns q rotated, and writes k rotated and v to the layer's slots.

        q: [R, heads, head_dim]. k, v: [R, kv_heads, head_dim]. cos, sin: [R, head_dim / 2]. slots: [R] int64.
        """

    def move_rows(self, keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """Does the work of the function of this name in kvcache/pages.py."""


class TorchOps:
    """The operations in torch, on any device and type, with the families' own order of rounding."""

    guarantee = "measured"
    label = ""
    pads = False

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Computes RMSNorm with its mean in fp32, as the families were trained."""
        wide = x if x.dtype == torch.float64 else x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * scaled.to(x.dtype) if weight.dtype == x.dtype else (weight * scaled).to(x.dtype)

    def add_norm(
        self, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x if y is None else x + y
        return total, self.norm(total, weight, eps)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    def geglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate, approximate="tanh") * up

    def rope_write(
        self,
        pool: TorchPagePool,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        pool.write(layer, slots, rotate(k, cos[:, None], sin[:, None]), v)
        return rotate(q, cos[:, None], sin[:, None])

    def move_rows(self, keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        move_rows(keys, values, source, target)
