"""A smaller model drafts: it changes no token, its own cache follows the text, and what cannot draft is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from conftest import decoder_of, tiny_config, tiny_model, tiny_tokenizer, weights_of
from samplings import PROMPT, samplers
from scripted import write
from small_models import SMALLER, saved
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.core import Acceptance, DraftTree, Model, Output, SamplingParams
from tokenswift_py.decoding.passes import Passes
from tokenswift_py.drafters.base import Context, Drafter, create
from tokenswift_py.drafters.chain import Confidence
from tokenswift_py.drafters.draft_model import SPREAD
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.options import DRAFTERS, Options

SAMPLED = SamplingParams(temperature=0.9, min_p=0.02, penalty=1.1, dry_multiplier=0.5, seed=3)


def native_of(model: Any, context: int = 512) -> NativeDecoder:
    spec = ModelSpec.from_config(model.config)
    weights = NativeWeights(spec, weights_of(model), torch.float32, threads=1)
    return NativeDecoder(weights, rope_tables(model.config, context))


@pytest.fixture(scope="module", params=["native", "torch"])
def target(request: pytest.FixtureRequest) -> Model:
    """Both keep law 1 here: the native engine to the bit, torch because it computes in fp64."""
    if request.param == "torch":
        return decoder_of(tiny_model(tiny_config()))
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    return native_of(tiny_model(tiny_config(), torch.float32))


@pytest.fixture(scope="module")
def draft(target: Model) -> Model:
    """Another family, another depth and width, other weights: its guesses are mostly wrong."""
    return draft_beside(target)


def draft_beside(target: Model, **changes: Any) -> Model:
    config = tiny_config("qwen2", **{**SMALLER, **changes})
    if isinstance(target, NativeDecoder):
        return native_of(tiny_model(config, torch.float32, seed=1))
    return decoder_of(tiny_model(config, seed=1))


def written(target: Model, count: int, params: SamplingParams, drafter: Any = None, **rest: Any) -> tuple[Any, Any]:
    tokens, engine, _ = write(target, PROMPT, count, params, drafter, **rest)
    assert engine.cache.pool.in_use == 0
    return tokens, engine.stats


@settings(max_examples=10, deadline=None)
@given(
    params=samplers,
    keep=st.sampled_from([None, 64, 200]),
    width=st.integers(1, 3),
    size=st.none() | st.integers(1, 12),
    chunk=st.integers(1, 80),
    count=st.integers(1, 150),
)
def test_a_draft_model_changes_no_token(
    target: Model, draft: Model, params: SamplingParams, keep: int | None, width: int, size: int | None, chunk: int,
    count: int,
) -> None:  # fmt: skip
    plain, _ = written(target, count, params)
    drafter = create("draft_model", model=draft, keep_tokens=keep, width=width)
    assert written(target, count, params, drafter, draft_tokens=size, prefill_chunk=chunk)[0] == plain


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_that_is_the_target_is_always_right(target: Model, params: SamplingParams) -> None:
    """Same noise at the same positions, same processors along the path: five pages of guesses, each of them right."""
    plain, _ = written(target, 281, params)
    drafter = create("draft_model", model=target, width=1)
    drafted, stats = written(target, 281, params, drafter, draft_tokens=6)
    assert drafted == plain
    assert stats.acceptance_histogram == {6: 40}  # one token from prefill, then forty passes of seven


def test_errors_of_a_draft_weigh_more_at_a_low_temperature(target: Model) -> None:
    expected = []
    for temperature in (0.0, 0.5, 1.0):
        drafter: Any = create("draft_model", model=target)
        written(target, 9, SamplingParams(temperature=temperature, seed=1), drafter, draft_tokens=2)
        assert drafter._confidence.spread == SPREAD / (temperature or 1.0)
        fresh = Confidence(3)
        fresh.expect(SPREAD, temperature)
        expected.append(fresh.next)
    assert expected[0] == expected[2] > expected[1] + 0.05


class Sometimes(Drafter):
    """A drafter that is asked for a draft in two rounds of five only, as a planner may find right."""

    name = "sometimes"
    needs: frozenset[str] = frozenset()

    def __init__(self, drafter: Any):
        self.drafter, self.rounds = drafter, 0
        self.prefill, self.observe = drafter.prefill, drafter.observe

    def propose(self, context: Context, budget: int) -> Passes[DraftTree]:
        self.rounds += 1
        return self.drafter.propose(context, budget if self.rounds % 5 < 2 else 1)


def test_the_draft_catches_up_with_forced_tokens_and_undrafted_rounds(target: Model) -> None:
    """A turn of 2 tokens joins the first guess's pass, one of 90 is read before; both move the draft on exactly."""
    plain, _ = written(target, 200, SAMPLED)
    eos = [min(plain, key=lambda token: abs(plain.index(token) - 25))]
    rest: dict[str, Any] = {"eos": eos, "turns": [[*range(60), *range(30)], [5, 6]]}
    chapters, _ = written(target, 200, SAMPLED, **rest)
    always = create("draft_model", model=target, width=1)
    for drafter in (always, Sometimes(create("draft_model", model=target, width=1))):
        drafted, stats = written(target, 200, SAMPLED, drafter, draft_tokens=4, **rest)
        assert drafted == chapters
        assert stats.forced_tokens == 92
        # what was drafted and not accepted stood after the end of a chapter
        assert stats.num_draft_tokens - stats.num_accepted_draft_tokens <= 3 * 4
        assert stats.num_accepted_draft_tokens > 30


