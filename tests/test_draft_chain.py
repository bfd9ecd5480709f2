"""Chains of draft passes without the host: the tokens, chances and rows of those that it drives pass by pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from drawn import drawn_cache, new_decoder
from interpreter import INTERPRETED
from recording import record
from tokenswift_py.core import DraftTree, SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.passes import Pass, Timer
from tokenswift_py.drafters.base import Context, create
from tokenswift_py.kernels.triton import attention, configs
from tokenswift_py.kvcache.base import Committed
from tokenswift_py.models.captured import Recorder
from tokenswift_py.planning.planner import FixedPlanner
from tokenswift_py.sampling.triton import TritonSampler
from transfers import Transfers

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="its models are on a CPU; test_triton_gpu.py has a chain, too")

VOCAB = 61
SAMPLERS = (
    SamplingParams(),
    SamplingParams(temperature=0.9, seed=5, top_k=9, min_p=0.01),
    SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.2, presence_penalty=0.1),
    SamplingParams(temperature=1.1, penalty=1.3, penalty_window=20, logit_bias={3: 2.0}, ban=[4]),
    SamplingParams(temperature=0.7, dry_multiplier=0.8, dry_length=1, dry_breakers=[7, 9], seed=2),
    SamplingParams(no_repeat_ngram_size=2, dry_multiplier=0.5),
    SamplingParams(temperature=1.5, top_n_sigma=1.0, typical_p=0.9, seed=3),
    SamplingParams(temperature=1.2, xtc_probability=0.5, xtc_threshold=0.05, seed=4),
)


class InCompany(Timer):
    """The time of a text whose passes travel with others, so that the host drives every one."""

    alone = False


class Drafts:
    """Drafts of one text by one model, round after round.

    passes: rows of each pass, and whether it was a chain without the host.
    """

    def __init__(self, decoder: Any, length: int, timer: Timer, params: SamplingParams, **settings: Any):
        self.cache = drawn_cache(decoder, length)
        self.history = History(np.random.default_rng(length).integers(10, VOCAB, length + 1).tolist())
        self.drafter = create("partial", **{"policy": "recent", **settings})
        self.sampler = TritonSampler(params, VOCAB, eos=[1])
        self.sampler.begin_chapter(length // 2, length // 2)
        self.decoder, self.timer = decoder, timer
        self.passes: list[tuple[int, bool]] = []

    def propose(self, draft_tokens: int) -> DraftTree:
        context = Context(
            self.history, self.cache, self.decoder, self.sampler, self.decoder, FixedPlanner(draft_tokens).at(0),
            self.timer,
        )  # fmt: skip
        proposing, output = self.drafter.propose(context, draft_tokens + 1), None
        while True:
            try:
                asked: Pass = proposing.send(output)
            except StopIteration as end:
                tree: DraftTree = end.value
                return tree
            self.passes.append((len(asked.segment.tree), asked.chooser is not None))
            output = asked.compute()

    def accept(self, tokens: list[int]) -> None:
        """Commits the pending token and all but the last of these, whose rows are drawn as the others were."""
        self.cache.drop_tail()
        start = self.cache.length
        slots = self.cache.append(np.arange(start, start + len(tokens), dtype=np.int32), True)
        noise = torch.Generator().manual_seed(start)
        for part in (self.cache.pool.keys, self.cache.pool.values):
            part.flatten(2, 3)[:, :, slots] = torch.randn(2, 1, len(slots), part.shape[-1], generator=noise)
        self.cache.commit(range(len(tokens)))
        self.history.extend(tokens)

    def rows(self) -> torch.Tensor:
        """The keys and values of the chain's provisional rows."""
        slots = self.cache.slots(self.cache.length + np.array(self.drafter._chain.tail, np.int32))
        pool = self.cache.pool
        return torch.stack([part.flatten(2, 3)[:, :, slots] for part in (pool.keys, pool.values)])


def check_alike(one: Drafts, other: Drafts, draft_tokens: int) -> DraftTree:
    """Lets both draft. Returns the tree, which is the same to the bit, and so are the rows behind it."""
    tree, expected = one.propose(draft_tokens), other.propose(draft_tokens)
    assert tree.tokens.tolist() == expected.tokens.tolist() and tree.parents.tolist() == expected.parents.tolist()
    assert tree.chances == expected.chances
    assert torch.equal(one.rows(), other.rows()) and not one.rows().isnan().any()
    assert len(one.history) == len(other.history) == one.cache.length + 1
    return tree


