"""Inside transformers: `custom_generate` writes what `model.generate` writes, over the model's own weights."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from tokenswift_py import TokenSwift, UserError, hf
from tokenswift_py.hf.held import EngineSettings, executor_of, held
from tokenswift_py.models.executors import NativeExecutor
from toys import FAMILIES, chi_square, pairs, save_tiny, tiny_config, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PROMPT = torch.tensor([[5, 9, 40, 9, 40, 9, 40]])
BATCH = torch.tensor([[0, 0, 0, 11, 7, 9], [5, 9, 40, 9, 40, 9], [0, 30, 2, 31, 2, 31]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 60}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(tiny_config(), torch.float32)


def both(model: Any, ids: torch.Tensor, **settings: Any) -> tuple[Any, Any]:
    """Returns the output of transformers, and its output with our `generate`."""
    return model.generate(ids, **settings), model.generate(ids, custom_generate=hf.generate, **settings)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_every_family_is_that_of_generate(family: str, tied: bool) -> None:
    window = {"sliding_window": 24} if family == "mistral" else {}
    model = tiny_model(tiny_config(family, tie_word_embeddings=tied, **window), torch.float32)
    theirs = model.generate(PROMPT, **GREEDY)
    ours = model.generate(PROMPT, custom_generate=hf.generate, tokenswift={"draft_tokens": 3}, **GREEDY)
    assert ours.tolist() == theirs.tolist()
    (report,) = ours.tokenswift
    assert report["guarantee"] == "measured" and report["engine"] == "torch" and report["num_draft_tokens"] > 0


def test_positions_beyond_the_trained_ones_are_met_as_transformers_meets_them() -> None:
    model = tiny_model(tiny_config(max_position_embeddings=32), torch.float32)
    theirs, ours = both(model, PROMPT, **GREEDY)
    assert ours.tolist() == theirs.tolist()


class Counting(LogitsProcessor):
    """Keeps state: lifts another token at every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, torch.dtype]] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls.append((ids.shape[1], scores.dtype))
        scores = scores.clone()
        scores[:, (7 * len(self.calls) + ids[0, -1]) % 61] += 2.0
        return scores


class Until(StoppingCriteria):
    """Ends where two tokens of the same parity follow one another, and writes down what it is called with."""

    def __init__(self, parity: int = 0) -> None:
        self.parity = parity
        self.calls: list[tuple[list[int], Any]] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **other: Any) -> torch.Tensor:
        self.calls.append((ids[0].tolist(), scores))
        return ((ids[:, -2:] % 4) == self.parity).all(1)


ASKED: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.3},
    "a reward for repetition": {"repetition_penalty": 0.8},
    "repetition penalty, bans and a bias": {
        "repetition_penalty": 1.2, "suppress_tokens": [3, 50], "sequence_bias": {(9,): 2.0, (4, 5): -3.0}
    },
    "no repeated pair": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[9, 40], [12]]},
    "end of text": {"eos_token_id": [10, 24, 33]},
    "end of text, not too early": {"eos_token_id": [10, 24, 33], "min_new_tokens": 17},
    "least length, padding counted": {"eos_token_id": list(range(40)), "min_length": 20},
    "most length": {"max_length": 23, "max_new_tokens": None},
    "forced end": {"forced_eos_token_id": 2, "eos_token_id": 2},
    "an end that becomes likelier": {"eos_token_id": 2, "exponential_decay_length_penalty": (5, 1.5)},
    "nothing of it first": {"begin_suppress_tokens": list(range(20, 61))},
    "watermark": {"watermarking_config": {"bias": 2.5, "seeding_scheme": "lefthash"}},
    "no cache": {"use_cache": False},
    "lookup": {"prompt_lookup_num_tokens": 3},
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED)
def test_what_generate_is_asked_for_is_done(model: Any, asked: str) -> None:
    settings = {**GREEDY, **ASKED[asked]}
    theirs, ours = both(model, PROMPT, **settings)
    assert ours.tolist() == theirs.tolist()
    if asked != "lookup":  # transformers looks up for one row only
        theirs, ours = both(model, BATCH, attention_mask=MASK, **settings)
        assert ours.tolist() == theirs.tolist()


