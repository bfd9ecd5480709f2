"""Draft heads: their formulas, their trees, the files they come from; they change no token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from conftest import tiny_config, tiny_model, weights_of
from random_heads import E, K, V, random_heads
from samplings import PROMPT, samplers
from scripted import write
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.checkpoints.cache import cache_folder
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.core import Acceptance, DraftTree, Output, SamplingParams, Segment
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.passes import Timer, compute
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.drafters import training
from tokenswift_py.drafters.base import Draft, Resources, for_run
from tokenswift_py.drafters.cascade import Cascade
from tokenswift_py.drafters.head_files import PACKAGED, find_heads, fingerprint, heads_file, read_heads, write_heads
from tokenswift_py.drafters.head_weights import FORMS, RANKS, HeadWeights
from tokenswift_py.drafters.heads import UNLIKELY, Heads
from tokenswift_py.drafters.partial import OwnChain
from tokenswift_py.models.clock import HostClock
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.options import Options
from tokenswift_py.planning.odds import Odds
from tokenswift_py.planning.planner import FixedPlanner, Gain, Planner
from tokenswift_py.sampling.reference import Sampler


def drafting(**parts: Any) -> Any:
    """A context of which only these parts are looked at."""
    return SimpleNamespace(plan=FixedPlanner().at(0), timer=Timer(), agreed=float, **parts)


def embedding_of(decoder: Any) -> torch.Tensor:
    return decoder.weights["model.embed_tokens.weight"]


@pytest.fixture(scope="module")
def native() -> tuple[NativeDecoder, dict[str, torch.Tensor]]:
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    config = tiny_config()
    weights = weights_of(tiny_model(config, torch.float32))
    packed = NativeWeights(ModelSpec.from_config(config), weights, torch.bfloat16, 2)
    return NativeDecoder(packed, rope_tables(config, 512)), weights


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-5)


def plain_logits(weights: HeadWeights, output: Output, embedded: list[torch.Tensor], lm_head: Any) -> torch.Tensor:
    """[K, V] by the papers' formulas, a vector at a time in double. embedded: of the token before each guess."""
    t = {name: tensor.double() for name, tensor in weights.tensors.items()}
    assert output.residual is not None
    rows, h = [], output.residual[-1].double()
    for i in range(K):
        if weights.form == "medusa":
            x = output.hidden[-1].double()
            for block in range(2):
                x = x + silu(t["weight"][i, block] @ x + t["bias"][i, block])
            rows.append((t["head"][i] if "head" in t else lm_head) @ x)
            continue
        h = h + t["weight"][i] @ (t["norm_in"][i] * rms(h))
        if weights.form == "recurrent":
            h = h + t["token"][i] @ rms(embedded[i].double())
        rows.append(lm_head @ (t["norm_out"][i] * rms(h)))
    return torch.stack(rows)


@pytest.mark.parametrize(("form", "own"), [*((form, False) for form in FORMS), ("medusa", True)])
@pytest.mark.parametrize("executor", ["torch", "native"])
def test_the_first_path_is_that_of_the_papers_formulas(
    tiny_decoder: Any, native: Any, executor: str, form: str, own: bool
) -> None:
    """Greedy, one candidate a head: the tree is a chain of the argmax of every head."""
    model, tensors = (tiny_decoder, tiny_decoder.weights) if executor == "torch" else native
    embedding, lm_head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"].double()
    for seed in range(6):
        weights = random_heads(form, own, seed=seed)
        drafter = Heads(replace(weights, acceptance=np.ones((K, 1))), embedding)
        prompt = [int(t) for t in np.random.default_rng(seed).integers(0, V, 20)]
        output = model.forward([Segment(DraftTree.chain(prompt[:-1]), model.new_cache(), causal=True)])
        context: Any = drafting(
            history=History(prompt),
            sampler=Sampler(SamplingParams(), V),
            self_draft=model,
        )
        compute(drafter.prefill(context, output))
        tree = compute(drafter.propose(context, 9))
        assert tree.is_chain and len(tree) == K + 1 and len(context.history) == 20
        expected = plain_logits(weights, output, [embedding[t] for t in tree.tokens[:K].tolist()], lm_head)
        best = expected.max(-1)
        chosen = expected[torch.arange(K), torch.tensor(tree.tokens[1:].tolist())]
        slack = 1e-4 if executor == "torch" else 0.02  # of the scores' spread: bf16 operands
        assert (best.values - chosen <= slack * expected.std()).all()


