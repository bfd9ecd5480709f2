"""One decoder for the llama, mistral, qwen2 and qwen3 families in torch, on any device.

torch's matrix products round differently with the number of rows, so this executor's identity between plain and
speculative decoding is *measured*, not bitwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from tokenswift_py.core import Output, Segment
from tokenswift_py.kernels.base import PAGE_SIZE, AttentionBackend
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import TorchPagePool, pages_for
from tokenswift_py.models.rows import lay_out, shared_pool
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.rope import RopeTables


class TorchDecoder:
    """Weights under Hugging Face's names, RoPE tables of one context, one attention backend.

    draft: rows are for drafts only and can never be committed.
    """

    guarantee = "measured"

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, torch.Tensor],
        rope: RopeTables,
        attention: AttentionBackend,
        draft: bool = False,
    ):
        self.spec = spec
        self.weights = weights
        self.attention = attention
        self.draft = draft
        self.context = rope.context
        embedding = weights["model.embed_tokens.weight"]
        self.device, self.dtype = embedding.device, embedding.dtype
        self.cos = rope.cos.to(self.device)
        self.sin = rope.sin.to(self.device)
        kind = str(self.dtype).removeprefix("torch.")
        self.numerics = f"torch-{torch.__version__}/{self.device.type}/{kind}/kv-{kind}/{attention.name}/{rope.label}"

    def new_cache(self) -> KVCache:
        return KVCache(self.new_pool(pages_for(self.context)), self.context)

    def new_pool(self, pages: int) -> TorchPagePool:
        """Room for the pages of one or several sequences, which must share a pool to share a pass."""
        spec = self.spec
        return TorchPagePool(spec.layers, spec.kv_heads, spec.head_dim, pages, self.dtype, self.device)

    @torch.inference_mode()
    def forward(
        self,
        segments: Sequence[Segment],
        logit_rows: Sequence[int] | None = None,
        want_mass: bool = False,
        want_queries: bool = False,
    ) -> Output:
        rows = lay_out(segments, target_weights=not self.draft)
        plan = self.attention.prepare(rows.segments, self.device)
        spec, pool = self.spec, shared_pool(segments, TorchPagePool)
        tokens, positions, slots = (
            torch.from_numpy(x).to(self.device, torch.int64) for x in (rows.tokens, rows.positions, rows.slots)
        )
        cos, sin = self.cos[positions, None], self.sin[positions, None]  # [R, 1, head_dim / 2]
        pages = int(rows.positions.max()) // PAGE_SIZE + 1
        mass = self.cos.new_zeros(spec.layers, len(tokens), spec.kv_heads, pages) if want_mass else None
        queries: list[torch.Tensor] = []
        x = self.weights["model.embed_tokens.weight"][tokens]  # [R, hidden]
        for layer in range(spec.layers):
            at = f"model.layers.{layer}."
            normed = self._norm(x, f"{at}input_layernorm.weight")
            q, k, v = self._qkv(normed, f"{at}self_attn.", cos, sin)
            if want_queries:
                queries.append(q.float())
            pool.write(layer, slots, k, v)
            attended = self.attention.attend(
                plan, layer, q, pool.keys[layer], pool.values[layer], spec.windows[layer],
                None if mass is None else mass[layer],
            )  # fmt: skip
            x = x + self._linear(attended.flatten(1), f"{at}self_attn.o_proj")
            normed = self._norm(x, f"{at}post_attention_layernorm.weight")
            gate = F.silu(self._linear(normed, f"{at}mlp.gate_proj"))
            x = x + self._linear(gate * self._linear(normed, f"{at}mlp.up_proj"), f"{at}mlp.down_proj")
        hidden = self._norm(x, "model.norm.weight")
        wanted = hidden if logit_rows is None else hidden[list(logit_rows)]
        return Output(hidden, self.project(wanted), mass, torch.stack(queries, 1) if want_queries else None, x)

    @torch.inference_mode()
    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.weights["model.embed_tokens.weight" if self.spec.tied else "lm_head.weight"]
        logits = F.linear(hidden.to(head.device, head.dtype), head)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _qkv(
        self, x: torch.Tensor, at: str, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[R, heads, head_dim] and twice [R, kv_heads, head_dim], rotated."""
        q, k, v = (self._linear(x, f"{at}{name}_proj").unflatten(1, (-1, self.spec.head_dim)) for name in "qkv")
        if self.spec.qk_norm:
            q, k = self._norm(q, f"{at}q_norm.weight"), self._norm(k, f"{at}k_norm.weight")
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMSNorm; the mean in fp32 as the families were trained."""
        wide = x if x.dtype == torch.float64 else x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.spec.norm_eps)
        return self.weights[name] * scaled.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in the half-split layout of Hugging Face's checkpoints, in fp32 or better. x: [R, heads, head_dim]."""
    first, second = (x if x.dtype == torch.float64 else x.float()).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
