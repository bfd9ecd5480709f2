"""The contract of a drafter, and the parts that drafters share. The registry is this folder."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tokenswift_py import registry
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.core import Acceptance, DraftTree, IntArray, Model, Output, TreeBuilder
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.passes import Passes, Timer, without_passes
from tokenswift_py.kvcache.base import Committed, EvictionPolicy, FloatArray, OnDevice
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.options import DRAFTERS, Options
from tokenswift_py.planning.costs import PassCost
from tokenswift_py.planning.odds import Odds
from tokenswift_py.planning.planner import FixedPlanner, Gain, Plan
from tokenswift_py.sampling.reference import NumericsError, Sampler


@dataclass(frozen=True)
class Context:
    """Everything that a drafter may look at in one round. The last token of `history` is pending: it is the root of the
    next tree, and the cache holds everything before it.

    self_draft:  the model with the draft's weights, over the same cache; none of its rows can be committed.
    plan:        decides what is worth drafting in this round.
    agreed:      a function from the milliseconds that this rank measured to those of rank 0. All ranks that draft
                 together have to call it, each time that one of them learns what something took.

    A drafter may push guesses onto the history (to see their processed logits), inside of `history.guesses()`, which
    forgets them, and write provisional rows into the cache. It never commits.
    """

    history: History
    cache: KVCache
    model: Model
    sampler: Sampler
    self_draft: Model
    plan: Plan = field(default_factory=lambda: FixedPlanner().at(0))
    timer: Timer = field(default_factory=Timer)
    agreed: Callable[[float], float] = float


@dataclass(frozen=True)
class Resources:
    """The parts that a drafter of a run may be made of.

    second_model: the `model` and `vocab_sizes` of a drafter with a model of its own, which DraftModel takes.
    draft_cost:   cost of draft passes. Texts in company learn it together.
    kept:         what drafters of the same model have read before, by a name. Texts in company share it.
    """

    checkpoint: Checkpoint
    second_model: Mapping[str, Any] = field(default_factory=dict)
    draft_cost: PassCost | None = None
    kept: dict[str, Any] = field(default_factory=dict)


class Drafter:
    """Proposes trees and owns the state that this takes. It changes how fast a text is written, never the text.

    `prefill` and `propose` are coroutines (see `decoding.passes`): where they need a pass they yield it, and are sent
    its output. `without_passes` makes a coroutine of a function that needs none.

    needs: "mass" and "queries", if the passes whose output it sees must report them.
    runs_target: whether it makes passes of the target with the draft's weights, or products with its LM head.
    sees_views: whether these see views of the target's cache, of which an engine may keep copies.
    has_second_model: whether it drafts with a model of its own, which of several ranks rank 0 alone holds.
    taps: layers, ascending, of which the passes whose output it sees report what enters them.
    window: how many of a text's latest rows it wants these of, beside those that `prefill` shows it.
    """

    name: str
    needs: frozenset[str] = frozenset()
    runs_target = False
    sees_views = False
    has_second_model = False
    taps: tuple[int, ...] = ()
    window = 0

    @without_passes
    def prefill(self, context: Context, output: Output) -> None:
        """Takes in that the history has grown by tokens that no tree proposed.

        output: output of the last rows that were committed before the pending token, up to `decoding.loop.SEEN_ROWS` of
                them.
        """

    def read_ahead(self, tokens: IntArray) -> None:
        """Takes in the beginning of a text while its rows are being computed, so that `prefill` has less left to do,
        for which other texts would wait.

        tokens: all of them up to the last row that was committed.
        """

    def read_rows(self, output: Output, start: int, following: IntArray) -> None:
        """Takes in rows of its window that were committed while the beginning of a text was computed.

        output: output of these rows, with its taps. start: position of the first. following: the token after each.
        """

    def propose(self, context: Context, budget: int) -> Passes[DraftTree]:
        """Returns a tree of at most `budget` nodes (at least 1), whose root is the pending token."""
        raise NotImplementedError

    def observe(self, taken: Acceptance, output: Output) -> None:
        """Learns from the part of the last proposal that verification took.

        output: output of the verify pass.
        """

    def explain(self) -> dict[str, Any]:
        """Returns what a line of the trace says about the last proposal."""
        return {}

    def alike(self) -> object:
        """Returns the values that ranks must have in common before they draft together, beside the parameters of the
        run: those that they read from files of their own."""
        return None


def forced(context: Context) -> int | None:
    """Returns the token that a grammar forces behind the history, None where there is none or nobody can say."""
    try:
        return context.sampler.forced(context.history)
    except NumericsError:
        return None


class Draft(TreeBuilder):
    """A tree in the making that knows each node's chance of being emitted, and the odds it was guessed by."""

    budget: int

    def __init__(self, pending: int, budget: int):
        super().__init__(pending, budget)
        self.chances = [1.0]
        self.odds: list[Odds | None] = [None]

    def build(self) -> DraftTree:
        return DraftTree(np.array(self.tokens, np.int32), np.array(self.parents, np.int32), tuple(self.chances))

    def fill(self, plan: Plan, grow: Callable[[Gain], None]) -> None:
        """Lets `grow` add nodes that need no draft pass, as long as they gain more than their rows cost."""
        first = len(self)
        grow(plan.gain_ms)
        self.cut(plan.rows_paid(self.chances, first))

    def cut(self, size: int) -> None:
        """Drops all nodes but the first `size`."""
        for node in range(size, len(self)):
            del self._children[self.parents[node], self.tokens[node]]
        for column in (self.tokens, self.parents, self.chances, self.odds):
            del column[size:]

    def guess(self, parent: int, token: int, odds: Odds, chance: float | None = None) -> int | None:
        """Returns the child of `parent` that carries `token`, with the best odds it was guessed by; None when the tree
        is full.

        odds:   that the child is emitted if its parent is.
        chance: what the odds said when the guess was found, since others may share them; None is what they say now.
        """
        node = self.add(parent, token)
        if node is None:
            return None
        chance = (odds.chance if chance is None else chance) * self.chances[parent]
        if node == len(self.chances):
            self.chances.append(chance)
            self.odds.append(odds)
        elif chance > self.chances[node]:
            self.chances[node], self.odds[node] = chance, odds
        return node

    @property
    def children_of_root(self) -> Set[int]:
        """The tokens that are proposed after the pending one."""
        return {token for token, parent in zip(self.tokens, self.parents, strict=True) if parent == 0}

    def force(self, context: Context, end: int) -> list[int]:
        """Hangs the tokens that a grammar forces below node `end`, which carries the history's last token; they join
        the history. That takes no draft pass, and they are always right. Returns their nodes, in order. None is forced
        where the grammar cannot be followed: whether the text comes that far is for the target to say."""
        nodes: list[int] = []
        while (token := forced(context)) is not None:
            if context.plan.gain_ms(self.chances[end], len(self)) <= 0:
                break
            node = self.add(end, token)
            if node is None:
                break
            if node == len(self.chances):  # otherwise it is there as a guess
                self.chances.append(self.chances[end])
                self.odds.append(None)
            context.history.append(token)
            nodes.append(node)
            end = node
        return nodes

    def force_last(self, context: Context) -> None:
        """Forces tokens after the end of the likeliest path. The history's last token is the root."""
        if context.sampler.grammar is None:
            return
        likeliest: dict[int, int] = {}
        for node in range(1, len(self)):
            best = likeliest.setdefault(self.parents[node], node)
            if self.chances[node] > self.chances[best]:
                likeliest[self.parents[node]] = node
        with context.history.guesses():
            end = 0
            while end in likeliest:
                end = likeliest[end]
                context.history.append(self.tokens[end])
            self.force(context, end)

    def learn(self, taken: Acceptance) -> None:
        """Counts every guess that was put to the test: the children of the nodes that were accepted."""
        for node, odds in enumerate(self.odds):
            if odds is not None and self.parents[node] in taken.after:
                odds.learn(self.tokens[node] == taken.after[self.parents[node]])


