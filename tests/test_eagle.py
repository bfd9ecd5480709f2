"""EAGLE-3 drafts: their arithmetic, the window, the folders they come from; they change no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from conftest import tiny_config, tiny_model, weights_of
from dense_eagle import dense
from random_eagle import KV_HEADS, config_for, random_eagle, save_eagle, stored
from recorded_drafts import Recorded
from samplings import PROMPT, samplers
from scripted import write
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.core import DraftTree, SamplingParams, Segment
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.passes import Pass
from tokenswift_py.drafters.base import Resources, for_run
from tokenswift_py.drafters.cascade import Cascade
from tokenswift_py.drafters.chain import Confidence
from tokenswift_py.drafters.draft_folders import drafter_of
from tokenswift_py.drafters.eagle import Eagle
from tokenswift_py.drafters.eagle_files import read_eagle, write_eagle
from tokenswift_py.drafters.eagle_layer import EagleLayer
from tokenswift_py.drafters.own_layers import LATE, STALE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.options import Options
from tokenswift_py.sampling.reference import Sampler
from tokenswift_py.serving.together import together

V = 61
RULES: dict[str, dict[str, bool]] = {
    "EAGLE-3": {},
    "EAGLE 3.1": {"fc_norm": True, "norm_output": True},
    "speculators": {"norm_before_residual": True, "norm_before_fc": True},
}


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    """The model of `tiny_decoder`, by transformers."""
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def native() -> tuple[NativeDecoder, Any]:
    """The same in fp32 on the native engine, and by transformers."""
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    model = tiny_model(tiny_config(), torch.float32)
    packed = NativeWeights(ModelSpec.from_config(model.config), weights_of(model), torch.float32, 2)
    return NativeDecoder(packed, rope_tables(model.config, 512)), model.double()


def embedding_of(model: Any) -> torch.Tensor:
    return model.weights["model.embed_tokens.weight"]


class RecordedEagle(Recorded, Eagle):
    pass


@pytest.mark.parametrize("window", [1000, 24])
@pytest.mark.parametrize("rules", RULES)
@torch.inference_mode()
def test_drafts_are_those_of_the_published_rules(tiny_decoder: Any, hugging_face: Any, rules: str, window: int) -> None:
    """Every draft of a text whose drafts are partly right: after the prompt, which is read in chunks, after accepted
    rows and after dropped ones. A window of 24 is that of the latest rows."""
    layer = random_eagle(embedding_of(tiny_decoder), **RULES[rules])
    drafter = RecordedEagle(layer, window, width=1)
    params = SamplingParams(temperature=3.0, seed=3)
    _, loop, _ = write(tiny_decoder, PROMPT, 100, params, drafter, draft_tokens=4, prefill_chunk=7)
    assert 10 < loop.stats.num_accepted_draft_tokens < loop.stats.num_draft_tokens - 10
    sampler = Sampler(params, V)
    for text, drafted in drafter.seen[::6]:
        assert drafted[0] == text[-1]
        assert len(drafted) == 5 or len(text) + 5 > len(PROMPT) + 100
        for step in range(1, len(drafted)):
            ahead = drafted[1:step]
            logits = dense(layer, hugging_face, text, ahead, window)
            assert drafted[step] == sampler.choose(logits, History([*text, *ahead]))


def test_the_window_bounds_what_is_kept(tiny_decoder: Any) -> None:
    drafter = Eagle(random_eagle(embedding_of(tiny_decoder)), 24)
    write(tiny_decoder, PROMPT * 4, 150, SamplingParams(temperature=1.0), drafter, draft_tokens=4)
    for part in (drafter.rows.keys, drafter.rows.values):
        assert len(part) == 24
        assert part.untyped_storage().nbytes() == 24 * KV_HEADS * drafter.layer.shape.head_dim * 4
    assert len(drafter.layer.cos) == 256, "no position is that of the text"


@pytest.mark.parametrize(("window", "batches"), [(1000, [260]), (100, [100, 100])])
def test_rows_cost_nothing_until_a_draft_needs_them(tiny_decoder: Any, window: int, batches: list[int]) -> None:
    """Rows that come a few at a time are taken together. The layer then has what it had if it took each at once."""
    layer, rng = random_eagle(embedding_of(tiny_decoder)), np.random.default_rng(0)
    taps = torch.from_numpy(rng.standard_normal((LATE + 40, 3, tiny_decoder.spec.hidden_size), np.float32))
    tokens = rng.integers(0, V, len(taps)).astype(np.int32)
    late, taken = Eagle(layer, window), list[int]()
    take = late.take
    late.take = lambda taps, following: (taken.append(len(following)), take(taps, following))  # type: ignore
    at_once = Eagle(layer, window)
    at_once.take(taps, torch.from_numpy(tokens).long())
    for first in range(0, len(taps), 5):
        rows = slice(first, first + 5)
        late._see(taps[rows], first, tokens[rows])
        assert late.known == min(window, len(tokens[: first + 5]))
    assert taken == batches
    late.catch_up()
    for part in ("keys", "values"):
        torch.testing.assert_close(getattr(late.rows, part), getattr(at_once.rows, part))
    torch.testing.assert_close(late.state, at_once.state)
    late._see(taps[:3], 7, tokens[:3])  # rows between came from elsewhere
    assert late.known == 3 and len(late.rows) == 0


def test_at_rest_nothing_is_computed_anew(tiny_decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chance of the next guess is asked for where guesses were tested, else once in STALE rounds."""
    asked, chance = list[int](), Confidence.next
    monkeypatch.setattr(Confidence, "next", property(lambda self: asked.append(1) or chance.fget(self)))
    drafter = RecordedEagle(random_eagle(embedding_of(tiny_decoder)), 30)
    _, loop, _ = write(tiny_decoder, PROMPT, 100, SamplingParams(temperature=1.0), drafter, draft_tokens=1)
    rounds = loop.stats.num_spec_steps
    assert not loop.stats.num_draft_tokens and 0 < len(asked) <= rounds // STALE + 1
    asked.clear()
    write(tiny_decoder, PROMPT, 100, SamplingParams(temperature=1.0), drafter, draft_tokens=4)
    assert len(asked) > 20