def test_guidance_calls_the_model_as_transformers_does(model: Any) -> None:
    theirs, ours = both(model, PROMPT, guidance_scale=1.4, **GREEDY)
    assert ours.tolist() == theirs.tolist()
    theirs, ours = both(model, BATCH, attention_mask=MASK, guidance_scale=1.4, **GREEDY)
    assert ours.tolist() == theirs.tolist()


def test_the_config_of_the_call_and_of_the_model_count() -> None:
    model = tiny_model(tiny_config(), torch.float32)
    model.generation_config.update(eos_token_id=[10, 24, 33], repetition_penalty=1.1, pad_token_id=0)
    config = GenerationConfig(max_new_tokens=30, no_repeat_ngram_size=3)
    theirs = model.generate(PROMPT, generation_config=config)
    assert model.generate(PROMPT, generation_config=config, custom_generate=hf.generate).tolist() == theirs.tolist()
    assert hf.generate(model, PROMPT, generation_config=config).tolist() == theirs.tolist()


def test_processors_and_criteria_are_called_as_generate_calls_them(model: Any) -> None:
    processors, criteria = [Counting(), Counting()], [Until(), Until()]
    theirs, ours = (
        model.generate(
            PROMPT, logits_processor=LogitsProcessorList([processors[number]]),
            stopping_criteria=StoppingCriteriaList([criteria[number]]), **GREEDY, **custom,
        )
        for number, custom in enumerate(({}, {"custom_generate": hf.generate}))
    )  # fmt: skip
    assert ours.tolist() == theirs.tolist() and theirs.shape[1] < PROMPT.shape[1] + 30
    assert processors[0].calls == processors[1].calls
    assert criteria[0].calls == criteria[1].calls and criteria[1].calls[-1] == (ours[0].tolist(), None)


def test_a_criterion_ends_each_row_of_a_batch_by_itself(model: Any) -> None:
    settings = {**GREEDY, "attention_mask": MASK, "eos_token_id": 2}
    theirs, ours = (
        model.generate(BATCH, stopping_criteria=StoppingCriteriaList([Until(3)]), **settings, **custom)
        for custom in ({}, {"custom_generate": hf.generate})
    )
    assert ours.tolist() == theirs.tolist()
    assert len({report["new_tokens"] for report in ours.tokenswift}) > 1


def test_stop_strings_end_the_text_where_transformers_ends_it(tiny_folder: Path) -> None:
    tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = tokenizer("the cat and the dog", return_tensors="pt").input_ids
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 60, "pad_token_id": 0}
    text = tokenizer.decode(model.generate(ids, **settings)[0, ids.shape[1] :])
    stop = text[len(text) // 2 :][:3]
    theirs = model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **settings)
    assert theirs.shape[1] < ids.shape[1] + 60
    assert hf.generate(model, ids, stop_strings=[stop], tokenizer=tokenizer, **settings).tolist() == theirs.tolist()


def test_without_a_mask_and_without_a_prompt(model: Any) -> None:
    theirs, ours = (
        model.generate(bos_token_id=3, **GREEDY, **custom) for custom in ({}, {"custom_generate": hf.generate})
    )
    assert ours.tolist() == theirs.tolist()


def test_the_output_of_generate_and_a_report_beside_it(model: Any) -> None:
    theirs, ours = both(model, PROMPT, return_dict_in_generate=True, **GREEDY)
    assert type(ours) is type(theirs) and ours.sequences.tolist() == theirs.sequences.tolist()
    assert list(ours.keys()) == ["sequences"] and ours.tokenswift[0]["numerics"].startswith("torch-")


def test_a_streamer_gets_the_prompt_each_token_and_the_end(model: Any) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.tolist())

        def end(self) -> None:
            self.seen.append("end")

    theirs, ours, direct = Recorder(), Recorder(), Recorder()
    model.generate(PROMPT, streamer=theirs, **GREEDY)
    model.generate(PROMPT, streamer=ours, custom_generate=hf.generate, **GREEDY)
    hf.generate(model, PROMPT, streamer=direct, **GREEDY)
    assert theirs.seen == ours.seen == direct.seen and ours.seen[-1] == "end"