@pytest.mark.parametrize("executor", ["torch", "native"])
def test_the_residual_stream_is_what_the_final_norm_reads(tiny_decoder: Any, native: Any, executor: str) -> None:
    model, tensors = (tiny_decoder, tiny_decoder.weights) if executor == "torch" else native
    output = model.forward([Segment(DraftTree.chain(PROMPT), model.new_cache(), causal=True)], [])
    assert output.residual.shape == output.hidden.shape == (len(PROMPT), E)
    normed = torch.stack([rms(row) for row in output.residual.double()]) * tensors["model.norm.weight"].double()
    assert (normed - output.hidden.double()).abs().max() < 1e-3
    assert output.residual.pow(2).mean(-1).min() > 0


class Fixed:
    """A model whose LM head says the same whatever it reads: token t's logit is `logits[t]`."""

    def __init__(self, logits: list[float]):
        self.logits, self.clock = torch.tensor(logits), HostClock()

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits.repeat(len(hidden), 1)


def proposal(acceptance: Any, budget: int, form: str = "tokenswift", params: SamplingParams | None = None) -> Any:
    table = np.array(acceptance, np.float64)
    weights = random_heads(form)
    weights = replace(weights, tensors={name: t[: len(table)] for name, t in weights.tensors.items()}, acceptance=table)
    drafter = Heads(weights, torch.ones(V, E))
    logits = [float(-t) for t in range(V)]  # best tokens first: 0, 1, 2 ...
    sampler = Sampler(params or SamplingParams(), V)
    context = drafting(history=History([7]), sampler=sampler, self_draft=Fixed(logits))
    return drafter, drafter.tree(torch.ones(E), context, budget), context


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    return [tuple(tree.tokens[node] for node in tree.path(n)[1:]) for n in range(1, len(tree))]


@pytest.mark.parametrize("form", FORMS)
def test_the_most_probable_paths_are_proposed_first(form: str) -> None:
    acceptance = [[0.5, 0.3], [0.6, 0.2]]
    chances = {(0,): 0.5, (1,): 0.3, (0, 0): 0.3, (1, 0): 0.18, (0, 1): 0.1, (1, 1): 0.06}
    for budget in range(1, 9):
        _, tree, _ = proposal(acceptance, budget, form)
        assert paths(tree) == list(chances)[: min(budget - 1, 6)]
        assert tree.tokens[0] == 7


def test_hopeless_paths_are_left_out() -> None:
    _, tree, _ = proposal([[0.5, 0.009], [0.6, 0.019]], 9)
    assert paths(tree) == [(0,), (0, 0)]


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=3), st.integers(1, 12))
def test_any_acceptances_give_a_tree_of_the_likeliest_nodes(acceptance: list[list[float]], budget: int) -> None:
    """Likeliest first; and as only BEAM places a level get children, at least the likeliest path is there whole."""
    _, tree, _ = proposal(acceptance, budget)
    assert 1 <= len(tree) <= budget
    taken = [float(np.prod([acceptance[d][rank] for d, rank in enumerate(path)])) for path in paths(tree)]
    assert taken == sorted(taken, reverse=True)
    assert all(chance >= UNLIKELY for chance in taken)
    likeliest = np.cumprod([max(row) for row in acceptance])
    if len(tree) < budget:
        assert sum(chance >= UNLIKELY for chance in likeliest) == tree.depth.max()
    first = sorted((share for share in acceptance[0] if share >= UNLIKELY), reverse=True)
    assert taken[:1] == first[: budget - 1][:1]


def test_candidates_carry_the_noise_and_penalties_of_their_position() -> None:
    """Every level is ranked as the target would choose there: history, noise and penalties of the best path before."""
    params = SamplingParams(temperature=1.5, penalty=1.3, seed=5)
    acceptance = [[0.5, 0.3], [0.5, 0.3], [0.5, 0.3]]
    for form in FORMS:
        _, tree, context = proposal(acceptance, 9, form, params)
        history, expected = History([7]), []
        for _ in range(3):
            expected.append(context.sampler.rank(context.self_draft.logits, history, 2))
            history.append(expected[-1][0])
        assert len(context.history) == 1
        assert list(tree.children[0]) == expected[0]
        node = tree.children[0][expected[0][0]]
        assert list(tree.children[node]) == expected[1]
        assert expected[2][0] in tree.children[tree.children[node][expected[1][0]]]


