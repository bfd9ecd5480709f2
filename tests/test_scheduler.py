"""Many texts at once: each is what it is alone (law 9), whatever company, order, preemption or cancellation it met."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scripted import write
from tokenswift_py.core import DraftTree, SamplingParams, Segment
from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.passes import Pass
from tokenswift_py.decoding.step import Step
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.drafters.base import create
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import Holders
from tokenswift_py.sampling.reference import Sampler
from tokenswift_py.serving import prefixes
from tokenswift_py.serving.prefixes import Prefixes
from tokenswift_py.serving.scheduler import ROUND_PAGES, Scheduler, Seat
from tokenswift_py.serving.sharing import GroupCost, OwnTime, Width
from tokenswift_py.serving.work import LoopWork

LENGTHS = (10, 25, 60, 80)
PROMPTS = [np.random.default_rng(i).integers(0, 61, size).tolist() for i, size in enumerate((5, 70, 140, 9))]
PROMPTS.append([*PROMPTS[2][:128], 1, 2, 3])  # which shares two pages with another
DRAFTERS = ("none", "ngram", "partial", "cascade")


class Ticks:
    """A clock that moves by a millisecond at each look."""

    def __init__(self) -> None:
        self.looks = itertools.count()

    def __call__(self) -> float:
        return next(self.looks) / 1e3


class Work(LoopWork):
    """A loop as the scheduler sees it. tokens written, and how it ended, are kept."""

    def __init__(self, model: Any, pool: Any, number: int, length: int, priority: float, clock: Ticks, seed: int):
        time, params = OwnTime(clock), SamplingParams(temperature=1.0, seed=seed)
        loop = DecodeLoop(
            model, create(DRAFTERS[seed % len(DRAFTERS)]), Sampler(params, 61), Stops(length),
            draft_tokens=3, prefill_chunk=24, cache=KVCache(pool, model.context), timer=time,
        )  # fmt: skip
        super().__init__(loop, PROMPTS[number % len(PROMPTS)], time, priority)
        self.written: list[int] = []
        self.ended: list[BaseException | None] = []

    def tell(self, step: Step) -> None:
        self.written.extend(step.tokens)

    def end(self, error: BaseException | None) -> None:
        self.ended.append(error)


def alone(model: Any, work: Work, cache: dict[Any, list[int]] = {}) -> list[int]:  # noqa: B006
    params = work.loop.sampler.params
    key = id(model), tuple(work.prompt), params.seed
    if key not in cache:
        cache[key] = write(model, work.prompt, max(LENGTHS), params)[0]
    return cache[key]


def run(model: Any, seed: int, pages: int, count: int = 6, most_running: int = 4) -> tuple[Scheduler, list[Work]]:
    """A random schedule: texts come at random moments with random priorities, and some are cancelled."""
    rng, clock = random.Random(seed), Ticks()
    scheduler = Scheduler(model, model.new_pool(pages), clock, most_running, most_rows=40)
    works: list[Work] = []
    seats: list[Seat] = []
    cancelled: set[int] = set()
    while len(works) < count or scheduler.seats:
        if len(works) < count and (rng.random() < 0.2 or not scheduler.seats):
            number = len(works)
            length, priority = rng.choice(LENGTHS), rng.choice((0.0, 0.0, 1.0, 5.0))
            works.append(Work(model, scheduler.pool, number, length, priority, clock, seed=rng.randrange(8)))
            seats.append(scheduler.add(works[-1]))
        if seats and rng.random() < 0.01:
            cancelled.add(victim := rng.randrange(len(seats)))
            scheduler.cancel(seats[victim])
        scheduler.step()
        assert scheduler.running <= most_running
    for number, work in enumerate(works):
        assert work.ended == [None], work.ended
        truth = alone(model, work)
        assert work.written == truth[: len(work.written)]
        assert number in cancelled or len(work.written) in LENGTHS
        assert work.cache.nbytes == 0
    assert scheduler.pool.free + scheduler.idle_pages == scheduler.pool.pages, "every page is free, or known"
    scheduler.close()
    assert scheduler.pool.free == scheduler.pool.pages
    return scheduler, works


def test_each_text_is_what_it_is_alone_in_roomy_company(tiny_decoder: Any) -> None:
    scheduler, works = run(tiny_decoder, 3, pages=400)
    assert scheduler.prefixes.hits > 0
    rounds = sum(work.loop.stats.num_spec_steps for work in works)
    assert scheduler.passes < rounds, "verifications travel together"


@pytest.mark.parametrize("seed", range(4))
def test_each_text_is_what_it_is_alone_where_there_is_no_room(tiny_decoder: Any, seed: int) -> None:
    run(tiny_decoder, seed, pages=ROUND_PAGES + 8 + 2 * seed)


def test_preemption_happens_in_these_schedules(tiny_decoder: Any) -> None:
    assert sum(run(tiny_decoder, seed, pages=ROUND_PAGES + 6)[0].preemptions for seed in (1, 2)) > 1


def test_each_text_is_what_it_is_alone_on_the_native_engine(native_decoder: Any) -> None:
    preempted = 0
    for seed, pages in ((11, 300), (12, ROUND_PAGES + 6), (13, 2 * ROUND_PAGES + 6)):
        preempted += run(native_decoder, seed, pages)[0].preemptions
    assert preempted


def test_a_text_that_waits_is_hashed_once_and_its_pages_count_when_it_has_them(
    tiny_decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[bytes] = []

    def sha256(data: bytes) -> Any:
        hashed.append(data)
        return hashlib.sha256(data)

    monkeypatch.setattr(prefixes, "hashlib", SimpleNamespace(sha256=sha256))
    clock = Ticks()
    scheduler = Scheduler(tiny_decoder, tiny_decoder.new_pool(ROUND_PAGES + 8), clock)
    first = Work(tiny_decoder, scheduler.pool, 2, 60, 0.0, clock, seed=0)  # 140 tokens and 60
    second = Work(tiny_decoder, scheduler.pool, 4, 10, 0.0, clock, seed=0)  # begins with the same two pages
    for work in (first, second):
        scheduler.add(work)
    steps = 0
    while not first.ended:
        scheduler.step()
        steps += 1
        assert scheduler.prefixes.hits == 0, "nothing was taken"
    while scheduler.step():
        pass
    assert scheduler.prefixes.hits == 128 and steps > 30
    assert len(hashed) == (140 + 60 - 1) // 64 + (131 + 10 - 1) // 64
    assert second.written == alone(tiny_decoder, second)[:10]


def test_the_pages_of_a_text_that_waits_are_given_back_last() -> None:
    """Three texts of two pages are known; the oldest is the one that waits."""
    pool = Holders(20)
    known = Prefixes(pool)  # type: ignore[arg-type]
    texts = [np.full(130, number, np.int32) for number in range(3)]
    marks = [prefixes.Prefix() for _ in texts]
    for tokens, mark in zip(texts, marks, strict=True):
        cache = KVCache(pool, 256)  # type: ignore[arg-type]
        cache.append(np.arange(128, dtype=np.int32), True)
        cache.commit(range(128))
        known.keep(cache, tokens, mark)
        cache.release()
    known.wanted = marks[0]
    assert [len(known.find(mark)) for mark in marks] == [2, 2, 2]
    for count, left in ((1, [2, 1, 2]), (2, [2, 0, 1]), (2, [1, 0, 0]), (9, [0, 0, 0])):
        known.make_room(count)
        assert [len(known.find(mark)) for mark in marks] == left


@pytest.mark.parametrize("texts", [4, 24])
def test_a_step_looks_at_each_text_a_few_times_however_many_there_are(
    tiny_decoder: Any, monkeypatch: pytest.MonkeyPatch, texts: int
) -> None:
    clock, looks = Ticks(), [0]
    scheduler = Scheduler(tiny_decoder, tiny_decoder.new_pool(texts * (ROUND_PAGES + 4)), clock, most_running=texts)
    for number in range(texts):
        scheduler.add(Work(tiny_decoder, scheduler.pool, 0, 60, number % 3, clock, seed=number))
    for _ in range(10):
        scheduler.step()

    def counting(look: Any) -> Any:
        def counted(self: Scheduler, seat: Seat) -> Any:
            looks[0] += 1
            return look(self, seat)

        return counted

    for name in ("_urgency", "_needs"):
        monkeypatch.setattr(Scheduler, name, counting(getattr(Scheduler, name)))
    for _ in range(10):
        scheduler.step()
    assert scheduler.running == texts and looks[0] <= 10 * 6 * texts
    scheduler.close()


def test_an_urgent_text_takes_the_place_of_the_least_urgent(tiny_decoder: Any) -> None:
    clock = Ticks()
    scheduler = Scheduler(tiny_decoder, tiny_decoder.new_pool(200), clock, most_running=2)
    works = [Work(tiny_decoder, scheduler.pool, n, 60, p, clock, seed=n) for n, p in enumerate((1.0, 0.0, 2.0))]
    for work in works[:2]:
        scheduler.add(work)
    for _ in range(12):
        scheduler.step()
    scheduler.add(works[2])
    while not works[2].ended:
        scheduler.step()
    assert scheduler.preemptions == 1 and not works[1].ended, "the less urgent waits"
    while scheduler.step():
        pass
    assert [work.written for work in works] == [alone(tiny_decoder, work)[:60] for work in works]


@pytest.mark.parametrize("most_running", [1, 2])
def test_texts_that_end_without_another_pass_do_end(tiny_decoder: Any, most_running: int) -> None:
    """The last characters of such texts become certain with their end. Texts that wait for them begin."""
    clock = Ticks()
    scheduler = Scheduler(tiny_decoder, tiny_decoder.new_pool(200), clock, most_running)
    works = [Work(tiny_decoder, scheduler.pool, n, 10, 0.0, clock, seed=n) for n in range(2)]

    def passes(work: Work) -> Any:
        yield from work.loop.text(work.prompt)
        yield Step(tokens=())

    for work in works:
        work.passes = lambda work=work: passes(work)
        scheduler.add(work)
    while scheduler.step():
        pass
    assert [work.ended for work in works] == [[None], [None]]


def test_a_text_whose_last_token_is_written_ends_whoever_waits(tiny_decoder: Any) -> None:
    """One more urgent takes the place of a text, but not that of one that needs none any more."""
    clock = Ticks()
    scheduler = Scheduler(tiny_decoder, tiny_decoder.new_pool(200), clock, most_running=1)
    first, urgent = (Work(tiny_decoder, scheduler.pool, n, 25, 5.0 * n, clock, seed=n) for n in range(2))
    scheduler.add(first)
    while len(first.written) < 25:
        scheduler.step()
    scheduler.add(urgent)
    scheduler.step()
    assert first.ended == [None] and scheduler.preemptions == 0
    while scheduler.step():
        pass
    assert urgent.ended == [None] and urgent.written == alone(tiny_decoder, urgent)[:25]


def test_a_text_that_fails_leaves_the_others_alone(tiny_decoder: Any) -> None:
    clock = Ticks()
    scheduler = Scheduler(tiny_decoder, tiny_decoder.new_pool(200), clock)
    works = [Work(tiny_decoder, scheduler.pool, n, 40, 0.0, clock, seed=n) for n in range(3)]
    for work in works:
        scheduler.add(work)
    told = works[1].tell

    def breaks(step: Step) -> None:
        told(step)
        if len(works[1].written) > 10:
            works[1].loop.sampler = None  # type: ignore[assignment]

    works[1].tell = breaks  # type: ignore[method-assign]
    while scheduler.step():
        pass
    assert [type(work.ended[0]) for work in works] == [type(None), AttributeError, type(None)]
    assert works[0].written == alone(tiny_decoder, works[0])[:40] and works[1].cache.nbytes == 0
    assert works[2].written == alone(tiny_decoder, works[2])[:40]


def test_a_text_that_no_pool_holds_is_told_so(tiny_decoder: Any) -> None:
    clock = Ticks()
    scheduler = Scheduler(tiny_decoder, tiny_decoder.new_pool(ROUND_PAGES + 1), clock)
    assert scheduler.fits(64) and not scheduler.fits(65)
    work = Work(tiny_decoder, scheduler.pool, 3, 80, 0.0, clock, seed=0)  # 9 tokens and 80
    scheduler.add(work)
    while scheduler.step():
        pass
    assert [type(error) for error in work.ended] == [MemoryError] and 50 < len(work.written) < 60
    assert work.written == alone(tiny_decoder, work)[: len(work.written)] and work.cache.nbytes == 0


@pytest.mark.parametrize("full_at", [0, 1, 2])
def test_a_pass_without_room_leaves_every_tail_as_it_was(tiny_decoder: Any, full_at: int) -> None:
    """The pool is full at the first, second or third of three segments, each of which needs a page."""
    pool = tiny_decoder.new_pool(full_at + 3)
    caches = [KVCache(pool, tiny_decoder.context) for _ in range(3)]
    chain = DraftTree.chain(list(range(10)))
    caches[0].append(np.arange(3, dtype=np.int32), True)
    held = [cache.nbytes for cache in caches]
    for _ in range(pool.free - full_at - (full_at > 0)):
        pool.allocate()
    free = pool.free
    long = DraftTree.chain(list(range(60)) + [1] * 10)
    segments = [Segment(tree, cache, causal=True) for tree, cache in zip((chain, long, long), caches, strict=True)]
    with pytest.raises(MemoryError):
        tiny_decoder.forward(segments)
    assert [cache.tail_length for cache in caches] == [3, 0, 0]
    assert [cache.nbytes for cache in caches] == held and pool.free == free


def test_shares_add_up_and_charge_each_text_for_its_rows() -> None:
    """Passes cost 10 ms and 1 ms a row: a text of one row beside three rows pays for less."""
    from types import SimpleNamespace

    def asked(rows: int) -> Any:
        cache = SimpleNamespace(length=100)
        return SimpleNamespace(segment=SimpleNamespace(tree=range(rows), cache=cache))

    shares = GroupCost()
    for rows in (2, 3, 4, 5, 6, 8) * 4:
        shares.split([asked(1), asked(rows - 1)], 10.0 + rows)
    one, three = shares.split([asked(1), asked(3)], 14.0)
    assert one + three == pytest.approx(14.0)
    assert three - one == pytest.approx(2.0, abs=0.3)
    assert shares.split([asked(4)], 14.0) == [14.0]
    known = shares(4, 400)
    for _ in range(50):
        assert sum(shares.split([asked(1), asked(3)], 9000.0, spoiled=True)) == pytest.approx(9000.0)
    assert shares(4, 400) == known, "a pass that was compiled first tells nothing of those to come"


def test_a_company_verifies_the_rows_that_fill_its_tiles() -> None:
    """Four rows cost as much as one, and the next four less than these."""
    from types import SimpleNamespace

    from tokenswift_py.core import DraftTree

    def asked(*chances: float) -> Any:
        segment = Segment(DraftTree.chain(range(1 + len(chances))), SimpleNamespace(length=100))  # type: ignore[arg-type]
        return Pass(None, segment, chances=(1.0, *chances))  # type: ignore[arg-type]

    cost = GroupCost()
    for rows in list(range(1, 30)) * 20:
        cost.observe(rows, 100 * rows, 4.0 + 6.0 * math.ceil(rows / 4))
    width = Width(cost)

    def sizes(*passes: Any) -> list[int]:
        return [len(cut.segment.tree) for cut in width.cut(passes)]

    assert sizes(asked(0.5), asked(0.3), asked(0.2)) == [2, 1, 1]
    assert sizes(asked(0.5, 0.4), asked(0.45)) == [2, 2]
    assert sizes(asked(0.3, 0.5, 0.5), asked(0.4), asked(0.2)) == [1, 2, 1], "no row without those before it"
    assert sizes(asked(0.9, 0.3, 0.2), asked(0.8), asked(), asked(0.1)) == [1, 1, 1, 1], "four fill a tile"
    assert sizes(asked(*[0.97] * 16), asked()) == [15, 1]
    assert sizes(asked(*[1.0] * 3), asked(*[1.0] * 20)) == [4, 20], "certain ones are worth tiles of their own"
    prompt = Pass(None, Segment(DraftTree.chain(range(64)), SimpleNamespace(length=0), causal=True))  # type: ignore[arg-type]
    assert sizes(asked(0.5), prompt)[1] == 64


def test_rows_that_seem_to_cost_nothing_stop_no_company() -> None:
    """Passes of prompts alone were measured, whose cost is in rows beyond the fourth."""
    from types import SimpleNamespace

    cost = GroupCost()
    for rows in (124, 64, 32) * 4:
        cost.observe(rows, 0, float(rows - 4))
    assert cost(2, 0) == 0.0 < cost(34, 0)
    cache: Any = SimpleNamespace(length=0)
    text = Pass(None, Segment(DraftTree.chain([1, 2]), cache), chances=(1.0, 0.5))  # type: ignore[arg-type]
    prompt = Pass(None, Segment(DraftTree.chain(range(32)), cache, causal=True))  # type: ignore[arg-type]
    assert [len(cut.segment.tree) for cut in Width(cost).cut([text, prompt])][1] == 32


def test_hours_of_waiting_do_not_make_a_text_one_that_never_gives_way(tiny_decoder: Any) -> None:
    """A job that waited for a place for hours makes room for an answer that somebody has waited for a minute."""
    now = 0.0
    scheduler = Scheduler(tiny_decoder, tiny_decoder.new_pool(100), lambda: now, most_running=1)
    works = [Work(tiny_decoder, scheduler.pool, number, 200, -1.0, Ticks(), seed=number) for number in range(2)]
    first = scheduler.add(works[0])
    scheduler.step()
    scheduler.add(works[1])
    now += 7200.0
    scheduler.cancel(first)
    while not any(seat.work is works[1] and seat.running for seat in scheduler.seats):
        scheduler.step()
    answer = Work(tiny_decoder, scheduler.pool, 3, 5, 0.0, Ticks(), seed=4)
    scheduler.add(answer)
    for _ in range(100):
        scheduler.step()
        now += 1.0
        if answer.ended:
            break
    assert answer.ended == [None] and not works[1].ended


def test_who_waits_long_is_served_beside_a_steady_stream_of_the_more_urgent(tiny_decoder: Any) -> None:
    now = 0.0
    scheduler = Scheduler(tiny_decoder, tiny_decoder.new_pool(100), lambda: now, most_running=1)
    patient = Work(tiny_decoder, scheduler.pool, 0, 10, 0.0, Ticks(), seed=0)
    scheduler.add(patient)
    for _ in range(200):
        if sum(seat.work is not patient for seat in scheduler.seats) < 2:
            scheduler.add(Work(tiny_decoder, scheduler.pool, 3, 10, 1.0, Ticks(), seed=4))
        scheduler.step()
        now += 1.0
        if patient.ended:
            break
    assert patient.ended == [None]


def test_an_error_of_one_pass_fails_its_text_alone(tiny_decoder: Any) -> None:
    clock = Ticks()
    scheduler = Scheduler(tiny_decoder, tiny_decoder.new_pool(200), clock)
    works = [Work(tiny_decoder, scheduler.pool, n, 25, 0.0, clock, seed=n) for n in range(3)]
    works[1].prompt = [5, 7, 10**6]  # no such token
    for work in works:
        scheduler.add(work)
    while scheduler.step():
        pass
    assert [type(work.ended[0]) for work in works] == [type(None), IndexError, type(None)]
    for work in (works[0], works[2]):
        assert work.written == alone(tiny_decoder, work)[:25]
    assert scheduler.pool.free + scheduler.idle_pages == scheduler.pool.pages
