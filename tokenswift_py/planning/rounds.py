"""Statistics of the time that recent rounds of drafting and verifying took, and of the tokens that they gave."""

from __future__ import annotations

import math
from collections.abc import Hashable

from tokenswift_py.planning.costs import SHORTEST, Load


class Probes:
    """Says when a round may be other than looks best, to learn whether it still is not: when a guess that does not look
    worth its milliseconds may be tried, and when nothing is drafted ("plain"). Texts in company have one between them.

    Probes are granted in bursts, one for each text, for all of them to make in the same rounds: the weights are read
    for all texts at once, so a probe alone would say that drafting is dearer than it is. The rounds that are counted
    here are those of the company, in which each text has one.

    total_ms: milliseconds of all rounds.
    """

    def __init__(self) -> None:
        self.total_ms = 0.0
        self._texts: set[Hashable] = set()
        self._spent_ms: dict[str, float] = {}
        self._left: dict[str, int] = {}  # probes of a burst that was begun
        self._rounds = self._plain = 0.0  # the number of all rounds, and of the latest plain one or burst
        self._idle = 0.0  # the number of plain rounds since one that was not

    @property
    def burst(self) -> int:
        """Returns the number of texts there are, at least 1."""
        return max(1, len(self._texts))

    def join(self, text: Hashable) -> None:
        """Takes in that a text plans rounds."""
        self._texts.add(text)

    def leave(self, text: Hashable) -> None:
        """Takes in that it plans no more, so that bursts are as long as there are texts to make them."""
        self._texts.discard(text)
        self._left = {kind: min(left, self.burst) for kind, left in self._left.items()}

    def count(self, plain: bool) -> None:
        """Counts a text's round. Among others its plain round does not tell what plain decoding takes."""
        self._rounds += 1 / self.burst
        self._idle = self._idle + 1 / self.burst if plain else 0.0
        if plain and self.burst == 1:
            self._plain = self._rounds

    @property
    def rests(self) -> bool:
        """Returns whether texts in company look for no guesses in this round.

        Where company leaves no row that pays, looking for guesses in vain took 5 % of the time of 8 texts. So after
        some rounds in which no guess was verified they look for them only now and then, all in the same rounds.
        """
        idle = whole(self._idle) - IDLE_ROUNDS
        return self.burst > 1 and idle >= 0 and idle % REST_ROUNDS < REST_ROUNDS - LOOK_ROUNDS

    def plain_is_due(self) -> bool:
        """Returns whether it is long ago that nothing was drafted. At first it is soon."""
        return whole(self._rounds - self._plain) >= min(PLAIN_ROUNDS, max(2, whole(self._rounds) // 2))

    def open(self, kind: str) -> bool:
        """Returns whether a burst was begun that has probes left."""
        return self._left.get(kind, 0) > 0

    def may(self, ms: float, kind: str) -> bool:
        """Returns whether a probe of so many milliseconds may be made, and counts it if so.

        Probes of each kind take PROBES of all time, and a few are free at the beginning. While the company rests, only
        a new text asks for any of a draft.
        """
        share, left = PROBES * self.total_ms, self._left.get(kind, 0)
        # Where drafting paid for hours without probes, they would otherwise be made in every round for minutes when it
        # pays no more.
        spent = max(self._spent_ms.get(kind, 0.0), share - CREDIT_MS)
        if not left:
            left = 1 if self.rests and kind != "plain" else self.burst
            if spent + left * ms > share + max(FREE_PROBES, left) * ms:
                return False
            if kind == "plain":  # this burst, whose rounds are counted when all its texts have planned them
                self._plain = self._rounds
        self._spent_ms[kind], self._left[kind] = spent + ms, left - 1
        return True


def whole(rounds: float) -> int:
    """Returns how many rounds have ended of a sum of the texts' parts, which is a little less for some numbers of
    texts."""
    return math.floor(rounds + 1e-6)


class Rounds:
    """Statistics of the rounds of one text. Their milliseconds are kept as they would be under the usual load, and told
    as they are under the load now, as `PassCost` does.

    overhead_ms:   milliseconds of a round in which neither model computes.
    expected_rate: tokens per millisecond that the drafter expects to write under the usual load; 0 where it expects
                   nothing.
    load:          of the machine.
    """

    def __init__(self, load: Load) -> None:
        self.load = load
        self.overhead_ms = self.expected_rate = 0.0
        self._tokens = self._ms = 0.0  # the latest rounds count most

    def expect(self, rate: float) -> None:
        """Takes in how many tokens per millisecond the drafter expects to write."""
        self.expected_rate = rate * self.load.factor

    def observe(self, tokens: int, draft: float, verify: float, others: float, expected: float) -> None:
        """Takes in one round: its tokens, and milliseconds of its phases.

        expected: milliseconds that its verify pass should have taken by the model of costs. These count in the rate, so
                  that a burst on a busy machine changes no plan.
        """
        if not expected:  # no pass was timed yet: the tokens would count without their time
            return
        self.overhead_ms += (min(expected, others) - self.overhead_ms) / 32
        keep = 1 - 1 / ROUNDS
        self._tokens = self._tokens * keep + tokens
        self._ms = self._ms * keep + (min(draft, 4 * expected) + expected + self.overhead_ms) / self.load.factor

    def rate(self, plain_ms: float) -> float:
        """Returns the tokens per millisecond of the latest rounds, but no less than plain decoding would give, whose
        passes take `plain_ms`; 0 before anything is known.

        What the drafter expects counts as EXPECTED_ROUNDS rounds beside the latest: weighed against plain decoding
        alone, the first trees would hold guesses that do not pay. It never fades; where it did, texts were written 1 %
        slower.
        """
        plain = (plain_ms + self.overhead_ms) / self.load.factor
        if not plain:
            return 0.0
        expected = EXPECTED_ROUNDS * plain if self.expected_rate else 0.0
        rounds = (self._tokens + expected * self.expected_rate) / max(self._ms + expected, SHORTEST)
        return max(1 / plain, rounds) / self.load.factor


PROBES = 0.01
FREE_PROBES = 8
CREDIT_MS = 500.0  # what probes that were not made leave for later ones at the most
PLAIN_ROUNDS = 32  # the rounds after which a plain one is due
IDLE_ROUNDS = 8  # the rounds without a verified guess after which a company rests, and of a new text before it does
REST_ROUNDS, LOOK_ROUNDS = 34, 2  # the rounds from one rest to the next, and of the look between them
ROUNDS = 48  # the number of rounds after which a round counts 1/e in the rate
EXPECTED_ROUNDS = 8  # the number of rounds that the drafter's expectation counts for