@settings(max_examples=12, deadline=None)
@given(
    params=samplers,
    seed=st.integers(0, 20),
    window=st.sampled_from([1, 30, 500]),
    size=st.none() | st.integers(1, 12),
    chunk=st.integers(1, 80),
    count=st.integers(1, 90),
)
def test_eagle_changes_no_token(
    tiny_decoder: Any, native: Any, params: SamplingParams, seed: int, window: int, size: int | None, chunk: int,
    count: int,
) -> None:  # fmt: skip
    for model, embedding in ((tiny_decoder, embedding_of(tiny_decoder)), (native[0], embedding_of(tiny_decoder))):
        plain, _, _ = write(model, PROMPT, count, params)
        drafter = Eagle(random_eagle(embedding, seed=seed), window)
        drafted, loop, _ = write(model, PROMPT, count, params, drafter, draft_tokens=size, prefill_chunk=chunk)
        assert drafted == plain
        assert loop.cache.pool.in_use == 0


def test_chapters_and_accepted_drafts(tiny_decoder: Any, hugging_face: Any) -> None:
    """A forced turn is read like the prompt: drafts after it are those of the rules."""
    params = SamplingParams(temperature=2.0, seed=4)
    plain, _, _ = write(tiny_decoder, PROMPT, 120, params)
    eos, turn = plain[12], [5, 6, 7, 8]
    whole, _, _ = write(tiny_decoder, PROMPT, 120, params, eos=[eos], turns=[turn, turn])
    layer = random_eagle(embedding_of(tiny_decoder))
    drafter = RecordedEagle(layer, width=1)
    drafted, _, _ = write(tiny_decoder, PROMPT, 120, params, drafter, eos=[eos], turns=[turn, turn], draft_tokens=3)
    assert drafted == whole
    text, guesses = next(seen for seen in drafter.seen if seen[0][-5:-1] == turn)
    with torch.inference_mode():
        logits = dense(layer, hugging_face, text, [], 1000)
    assert guesses[1] == Sampler(params, V).choose(logits, History(text))