def test_acceptances_follow_what_is_written() -> None:
    drafter, _, context = proposal([[0.5, 0.5], [0.5, 0.5]], 9)
    for _ in range(400):  # the first head's second candidate is always right, then the second head's first
        drafter.tree(torch.ones(E), context, 9)
        drafter.learn([1, 0, 9])
    before = shares(drafter)
    assert np.allclose(before, [[0, 1], [1, 0]], atol=0.15), "what was expected at first still counts as some guesses"
    drafter.learn([1, 0, 9])  # nothing was proposed since: nothing is learned
    assert shares(drafter) == before
    drafter.tree(torch.ones(E), context, 9)
    drafter.learn([30])  # neither candidate; of the second head nothing is known
    after = shares(drafter)
    assert after[0][0] < before[0][0] and after[0][1] < before[0][1] and after[1] == before[1]


def shares(drafter: Heads) -> list[list[float]]:
    """How often the candidates of each head are expected to be right."""
    return [[odds.chance for odds in ranks] for ranks in drafter.odds]


@settings(max_examples=15, deadline=None)
@given(
    params=samplers,
    form=st.sampled_from(FORMS),
    own=st.booleans(),
    seed=st.integers(0, 50),
    size=st.integers(1, 12),
    count=st.integers(1, 90),
)
def test_heads_change_no_token(
    tiny_decoder: Any, params: SamplingParams, form: str, own: bool, seed: int, size: int, count: int
) -> None:
    plain, _, _ = write(tiny_decoder, PROMPT, count, params)
    drafter = Heads(random_heads(form, own, seed=seed), embedding_of(tiny_decoder))
    drafted, engine, _ = write(tiny_decoder, PROMPT, count, params, drafter, draft_tokens=size)
    assert drafted == plain
    assert engine.cache.pool.in_use == 0


@settings(max_examples=10, deadline=None)
@given(params=samplers, form=st.sampled_from(FORMS), size=st.integers(1, 12))
def test_heads_change_no_token_on_the_native_engine(native: Any, params: SamplingParams, form: str, size: int) -> None:
    decoder, tensors = native
    plain, _, _ = write(decoder, PROMPT, 80, params)
    drafter = Heads(random_heads(form), tensors["model.embed_tokens.weight"])
    assert write(decoder, PROMPT, 80, params, drafter, draft_tokens=size)[0] == plain


@settings(max_examples=10, deadline=None)
@given(
    params=samplers,
    form=st.sampled_from(FORMS),
    view=st.sampled_from([64, 128, None]),
    size=st.none() | st.integers(1, 12),
    count=st.integers(1, 90),
)
def test_heads_within_the_cascade_change_no_token(
    tiny_decoder: Any, native: Any, params: SamplingParams, form: str, view: int | None, size: int | None, count: int
) -> None:
    """Their guesses are checked by draft passes and by the target; a size of None leaves both to the planner."""
    decoder, tensors = native
    for model, embedding in (
        (tiny_decoder, embedding_of(tiny_decoder)),
        (decoder, tensors["model.embed_tokens.weight"]),
    ):
        plain, _, _ = write(model, PROMPT, count, params)
        drafter = Cascade(heads=Heads(random_heads(form), embedding), view_tokens=view)
        drafted, engine, _ = write(model, PROMPT, count, params, drafter, draft_tokens=size)
        assert drafted == plain
        assert engine.cache.pool.in_use == 0
        asked = drafter.heads.cost.measured
        assert asked or count < 6 or size == 1, "heads are asked at least until it is known what they cost"


class Guarded:
    """A processor that lets one text pass and leaves no token after any other."""

    def __init__(self, text: list[int]):
        self.text = text

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores if ids[0].tolist() == self.text[: ids.shape[1]] else torch.full_like(scores, -torch.inf)


def test_a_guess_behind_which_nothing_can_be_chosen_ends_no_text(tiny_decoder: Any) -> None:
    """A grammar, say, that plain decoding keeps to: whether a guess leaves it is not for the drafter to find out."""
    plain, _, _ = write(tiny_decoder, PROMPT, 60)
    drafters = [make for form in FORMS for make in (
        lambda form=form: Heads(random_heads(form), embedding_of(tiny_decoder)),
        lambda form=form: Cascade(heads=Heads(random_heads(form), embedding_of(tiny_decoder))),
    )]  # fmt: skip
    for make, size in product(drafters, (None, 8)):
        sampler = Sampler(SamplingParams(), V, processors=[Guarded(PROMPT + plain)])
        loop = DecodeLoop(tiny_decoder, make(), sampler, Stops(60), draft_tokens=size)
        assert [token for step in loop.run(PROMPT) for token in step.tokens] == plain
        assert loop.stats.num_draft_tokens > 0 or size is None