class FromScratch(Drafter):
    """Proposes what a draft model proposes, and holds it against one that has just read the whole text."""

    name = "from scratch"
    needs: frozenset[str] = frozenset()

    def __init__(self, model: Model, **rest: Any):
        self.model, self.rest = model, rest
        self.drafter: Any = create("draft_model", model=model, width=1, **rest)
        self.compared = 0

    def prefill(self, context: Context, output: Output) -> Passes[None]:
        return self.drafter.prefill(context, output)

    def propose(self, context: Context, budget: int) -> Passes[DraftTree]:
        tree = yield from self.drafter.propose(context, budget)
        fresh = yield from create("draft_model", model=self.model, width=1, **self.rest).propose(context, budget)
        assert tree.tokens.tolist() == fresh.tokens.tolist()
        self.compared += len(tree) > 1
        return tree

    def observe(self, taken: Acceptance, output: Output) -> None:
        self.drafter.observe(taken, output)


def test_wrong_guesses_leave_nothing_behind(target: Model, draft: Model) -> None:
    drafter = FromScratch(draft)
    drafted, stats = written(target, 120, SAMPLED, drafter, draft_tokens=3)
    assert drafted == written(target, 120, SAMPLED)[0]
    assert drafter.compared > 80
    assert 0 < stats.num_accepted_draft_tokens < stats.num_draft_tokens / 4


def test_a_bounded_draft_keeps_the_first_page_and_the_latest(target: Model, draft: Model) -> None:
    drafter: Any = create("draft_model", model=draft, keep_tokens=150)
    text = [*PROMPT, *range(60), *PROMPT, *PROMPT]
    drafted, _, _ = write(target, text, 250, SAMPLED, drafter, draft_tokens=5, prefill_chunk=40)
    assert drafted == write(target, text, 250, SAMPLED)[0]
    full = drafter.cache.full_pages
    assert full >= 7
    assert drafter.cache.kept.tolist() == [0, full - 1]
    assert drafter.cache.pool.in_use <= 3
    assert drafter.explain()["kept_tokens"] < 150 + PAGE_SIZE


def test_a_budget_that_is_never_reached_changes_no_guess(target: Model) -> None:
    drafter = create("draft_model", model=target, keep_tokens=448, width=1)
    _, stats = written(target, 281, SAMPLED, drafter, draft_tokens=6)
    assert stats.acceptance_histogram == {6: 40}


@pytest.mark.parametrize("own_vocab", [40, 61, 77])
def test_vocabularies_may_be_padded_to_different_sizes(target: Model, own_vocab: int) -> None:
    """Ids that only one of the two has mean no text, but they may be in a prompt, and processors may want them."""
    params = SamplingParams(temperature=1.0, top_p=0.9, penalty=1.2, seed=5, ban=(60, 3), logit_bias={59: 2.0})
    plain, _ = written(target, 60, params)
    model = draft_beside(target, vocab_size=own_vocab)
    drafter = create("draft_model", model=model, vocab_sizes=(own_vocab, 61))
    drafted, stats = written(target, 60, params, drafter, draft_tokens=4)
    assert drafted == plain
    assert stats.num_draft_tokens > 40


