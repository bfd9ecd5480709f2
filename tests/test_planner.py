"""The planner learns costs and chances, and keeps the drafts that are worth their time. The trace shows it.

Passes are simulated: their milliseconds come from a formula and a seeded generator, not from a clock.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import nnls

from tokenswift_py import TokenSwift, UserError
from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.passes import compute
from tokenswift_py.drafters.ngram import NGram
from tokenswift_py.planning.costs import PassCost, features, non_negative
from tokenswift_py.planning.odds import Odds
from tokenswift_py.planning.planner import FixedPlanner, Plan, Planner
from tokenswift_py.planning.rounds import Probes
from tokenswift_py.runs.journal import read
from tokenswift_py.sampling.reference import Sampler

CONTEXTS = (200, 1000, 5000, 20_000)
Cost = Callable[[int, int], float]


def true_cost(rows: int, context: int) -> float:
    """The time of a pass that always reads weights and cache. Rows beyond four are bound by arithmetic."""
    extra = max(0, rows - 4)
    return 8 + 0.2 * rows + 0.9 * extra + context * (6e-4 + 2e-5 * rows + 1.5e-4 * extra)


def noisy(rng: np.random.Generator, ms: float) -> float:
    """Adds some percent of jitter, and now and then a burst of other work of the machine."""
    return float(ms * np.exp(0.04 * rng.standard_normal()) * (3 if rng.random() < 0.08 else 1))


def fitted(seed: int = 0, passes: int = 600) -> PassCost:
    rng = np.random.default_rng(seed)
    cost = PassCost()
    for _ in range(passes):
        rows, context = int(rng.integers(1, 25)), int(rng.choice(CONTEXTS))
        cost.observe(rows, context, noisy(rng, true_cost(rows, context)))
    return cost


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_cost_of_a_pass_is_found_under_noise(seed: int) -> None:
    """Costs under the usual load are right at contexts and row counts that were measured, and at others between
    them."""
    cost = fitted(seed)
    for rows in (1, 2, 4, 6, 9, 16, 24):
        for context in (*CONTEXTS, 600, 12_000):
            assert cost(rows, context) / cost.load.factor == pytest.approx(true_cost(rows, context), rel=0.12)


def test_the_cost_of_a_view_that_was_left_is_not_forgotten() -> None:
    """Draft passes over views of 2 048 tokens, then far more over views of 4 096, which cost a millisecond more."""
    rng, cost = np.random.default_rng(2), PassCost()
    cost.octaves = True
    for passes, keys, ms in ((20, 2080, 6.0), (400, 4128, 7.0)):
        for _ in range(passes):
            cost.observe(1, keys, noisy(rng, ms))
    told = [cost(1, keys) / cost.load.factor for keys in (1056, 2080, 4128)]
    assert told == pytest.approx([5.5, 6.0, 7.0], rel=0.05)


def test_one_row_may_cost_far_less_than_two() -> None:
    """As with AVX2 after a long text: one row waits for memory, two are bound by arithmetic."""
    rng, cost = np.random.default_rng(4), PassCost((1, 2, 4, 8, 12, 16))
    ms = {1: 13.2, 2: 22.7, 4: 32.5, 8: 61.0, 12: 90.0}
    for _ in range(300):
        rows, context = int(rng.choice(list(ms))), int(rng.choice((10_000, 20_000, 40_000)))
        cost.observe(rows, context, noisy(rng, ms[rows] * (0.25 + 0.75 * context / 20_000)))
    for rows, true in ms.items():
        assert cost(rows, 20_000) / cost.load.factor == pytest.approx(true, rel=0.08)
        assert cost(rows, 40_000) / cost.load.factor == pytest.approx(1.75 * true, rel=0.08)


def test_a_chain_begins_though_its_second_row_costs_most() -> None:
    """One guess would not pay for 9.3 ms, three pay for 6.4 ms each."""
    planner = Planner()
    for rows, ms in ((1, 13.2), (2, 22.5), (3, 27.0), (4, 32.5), (8, 61.0)):
        for _ in range(12):
            planner.target.observe(rows, 20_000, ms)
    plan = planner.at(20_000)
    assert plan.row_ms(1) == pytest.approx(9.3, rel=0.05)
    assert plan.shared_row_ms(1) == pytest.approx((32.5 - 13.2) / 3, rel=0.05)
    assert [plan.shared_row_ms(rows) for rows in (2, 3, 4)] == [plan.row_ms(rows) for rows in (2, 3, 4)]


def test_plain_decoding_is_measured_again_though_drafting_seems_to_pay() -> None:
    """The first pass of a text was slow, and the fit alone would keep plain decoding too dear for ever."""
    planner = Planner(shapes=(1, 2, 4))
    planner.observe(20_000, 1, 1, phases(0.0, 18.0))
    plain = []
    for number in range(2000):
        context = 20_000 + number
        if planner.at(context).rows_at_most == 1:
            plain.append(number)
            planner.observe(context, 1, 1, phases(0.0, 13.0))
        else:
            rows, verify = ((2, 22.0), (4, 32.0))[number % 2]
            planner.observe(context, rows, rows - 1, phases(4.5 * (rows - 1), verify))
        if number == 200:
            assert planner.at(context).target_ms(1) == pytest.approx(13.0, rel=0.05)
    assert 2000 / 32 - 2 < len(plain) < 2000 / 32 + 8
    assert max(after - before for before, after in pairwise(plain)) <= 33


def test_a_plain_round_that_would_lose_much_is_rare() -> None:
    """It is made within a hundredth of the time, beyond the free ones at the beginning."""
    planner, lost, total = Planner(shapes=(1, 2, 4)), 0.0, 0.0
    for _ in range(3000):
        if planner.at(1000).rows_at_most == 1:
            planner.observe(1000, 1, 1, phases(0.0, 30.0))
            lost, total = lost + 30.3 - 31.3 / 4, total + 30.3
        else:
            planner.observe(1000, 4, 4, phases(1.0, 30.0))
            total += 31.3
    assert 0.002 < lost / total < 0.015


def test_a_company_is_plain_together() -> None:
    """A text's plain round among others that draft would not tell what plain decoding takes."""
    probes = Probes()
    planners = [Planner(probes=probes) for _ in range(8)]
    for planner in planners:
        planner.at(1000)
    for planner in planners:
        planner.observe(1000, 4, 4, phases(1.0, 30.0))
    plain = []
    for _ in range(400):
        rows = [planner.at(1000).rows_at_most for planner in planners]
        plain.append([row == 1 for row in rows])
        for planner, one in zip(planners, plain[-1], strict=True):
            planner.observe(1000, 1 if one else 4, 1 if one else 4, phases(0.0 if one else 1.0, 30.0))
    together = sum(map(all, plain))
    assert sum(map(any, plain)) == together
    assert 400 / 100 <= together <= 400 / 32 + 8  # they lose 22 of 30 ms, so a hundredth of the time is the bound