def extended(acceptance: list[list[float]], gain: Gain, budget: int = 9, ms: float = 1e-6) -> tuple[Heads, Draft]:
    """The guesses that heads hang below the second node of a draft. Each head took `ms` until now."""
    drafter, _, context = proposal(acceptance, 1)
    for _ in range(20):
        drafter.cost.observe(1, 0, ms)
    draft = Draft(9, budget)
    assert draft.guess(0, 7, Odds(0.5)) == 1
    drafter.extend(draft, 1, torch.ones(E), SimpleNamespace(**{**vars(context), "plan": Planner().at(0)}), gain)
    return drafter, draft


def test_heads_go_on_behind_their_likeliest_guess_as_long_as_that_pays() -> None:
    acceptance = [[0.5, 0.3], [0.8, 0.1]]
    _, draft = extended(acceptance, lambda chance, rows: chance - 0.01)
    assert list(zip(draft.tokens, draft.parents, strict=True))[2:] == [(0, 1), (1, 1), (0, 2), (1, 2)]
    assert draft.chances[2:] == pytest.approx([0.25, 0.15, 0.2, 0.025]), "chances multiply from the root on"
    _, draft = extended(acceptance, lambda chance, rows: chance - 0.16)
    assert draft.tokens[2:] == [0, 0], "a guess that is not worth its row is left out"
    _, draft = extended(acceptance, lambda chance, rows: chance - 0.1 * rows)
    assert draft.tokens[2:] == [0], "rows may cost the more the more there are"
    _, draft = extended(acceptance, lambda chance, rows: chance, budget=4)
    assert len(draft) == 4, "no more than there is room for"
    drafter, draft = extended(acceptance, lambda chance, rows: chance, budget=2)
    assert len(draft) == 2
    drafter, _, context = proposal(acceptance, 1)
    drafter.extend(draft, 1, torch.ones(E), context, lambda chance, rows: float("inf"))
    assert not drafter.cost.measured, "and where there is none heads are not asked"


def test_heads_that_cost_more_than_they_save_are_not_asked_but_for_probes() -> None:
    acceptance = [[0.5, 0.3], [0.8, 0.1]]
    drafter, _, context = proposal(acceptance, 1)
    context.plan = Planner().at(0)
    for _ in range(20):
        drafter.cost.observe(1, 0, 1.0)
    asked = []
    for _ in range(30):
        draft = Draft(9, 9)
        drafter.extend(draft, 0, torch.ones(E), context, lambda chance, rows: chance / 1e5)
        asked.append(len(draft) > 1)
    assert asked[0] and not any(asked[9:]), "what saves microseconds is not worth a millisecond"
    _, draft = extended(acceptance, lambda chance, rows: 2 * chance, ms=0.3)
    assert len(draft) > 2


def test_heads_alone_are_not_asked_where_no_guess_is_worth_its_row() -> None:
    """Their products take time in every round. Probes tell when it pays again."""
    drafter, _, context = proposal([[0.3, 0.1], [0.3, 0.1]], 1)
    planner = Planner()
    for rows in (1, 2, 4, 8) * 4:
        planner.observe(0, rows, 1, {"draft": 0.0, "verify": 10.0 * rows, "accept": 0.1, "commit": 0.1, "learn": 0.1})
    context.plan, context.history = planner.at(0), History([7])
    context.agreed = lambda _: 1.0  # whatever this machine does beside
    row, asked = torch.ones(E), []
    drafter._row = row
    for _ in range(300):
        before = drafter._tree_cost._count
        tree = compute(drafter.propose(context, 9))
        asked.append(drafter._tree_cost._count > before)
        assert len(tree) == 1
        drafter.learn([5])
    assert asked[0] and not any(asked[40:])
    assert drafter.odds[0][0].tried > 3, "what was asked in vain was learned from"
    resting: Any = SimpleNamespace(**{**vars(context), "plan": SimpleNamespace(rests=True)})
    assert len(compute(drafter.propose(resting, 9))) == 1


