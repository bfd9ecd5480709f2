"""How sure a drafter is of its guesses: calibrated from the first ones on, and by the views beside it before any."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tokenswift_py.core import Acceptance
from tokenswift_py.decoding.history import History
from tokenswift_py.drafters.base import Candidates, Draft
from tokenswift_py.drafters.chain import FARTHEST, MIDDLES, TRAINED, USUAL, Confidence, Experience, wrong
from tokenswift_py.drafters.ngram import NGram
from tokenswift_py.drafters.partial import OwnChain, Partial
from tokenswift_py.drafters.views import View
from tokenswift_py.planning.odds import Odds
from tokenswift_py.planning.planner import Plan, Planner


class Scores:
    """A sampler whose ranking is what the test put there."""

    params = SimpleNamespace(temperature=1.0)

    def __init__(self) -> None:
        self.lead: float | None = 0.0

    def ranked(self, count: int) -> list[tuple[int, float]]:
        return [(1, 10.0)] if self.lead is None else [(1, 10.0), (2, 10.0 - self.lead), (3, 9.5 - self.lead)][:count]


def guess(confidence: Confidence, lead: float | None, right: bool) -> float:
    """One guess with this lead, put to the test. Returns the chance it was given."""
    sampler = Scores()
    sampler.lead = lead
    context: Any = SimpleNamespace(history=History([0]), sampler=sampler)
    draft = Draft(0, 4)
    node = confidence.guess(context, Candidates(draft), 0, lambda: sampler.ranked(confidence.ranks))
    assert node == 1
    chance = draft.chances[node]
    taken = Acceptance((0, 1), (1, 5)) if right else Acceptance((0,), (2,))
    draft.learn(taken)
    assert confidence.learn(draft, [0, 1], taken) == right
    return chance


def experience(confidence: Confidence, spread: float, guesses: int, seed: int = 0) -> tuple[float, float]:
    """Guesses with the usual leads whose errors have this spread: mean chance given, and share that was right."""
    rng = np.random.default_rng(seed)
    leads = rng.choice(MIDDLES, guesses, p=np.array(USUAL) / sum(USUAL))
    rights = [bool(rng.random() > wrong(lead, spread)) for lead in leads]
    chances = [guess(confidence, lead, right) for lead, right in zip(leads, rights, strict=True)]
    return float(np.mean(chances)), float(np.mean(rights))


@pytest.mark.parametrize("spread", [0.15, 0.6, 2.5])
def test_chances_fit_what_happens_though_other_errors_were_expected(spread: float) -> None:
    confidence = Confidence(2)
    confidence.expect(0.6, 1.0)
    experience(confidence, spread, 40)
    chance, right = experience(confidence, spread, 600, seed=1)
    assert chance == pytest.approx(right, abs=0.04)
    assert confidence.next == pytest.approx(right, abs=0.05)


def test_a_blind_draft_is_known_after_a_few_guesses() -> None:
    """Layers that were trained on other texts are hardly ever right, however large their lead. A draft that computes
    what the target does would be expected to be right four times in ten, until hundreds of guesses have failed."""
    confidence, rng = Confidence(3, kind=TRAINED), np.random.default_rng(3)

    def tried(count: int) -> None:
        for lead in rng.choice(MIDDLES, count, p=np.array(USUAL) / sum(USUAL)):
            guess(confidence, float(lead), bool(rng.random() < 0.08))

    tried(20)
    assert confidence.next < 0.3
    tried(40)
    assert confidence.next < 0.15
    sampler, draft = Scores(), Draft(0, 4)
    sampler.lead = 0.3
    candidates = Candidates(draft)
    context: Any = SimpleNamespace(history=History([0]), sampler=sampler)
    confidence.guess(context, candidates, 0, lambda: sampler.ranked(3))
    assert 0 < confidence._others[0][3].chance < 0.05


def test_the_farther_ahead_the_surer_and_a_single_candidate_is_not_certain() -> None:
    confidence = Confidence(2)
    chances = [guess(confidence, lead, True) for lead in (0.01, 0.2, 1.0, 3.0)]
    assert chances == sorted(chances) and chances[0] < 0.5
    alone = Confidence(2)
    assert guess(alone, None, False) == pytest.approx(guess(Confidence(2), FARTHEST, True))
    assert 0.9 < guess(Confidence(2), None, True) < 1


def test_what_one_view_learns_is_expected_of_the_others() -> None:
    family = Experience()
    small, large = View(1024, 2, family), View(4096, 2, family)
    for view in (small, large):
        view.set_text(65536, 1.0)
    assert small.spread == pytest.approx(2 * large.spread)
    before = large.next
    assert before > small.next, "the more is in view the fewer errors"
    experience(small, 4 * small.spread, 100)
    assert large.next < before - 0.03 and large.next > small.next
    fresh = View(4096, 2, Experience())
    fresh.set_text(65536, 1.0)
    assert fresh.next == pytest.approx(before)
    fresh.set_text(4000, 1.0)
    whole = fresh.next
    fresh.set_text(65536, 0.5)
    assert whole > before > fresh.next, "errors weigh more at a low temperature"


def behind(pages: int, plan: Plan) -> Any:
    """The context of a drafter after a text of so many pages."""
    cache = SimpleNamespace(full_pages=pages, evicted=0, length=64 * pages)
    return SimpleNamespace(plan=plan, cache=cache, sampler=Scores(), self_draft=SimpleNamespace(row_shapes=()))


def test_a_long_text_begins_with_a_larger_view() -> None:
    for pages, tokens in ((90, 1024), (256, 2048), (1024, 4096), (5000, 8192)):
        drafter = Partial()
        drafter.views.begin_round(behind(pages, Planner().at(64 * pages)))
        assert drafter.views.now.tokens == tokens


def test_a_draft_pass_is_weighed_against_repeats_and_the_rows_that_they_cost() -> None:
    """Guesses three in four of which are right for 25 ms each, or repeats half of which are for rows of the target:
    where these cost nothing they win; at 25 ms a row they do not, since a draft pass tells which are right; at 100 ms a
    row neither pays."""
    text = [*range(20, 32), 7, *range(20, 32)]
    chosen = []
    for row_ms in (0.01, 25.0, 100.0):
        planner, drafter = Planner(), Partial(view_tokens=1024, reuse=NGram())
        drafter.views.begin_round(behind(1000, planner.at(64000)))
        drafter.views.now.expect(2.0, 1.0)  # three in four
        for rows in (1, 2, 4, 8, 16):
            planner.target.observe(rows, 64000, 60.0 + row_ms * rows)
            drafter.views.cost.observe(rows, 1056, 25.0 + 0.1 * rows)
        assert drafter.reuse is not None
        drafter.reuse._odds = [[Odds(0.5) for _ in odds] for odds in drafter.reuse._odds]
        chain = OwnChain(text[-1], 17, drafter.reuse.read(History(text)))
        context: Any = SimpleNamespace(plan=planner.at(64000), history=History(text))
        ahead = drafter._look_ahead(context, chain, 64)
        chosen.append(drafter._pays(context, chain, ahead, 25.0))
    assert chosen == [False, True, False]


def test_the_view_goes_up_and_down_by_a_size_to_what_pays_most() -> None:
    views, planner = Partial().views, Planner()
    for rows in (1, 2, 4, 8):
        planner.target.observe(rows, 64000, 30.0 + rows)
    plan = planner.at(64000)
    context = behind(1000, plan)
    views.begin_round(context)
    for keys in (1056, 4128, 8224):  # a pass costs the same however large the view is
        views.cost.observe(1, keys, 4.0)
    sizes = []
    for _ in range(40):
        views.begin_round(context)
        sizes.append(views.now.tokens)
    assert list(dict.fromkeys(sizes)) == [4096, 8192], "the largest is right most often"
    for _ in range(12):
        for keys in (1056, 2080, 4128, 8224):  # now it costs what it reads
            views.cost.observe(1, keys, keys / 250)
    for _ in range(40):
        views.begin_round(context)
        sizes.append(views.now.tokens)
    assert sizes[-1] < 4096, "small ones are cheap enough to be wrong more often"
    steps = {(a, b) for a, b in pairwise(sizes) if a != b}
    assert all(max(step) == 2 * min(step) for step in steps)
    assert views.keys == views.now.tokens + 32
    promised = plan.best_rate(views.now.next, views.pass_ms(plan, 1))
    assert planner.rounds.expected_rate == pytest.approx(promised * plan.load.factor)


def test_candidates_keep_the_chance_they_were_found_with() -> None:
    """Guesses of one range of leads share their odds, whose prior each guess sets anew."""
    draft, odds = Draft(0, 8), Odds(0.6)
    candidates = Candidates(draft)
    candidates.push(0, 5, odds)
    odds.prior = 0.1
    candidates.push(0, 6, odds)
    candidates.take(lambda chance, rows: 1.0)
    assert draft.tokens[1:] == [5, 6]
    assert draft.chances[1:] == pytest.approx([0.6, 0.1])
