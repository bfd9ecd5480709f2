"""The nouns: trees of draft tokens, the rows of a forward pass, what verification took, sampling parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from tokenswift_py.errors import check

if TYPE_CHECKING:
    import torch

    from tokenswift_py.kernels.base import QueryTurns
    from tokenswift_py.kvcache.base import PagePool
    from tokenswift_py.kvcache.cache import KVCache
    from tokenswift_py.kvcache.view import PageView
    from tokenswift_py.models.clock import Clock

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Draft tokens hanging from the pending token.

    tokens:  [N] token ids; node 0 is the pending token (emitted, its KV not in the cache yet).
    parents: [N] index of each node's parent, always smaller than the node's own; -1 for node 0.

    Siblings carry different tokens, so a path of tokens names a node. A chain is a tree; one node is plain decoding.
    """

    tokens: IntArray
    parents: IntArray

    def __post_init__(self) -> None:
        tokens = np.array(self.tokens, dtype=np.int32)
        parents = np.array(self.parents, dtype=np.int32)
        if tokens.ndim != 1 or tokens.shape != parents.shape or len(tokens) == 0:
            raise ValueError(f"a tree needs as many parents as tokens, at least one: {tokens.shape}, {parents.shape}")
        if parents[0] != -1 or (parents[1:] < 0).any() or (parents >= np.arange(len(parents))).any():
            raise ValueError(f"parents must be -1 for node 0 and an earlier node for the others: {parents.tolist()}")
        if len(set(zip(parents.tolist(), tokens.tolist(), strict=True))) != len(tokens):
            raise ValueError("siblings must carry different tokens")
        tokens.flags.writeable = parents.flags.writeable = False
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "parents", parents)

    @classmethod
    def chain(cls, tokens: Sequence[int] | IntArray) -> DraftTree:
        """Each token the child of the one before."""
        return cls(np.asarray(tokens, np.int32), np.arange(-1, len(tokens) - 1, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depth(self) -> IntArray:
        """[N] edges between each node and node 0."""
        if self.is_chain:
            return np.arange(len(self), dtype=np.int32)
        depth = np.zeros(len(self), np.int32)
        for node in range(1, len(self)):
            depth[node] = depth[self.parents[node]] + 1
        return depth

    @cached_property
    def is_chain(self) -> bool:
        return bool((self.parents == np.arange(-1, len(self) - 1)).all())

    @cached_property
    def mask(self) -> npt.NDArray[np.bool_]:
        """[N, N]; mask[i, j] is true where j is i or an ancestor of i."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node in range(1, len(self)):
            mask[node] |= mask[self.parents[node]]
        return mask

    @cached_property
    def children(self) -> tuple[dict[int, int], ...]:
        """For each node, token -> child node."""
        children: tuple[dict[int, int], ...] = tuple({} for _ in range(len(self)))
        for node in range(1, len(self)):
            children[self.parents[node]][int(self.tokens[node])] = node
        return children

    def path(self, node: int) -> list[int]:
        """The nodes from node 0 down to `node`, both included."""
        path = [node]
        while path[-1] > 0:
            path.append(int(self.parents[path[-1]]))
        return path[::-1]

    def below(self, tokens: Sequence[int]) -> DraftTree:
        """This tree behind a chain of other tokens, of which the first is pending."""
        count = len(tokens)
        parents = [*range(-1, count - 1), *(self.parents + count)]
        return DraftTree(np.array([*tokens, *self.tokens], np.int32), np.array(parents, np.int32)) if count else self

    def merge(self, other: DraftTree, budget: int | None = None) -> DraftTree:
        """Both proposals as one trie: this tree's nodes first, then `other`'s that are new, up to `budget` nodes.

        Raises ValueError if the two do not hang from the same pending token.
        """
        if self.tokens[0] != other.tokens[0]:
            raise ValueError(f"trees hang from different tokens: {self.tokens[0]} and {other.tokens[0]}")
        builder = TreeBuilder(int(self.tokens[0]), budget)
        for tree in (self, other):
            place = {0: 0}
            for node in range(1, len(tree)):
                parent = place.get(int(tree.parents[node]))
                child = None if parent is None else builder.add(parent, int(tree.tokens[node]))
                if child is not None:
                    place[node] = child
        return builder.build()


class TreeBuilder:
    """Grows a `DraftTree` node by node; adding a token that is already there finds it."""

    def __init__(self, pending: int, budget: int | None = None):
        self.tokens = [pending]
        self.parents = [-1]
        self.budget = budget
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int) -> int | None:
        """The child of `parent` that carries `token`; None when the tree is full."""
        node = self._children.get((parent, token))
        if node is None and (self.budget is None or len(self.tokens) < self.budget):
            node = self._children[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
        return node

    def build(self) -> DraftTree:
        return DraftTree(np.array(self.tokens, np.int32), np.array(self.parents, np.int32))


@dataclass(frozen=True)
class Segment:
    """The rows that one sequence brings into a forward pass.

    tree:   one row a node. Node i stands at position cache.length + len(tail) + tree.depth[i].
    view:   limits which full pages of the committed prefix the rows attend to; None is all of them. The last,
            partial page and the tail are always attended to.
    tail:   earlier provisional rows (numbered from 0 behind cache.length, in the order they were written) that
            node 0 builds on, in path order: what a draft step hands to the next.
    causal: the tree is a chain of any length (a prefill chunk).
    """

    tree: DraftTree
    cache: KVCache
    view: PageView | None = None
    tail: tuple[int, ...] = ()
    causal: bool = False

    def __post_init__(self) -> None:
        if self.causal and not self.tree.is_chain:
            raise ValueError("a causal segment must be a chain")


@dataclass(frozen=True)
class Output:
    """What a forward pass returns; R rows in the order of the segments' nodes.

    hidden:    [R, hidden_size] after the final norm, what the LM head reads.
    logits:    [len(logit_rows), vocab_size] fp32 (fp64 for an fp64 model), rows as asked for.
    page_mass: [layers, R, kv_heads, pages] attention probability that each row puts on each absolute page,
               summed over the query heads of the KV head's group; None unless asked for.
    residual:  [R, hidden_size] before the final norm, what TokenSwift's heads read.
    queries:   [R, layers, heads, head_dim] fp32, rotated (and normed, in families that do so) but not scaled; None
               unless asked for.
    turns:     how these queries meet far keys; None where as they are.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    page_mass: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    turns: QueryTurns | None = None


class Model(Protocol):
    """An executor: the same contract for torch on any device and for the native CPU engine.

    context: positions there are RoPE tables for.
    row_shapes: numbers of rows, ascending, that the passes of a tree are padded to; larger ones are not.
    clock: what its passes take.
    """

    numerics: str
    guarantee: str
    context: int
    row_shapes: tuple[int, ...]
    clock: Clock

    def forward(
        self,
        segments: Sequence[Segment],
        logit_rows: Sequence[int] | None = None,
        want_mass: bool = False,
        want_queries: bool = False,
    ) -> Output:
        """Compute all rows, writing each row's KV into provisional slots behind its cache's length.

        logit_rows: the rows whose logits are wanted (indices into all rows); None is all.
        """

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, vocab_size] logits of [R, hidden_size] rows as `Output.hidden` has them, through the LM head.

        A row's logits are those that a pass gives for the same hidden state.
        """

    def new_cache(self) -> KVCache:
        """An empty cache of this model's shape, type and context."""

    def new_pool(self, pages: int) -> PagePool:
        """Room for the pages of one or several sequences, which must share a pool to share a pass."""


@dataclass(frozen=True)
class Acceptance:
    """What the walk took from one tree.

    path:   accepted nodes, node 0 first: the rows to commit.
    tokens: len(path) chosen tokens: the accepted drafts and one more, which is the next pending token.
    ending: why the text or the chapter ends after the last token; None if it goes on.
    logprobs: natural log of the model's own probability of each token, when asked for.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    ending: str | None = None
    logprobs: tuple[float, ...] | None = None

    @cached_property
    def after(self) -> dict[int, int]:
        """For each accepted node the token that was chosen behind it."""
        return dict(zip(self.path, self.tokens, strict=True))


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """A number that a double can hold."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:
        return False


GREEDY_BELOW = 1e-5  # a temperature that is lower is taken for 0, as vLLM takes it: scores divided by it stay finite
MOST_BIAS = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class SamplingParams:
    """How a row of logits becomes a token. Checked when made; a wrong value is a `UserError`.

    temperature:       0 is greedy, and so is anything below GREEDY_BELOW, which becomes 0.
    top_k:             keep the k largest logits, ties at the edge included; 0 is off.
    top_p:             keep the most probable tokens whose mass reaches top_p; 1 is off.
    min_p:             keep tokens at least min_p times as probable as the best; 0 is off.
    penalty:           theta of the contextual penalty (TokenSwift section 3.4); 1 is off.
    penalty_window:    how many of the latest tokens it looks at.
    dry_multiplier:    DRY repetition penalty; 0 is off. It is multiplier * base ** (matched - length).
    dry_base, dry_length, dry_breakers: growth, longest match that goes unpunished, token ids no match crosses.
    seed, stream:      key and sample number of the position-keyed noise.
    ban:               token ids never written.
    logit_bias:        token id -> added to its logit; no more than fp32 holds.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    penalty: float = 1.0
    penalty_window: int = 1024
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_length: int = 2
    dry_breakers: tuple[int, ...] = ()
    seed: int = 0
    stream: int = 0
    ban: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number in ("temperature", "top_p", "min_p", "penalty", "dry_multiplier", "dry_base"):
            check(is_finite(getattr(self, number)), number, getattr(self, number), "a finite number")
        for whole in ("top_k", "penalty_window", "dry_length", "seed", "stream"):
            check(is_whole(getattr(self, whole)), whole, getattr(self, whole), "a whole number")
        check(0 <= self.temperature <= 100, "temperature", self.temperature, "between 0 and 100")
        check(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 is off)")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1 (1 is off)")
        check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        check(1 <= self.penalty <= 100, "penalty", self.penalty, "between 1 (off) and 100")
        check(self.penalty_window >= 1, "penalty_window", self.penalty_window, "at least 1")
        check(0 <= self.dry_multiplier <= 1000, "dry_multiplier", self.dry_multiplier, "between 0 (off) and 1000")
        check(1 <= self.dry_base <= 16, "dry_base", self.dry_base, "between 1 and 16")
        check(1 <= self.dry_length <= 64, "dry_length", self.dry_length, "between 1 and 64")
        check(0 <= self.seed < 2**64, "seed", self.seed, "between 0 and 2^64 - 1")
        check(0 <= self.stream < 2**32, "stream", self.stream, "between 0 and 2^32 - 1")
        for tokens in ("ban", "dry_breakers", "logit_bias"):
            for token in getattr(self, tokens):
                check(is_whole(token), tokens, token, "token ids")
        for token, bias in self.logit_bias.items():
            fine = is_finite(bias) and abs(bias) <= MOST_BIAS
            check(fine, "logit_bias", {token: bias}, "finite numbers that fp32 can hold; ban excludes a token")
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the report records them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **values,
            "ban": list(self.ban),
            "dry_breakers": list(self.dry_breakers),
            "logit_bias": {str(k): v for k, v in self.logit_bias.items()},
        }
