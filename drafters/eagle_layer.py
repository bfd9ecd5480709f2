"""EAGLE-3's draft: one decoder layer that reads what enters three layers of the target (Li et al. 2025, arXiv
2503.01840, section 3.1, and the authors' code).

The row at position p reads the token at p + 1 and the target's state at p, which is f_p = fc [what entered the three
layers at p]:

    x = [rms(embedding(t_{p+1})), rms(f_p)]
    h = f_p + o attention(q x, k x, v x)
    h = h + down (silu(gate rms(h)) * up rms(h))

The draft's LM head reads rms(h), over a vocabulary of its own, and guesses t_{p+2}. Where the target has no row yet,
h stands for f of the next row. EAGLE 3.1 norms each of the three states before fc, and hands on rms(h) instead of h.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tokenswift_py.drafters.own_layers import OwnLayers, Window

TAPS = 3  # the layers of the target that a draft reads
NORMS = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")


@dataclass(frozen=True)
class EagleShape:
    """The sizes of a draft, and the rules in which drafts differ.

    hidden, target_hidden: sizes of its own states and of the target's. ffn: columns of its feed-forward.
    vocab, draft_vocab: tokens of the target, and those that it can guess.
    taps: layers of the target, ascending, whose inputs it reads.
    rope: config of transformers by which it rotates.
    norm_before_residual: whether the normed state, not the state, is what the layer adds to.
    fc_norm, norm_before_fc: whether each of the three states, or the three joined, are normed before fc.
    norm_output: whether the normed h stands for the target's state of the next row.
    """

    hidden: int
    target_hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    draft_vocab: int
    eps: float
    taps: tuple[int, ...]
    rope: Any
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor of the layer, its LM head included."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention, mlp = "midlayer.self_attn.{}_proj.weight", "midlayer.mlp.{}_proj.weight"
        found: dict[str, tuple[int, ...]] = {f"{name}.weight": (self.hidden,) for name in NORMS}
        if self.fc_norm:
            found |= {f"fc_norm.{i}.weight": (self.target_hidden,) for i in range(TAPS)}
        if self.norm_before_fc:
            found["input_norm.weight"] = (TAPS * self.target_hidden,)
        return found | {
            "fc.weight": (self.hidden, TAPS * self.target_hidden),
            attention.format("q"): (q, 2 * self.hidden),
            attention.format("k"): (kv, 2 * self.hidden),
            attention.format("v"): (kv, 2 * self.hidden),
            attention.format("o"): (self.hidden, q),
            mlp.format("gate"): (self.ffn, self.hidden),
            mlp.format("up"): (self.ffn, self.hidden),
            mlp.format("down"): (self.hidden, self.ffn),
            "lm_head.weight": (self.draft_vocab, self.hidden),
        }


class EagleLayer(OwnLayers):
    """The layer's tensors and its arithmetic, row by row.

    tensors:   those of `EagleShape.shapes`.
    embedding: [vocab, hidden], its own or the target's.
    targets:   [draft_vocab] token of the target that each of its own means.
    """

    def __init__(
        self, shape: EagleShape, tensors: Mapping[str, torch.Tensor], embedding: torch.Tensor, targets: torch.Tensor
    ):
        super().__init__(tensors, embedding, shape.taps, shape.eps, shape.rope)
        self.shape, self.targets = shape, targets

    def move(self, device: torch.device) -> None:
        super().move(device)
        self.targets = self.targets.to(device)

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """Returns the states [R, hidden] of rows [R, 3, target_hidden] of the target."""
        if self.shape.fc_norm:
            taps = torch.stack([self.norm(taps[:, i], f"fc_norm.{i}") for i in range(TAPS)], 1)
        joined = taps.flatten(1)
        if self.shape.norm_before_fc:
            joined = self.norm(joined, "input_norm")
        return self.linear(joined, "fc")

    def inputs(self, tokens: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what attention reads, [R, 2 hidden], and what the layer adds to, [R, hidden].

        tokens: [R] on the CPU, each the one after its row. states: [R, hidden] of `fuse`, or the draft's own.
        """
        normed = self.norm(states, "midlayer.hidden_norm")
        joined = torch.cat([self.norm(self.embedded(tokens), "midlayer.input_layernorm"), normed], 1)
        return joined, normed if self.shape.norm_before_residual else states

    def queries(self, joined: torch.Tensor) -> torch.Tensor:
        """Returns [R, heads, head_dim], not rotated."""
        queries: torch.Tensor = self.linear(joined, "midlayer.self_attn.q_proj").unflatten(1, (self.shape.heads, -1))
        return queries

    def keys_values(self, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys, not rotated, and values, [R, kv_heads, head_dim] each."""
        keys, values = (self.linear(joined, f"midlayer.self_attn.{part}_proj") for part in "kv")
        return keys.unflatten(1, (self.shape.kv_heads, -1)), values.unflatten(1, (self.shape.kv_heads, -1))

    def scores(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Returns the scaled scores [kv_heads, group, Q, K] of rotated queries [Q, heads, head_dim] and keys [K,
        kv_heads, head_dim], in fp32."""
        grouped = queries.unflatten(1, (self.shape.kv_heads, -1)).permute(1, 2, 0, 3)
        # A group's queries are rows of one product: where they were a batch of their own, keys were copied for each.
        scores = (grouped.flatten(1, 2) @ keys.permute(1, 2, 0)).float() * self.shape.head_dim**-0.5
        apart: torch.Tensor = scores.unflatten(1, grouped.shape[1:3])
        return apart

    def attended(self, shares: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns [Q, heads head_dim]: values [K, kv_heads, head_dim] by shares [kv_heads, group, Q, K]."""
        mixed = shares.to(values.dtype).flatten(1, 2) @ values.permute(1, 0, 2)
        apart: torch.Tensor = mixed.unflatten(1, shares.shape[1:3])
        return apart.permute(2, 0, 1, 3).flatten(1)

    def finish(self, base: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Returns h [R, hidden], given what the layer adds to and what attention gave."""
        h = base + self.linear(attended, "midlayer.self_attn.o_proj")
        normed = self.norm(h, "midlayer.post_attention_layernorm")
        return h + self.gated(normed, "midlayer.mlp.")

    def handed_on(self, h: torch.Tensor) -> torch.Tensor:
        """Returns the states that stand for the target's at the next rows."""
        return self.norm(h, "norm") if self.shape.norm_output else h

    def own_logits(self, h: torch.Tensor) -> torch.Tensor:
        """Returns [R, draft_vocab] fp32 logits."""
        return self.linear(self.norm(h, "norm"), "lm_head").float()

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Returns [R, vocab] fp32 logits, -inf for tokens that the draft cannot guess."""
        own = self.own_logits(h)
        return own.new_full((len(h), self.shape.vocab), -torch.inf).index_copy_(1, self.targets, own)


class Ahead:
    """One draft: the rows of a window, of which the last is the first to guess from, and those of the draft itself.

    room: rows that the draft may add.
    """

    def __init__(self, layer: EagleLayer, window: Window, room: int):
        self.layer, self.rows, self.made = layer, len(window), 0
        layer.reach(self.rows + room)
        more = torch.empty(room, *window.keys.shape[1:], dtype=layer.dtype, device=layer.device)
        self.keys = torch.cat([layer.rotate(window.keys, 0), more])
        self.values = torch.cat([window.values, more])

    def step(self, token: int, state: torch.Tensor) -> torch.Tensor:
        """Computes one row. The first is the window's last one. Returns its h, [1, hidden].

        token: the one after the row. state: [1, hidden], the target's there or what the row before has handed on.
        """
        layer = self.layer
        joined, base = layer.inputs(torch.tensor([token]), state)
        if self.made:
            keys, values = layer.keys_values(joined)
            self.keys[self.rows], self.values[self.rows] = layer.rotate(keys, self.rows)[0], values[0]
            self.rows += 1
        self.made += 1
        query = layer.rotate(layer.queries(joined), self.rows - 1)
        shares = layer.scores(query, self.keys[: self.rows]).softmax(-1)
        return layer.finish(base, layer.attended(shares, self.values[: self.rows]))