class Candidates:
    """Guesses that could join a draft without another draft pass."""

    def __init__(self, draft: Draft):
        self.draft = draft
        self._heap: list[tuple[float, int, int, int, Odds, float, Any]] = []
        self._order = 0

    def push(self, parent: int, token: int, odds: Odds, more: Any = None) -> None:
        """Makes `token` after node `parent` a candidate, if it is not too unlikely.

        more: value given to `follow` when the guess is taken.
        """
        chance = odds.chance
        path = chance * self.draft.chances[parent]
        if path < UNLIKELY:
            return
        self._order += 1  # where chances are equal, the guess found first is taken first
        heapq.heappush(self._heap, (-path, self._order, parent, token, odds, chance, more))

    def waiting(self) -> dict[int, Odds]:
        """Returns the tokens that are candidates, each with its best odds."""
        return {token: odds for _, _, _, token, odds, _, _ in sorted(self._heap, reverse=True)}

    def take(self, gain: Gain, follow: Callable[[int, Any], None] | None = None) -> None:
        """Adds the likeliest guesses to the draft until the next gains nothing or the draft is full.

        follow: function that is called with each node added and its `more`, to push what may come after it.
        """
        while self._heap and gain(-self._heap[0][0], len(self.draft)) > 0:
            _, _, parent, token, odds, chance, more = heapq.heappop(self._heap)
            node = self.draft.guess(parent, token, odds, chance)
            if node is None:
                return
            if follow is not None and more is not None:
                follow(node, more)


