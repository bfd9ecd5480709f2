"""EAGLE-3's forward by its published rules, whole and in double."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from random_eagle import KV_HEADS, ROPE
from tokenswift_py.drafters.eagle_layer import EagleLayer


def dense(layer: EagleLayer, model: Any, text: Sequence[int], ahead: Sequence[int], window: int) -> torch.Tensor:
    """[vocab] logits after a text and drafted tokens, by the published rules: in double, each row anew, at the text's
    own positions, with what transformers' model reports."""
    s, t = layer.shape, {name: tensor.double() for name, tensor in layer.tensors.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return t[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + s.eps).sqrt()

    def turned(x: torch.Tensor, heads: int, at: torch.Tensor) -> torch.Tensor:
        x = x.view(len(x), heads, 2, -1)  # first and second halves are the parts of complex numbers
        angles = at[:, None] * ROPE["rope_theta"] ** (-torch.arange(x.shape[-1], dtype=torch.double) / x.shape[-1])
        return torch.complex(x[:, :, 0], x[:, :, 1]) * torch.polar(torch.ones_like(angles), angles)[:, None]

    layers = model(torch.tensor([list(text[:-1])]), output_hidden_states=True).hidden_states
    taps = [layers[tap][0].double() for tap in s.taps]
    joined = torch.cat([norm(x, f"fc_norm.{i}") for i, x in enumerate(taps)] if s.fc_norm else taps, 1)
    states = (norm(joined, "input_norm") if s.norm_before_fc else joined) @ t["fc.weight"].T
    first = max(0, len(states) - window)
    states = states[first:]
    for step in range(len(ahead) + 1):
        tokens = [*text[1:], *ahead[:step]][first:]
        embedded, normed = layer.embedding[tokens].double(), norm(states, "midlayer.hidden_norm")
        x = torch.cat([norm(embedded, "midlayer.input_layernorm"), normed], 1)
        q, k, v = (x @ t[f"midlayer.self_attn.{part}_proj.weight"].T for part in "qkv")
        at = torch.arange(first, first + len(x)).double()
        keys, values = turned(k, KV_HEADS, at), v.view(len(v), KV_HEADS, -1)
        scores = torch.einsum("hgd,khd->hgk", turned(q, s.heads, at)[-1].view(KV_HEADS, -1, s.head_dim // 2),
                              keys.conj()).real * s.head_dim**-0.5  # fmt: skip
        mixed = torch.einsum("hgk,khd->hgd", scores.softmax(-1), values).flatten()
        h = (normed if s.norm_before_residual else states)[-1] + t["midlayer.self_attn.o_proj.weight"] @ mixed
        y = norm(h, "midlayer.post_attention_layernorm")
        gate, up = (t[f"midlayer.mlp.{part}_proj.weight"] @ y for part in ("gate", "up"))
        h = h + t["midlayer.mlp.down_proj.weight"] @ (F.silu(gate) * up)
        states = torch.cat([states, (norm(h, "norm") if s.norm_output else h)[None]])
    logits = torch.full((s.vocab,), -torch.inf, dtype=torch.double)
    logits[layer.targets] = t["lm_head.weight"] @ norm(h, "norm")
    return logits
