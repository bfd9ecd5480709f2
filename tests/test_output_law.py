"""A text does not depend on how it was drafted: every drafter and tree shape writes what AR writes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import decoder_of, tiny_config, tiny_model
from samplings import PROMPT, samplers
from scripted import Scripted, write
from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.statistics import find_loop
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.drafters import partial
from tokenswift_py.drafters.base import Draft, create
from tokenswift_py.drafters.partial import Partial
from tokenswift_py.kvcache import pages
from tokenswift_py.planning.odds import Odds
from tokenswift_py.planning.rounds import Probes
from tokenswift_py.sampling.reference import NumericsError, Sampler

drafters = st.one_of(
    st.builds(lambda n: ("ngram", {"shortest": n}), st.integers(1, 3)),
    st.builds(
        lambda name, v, w: (name, {"view_tokens": v, "width": w}),
        st.sampled_from(["partial", "cascade"]),
        st.sampled_from([64, 128, 999, None]),
        st.integers(1, 3),
    ),
)


@settings(max_examples=20, deadline=None)
@given(
    params=samplers,
    drafter=drafters,
    size=st.none() | st.integers(1, 12),
    chunk=st.integers(1, 80),
    count=st.integers(1, 120),
)
def test_drafting_changes_no_token(
    tiny_decoder: Any, params: SamplingParams, drafter: tuple[str, Any], size: int | None, chunk: int, count: int
) -> None:
    """A size of None leaves it to the planner, whose choices depend on the clock."""
    plain, _, _ = write(tiny_decoder, PROMPT, count, params)
    name, config = drafter
    drafted, engine, _ = write(
        tiny_decoder, PROMPT, count, params, create(name, **config), draft_tokens=size, prefill_chunk=chunk
    )
    assert drafted == plain
    assert len(plain) == count == engine.stats.new_tokens
    assert engine.cache.pool.in_use == 0


@settings(max_examples=12, deadline=None)
@given(
    params=samplers,
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    width=st.integers(1, 4),
    size=st.integers(1, 90),
    seed=st.integers(0, 1000),
)
def test_any_tree_shape_changes_no_token(
    tiny_decoder: Any, params: SamplingParams, right: float, width: int, size: int, seed: int
) -> None:
    """Trees of up to 90 nodes after 50 prompt tokens cross page boundaries at 64 and 128."""
    plain, _, _ = write(tiny_decoder, PROMPT, 100, params)
    drafter = Scripted(PROMPT + plain, 61, right, width, seed)
    assert write(tiny_decoder, PROMPT, 100, params, drafter, draft_tokens=size)[0] == plain


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_drafter_that_is_always_right(tiny_decoder: Any, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=1)
    plain, _, _ = write(tiny_decoder, PROMPT, 81, params)
    drafted, engine, _ = write(
        tiny_decoder, PROMPT, 81, params, Scripted(PROMPT + plain, 61, 1.0, width=1), draft_tokens=7
    )
    assert drafted == plain
    assert engine.stats.acceptance_histogram == {7: 10}  # one token from prefill, then ten passes of eight
    assert engine.stats.to_dict()["mean_acceptance_length"] == 8
    assert engine.stats.to_dict()["draft_acceptance_rate"] == 1


def test_a_drafter_that_is_never_right(tiny_decoder: Any) -> None:
    plain, reference, _ = write(tiny_decoder, PROMPT, 60)
    drafted, engine, _ = write(tiny_decoder, PROMPT, 60, drafter=Scripted(PROMPT + plain, 61, 0.0))
    assert drafted == plain
    assert engine.stats.num_accepted_draft_tokens == 0
    assert engine.stats.num_spec_steps == reference.stats.num_spec_steps == 59


def test_a_drafter_that_is_sometimes_right(tiny_decoder: Any) -> None:
    plain, _, _ = write(tiny_decoder, PROMPT, 80)
    drafted, engine, _ = write(tiny_decoder, PROMPT, 80, drafter=Scripted(PROMPT + plain, 61, 0.6, width=2))
    assert drafted == plain
    assert 0 < engine.stats.num_accepted_draft_tokens < engine.stats.num_draft_tokens
    accepted = sum(length * count for length, count in engine.stats.acceptance_histogram.items())
    assert accepted == engine.stats.num_accepted_draft_tokens
    assert engine.stats.num_spec_steps + accepted + 1 == 80


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_sliding_windows_change_no_token(family: str) -> None:
    extra = {} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 1}
    decoder = decoder_of(tiny_model(tiny_config(family, sliding_window=40, **extra)))
    params = SamplingParams(temperature=0.9, seed=8)
    plain, _, _ = write(decoder, PROMPT, 100, params)
    assert write(decoder, PROMPT, 100, params, Scripted(PROMPT + plain, 61, 0.8), draft_tokens=30)[0] == plain
    assert write(decoder, PROMPT, 100, params, create("partial", view_tokens=64, width=2))[0] == plain


def test_what_ends_inside_accepted_drafts_ends_there(tiny_decoder: Any) -> None:
    """An EOS and a stop string inside a right draft: nothing past them is emitted."""
    plain, _, _ = write(tiny_decoder, PROMPT, 60, SamplingParams(temperature=1.0, seed=3))
    params = SamplingParams(temperature=1.0, seed=3)
    eos = plain[25]
    first = plain.index(eos)
    right = Scripted(PROMPT + plain, 61, 1.0, width=1)
    drafted, _, steps = write(tiny_decoder, PROMPT, 60, params, right, eos=[eos], draft_tokens=20)
    assert drafted == plain[: first + 1]
    assert steps[-1].ending == "eos"
    words = [f"{token} " for token in range(61)]
    stop = "".join(words[token] for token in plain[30:33])
    text = "".join(words[token] for token in plain)
    end = len(text[: text.index(stop) + len(stop)].split())
    stops = Stops(60, strings=[stop], decode=lambda ids: "".join(words[token] for token in ids))
    drafted, _, steps = write(tiny_decoder, PROMPT, 60, params, right, stops=stops, draft_tokens=20)
    assert drafted == plain[:end]
    assert steps[-1].ending == "stop"


@settings(max_examples=5, deadline=None)
@given(drafter=drafters, size=st.integers(1, 40), bias=st.sampled_from([9.0, 14.0]), seed=st.integers(0, 99))
def test_a_loop_ends_every_drafters_text_at_the_same_token(
    tiny_decoder: Any, drafter: tuple[str, Any], size: int, bias: float, seed: int
) -> None:
    params = SamplingParams(temperature=1.0, seed=seed, logit_bias={5: bias})
    endless, _, _ = write(tiny_decoder, PROMPT, 160, params)

    def stopped(drafter: Any) -> tuple[list[int], Any]:
        stops = Stops(160, on_loop="stop")
        text, _, steps = write(tiny_decoder, PROMPT, 160, params, drafter, stops=stops, draft_tokens=size)
        return text, steps[-1].ending

    plain = stopped(None)
    end = next((n for n in range(1, 251) if find_loop(endless[:n])), None)
    assert plain == (endless[:end], "loop" if end else "length")
    name, config = drafter
    assert stopped(create(name, **config)) == plain
    assert stopped(Scripted(PROMPT + endless, 61, 0.9, seed=seed)) == plain


def test_no_end_before_min_new_tokens(tiny_decoder: Any) -> None:
    plain, _, _ = write(tiny_decoder, PROMPT, 60)
    eos = [plain[2], plain[7]]
    assert len(write(tiny_decoder, PROMPT, 60, eos=eos)[0]) == 3
    for name in ("none", "ngram", "partial"):
        kept, _, _ = write(tiny_decoder, PROMPT, 60, eos=eos, first_end=50 + 20, drafter=create(name))
        assert len(kept) >= 21
        assert not set(kept[:20]) & set(eos)


@pytest.mark.parametrize("drafter", ["ngram", "partial", "cascade"])
def test_no_chapter_ends_before_min_chapter_tokens(tiny_decoder: Any, drafter: str) -> None:
    """However it is drafted. Half of the vocabulary ends a text, so that chapters would be short."""
    eos, turns = list(range(0, 61, 2)), [[5, 6, 7], [9, 11], [13]]
    settings: dict[str, Any] = {"eos": eos, "turns": turns, "chapter_tokens": 12}
    params = SamplingParams(temperature=1.0, seed=4)
    plain, engine, steps = write(tiny_decoder, PROMPT, 90, params, **settings)
    assert not engine.turns and len(plain) >= 4 * 13 + 6
    chapters: list[list[int]] = []
    for step in steps:
        if step.forced:
            chapters.append([])
        chapters[-1] += step.tokens
    assert all(len(chapter) >= 13 and not set(chapter[:12]) & set(eos) for chapter in chapters)
    assert write(tiny_decoder, PROMPT, 90, params, create(drafter), **settings)[0] == plain


@pytest.mark.parametrize("policy", ["mass", "snapkv", "quest", "recent"])
def test_texts_that_rest_now_and_then_show_their_policies_what_they_have(
    tiny_decoder: Any, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a company rests passes report nothing, and a turn may be forced just then."""
    params, longer = SamplingParams(temperature=1.0, seed=4), list(range(60)) * 4
    plain, _, _ = write(tiny_decoder, longer, 60, params)
    eos, turn = plain[12], [5, 6, 7, 8]
    rested, asked = [], []

    def rests(probes: Probes) -> bool:
        rested.append(len(rested) // 5 % 2 == 0)
        return rested[-1]

    def compute(self: Any, *args: Any, **more: Any) -> Any:
        asked.append(bool(more.get("want_mass") or more.get("want_queries") or any(args[2:4])))
        return forward(self, *args, **more)

    forward = type(tiny_decoder).forward
    monkeypatch.setattr(Probes, "rests", property(rests))
    monkeypatch.setattr("tokenswift_py.planning.planner.IDLE_ROUNDS", 0)
    monkeypatch.setattr(type(tiny_decoder), "forward", compute)
    drafter = Partial(policy, 64)
    drafted, engine, _ = write(
        tiny_decoder, longer, 60, params, drafter, eos=[eos], turns=[turn, turn], prefill_chunk=9
    )
    monkeypatch.undo()
    assert drafted == write(tiny_decoder, longer, 60, params, eos=[eos], turns=[turn, turn])[0]
    assert engine.stats.forced_tokens > 0 and len(set(rested)) == 2
    assert policy == "recent" or len(set(asked)) == 2, "some passes report what the policy needs, and some do not"


@pytest.mark.parametrize("drafter", ["none", "ngram", "partial"])
def test_chapters_force_their_turn_and_go_on(tiny_decoder: Any, drafter: str) -> None:
    """The text after a forced turn is what a fresh run over everything before it writes: no noise was consumed."""
    params = SamplingParams(temperature=1.0, seed=4)
    plain, _, _ = write(tiny_decoder, PROMPT, 60, params)
    eos, turn = plain[12], [5, 6, 7, 8]
    whole, engine, steps = write(
        tiny_decoder, PROMPT, 60, params, create(drafter), eos=[eos], turns=[turn, turn], prefill_chunk=3
    )
    first = plain.index(eos) + 1
    assert whole[: first + 4] == plain[:first] + turn
    turns = [step.forced for step in steps[1:] if step.forced]
    assert turns == [tuple(turn)] * (2 - len(engine.turns))
    assert engine.stats.forced_tokens == 4 * len(turns) == len(whole) - engine.stats.new_tokens
    assert whole == write(tiny_decoder, PROMPT, 60, params, eos=[eos], turns=[turn, turn])[0]
    again, _, _ = write(tiny_decoder, PROMPT + whole[: first + 4], 60 - first, params, eos=[eos], turns=[turn])
    assert again == whole[first + 4 :]


def test_the_text_fills_its_context_to_the_last_position() -> None:
    decoder = decoder_of(tiny_model(tiny_config()), context=100)
    plain, _, _ = write(decoder, PROMPT, 50)
    assert len(plain) == 50
    right = Scripted(PROMPT + plain, 61, 1.0)
    assert write(decoder, PROMPT, 50, drafter=right, draft_tokens=40)[0] == plain


def test_draft_passes_of_wrong_guesses_fit_the_end_of_a_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of rejected guesses are kept until the next proposal, and a long chain has many."""
    for module in (pages, partial):
        monkeypatch.setattr(module, "SPARE_PAGES", 1)
    monkeypatch.setattr(Partial, "_look_ahead", look_ahead)
    decoder = decoder_of(tiny_model(tiny_config()), context=192)
    plain, _, _ = write(decoder, PROMPT, 142)
    drafted, engine, _ = write(decoder, PROMPT, 142, drafter=create("cascade"), draft_tokens=120)
    assert drafted == plain
    assert engine.stats.num_accepted_draft_tokens > 100


def look_ahead(self: Partial, context: Any, chain: Any, room: int) -> Draft:
    """Returns as many guesses as there is room for, all of them wrong except by chance."""
    ahead = Draft(context.history[-1], min(7, room))
    while len(ahead) < ahead.budget:
        ahead.guess(0, len(ahead), Odds(0.5))
    return ahead


def test_logits_that_are_not_finite_stop_with_their_position() -> None:
    decoder = decoder_of(tiny_model(tiny_config()))
    decoder.weights["model.norm.weight"][3] = float("nan")
    with pytest.raises(NumericsError, match="position 50"):
        write(decoder, PROMPT, 5)


def test_steps_are_final_when_they_are_yielded_and_closing_gives_the_pages_back(tiny_decoder: Any) -> None:
    plain, _, _ = write(tiny_decoder, PROMPT, 40)
    loop = DecodeLoop(tiny_decoder, create("ngram"), Sampler(SamplingParams(), 61), Stops(40))
    steps, seen = loop.run(PROMPT), []
    for step in steps:
        seen.extend(step.tokens)
        if len(seen) > 20:
            break
    steps.close()
    assert seen == plain[: len(seen)]
    assert loop.cache.pool.in_use == 0


def test_chapters_never_write_more_than_was_asked_for(tiny_decoder: Any) -> None:
    """An EOS as the last token allowed ends the text, however many turns are left."""
    plain, _, _ = write(tiny_decoder, PROMPT, 60)
    eos = plain[9]
    count = plain.index(eos) + 1
    text, engine, steps = write(tiny_decoder, PROMPT, count, eos=[eos], turns=[[5, 6]] * 3)
    assert text == plain[:count]
    assert steps[-1].ending == "eos"
    assert engine.stats.forced_tokens == 0