@pytest.mark.parametrize("executor", ["torch", "native"])
@torch.inference_mode()
def test_taps_are_what_enters_the_layers(tiny_decoder: Any, hugging_face: Any, native: Any, executor: str) -> None:
    """What transformers' model reports, whatever else a pass reports, and for the rows of each of two texts."""
    model, reference = (tiny_decoder, hugging_face) if executor == "torch" else native
    texts = [PROMPT, PROMPT[::-1][:20]]
    expected = [reference(torch.tensor([text]), output_hidden_states=True).hidden_states for text in texts]
    pool = model.new_pool(20)
    passes = [
        Pass(model, Segment(DraftTree.chain(text), KVCache(pool, 512), causal=True), [], taps=taps)
        for text, taps in zip(texts, ((0, 2), (1, 2)), strict=True)
    ]
    passes.append(Pass(model, Segment(DraftTree.chain([3]), KVCache(pool, 512)), []))
    *outputs, without = together(model, passes)
    assert without.taps is None
    for asked, output, layers in zip(passes, outputs, expected, strict=False):
        assert output.taps is not None and output.taps.shape == (len(asked.segment.tree), 2, 48)
        for i, tap in enumerate(asked.taps):
            error = (output.taps[:, i].double() - layers[tap][0].double()).abs().max()
            assert error <= 1e-5 * layers[tap][0].abs().max()


@pytest.mark.parametrize("executor", ["torch", "native"])
@pytest.mark.parametrize("taps", [(1, 1), (2, 0), (0, 3), (-1,)])
def test_layers_that_nothing_would_write_are_refused(
    tiny_decoder: Any, native: Any, taps: tuple[int, ...], executor: str
) -> None:
    model = tiny_decoder if executor == "torch" else native[0]
    with pytest.raises(ValueError, match="tapped layer"):
        model.forward([Segment(DraftTree.chain(PROMPT), KVCache(model.new_pool(20), 512), causal=True)], taps=taps)


# Folders


@pytest.fixture
def checkpoint(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    return open_checkpoint(str(tiny_folder))


def draft_for(checkpoint: Checkpoint, **rules: Any) -> EagleLayer:
    return random_eagle(checkpoint.tensors()["model.embed_tokens.weight"], **rules)


def same(found: EagleLayer, layer: EagleLayer) -> bool:
    assert found.shape.taps == layer.shape.taps and torch.equal(found.targets, layer.targets)
    assert torch.equal(found.embedding.float(), layer.embedding.float())
    return found.tensors.keys() == layer.tensors.keys() and all(
        torch.equal(found.tensors[name].float(), tensor) for name, tensor in layer.tensors.items()
    )


@pytest.mark.parametrize("rules", RULES)
def test_both_spellings_are_read(checkpoint: Checkpoint, tmp_path: Path, rules: str) -> None:
    """SafeAILab's, in two files, with layers by what leaves them; and speculators', with an embedding of its own."""
    layer = draft_for(checkpoint, **RULES[rules])
    config, tensors = config_for(layer), stored(layer)
    ids = config.pop("eagle_aux_hidden_state_layer_ids")
    nested = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in ids]}}
    folder = save_eagle(tmp_path / "one", {**config, **nested}, {n: t for n, t in tensors.items() if "mlp" not in n})
    save_file({name: tensor for name, tensor in tensors.items() if "mlp" in name}, folder / "more.safetensors")
    assert drafter_of(str(folder)) == "eagle" and same(read_eagle(folder, checkpoint), layer)

    own = ("draft_vocab_size", "fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    renamed |= {"embed_tokens.weight": layer.embedding + 1, "verifier_norm.weight": torch.ones(48)}
    outer = {"speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"], **{k: config[k] for k in own}}
    inner = {name: value for name, value in config.items() if name not in (*own, "architectures")}
    outer |= {"transformer_layer_config": inner, "eagle_aux_hidden_state_layer_ids": ids}
    found = read_eagle(save_eagle(tmp_path / "two", outer, renamed), checkpoint)
    assert same(found, EagleLayer(layer.shape, layer.tensors, layer.embedding + 1, layer.targets))
    for rule, value in RULES[rules].items():
        assert getattr(found.shape, rule) == value


