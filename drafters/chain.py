"""Parts of the drafters that guess token after token by the target's own noise. They say how sure a guess is, and how
much it is worth."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tokenswift_py.core import Acceptance, DraftTree
from tokenswift_py.drafters.base import Candidates, Context, Draft
from tokenswift_py.planning.odds import Odds
from tokenswift_py.sampling.reference import NumericsError

Doubles = npt.NDArray[np.float64]
Ranked = list[tuple[int, float]]  # tokens, best first, with their perturbed scores


def wrong(lead: Doubles | float, spread: Doubles | float, blind: Doubles | float = 0.6) -> Doubles:
    """Returns the chance that a guess is wrong, by the lead of its perturbed score over the next one's.

    Target and draft share their noise, so only the error of the draft's scores can make a guess wrong, and a large lead
    outlives that. The form was fitted to 7 500 guesses of the default model (code and docs, after 16 K and 64 K tokens,
    views of 1 024 to 8 192). It holds from few errors to many, while the spread alone changes. Where sampling left one
    candidate, the lead is without bound and the guess still wrong now and then: hence FARTHEST.

    lead, spread: in units of logit / temperature.
    blind: the chance where the lead says nothing.
    """
    return np.asarray(blind * np.exp(-((np.minimum(lead, FARTHEST) / spread) ** 0.8)))


class Kind(NamedTuple):
    """How the guesses of a kind of drafts go wrong.

    blind:     the chances there may be that a guess without a lead is wrong, see `wrong`.
    runner_up: how often the next one by score is right at most, as a share of how often the first is.
    """

    blind: tuple[float, ...]
    runner_up: float


COMPUTED = Kind((0.6,), 1.0)  # drafts that compute what the target does, from less
TRAINED = Kind((0.6, 0.75, 0.9, 0.99), 0.3)
"""Layers that were trained, perhaps on other texts. Where the packaged heads' first choice is right 0.3 to 0.4 of the
time, the next two together are right 0.14 to 0.17 of it."""

UNLIKELY = 2.0  # before any guess was seen, all chances of `Kind.blind` but the first are less likely by so much, in ln
FARTHEST = 6.0
LEADS = (0.05, 0.15, 0.3, 0.6, 1.0, 1.6, 2.5, 4.0)  # bounds of the ranges that are counted apart
MIDDLES = np.array((0.025, 0.1, 0.22, 0.45, 0.8, 1.3, 2.0, 3.2, FARTHEST))
USUAL = (0.015, 0.028, 0.048, 0.082, 0.09, 0.113, 0.11, 0.09, 0.424)  # how often leads lay in each


class Experience:
    """The spreads and blind chances that explain the guesses seen. Recent guesses count more.

    blind:      chances that a guess without a lead is wrong, of `Kind`.
    likelihood: [blind, FACTORS] logarithms. A factor is the true spread divided by the expected one.
    leads:      [LEADS + 1] how often a guess's lead lay in each range.
    """

    def __init__(self, kind: Kind = COMPUTED) -> None:
        self.blind = np.array(kind.blind)
        self.likelihood = np.zeros((len(kind.blind), len(FACTORS)))
        self.leads = 20 * np.array(USUAL)

    def learn(self, lead: float, expected: float, right: bool) -> None:
        chance = wrong(lead, expected * FACTORS, self.blind[:, None])
        self.likelihood = self.likelihood * (1 - 1 / MEMORY) + np.log(np.maximum(1 - chance if right else chance, 1e-6))

    def count(self, lead: float) -> None:
        self.leads *= 1 - 1 / MEMORY
        self.leads[bisect(LEADS, lead)] += 1


MEMORY = 200.0  # the number of later guesses after which a guess counts 1/e
FACTORS = np.geomspace(1 / 16, 16, 33)
PRIOR = -0.5 * (np.log(FACTORS) / np.log(2.5)) ** 2
KINSHIP = 0.8  # the weight of a guess of another draft of the family


class Confidence:
    """Estimates how often the guesses of one draft are right.

    width:  guesses a node has at most, runners-up included.
    family: experience that drafts of the same kind share; they differ by the expected spread.
    kind:   the kind of the draft, which is the family's, too.
    spread: expected spread of the errors of its scores, in units of logit / temperature, see `expect`.
    """

    spread = 1.0

    def __init__(self, width: int, family: Experience | None = None, kind: Kind = COMPUTED):
        self.width, self._runner_up = width, kind.runner_up
        self._own, self._family = Experience(kind), family
        self._first = [Odds(0.0, weight=16.0) for _ in MIDDLES]  # the priors are those of `wrong`
        self._others = [[Odds(0.0) for _ in MIDDLES] for _ in range(1, width)]
        self._leads: dict[int, float] = {}  # the lead of the latest guess that became each node

    def expect(self, error: float, temperature: float) -> None:
        """Expects errors of so many logits, in scores that are divided by this temperature (0 is greedy, where they are
        not). It may be called again before every draft."""
        self.spread = error / (temperature or 1.0)

    @property
    def ranks(self) -> int:
        """The number of tokens that have to be ranked for a guess: the first tells by its lead how sure it is."""
        return max(2, self.width)

    @property
    def next(self) -> float:
        """The chance that the next guess, which is not made yet, is right."""
        leads = (self._family or self._own).leads
        for odds, chance_wrong in zip(self._first, self._wrong(MIDDLES).tolist(), strict=True):
            odds.prior = 1 - chance_wrong
        chances = [odds.chance for odds in self._first]
        return float(leads @ chances / leads.sum())

    def guess(
        self,
        context: Context,
        candidates: Candidates,
        end: int,
        ranked: Callable[[], Ranked],
        more: Callable[[int], Any] | None = None,
    ) -> int | None:
        """Makes the best token after node `end` its child, which joins the history, and the runners-up candidates
        beside it. Returns the child. It returns None for logits that nobody can choose from, because whether the text
        comes that far is for the target to say.

        ranked: gives the best `ranks` tokens there, or raises, see `Sampler.ranker`.
        more: value that a candidate's token brings along, see `Candidates.push`.
        """
        try:
            (token, score), *others = ranked()
        except NumericsError:
            return None
        lead = score - others[0][1] if others else FARTHEST
        node = candidates.draft.guess(end, token, self._odds(lead))
        assert node is not None
        self._leads[node] = lead
        for rank, (other, its_score) in enumerate(others[: self.width - 1]):
            odds = self._others[rank][bisect(LEADS, score - its_score)]
            wrong_by = float(self._wrong(score - its_score))
            odds.prior = min(RUNNER_UP * wrong_by, self._runner_up * (1 - wrong_by)) / (1 + rank)
            candidates.push(end, other, odds, None if more is None else more(other))
        context.history.append(token)
        return node

    def learn(self, draft: Draft, chain: Sequence[int], taken: Acceptance) -> bool:
        """Counts the guesses of a chain that were put to the test. Returns whether all of them were right.

        chain: nodes of the chain, the root first.
        """
        for node, guess in pairwise(chain):
            if node not in taken.after:
                break
            if draft.odds[guess] is None:  # forced
                continue
            right = draft.tokens[guess] == taken.after[node]
            (self._family or self._own).count(self._leads[guess])
            for experience in filter(None, (self._own, self._family)):
                experience.learn(self._leads[guess], self.spread, right)
            if not right:
                return False
        return True

    def _odds(self, lead: float) -> Odds:
        odds = self._first[bisect(LEADS, lead)]
        odds.prior = 1 - float(self._wrong(lead))
        return odds

    def _wrong(self, leads: Doubles | float) -> Doubles:
        """Returns the chance that a guess is wrong for each of these leads. It is a mean over all spreads and blind
        chances there may be, each as likely as the guesses seen make it."""
        likelihood = self._own.likelihood
        if self._family is not None:  # the family has seen the draft's own guesses, too
            likelihood = likelihood + KINSHIP * (self._family.likelihood - likelihood)
        believed = PRIOR + likelihood
        believed[1:] -= UNLIKELY
        belief = np.exp(believed - believed.max())
        without_lead = self._own.blind @ belief / belief.sum()
        chances: Doubles = wrong(np.asarray(leads)[..., None], self.spread * FACTORS, 1.0) @ without_lead
        return chances


RUNNER_UP = 0.55  # the share of wrong guesses in whose place the next one by score is right


class Chain:
    """The draft of one round, which grows guess by guess, and the guesses that may join it in the end.

    draft:      the tree.
    candidates: guesses that could join without another draft pass, runners-up of the chain's among them.
    nodes:      nodes of the chain, the root first.
    """

    def __init__(self, pending: int, budget: int):
        self.draft = Draft(pending, budget)
        self.candidates = Candidates(self.draft)
        self.nodes = [0]

    def __len__(self) -> int:
        """Returns the number of its guesses. The root is not one of them."""
        return len(self.nodes) - 1

    @property
    def end(self) -> int:
        """Returns its last node."""
        return self.nodes[-1]

    @property
    def chance(self) -> float:
        """Returns the chance that its last node is emitted."""
        return self.draft.chances[self.end]

    def guess(
        self,
        confidence: Confidence,
        context: Context,
        ranked: Callable[[], Ranked],
        more: Callable[[int], Any] | None = None,
    ) -> int | None:
        """Grows by the best token after its end, see `Confidence.guess`. Returns the token, if there is one."""
        node = confidence.guess(context, self.candidates, self.end, ranked, more)
        if node is None:
            return None
        self.nodes.append(node)
        return self.draft.tokens[node]

    def force(self, context: Context) -> list[int]:
        """Grows by the tokens that a grammar forces, and returns them."""
        nodes = self.draft.force(context, self.end)
        self.nodes += nodes
        return [self.draft.tokens[node] for node in nodes]

    def build(self, context: Context, follow: Callable[[int, Any], None] | None = None) -> DraftTree:
        """Returns the tree, with all candidates that pay for their rows. follow: function for `Candidates.take`."""
        self.draft.fill(context.plan, lambda gain: self.candidates.take(gain, follow))
        self.draft.force_last(context)
        return self.draft.build()

    def explain(self) -> dict[str, Any]:
        """Returns its part of a line of the trace."""
        return {"chain": len(self), "expected_tokens": round(sum(self.draft.chances), 3)}
