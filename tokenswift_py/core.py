"""The nouns: trees of draft tokens, the rows of a forward pass, the result of verification, sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from tokenswift_py.sampling.kinds import is_finite as is_finite
from tokenswift_py.sampling.kinds import is_whole as is_whole
from tokenswift_py.sampling.params import GREEDY_BELOW as GREEDY_BELOW
from tokenswift_py.sampling.params import SamplingParams as SamplingParams

if TYPE_CHECKING:
    import torch

    from tokenswift_py.kernels.base import QueryTurns
    from tokenswift_py.kvcache.base import PagePool
    from tokenswift_py.kvcache.cache import KVCache
    from tokenswift_py.kvcache.view import PageView
    from tokenswift_py.models.clock import Clock

IntArray = npt.NDArray[np.int32]
Likeliest = tuple[tuple[int, float], ...]  # tokens with the natural log of their probability, the best first


@dataclass(frozen=True, eq=False)
class DraftTree:
    """A tree of draft tokens that hang from the pending token.

    tokens:  [N] token ids; node 0 is the pending token (emitted, its KV not in the cache yet).
    parents: [N] index of each node's parent, always smaller than the node's own; -1 for node 0.
    chances: [N] what the drafter thinks each node's chance of being emitted is; None where it did not say.

    Siblings carry different tokens, so a path of tokens names a node. A chain is a tree; one node is plain decoding.
    """

    tokens: IntArray
    parents: IntArray
    chances: Sequence[float] | None = None

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
        """Makes a tree in which each token is the child of the one before."""
        return cls(np.asarray(tokens, np.int32), np.arange(-1, len(tokens) - 1, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depth(self) -> IntArray:
        """Returns [N], the number of edges between each node and node 0."""
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
        """Returns [N, N], true at [i, j] where j is i or an ancestor of i."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node in range(1, len(self)):
            mask[node] |= mask[self.parents[node]]
        return mask

    @cached_property
    def children(self) -> tuple[dict[int, int], ...]:
        """Returns a map from token to child node for each node."""
        children: tuple[dict[int, int], ...] = tuple({} for _ in range(len(self)))
        for node in range(1, len(self)):
            children[self.parents[node]][int(self.tokens[node])] = node
        return children

    def path(self, node: int) -> list[int]:
        """Returns the nodes from node 0 down to `node`, both included."""
        path = [node]
        while path[-1] > 0:
            path.append(int(self.parents[path[-1]]))
        return path[::-1]

    def first(self, count: int) -> DraftTree:
        """Returns the tree of the first so many nodes."""
        if count >= len(self):
            return self
        chances = None if self.chances is None else self.chances[:count]
        return DraftTree(self.tokens[:count], self.parents[:count], chances)

    def below(self, tokens: Sequence[int]) -> DraftTree:
        """Hangs this tree below a chain of other tokens, the first of which is pending."""
        count = len(tokens)
        parents = [*range(-1, count - 1), *(self.parents + count)]
        return DraftTree(np.array([*tokens, *self.tokens], np.int32), np.array(parents, np.int32)) if count else self

    def merge(self, other: DraftTree, budget: int | None = None) -> DraftTree:
        """Joins both proposals in one trie: this tree's nodes first, then `other`'s that are new, up to `budget` nodes.

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
    """Grows a `DraftTree` node by node. Adding a token that is already there finds it."""

    def __init__(self, pending: int, budget: int | None = None):
        self.tokens = [pending]
        self.parents = [-1]
        self.budget = budget
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int) -> int | None:
        """Returns the child of `parent` that carries `token`, None when the tree is full."""
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

    tree:   one row for each node. Node i stands at position cache.length + len(tail) + tree.depth[i].
    view:   limits which full pages of the committed prefix the rows attend to; None is all of them. The last, partial
            page and the tail are always attended to.
    tail:   earlier provisional rows that node 0 builds on, in path order: one draft step hands them to the next. They
            are numbered from 0 after cache.length, in the order in which they were written.
    causal: whether the tree is a chain of any length (a prefill chunk).
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
    """The result of a forward pass; R rows in the order of the segments' nodes.

    hidden:    [R, hidden_size] after the final norm, for the LM head.
    logits:    [len(logit_rows), vocab_size] fp32 (fp64 for an fp64 model), rows as asked for.
    page_mass: [layers, R, kv_heads, pages] attention probability that each row puts on each absolute page, summed over
               the query heads of the KV head's group; None unless asked for.
    residual:  [R, hidden_size] before the final norm, for TokenSwift's heads.
    queries:   [R, layers, heads, head_dim] fp32, rotated (and normed, in families that do so) but not scaled; None
               unless asked for.
    turns:     the way in which these queries meet far keys; None where they meet them unchanged.
    taps:      [R, n, hidden_size] the residual stream that enters each of the n layers that were asked for; None unless
               any were.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    page_mass: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    turns: QueryTurns | None = None
    taps: torch.Tensor | None = None


class Chooser(Protocol):
    """Chooses the tokens of a draft's chain where their logits lie, without the host. Its memory stays in place."""

    def fill(self) -> None:
        """Brings what is known of the text to the device. The next token is the chain's first."""

    def choose(self, logits: torch.Tensor, link: torch.Tensor) -> torch.Tensor:
        """Chooses the next token of the chain, [1], after which its text has one more. Its launches are always the
        same.

        logits: [1, vocab_size]. link: [1] int64, the number of the token in the chain.
        """

    def read(self, links: int) -> Callable[[int], list[tuple[int, float]]]:
        """Waits for so many tokens, and returns what gives the ranking of each, see `Sampler.ranker`."""


class Model(Protocol):
    """An executor: the same contract for torch on any device and for the native CPU engine.

    context: number of positions that there are RoPE tables for.
    row_shapes: numbers of rows, ascending, that the passes of a tree are padded to; larger ones are not padded.
    clock: measures the time that its passes take.

    An executor whose `chains` is true has `forward_chain(segment, chooser)`, too: the passes of a chain of up to
    MOST_LINKS rows, whose tokens after the first the chooser chooses. It returns the last row's output.
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
        taps: Sequence[int] = (),
    ) -> Output:
        """Computes all rows, and writes each row's KV into provisional slots after its cache's length.

        logit_rows: the rows whose logits are wanted (indices into all rows); None is all.
        taps: layers, ascending, of which `Output.taps` is wanted.
        """

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns [R, vocab_size] logits of [R, hidden_size] rows of `Output.hidden`, through the LM head.

        A row's logits are those that a pass gives for the same hidden state.
        """

    def new_cache(self) -> KVCache:
        """Makes an empty cache of this model's shape, type and context."""

    def new_pool(self, pages: int) -> PagePool:
        """Makes room for the pages of one or several sequences, which must share a pool to share a pass."""


@dataclass(frozen=True)
class Acceptance:
    """The part of one tree that the walk took.

    path:   accepted nodes, node 0 first: the rows to commit.
    tokens: len(path) chosen tokens: the accepted drafts and one more, which is the next pending token.
    ending: reason why the text or the chapter ends after the last token; None if it goes on.
    logprobs: natural log of the model's own probability of each token, when asked for.
    top_logprobs: for each token the likeliest ones there with theirs, when asked for.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    ending: str | None = None
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[Likeliest, ...] | None = None

    @cached_property
    def after(self) -> dict[int, int]:
        """Returns the token that was chosen after each accepted node."""
        return dict(zip(self.path, self.tokens, strict=True))