@pytest.mark.parametrize("texts", [1, 2, 8])
def test_plain_rounds_that_lose_nothing_leave_most_rounds_to_drafting(texts: int) -> None:
    """As long as drafting gives what plain decoding does, a plain round is free. A company once made all of them so."""
    probes = Probes()
    planners = [Planner(probes=probes) for _ in range(texts)]
    plain = 0
    for number in range(320):
        rows = [planner.at(1000).rows_at_most for planner in planners]
        plain += number > 0 and max(rows) == 1
        for planner, most in zip(planners, rows, strict=True):
            planner.observe(1000, min(most, 2), 1, phases(0.0, 10.0))
    assert 320 / 32 <= plain <= 320 / 32 + 8


def test_a_company_whose_guesses_never_pay_rests() -> None:
    """It looks for guesses in two rounds of 34, all its texts in the same ones, and is awake once one is verified."""
    probes = Probes()
    planners = [Planner(probes=probes) for _ in range(7)]

    def rounds(count: int) -> list[bool]:
        rests = []
        for _ in range(count):
            rests.append({planner.at(1000).rests for planner in planners})
            for planner in planners:
                planner.observe(1000, 1, 1, phases(0.0, 10.0))
        assert all(len(one) == 1 for one in rests)
        return [one.pop() for one in rests]

    assert rounds(8 + 3 * 34) == [False] * 8 + 3 * ([True] * 32 + [False] * 2)
    probes.count(False)
    assert rounds(10) == [False] * 8 + [True] * 2
    new = Planner(probes=probes)
    for number in range(10):
        assert new.at(1000).rests == (number >= 8), "a new text first looks for itself"
        assert planners[0].at(1000).rests
        assert not number or not probes.open("draft"), "it probes for itself alone"
        assert new.at(1000).may_probe(0.1)
        new.observe(1000, 1, 1, phases(0.0, 10.0))
    new.leave()
    for planner in planners[1:]:
        planner.leave()
    assert not planners[0].at(1000).rests, "a text alone does not rest"


