"""Law 9 on the native engine: sixteen texts of every kind, in any schedule, are each what they are alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from random_eagle import random_eagle
from random_heads import random_heads
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.drafters.eagle_files import write_eagle
from tokenswift_py.drafters.head_files import write_heads
from tokenswift_py.kvcache.pages import ROUND_PAGES
from tokenswift_py.options import Options
from tokenswift_py.planning.planner import FixedPlan, Plan
from tokenswift_py.runs.plan import prepare
from tokenswift_py.runs.result import Piece, Result
from tokenswift_py.runs.stream import Stream
from tokenswift_py.serving.company import Company
from tokenswift_py.serving.scheduler import Scheduler
from tokenswift_py.serving.sharing import OwnTime, Width
from tokenswift_py.serving.work import StreamWork

CONTEXT = 320  # five pages
RANDOM = np.random.default_rng(5).integers(3, 289, 150).tolist()
PROMPTS = [RANDOM[:1], RANDOM[:63], RANDOM[:64], RANDOM[:65], RANDOM, [*RANDOM[:130], 7, 8], RANDOM[90:110]]
PHRASE = {"chapters": ("the cat", "and then"), "min_chapter_tokens": 6, "raw": False, "ignore_eos": False}
FORMS: list[dict[str, Any]] = [
    {}, {}, {}, {},
    {"regex": "(the |cat |and |mat, )*"},
    {"json_schema": {"type": "array", "items": {"enum": ["the cat", 1, None]}, "maxItems": 9}},
    {"grammar": 'start: ("a" | "b" | " ")+ "."'},
    PHRASE,
]  # fmt: skip

LANGUAGES = {"regex", "json_schema", "grammar"}

settings_of_a_text = st.fixed_dictionaries(
    {
        "max_new_tokens": st.sampled_from([1, 2, 17, 40, 70, 110]),
        "seed": st.integers(0, 2**53),
        "drafter": st.sampled_from(["none", "ngram", "partial", "cascade", "heads", "eagle"]),
        "form": st.sampled_from(FORMS),
        "priority": st.sampled_from([0.0, 0.0, 1.0, 5.0]),
        "prompt": st.sampled_from(PROMPTS),
    },
    optional={
        "draft_tokens": st.sampled_from([1, 4, 13]),
        "draft_budget": st.sampled_from([64, 128]),
        "draft_vocabulary": st.sampled_from(["all", 32, 64]),
        "temperature": st.sampled_from([0.0, 0.6, 1.0, 1.4]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "top_k": st.sampled_from([3, 40]),
        "min_p": st.sampled_from([0.05]),
        "penalty": st.sampled_from([1.2]),
        "penalty_window": st.sampled_from([8, 64]),
        "dry_multiplier": st.sampled_from([0.8]),
        "repetition_penalty": st.sampled_from([1.1, 0.9]),
        "frequency_penalty": st.sampled_from([0.3]),
        "presence_penalty": st.sampled_from([-0.2]),
        "no_repeat_ngram_size": st.sampled_from([3]),
        "xtc_probability": st.sampled_from([0.5]),
        "top_n_sigma": st.sampled_from([1.5]),
        "stop": st.sampled_from([("e",), ("at", "the"), ("\ufffd",)]),
        "ban_words": st.sampled_from([("the",)]),
        "min_new_tokens": st.sampled_from([5]),
        "on_loop": st.sampled_from(["stop"]),
        "logprobs": st.sampled_from([0, 2]),
        "prompt_logprobs": st.sampled_from([0]),
        "ignore_eos": st.just(True),
    },
)


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    return TokenSwift.from_pretrained(str(tiny_folder), engine="native", threads=1)


@pytest.fixture(scope="module")
def heads(swift: TokenSwift, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file or folder for each drafter that needs one."""
    made, checkpoint = tmp_path_factory.mktemp("heads"), swift.checkpoint
    write_heads(random_heads("recurrent", vocab=checkpoint.spec.vocab_size), made / "heads.safetensors")
    layer = random_eagle(checkpoint.tensors()["model.embed_tokens.weight"])
    write_eagle(layer, made / "eagle", checkpoint.spec.layers, {})
    return {"heads": str(made / "heads.safetensors"), "eagle": str(made / "eagle")}