def test_a_text_streamer_of_transformers(tiny_folder: Path) -> None:
    tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    text = model.generate(ids, custom_generate=hf.generate, streamer=streamer, pad_token_id=0, max_new_tokens=20)
    assert "".join(streamer) == tokenizer.decode(text[0, ids.shape[1] :])


# Sampling


def distribution(model: Any, token: int, **settings: Any) -> Any:
    """[vocab] what transformers samples the next token from: the softmax of its own scores."""
    out = model.generate(
        torch.tensor([[token]]), max_new_tokens=1, output_scores=True, return_dict_in_generate=True, **settings
    )
    return out.scores[0][0].double().softmax(-1).numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8, "top_k": 5, "top_p": 0.93, "min_p": 0.02},
        {"temperature": 1.3, "top_k": 0, "typical_p": 0.8},
        {"temperature": 0.9, "top_k": 6, "epsilon_cutoff": 0.05, "renormalize_logits": True},
        {"temperature": 1.2, "top_k": 0, "top_h": 0.8},
    ],
    ids=["filters", "typical", "epsilon", "entropy"],
)
def test_samples_have_the_distribution_of_transformers(settings: dict[str, Any]) -> None:
    """Without attention a token depends on the one before it alone: a text is many samples, most of them drafted."""
    config = tiny_config(vocab_size=7, num_hidden_layers=1, eos_token_id=None, max_position_embeddings=2048)
    model = tiny_model(config, torch.float32)
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    settings = {"do_sample": True, "pad_token_id": 0, **settings}
    wanted = np.stack([distribution(model, token, **settings) for token in range(7)])
    torch.manual_seed(5)
    text = model.generate(
        torch.tensor([[1, 4, 2]]), custom_generate=hf.generate, max_new_tokens=600, **settings,
        tokenswift={"drafter": "partial", "draft_tokens": 4, "on_loop": "ignore"},
    )  # fmt: skip
    assert text.tokenswift[0]["num_draft_tokens"] > 100
    assert chi_square(pairs(text[0, 2:].tolist(), 7), wanted) > 1e-3
    assert chi_square(pairs(text[0, 2:].tolist(), 7), wanted**2 / (wanted**2).sum(1, keepdims=True)) < 1e-3


def test_torchs_seed_is_the_seed(model: Any) -> None:
    def texts(seed: int, count: int = 3, **tokenswift: Any) -> Any:
        torch.manual_seed(seed)
        return model.generate(
            PROMPT, custom_generate=hf.generate, tokenswift=tokenswift, num_return_sequences=count,
            **{**GREEDY, "do_sample": True, "max_new_tokens": 12},
        ).tolist()  # fmt: skip

    assert texts(1) == texts(1) != texts(2)
    assert texts(1) == texts(1, drafter="none") and len({tuple(row) for row in texts(1)}) == 3
    assert texts(1, 1) == texts(1)[:1]
    state = torch.random.get_rng_state()
    model.generate(PROMPT, custom_generate=hf.generate, **GREEDY)
    assert torch.equal(state, torch.random.get_rng_state())


def test_penalties_of_ours_beside_those_of_generate(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine="torch")
    dry = {"dry_multiplier": 100.0, "dry_length": 1, "dry_breakers": ["\n"]}
    wanted = swift.generate(PROMPT[0].tolist(), max_new_tokens=30, min_new_tokens=30, temperature=0.0, **dry)
    settings = {**GREEDY, "min_new_tokens": 30, "eos_token_id": list(swift.checkpoint.eos)}
    ours = hf.generate(model, PROMPT, tokenswift={**dry, "tokenizer": tiny_tokenizer()}, **settings)
    assert ours[0, PROMPT.shape[1] :].tolist() == wanted.tokens
    assert hf.generate(model, PROMPT, **settings).tolist() != ours.tolist()


# The model's own weights


@pytest.mark.parametrize("family", FAMILIES)
def test_the_executor_has_the_models_own_tensors(family: str) -> None:
    model = tiny_model(tiny_config(family, tie_word_embeddings=family == "qwen2"), torch.float32)
    executor = executor_of(held(model), EngineSettings())
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    weights = executor._weights  # type: ignore[attr-defined]
    copied = {name for name, tensor in weights.items() if tensor.untyped_storage().data_ptr() not in own}
    assert all("norm" in name for name in copied) and (not copied or family.startswith("gemma"))
    assert own == {tensor.untyped_storage().data_ptr() for tensor in weights.values()} or copied


