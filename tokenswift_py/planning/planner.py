"""How much is worth drafting now: measured cost of a pass, learned chances of a guess, and one rule to join them.

Rounds of drafting and verifying follow one another, so a text is written at E[tokens of a round] / E[time of a round].
The policy that maximises such a ratio maximises E[tokens] - rate * E[time], `rate` being the best ratio itself (renewal
reward; Dinkelbach 1967). So each node of a tree stands alone: with chance p of being emitted, and for c more
milliseconds of drafting and verifying, it pays exactly if p > rate * c. Plain decoding is what remains when none does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tokenswift_py.planning.costs import SHORTEST, PassCost, Times, as_measured


class Planner:
    """Says what is worth drafting.

    most:  nodes of a tree at most, the pending token not counted.
    fixed: draft `most` nodes always, whatever they cost; what sweeps and tests ask for.
    times, shapes: see `PassCost`.
    """

    def __init__(
        self, most: int = 64, fixed: bool = False, times: Times = as_measured, shapes: Sequence[int] = ()
    ) -> None:
        self.most, self.fixed = most, fixed
        self.target, self.draft = PassCost(shapes=shapes), PassCost(times, shapes)
        self.heads = PassCost(times)  # one head's guesses
        self._times = times
        self.context = 0
        self._tokens = self._ms = 0.0  # of the latest rounds, by the model of costs, so that a burst changes no plan
        self._total_ms = 0.0
        self._expected_rate = 0.0  # tokens per millisecond
        self._probe_ms: dict[str, float] = {}
        self._overhead_ms = 0.0

    @property
    def rows_at_most(self) -> int:
        """Rows of the next tree at most: a first pass is plain, and no tree is far larger than those whose cost is
        known."""
        if self.fixed:
            return self.most + 1
        return self.target.fitting(min(self.most + 1, 1 + 2 * self.target.largest))

    def draft_ms(self, rows: int, context: int) -> float:
        """What a draft pass costs; no less than a plain pass of the target as long as none was measured."""
        return self.draft(rows, context) if self.draft.measured else self.target(rows, self.context)

    @property
    def rate(self) -> float:
        """Tokens per millisecond that the text is being written at, and no less than plain decoding would give.

        What drafters expect counts as EXPECTED_ROUNDS rounds beside the latest: weighed against plain decoding alone,
        the first trees would hold guesses that do not pay. It never fades; where it did, texts were written 1 % slower.
        """
        plain = self.target(1, self.context) + self._overhead_ms
        if not plain:
            return 0.0
        expected = EXPECTED_ROUNDS * plain if self._expected_rate else 0.0
        rounds = (self._tokens + expected * self._expected_rate) / max(self._ms + expected, SHORTEST)
        return max(1 / plain, rounds)

    def expect_rate(self, rate: float) -> None:
        """A drafter expects to write so many tokens per millisecond."""
        self._expected_rate = rate

    def worth(self, chance: float, ms: float) -> bool:
        """Whether a node that is emitted with this chance pays for its milliseconds."""
        return self.fixed or chance > self.rate * ms

    def worth_row(self, chance: float, rows: int) -> bool:
        """`worth` for a node that only makes the verify pass, `rows` so far, one row longer."""
        return self.gain_ms(chance, rows) > 0

    def gain_ms(self, chance: float, rows: int) -> float:
        """Milliseconds that such a node saves; without bound where nothing is known to cost any.

        Where a pass is padded, the first row of the next shape shares its cost with all that have room in it, none of
        which is likelier if the likeliest come first. Whether there are so many is seen in the end: see `rows_paid`.
        """
        if self.fixed:
            return float("inf")
        return self.token_ms(chance) - self.shared_row_ms(rows)

    def token_ms(self, chance: float) -> float:
        """Milliseconds that a token takes at the present rate, times this chance; without bound before any is known."""
        rate = self.rate
        return chance / rate if rate else float("inf")

    def rows_paid(self, chances: Sequence[float], first: int) -> int:
        """How many rows of a tree to verify: the first ones in any case, and as many shapes as their rows pay for.

        chances: of all its nodes, in order.
        """
        count = len(chances)
        while count > first and not self.fixed:
            before = max(first, self.target.fitting(count - 1))
            ms = self.target(count, self.context) - self.target(before, self.context)
            if self.worth(sum(chances[before:count]), ms):
                break
            count = before
        return count

    def row_ms(self, rows: int) -> float:
        """What one more row costs in a verify pass of `rows`."""
        return self.target(rows + 1, self.context) - self.target(rows, self.context)

    def shared_row_ms(self, rows: int) -> float:
        """The same where a pass is padded: the next shape's cost, shared by all rows that have room in it."""
        return self.row_ms(rows) / (self.target.padded(rows + 1) - rows)

    def best_rate(self, chance: float, draft_ms: float) -> float:
        """Tokens per millisecond of a chain whose every guess is right with this chance, at the best length."""
        best, tokens = 1 / max(self.target(1, self.context) + self._overhead_ms, 1e-9), 1.0
        for length in range(1, min(LONGEST_CHAIN, self.most) + 1):
            tokens += chance**length
            ms = length * draft_ms + self.target(length + 1, self.context) + self._overhead_ms
            best = max(best, tokens / ms)
        return best

    def may_probe(self, ms: float, kind: str = "draft") -> bool:
        """Whether a guess that does not look worth it may be tried all the same, to learn whether it still is not.

        Probes of each kind take PROBES of all time, and a few are free at the beginning."""
        spent = self._probe_ms.get(kind, 0.0)
        if spent + ms > PROBES * self._total_ms + FREE_PROBES * ms:
            return False
        self._probe_ms[kind] = spent + ms
        return True

    def observe(self, rows: int, tokens: int, phase_ms: Mapping[str, float]) -> None:
        """One round: rows verified, tokens it gave, milliseconds of its phases. A verification of NaN milliseconds (see
        `PassCost.observe`) counts as what it should have taken."""
        draft, verify, *others = self._times(np.array([phase_ms[phase] for phase in PHASES])).tolist()
        self.target.observe(rows, self.context, verify)
        verify_ms = self.target(rows, self.context)
        other_ms = sum(others)
        self._total_ms += draft + (verify_ms if math.isnan(verify) else verify) + other_ms
        self._overhead_ms += (min(verify_ms, other_ms) - self._overhead_ms) / 32
        keep = 1 - 1 / ROUNDS
        self._tokens = self._tokens * keep + tokens
        self._ms = self._ms * keep + min(draft, 4 * verify_ms) + verify_ms + self._overhead_ms

    def explain(self, rows: int) -> dict[str, float]:
        """What a line of the trace says of the plan: tokens per second aimed at, and what the passes should cost."""
        return {
            "tokens_per_s": round(1e3 * self.rate, 3),
            "verify_ms": round(self.target(rows, self.context), 3),
            "plain_ms": round(self.target(1, self.context), 3),
            "next_row_ms": round(self.row_ms(rows), 3),
        }


PHASES = ("draft", "verify", "accept", "commit", "learn")
LONGEST_CHAIN = 32  # guesses, of those that `best_rate` considers
PROBES = 0.01
FREE_PROBES = 8
ROUNDS = 48  # rounds after which one counts 1/e in the rate
EXPECTED_ROUNDS = 8  # rounds
