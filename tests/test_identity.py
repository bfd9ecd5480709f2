"""Every drafter under every policy, with the target's weights or int8 ones, writes what plain decoding writes: on both
executors, after a text of several pages of which the drafts see a few."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch

from conftest import decoder_of, tiny_config, tiny_model, weights_of
from random_dflash import random_dflash
from random_eagle import random_eagle
from random_heads import random_heads
from scripted import write
from tokenswift_py import registry
from tokenswift_py.core import Model, Output, SamplingParams, Segment
from tokenswift_py.drafters.base import Drafter, create
from tokenswift_py.drafters.cascade import Cascade
from tokenswift_py.drafters.dflash import DFlash
from tokenswift_py.drafters.eagle import Eagle
from tokenswift_py.drafters.head_weights import FORMS
from tokenswift_py.drafters.heads import Heads
from tokenswift_py.kvcache.base import PAGE_SIZE, IntArray
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.planning.costs import PassCost

CONTEXT, COUNT = 1024, 70
PROMPT = [int(t) for t in np.random.default_rng(6).integers(0, 61, 509)]  # the text fills pages at 512 and 576
PARAMS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(
        temperature=0.8, min_p=0.02, penalty=1.1, penalty_window=64, dry_multiplier=0.5, ban=(7,), seed=5
    ),
}
NAMES = registry.names("tokenswift_py.kvcache.policies")
SIZES = {"fixed trees": 6, "planned trees": None}
WINDOW = 230  # of the sliding ones: the latest row's reaches over four full pages


@dataclass(frozen=True)
class Setup:
    """weights: of drafts. kv_dtype: of the native engine's cache. trained: positions; fewer than the text has are met
    by Self-Extend."""

    executor: str
    family: str = "llama"
    weights: str = "own"
    kv_dtype: torch.dtype = torch.bfloat16
    trained: int = CONTEXT


SETUPS = {
    "torch": Setup("torch"),
    "torch, windows": Setup("torch", "mistral"),
    "torch, self-extend": Setup("torch", trained=200),
    "native": Setup("native"),
    "native, int8 drafts": Setup("native", weights="int8"),
    "native, int8 KV": Setup("native", kv_dtype=torch.int8),
    "native, windows": Setup("native", "mistral"),
    "native, int8 drafts and KV, windows": Setup("native", "mistral", "int8", torch.int8),
    "native, int8 drafts, self-extend": Setup("native", "qwen3", "int8", trained=200),
}
WHOLE = ("torch", "native")  # these in all cases, the others in two that differ in both
DIAGONALS = ((("greedy", "fixed trees"), ("sampled", "planned trees")),
             (("greedy", "planned trees"), ("sampled", "fixed trees")))  # fmt: skip
SOME = {setup: DIAGONALS[at % 2] for at, setup in enumerate(SETUPS) if setup not in WHOLE}
SOME["torch, self-extend"] = (("sampled", "planned trees"),)  # slower than the others
CASES = [case for case in product(SETUPS, PARAMS, SIZES) if case[0] not in SOME or case[1:] in SOME[case[0]]]
TIERS = ("partial", "cascade")
VIEWS = [*product(TIERS, NAMES, (192,)), ("partial", "mass", 64), ("cascade", "mass", 128)]


@dataclass(frozen=True)
class Models:
    """target writes. drafting: the same model, whose rows cannot be committed; beside: with a cache of its own. Both
    have the draft's weights."""

    target: Model
    drafting: Model
    beside: Model
    embedding: torch.Tensor


@cache
def models_of(setup: Setup) -> Models:
    window = {"sliding_window": WINDOW} if setup.family == "mistral" else {}
    config = tiny_config(setup.family, max_position_embeddings=setup.trained, **window)
    if setup.executor == "torch":
        model = tiny_model(config)  # in float64, which keeps law 1 for such short sums
        target = decoder_of(model, CONTEXT)
        drafting = decoder_of(model, CONTEXT, draft=True)
        return Models(target, drafting, target, target.weights["model.embed_tokens.weight"])
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    spec, rope = ModelSpec.from_config(config), rope_tables(config, CONTEXT)
    weights = weights_of(tiny_model(config, torch.float32))
    own = NativeWeights(spec, weights, torch.bfloat16, 2)
    drafts = own if setup.weights == "own" else NativeWeights(spec, weights, torch.int8, team=own.team)
    target, drafting, beside = (
        NativeDecoder(packed, rope, setup.kv_dtype, draft, int8_pages=setup.weights != "own")
        for packed, draft in ((own, False), (drafts, True), (drafts, False))
    )
    return Models(target, drafting, beside, weights["model.embed_tokens.weight"])


@cache
def plain(setup: Setup, params: str) -> list[int]:
    text, _, _ = write(Paced(models_of(setup).target, 10.0), PROMPT, COUNT, PARAMS[params])
    return text