VIEWS = (1024, 2048, 4096, 8192)  # tokens of its cache that a model drafts for itself over
UNLIKELY = 0.02  # chance of being emitted below which nothing is proposed, whatever it costs


def committed(output: Output, rows: Sequence[int], start: int) -> Committed:
    """Returns what a policy learns from: the rows of a pass that were committed, at positions `start` and on.

    These are views of the output where the rows are its first ones (every chunk of a prefill, every chain); else
    copies.
    """
    mass, queries = output.page_mass, output.queries  # only those rows are copied from a device
    return Committed(
        start,
        len(rows),
        None if mass is None else host_array(mass[:, kept(rows)]),
        None if queries is None else host_array(queries[kept(rows)]),
        output.turns,
    )


def kept(rows: Sequence[int]) -> slice | list[int]:
    """Returns an index of these rows, which makes a view where they are the first ones."""
    return slice(len(rows)) if list(rows) == list(range(len(rows))) else list(rows)


def show(policy: EvictionPolicy, output: Output, rows: Sequence[int], start: int) -> None:
    """Shows a policy those rows of a pass that were committed, at positions `start` and on. Statistics that lie on a
    device stay there if the policy can read them there."""
    mass = output.page_mass
    if mass is not None and mass.device.type != "cpu" and isinstance(policy, OnDevice):
        policy.observe_there(mass[:, kept(rows)])
    else:
        policy.observe(committed(output, rows, start))


def host_array(x: torch.Tensor) -> FloatArray:
    """Returns the tensor as an array on the CPU, in a type that numpy has."""
    array: FloatArray = (x if x.dtype == torch.float64 else x.float()).cpu().numpy()
    return array


def create(name: str, **settings: Any) -> Drafter:
    """Makes the drafter called `name`. Raises UserError for a name that no file carries."""
    drafter: Drafter = registry.create(DRAFTERS, "DRAFTER", "drafter", name, **settings)
    return drafter


def kind_of(name: str) -> type[Drafter]:
    """Returns the class of the drafter called `name`."""
    kind: type[Drafter] = registry.module(DRAFTERS, "drafter", name).DRAFTER
    return kind


def for_run(options: Options, resources: Resources) -> Drafter:
    """Makes the drafter of a run: by its file's `create`, or of its class without settings."""
    module = registry.module(DRAFTERS, "drafter", options.chosen_drafter)
    make: Callable[[Options, Resources], Drafter] | None = getattr(module, "create", None)
    made: Drafter = make(options, resources) if make else module.DRAFTER()
    return made


def width_of(options: Options) -> dict[str, Any]:
    """Returns the setting of a drafter's width: with a fixed number of draft tokens a draft is one chain."""
    return {} if options.draft_tokens is None else {"width": 1}