@pytest.fixture(scope="module")
def company(swift: TokenSwift) -> Company:
    return Company(swift, CONTEXT)


@pytest.mark.parametrize(
    ("context", "says"),
    [
        (0, "context: 0 is not allowed; at least 1"),
        (-5, "context: -5 is not"),
        (10**12, "RoPE tables of 1000000000000"),
    ],
)
def test_a_context_that_cannot_be_is_refused_before_anything_is_made(
    swift: TokenSwift, context: int, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        Company(swift, context)


class Text(StreamWork):
    """A text in company, with what it brought and how it ended."""

    def __init__(self, company: Company, asked: dict[str, Any], priority: float, clock: Any):
        run = prepare(company, asked["prompt"], Options.of(**asked["settings"], context=CONTEXT), in_pool=True)
        own = OwnTime(clock)
        super().__init__(Stream(company, run, company.new_cache(), own), own, priority, self.hear, self.over)
        self.pieces: list[Piece] = []
        self.ended: list[BaseException | None] = []

    def hear(self, piece: Piece) -> None:
        self.pieces.append(piece)

    def over(self, error: BaseException | None) -> None:
        self.stream.close()
        self.ended.append(error)


class Alone:
    """The texts as each is alone, by plain decoding. Each is written once."""

    def __init__(self, swift: TokenSwift):
        self.swift, self.known = swift, dict[str, Result | Exception]()

    def __call__(self, asked: dict[str, Any]) -> Result | Exception:
        nothing = dict.fromkeys(("draft_tokens", "draft_budget", "draft_heads"))
        plain = {**asked["settings"], **nothing, "drafter": "none"}
        key = repr((asked["prompt"], sorted(plain.items(), key=str)))
        if key not in self.known:
            try:
                self.known[key] = self.swift.generate(asked["prompt"], context=CONTEXT, **plain)
            except Exception as error:
                self.known[key] = error
        return self.known[key]


@pytest.fixture(scope="module")
def alone(swift: TokenSwift) -> Alone:
    return Alone(swift)


def asked_for(drawn: dict[str, Any], heads: dict[str, str]) -> dict[str, Any]:
    options = {name: value for name, value in drawn.items() if name not in ("form", "priority", "prompt")}
    options = {"raw": True, **options, **drawn["form"]}
    if "min_new_tokens" in options:
        options["min_new_tokens"] = min(options["min_new_tokens"], options["max_new_tokens"])
    if LANGUAGES & options.keys():  # these say where a text ends
        options = {name: value for name, value in options.items() if name not in ("min_new_tokens", "ignore_eos")}
    if drawn["drafter"] in heads:
        options["draft_heads"] = heads[drawn["drafter"]]
    prompt = "the cat and the dog" if "chapters" in options else drawn["prompt"]
    return {"prompt": prompt, "settings": options}


def brought(text: Text) -> list[int]:
    """The tokens of its pieces."""
    return [token for piece in text.pieces for token in (*piece.forced, *piece.tokens)]


def in_company(
    company: Company,
    alone: Alone,
    heads: dict[str, str],
    drawn: list[dict[str, Any]],
    seed: int,
    pages: int,
    running: int,
    rows: int,
) -> None:
    """Writes these texts by a random schedule: they come at random moments, and some are preempted or cancelled."""
    rng, ticks = random.Random(seed), itertools.count()
    clock = lambda: next(ticks) / 1e3  # noqa: E731
    company.pool = company.target.new_pool(pages)
    scheduler = Scheduler(company.target, company.pool, clock, running, rows)
    asked = [asked_for(each, heads) for each in drawn]
    texts: list[Text] = []
    seats: list[Any] = []
    cancelled: set[int] = set()
    forced = 0
    while len(texts) < len(asked) or scheduler.seats:
        if len(texts) < len(asked) and (rng.random() < 0.3 or not scheduler.seats):
            number = len(texts)
            texts.append(Text(company, asked[number], drawn[number]["priority"], clock))
            seats.append(scheduler.add(texts[-1]))
        if seats and rng.random() < 0.004:
            cancelled.add(victim := rng.randrange(len(seats)))
            scheduler.cancel(seats[victim])
        resting = scheduler._at_rest()
        if resting and rng.random() < 0.05:
            scheduler._preempt(rng.choice(resting))
            forced += 1
        scheduler.step()
    assert not company.probes()._texts, "no text is left to wait for"
    for number, text in enumerate(texts):
        truth, found = alone(asked[number]), text.stream.result()
        (error,) = text.ended
        told = "".join(piece.text for piece in text.pieces)
        if isinstance(truth, Exception):
            assert type(error) is type(truth) or number in cancelled
            continue
        assert error is None
        assert brought(text) == found.tokens == truth.tokens[: len(found.tokens)]
        if number in cancelled and found.ending == "interrupted":
            continue
        assert (found.text, found.ending, found.forced) == (truth.text, truth.ending, truth.forced)
        assert told == truth.text
        assert (found.logprobs, found.top_logprobs) == (truth.logprobs, truth.top_logprobs)
        assert found.prompt_logprobs == truth.prompt_logprobs
    event(f"preempted: {scheduler.preemptions > forced}, pages shared: {scheduler.prefixes.hits > 0}")
    assert scheduler.pool.free + scheduler.idle_pages == scheduler.pool.pages, "every page is free, or known"
    scheduler.close()
    assert scheduler.pool.free == scheduler.pool.pages


schedules = {
    "drawn": st.lists(settings_of_a_text, min_size=16, max_size=16),
    "seed": st.integers(0, 2**32),
    "pages": st.sampled_from([5 + ROUND_PAGES, 3 * ROUND_PAGES, 8 * ROUND_PAGES, 400]),
    "running": st.sampled_from([2, 5, 16]),
    "rows": st.sampled_from([8, 64, 256]),
}
QUICK = settings(max_examples=8, derandomize=True, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))