def test_a_draft_that_is_never_right_is_soon_left_alone(target: Model) -> None:
    """Its passes cost what the target's do, so that nothing but a probe now and then can be worth one."""

    class Wrong:
        """The target itself, but for its last row's logits."""

        context, row_shapes, clock = target.context, target.row_shapes, target.clock

        def __init__(self) -> None:
            self.new_cache = target.new_cache

        def forward(self, segments: Any, logit_rows: Any = None, **wants: bool) -> Output:
            output = target.forward(segments, logit_rows)
            return Output(output.hidden, -output.logits)

    lines: list[Any] = []
    drafter = create("draft_model", model=Wrong())
    drafted, _ = written(target, 300, SamplingParams(), drafter, trace=lines.append)
    assert drafted == written(target, 300, SamplingParams())[0]
    chains = [line["drafter"]["chain"] for line in lines]
    assert sum(chains[:20]) > 0
    assert sum(chain > 0 for chain in chains[100:]) < 0.2 * len(chains[100:])


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer with the tokenizer of `tiny_folder`, trained for 160 positions."""
    return saved(tmp_path_factory.mktemp("drafts") / "smaller")


@pytest.fixture(scope="module", params=["native", "torch"])
def swift(tiny_folder: Path, request: pytest.FixtureRequest) -> TokenSwift:
    if request.param == "native":
        pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    attention = "sdpa" if request.param == "torch" else "auto"
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine=request.param, attention=attention)


RUN: dict[str, Any] = {"max_new_tokens": 150, "seed": 4, "ignore_eos": True, "draft_tokens": 4}


def test_a_named_draft_model_is_loaded_once_and_drafts_under_auto(
    swift: TokenSwift, smaller: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded: list[str] = []
    beside = swift.executor.beside
    monkeypatch.setattr(swift.executor, "beside", lambda *a: loaded.append(a[1]) or beside(*a), raising=False)
    plain = swift.generate("the cat", drafter="none", **RUN)
    for drafter in ("auto", "draft_model"):
        with swift.stream("the cat", drafter=drafter, draft_model=str(smaller), **RUN) as stream:
            list(stream)
        report = swift.baseline(stream).report
        assert stream.tokens == plain.tokens
        assert (report["drafter"], report["identical"]) == ("draft_model", True)
        assert report["num_draft_tokens"] > 200
        assert report["parameters"]["draft_model"] == str(smaller)
        assert report["numerics"] == plain.report["numerics"]
    assert loaded == ["auto"]
    assert "draft model: context 170 is beyond the 160 trained positions: log-extend" in caplog.text


def test_weights_of_the_draft(swift: TokenSwift, smaller: Path, tiny_folder: Path) -> None:
    """bf16 are what the target's are, so that a model that drafts for itself is always right; int8 is native's auto."""
    again = swift.generate("the cat", drafter="draft_model", draft_model=str(tiny_folder), draft_weights="bf16", **RUN)
    assert again.report["draft_acceptance_rate"] > (0.999 if swift.executor.name == "native" else 0.95)
    swift.generate("the cat", draft_model=str(smaller), **RUN)
    assert swift._draft is not None
    executor: Any = swift._draft[1].executor
    assert executor.dtype == ("int8" if swift.executor.name == "native" else "fp32")
    assert executor.kv_dtype == swift.executor.kv_dtype
    if swift.executor.name == "native":
        assert executor._weights.team is swift.executor._weights.team  # type: ignore[attr-defined]
    else:
        with pytest.raises(UserError, match=r"draft_weights: 'int8' is not allowed; .* engine native have all"):
            swift.generate("the cat", draft_model=str(smaller), draft_weights="int8", **RUN)


def test_the_lossy_mode_bounds_the_drafts_memory_too(swift: TokenSwift, smaller: Path) -> None:
    lossy = {**RUN, "max_new_tokens": 400, "kv_budget": 256}
    plain = swift.generate("the cat", drafter="none", **lossy)
    stream = swift.stream("the cat", draft_model=str(smaller), **lossy)
    list(stream)
    assert stream.result().tokens == plain.tokens
    cache = stream.loop.drafter.cache  # type: ignore[attr-defined]
    assert cache.length > 350
    assert len(cache.kept) == 4


def test_chapters_are_drafted_by_a_model(swift: TokenSwift, smaller: Path) -> None:
    run: dict[str, Any] = {"max_new_tokens": 120, "seed": 2, "chapters": ["and then", "and the end"]}
    run["logit_bias"] = {2: 5.0}  # of the end of a turn
    plain = swift.generate("a", drafter="none", **run)
    drafted = swift.generate("a", draft_model=str(smaller), **run)
    assert drafted.tokens == plain.tokens
    assert drafted.forced == plain.forced != []


def refused(swift: TokenSwift, says: str, **changes: Any) -> None:
    with pytest.raises(UserError, match=says) as error:
        swift.generate("the cat", **{**RUN, **changes})
    assert "\n" not in str(error.value)


def test_what_cannot_draft_is_refused_in_one_line(
    swift: TokenSwift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smaller: Path
) -> None:
    refused(swift, "draft_model: None is not allowed; name a folder", drafter="draft_model")
    refused(swift, "draft_model: '' is not allowed", draft_model="")
    refused(swift, "draft_model: model: 'nowhere' is not allowed", draft_model="nowhere")
    refused(swift, "draft_model: model: .* needs config.json", draft_model=str(tmp_path))
    refused(swift, "draft_weights: 'fp4' is not allowed", draft_model=str(smaller), draft_weights="fp4")
    longer = tiny_tokenizer()
    longer.add_tokens([AddedToken("<|extra|>")])
    size = len(tiny_tokenizer())
    says = rf"its vocabulary must be the target's: token {size} is '<|extra|>' there and None here"
    refused(swift, says.replace("|", r"\|"), draft_model=str(saved(tmp_path / "longer", longer)))
    monkeypatch.setattr("tokenswift_py.memory.free_memory", lambda: 1000)
    swift._draft = None
    refused(swift, f"memory: .* the draft model {smaller} in (int8|fp32) must fit", draft_model=str(smaller))


def test_a_draft_whose_positions_end_before_the_text_drafts_all_the_same(
    swift: TokenSwift, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Too few trained positions to be extended: they are met as trained, and a draft may be wrong."""
    linear = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
    folder = saved(tmp_path / "linear", **linear, max_position_embeddings=100)
    drafted = swift.generate("the cat", draft_model=str(folder), **RUN)
    assert drafted.tokens == swift.generate("the cat", drafter="none", **RUN).tokens
    assert drafted.report["num_draft_tokens"] > 0
    assert "draft model: context 170 is beyond the 100 trained positions, which are met as they are" in caplog.text


def test_the_drafts_cache_counts_in_the_memory_check(
    swift: TokenSwift, smaller: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[tuple[int, str]] = []
    monkeypatch.setattr("tokenswift_py.runs.plan.check_memory", lambda size, device, what: needed.append((size, what)))
    named = {"draft_model": str(smaller)}
    for changes in ({"draft_weights": "bf16"}, named, {**named, "draft_budget": 64}):
        swift.generate("the cat", **{**RUN, **changes})
    assert swift._draft is not None
    (alone, _), (both, what), (bounded, _) = needed
    assert both == alone + swift._draft[1].kv_bytes(170)
    assert alone < bounded < both
    assert "that of the draft model" in what


def test_any_drafter_with_a_second_model_asks_for_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["from tokenswift_py.drafters.draft_model import DraftModel", "class DRAFTER(DraftModel): pass"]
    (tmp_path / "another.py").write_text("\n".join(lines))
    folder = importlib.import_module(DRAFTERS)
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    assert Options(drafter="another", draft_model="tiny").chosen_drafter == "another"
    with pytest.raises(UserError, match="draft_model: None is not allowed; name"):
        Options(drafter="another")
