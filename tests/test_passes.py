"""A loop is a coroutine: whoever drives it computes its passes, and an end or an error reaches it wherever it waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from scripted import write
from tokenswift_py.core import Output, SamplingParams
from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.passes import Pass, Timer, compute, steps, without_passes
from tokenswift_py.decoding.step import Step
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.drafters.base import create
from tokenswift_py.sampling.reference import Sampler

PROMPT = [3, 14, 15, 9, 26]
SAMPLED = SamplingParams(temperature=1.0, seed=5)


def looped(model: Any, drafter: str = "cascade", **settings: Any) -> DecodeLoop:
    return DecodeLoop(model, create(drafter), Sampler(SAMPLED, 61), Stops(60), prefill_chunk=3, **settings)


def driven(loops: list[DecodeLoop]) -> list[list[int]]:
    """The texts of several loops, of which each in turn goes on by one pass."""
    texts: list[list[int]] = [[] for _ in loops]
    waiting: list[tuple[int, Any, Output | None]] = [(i, loop.text(PROMPT), None) for i, loop in enumerate(loops)]
    while waiting:
        i, text, output = waiting.pop(0)
        try:
            asked = text.send(output)
        except StopIteration:
            continue
        if isinstance(asked, Step):
            texts[i].extend(asked.tokens)
        waiting.append((i, text, asked.compute() if isinstance(asked, Pass) else None))
    return texts


def test_loops_that_take_turns_pass_by_pass_write_what_each_writes_alone(tiny_decoder: Any) -> None:
    plain, _, _ = write(tiny_decoder, PROMPT, 60, SAMPLED)
    loops = [looped(tiny_decoder, drafter, draft_tokens=4) for drafter in ("none", "ngram", "partial", "cascade")]
    assert driven(loops) == [plain] * 4
    assert all(loop.cache.pool.in_use == 0 and loop.cache.tail_length == 0 for loop in loops)
    assert any(loop.stats.num_accepted_draft_tokens for loop in loops)


@pytest.mark.parametrize("failing", [0, 1, 2, 5, 9])
def test_an_error_of_a_pass_reaches_the_loop_which_gives_its_pages_back(tiny_decoder: Any, failing: int) -> None:
    loop, count = looped(tiny_decoder, "partial", draft_tokens=3), 0
    forward = loop.model.forward

    def fails(*given: Any, **wants: Any) -> Output:
        nonlocal count
        count += 1
        if count > failing:
            raise MemoryError("no page is left")
        return forward(*given, **wants)

    kept = []
    loop.keep = lambda: kept.append(loop.cache.length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_decoder, "forward", fails)
        with pytest.raises(MemoryError, match="no page is left"):
            list(loop.run(PROMPT))
    assert loop.cache.pool.in_use == 0 and len(kept) == 1 and len(loop.history) - kept[0] <= len(PROMPT)


@pytest.mark.parametrize("passes", [1, 2, 3, 4, 6])
def test_a_loop_that_is_closed_while_it_waits_for_a_pass_gives_its_pages_back(tiny_decoder: Any, passes: int) -> None:
    loop = looped(tiny_decoder, "partial", draft_tokens=3)
    text, output = loop.text(PROMPT), None
    while passes:
        asked = text.send(output)
        passes -= isinstance(asked, Pass)
        output = asked.compute() if isinstance(asked, Pass) and passes else None
    before = len(loop.history)
    text.close()
    assert loop.cache.pool.in_use == 0 and len(loop.history) <= before


class Counted(Timer):
    """Counts the seconds between two looks at it as one."""

    def __init__(self) -> None:
        self.looks = 0

    def now(self) -> float:
        self.looks += 1
        return float(self.looks)


def test_the_time_of_phases_is_the_drivers(tiny_decoder: Any) -> None:
    loop = looped(tiny_decoder, "ngram", timer=Counted())
    list(loop.run(PROMPT))
    rounds = loop.stats.num_spec_steps
    looks = {"draft": 1, "commit": 1, "learn": 3}  # the planner learns from the time until then, too
    milliseconds = {phase: 1000.0 * count * rounds for phase, count in looks.items()}
    assert {phase: loop.stats.phase_ms[phase] for phase in milliseconds} == milliseconds
    assert loop.stats.phase_ms["prefill"] == 1000.0


def test_what_a_coroutine_without_passes_returns_and_a_text_without_steps() -> None:
    @without_passes
    def add(a: int, b: int) -> int:
        return a + b

    assert compute(add(2, b=3)) == 5

    def nothing() -> Iterator[Any]:
        return
        yield

    assert list(steps(nothing())) == []  # type: ignore[arg-type]
