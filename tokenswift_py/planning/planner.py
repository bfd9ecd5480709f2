"""Decides how much is worth drafting now, by the measured cost of a pass, learned chances of a guess, and one rule.

Rounds of drafting and verifying follow one another, so a text is written at E[tokens of a round] / E[time of a round].
The policy that maximises such a ratio maximises E[tokens] - rate * E[time], where `rate` is the best ratio itself
(renewal reward; Dinkelbach 1967). So each node of a tree stands alone. With chance p of being emitted, and for c more
milliseconds of drafting and verifying, it saves p / rate - c milliseconds. It pays exactly if that is more than 0.
Plain decoding remains when no node pays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tokenswift_py.planning.costs import KNEE, SHORTEST, Load, PassCost
from tokenswift_py.planning.rounds import IDLE_ROUNDS, Probes, Rounds

Gain = Callable[[float, int], float]  # (a node's chance of being emitted, rows before it) -> milliseconds that it saves


class Planner:
    """Learns what the rounds of one text take and bring, and makes the plan of the next one.

    most:   nodes of a tree at most, the pending token not counted.
    shapes: numbers of rows that passes of the target are padded to, see `PassCost`.
    target: what a pass of the target costs; None has nothing learned yet. Texts in company learn it together.
    probes: when guesses may be tried that do not look worth it.
    """

    def __init__(
        self,
        most: int = 64,
        shapes: Sequence[int] = (),
        target: PassCost | None = None,
        probes: Probes | None = None,
    ) -> None:
        self.most = most
        self.target = target or PassCost(shapes)
        self.probes = probes or Probes()
        self.rounds = Rounds(self.target.load)
        self.rests = False  # whether the text looks for no guesses in this round
        self._count = 0  # of its rounds

    def at(self, context: int) -> Plan:
        """Returns the plan of a round that begins with so many tokens in the target's cache.

        What others could not guess says nothing of this text. So it does not rest at first, though its company does.
        """
        self.probes.join(self)
        self.target.load.among(self.probes.burst)
        self.rests = self.probes.rests and self._count >= IDLE_ROUNDS
        return Plan(self, context, self._plain_is_due(context))

    def between(self, context: int) -> Plan:
        """Returns a plan for what is asked between rounds."""
        return Plan(self, context)

    def leave(self) -> None:
        """Ends the text's part in its company."""
        self.probes.leave(self)

    def _plain_is_due(self, context: int) -> bool:
        """Returns whether this round is to be plain, to learn what plain decoding takes by now.

        It is what drafting has to beat, and passes with more rows do not tell it. Where it was not measured since the
        text was short, a story was drafted on at 0.84 of plain decoding's speed.
        """
        if not self.probes.open("plain") and not self.probes.plain_is_due():
            return False
        plain_ms = self.target(1, context)
        lost_ms = plain_ms + self.rounds.overhead_ms - 1 / max(self.rounds.rate(plain_ms), SHORTEST)
        return self.probes.may(max(0.0, lost_ms), "plain")

    def observe(self, context: int, rows: int, tokens: int, phase_ms: Mapping[str, float]) -> None:
        """Takes in one round.

        context:  tokens in the target's cache when it began.
        rows:     rows of its verify pass.
        tokens:   tokens that it wrote.
        phase_ms: milliseconds of its phases. A verify pass of NaN milliseconds (see `PassCost.observe`) counts with the
                  time that it should have taken.
        """
        draft, verify, *others = (phase_ms[phase] for phase in PHASES)
        self._count += 1
        self.probes.count(rows == 1 or self.rests)  # more rows of a text that rests are forced by its grammar
        self.target.observe(rows, context, verify)
        expected = self.target(rows, context)
        verify = expected if math.isnan(verify) else verify
        self.probes.total_ms += draft + verify + sum(others)
        self.rounds.observe(tokens, draft, verify, sum(others), expected)


