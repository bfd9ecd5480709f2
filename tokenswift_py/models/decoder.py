"""One decoder for all families in torch, on any device.

torch's matrix products round differently with the number of rows. So the identity between plain and speculative
decoding is *measured* with this executor, not bitwise, unless `ops` and attention keep law 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary, proxy

import numpy as np
import torch

from tokenswift_py.core import Chooser, Output, Segment
from tokenswift_py.errors import check
from tokenswift_py.kernels._prefix import join_recalled
from tokenswift_py.kernels.base import AttentionBackend, FarQueries, architecture, capped, on_device
from tokenswift_py.kernels.naive import accumulator
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.memories.base import Memory, Shape
from tokenswift_py.kvcache.pages import TorchPagePool, index, pages_for
from tokenswift_py.models.captured import Steps, recorder_for, row_shapes
from tokenswift_py.models.clock import clock_of
from tokenswift_py.models.families.base import GLOBAL, LOCAL
from tokenswift_py.models.ops import ExpertWeights, HeadWeights, Ops, TorchOps, expert_weights
from tokenswift_py.models.rope import RopeTables, query_turns
from tokenswift_py.models.rows import Passed, Recall, Rows, lay_out, recalls_of, shared_pool, taps_of
from tokenswift_py.models.spec import ModelSpec


def reads_int8(attention: AttentionBackend, ops: Ops) -> bool:
    """Returns whether keys and values can be int8: attention reads them with their scales, and the ops write them
    so."""
    return ops.pads and getattr(attention, "reads_int8", False)


def check_moves_queries(attention: AttentionBackend, rope: RopeTables) -> None:
    """Raises UserError for attention that cannot meet far keys from other positions than the rows' own, where these
    tables need it."""
    able = rope.shifts is None or getattr(attention, "moves_queries", False)
    allowed = f"attention {attention.name} cannot; attention triton and sdpa and engine native can, and positions"
    check(able, "positions", rope.positions.scheme, f"{allowed} trained, linear, ntk and yarn need nothing of it")


KINDS = ("gate", "up", "down")


class TorchDecoder:
    """Weights under Hugging Face's names, RoPE tables of one context, one attention backend, the other operations.

    draft:      whether rows are for drafts only and can never be committed.
    kv_dtype:   type of keys and values; None is that of the weights. int8 (see `quantise` in kvcache/pages.py) is for
                attention that reads it, and the ops that go with it.
    int8_pages: whether full pages are read as int8 copies, which the ops make when a pass first sees them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, torch.Tensor],
        rope: RopeTables,
        attention: AttentionBackend,
        ops: Ops | None = None,
        draft: bool = False,
        kv_dtype: torch.dtype | None = None,
        int8_pages: bool = False,
    ):
        self.spec, self.streams = spec, 2
        self.weights = {name: spec.folded(name, tensor) for name, tensor in weights.items()}
        self.attention, self.draft, self.ops = attention, draft, ops or TorchOps()
        self.guarantee, self.context, self.int8_pages = self.ops.guarantee, rope.context, int8_pages
        matrix = weights[f"{spec.at(0)}self_attn.q_proj.weight"]
        self.device, self.dtype = matrix.device, matrix.dtype
        self.cos, self.sin = rope.cos.to(self.device), rope.sin.to(self.device)
        self._tables = {GLOBAL: (self.cos, self.sin)}
        if rope.local is not None:
            self._tables[LOCAL] = (rope.local.cos.to(self.device), rope.local.sin.to(self.device))
        self._embedding_scale = torch.tensor(spec.embedding_scale, device=self.device).to(self.dtype)
        self.shifts, self._turns, self._moved = rope.shifts, query_turns(rope, spec), spec.moved(rope.shifts)
        check_moves_queries(attention, rope)
        if rope.shifts is not None:
            self._shift_table = torch.from_numpy(rope.shifts.shifts).to(self.device)
        self._heads = [self._head_weights(f"{spec.at(layer)}self_attn.") for layer in range(spec.layers)]
        mixtures = (layer for layer, kind in enumerate(spec.layer_specs) if kind.experts)
        self._experts = {layer: self._expert_weights(f"{spec.at(layer)}mlp") for layer in mixtures}
        self.kv_dtype = kv_dtype or self.dtype
        int8 = reads_int8(attention, self.ops)
        allowed = f"{self.dtype}{' or torch.int8' if int8 else ''} with attention {attention.name}"
        check(self.kv_dtype == self.dtype or (int8 and self.kv_dtype == torch.int8), "kv_dtype", kv_dtype, allowed)
        kind, kv = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.kv_dtype))
        parts = [f"torch-{torch.__version__}", architecture(self.device), kind, f"kv-{kv}", attention.name, rope.label]
        self.numerics = "/".join([*parts, self.ops.label] if self.ops.label else parts)
        self.row_shapes = row_shapes(attention, self.ops)
        self.chains = len(self.row_shapes) > 0
        self.clock, self.recorder = clock_of(self.device), recorder_for(self.device)
        self._steps: WeakKeyDictionary[TorchPagePool, Steps] = WeakKeyDictionary()

    def new_cache(self) -> KVCache:
        return KVCache(self.new_pool(pages_for(self.context)), self.context)

    def new_pool(self, pages: int) -> TorchPagePool:
        """Makes room for the pages of one or several sequences, which must share a pool to share a pass."""
        spec = self.spec
        return TorchPagePool(
            spec.layers, spec.kv_heads, spec.head_dim, pages, self.kv_dtype, self.device, self.ops.move_rows
        )

    def remembers(self) -> Shape:
        """Returns what a memory of this model's evicted rows has to know of it. A layer with a window has none."""
        spec = self.spec
        return Shape(
            tuple(layer.window is None for layer in spec.layer_specs), spec.kv_heads, spec.heads, spec.head_dim,
            torch.promote_types(self.dtype, torch.float32), self.device,
            [None if layer.rope is None else self._tables[layer.rope] for layer in spec.layer_specs],
        )  # fmt: skip

    def new_memory(self, plain: Memory, kind: str) -> Memory:
        """Returns the memory as it is: its tensors are read here."""
        return plain

    @torch.inference_mode()
    def forward(
        self, segments: Sequence[Segment], logit_rows: Sequence[int] | None = None, want_mass: bool = False,
        want_queries: bool = False, taps: Sequence[int] = (),
    ) -> Output:  # fmt: skip
        rows = lay_out(segments, not self.draft, getattr(self.attention, "views_there", False))
        pool = shared_pool(segments, TorchPagePool)
        wanted = slice(None) if logit_rows is None else index(np.array(logit_rows, np.int64), self.device)
        with torch.cuda.device_of(self.cos):  # Triton and CUDA graphs launch there
            pool.copy_pages(rows.segments, self.ops.copy_pages if self.int8_pages else None)
            step = self.steps_over(pool).find(rows, logit_rows is None, want_mass, want_queries, tuple(taps))
            recalls = recalls_of(segments, rows)
            if step is None or recalls:
                plan = self.attention.prepare(rows.segments, self.device)
                places, pages = on_device(rows.places, self.device), rows.pages if want_mass else None
                return self.compute(pool, plan, places, wanted, pages, want_queries, recalls, taps)
            output = step.run(rows)
            return output if logit_rows is None else replace(output, logits=self._project(output.hidden[wanted]))

    @torch.inference_mode()
    def forward_chain(self, segment: Segment, chooser: Chooser) -> Output:
        rows, pool = lay_out([segment], False, True), shared_pool([segment], TorchPagePool)
        with torch.cuda.device_of(self.cos):
            pool.copy_pages(rows.segments, self.ops.copy_pages if self.int8_pages else None)
            return self.steps_over(pool).chain(rows, chooser).run(rows)

    def steps_over(self, pool: TorchPagePool) -> Steps:
        """Returns the passes of fixed shapes over a pool. They keep neither the pool nor this decoder alive."""
        if pool not in self._steps:
            self._steps[pool] = Steps(proxy(self), proxy(pool), self.recorder)
        return self._steps[pool]

    def compute(
        self, pool: TorchPagePool, plan: Any, places: torch.Tensor, logit_rows: slice | torch.Tensor,
        mass_pages: int | None, want_queries: bool, recalls: Sequence[Recall] = (), taps: Sequence[int] = (),
    ) -> Output:  # fmt: skip
        """Computes a pass. Its launches depend on shapes alone, not on the contents of memory.

        plan: the attention's plan.
        places: [3, R] int64 tokens, positions, slots.
        mass_pages: number of pages whose attention mass is reported; None reports none.
        recalls: rows that read a memory of evicted rows too. taps: layers whose inputs are reported.
        """
        x = self._first_stream(places[0])
        states = x.new_empty(len(x), len(taps), self.spec.hidden_size) if taps else None
        seen = taps_of(taps, states, self.spec.layers)
        x, added, mass, queries = self._layers(pool, plan, places, x, None, mass_pages, want_queries, recalls, seen)
        stream, hidden = self._add_norm(x, added, "model.norm")
        return Output(hidden, self._project(hidden[logit_rows]), mass, queries, stream, self._turns, states)

    @torch.inference_mode()
    def advance(
        self, pool: TorchPagePool, rows: Rows, stream: torch.Tensor | None, mass_pages: int | None, want_queries: bool
    ) -> Passed:
        """Computes the layers of one stage of a pipeline. stream: result of the stage before; None embeds tokens."""
        with torch.cuda.device_of(self.cos):
            pool.copy_pages(rows.segments, self.ops.copy_pages if self.int8_pages else None)
            plan, places = self.attention.prepare(rows.segments, self.device), on_device(rows.places, self.device)
            x, added = (self._first_stream(places[0]), None) if stream is None else stream.to(self.device).unbind()
            x, added, mass, queries = self._layers(pool, plan, places, x, added, mass_pages, want_queries)
            assert added is not None and added.dtype == x.dtype
            return Passed(torch.stack([x, added]), mass, queries)

    @torch.inference_mode()
    def finish(self, stream: torch.Tensor, logit_rows: Sequence[int] | None) -> Output:
        """Returns the output of rows from what the last stage has left, without page masses and queries."""
        with torch.cuda.device_of(self.cos):
            x, added = stream.to(self.device)
            residual, hidden = self._add_norm(x, added, "model.norm")
            wanted = slice(None) if logit_rows is None else index(np.array(logit_rows, np.int64), self.device)
            return Output(hidden, self._project(hidden[wanted]), residual=residual, turns=self._turns)

    def _layers(
        self, pool: TorchPagePool, plan: Any, places: torch.Tensor, x: torch.Tensor, added: torch.Tensor | None,
        mass_pages: int | None, want_queries: bool, recalls: Sequence[Recall] = (),
        taps: Mapping[int, torch.Tensor] = MappingProxyType({}),
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
        """Takes rows through the layers. Returns x, page masses and queries.

        x: [R, hidden] residual stream. added: what the last block adds to it, None at first.
        taps: where to write the residual stream that enters a layer, by its number.
        """
        spec = self.spec
        tokens, positions, slots = places.unbind()
        angles = self._angles(positions)
        mass = None if mass_pages is None else self.cos.new_zeros(spec.layers, len(tokens), spec.kv_heads, mass_pages)
        queries: list[torch.Tensor] = []
        for layer, kind in enumerate(spec.layer_specs):
            at = spec.at(layer)
            x, normed = self._add_norm(x, added, f"{at}input_layernorm")
            if layer in taps:
                taps[layer].copy_(x)
            options = pool.beside(layer, self.int8_pages)
            own, turns = self._heads[layer], (*angles[kind.rope], slots)
            recalled = [(some, memory) for some, memory in recalls if memory.shape.keeps[layer]]
            plain: torch.Tensor | None = None  # queries before RoPE
            moved = self.shifts is not None and self._moved[layer]
            if moved or any(memory.gated for _, memory in recalled):
                plain, k, v = self.ops.qkv(normed, own)
                plain = self._scaled(plain)
                q = self.ops.rope_write(pool, layer, plain, k, v, *turns)
            else:
                q = self._scaled(self.ops.qkv_rope_write(pool, layer, normed, own, *turns))
            if moved:
                assert plain is not None and self.shifts is not None
                options["far"] = FarQueries(
                    plain.contiguous(), positions, self.cos, self.sin, self.shifts, self._shift_table
                )
            if any(not memory.gated for _, memory in recalled):
                options["lse"] = self.cos.new_empty(q.shape[:2], dtype=accumulator(q[:0]).dtype)
            if spec.attention_cap:
                options["cap"] = spec.attention_cap
            if want_queries:
                queries.append(q.float())
            attended = self.attention.attend(
                plan, layer, q, pool.keys[layer], pool.values[layer], kind.window,
                None if mass is None else mass[layer], **options,
            )  # fmt: skip
            of_pages = attended.clone() if recalled else attended  # gradients need what a memory was joined with
            for some, memory in recalled:
                asking = plain if plain is not None and memory.gated else q
                recall = memory.read(layer, asking[some])
                attended[some] = join_recalled(of_pages[some], *recall, None if memory.gated else options["lse"][some])
            joined = self._join(attended.flatten(1), f"{at}self_attn.o_proj")
            if spec.post_norms:
                joined = self._norm(joined, f"{at}post_attention_layernorm")
            x, normed = self._add_norm(x, joined, f"{at}{spec.mlp_norm}")
            added = self._feed_forward(normed, layer)
            if spec.post_norms:
                added = self._norm(added, f"{at}post_feedforward_layernorm")
        return x, added, mass, torch.stack(queries, 1) if want_queries else None

    def _scaled(self, q: torch.Tensor) -> torch.Tensor:
        """Returns queries with the factor on their scores that attention does not know."""
        return q if self.spec.score_scale == 1 else q * self.spec.score_scale

    def _angles(self, positions: torch.Tensor) -> dict[str | None, tuple[torch.Tensor, torch.Tensor]]:
        """Returns cos and sin [R, head_dim / 2] of each kind of layer. A kind that rotates nothing turns by no
        angle."""
        angles: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = {
            name: (cos[positions], sin[positions]) for name, (cos, sin) in self._tables.items()
        }
        if any(layer.rope is None for layer in self.spec.layer_specs):
            cos, sin = angles[GLOBAL]
            angles[None] = torch.ones_like(cos), torch.zeros_like(sin)
        return angles

    @torch.inference_mode()
    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.cuda.device_of(self.cos):
            return self._project(hidden.to(self.device, self.dtype))

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._head(hidden)
        return capped(logits if logits.dtype == torch.float64 else logits.float(), self.spec.logit_cap)

    def _first_stream(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the residual stream [R, hidden] that the first layer takes."""
        x = self._embed(tokens)
        return x if self.spec.embedding_scale == 1 else x * self._embedding_scale

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.weights["model.embed_tokens.weight"][tokens]

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._linear(hidden, "model.embed_tokens" if self.spec.tied else "lm_head")

    def _join(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Brings heads, or the feed-forward's columns, back to the residual stream."""
        return self._linear(x, name)

    def _columns(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the columns of a feed-forward that the product behind them needs."""
        return x

    def _total(self, x: torch.Tensor) -> torch.Tensor:
        """Returns whole rows of the residual stream, given what products over these columns came to."""
        return x

    def _feed_forward(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        if self.spec.layer_specs[layer].experts:
            return self._mixture(x, layer)
        at = f"{self.spec.at(layer)}mlp"
        return self._join(self._gated(x, at), f"{at}.down_proj")

    def _gated(self, x: torch.Tensor, at: str) -> torch.Tensor:
        (gate, up), biases = self._parts(f"{at}.gate_proj", f"{at}.up_proj")
        return self.ops.gated(x, gate, up, biases, self.spec.activation)

    def _parts(self, *names: str) -> tuple[Any, Any]:
        """The weights of these names, and their biases, or None where they have none."""
        biases = tuple(self.weights.get(f"{name}.bias") for name in names)
        return tuple(self.weights[f"{name}.weight"] for name in names), biases if biases[0] is not None else None

    def _mixture(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """Returns the sum of each row's experts."""
        experts, own, at = self.spec.experts, self._experts[layer], f"{self.spec.at(layer)}mlp"
        assert experts is not None
        routes = self.ops.route(self._linear(x, f"{at}.gate"), experts)
        opened = self.ops.gated_experts(x, routes, own, self.spec.activation)
        parts, shared = self.ops.linear_experts(self._columns(opened), routes, own), None
        if experts.shared:
            part = f"{at}.shared_expert"
            y = self._linear(self._columns(self._gated(x, part)), f"{part}.down_proj")
            shared = self._linear(x, f"{part}_gate"), y
        return self._total(self.ops.mix(parts, routes, shared))

    def _expert_weights(self, at: str) -> ExpertWeights:
        """Returns the weights of a layer's experts by their kind."""
        assert self.spec.experts is not None
        each = [f"{at}.experts.{expert}" for expert in range(self.spec.experts.count)]
        return expert_weights(*(self._parts(*(f"{expert}.{kind}_proj" for expert in each))[0] for kind in KINDS))

    def _head_weights(self, at: str) -> HeadWeights:
        weights, biases = self._parts(*(f"{at}{name}_proj" for name in "qkv"))
        norms = self._parts(f"{at}q_norm", f"{at}k_norm")[0] if self.spec.qk_norm else None
        return HeadWeights(weights, biases, norms, self.spec.norm_eps, self.spec.head_dim)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.ops.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.ops.norm(x, self.weights[f"{name}.weight"], self.spec.norm_eps)

    def _add_norm(self, x: torch.Tensor, y: torch.Tensor | None, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ops.add_norm(x, y, self.weights[f"{name}.weight"], self.spec.norm_eps)
