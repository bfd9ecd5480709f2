"""An estimate of how often a kind of guess is right."""

from __future__ import annotations


class Odds:
    """The chance that a guess of some kind is right, from earlier guesses. Recent ones count more.

    prior:  chance that is assumed before any was tried. It counts as `weight` guesses.
    memory: number of later guesses after which a guess counts 1/e.
    """

    __slots__ = ("memory", "prior", "right", "tried", "weight")

    def __init__(self, prior: float, weight: float = 4.0, memory: float = 200.0):
        self.prior, self.weight, self.memory = prior, weight, memory
        self.right = self.tried = 0.0

    def learn(self, hit: bool) -> None:
        """Counts one more guess, and whether it was right."""
        keep = 1 - 1 / self.memory
        self.right = self.right * keep + hit
        self.tried = self.tried * keep + 1

    @property
    def chance(self) -> float:
        """The chance that the next guess is right."""
        # equal to (right + prior weight) / (tried + weight), but the prior to the last bit before anything was tried
        return self.prior + (self.right - self.prior * self.tried) / (self.tried + self.weight)
