"""Statistics of the time that recent rounds of drafting and verifying took, and of the tokens that they gave."""

from __future__ import annotations

from tokenswift_py.planning.costs import SHORTEST


class Rounds:
    """Statistics of the rounds of one text.

    overhead_ms:   milliseconds of a round in which neither model computes.
    total_ms:      milliseconds of all rounds.
    expected_rate: tokens per millisecond that the drafter expects to write; 0 where it expects nothing.
    """

    def __init__(self) -> None:
        self.overhead_ms = self.total_ms = self.expected_rate = 0.0
        self._tokens = self._ms = 0.0  # the latest rounds count most
        self._probe_ms: dict[str, float] = {}

    def observe(self, tokens: int, draft: float, verify: float, others: float, expected: float) -> None:
        """Takes in one round: its tokens, and milliseconds of its phases.

        expected: milliseconds that its verify pass should have taken by the model of costs. These count in the rate, so
                  that a burst on a busy machine changes no plan.
        """
        self.total_ms += draft + verify + others
        self.overhead_ms += (min(expected, others) - self.overhead_ms) / 32
        keep = 1 - 1 / ROUNDS
        self._tokens = self._tokens * keep + tokens
        self._ms = self._ms * keep + min(draft, 4 * expected) + expected + self.overhead_ms

    def rate(self, plain_ms: float) -> float:
        """Returns the tokens per millisecond of the latest rounds, but no less than plain decoding would give, whose
        passes take `plain_ms`; 0 before anything is known.

        What the drafter expects counts as EXPECTED_ROUNDS rounds beside the latest: weighed against plain decoding
        alone, the first trees would hold guesses that do not pay. It never fades; where it did, texts were written 1 %
        slower.
        """
        plain = plain_ms + self.overhead_ms
        if not plain:
            return 0.0
        expected = EXPECTED_ROUNDS * plain if self.expected_rate else 0.0
        rounds = (self._tokens + expected * self.expected_rate) / max(self._ms + expected, SHORTEST)
        return max(1 / plain, rounds)

    def may_probe(self, ms: float, kind: str) -> bool:
        """Returns whether a guess that does not look worth its milliseconds may be tried all the same, to learn whether
        it still is not; counts it if so.

        Probes of each kind take PROBES of all time, and a few are free at the beginning.
        """
        spent = self._probe_ms.get(kind, 0.0)
        if spent + ms > PROBES * self.total_ms + FREE_PROBES * ms:
            return False
        self._probe_ms[kind] = spent + ms
        return True


PROBES = 0.01
FREE_PROBES = 8
ROUNDS = 48  # rounds after which one counts 1/e in the rate
EXPECTED_ROUNDS = 8  # rounds
