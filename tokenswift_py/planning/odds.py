"""How often a kind of guess is right."""

from __future__ import annotations


class Odds:
    """How often guesses of some kind were right, recent ones counting more.

    prior:  the chance assumed before any was tried, counting as `weight` guesses.
    memory: guesses after which one counts 1/e.
    """

    __slots__ = ("memory", "prior", "right", "tried", "weight")

    def __init__(self, prior: float, weight: float = 4.0, memory: float = 200.0):
        self.prior, self.weight, self.memory = prior, weight, memory
        self.right = self.tried = 0.0

    def learn(self, hit: bool) -> None:
        keep = 1 - 1 / self.memory
        self.right = self.right * keep + hit
        self.tried = self.tried * keep + 1

    @property
    def chance(self) -> float:
        # as (right + prior weight) / (tried + weight), but the prior to the last bit before anything was tried
        return self.prior + (self.right - self.prior * self.tried) / (self.tried + self.weight)
