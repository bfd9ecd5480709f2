"""Does the planner draft where it pays, and only there, on a machine that others use as well?

    python experiments/planner.py

Nothing is computed: passes are simulated. A pass of one row waits for memory, one of more rows for arithmetic, as on a
core with AVX2 after 16 384 tokens (10.6, 13.9, 18.3, 23.2 ms for 1 to 4 rows, int8 KV), or as on one with rows to
spare. Others come and go. While they are there a pass takes longer by as many milliseconds as memory alone would take.
Each guess takes a draft pass and is right with one chance. So the true costs are known, and the same texts are written
by the planner (`auto`), by plain decoding, and with every fixed number of guesses, on machines that are busy at the
same times.
"""

from __future__ import annotations

import argparse
import math
from bisect import bisect
from dataclasses import dataclass
from itertools import product
from statistics import mean
from typing import Any

import numpy as np

from results import Results, Row, add_flags, start
from tokenswift_py.planning.costs import PassCost
from tokenswift_py.planning.planner import Planner

CORES = {"AVX2": (10.6, 13.9, 4.6), "rows to spare": (10.6, 11.6, 1.5)}  # ms of one row, of two, of each further one
OTHERS = {  # seconds that others are away and there, on average, and how much a pass varies
    "calm": (math.inf, 0.0, 0.04),
    "bursts of 0.5 s": (3.0, 0.5, 0.04),
    "bursts of 2 s": (5.0, 2.0, 0.04),
    "busy for 20 s": (40.0, 20.0, 0.04),
    "noisy, bursts of 0.5 s": (3.0, 0.5, 0.12),
}
DRAFT_MS, HOST_MS, CONTEXT, MOST_GUESSES = 3.0, 0.3, 16_384, 12


class Machine:
    """A machine that others use at times that are drawn. ms: the time by now."""

    def __init__(self, core: str, others: str, seed: int):
        self.one, self.two, self.more = CORES[core]
        away, there, self.varies = OTHERS[others]
        when = np.random.default_rng(seed)
        stays = when.exponential((away, there), (4000, 2)) if there else np.array([[math.inf, 0.0]])
        self._ends: list[float] = (1e3 * np.cumsum(stays.ravel())).tolist()
        self._rng = np.random.default_rng(seed + 1000)
        self.ms = 0.0

    def verify(self, rows: int) -> float:
        """Lets time pass for a pass of the target, and returns how much."""
        return self._pass(self.one if rows == 1 else self.two + self.more * (rows - 2), self.one)

    def draft(self) -> float:
        return self._pass(DRAFT_MS, DRAFT_MS)

    def _pass(self, ms: float, of_memory: float) -> float:
        busy = bisect(self._ends, self.ms) % 2 == 1
        took = (ms + of_memory * busy) * math.exp(self.varies * self._rng.standard_normal())
        self.ms += took
        return took


@dataclass
class Text:
    """One text as it is written. rounds, drafted: all rounds, and those with a guess."""

    machine: Machine
    chance: float
    seed: int
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed + 2000)

    def right(self, guesses: int) -> int:
        """Returns how many guesses of a chain are right."""
        return next((i for i in range(guesses) if self._rng.random() >= self.chance), guesses)

    def end_round(self, guesses: int) -> tuple[int, float]:
        """Verifies a chain. Returns the tokens that it gave, and the milliseconds of the pass."""
        tokens, ms = 1 + self.right(guesses), self.machine.verify(1 + guesses)
        self.machine.ms += HOST_MS
        self.tokens, self.rounds, self.drafted = self.tokens + tokens, self.rounds + 1, self.drafted + (guesses > 0)
        return tokens, ms


def write_fixed(text: Text, length: int, guesses: int) -> None:
    while text.tokens < length:
        for _ in range(guesses):
            text.machine.draft()
        text.end_round(guesses)


def write_planned(text: Text, length: int) -> None:
    """Asks the planner before every guess, as the drafters do. They know the chance of a guess well, and so does this
    one: what is tried is what the planner makes of milliseconds."""
    planner, draft = Planner(), PassCost()
    while text.tokens < length:
        plan = planner.at(CONTEXT)
        draft.load = plan.load
        guesses, spent, path = 0, 0.0, text.chance
        while guesses + 1 < min(plan.rows_at_most, 1 + MOST_GUESSES):
            pass_ms = plan.draft_ms(draft, 1, 1024)
            pays = plan.worth(path, pass_ms + plan.shared_row_ms(1 + guesses))
            if not pays and (guesses or not plan.may_probe(pass_ms)):
                break
            took = text.machine.draft()
            draft.observe(1, 1024, took)
            guesses, spent, path = guesses + 1, spent + took, path * text.chance
        tokens, verify = text.end_round(guesses)
        phases = {"draft": spent, "verify": verify, "accept": HOST_MS, "commit": 0.0, "learn": 0.0}
        planner.observe(CONTEXT, 1 + guesses, tokens, phases)


def simulated(args: argparse.Namespace, core: str, others: str, chance: float) -> Row:
    def texts() -> list[Text]:
        return [Text(Machine(core, others, seed), chance, seed) for seed in range(args.texts)]

    fixed = {}
    for guesses in range(MOST_GUESSES + 1):
        for text in (those := texts()):
            write_fixed(text, args.tokens, guesses)
        fixed[guesses] = [text.machine.ms / text.tokens for text in those]
    for text in (planned := texts()):
        write_planned(text, args.tokens)
    gains = [plain * text.tokens / text.machine.ms for plain, text in zip(fixed[0], planned, strict=True)]
    best = min(fixed, key=lambda guesses: mean(fixed[guesses]))
    best_gain = mean(plain / ms for plain, ms in zip(fixed[0], fixed[best], strict=True))
    return {
        "auto_over_plain": round(mean(gains), 3),
        "least": round(min(gains), 3),
        "best_fixed": best,
        "best_fixed_over_plain": round(best_gain, 3),
        "auto_over_best_fixed": round(mean(gains) / best_gain, 3),
        "rounds_with_guesses": round(sum(text.drafted for text in planned) / sum(text.rounds for text in planned), 2),
    }


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws the gain of auto and of the best fixed number of guesses, a panel for each core."""
    for panel, core in zip(figure.subplots(1, len(CORES)), CORES, strict=True):
        here = [row for row in rows if row["core"] == core]
        labels = [f"{row['others']}, {row['chance']}" for row in here]
        panel.plot([row["best_fixed_over_plain"] for row in here], labels, "o", label="best fixed number of guesses")
        panel.plot([row["auto_over_plain"] for row in here], labels, "x", label="auto")
        panel.axvline(1.0, linewidth=0.5, color="gray")
        panel.set_title(core)
        panel.set_xlabel("times as fast as plain decoding")
        panel.tick_params(axis="y", labelsize=5)
        panel.legend(fontsize=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000, help="of each text")
    parser.add_argument("--chances", default="0.5,0.6,0.75,0.9", metavar="LIST", help="that a guess is right")
    parser.add_argument("--texts", type=int, default=4, help="of each machine, all of other times")
    add_flags(parser)
    args = parser.parse_args()
    results = Results(
        "planner",
        "Does the planner draft where it pays, and only there, on a machine that others use as well?",
        args,
        guarantees={"everything": "simulated"},
        axes=("chances",),
    )
    for core, others, chance in product(CORES, OTHERS, map(float, args.chances.split(","))):
        key = {"core": core, "others": others, "chance": chance}
        results.cell(key, lambda key=key: simulated(args, *key.values()))
    results.save(plot)


if __name__ == "__main__":
    start(main)
