"""Tensor parallelism: every rank holds some of the heads, feed-forward columns and vocabulary, and computes all rows.

q, k, v, gate and up are split by their outputs (column-parallel), the embedding and the LM head by tokens. There are
two ways for o and down:
- `all-reduce` (row-parallel) sums the ranks' partial products, in an order that changes with the shape.
- `gather` lets ranks exchange their columns, and each computes its share of the outputs over the whole depth. Then
  every element is summed as in one process and in its order, so a row keeps the bits that it has there (law 1). That
  needs products whose elements do not depend on others of their tile, or shares that begin at a tile's edge.

Every rank holds a part of each expert of a mixture, cut as a dense feed-forward is, and the whole router. All ranks
have the same normed rows, bit for bit, so all route them alike. Were experts whole on one rank each, ranks would idle
whose experts no row of a short pass chose, and a row's experts would not be summed in ascending order. So `gather`
keeps its promise here too, and `all-reduce` sums once a layer, behind the sum of a row's experts.

Logits are gathered whole, because top-p, log-probabilities and Hugging Face's processors need the row. In the weights'
type that is a few MB a pass at the most.

Source: Megatron-LM (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tokenswift_py.core import Output, Segment
from tokenswift_py.errors import check
from tokenswift_py.kernels.base import AttentionBackend
from tokenswift_py.models.captured import Recorder
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.ops import Ops
from tokenswift_py.models.rope import RopeTables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.parallel.ranks import Ranks

BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_TOKENS = ("embed_tokens", "lm_head")
JOINED = ("o_proj", "down_proj")
TILE = 32  # the columns of a tile; shares begin at the edges of tiles


@dataclass(frozen=True)
class Shard:
    """The part of the weights that one of `world` ranks holds. gather: whether o and down are split by outputs too."""

    rank: int
    world: int
    gather: bool

    def spec(self, spec: ModelSpec) -> ModelSpec:
        """Returns the spec of the rank's heads and feed-forward. Raises UserError where they do not divide evenly."""
        heads = self.part("num_attention_heads", spec.heads)
        own = replace(spec, heads=heads, kv_heads=self.part("num_key_value_heads", spec.kv_heads))
        if not all(layer.experts for layer in spec.layer_specs):
            own = replace(own, intermediate_size=self.part("intermediate_size", spec.intermediate_size))
        if spec.experts is None:
            return own
        width = self.part("an expert's intermediate_size", spec.experts.width)
        shared = self.part("the shared expert's intermediate_size", spec.experts.shared)
        return replace(own, experts=replace(spec.experts, width=width, shared=shared))

    def part(self, name: str, count: int) -> int:
        """Returns how many a rank has of `count`. Raises UserError where the ranks do not divide it."""
        check(count % self.world == 0, name, count, f"{self.world} ranks must divide it (torchrun's WORLD_SIZE)")
        return count // self.world

    def even(self, size: int) -> slice:
        """Returns the rank's part of `size` outputs of heads or the feed-forward, which divide evenly."""
        return slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)

    def width(self, size: int) -> int:
        """Returns the most of `size` tokens or hidden columns that a rank holds, a number of whole tiles."""
        return -(-size // (self.world * TILE)) * TILE

    def tiles(self, size: int) -> slice:
        """Returns the rank's part of `size` tokens or hidden columns. The last ranks may hold less than the others."""
        width = self.width(size)
        return slice(min(self.rank * width, size), min((self.rank + 1) * width, size))

    def of(self, name: str, shape: Sequence[int]) -> tuple[slice, ...]:
        """Returns the rank's part of the tensor with this name (Hugging Face's) and shape."""
        module = name.split(".")[-2]
        if module in BY_OUTPUTS:
            return (self.even(shape[0]),)
        if module in BY_TOKENS or (module in JOINED and self.gather):
            return (self.tiles(shape[0]),)
        if module in JOINED and len(shape) == 2:
            return slice(None), self.even(shape[1])
        return (slice(None),)


class ParallelDecoder(TorchDecoder):
    """A decoder whose weights are spread over ranks.

    Caches, views, page masses and queries are of the rank's own heads. Hidden states and logits are whole, and have the
    same bits on every rank.
    spec: spec of the whole model. weights: weights of the shard.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, torch.Tensor],
        rope: RopeTables,
        attention: AttentionBackend,
        ops: Ops | None,
        draft: bool,
        kv_dtype: torch.dtype | None,
        shard: Shard,
        ranks: Ranks,
    ):
        super().__init__(shard.spec(spec), weights, rope, attention, ops, draft, kv_dtype)
        self.shard, self.ranks, self.chains = shard, ranks, False
        # A graph that one rank alone failed to capture would leave the others in a collective for ever, and NCCL waits
        # at the end for graphs that name it.
        self.recorder = Recorder(None)
        self.numerics += f"/tp-{shard.world}-{'gather' if shard.gather else 'all-reduce'}"
        if not shard.gather:
            self.guarantee = "measured"

    def forward(
        self,
        segments: Sequence[Segment],
        logit_rows: Sequence[int] | None = None,
        want_mass: bool = False,
        want_queries: bool = False,
        taps: Sequence[int] = (),
    ) -> Output:
        """Computes a pass. Raises RanksError where ranks would not compute the same rows."""
        agree_on_pass(self.ranks, self.draft, segments, logit_rows)
        return super().forward(segments, logit_rows, want_mass, want_queries, taps)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = self.weights["model.embed_tokens.weight"]
        place = tokens - self.shard.tiles(self.spec.vocab_size).start
        own = (place >= 0) & (place < len(weight))
        x = weight[place.where(own, 0)].masked_fill(~own[:, None], 0)
        return self.ranks.sum(x)  # only one rank's row is not 0, so nothing rounds

    def _join(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.shard.gather:
            return self._total(self._linear(self._columns(x), name))
        total = self._total(self.ops.linear(x, self.weights[f"{name}.weight"], None))
        bias = self.weights.get(f"{name}.bias")
        return total if bias is None else total + bias

    def _columns(self, x: torch.Tensor) -> torch.Tensor:
        return self.ranks.gather(x, x.shape[1], x.shape[1] * self.shard.world) if self.shard.gather else x

    def _total(self, x: torch.Tensor) -> torch.Tensor:
        return self._whole(x, self.spec.hidden_size) if self.shard.gather else self.ranks.sum(x)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._whole(super()._head(hidden), self.spec.vocab_size)

    def _whole(self, x: torch.Tensor, size: int) -> torch.Tensor:
        return self.ranks.gather(x, self.shard.width(size), size)


def agree_on_pass(ranks: Ranks, draft: bool, segments: Sequence[Segment], logit_rows: Sequence[int] | None) -> None:
    """Raises RanksError where ranks would not compute the same rows.

    Sums over different rows look like any other, and all ranks would choose the same wrong tokens from them.
    """
    if ranks.world > 1:
        rows = [(s.tree.tokens.tobytes(), s.tree.parents.tobytes(), s.cache.length, s.tail, s.view is None)
                for s in segments]  # fmt: skip
        ranks.agree("a pass (draft, rows)", (draft, rows, logit_rows))
