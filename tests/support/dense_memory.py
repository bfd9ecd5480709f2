"""A llama with evictions and a memory, written down densely: no pages, no cache, no logarithms of sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

PAGE = 64
Weights = Mapping[str, torch.Tensor]


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turned(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotates [T, heads, d] by its positions 0 .. T - 1."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = (f(angles).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def phi(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.elu(x) + 1


def head_output(
    kind: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plain: Sequence[torch.Tensor], budget: int,
    period: int, rows: torch.Tensor | None, gate: float, group_queries: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """One query head over its KV head, [T, d]. q, k: rotated; plain: before RoPE; rows: of the random features;
    group_queries: [group, T, d] rotated queries of all heads of the KV head."""
    count, d = q.shape
    out = torch.zeros_like(v)
    for p in range(count):
        evictions = max(0, (p - budget) // (period * PAGE) + 1)
        gone = [slice(i * PAGE, (i + 1) * PAGE) for i in range(1, 1 + evictions * period)]
        kept = torch.ones(p + 1, dtype=torch.bool)
        for page in gone:
            kept[page] = False
        weights = (q[p] @ k[: p + 1].T * d**-0.5).exp() * kept
        if gone and kind in ("infini", "infini_linear"):
            matrix, total = torch.zeros(d, d, dtype=v.dtype), torch.zeros(d, dtype=v.dtype)
            for page in gone:
                s = phi(plain[1][page])
                known = s @ matrix / (s @ total)[:, None] if kind == "infini" and total.any() else 0
                matrix, total = matrix + s.T @ (v[page] - known), total + s.sum(0)
            recalled = phi(plain[0][p]) @ matrix / (phi(plain[0][p]) @ total)
            out[p] = gate * recalled + (1 - gate) * (weights @ v[: p + 1] / weights.sum())
            continue
        for number, page in enumerate(gone):
            if kind == "linear":
                at = budget + number // period * period * PAGE  # where the page was folded
                latest = group_queries[:, at - PAGE : at].flatten(0, 1)
                mass = (latest @ k[page].T * d**-0.5).exp().sum(-1)
                scale = (mass / (phi(latest) @ phi(k[page]).sum(0))).log().mean().exp()
                weights[page] = scale * (phi(k[page]) @ phi(q[p]))
            elif kind == "performer":
                assert rows is not None
                centre = k[gone[0]].mean(0)

                def features(x: torch.Tensor) -> torch.Tensor:
                    return (x * d**-0.25 @ rows.T - x.square().sum(-1, keepdim=True) * d**-0.5 / 2).exp()

                weights[page] = features(k[page] - centre) @ features(q[p]) / len(rows)
                weights[page] *= (q[p] @ centre * d**-0.5).exp()
        out[p] = weights @ v[: p + 1] / weights.sum()
    return out


def dense_logits(
    weights: Weights, config: object, tokens: Sequence[int], kind: str, budget: int, period: int,
    rows: torch.Tensor | None = None, gates: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Returns [T, vocab]. kind: of the memory, or none. gates: [layers, heads] shares of what is recalled."""
    heads, kv_heads, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    theta, group = config.rope_parameters["rope_theta"], heads // kv_heads
    x = weights["model.embed_tokens.weight"][torch.tensor(tokens)]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        y = norm(x, weights[f"{at}input_layernorm.weight"], eps)
        q, k, v = (
            (y @ weights[f"{at}self_attn.{name}_proj.weight"].T).unflatten(-1, (n, -1))
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        rq, rk = turned(q, theta), turned(k, theta)
        outs = []
        for h in range(heads):
            kv = h // group
            gate = 0.0 if gates is None else float(gates[layer, h])
            of_group = rq[:, kv * group : (kv + 1) * group].transpose(0, 1)
            shared = (q[:, h], k[:, kv]), budget, period, rows, gate, of_group
            outs.append(head_output(kind, rq[:, h], rk[:, kv], v[:, kv], *shared))
        x = x + torch.cat(outs, -1) @ weights[f"{at}self_attn.o_proj.weight"].T
        y = norm(x, weights[f"{at}post_attention_layernorm.weight"], eps)
        gate, up = (y @ weights[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[f"{at}mlp.down_proj.weight"].T
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, weights["model.norm.weight"], eps) @ head.T
