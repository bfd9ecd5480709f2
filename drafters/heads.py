"""Draft heads: small residual blocks on the last hidden state that guess the tokens after the pending one.

The row that gave the pending token has everything they read, so a proposal costs products with the LM head and no pass
of the model. Head i = 1 .. K guesses the i-th token after the pending one. `head_weights` has their forms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch

from tokenswift_py.core import Acceptance, DraftTree, Model, Output
from tokenswift_py.decoding.passes import without_passes
from tokenswift_py.drafters import dflash, eagle
from tokenswift_py.drafters.base import Context, Draft, Drafter, Resources
from tokenswift_py.drafters.draft_folders import drafter_of
from tokenswift_py.drafters.head_files import find_file, read_for
from tokenswift_py.drafters.head_weights import HeadWeights
from tokenswift_py.options import Options
from tokenswift_py.planning.costs import PassCost
from tokenswift_py.planning.odds import Odds
from tokenswift_py.planning.planner import Gain
from tokenswift_py.sampling.reference import NumericsError

UNLIKELY = 0.01  # paths with a smaller chance are not proposed
MEASURED = 50.0  # how many guesses an acceptance measured in training counts for
MARGIN = 1.5  # guesses must save so many times the time of asking for them: what barely seems to pay seldom pays
BEAM = 3  # how many branches of a level get children


@dataclass(frozen=True)
class Branch:
    """A node that the tree may have.

    chance: chance that the model writes the path. x: [1, E] state for the head that guesses its children.
    """

    chance: float
    path: tuple[int, ...]
    x: torch.Tensor


class Heads(Drafter):
    """A tree of the heads' best guesses, by the same noise as the target's choice.

    The chance of a node is the product of the acceptances of the ranks on its path, as Medusa's trees are grown
    (arXiv 2401.10774, section 2.3.3); level by level the most probable nodes get children, and the most probable of
    all are proposed. The acceptances start at those measured in training and follow those seen.

    embedding: [V, E] the model's; only heads that see tokens read it.
    shared:    the weights where other texts draft with them too. They are moved once for all.
    cost:      of one head's guesses after one node, where a drafter asks head by head.
    """

    name = "heads"
    runs_target = True

    def __init__(self, weights: HeadWeights, embedding: torch.Tensor, shared: list[HeadWeights] | None = None):
        self.embedding = embedding
        self._shared = [weights] if shared is None else shared
        self.cost, self._tree_cost = PassCost(), PassCost()
        measured = np.asarray(weights.acceptance[: len(weights)]).tolist()
        self.odds = [[Odds(share, weight=MEASURED) for share in ranks] for ranks in measured]  # of each head's ranks
        self._row: torch.Tensor | None = None
        self._guesses: dict[tuple[int, ...], list[int]] = {}  # after each path of the last tree that got children

    @property
    def weights(self) -> HeadWeights:
        return self._shared[0]

    @without_passes
    def prefill(self, context: Context, output: Output) -> None:
        self._row = self.weights.reads(output, -1)

    @without_passes
    def propose(self, context: Context, budget: int) -> DraftTree:
        forced = Draft(context.history[-1], budget)
        with context.history.guesses():
            certain = len(forced.force(context, 0))
        known = self._row is None or certain >= len(self.weights)  # the tokens that heads could guess are known
        if known or budget < 2 or context.plan.rests or not self._pays(context):
            self._guesses = {}
            return forced.build()
        assert self._row is not None
        self.move(self._row.device)  # no part of what asking costs
        lap = context.timer.start(context.self_draft)
        tree = self.tree(self._row, context, budget)
        lap.stop()
        self._tree_cost.observe(1, 0, context.agreed(lap.ms))
        return tree

    def _pays(self, context: Context) -> bool:
        """Returns whether a tree of the heads' guesses is likely to save more than asking for them takes. It is also
        true while that is not known yet, and when it is time to try again."""
        plan, chance, chances = context.plan, 1.0, list[float]()
        self._tree_cost.load = plan.load
        if not self._tree_cost.measured:
            return True
        for ranks in self.odds:  # the likeliest path, with each node's other guesses
            chances += [chance * odds.chance for odds in ranks]
            chance *= max(odds.chance for odds in ranks)
        gains = (plan.gain_ms(chance, 1 + node) for node, chance in enumerate(sorted(chances, reverse=True)))
        saved_ms, ms = sum(takewhile(lambda saved: saved > 0, gains)), self._tree_cost(1, 0)
        return saved_ms > MARGIN * ms or plan.may_probe(ms, "heads")

    def observe(self, taken: Acceptance, output: Output) -> None:
        self.learn(taken.tokens)
        self._row = self.weights.reads(output, taken.path[-1])

    def alike(self) -> object:
        digest = hashlib.sha256()
        for _, tensor in sorted(self.weights.tensors.items()):
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return self.weights.form, np.asarray(self.weights.acceptance).tolist(), digest.hexdigest()

    @torch.inference_mode()
    def tree(self, row: torch.Tensor, context: Context, budget: int) -> DraftTree:
        """Returns up to `budget` nodes, the history's last token their root.

        row: [E], `weights.reads` of the row that gave that token.
        """
        self.move(row.device)
        self._guesses = {}
        depth = min(len(self.weights), budget - 1)
        x = row.float()[None]
        same = self.same_ahead(x, depth, context.self_draft)
        branches = [Branch(1.0, (), x)]
        for head in range(depth):
            branches.sort(key=by_chance)
            least = branches[budget - 1].chance if len(branches) >= budget else UNLIKELY
            best = max(odds.chance for odds in self.odds[head])  # a branch is asked if one of its children could be in
            parents = [p for p in branches[:budget] if len(p.path) == head and (head == 0 or p.chance * best >= least)]
            if not parents:
                break
            branches += self.children(head, parents[:BEAM], context, None if same is None else same[head])
        return self.worth_it(sorted(branches, key=by_chance)[:budget], context, budget)

    def worth_it(self, branches: Sequence[Branch], context: Context, budget: int) -> DraftTree:
        """Returns the tree of those branches that pay for their rows. branches: the most probable first."""
        plan = context.plan
        gains = (plan.gain_ms(branch.chance, rows) for rows, branch in enumerate(branches))
        rows = next((n for n, gain in enumerate(gains) if n and gain <= 0), len(branches))
        rows = plan.rows_paid([branch.chance for branch in branches[:rows]], 1)
        builder = Draft(context.history[-1], budget)
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for branch in branches[1:rows]:
            child = builder.add(nodes[branch.path[:-1]], branch.path[-1])
            assert child is not None
            builder.chances.append(branch.chance)
            builder.odds.append(None)  # they learn by `learn`
            nodes[branch.path] = child
        builder.force_last(context)
        return builder.build()

    def same_ahead(self, x: torch.Tensor, heads: int, model: Model) -> torch.Tensor | None:
        """Returns [heads, V] logits of heads that see no tokens, by one product for all; None for those that do."""
        if self.weights.sees_tokens or not heads:
            return None
        states = []
        for head in range(heads):
            x, state = self.weights.step(head, x, x)
            states.append(state)
        return self.weights.project(torch.cat(states), range(heads), model)

    def children(
        self, head: int, parents: Sequence[Branch], context: Context, same: torch.Tensor | None
    ) -> list[Branch]:
        """Returns the candidates of one head after each of these branches, as the sampler would rank them.

        same: [V] logits of a head that sees no tokens: it is ranked once, after the first branch, for all of them.
        """
        if same is None:
            asked = self.ask(head, parents, context)
        else:
            guesses = self.rank(same, parents[0].path, context)
            asked = [(branch.x, guesses) for branch in parents]
        found = []
        for branch, (x, guesses) in zip(parents, asked, strict=True):
            self._guesses[branch.path] = guesses
            for guess, odds in zip(guesses, self.odds[head], strict=False):
                chance = branch.chance * odds.chance
                if chance >= UNLIKELY:
                    found.append(Branch(chance, (*branch.path, guess), x))
        return found

    def ask(self, head: int, branches: Sequence[Branch], context: Context) -> list[tuple[torch.Tensor, list[int]]]:
        """Returns what the next head reads after each of these branches, and this one's guesses there, best first."""
        # Rows are asked one by one. torch gives a few rows to several threads, which wait for one another. On a busy
        # machine that takes milliseconds, while one row takes microseconds.
        steps = [self.step(head, branch, context.history[-1]) for branch in branches]
        states = torch.cat([state for _, state in steps])
        rows = self.weights.project(states, [head] * len(branches), context.self_draft)
        ranked = [self.rank(row, branch.path, context) for row, branch in zip(rows, branches, strict=True)]
        return [(x, guesses) for (x, _), guesses in zip(steps, ranked, strict=True)]

    def step(self, head: int, branch: Branch, pending: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the next head reads after a branch, and the state that this one's logits are made of."""
        token = self.embedding[branch.path[-1] if branch.path else pending]
        return self.weights.step(head, branch.x, token[None].to(branch.x.device, branch.x.dtype))

    @torch.inference_mode()
    def extend(
        self,
        draft: Draft,
        end: int,
        row: torch.Tensor,
        context: Context,
        gain: Gain,
        known: float = 0.0,
        pending: bool = False,
    ) -> None:
        """Hangs guesses below node `end` of a draft, for a drafter that has more than heads. The node carries the
        history's last token. Guesses go head by head after the likeliest, as long as one more head is worth its time.

        row:     [E], `weights.reads` of the row that gave that token.
        gain:    gain of one more node of this draft.
        known:   the chance that the drafter's other guesses hold the next token already.
        pending: whether that token is the pending one. Then `learn` counts guesses that were not worth a row.
        """
        self.move(row.device)
        branch = Branch(draft.chances[end], (), row.float()[None])
        for head in range(len(self.odds)):
            if len(draft) == draft.budget or not self.pays(head, branch.chance * (1 - known), draft, context, gain):
                return
            x, guesses = self.timed_ask(head, branch, context)
            best = self.hang(head, guesses, draft, end, branch.chance, gain)
            if best is None:
                if pending:  # a probe whose guesses are not worth a row tells how often they are right all the same
                    self._guesses = {(): guesses}
                return
            branch, end = Branch(draft.chances[best], (*branch.path, draft.tokens[best]), x), best

    def pays(self, head: int, chance: float, draft: Draft, context: Context, gain: Gain) -> bool:
        """Returns whether a head's guesses after a node save more than asking for them takes. It is also true while
        that is not known yet, and when it is time to try again.

        chance: chance that the text comes to that node, and goes on with a token that the drafter does not know
                otherwise.
        """
        self.cost.load = context.plan.load
        if not self.cost.measured:
            return True
        ms = self.cost(1, 0)
        gains = (gain(chance * odds.chance, len(draft) + rank) for rank, odds in enumerate(self.odds[head]))
        saved_ms = sum(takewhile(lambda saved: saved > 0, gains))
        return saved_ms > MARGIN * ms or (head == 0 and context.plan.may_probe(ms, "heads"))

    def timed_ask(self, head: int, branch: Branch, context: Context) -> tuple[torch.Tensor, list[int]]:
        """Does what `ask` does for one branch, and learns what it costs."""
        lap = context.timer.start(context.self_draft)
        [asked] = self.ask(head, [branch], context)
        lap.stop()
        self.cost.observe(1, 0, context.agreed(lap.ms))
        return asked

    def hang(self, head: int, guesses: Sequence[int], draft: Draft, end: int, chance: float, gain: Gain) -> int | None:
        """Adds a head's guesses to the draft, best first, as long as they gain. Returns the best one's node, if any.

        chance: that the text comes to node `end`.
        """
        best = None
        for token, odds in zip(guesses, self.odds[head], strict=False):
            if gain(chance * odds.chance, len(draft)) <= 0:
                break
            node = draft.guess(end, token, odds)
            best = node if best is None else best
        return best

    def move(self, device: torch.device) -> None:
        """Brings the weights to where the model's rows are, in fp32."""
        weight = self.weights.tensors["weight"]
        if weight.device != device or weight.dtype != torch.float32:
            self._shared[0] = self.weights.to(device)

    def rank(self, logits: torch.Tensor, path: Sequence[int], context: Context) -> list[int]:
        """Returns the tokens that the target's sampler would choose of these logits after this path, best first. It
        returns nothing where nobody can choose, because whether the text comes that far is for the target to say."""
        with context.history.guesses():
            context.history.extend(path)
            try:
                return context.sampler.rank(logits, context.history, len(self.odds[0]))
            except NumericsError:
                return []

    def learn(self, tokens: Sequence[int]) -> None:
        """Takes in the tokens that the model wrote after the pending token of the last tree."""
        for head, token in enumerate(tokens[: len(self.weights)]):
            guesses = self._guesses.get(tuple(tokens[:head]))
            if guesses is None:
                break
            for guess, odds in zip(guesses, self.odds[head], strict=False):
                odds.learn(guess == token)
        self._guesses = {}


def by_chance(branch: Branch) -> tuple[float, int]:
    """Sorts the most probable first. Among equal ones the shallower comes first, so a parent is before its children."""
    return -branch.chance, len(branch.path)


def for_checkpoint(resources: Resources, path: str | None = None) -> Heads:
    """Makes the drafter with the heads that `path` names, see `find_file`. Texts of one model share them."""
    checkpoint, file = resources.checkpoint, find_file(resources.checkpoint, path)
    key = f"heads {file} {file.stat().st_mtime_ns}"
    if key not in resources.kept:
        embedding = checkpoint.tensors(dtype=torch.bfloat16)["model.embed_tokens.weight"]
        resources.kept[key] = [read_for(checkpoint, file)], embedding
    shared, embedding = resources.kept[key]
    return Heads(shared[0], embedding, shared)


def with_own_layers(options: Options, resources: Resources) -> Drafter | None:
    """Makes the drafter that the folder of `draft_heads` is for, None where it is not a folder of such a draft."""
    drafter = drafter_of(options.draft_heads)
    return None if drafter is None else OWN_LAYERS[drafter](options, resources)


OWN_LAYERS: Mapping[str, Callable[[Options, Resources], Drafter]] = {
    "eagle": eagle.for_checkpoint,
    "dflash": dflash.for_checkpoint,
}


def create(options: Options, resources: Resources) -> Drafter:
    if (other := with_own_layers(options, resources)) is not None:
        return other
    return for_checkpoint(resources, options.draft_heads)


DRAFTER = Heads