def test_bursts_are_as_long_as_there_are_texts() -> None:
    """A server has seats for many texts. What one text plans is not to depend on their number."""
    probes = Probes()
    many = [Planner(probes=probes) for _ in range(16)]
    for planner in many:
        planner.at(1000)
        planner.observe(1000, 4, 4, phases(1.0, 30.0))
    for planner in many[1:]:
        planner.leave()
    plain = []
    for _ in range(400):
        plain.append(many[0].at(1000).rows_at_most == 1)
        rows = 1 if plain[-1] else 2
        many[0].observe(1000, rows, 1, phases(0.0, 10.0))
    assert 400 / 33 - 1 <= sum(plain) <= 400 / 33 + 8
    assert not any(map(all, pairwise(plain))), "one round at a time"


def test_rows_and_context_never_make_a_pass_cheaper() -> None:
    rng = np.random.default_rng(3)
    cost = PassCost()
    for _ in range(100):  # the times are random, whatever rows and context
        cost.observe(int(rng.integers(1, 9)), int(rng.choice(CONTEXTS)), float(rng.uniform(5, 15)))
    table = np.array([[cost(rows, context) for context in CONTEXTS] for rows in range(1, 65)])
    assert (np.diff(table, axis=0) >= 0).all()
    assert (np.diff(table, axis=1) >= 0).all()
    bends = np.diff(np.diff(table[1:], axis=0), axis=0)
    assert (bends >= -1e-9).all(), "from the third on each row costs no less than the one before"


def test_passes_shorter_than_the_clock_can_tell_cost_next_to_nothing() -> None:
    cost = PassCost()
    for rows in (1, 2, 3) * 9:
        cost.observe(rows, 10, 0.0)
    assert 0 <= cost(2, 10) < 1e-3


def test_the_cost_follows_a_machine_that_became_slower() -> None:
    cost, rng = fitted(), np.random.default_rng(5)
    for _ in range(600):
        rows, context = int(rng.integers(1, 25)), int(rng.choice(CONTEXTS))
        cost.observe(rows, context, noisy(rng, 2 * true_cost(rows, context)))
    assert cost(8, 5000) == pytest.approx(2 * true_cost(8, 5000), rel=0.15)


def test_no_tree_is_far_larger_than_those_whose_cost_is_known() -> None:
    planner = Planner(most=40)
    plan = planner.at(0)
    assert (planner.target.measured, planner.target(1, 100), plan.rows_at_most) == (False, 0.0, 1)
    grown = []
    for _ in range(6):
        planner.observe(0, plan.rows_at_most, 1, phases(0.0, 10.0))
        grown.append(plan.rows_at_most)
    assert grown == [3, 7, 15, 31, 41, 41]
    assert FixedPlanner(most=40).at(0).rows_at_most == 41