class Plan:
    """Decides what is worth drafting in one round, at one length of the target's cache.

    It looks at what its planner knows now. So a drafter's expectation counts from the moment it is told.

    plain: whether nothing is to be drafted.
    rests: whether no guesses are to be looked for in this round, see `Probes.rests`.
    """

    def __init__(self, planner: Planner, context: int, plain: bool = False) -> None:
        self.context, self.rests, self._plain = context, planner.rests, plain
        self._most, self._target, self._rounds = planner.most, planner.target, planner.rounds
        self._probes = planner.probes

    @property
    def rows_at_most(self) -> int:
        """Rows of the tree at most: a first pass is plain, and no tree is far larger than those whose cost is known."""
        if self._plain:
            return 1
        return self._target.fitting(min(self._most + 1, 1 + 2 * self._target.largest))

    @property
    def load(self) -> Load:
        """The machine's load, which costs of draft passes share."""
        return self._target.load

    def longest_chain(self, budget: int, width: int) -> int:
        """Returns the guesses of a chain at most, in a tree of up to `budget` nodes with `width` guesses a node."""
        return budget - 1

    @property
    def rate(self) -> float:
        """The tokens per millisecond at which the text is being written, no less than plain decoding would give."""
        return self._rounds.rate(self.target_ms(1))

    def expect_rate(self, rate: float) -> None:
        """Takes in that the drafter expects to write so many tokens per millisecond."""
        self._rounds.expect(rate)

    def token_ms(self, chance: float) -> float:
        """Returns the milliseconds that a token takes at the present rate, times this chance; without bound before any
        rate is known."""
        rate = self.rate
        return chance / rate if rate else math.inf

    def target_ms(self, rows: int) -> float:
        """Returns what a verify pass of so many rows costs; 0 before any was measured."""
        return self._target(rows, self.context)

    def row_ms(self, rows: int) -> float:
        """Returns what one more row costs in a verify pass of `rows`."""
        return self._target.row_ms(rows, self.context)

    def shared_row_ms(self, rows: int) -> float:
        """Returns what one more row costs, where rows that may follow bear a part of it.

        Where a pass is padded, that is the next shape's cost, shared by all rows that have room in it. The second row
        may cost more than the third, see `PassCost`. Alone it would seldom pay, and a chain would not begin that pays
        as a whole. So it counts as much as a row of the chain for which a row costs least.
        """
        if rows == 1:
            one = self.target_ms(1)
            return min((self.target_ms(1 + more) - one) / more for more in range(1, KNEE + 1))
        return self.row_ms(rows) / (self._target.padded(rows + 1) - rows)

    def draft_ms(self, cost: PassCost, rows: int, keys: int) -> float:
        """Returns what a draft pass costs; as long as none was measured, as much as one of the target."""
        return cost(rows, keys) if cost.measured else self.target_ms(rows)

    def gain_ms(self, chance: float, rows: int) -> float:
        """Returns the milliseconds that a node saves which is emitted with this chance, and makes only the verify pass,
        `rows` so far, one row longer. It is without bound where nothing is known to cost any.

        Where a pass is padded, the first row of the next shape shares its cost with all that have room in it, none of
        which is likelier if the likeliest come first. Whether there are so many is seen in the end: see `rows_paid`.
        """
        return self.token_ms(chance) - self.shared_row_ms(rows)

    def worth(self, tokens: float, ms: float, instead_ms: float = 0.0) -> bool:
        """Returns whether so many expected tokens pay for their milliseconds.

        instead_ms: milliseconds that would be saved without them, and are not if they are drafted.
        """
        return self.token_ms(tokens) - ms > instead_ms

    def rows_paid(self, chances: Sequence[float], first: int) -> int:
        """Returns how many rows of a tree to verify: the first ones in any case, and as many shapes as their rows pay
        for.

        chances: of all its nodes, in order.
        """
        count = len(chances)
        while count > first:
            before = max(first, self._target.fitting(count - 1))
            if self.worth(sum(chances[before:count]), self.target_ms(count) - self.target_ms(before)):
                break
            count = before
        return count

    def best_rate(self, chance: float, draft_ms: float) -> float:
        """Returns the tokens per millisecond of a chain of the best length, whose every guess is right with this chance
        and takes a draft pass of `draft_ms`."""
        overhead_ms = self._rounds.overhead_ms
        best, tokens = 1 / max(self.target_ms(1) + overhead_ms, 1e-9), 1.0
        for length in range(1, min(LONGEST_CHAIN, self._most) + 1):
            tokens += chance**length
            best = max(best, tokens / (length * draft_ms + self.target_ms(length + 1) + overhead_ms))
        return best

    def may_probe(self, ms: float, kind: str = "draft") -> bool:
        """Returns whether a guess that does not look worth it may be tried all the same, and counts it if so; see
        `Probes`."""
        return self._probes.may(ms, kind)

    def probing(self, kind: str = "draft") -> bool:
        """Returns whether a company tries in these rounds what does not look worth it: then no text may be idle."""
        return self._probes.open(kind)

    def explain(self, rows: int) -> dict[str, float]:
        """Returns what a line of the trace says of the plan: tokens per second aimed at, and what passes should
        cost."""
        return {
            "tokens_per_s": round(1e3 * self.rate, 3),
            "verify_ms": round(self.target_ms(rows), 3),
            "plain_ms": round(self.target_ms(1), 3),
            "next_row_ms": round(self.row_ms(rows), 3),
        }


class FixedPlanner(Planner):
    """Has `most` nodes drafted in every round, whatever they cost, as sweeps and tests ask for. Its rounds say nothing
    of what pays. So it has no probes in common with others."""

    def between(self, context: int) -> FixedPlan:
        return FixedPlan(self, context)

    at = between


class FixedPlan(Plan):
    """The plan of a round in which every node is worth it."""

    @property
    def rows_at_most(self) -> int:
        return self._most + 1

    def longest_chain(self, budget: int, width: int) -> int:
        """Leaves room in the tree for the runners-up of every guess."""
        return (budget - 1) // width

    def probing(self, kind: str = "draft") -> bool:
        return True

    def gain_ms(self, chance: float, rows: int) -> float:
        return math.inf

    def worth(self, tokens: float, ms: float, instead_ms: float = 0.0) -> bool:
        return True

    def rows_paid(self, chances: Sequence[float], first: int) -> int:
        return len(chances)


PHASES = ("draft", "verify", "accept", "commit", "learn")
LONGEST_CHAIN = 32  # the guesses of the longest chain that `best_rate` considers