def test_stacked_experts_are_views_under_the_names_of_their_checkpoint(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("qwen2_moe"), torch.float32)
    model.save_pretrained(tmp_path)
    state, stored = model.state_dict(), load_file(tmp_path / "model.safetensors")
    tensors = held(model).checkpoint.held
    experts = [name for name in stored if ".experts." in name]
    assert experts and not set(experts) & state.keys() and set(experts) <= tensors.keys()
    assert all(torch.equal(tensors[name], stored[name]) for name in experts)


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_a_change_of_the_weights_is_seen_and_nothing_is_loaded_twice(engine: str) -> None:
    model = tiny_model(tiny_config(), torch.float32)
    settings = {"tokenswift": {"engine": engine, "threads": 1}, "custom_generate": hf.generate, **GREEDY}

    def kept() -> Any:
        executors = held(model).executors
        return list(executors.values())

    for change in (
        lambda: None,
        lambda: model.model.norm.weight.mul_(torch.linspace(-1, 1, 48)),
        lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.flip(0))),
        lambda: model.load_state_dict(tiny_model(tiny_config(), torch.float32, seed=7).state_dict()),
    ):
        with torch.no_grad():
            change()
        theirs = model.generate(PROMPT, **GREEDY)
        assert model.generate(PROMPT, **settings).tolist() == theirs.tolist()
        (before,) = kept()
        model.generate(PROMPT, **settings)
        assert kept() == [before] and before.name == engine
    hf.forget(model)
    assert kept() == []


def test_what_is_kept_of_a_model_goes_with_it() -> None:
    model = tiny_model(tiny_config(), torch.float32)
    model.generate(PROMPT, custom_generate=hf.generate, **GREEDY)
    executor = weakref.ref(executor_of(held(model), EngineSettings()))
    del model
    gc.collect()
    assert executor() is None


def test_the_native_engine_by_name() -> None:
    model = tiny_model(tiny_config("qwen3"), torch.bfloat16)
    settings = {"custom_generate": hf.generate, **GREEDY, "max_new_tokens": 20}
    native = model.generate(PROMPT, tokenswift={"engine": "native"}, **settings)
    assert native.tokenswift[0]["guarantee"] == "bitwise" and native.tokenswift[0]["dtype"] == "bf16"
    plain = model.generate(PROMPT, tokenswift={"engine": "native", "drafter": "none"}, **settings)
    assert native.tolist() == plain.tolist()


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_drafts_and_changes_nothing(model: Any, engine: str, do_sample: bool) -> None:
    assistant = tiny_model(tiny_config(num_hidden_layers=1), torch.float32, seed=3)
    for second, least in ((assistant, 1.0), (model, 3.0)):
        settings = {**GREEDY, "do_sample": do_sample, "tokenswift": {"engine": engine, "seed": 4, "draft_tokens": 4}}
        alone = hf.generate(model, PROMPT, **settings)
        assisted = model.generate(PROMPT, custom_generate=hf.generate, assistant_model=second, **settings)
        assert assisted.tolist() == alone.tolist()
        (report,) = assisted.tokenswift
        assert report["drafter"] == "draft_model" and report["mean_acceptance_length"] >= least


def test_an_assistant_is_packed_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant, packed = tiny_model(tiny_config(num_hidden_layers=1), torch.float32, seed=3), []
    beside = NativeExecutor.beside
    monkeypatch.setattr(NativeExecutor, "beside", lambda self, *of: packed.append(of) or beside(self, *of))
    for _ in range(3):
        settings = {**GREEDY, "tokenswift": {"engine": "native"}, "assistant_model": assistant}
        model.generate(PROMPT, custom_generate=hf.generate, **settings)
    assert len(packed) == 1