def test_a_plan_is_of_its_own_length_of_the_cache() -> None:
    planner = planner_of()
    for context in CONTEXTS:
        assert planner.at(context).target_ms(2) == pytest.approx(true_cost(2, context), rel=0.05)
    assert planner.at(20_000).rate < planner.at(200).rate == pytest.approx(1 / (true_cost(1, 200) + 0.3), rel=0.05)


def test_a_draft_pass_that_was_never_measured_costs_a_plain_one() -> None:
    planner, draft = Planner(), PassCost()
    planner.observe(5000, 1, 1, phases(0.0, true_cost(1, 5000)))
    plan = planner.at(5000)
    assert plan.draft_ms(draft, 1, 1000) == planner.target(1, 5000) == pytest.approx(true_cost(1, 5000))
    draft.observe(1, 1000, 2.0)
    assert plan.draft_ms(draft, 1, 1000) == pytest.approx(2.0)


def test_odds_start_at_the_prior_and_learn() -> None:
    rng, odds = np.random.default_rng(0), Odds(0.9)
    assert odds.chance == pytest.approx(0.9)
    for _ in range(2000):
        odds.learn(bool(rng.random() < 0.3))
    assert odds.chance == pytest.approx(0.3, abs=0.08)
    for _ in range(400):  # the text changes, and early guesses count little
        odds.learn(True)
    assert odds.chance > 0.85


def planner_of(rounds: int = 200) -> Planner:
    """A planner that has seen plain rounds after 5 000 tokens, and passes of more rows without noise."""
    planner = Planner()
    for rows in range(1, 17):
        for context in CONTEXTS:
            planner.target.observe(rows, context, true_cost(rows, context))
    for _ in range(rounds):
        planner.observe(5000, 1, 1, phases(0.0, true_cost(1, 5000)))
    return planner


def phases(draft: float, verify: float) -> dict[str, float]:
    return {"draft": draft, "verify": verify, "accept": 0.2, "commit": 0.05, "learn": 0.05}


def test_a_node_is_worth_what_plain_decoding_would_write_in_its_time() -> None:
    plan = planner_of().at(5000)
    plain = true_cost(1, 5000) + 0.3
    assert plan.rate == pytest.approx(1 / plain, rel=0.05)
    assert plan.worth(0.5, 0.45 * plain) and not plan.worth(0.5, 0.55 * plain)
    assert plan.worth(0.5, 0.2 * plain, instead_ms=0.25 * plain)
    assert not plan.worth(0.5, 0.2 * plain, instead_ms=0.35 * plain), "what is saved without it counts against it"
    row = true_cost(2, 5000) - true_cost(1, 5000)
    assert plan.row_ms(1) == pytest.approx(row, rel=0.3)
    assert plan.gain_ms(0.2, 1) == pytest.approx(0.2 * plain - row, rel=0.3)
    assert plan.gain_ms(0.01, 20) < 0
    assert Planner().at(0).worth(0.01, 1.0), "before anything was measured everything is worth a try"


def test_a_fixed_plan_drafts_whatever_it_costs() -> None:
    planner = FixedPlanner(most=9)
    for rows in (1, 10) * 9:
        planner.observe(5000, rows, 1, phases(0.0, 1e6 * rows))
    plan = planner.at(5000)
    assert plan.worth(0.0, 1e9, instead_ms=1e9) and plan.gain_ms(0.0, 9) == math.inf
    assert (plan.rows_at_most, plan.rows_paid([1.0, 0.0, 0.0], 1)) == (10, 3)
    assert plan.longest_chain(10, 3) == 3, "with two runners-up beside each guess"
    assert planner_of().at(5000).longest_chain(10, 3) == 9, "a planned chain is as long as it pays"
    assert plan.explain(10)["plain_ms"] == pytest.approx(1e6, rel=0.05), "what it costs is told all the same"