def test_what_is_written_is_read_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    layer = draft_for(checkpoint)
    write_eagle(layer, tmp_path / "new", checkpoint.spec.layers, {"seed": 1})
    found = read_eagle(tmp_path / "new", checkpoint)
    rounded = {name: tensor.bfloat16().float() for name, tensor in layer.tensors.items()}
    assert same(found, EagleLayer(layer.shape, rounded, layer.embedding, layer.targets))
    assert found.shape.rope.rope_parameters == layer.shape.rope.rope_parameters


def test_without_an_lm_head_it_has_the_models(checkpoint: Checkpoint, tmp_path: Path) -> None:
    layer = draft_for(checkpoint)
    tensors = {name: tensor for name, tensor in stored(layer).items() if name not in ("lm_head.weight", "d2t")}
    config = {**config_for(layer), "draft_vocab_size": None}
    found = read_eagle(save_eagle(tmp_path / "folder", config, tensors), checkpoint)
    assert torch.equal(found.tensors["lm_head.weight"], checkpoint.tensors()["lm_head.weight"])
    assert found.targets.tolist() == list(range(checkpoint.spec.vocab_size))


def test_other_folders_are_refused_in_one_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    layer = draft_for(checkpoint)
    config, tensors = config_for(layer), stored(layer)
    fc, offsets = "fc.weight", tensors["d2t"]
    long = "midlayer.self_attn.q_proj.weight"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {fc: tensors[fc][:, :-1]}, f"tensor {fc}: (48, 143) is not allowed; it must be (48, 144)"),
        ({}, {long: tensors[long][:-2]}, "it must be (48, 96)"),
        ({}, {fc: None}, f"tensor {fc}: None"),
        ({}, {fc: torch.full_like(tensors[fc], torch.nan)}, "finite"),
        ({}, {fc: tensors[fc].long()}, "type of tensor"),
        ({}, {"midlayer.self_attn.q_norm.weight": torch.ones(8)}, "no draft of this config has it"),
        ({}, {"layers.0.hidden_norm.weight": torch.ones(48)}, "it must be there once"),
        ({}, {"embed_tokens.weight": torch.ones(4, 48)}, "tensor embed_tokens.weight: (4, 48)"),
        ({}, {"d2t": offsets + 1000}, "tokens are 0 to"),
        ({}, {"d2t": offsets - torch.arange(len(offsets))}, "each token must be named once"),
        ({}, {"d2t": offsets[:-1]}, "tensor d2t"),
        ({}, {"d2t": offsets.float()}, "tensor d2t"),
        ({}, {"d2t": None}, "need it"),
        ({"num_hidden_layers": 2}, {}, "num_hidden_layers: 2"),
        ({"hidden_act": "gelu"}, {}, "hidden_act: 'gelu'"),
        ({"hidden_size": "48"}, {}, "hidden_size of config.json: '48'"),
        ({"num_key_value_heads": 4}, {}, "a divisor of 6 heads"),
        ({"target_hidden_size": 96}, {}, "hidden size: 96 is not allowed; the model's is 48"),
        ({"hidden_size": 24, "target_hidden_size": 48}, {}, "it must be there"),
        ({"vocab_size": 99}, {}, "vocab_size: 99"),
        ({"rms_norm_eps": "small"}, {}, "rms_norm_eps: 'small'"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 2, 1]}, {}, "3 that ascend, of 0 to 2"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}, {}, "3 that ascend, of 0 to 2"),
        ({"eagle_aux_hidden_state_layer_ids": None}, {}, "3 that ascend, of 0 to 2"),
        ({"eagle_aux_hidden_state_layer_ids": "all"}, {}, "a list of layers"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, {}, "use_aux_hidden_state: False"),
        ({"rope_scaling": {"type": "spiral"}}, {}, ""),
    ]  # fmt: skip
    for number, (changes, others, says) in enumerate(cases):
        held = {name: tensor for name, tensor in {**tensors, **others}.items() if tensor is not None}
        folder = save_eagle(tmp_path / str(number), {**config, **changes}, held)
        refused(lambda folder=folder: Eagle(read_eagle(folder, checkpoint)).layer.reach(9), says)
    folder = save_eagle(tmp_path / "pickle", config, {})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(lambda: read_eagle(folder, checkpoint), "pytorch_model.bin is a pickle and is not read: save its tensors")
    (folder / "pytorch_model.bin").unlink()
    refused(lambda: read_eagle(folder, checkpoint), "it needs *.safetensors")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    refused(lambda: read_eagle(folder, checkpoint), "model.safetensors is not a readable")
    (folder / "config.json").write_text("{")
    refused(lambda: drafter_of(str(folder)), "is not a readable config")


