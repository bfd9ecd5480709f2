"""The time of a pass is that of its executor's clock, and never that of the host's while it only waits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from conftest import decoder_of, tiny_config, tiny_model
from tokenswift_py.core import Output, SamplingParams, Segment
from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.statistics import GenerationStats
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.drafters.base import create
from tokenswift_py.drafters.none import NoDraft
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.models.clock import Clock, CudaClock, HostClock, clock_of
from tokenswift_py.planning.costs import PassCost
from tokenswift_py.planning.planner import Planner
from tokenswift_py.sampling.reference import Sampler
from tokenswift_py.serving.scheduler import Scheduler
from tokenswift_py.serving.sharing import OwnTime
from tokenswift_py.serving.work import LoopWork
from toys import MarkovModel, write


class Device(Clock):
    """A device whose time goes by without the host's: a lap is what passes were scripted to take."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def start(self) -> Any:
        return ScriptedLap(self)


class ScriptedLap:
    def __init__(self, device: Device):
        self.device, self.began, self.spoiled = device, device.now, device.spoiled
        self.ms = math.nan

    def stop(self) -> None:
        if self.spoiled == self.device.spoiled:
            self.ms = self.device.now - self.began


class Scripted(MarkovModel):
    """Its passes take milliseconds of a device by their number of rows; the host only launches them."""

    def __init__(self, ms: float = 20.0, row_ms: float = 1.0, cold: int = 0):
        super().__init__()
        self.clock = Device()
        self.ms, self.row_ms, self.cold = ms, row_ms, cold

    def forward(self, segments: Sequence[Segment], *rest: Any, **wants: bool) -> Output:
        if self.cold and not segments[0].causal:
            self.cold -= 1
            self.clock.spoil()
            self.clock.now += 5000.0
        self.clock.now += self.ms + self.row_ms * sum(len(segment.tree) for segment in segments)
        return super().forward(segments, *rest, **wants)


def test_the_planner_learns_what_the_device_took() -> None:
    model = Scripted()
    _, engine, _ = write(model, [1, 2], 60, drafter=create("ngram", shortest=1), vocab=7)
    for rows in range(1, engine.planner.target.largest + 1):
        assert engine.planner.target(rows, 50) == pytest.approx(20.0 + rows, rel=0.05)
    assert engine.planner.target.largest > 2
    assert engine.planner.at(50).explain(1)["plain_ms"] == pytest.approx(21.0, rel=0.05)


def test_draft_passes_are_told_by_the_clock_of_the_model_that_drafts() -> None:
    target, draft = Scripted(ms=20.0), Scripted(ms=3.0)
    drafter = create("draft_model", model=draft)
    write(target, [1, 2], 30, drafter=drafter, vocab=7)
    assert drafter._cost(1, 20) == pytest.approx(4.0, rel=0.05)
    partial = create("partial", policy="recent", view_tokens=64)
    write(target, [1, 2], 30, drafter=partial, vocab=7, self_draft=draft, draft_tokens=3)
    assert partial.views.cost(1, 20) == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("cold", [1, 2, 5])
def test_passes_that_compile_or_capture_never_reach_the_costs(cold: int) -> None:
    _, engine, _ = write(Scripted(cold=cold), [1, 2], 40, drafter=NoDraft(), vocab=7)
    samples = [sample for group in engine.planner.target._samples.values() for sample in group]
    assert samples and all(ms == pytest.approx(21.0) for _, _, ms in samples)
    assert engine.stats.num_spec_steps == 39 and len(engine.stats.latest_ms) == 6


def test_not_a_number_is_no_measurement_and_a_cold_round_counts_as_a_warm_one() -> None:
    cost = PassCost()
    cost.observe(3, 10, math.nan)
    assert not cost.measured and cost.largest == 0
    planner, warm = Planner(), Planner()
    for chosen, times in ((planner, (10.0, math.nan, 10.0)), (warm, (10.0, 10.0, 10.0))):
        for ms in times:
            chosen.observe(0, 1, 1, {"draft": 0.0, "verify": ms, "accept": 0.1, "commit": 0.1, "learn": 0.1})
    assert planner.at(0).rate == pytest.approx(warm.at(0).rate)
    assert planner.probes.total_ms == pytest.approx(warm.probes.total_ms)


def test_a_wait_belongs_to_the_phase_that_asked_for_the_work() -> None:
    """The sum stays what the host's clock says, whatever the device tells."""
    for ms, verify, accept in ((9.0, 9.0, 1.5), (0.25, 0.25, 10.25), (99.0, 10.5, 0.0), (math.nan, 0.5, 10.0)):
        stats = GenerationStats(phase_ms={"verify": 0.5, "accept": 10.0}, latest_ms={"verify": 0.5, "accept": 10.0})
        stats.settle("verify", "accept", ms)
        assert stats.latest_ms == {"verify": verify, "accept": accept} == stats.phase_ms


def test_a_lap_on_the_host_is_a_time_until_its_clock_is_spoiled() -> None:
    ticking = HostClock()
    lap, other = ticking.start(), ticking.start()
    assert math.isnan(lap.ms)
    lap.stop()
    ticking.spoil()
    other.stop()
    assert 0 <= lap.ms < 1000 and math.isnan(other.ms)


def test_events_are_recorded_where_the_model_runs_and_waited_for_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """In CUDA's own terms: an event in the current stream of the model's device at either end."""
    told: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: Any) -> None:
            told.append(("record", stream))

        def synchronize(self) -> None:
            told.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 7.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    ticking = clock_of(torch.device("cuda:1"))
    assert isinstance(ticking, CudaClock) and type(clock_of(torch.device("cpu"))) is HostClock
    lap = ticking.start()
    lap.stop()
    assert told == [("record", "stream of cuda:1")] * 2, "stopping does not wait"
    assert lap.ms == 7.5 and told[2:] == ["wait"]
    cold = ticking.start()
    ticking.spoil()
    cold.stop()
    assert math.isnan(cold.ms) and told[3:] == [("record", "stream of cuda:1")]


def test_every_executor_has_a_clock() -> None:
    decoder = decoder_of(tiny_model(tiny_config()))
    lap = decoder.clock.start()
    lap.stop()
    assert np.isfinite(lap.ms)


def test_texts_in_company_pay_for_what_the_device_took() -> None:
    """Its time passes while the host waits for it: all share that, however soon a launch returns."""

    class Waits:
        def __init__(self) -> None:
            self.began = model.clock.now

        def stop(self) -> None: ...

        @property
        def ms(self) -> float:
            host[0] = max(host[0], model.clock.now)
            return model.clock.now - self.began

    class Work(LoopWork):
        def tell(self, step: Any) -> None: ...

        def end(self, error: BaseException | None) -> None:
            assert error is None

    host, model = [0.0], Scripted()
    model.clock.start = Waits  # type: ignore[method-assign]
    clock = lambda: host[0] / 1e3  # noqa: E731
    scheduler = Scheduler(model, model.new_cache().pool, clock)  # type: ignore[arg-type]
    loops = []
    for seed in range(3):
        time, sampler = OwnTime(clock), Sampler(SamplingParams(temperature=1.0, seed=seed), 7)
        cache = KVCache(scheduler.pool, model.context)
        loops.append(DecodeLoop(model, create("none"), sampler, Stops(40), cache=cache, timer=time))
        scheduler.add(Work(loops[-1], [1, 2], time))
    while scheduler.step():
        pass
    assert scheduler._costs[id(model)](3, 90) == pytest.approx(23.0, rel=0.02)
    for loop in loops:
        assert loop.planner.target(1, 30) == pytest.approx(23.0 / 3, rel=0.02)