def test_a_probe_of_heads_that_is_not_worth_a_row_is_learned_from() -> None:
    drafter, _ = extended([[0.5, 0.3]], lambda chance, rows: -1.0)
    context = proposal([[0.5, 0.3]], 1)[2]
    context.plan = Planner().at(0)
    for known, pending in ((1, False), (0, True)):
        chance = drafter.odds[0][0].chance
        drafter.extend(Draft(7, 9), 0, torch.ones(E), context, lambda chance, rows: -1.0, pending=pending)
        drafter.learn([0])
        assert (drafter.odds[0][0].chance > chance) == (not known)


@pytest.mark.parametrize(("reached", "asked"), [(0.95, True), (0.02, False)])
def test_a_guess_saves_no_more_of_a_draft_pass_than_its_token_is_worth(reached: float, asked: bool) -> None:
    """Heads take 1 ms and are mostly right, a draft pass takes 4: where the chain is likely to be wrong before, no pass
    would be made for what they guess."""
    heads, _, context = proposal([[0.9, 0.05]], 1)
    planner, drafter = Planner(), Cascade(heads=heads)
    for rows in (1, 2, 4, 8):
        planner.observe(0, rows, 1, {"draft": 0.0, "verify": 20.0 + rows, "accept": 0.1, "commit": 0.1, "learn": 0.1})
    for rows in (1, 2, 3, 4) * 6:
        drafter.views.cost.observe(rows, 96, 4.0 + 0.05 * rows)
        heads.cost.observe(1, 0, 1.0)
    context.plan = planner.at(0)
    while context.plan.may_probe(1.0):
        pass
    chain, ahead = OwnChain(7, 9, (0, 0)), Draft(7, 7)
    node = chain.draft.guess(0, 3, Odds(reached))
    assert node is not None
    chain.nodes.append(node)
    drafter.views.keys, drafter._row = 96, torch.ones(E)
    drafter._ask_heads(context, chain, ahead)
    assert (len(ahead) > 1) == asked


def test_what_became_of_heads_guesses_is_learned() -> None:
    drafter, draft = extended([[0.5, 0.3]], lambda chance, rows: chance)
    before = [odds.chance for odds in drafter.odds[0]]
    draft.learn(Acceptance((0, 1), (7, 1)))
    assert drafter.odds[0][0].chance < before[0] and drafter.odds[0][1].chance > before[1]
    tested = drafter.odds[0][0].tried
    draft.learn(Acceptance((0,), (3,)))
    assert drafter.odds[0][0].tried == tested, "guesses that the text did not come to say nothing"


@pytest.mark.parametrize("form", FORMS)
def test_chapters_and_accepted_drafts(tiny_decoder: Any, form: str) -> None:
    """After a forced turn the heads read its last row. With 8 candidates of 61 tokens some drafts are right."""
    params = SamplingParams(temperature=1.0, seed=4)
    plain, _, _ = write(tiny_decoder, PROMPT, 120, params)
    eos, turn = plain[12], [5, 6, 7, 8]
    whole, reference, _ = write(tiny_decoder, PROMPT, 120, params, eos=[eos], turns=[turn, turn])
    drafter = Heads(random_heads(form), embedding_of(tiny_decoder))
    drafted, engine, _ = write(
        tiny_decoder, PROMPT, 120, params, drafter, eos=[eos], turns=[turn, turn], draft_tokens=8
    )
    assert drafted == whole
    assert len(engine.turns) == len(reference.turns) < 2
    assert engine.stats.num_accepted_draft_tokens > 0


# Files