@settings(max_examples=1, deadline=None)
@given(
    params=st.sampled_from(SAMPLERS),
    length=st.one_of(st.integers(1, 70), st.integers(120, 135), st.integers(185, 193)),
    view=st.sampled_from((64, 128, 640)),
    rounds=st.lists(st.tuples(st.integers(2, 4), st.integers(1, 9)), min_size=1, max_size=2),
    width=st.integers(1, 3),
)
@example(SAMPLERS[4], 63, 64, [(2, 62), (2, 1)], 1)
@example(SAMPLERS[2], 127, 64, [(4, 5), (4, 1)], 2)
def test_a_chain_is_what_the_host_makes_pass_by_pass(
    params: SamplingParams, length: int, view: int, rounds: list[tuple[int, int]], width: int
) -> None:
    """Over page borders and windows of a layer, for every rule of sampling, after texts that grow from round to
    round."""
    settings = {"view_tokens": view, "width": width}
    there = Drafts(DECODER, length, Timer(), params, **settings)
    host = Drafts(DECODER, length, InCompany(), params, **settings)
    for draft_tokens, accepted in rounds:
        tree = check_alike(there, host, draft_tokens)
        more = [*tree.tokens[1 : accepted + 1].tolist(), *range(10, 70)][:accepted]
        for drafts in (there, host):
            drafts.accept([token % VOCAB for token in more])
    assert not any(chain for _, chain in host.passes)
    expected = [min(16, tokens // width) for tokens, _ in rounds if tokens // width > 1]
    assert [rows for rows, chain in there.passes if chain][: len(expected)][:1] == expected[:1]


DECODER = new_decoder()


def test_a_chain_ends_where_nothing_can_be_chosen() -> None:
    """The embedding of a token that the chain comes to is NaN, and so are all logits after it."""
    decoder = new_decoder("llama")
    tree = Drafts(decoder, 66, Timer(), SAMPLERS[1], view_tokens=64, width=1).propose(4)
    bad = int(tree.tokens[2])
    assert bad not in tree.tokens[:2]
    decoder.weights["model.embed_tokens.weight"] = decoder.weights["model.embed_tokens.weight"].clone()
    decoder.weights["model.embed_tokens.weight"][bad] = torch.nan
    there, host = (Drafts(decoder, 66, timer, SAMPLERS[1], view_tokens=64, width=1) for timer in (Timer(), InCompany()))
    short = [drafts.propose(4) for drafts in (there, host)]
    assert short[0].tokens.tolist() == short[1].tokens.tolist() == tree.tokens[:3].tolist()
    assert there.passes == [(4, True)] and host.passes == [(1, False)] * 3
    for drafts in (there, host):
        drafts.accept([10, 11])
    check_alike(there, host, 2)


def test_the_host_waits_once_a_chain() -> None:
    """However long it is; its text, and where its rows go, are uploaded before it."""
    drafts = Drafts(DECODER, 130, Timer(), SAMPLERS[2], view_tokens=64, width=2)
    drafts.propose(4)
    uploads = set()
    for tokens in (4, 6):
        drafts.passes.clear()
        with Transfers() as transfers:
            drafts.propose(tokens)
        assert drafts.passes == [(tokens // 2, True)] and transfers.reads == 1
        assert transfers.read_bytes == tokens // 2 * 8 * 5
        uploads.add(transfers.uploads)
    assert len(uploads) == 1


def test_pages_that_are_chosen_on_the_device_stay_there() -> None:
    """The draft is the one under pages that the host chooses, and no round waits for them."""
    length, mass = 64 * 12 + 5, torch.rand(2, 9, 1, 13, generator=torch.Generator().manual_seed(0)) ** 9
    settings = {"policy": "mass", "view_tokens": 320, "width": 1}
    there, host = (Drafts(DECODER, length, timer, SAMPLERS[1], **settings) for timer in (Timer(), InCompany()))
    there.drafter.views.policy.observe_there(mass)
    host.drafter.views.policy.observe(Committed(length - 9, 9, mass.numpy()))
    check_alike(there, host, 2)
    chosen = host.drafter.views._chosen.pages
    assert there.drafter.views._chosen.there.tolist() == chosen.tolist() and chosen.shape == (2, 1, 5)
    for drafts in (there, host):
        drafts.accept([10, 11, 12, 13, 14, 15, 16, 17])
    there.passes.clear()
    with Transfers() as transfers:
        tree = there.propose(2)
    assert there.passes == [(2, True)] and transfers.reads == 1
    assert tree.tokens.tolist() == host.propose(2).tokens.tolist()


def test_recorded_chains_serve_every_text_of_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of two passes and of one, recorded once, make chains of any length after texts of any length."""
    monkeypatch.setattr("tokenswift_py.models.captured.LINKS", (2, 1))
    monkeypatch.setattr("tokenswift_py.models.captured.WARM_UPS", 1)
    recorded = []

    def noted(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        recorded.append(function)
        return record(function)

    decoder = new_decoder()
    there = Drafts(decoder, 61, Timer(), SAMPLERS[4], view_tokens=64, width=1)
    decoder.steps_over(there.cache.pool).recorder = Recorder(noted)
    host = Drafts(DECODER, 61, InCompany(), SAMPLERS[4], view_tokens=64, width=1)
    for draft_tokens, accepted, graphs in ((2, 68, 2), (3, 1, 4), (2, 1, 4)):
        tree = check_alike(there, host, draft_tokens)
        for drafts in (there, host):
            drafts.accept([*tree.tokens[1 : accepted + 1].tolist(), *range(10, VOCAB), *range(10, VOCAB)][:accepted])
        assert len(recorded) == graphs, "a view is another shape"


def test_a_chain_reads_the_copies_that_the_host_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 copies of full pages, one of which is made after the graph was recorded, by a kernel for pieces of two
    tiles."""
    monkeypatch.setattr("tokenswift_py.models.captured.LINKS", (1,))
    monkeypatch.setattr("tokenswift_py.models.captured.WARM_UPS", 1)
    monkeypatch.setattr(attention, "config", lambda *of, **kind: replace(configs.config(*of, **kind), tiles=2))
    decoder, recorded = new_decoder(), []

    def noted(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        recorded.append(function)
        return record(function)

    decoder.int8_pages = True
    settings = {"view_tokens": 64, "width": 1}
    there, host = (Drafts(decoder, 190, timer, SAMPLERS[1], **settings) for timer in (Timer(), InCompany()))
    decoder.steps_over(there.cache.pool).recorder = Recorder(noted)
    exact = Drafts(DECODER, 190, Timer(), SAMPLERS[1], **settings)
    exact.propose(2)
    for full in (2, 3):
        check_alike(there, host, 2)
        assert len(recorded) == 1 and there.passes[-1] == (2, True) and host.passes[-1] == (1, False)
        copied = there.cache.pool._copied.nonzero()[0]
        assert copied.tolist() == sorted(there.cache.pages[:full].tolist())
        if full == 2:
            assert not torch.equal(there.rows(), exact.rows()), "exact pages would give other rows"
        for drafts in (there, host):
            drafts.accept([10, 11, 12])


@pytest.mark.parametrize(
    "change",
    [
        {"processors": [lambda ids, scores: scores]},
        {"params": SamplingParams(ban_words=[[3, 4]])},
        {"params": SamplingParams(no_repeat_ngram_size=500)},
        {"first_end": 1000},
        {"grammar": SimpleNamespace(forced=lambda history: None)},
        {"memory": object()},
        {"timer": InCompany()},
    ],
)
def test_what_needs_the_host(change: dict[str, Any]) -> None:
    """It is found before the first pass, by one question."""
    drafts = Drafts(DECODER, 70, change.get("timer", Timer()), change.get("params", SamplingParams()), view_tokens=64)
    if "memory" in change:
        drafts.cache.memory = change["memory"]
    if {"first_end", "processors"} & change.keys():
        drafts.sampler = TritonSampler(SamplingParams(), VOCAB, eos=[1], **change)
    drafts.sampler.grammar = change.get("grammar")
    context = Context(drafts.history, drafts.cache, DECODER, drafts.sampler, DECODER, timer=drafts.timer)
    assert drafts.drafter._chooser(context) is None
    assert Drafts(DECODER, 70, Timer(), SamplingParams(), view_tokens=64).drafter._chooser(
        Context(drafts.history, drawn_cache(DECODER, 70), DECODER, TritonSampler(SamplingParams(), VOCAB), DECODER)
    )