def test_a_text_that_is_written_faster_asks_more_of_a_node() -> None:
    planner = planner_of()
    plan = planner.at(5000)
    before = plan.rate
    for _ in range(200):
        planner.observe(5000, 4, 3, phases(5.0, true_cost(4, 5000)))
    assert plan.rate == pytest.approx(3 / (5 + true_cost(4, 5000) + 0.3), rel=0.05)
    for _ in range(400):  # and one whose drafts stopped being right no less than plain decoding
        planner.observe(5000, 16, 1, phases(30.0, true_cost(16, 5000)))
    assert plan.rate == pytest.approx(before, rel=0.1)


def test_what_is_expected_counts_beside_what_rounds_tell() -> None:
    planner = planner_of(rounds=1)
    plan = planner.at(5000)
    plain = plan.rate
    plan.expect_rate(3 * plain)
    assert 2.5 * plain < plan.rate <= 3 * plain, "the first trees are weighed against what they are to bring"
    for _ in range(48):
        planner.observe(5000, 1, 1, phases(0.0, true_cost(1, 5000)))
    assert plan.rate < 1.6 * plain, "rounds that bring less have their say"
    for _ in range(300):
        planner.observe(5000, 1, 1, phases(0.0, true_cost(1, 5000)))
    assert plan.rate == pytest.approx((48 + 8 * 3) / (48 + 8) * plain, rel=0.03), "most of it, but never all"
    plan.expect_rate(0.1 * plain)
    assert plan.rate == pytest.approx(plain, rel=0.05), "nothing expected is plain decoding's rate"


SHAPES = (1, 2, 4, 8, 16, 32, 64)


def padded_plan(step_ms: float) -> Plan:
    """A plan for padded passes: 10 ms, and `step_ms` more for each row that it computes, guess or padding."""
    planner = Planner(shapes=SHAPES)
    for rows in range(1, 65):
        planner.target.observe(rows, 5000, 10 + step_ms * next(shape for shape in SHAPES if shape >= rows))
    for _ in range(50):
        planner.observe(5000, 1, 1, phases(0.0, 10 + step_ms))
    return planner.at(5000)


def test_a_row_within_a_shape_costs_nothing_and_the_first_of_the_next_its_step() -> None:
    plan = padded_plan(0.25)
    for rows in range(1, 64):
        step = 0.25 * rows if rows in SHAPES else 0.0  # from a shape to the next, twice as large
        assert plan.row_ms(rows) == pytest.approx(step, abs=0.02), rows
    assert plan.rows_at_most == 64 and plan.target_ms(5) == plan.target_ms(8)
    assert plan.gain_ms(1e-6, 5) > 0, "a seat that is paid for"
    share = plan.rate * 0.25
    assert plan.gain_ms(1.2 * share, 8) > 0 > plan.gain_ms(0.8 * share, 8)


def test_a_shape_is_taken_if_its_rows_together_pay_for_it() -> None:
    plan = padded_plan(0.25)
    step = plan.rate * 8 * 0.25  # what rows 9 to 16 must bring
    tree = [1.0] + [0.5] * 7
    assert plan.rows_paid([*tree, *[step / 4] * 8], 1) == 16
    assert plan.rows_paid([*tree, *[step / 4] * 5], 1) == 13, "rows that nobody needs are padding"
    assert plan.rows_paid([*tree, *[step / 4] * 3], 1) == 8
    assert plan.rows_paid([*tree, *[step / 4] * 3], 10) == 11, "the shape that a draft pass led into is paid for"
    assert plan.rows_paid([*tree, *[1e-6] * 9], 10) == 16
    assert plan.rows_paid([1.0] + [1e-6] * 20, 1) == 1, "down to none"
    assert FixedPlanner(shapes=SHAPES).at(5000).rows_paid([*tree, 0.0], 1) == 9
    plain = planner_of().at(5000)
    worth = [1.0]
    while plain.gain_ms(0.3 * 0.9 ** len(worth), len(worth)) > 0:
        worth.append(0.3 * 0.9 ** len(worth))
    assert len(worth) > 3 and plain.rows_paid(worth, 1) == len(worth), "without shapes row by row says it all"


