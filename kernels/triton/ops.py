"""The parts of a decoder's layer as fused kernels; see `Ops` in tokenswift_py/models/ops.py."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

import triton
from tokenswift_py.kernels.base import PAGE_SIZE
from tokenswift_py.kernels.triton import (
    attention,
    configs,
    copies,
    experts,
    fused,
    items,
    matmul,
    merge,
    packed,
    projections,
)
from tokenswift_py.kernels.triton.products import TILES, Products


def configurations() -> str:
    """Returns eight hexadecimal digits that stand for the way the kernels of a pass are compiled.

    They cover tiles, warps, stages, precision and the splits of attention. Other choices give other bits.
    """
    modules = (attention, experts, fused, matmul, merge, projections)
    chosen = [
        (v.name, str(v.dtype), v.head_dim, sorted(v.constants.items()), v.warps, v.stages)
        for module in modules
        for v in module.variants(configs.here())
    ]
    splits = (PAGE_SIZE, items.SPLIT_LEVELS, items.LAST_LEVEL, items.NEAR)
    return hashlib.sha256(repr((chosen, splits)).encode()).hexdigest()[:8]


# Weights by which the same rows are multiplied, [columns, depth] each, and their biases.
Part = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]


class TritonOps:
    """`Ops` by Triton's kernels, apart from matrix products, which can be the library's."""

    pads = True

    def __init__(self, products: Products = TILES):
        self.products, self.guarantee, self.joins = products, products.guarantee, products.joins
        kernels = f"triton-{triton.__version__}/kernels-{configurations()}"
        self.label = f"{kernels}/{products.label}" if products.label else kernels

    @staticmethod
    def weights_a_step(bits: int) -> int:
        """Returns a number of weights of which a packed row has a multiple."""
        return packed.weights_a_step(bits)

    def in_few_bits(self, parts: Sequence[Part], bits: int) -> FewBitOps:
        """Packs these weights to 4 or 8 bits, and returns the operations that multiply by them in their place."""
        return FewBitOps(self, parts, bits)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.products.linear(x, weight, bias)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return fused.norm(x, weight, eps)

    def add_norm(
        self, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (x, fused.norm(x, weight, eps)) if y is None else fused.add_norm(x, y, weight, eps)

    def gated(
        self,
        x: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        biases: tuple[torch.Tensor, torch.Tensor] | None,
        activation: str,
    ) -> torch.Tensor:
        if self.products.tiled:
            return projections.gated(x, gate, up, biases, activation)
        opened, wide = self.products.several(x, (gate, up), biases)
        return fused.glu(opened, wide, activation)

    def route(self, scores: torch.Tensor, mixture: Any) -> experts.Routes:
        return experts.route(scores, mixture.chosen, mixture.normalised)

    def gated_experts(self, x: torch.Tensor, routes: experts.Routes, own: Any, activation: str) -> torch.Tensor:
        """Multiplies in fixed tiles in any case: the library would have to be told how many rows an expert has."""
        return experts.multiplied(x, own.addresses[:2], routes, len(own.gates[0]), True, activation)

    def linear_experts(self, x: torch.Tensor, routes: experts.Routes, own: Any) -> torch.Tensor:
        return experts.multiplied(x, own.addresses[2:], routes, len(own.downs[0]), False)

    def mix(
        self, parts: torch.Tensor, routes: experts.Routes, shared: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        return experts.mix(parts, routes, shared)

    def qkv(self, x: torch.Tensor, own: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self._projected(x, own)
        if own.norms is not None:
            q, k = (fused.norm(part, norm, own.eps) for part, norm in zip((q, k), own.norms, strict=True))
        return q, k, v

    def _projected(self, x: torch.Tensor, own: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.products.tiled:
            return projections.qkv(x, own.weights, own.biases, own.head_dim)
        q, k, v = (part.unflatten(1, (-1, own.head_dim)) for part in self.products.several(x, own.weights, own.biases))
        return q, k, v

    def qkv_rope_write(
        self,
        pool: Any,
        layer: int,
        x: torch.Tensor,
        own: Any,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Takes one launch where the products are this backend's, and no whole head is needed to go on."""
        keys, values, scales = pool.keys[layer], pool.values[layer], pool.scales_of(layer)
        if self.products.tiled and own.norms is None and scales is None:
            return projections.qkv_rope_write(x, own.weights, own.biases, cos, sin, slots, keys, values)
        q, k, v = self._projected(x, own)
        return fused.rope_write(q, k, v, cos, sin, slots, keys, values, scales, own.norms, own.eps)

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

    def copy_pages(self, keys: torch.Tensor, values: torch.Tensor, copied: copies.Copies, pages: torch.Tensor) -> None:
        copies.copy_pages(keys, values, copied, pages)


class FewBitOps(TritonOps):
    """`Ops` for drafts. Products with a weight that was packed are of its few bits; the others are those of `own`.

    parts: queries, keys and values of a layer are one, its gate and up another. The weights are kept as they are.
    """

    def __init__(self, own: TritonOps, parts: Sequence[Part], bits: int):
        vars(self).update(vars(own))
        self.label += f"/int{bits}"
        self._packed = {
            weights: (packed.pack(*weights, bits=bits), None if biases is None else torch.cat(biases))
            for weights, biases in parts
        }

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the packed weights."""
        return sum(weight.nbytes for weight, _ in self._packed.values())

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        found = self._packed.get((weight,))
        return super().linear(x, weight, bias) if found is None else packed.linear(x, found[0], bias)

    def gated(
        self,
        x: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        biases: tuple[torch.Tensor, torch.Tensor] | None,
        activation: str,
    ) -> torch.Tensor:
        found = self._packed.get((gate, up))
        return super().gated(x, gate, up, biases, activation) if found is None else packed.gated(x, *found, activation)

    def _projected(self, x: torch.Tensor, own: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = self._packed.get(own.weights)
        if found is None:
            return super()._projected(x, own)
        return packed.qkv(x, *found, len(own.weights[0]) // own.head_dim, own.head_dim)

    def qkv_rope_write(
        self,
        pool: Any,
        layer: int,
        x: torch.Tensor,
        own: Any,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        found = self._packed.get(own.weights)
        if found is None or own.norms is not None or pool.scales_of(layer) is not None:
            return super().qkv_rope_write(pool, layer, x, own, cos, sin, slots)
        return packed.qkv_rope_write(x, *found, (cos, sin, slots), pool.keys[layer], pool.values[layer])