def refused(work: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        work()
    assert says in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_a_folder_says_which_drafter_it_is_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    layer = draft_for(checkpoint)
    folder = str(save_eagle(tmp_path / "eagle", config_for(layer), stored(layer)))
    medusa = tmp_path / "medusa"
    medusa.mkdir()
    (medusa / "config.json").write_text('{"medusa_num_heads": 3, "medusa_num_layers": 1}')
    save_file({f"{i}.0.linear.weight": torch.zeros(48, 48) for i in range(3)}, medusa / "medusa_lm_head.safetensors")
    resources = Resources(checkpoint)
    made = [for_run(Options(drafter=name, draft_heads=folder), resources) for name in ("eagle", "heads", "auto")]
    assert all(isinstance(drafter, Eagle) for drafter in made)
    assert len({id(drafter.layer) for drafter in made if isinstance(drafter, Eagle)}) == 1, "texts share the layer"
    bounded = for_run(Options(drafter="eagle", draft_heads=folder, draft_budget=64), resources)
    assert bounded.window == 64 and made[0].window == 1024
    assert isinstance(for_run(Options(), resources), Cascade)
    refused(
        lambda: for_run(Options(drafter="cascade", draft_heads=folder), resources),
        "this draft is for drafter eagle, heads or auto",
    )
    says = "for drafter eagle a folder whose config.json is an EAGLE-3 draft's"
    refused(lambda: for_run(Options(drafter="eagle", draft_heads=str(medusa)), resources), says)
    refused(lambda: for_run(Options(drafter="eagle"), resources), "train-heads --form eagle")


def test_a_text_with_its_drafter_is_the_plain_one_also_when_it_was_resumed(
    tiny_swift: TokenSwift, tmp_path: Path
) -> None:
    layer = draft_for(tiny_swift.checkpoint)
    folder = save_eagle(tmp_path / "eagle", config_for(layer), stored(layer))
    asked: dict[str, Any] = {"max_new_tokens": 120, "seed": 5, "temperature": 1.2, "draft_tokens": 4}
    heads: dict[str, Any] = {"draft_heads": str(folder), "ignore_eos": True}
    plain = tiny_swift.generate("the cat", drafter="none", ignore_eos=True, **asked)
    drafted = tiny_swift.generate("the cat", drafter="eagle", **heads, **asked)
    assert drafted.tokens == plain.tokens
    assert drafted.report["drafter"] == "eagle" and drafted.report["num_draft_tokens"] > 0
    with tiny_swift.stream("the cat", out=tmp_path / "run", **heads, **asked) as stream:
        for _ in zip(range(30), stream, strict=False):
            pass
    with tiny_swift.resume(tmp_path / "run") as stream:
        for _ in stream:
            pass
        assert stream.result().tokens == plain.tokens