def test_trees_grow_from_shape_to_shape() -> None:
    planner = Planner(shapes=SHAPES)
    plan, grown = planner.at(0), []
    for _ in range(7):
        planner.observe(0, plan.rows_at_most, 1, phases(0.0, 10.0))
        grown.append(plan.rows_at_most)
    assert grown == [2, 4, 8, 16, 32, 64, 64], "a 65th row would be padded to no shape"
    assert FixedPlanner(most=7, shapes=SHAPES).at(0).rows_at_most == 8


def test_repeats_fill_a_shape_and_leave_one_that_does_not_pay() -> None:
    """Ten repeats have a chance above a fiftieth; three of them are all that is left for the shape of 16 rows."""
    text = [*([1, 2, *range(20, 32)] * 2), 1, 2]
    sizes = []
    for step_ms in (0.01, 0.4):
        plan, drafter = padded_plan(step_ms), NGram()
        drafter._odds = [[Odds(0.7) for _ in odds] for odds in drafter._odds]
        context: Any = SimpleNamespace(history=History(text), plan=plan, sampler=Sampler(SamplingParams(), 64))
        sizes.append(len(compute(drafter.propose(context, 17))))
    assert sizes == [11, 8]


def test_the_best_rate_is_that_of_the_best_length() -> None:
    planner = planner_of()
    plan, overhead, chance, draft_ms = planner.at(5000), planner.rounds.overhead_ms, 0.8, 2.0
    rates = [1 / (planner.target(1, 5000) + overhead)]
    for length in range(1, 33):
        tokens = sum(chance**n for n in range(length + 1))
        rates.append(tokens / (length * draft_ms + planner.target(length + 1, 5000) + overhead))
    assert plan.best_rate(chance, draft_ms) == pytest.approx(max(rates))
    assert 1 < np.argmax(rates) < 32
    assert plan.best_rate(0.05, 50.0) == pytest.approx(rates[0]), "plain decoding, where no length pays"


def test_probes_take_a_hundredth_of_the_time() -> None:
    planner, allowed = planner_of(rounds=0), 0
    for _ in range(4000):
        planner.observe(5000, 1, 1, phases(0.0, 10.0))
        allowed += planner.at(5000).may_probe(3.0)
    assert 3 * allowed == pytest.approx(0.01 * 4000 * 10.3 + 8 * 3, rel=0.1)
    assert not planner.at(9000).may_probe(3.0)
    assert planner.at(9000).may_probe(3.0, "heads"), "each kind for itself"


def test_what_probes_did_not_take_for_long_is_not_made_up_for() -> None:
    """Where drafting paid for hours, and pays no more: a hundredth of hours would be minutes of nothing but probes."""
    planner = planner_of(rounds=0)
    for _ in range(1000):
        planner.observe(5000, 1, 1, phases(0.0, 1000.0))
    assert 25.0 * sum(planner.at(5000).may_probe(25.0) for _ in range(1000)) == 500 + 8 * 25


def test_a_company_probes_in_bursts() -> None:
    """All its texts try to draft in the same rounds, and no text has probes of its own."""
    shared = Probes()
    texts = [Planner(probes=shared) for _ in range(4)]
    for text in texts:
        text.at(100)
    granted = []
    for _ in range(2000):
        plans = [text.at(100) for text in texts]
        granted.append(sum(plan.may_probe(2.0) for plan in plans if not plan.rests))
        for text in texts:
            text.observe(100, 1, 1, phases(0.0, 10.0))
    assert set(granted) == {0, 4}
    assert 2.0 * sum(granted) == pytest.approx(0.01 * shared.total_ms, rel=0.1)


