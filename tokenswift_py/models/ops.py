"""The operations of a decoder's layer apart from attention: in torch here, as fused kernels in `kernels/triton`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from tokenswift_py.kernels.base import rotate
from tokenswift_py.kvcache.pages import Copies, TorchPagePool, copy_pages, move_rows
from tokenswift_py.models.families.base import Experts
from tokenswift_py.models.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """The weights by which a layer's queries, keys and values are made.

    weights: [out, in] each, of queries, keys and values. biases: [out] each, or None.
    norms:   [head_dim] each, of the RMSNorm of queries and of keys. None is no such norm.
    """

    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    norms: tuple[torch.Tensor, torch.Tensor] | None
    eps: float
    head_dim: int


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights of a layer's experts, one tensor each.

    gates, ups: [width, hidden]. downs: [hidden, width].
    addresses:  [3, count] int64 on their device: where gates, ups and downs begin in memory, for kernels that choose
                among experts themselves.
    """

    gates: tuple[torch.Tensor, ...]
    ups: tuple[torch.Tensor, ...]
    downs: tuple[torch.Tensor, ...]
    addresses: torch.Tensor


def expert_weights(*parts: Sequence[torch.Tensor]) -> ExpertWeights:
    """Makes the weights of a layer's experts of gates, ups and downs. Copies those that kernels could not read."""
    gates, ups, downs = (tuple(readable(weight) for weight in part) for part in parts)
    addresses = [[weight.data_ptr() for weight in part] for part in (gates, ups, downs)]
    return ExpertWeights(gates, ups, downs, torch.tensor(addresses, device=gates[0].device))