@pytest.mark.parametrize("skip", [0, 3, 7, 20])
def test_new_tokens_are_counted_from_where_a_processor_counts_them(model: Any, skip: int) -> None:
    favoured = SequenceBiasLogitsProcessor([[[2], 30.0]])  # the end, at once
    settings = {**GREEDY, "eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 20}
    texts = [
        model.generate(
            PROMPT,
            logits_processor=LogitsProcessorList([MinNewTokensLengthLogitsProcessor(skip, 9, 2), favoured]),
            **settings, **more,
        ).tolist()
        for more in ({}, {"custom_generate": hf.generate})
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_log_probabilities_that_nobody_gets_are_refused(model: Any) -> None:
    with pytest.raises(UserError, match="logprobs"):
        model.generate(PROMPT, custom_generate=hf.generate, **GREEDY, tokenswift={"logprobs": 2})


def test_an_assistant_in_torch_keeps_the_weights_that_it_has(model: Any) -> None:
    settings = {**GREEDY, "tokenswift": {"draft_weights": "int8"}, "assistant_model": model}
    with pytest.raises(UserError, match=r"draft_weights: 'int8' is not allowed; engine torch has its own as they are$"):
        model.generate(PROMPT, custom_generate=hf.generate, **settings)


# What is not done is said


REFUSED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 2},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low", "trust_remote_code": True},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "synced_gpus": {"synced_gpus": True},
    "position_ids": {"position_ids": torch.arange(7)[None] + 3},
    "attention_mask": {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]])},
    "tokenswift": {"tokenswift": {"temperature": 0.5}},
    "tokenswift: 'draft_model'": {"tokenswift": {"draft_model": "there"}},
    "tokenswift: 'dry_multiplier'": {"tokenswift": {"dry_multiplier": 0.8}},
    "engine": {"tokenswift": {"engine": "gpu"}},
    "dtype": {"tokenswift": {"dtype": "bf16"}},
    "drafter": {"tokenswift": {"drafter": "crystal ball"}},
    "assistant_model: vocab_size": {
        "assistant_model": tiny_model(tiny_config(vocab_size=50, num_hidden_layers=1), torch.float32)
    },
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_done_is_refused_by_name(model: Any, field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}") as error:
        model.generate(PROMPT, custom_generate=hf.generate, **{**GREEDY, **REFUSED[field]})
    assert "\n" not in str(error.value)


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def patched(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: x


def replaced(model: Any) -> None:
    class Halved(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    model.lm_head = Halved(48, 61, bias=False)


def biased(model: Any) -> None:
    model.lm_head.bias = torch.nn.Parameter(torch.ones(61))


def half(model: Any) -> None:
    model.half()


def mixed(model: Any) -> None:
    model.model.norm.double()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (hooked, r"module model.layers.0: 'a forward hook'"),
        (patched, r"module model.layers.0.mlp: 'another forward'"),
        (replaced, r"module lm_head: .*Halved"),
        (biased, r"tensor: \['lm_head.bias'\]"),
        (half, r"dtype: torch.float16"),
        (mixed, r"tensor model.norm.weight: 'torch.float64 on cpu'"),
    ],
)
def test_a_model_that_does_more_than_its_config_tells_is_refused(change: Callable[[Any], None], line: str) -> None:
    model = tiny_model(tiny_config(), torch.float32)
    change(model)
    with pytest.raises(UserError, match=line):
        model.generate(PROMPT, custom_generate=hf.generate, **GREEDY)


# A folder as hubs have it


def test_a_folder_with_custom_generate(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    theirs, folder = model.generate(PROMPT, **GREEDY), str(ROOT / "examples" / "hub")
    ours = model.generate(PROMPT, custom_generate=folder, trust_remote_code=True, **GREEDY)
    assert ours.tolist() == theirs.tolist() and ours.tokenswift[0]["engine"] == "torch"
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(PROMPT, custom_generate=folder, trust_remote_code=False, **GREEDY)


def test_a_checkpoint_that_brings_it_generates_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_tiny(tmp_path / "model")
    shutil.copytree(ROOT / "examples" / "hub" / "custom_generate", tmp_path / "model" / "custom_generate")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    settings = {"do_sample": False, "max_new_tokens": 30, "tokenizer": tiny_tokenizer(), "stop_strings": ["cat"]}
    ours = trusted.generate(PROMPT, **settings)
    assert ours.tolist() == plain.generate(PROMPT, **settings).tolist() and len(ours.tokenswift) == 1