def test_the_fit_is_the_least_squares_with_no_negative_coefficient() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        count = rng.integers(3, 150)
        x = features(rng.integers(1, 40, count).astype(float), rng.integers(0, 100_000, count).astype(float))
        x /= rng.uniform(5, 80, count)[:, None]
        weights, scale = rng.uniform(0.1, 50, count), np.abs(x).max(0)
        wanted = nnls(x / scale * np.sqrt(weights)[:, None], np.sqrt(weights), maxiter=1000)[0] / scale
        found = non_negative(x, weights)
        assert (found >= 0).all()
        errors = [float(weights @ (x @ b - 1) ** 2 / weights.sum()) for b in (found, wanted)]
        assert errors[0] == pytest.approx(errors[1], abs=2e-6)


Load = Callable[[float, int], float]


def simulate(
    chance: float,
    draft_ms: float,
    tokens: int,
    length: int | None = None,
    seed: int = 0,
    cost: Cost = true_cost,
    load: Load = lambda ms, rows: 1.0,
) -> float:
    """Returns milliseconds a token of a text whose guesses are all right with one chance and cost one draft pass each.

    length: number of guesses to draft always. None asks the planner before every guess.
    load:   how many times as long a pass takes, by the time and its rows.
    """
    rng, planner, draft, odds = np.random.default_rng(seed), Planner(), PassCost(), Odds(0.9)
    written, total = 0, 0.0
    while written < tokens:
        plan = planner.at(5000)
        draft.load = plan.load
        guesses, spent, path = 0, 0.0, 1.0
        while guesses < (plan.rows_at_most - 1 if length is None else length):
            ms = plan.draft_ms(draft, 1, 1000) + plan.row_ms(1 + guesses)
            path *= odds.chance
            if length is None and not plan.worth(path, ms) and (guesses or not plan.may_probe(ms)):
                break
            measured = noisy(rng, draft_ms * load(total + spent, 1))
            draft.observe(1, 1000, measured)
            spent, guesses = spent + measured, guesses + 1
        right = 0
        while right < guesses and rng.random() < chance:
            right += 1
        for i in range(min(right + 1, guesses)):
            odds.learn(i < right)
        verify = noisy(rng, cost(1 + guesses, 5000) * load(total + spent, 1 + guesses))
        planner.observe(5000, 1 + guesses, right + 1, phases(spent, verify))
        written, total = written + right + 1, total + spent + verify + 0.3
    return total / written


@pytest.mark.parametrize(("chance", "draft_ms"), [(0.02, 4.0), (0.5, 9.0), (0.3, 4.0)])
def test_drafting_that_does_not_pay_is_left_alone(chance: float, draft_ms: float) -> None:
    """2 000 tokens take at most 3 % longer than plain decoding, with probes and first attempts."""
    plain = np.mean([simulate(chance, draft_ms, 2000, length=0, seed=seed) for seed in range(4)])
    planned = np.mean([simulate(chance, draft_ms, 2000, seed=seed) for seed in range(4)])
    assert planned < 1.03 * plain


@pytest.mark.parametrize(("chance", "draft_ms"), [(0.95, 1.0), (0.8, 1.0), (0.9, 4.0)])
def test_drafting_that_pays_comes_near_the_best_length(chance: float, draft_ms: float) -> None:
    best = min(simulate(chance, draft_ms, 3000, length=length, seed=7) for length in range(16))
    assert best < 0.8 * simulate(chance, draft_ms, 3000, length=0, seed=7)
    assert best / simulate(chance, draft_ms, 3000, seed=7) > 0.9


def busy_cost(rows: int, context: int) -> float:
    """The time of a pass of AVX2 after 20 000 tokens: a row waits for memory, more are bound by arithmetic."""
    return 16.4 if rows == 1 else 21.4 + 5.5 * (rows - 2)