def readable(weight: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous weight that begins at a multiple of 16 bytes."""
    weight = weight.contiguous()
    return weight.clone() if weight.data_ptr() % 16 else weight


MatrixShape = tuple[int, int, bool]  # outputs, inputs, and whether a bias is added
# Matrices of one input, of which one product can compute all. The others are known by the first one's name.
TOGETHER = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def groups_of(spec: ModelSpec) -> list[tuple[str, ...]]:
    """Returns the names of the matrices that rows are multiplied by, those of one input together, without experts."""
    groups: dict[str, tuple[str, ...]] = {}
    for tensor, shape in spec.shapes().items():
        name = tensor.removesuffix(".weight")
        last = name.split(".")[-1]
        if len(shape) == 2 and (spec.tied or last != "embed_tokens") and ".experts." not in name:
            first = name.removesuffix(last) + TOGETHER.get(last, last)
            groups[first] = (*groups.get(first, ()), name)
    return list(groups.values())


def matrices_of(spec: ModelSpec, apart: bool) -> tuple[MatrixShape, ...]:
    """Returns the shapes of the products that a model takes, each once. apart: whether those of one input may be
    computed one by one, too."""
    shapes, found = spec.shapes(), set[MatrixShape]()
    for group in groups_of(spec):
        bias = f"{group[0]}.bias" in shapes
        sizes = [shapes[f"{name}.weight"] for name in group]
        found.add((sum(size[0] for size in sizes), sizes[0][1], bias))
        found |= {(size[0], size[1], bias) for size in sizes} if apart else set()
    return tuple(sorted(found))


def join_weights(weights: dict[str, torch.Tensor], spec: ModelSpec) -> None:
    """Lays matrices of one input, and their biases, side by side in memory, where one product can read them all."""
    for group in groups_of(spec):
        for kind in ("weight", "bias"):
            parts = [weights[f"{name}.{kind}"] for name in group if f"{name}.{kind}" in weights]
            if len(parts) > 1:
                joined = torch.cat(parts).split([len(part) for part in parts])
                weights.update((f"{name}.{kind}", part) for name, part in zip(group, joined, strict=True))


def parts_in_few_bits(
    spec: ModelSpec, weights: Mapping[str, torch.Tensor]
) -> Iterator[tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]]:
    """Yields the weights that drafts have in 4 or 8 bits, and their biases or None. Those that are used as one are one.
    Routers and the gates of shared experts stay: they are small, and choose."""
    for names in groups_of(spec):
        if names[0].endswith("gate"):
            continue
        biases = tuple(weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights)
        yield tuple(weights[f"{name}.weight"] for name in names), biases or None


class Ops(Protocol):
    """The operations of a layer, on R rows at a time.

    guarantee: label of the equality of plain and speculative decoding, given attention that keeps law 1.
    label:     part of the numerics contract.
    pads:      whether `rope_write` skips rows of slot -1, which pad a pass to a fixed shape, and writes the scales of
               int8 pages too.
    joins:     whether it is for matrices that `join_weights` has laid side by side.
    """

    guarantee: str
    label: str
    pads: bool
    joins: bool

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Computes x @ weight.T + bias. x: [R, in]. weight: [out, in]."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Computes RMSNorm over the last dimension. A weight of a wider type than x multiplies before the rounding."""

    def add_norm(
        self, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x + y (None is 0) and its RMSNorm. x, y: [R, hidden]."""

    def gated(
        self,
        x: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        biases: tuple[torch.Tensor, torch.Tensor] | None,
        activation: str,
    ) -> torch.Tensor:
        """Computes act(x @ gate.T) * (x @ up.T), both products rounded first.

        x: [R, in]. gate, up: [columns, in]. activation: silu, or gelu, which is the approximation with tanh.
        """

    def route(self, scores: torch.Tensor, mixture: Experts) -> Any:
        """Returns which experts each row takes, and their shares. scores: [R, count] of the router.

        A row takes those of the largest probabilities, of equal ones the lowest number.
        """

    def gated_experts(self, x: torch.Tensor, routes: Any, own: ExpertWeights, activation: str) -> torch.Tensor:
        """Does the work of `gated` for each row's experts, in ascending order. Returns [R * chosen, columns]."""

    def linear_experts(self, x: torch.Tensor, routes: Any, own: ExpertWeights) -> torch.Tensor:
        """Multiplies the rows of `gated_experts` by the `downs` of their experts. Returns [R * chosen, out]."""

    def mix(self, parts: torch.Tensor, routes: Any, shared: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """Returns [R, out] the sum of each row's experts in ascending order, each times its share.

        parts: [R * chosen, out]. shared: [R, 1] and [R, out] score and result of the expert that every row takes
        besides; the score's sigmoid is its share.
        """

    def qkv(self, x: torch.Tensor, own: HeadWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns queries [R, heads, head_dim], keys and values [R, kv_heads, head_dim], normed but not rotated.

        x: [R, in].
        """

    def qkv_rope_write(
        self,
        pool: TorchPagePool,
        layer: int,
        x: torch.Tensor,
        own: HeadWeights,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Does the work of `qkv` and `rope_write`."""

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

    def copy_pages(self, keys: torch.Tensor, values: torch.Tensor, copies: Copies, pages: torch.Tensor) -> None:
        """Does the work of the function of this name in kvcache/pages.py."""


def linears(x: torch.Tensor, own: HeadWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns queries, keys and values as torch's products give them, in heads."""
    biases = own.biases or (None, None, None)
    q, k, v = (
        F.linear(x, weight, bias).unflatten(1, (-1, own.head_dim))
        for weight, bias in zip(own.weights, biases, strict=True)
    )
    return q, k, v


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


@dataclass(frozen=True, eq=False)
class Routes:
    """The experts that rows take.

    experts: [R, chosen] int64 numbers, ascending. shares: [R, chosen] by which the experts' results are multiplied.
    """

    experts: torch.Tensor
    shares: torch.Tensor

    def groups(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the experts that rows take, each with its pairs. Pair i is expert i % chosen of row i // chosen."""
        pairs = self.experts.flatten()
        for expert in pairs.unique().tolist():
            yield expert, (pairs == expert).nonzero().squeeze(1)


def choose_experts(scores: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns [R, chosen] the experts of each row and their shares, in fp32 or better. The likeliest come first, and of
    equal ones the lowest number.

    scores: [R, count] of the router.
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    shares, chosen = wide.softmax(-1).sort(stable=True, dim=-1, descending=True)
    shares, chosen = shares[:, : experts.chosen], chosen[:, : experts.chosen]
    return chosen, shares / shares.sum(-1, keepdim=True) if experts.normalised else shares


class TorchOps:
    """The operations in torch, on any device and type, with the families' own order of rounding."""

    guarantee = "measured"
    label = ""
    pads = joins = False

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

    def gated(
        self,
        x: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        biases: tuple[torch.Tensor, torch.Tensor] | None,
        activation: str,
    ) -> torch.Tensor:
        return activate(F.linear(x, gate, biases and biases[0]), activation) * F.linear(x, up, biases and biases[1])

    def route(self, scores: torch.Tensor, mixture: Experts) -> Routes:
        chosen, shares = choose_experts(scores, mixture)
        ascending, order = chosen.sort(dim=-1)
        return Routes(ascending, shares.gather(-1, order))

    def gated_experts(self, x: torch.Tensor, routes: Routes, own: ExpertWeights, activation: str) -> torch.Tensor:
        pairs, chosen = routes.experts.numel(), routes.experts.shape[1]
        out = x.new_empty(pairs, len(own.gates[0]))
        for expert, group in routes.groups():
            out[group] = self.gated(x[group // chosen], own.gates[expert], own.ups[expert], None, activation)
        return out

    def linear_experts(self, x: torch.Tensor, routes: Routes, own: ExpertWeights) -> torch.Tensor:
        out = x.new_empty(len(x), len(own.downs[0]))
        for expert, group in routes.groups():
            out[group] = self.linear(x[group], own.downs[expert], None)
        return out

    def mix(
        self, parts: torch.Tensor, routes: Routes, shared: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        by_row = parts.unflatten(0, routes.experts.shape)
        total = torch.zeros_like(by_row[:, 0])
        for i in range(by_row.shape[1]):
            total += (by_row[:, i] * routes.shares[:, i, None]).to(parts.dtype)
        return total if shared is None else total + shared[0].sigmoid() * shared[1]

    def qkv(self, x: torch.Tensor, own: HeadWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = linears(x, own)
        if own.norms is not None:
            q, k = (self.norm(part, norm, own.eps) for part, norm in zip((q, k), own.norms, strict=True))
        return q, k, v

    def qkv_rope_write(
        self,
        pool: TorchPagePool,
        layer: int,
        x: torch.Tensor,
        own: HeadWeights,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        return self.rope_write(pool, layer, *self.qkv(x, own), cos, sin, slots)

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

    def copy_pages(self, keys: torch.Tensor, values: torch.Tensor, copies: Copies, pages: torch.Tensor) -> None:
        copy_pages(keys, values, copies, pages)