@QUICK
@given(**schedules)
def test_sixteen_texts_of_every_kind(company: Company, alone: Alone, heads: dict[str, str], **schedule: Any) -> None:
    in_company(company, alone, heads, **schedule)


def test_trees_are_cut_anywhere(
    company: Company, alone: Alone, heads: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text drafts as much as it may, and any number of the guesses is verified, none and all among them."""
    rng, cuts = random.Random(0), list[int]()

    def best(width: Width, guesses: Sequence[Any], *rest: Any) -> int:
        kept = rng.choice((0, len(guesses), rng.randint(0, len(guesses))))
        cuts.append(len(guesses) - kept)
        return kept

    @settings(QUICK, max_examples=4)
    @given(**schedules)
    def write(drawn: list[dict[str, Any]], **schedule: Any) -> None:
        planned = [{name: value for name, value in each.items() if name != "draft_tokens"} for each in drawn]
        in_company(company, alone, heads, planned, **schedule)

    monkeypatch.setattr(Width, "_best", best)
    for name in ("longest_chain", "gain_ms", "worth", "rows_paid"):
        monkeypatch.setattr(Plan, name, getattr(FixedPlan, name))
    monkeypatch.setattr(Plan, "rows_at_most", 9)
    write()
    assert sum(map(bool, cuts)) > 50 and sum(cuts) > 150


@pytest.mark.soak
@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(**schedules)
def test_sixteen_texts_in_many_schedules(
    company: Company, alone: Alone, heads: dict[str, str], **schedule: Any
) -> None:
    in_company(company, alone, heads, **schedule)