def busy(calm: float, burst: float, seed: int) -> Load:
    """Others take half of the memory for `burst` seconds at a time, `calm` seconds apart, both drawn. What is bound by
    arithmetic suffers less."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(np.stack([rng.exponential(1e3 * calm, 2000), rng.exponential(1e3 * burst, 2000)], axis=1).ravel())
    return lambda ms, rows: 1 + np.searchsorted(ends, ms) % 2 * 16.4 / busy_cost(rows, 0)


@pytest.mark.parametrize(("chance", "least"), [(0.5, 0.97), (0.75, 1.03), (0.9, 1.08)])
@pytest.mark.parametrize(("calm", "burst"), [(3, 0.5), (5, 2), (40, 20)])
def test_bursts_of_other_work_mislead_no_text(calm: float, burst: float, chance: float, least: float) -> None:
    """A plain pass that was slow only because others worked just then must not make drafting look worth it."""
    took = {
        length: np.mean(
            [simulate(chance, 4.5, 2000, length, seed, busy_cost, busy(calm, burst, seed)) for seed in range(2)]
        )
        for length in (0, None)
    }
    assert took[0] / took[None] > least


STEP = {"step", "position", "tree", "path", "tokens", "ending", "ms", "planner", "drafter"}
PLAN = {"tokens_per_s", "verify_ms", "plain_ms", "next_row_ms"}


@pytest.mark.parametrize("drafter", ["ngram", "partial", "draft_model"])
def test_the_trace_has_a_line_a_step(tiny_folder: Path, tmp_path: Path, drafter: str) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine="torch")
    settings: dict[str, Any] = {"max_new_tokens": 60, "seed": 1, "ignore_eos": True, "draft_model": str(tiny_folder)}
    file = tmp_path / "trace.jsonl"
    result = swift.generate("the cat", drafter=drafter, trace=str(file), **settings)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert result.tokens == swift.generate("the cat", drafter=drafter, **settings).tokens
    assert len(lines) == result.report["num_spec_steps"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert [token for line in lines for token in line["tokens"]] == result.tokens[1:]
    assert sum(len(line["tree"]["tokens"]) - 1 for line in lines) == result.report["num_draft_tokens"]
    assert [line["ending"] for line in lines] == [None] * (len(lines) - 1) + ["length"]
    position = result.report["prompt_tokens"]
    for line in lines:
        assert set(line) == STEP
        assert set(line["planner"]) == PLAN
        assert set(line["ms"]) == {"draft", "verify", "accept", "commit", "learn"}
        assert line["drafter"]["name"] == drafter
        assert line["position"] == position
        tree, path = line["tree"], line["path"]
        assert tree["tokens"][0] == result.tokens[position - result.report["prompt_tokens"]]
        assert [tree["tokens"][node] for node in path[1:]] == line["tokens"][:-1]
        assert [tree["parents"][node] for node in path[1:]] == path[:-1]
        position += len(line["tokens"])


def test_a_trace_that_cannot_be_written_is_told_in_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_folder), engine="torch")
    with pytest.raises(UserError, match=r"trace: .* is not allowed; a file that can be written"):
        swift.generate("the cat", max_new_tokens=2, trace=str(tmp_path / "missing" / "trace.jsonl"))


def test_a_run_that_is_refused_leaves_no_trace(tiny_folder: Path, tmp_path: Path) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_folder), engine="torch")
    with pytest.raises(UserError, match="draft_heads"):
        swift.stream("the cat", trace=str(tmp_path / "trace.jsonl"), drafter="heads", draft_heads=str(tmp_path / "no"))
    swift.stream("the cat", trace=str(tmp_path / "trace.jsonl")).close()
    assert not (tmp_path / "trace.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_trace_and_nothing_else(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_folder), engine="torch")
    plain = swift.generate("the cat", max_new_tokens=30, seed=1)
    with swift.stream("the cat", max_new_tokens=30, seed=1, trace="/dev/full", out=tmp_path / "run") as stream:
        list(stream)
    assert stream.result().tokens == plain.tokens == read(tmp_path / "run").tokens
    told = [record.message for record in caplog.records if record.message.startswith("trace: ")]
    assert told == ["trace: No space left on device: it ends here, the text goes on"]