@pytest.fixture
def checkpoint(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    return open_checkpoint(str(tiny_folder))


def foreign(weights: HeadWeights, prefix: str) -> dict[str, torch.Tensor]:
    """The names that Medusa and TokenSwift give these tensors."""
    t, named = weights.tensors, {}
    for i in range(len(weights)):
        if weights.form == "tokenswift":
            at = f"{prefix}medusa_layers.{i}."
            named[f"{at}linear.weight"] = t["weight"][i].clone()
            named[f"{at}input_layernorm.weight"] = t["norm_in"][i].clone()
            named[f"{at}post_layernorm.weight"] = t["norm_out"][i].clone()
            continue
        for block in range(t["weight"].shape[1]):
            named[f"{prefix}{i}.{block}.linear.weight"] = t["weight"][i, block].clone()
            named[f"{prefix}{i}.{block}.linear.bias"] = t["bias"][i, block].clone()
        if "head" in t:
            named[f"{prefix}{i}.{t['weight'].shape[1]}.weight"] = t["head"][i].clone()
    return named


def same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("form", "own", "prefix"),
    [
        ("tokenswift", False, "model."),
        ("tokenswift", False, ""),
        ("medusa", True, ""),
        ("medusa", False, "medusa_head."),
    ],
)
@pytest.mark.parametrize("kind", [".pt", ".bin", ".safetensors", "folder"])
def test_converted_checkpoints_give_the_same_proposals(
    checkpoint: Checkpoint, tmp_path: Path, form: str, own: bool, prefix: str, kind: str
) -> None:
    vocab = checkpoint.spec.vocab_size
    weights = replace(random_heads(form, own, vocab=vocab), eps=checkpoint.spec.norm_eps)
    tensors = foreign(weights, prefix)
    if form == "tokenswift":
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)  # it keeps heads and model in one file
    path = tmp_path / ("heads" + kind)
    if kind == "folder":
        path.mkdir()
        names = sorted(tensors)
        save_file({name: tensors[name] for name in names[::2]}, path / "model-1.safetensors")
        save_file({name: tensors[name] for name in names[1::2]}, path / "model-2.safetensors")
    elif kind == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    found = find_heads(checkpoint, str(path))
    assert found.form == form and found.eps == weights.eps
    assert same_tensors(found.tensors, weights.tensors)
    embedding = checkpoint.tensors()["model.embed_tokens.weight"]
    sampler, rows = Sampler(SamplingParams(temperature=1, seed=2), vocab), torch.randn(5, E)
    model: Any = SimpleNamespace(project=lambda x: x @ embedding.T)
    for row in rows:
        context: Any = drafting(history=History([3, 4]), sampler=sampler, self_draft=model)
        trees = [Heads(w, embedding).tree(row, context, 12) for w in (weights, found)]
        assert trees[0].tokens.tolist() == trees[1].tokens.tolist() and len(trees[0]) == 12
    (converted,) = (tmp_path / "cache" / "heads").glob("*.safetensors")
    stamp = converted.stat().st_mtime_ns
    find_heads(checkpoint, str(path))
    assert converted.stat().st_mtime_ns == stamp, "converted once"


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_malformed_files_are_refused_in_one_line(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    medusa = foreign(random_heads("medusa"), "")
    swift = foreign(random_heads("tokenswift"), "model.")
    torch.save({"weights": Evil()}, "evil.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"lm_head.weight": torch.ones(2)}, "nothing.pt")
    torch.save({name: t for name, t in medusa.items() if name != "1.0.linear.bias"}, "gap.pt")
    torch.save({**medusa, "0.0.linear.weight": torch.zeros(3, 3)}, "uneven.pt")
    torch.save({name: t for name, t in swift.items() if "post" not in name}, "nonorm.pt")
    torch.save({name: torch.zeros(7, 7) if t.ndim == 2 else torch.zeros(7) for name, t in swift.items()}, "small.pt")
    torch.save({**medusa, "0.0.linear.bias": torch.full((E,), torch.nan)}, "nan.pt")
    Path("cut.pt").write_bytes(Path("nan.pt").read_bytes()[:500])
    Path("noise.safetensors").write_bytes(b"\xff" * 100)
    Path("empty").mkdir()
    for version, form in (("2", "medusa"), ("1", "eagle")):
        about = {"format": "tokenswift-heads", "version": version, "form": form}
        save_file({"weight": torch.zeros(1)}, f"{form}.safetensors", about)
    save_file({"weight": torch.zeros(1)}, "bare.safetensors", {"format": "tokenswift-heads", "version": "1"})
    for name, says in [
        ("nowhere.pt", "an existing file or folder"),
        ("evil.pt", "evil.pt is not a readable file of tensors"),
        ("list.pt", "a pickle of a dictionary of tensors"),
        ("nothing.pt", "the names of Medusa's or TokenSwift's tensors"),
        ("gap.pt", "pieces of bias"),
        ("uneven.pt", "all heads must have the same"),
        ("nonorm.pt", "for tokenswift"),
        ("small.pt", f"for this model it must be (3, {E}, {E})"),
        ("nan.pt", "finite"),
        ("cut.pt", "cut.pt is not a readable"),
        ("noise.safetensors", "noise.safetensors is not a readable"),
        ("empty", "a folder needs"),
        ("medusa.safetensors", "version"),
        ("eagle.safetensors", "form"),
        ("bare.safetensors", "bare.safetensors is not a readable file of heads"),
    ]:
        with pytest.raises(UserError) as error:
            find_heads(checkpoint, name)
        assert says in str(error.value) and str(error.value).startswith("draft_heads"), (name, str(error.value))
        assert "\n" not in str(error.value)
    assert not Path("executed").exists()


def test_our_file_keeps_everything(checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for form in FORMS:
        acceptance = np.arange(K * RANKS).reshape(K, RANKS) / 100
        weights = replace(
            random_heads(form), model=fingerprint(checkpoint), acceptance=acceptance, provenance={"seed": 1}
        )
        write_heads(weights, tmp_path / "a.safetensors")
        found = find_heads(checkpoint, str(tmp_path / "a.safetensors"))
        assert same_tensors(found.tensors, weights.tensors)
        assert (found.acceptance == acceptance).all()
        assert (found.form, found.eps, found.model, found.provenance) == (form, 1e-5, weights.model, {"seed": 1})
    assert not caplog.records
    write_heads(replace(weights, model="0" * 16), tmp_path / "a.safetensors")
    find_heads(checkpoint, str(tmp_path / "a.safetensors"))
    assert "another model" in caplog.text


def test_heads_are_found_by_their_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^draft_heads: None .*tokenswift train-heads --model"):
        find_heads(checkpoint)
    write_heads(random_heads("medusa"), heads_file(tmp_path / "cache", fingerprint(checkpoint)))
    assert find_heads(checkpoint).form == "medusa"


def test_packaged_heads_fit_the_package() -> None:
    """Under 5 MB, with the figures and the command beside."""
    files = sorted(PACKAGED.glob("*.safetensors"))
    assert files
    for file in files:
        assert file.stat().st_size < 5_000_000
        weights = read_heads(file)
        beside = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        assert beside == weights.provenance
        assert {"command", "seed", "tokens", "held_out_tokens", "top1", "top3"} <= beside.keys()
        assert file.name == f"heads-{weights.model}.safetensors"


def test_heads_that_are_trained_anew_leave_the_earlier_ones(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of training are not lost to a trial."""
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path))
    checkpoint = open_checkpoint(str(tiny_folder))
    first, second = random_heads("medusa"), random_heads("tokenswift")
    place = training.keep(first, checkpoint)
    before = place.read_bytes()
    assert training.keep(second, checkpoint) == place and place.read_bytes() != before
    (aside,) = tmp_path.glob(f"{place.stem}-*.safetensors")
    assert aside.read_bytes() == before and aside.with_suffix(".json").exists()


def test_texts_of_one_model_share_their_heads(tiny_folder: Path, tmp_path: Path) -> None:
    """Each text of a server would read, check and hold its own, as large as an LM head."""
    write_heads(random_heads("medusa"), tmp_path / "heads.safetensors")
    resources = Resources(open_checkpoint(str(tiny_folder)))
    options = Options.of(max_new_tokens=9, drafter="heads", draft_heads=str(tmp_path / "heads.safetensors"))
    one, two = (for_run(options, resources) for _ in range(2))
    assert isinstance(one, Heads) and isinstance(two, Heads)
    for each in (one, two):
        each.move(torch.device("cpu"))
    assert one.weights is two.weights and one.embedding is two.embedding and one.odds is not two.odds
    write_heads(random_heads("tokenswift"), tmp_path / "heads.safetensors")
    other = for_run(options, resources)
    assert isinstance(other, Heads) and other.weights.form == "tokenswift"


@pytest.mark.model
def test_packaged_heads_guess_what_the_default_model_writes(default_model: TokenSwift) -> None:
    """On a prompt that is not in the list. A chain of one guess a level: a floor for the first head alone."""
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    checkpoint = default_model.checkpoint
    packaged = heads_file(PACKAGED, fingerprint(checkpoint))
    swift = TokenSwift.from_pretrained(engine="native")
    settings: dict[str, Any] = {"max_new_tokens": 150, "temperature": 0.8, "min_p": 0.05, "seed": 3, "ignore_eos": True}
    prompt = "Write a story about two sisters who build a boat in the attic."
    plain = swift.generate(prompt, drafter="none", **settings)
    drafted = swift.generate(prompt, drafter="heads", draft_heads=str(packaged), draft_tokens=8, **settings)
    assert drafted.tokens == plain.tokens
    assert drafted.report["mean_acceptance_length"] > 1.5


def test_a_run_whose_drafts_are_gone_goes_on_without_them(
    tiny_folder: Path, checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Heads that lay in the cache, and a draft model that was named: no token depends on them."""
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine="torch")
    own, draft = heads_file(cache_folder(), fingerprint(checkpoint)), tmp_path / "draft"
    write_heads(random_heads("medusa"), own)
    shutil.copytree(tiny_folder, draft)
    settings: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True, "seed": 1}
    whole = swift.generate("the cat", drafter="none", **settings)
    for name, drafts in (("heads", {"drafter": "heads"}), ("model", {"draft_model": str(draft)})):
        with swift.stream("the cat", out=tmp_path / name, **settings, **drafts) as stream:
            next(iter(stream))
    own.unlink()
    shutil.rmtree(draft)
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine="torch")
    for name, field in (("heads", "draft_heads"), ("model", "draft_model")):
        caplog.clear()
        with swift.resume(tmp_path / name) as stream:
            list(stream)
        assert stream.result().tokens == whole.tokens
        assert f"{field}: " in caplog.text and "goes on by drafter auto, and is the same" in caplog.text
        with pytest.raises(UserError, match=field):
            swift.resume(tmp_path / name, **{field: str(tmp_path / "nowhere")})


def test_a_heads_run_reports_its_heads(tiny_folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "h.safetensors"
    write_heads(random_heads("recurrent"), file)
    for engine in ("native", "torch"):
        swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine=engine)
        plain = swift.generate("the cat", max_new_tokens=60, seed=1, ignore_eos=True, drafter="none")
        heads = swift.generate(
            "the cat", max_new_tokens=60, seed=1, ignore_eos=True, drafter="heads", draft_heads=str(file)
        )
        assert heads.tokens == plain.tokens
        assert heads.report["drafter"] == "heads"
        assert heads.report["parameters"]["draft_heads"] == str(file)
        with pytest.raises(UserError, match="draft_heads"):
            swift.generate("the cat", drafter="heads", draft_heads=str(tmp_path / "nowhere"))
        with pytest.raises(UserError, match="train-heads"):
            swift.generate("the cat", drafter="heads")
        options = {"max_new_tokens": 60, "seed": 1, "ignore_eos": True, "drafter": "cascade"}
        assert swift.generate("the cat", **options).tokens == plain.tokens, "cascade can do without"
        assert swift.generate("the cat", draft_heads=str(file), **options).tokens == plain.tokens
        with pytest.raises(UserError, match="draft_heads"):
            swift.generate("the cat", draft_heads=str(tmp_path / "nowhere"), **options)


def test_cascade_takes_heads_where_it_is_told_to(checkpoint: Checkpoint) -> None:
    def made(**settings: Any) -> Any:
        return for_run(Options(drafter="cascade", **settings), Resources(checkpoint))

    with pytest.raises(UserError, match=r"draft_heads: 'auto' .*there are none"):
        made(draft_heads="auto")
    file = heads_file(cache_folder(), fingerprint(checkpoint))
    write_heads(replace(random_heads("medusa"), model=fingerprint(checkpoint)), file)
    assert made(draft_heads="auto").heads.weights.form == "medusa"
    assert made().heads is None


def test_a_step_without_rows_proposes_nothing() -> None:
    context: Any = drafting(history=History([9]), sampler=Sampler(SamplingParams(), V))
    assert compute(Heads(random_heads("medusa"), torch.ones(V, E)).propose(context, 8)).tokens.tolist() == [9]


def test_what_verification_took_is_learned() -> None:
    """`observe` reads the row of the last accepted node and counts the tokens after the pending one."""
    drafter, tree, context = proposal([[0.5, 0.5]], 3, "medusa")
    hidden = torch.arange(3 * E).reshape(3, E).float()
    drafter.observe(Acceptance((0, 2), (int(tree.tokens[2]), 4)), Output(hidden, hidden))
    assert shares(drafter)[0][1] > 0.5 > shares(drafter)[0][0]
    compute(drafter.propose(context, 3))
    assert torch.equal(drafter._row, hidden[2])