class Paced:
    """A model whose passes take so many milliseconds, and a little for every row, on a clock that nothing else moves:
    what a planner makes of them does not depend on the machine. Keeps the views that it was given."""

    now = 0.0

    def __init__(self, model: Model, ms: float):
        self.model, self.ms = model, ms
        self.views: list[IntArray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward(self, segments: list[Segment], *rest: Any, **wants: bool) -> Output:
        (segment,) = segments
        Paced.now += 1e-3 * self.ms * (1 + 0.01 * len(segment.tree))
        if segment.view is not None:
            assert 0 < segment.view.pages.shape[-1] < segment.cache.full_pages
            self.views.append(segment.view.pages)
        return self.model.forward(segments, *rest, **wants)


@dataclass(frozen=True)
class Drafted:
    """accepted, rejected: drafted tokens; the latter also hung from a wrong one, or beside the right one. sizes: of
    trees. told: pages of a view, as the trace has them. views: that draft passes were given."""

    accepted: int
    rejected: int
    sizes: set[int]
    told: set[int]
    views: list[IntArray]


@pytest.fixture
def draft(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Drafted]:
    """Write the text with a drafter, and hold every token against plain decoding's."""
    monkeypatch.setattr(time, "perf_counter", lambda: Paced.now)

    def drafted(setup: Setup, params: str, size: int | None, drafter: Drafter, drafting: Paced) -> Drafted:
        lines: list[dict[str, Any]] = []
        text, engine, _ = write(
            Paced(models_of(setup).target, 10.0), PROMPT, COUNT, PARAMS[params], drafter, draft_tokens=size,
            self_draft=drafting, trace=lines.append,
        )  # fmt: skip
        assert text == plain(setup, params)
        assert engine.cache.pool.in_use == 0
        stats, sizes = engine.stats, {len(line["tree"]["tokens"]) for line in lines}
        accepted = stats.num_accepted_draft_tokens
        told = {line["drafter"].get("view_pages") for line in lines if line["drafter"].get("chain")}
        return Drafted(accepted, stats.num_draft_tokens - accepted, sizes, told, drafting.views)

    return drafted


def half(things: Sequence[Any], setup: str, params: str, size: str) -> list[Any]:
    """Every other one of them. A setup in all cases has each with both kinds of sampling and both of trees; where it is
    in two, the other case, or another setup like it, has the rest."""
    first = list(PARAMS).index(params) + (list(SIZES).index(size) if setup in WHOLE else 0)
    return [thing for at, thing in enumerate(things) if (first + at) % 2]


@pytest.mark.parametrize(("setup", "params", "size"), CASES)
def test_no_view_changes_a_token(draft: Callable[..., Drafted], setup: str, params: str, size: str) -> None:
    """Drafts under views are right and wrong, and no two policies show them the same pages."""
    drafting, found = models_of(SETUPS[setup]).drafting, {}
    for tier, policy, tokens in half(VIEWS, setup, params, size):
        drafter = create(tier, policy=policy, view_tokens=tokens, width=2)
        result = draft(SETUPS[setup], params, SIZES[size], drafter, Paced(drafting, 1.0))
        assert {view.shape[-1] for view in result.views} == result.told == {tokens // PAGE_SIZE}
        assert result.rejected >= 10
        assert len(result.sizes) > 4 or size != "planned trees"
        found[tier, policy, tokens] = result
    assert len(set().union(*(result.sizes for result in found.values()))) > 1
    assert sum(result.accepted >= 10 for result in found.values()) >= 0.8 * len(found)
    for one, other in combinations(found, 2):
        seen = [[view.tobytes() for view in found[name].views] for name in (one, other)]
        assert one[0] != other[0] or seen[0] != seen[1], f"{one} and {other} saw the same"


@pytest.mark.parametrize(("setup", "params", "size"), CASES)
def test_no_other_drafter_changes_a_token(draft: Callable[..., Drafted], setup: str, params: str, size: str) -> None:
    """Repeats, heads of every form, alone and before draft passes, drafts with layers of their own, and the model
    itself over a cache of its first page and the latest two."""
    models = models_of(SETUPS[setup])
    beside: Any = create("draft_model", model=Paced(models.beside, 1.0), keep_tokens=192, width=2)
    heads, within = ([Heads(random_heads(form), models.embedding) for form in FORMS] for _ in range(2))
    tiers = [Cascade(policy="quest", view_tokens=192, width=2, heads=head) for head in within]
    own = [Eagle(random_eagle(models.embedding), 100, width=2), DFlash(random_dflash(models.embedding), 100, width=2)]
    others = [create("ngram", shortest=1), *own, *heads, *tiers]
    lucky = others[1 if params == "sampled" else 3 :]  # noise makes some right
    drafters = [*(half(others, setup, params, size) if setup in WHOLE else others), beside]
    found = [draft(SETUPS[setup], params, SIZES[size], drafter, Paced(models.drafting, 1.0)) for drafter in drafters]
    assert all(result.rejected >= 10 for result in found)
    assert all(result.accepted > 0 for drafter, result in zip(drafters, found, strict=True) if drafter in lucky)
    assert found[-1].accepted >= 10
    assert len(beside.cache.kept) == 3 < beside.cache.full_pages


class Starting(Paced):
    """Its first pass takes half a second, as one that copies pages does."""

    def forward(self, segments: list[Segment], *rest: Any, **wants: bool) -> Output:
        Paced.now += 0.5 if not self.passes else 0.0
        self.passes += 1
        return super().forward(segments, *rest, **wants)

    passes = 0


def test_the_first_pass_under_a_size_of_view_is_no_measure_of_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []
    observe = PassCost.observe

    def watched(cost: PassCost, rows: int, context: int, ms: float) -> None:
        measured.extend([] if math.isnan(ms) else [ms])  # those of a spoiled lap are not learnt from
        observe(cost, rows, context, ms)

    monkeypatch.setattr(time, "perf_counter", lambda: Paced.now)
    monkeypatch.setattr(PassCost, "observe", watched)
    models, drafting = models_of(SETUPS["torch"]), Starting(models_of(SETUPS["torch"]).drafting, 1.0)
    drafter = create("partial", view_tokens=192)
    write(Paced(models.target, 10.0), PROMPT, COUNT, PARAMS["sampled"], drafter, self_draft=drafting)
    assert drafting.passes > 20 and min(measured) < 2 and max(measured) < 20
