"""transformers' own cases of assisted generation, and of what `generate` is asked for, through `custom_generate`.

docs/transformers.md lists the cases of its suite (tests/generation), and says of each why it applies or not. The right
value is always transformers' own text, written greedily or by its own assisted generation.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AsyncTextIteratorStreamer,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
    WatermarkDetector,
    WatermarkingConfig,
)

from tokenswift_py import UserError, hf
from toys import tiny_config, tiny_model, tiny_tokenizer

TRIED = ("llama", "qwen2", "qwen3", "gemma3_text", "gemma2", "mistral", "phi3", "mixtral", "smollm3")
PROMPT = torch.tensor([[5, 9, 40, 9, 40, 9, 40]])
BATCH = torch.tensor([[0, 0, 0, 11, 7, 9], [5, 9, 40, 9, 40, 9], [0, 30, 2, 31, 2, 31]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14, "pad_token_id": 60}
OURS = {"custom_generate": hf.generate}


@functools.cache
def model_of(family: str, seed: int = 0, **changes: Any) -> Any:
    return tiny_model(tiny_config(family, **changes), torch.float32, seed)


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of("llama", num_hidden_layers=2)


def endless() -> Any:
    """A model that knows no end of text."""
    model = tiny_model(tiny_config(num_hidden_layers=2, eos_token_id=None, pad_token_id=None), torch.float32)
    model.generation_config.eos_token_id = None
    return model


def outcome(call: Callable[[], Any]) -> Any:
    """Returns ids, or the error that transformers and we both raise before anything is written."""
    try:
        ids = call()
    except (ValueError, TypeError) as error:
        return type(error), str(error)
    return ids.dtype, ids.tolist()


# Assisted generation


@pytest.mark.parametrize("family", TRIED)
@pytest.mark.parametrize("kind", ["random", "same"])
def test_assisted_text_is_the_greedy_one(family: str, kind: str) -> None:
    """An assistant none of whose guesses, or all of whose, are right, and no end before the last token."""
    model = model_of(family)
    assistant = model if kind == "same" else model_of(family, 5)
    asked = {"bad_words_ids": [[1, 0]], "repetition_penalty": 1.2, "remove_invalid_values": True}
    settings = {**GREEDY, **asked, "eos_token_id": -1, "max_new_tokens": 8, "return_dict_in_generate": True}
    assistant.generation_config.update(num_assistant_tokens=2, num_assistant_tokens_schedule="constant")
    greedy = model.generate(PROMPT, **settings).sequences.tolist()
    theirs = model.generate(PROMPT, assistant_model=assistant, **settings)
    ours = model.generate(PROMPT, assistant_model=assistant, tokenswift={"draft_tokens": 2}, **OURS, **settings)
    assert ours.sequences.tolist() == theirs.sequences.tolist() == greedy
    (report,) = ours.tokenswift
    assert report["drafter"] == "draft_model" and report["num_draft_tokens"] > 0 and type(ours) is type(theirs)


@pytest.mark.parametrize("family", TRIED)
def test_prompt_lookup_text_is_the_greedy_one(family: str) -> None:
    model, settings = model_of(family), {**GREEDY, "eos_token_id": -1}
    greedy = model.generate(PROMPT, **settings).tolist()
    theirs = model.generate(PROMPT, prompt_lookup_num_tokens=2, **settings).tolist()
    ours = model.generate(PROMPT, prompt_lookup_num_tokens=2, tokenswift={"drafter": "ngram"}, **OURS, **settings)
    assert ours.tolist() == theirs == greedy and ours.tokenswift[0]["drafter"] == "ngram"


def test_a_draft_out_of_the_prompt_ends_at_the_end_of_text(model: Any) -> None:
    """The prompt holds the text that will come, its end of text and what stood behind it, so all of it is drafted."""
    text = model.generate(PROMPT, **{**GREEDY, "max_new_tokens": 40})[0].tolist()
    prompt = torch.tensor([[*text, *text[: len(text) // 2]]])
    plain = {**GREEDY, "max_new_tokens": 12, "attention_mask": torch.ones_like(prompt)}
    new = model.generate(prompt, **plain)[0, prompt.shape[1] :].tolist()
    for end in dict.fromkeys(new):
        settings = {**plain, "eos_token_id": end}
        theirs = model.generate(prompt, prompt_lookup_num_tokens=4, max_matching_ngram_size=1, **settings)
        ours = model.generate(prompt, tokenswift={"drafter": "ngram", "draft_tokens": 8}, **OURS, **settings)
        written = ours[0, prompt.shape[1] :].tolist()
        assert ours.tolist() == theirs.tolist() and written == new[: new.index(end) + 1]


def test_a_sampled_assisted_text_has_its_length_and_is_the_unassisted_one(model: Any) -> None:
    settings = {**GREEDY, "do_sample": True, "eos_token_id": -1, "top_k": 10, "top_p": 0.7, "temperature": 0.7}
    torch.manual_seed(3)
    assisted = model.generate(PROMPT, assistant_model=model, **OURS, **settings)
    torch.manual_seed(3)
    assert assisted.tolist() == model.generate(PROMPT, **OURS, **settings).tolist()
    assert assisted.shape == (1, PROMPT.shape[1] + GREEDY["max_new_tokens"])


@pytest.mark.parametrize(
    "lengths",
    [
        {"min_new_tokens": 10, "max_new_tokens": 20},
        {"min_new_tokens": 10},
        {"max_new_tokens": 7},
        {"min_new_tokens": 10, "max_length": 20},
    ],
    ids=str,
)
def test_an_assisted_text_has_the_lengths_that_were_asked_for(model: Any, lengths: dict[str, int]) -> None:
    assistant = model_of("llama", 5, num_hidden_layers=1)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": list(range(40)), **lengths}
    theirs = model.generate(PROMPT, assistant_model=assistant, **settings)
    with warnings.catch_warnings(record=True) as heard:
        ours = model.generate(PROMPT, assistant_model=assistant, **OURS, **settings)
    assert ours.tolist() == theirs.tolist()
    assert [str(one.message) for one in heard if "length constraints" in str(one.message)] == []
    assert ours.shape[1] - PROMPT.shape[1] >= lengths.get("min_new_tokens", 1)


def test_what_only_hastens_assisted_generation_changes_nothing(model: Any) -> None:
    assistant = model_of("llama", 5, num_hidden_layers=1)
    greedy = model.generate(PROMPT, **GREEDY).tolist()
    for hastened in (
        {"assistant_early_exit": 1},
        {"assistant_model": assistant, "num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic"},
        {"assistant_model": assistant, "assistant_confidence_threshold": 0.4},
    ):
        theirs = model.generate(PROMPT, **GREEDY, **copy.copy(hastened))
        assert model.generate(PROMPT, **OURS, **GREEDY, **hastened).tolist() == theirs.tolist() == greedy


def test_an_assistant_helps_a_batch_too(model: Any) -> None:
    """transformers assists one row only."""
    assistant, settings = model_of("llama", 5, num_hidden_layers=1), {**GREEDY, "attention_mask": MASK}
    ours = model.generate(BATCH, assistant_model=assistant, **OURS, **settings)
    assert ours.tolist() == model.generate(BATCH, **settings).tolist()


def test_an_assistant_may_pad_the_vocabulary_otherwise() -> None:
    tokenizer, settings = tiny_tokenizer(), {**GREEDY, "pad_token_id": 0}
    model = model_of("llama", vocab_size=len(tokenizer), num_hidden_layers=2)
    padded = model_of("llama", 4, vocab_size=len(tokenizer) + 7, num_hidden_layers=1)
    ids = tokenizer("the cat and the dog", return_tensors="pt").input_ids
    both = {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer}
    ours = hf.generate(model, ids, assistant_model=padded, **both, **settings)
    assert ours.tolist() == model.generate(ids, assistant_model=padded, **both, **settings).tolist()
    assert ours.tokenswift[0]["drafter"] == "draft_model"
    both["assistant_tokenizer"] = tiny_tokenizer()
    both["assistant_tokenizer"].add_tokens(["zebra"])
    with pytest.raises(UserError, match=r"^assistant_model: .*token 289 is 'zebra' there"):
        hf.generate(model, ids, assistant_model=padded, **both, **settings)


# What generate is asked for


class Forcing(LogitsProcessor):
    """Forces a token by a score of +inf."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, (3 * ids[:, -1:] + 1) % 61, float("inf"))


class Multiples(StoppingCriteria):
    """Ends a row at a multiple of a number."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self, ids: torch.Tensor, scores: Any, **other: Any) -> torch.Tensor:
        return ids[:, -1] % self.number == 0


class Length(StoppingCriteria):
    """Tells for all rows at once, as a bool."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, ids: torch.Tensor, scores: Any, **other: Any) -> bool:  # type: ignore[override]
        return ids.shape[-1] >= self.length


def processors(*made: Any) -> dict[str, Any]:
    return {"logits_processor": LogitsProcessorList(made)}


def criteria(*made: Any) -> dict[str, Any]:
    return {"stopping_criteria": StoppingCriteriaList(made)}


def two_ways(row: int, ids: torch.Tensor) -> list[int]:
    return [int(3 * ids[-1] + 1) % 61, int(ids[-1] + row + 5) % 61]


LATE = list(range(40))  # ends of text that come at once, where nothing forbids them
ASKED: dict[str, Callable[[], dict[str, Any]]] = {
    "an end of text that no vocabulary has": lambda: {"eos_token_id": -1, "min_new_tokens": 5},
    "an end of text beyond the vocabulary": lambda: {"eos_token_id": 500, "min_length": 12},
    "one end of text": lambda: {"eos_token_id": 10},
    "several ends of text, one twice": lambda: {"eos_token_id": [10, 24, 33, 24], "min_new_tokens": 9},
    "no token for padding": lambda: {"pad_token_id": None, "eos_token_id": [10, 24, 33]},
    "more tokens at least than at most": lambda: {"eos_token_id": LATE, "min_length": 100, "min_new_tokens": 90},
    "both least lengths": lambda: {"eos_token_id": LATE, "min_length": 15, "min_new_tokens": 11},
    "suppressed tokens, some unknown": lambda: {"suppress_tokens": [3, 50, -1, 1000]},
    "all but one suppressed": lambda: {"suppress_tokens": list(range(1, 61))},
    "bad words, one the end of text": lambda: {"bad_words_ids": [[9, 40], [12], [1, 0]], "eos_token_id": 12},
    "an unknown bad word": lambda: {"bad_words_ids": [[900]]},
    "a list of biases": lambda: {"sequence_bias": [[[9], 2.0], [[40, 9], 5.0]]},
    "no token twice": lambda: {"no_repeat_ngram_size": 1, "max_new_tokens": 40},
    "no n-gram so long": lambda: {"no_repeat_ngram_size": 30},
    "prompt repeated": lambda: {"encoder_repetition_penalty": 1.5},
    "nothing of the prompt": lambda: {"encoder_no_repeat_ngram_size": 2},
    "forced ends": lambda: {"forced_eos_token_id": [2, 3], "eos_token_id": [2, 3]},
    "an end that becomes likelier": lambda: {"exponential_decay_length_penalty": (3, 1.3), "eos_token_id": 2},
    "guidance": lambda: {"guidance_scale": 1.5},
    "guidance without a cache": lambda: {"guidance_scale": 1.5, "use_cache": False},
    "guidance of one": lambda: {"guidance_scale": 1.0},
    "watermark by the text itself": lambda: {"watermarking_config": WatermarkingConfig(seeding_scheme="selfhash")},
    "watermark by SynthID": lambda: {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[10, 20], ngram_len=5)},
    "scores made probabilities": lambda: {"renormalize_logits": True, "remove_invalid_values": True},
    "allowed tokens": lambda: {"prefix_allowed_tokens_fn": two_ways},
    "a static cache": lambda: {"cache_implementation": "static"},
    "logits of all": lambda: {"logits_to_keep": 0},
    "an option that is none": lambda: {"do_samples": True},
    "an argument of nobody": lambda: {"foo": "bar"},
    "several texts, greedily": lambda: {"num_return_sequences": 2},
    "no tokens": lambda: {"max_new_tokens": 0},
    "no time": lambda: {"max_time": 0.0},
    "a forcing processor": lambda: processors(Forcing()),
    "a penalty of the caller": lambda: processors(RepetitionPenaltyLogitsProcessor(1.5)),
    "a penalty but for four tokens": lambda: processors(RepetitionPenaltyLogitsProcessor(1.5, 4)),
    "a processor beside its option": lambda: {
        "eos_token_id": LATE, "min_length": 9, **processors(MinLengthLogitsProcessor(15, 7)),
    },
    "the same processor twice": lambda: processors(
        SuppressTokensLogitsProcessor([3]), SuppressTokensLogitsProcessor([50, 10, 33])
    ),
    "a criterion that comes first": lambda: criteria(Length(12)),
    "a criterion that comes last": lambda: criteria(Length(90)),
    "a length of the caller": lambda: criteria(MaxLengthCriteria(11)),
    "ends of the caller": lambda: {"eos_token_id": 2, **criteria(EosTokenCriteria([10, 24, 33]))},
    "a criterion for each row": lambda: {"eos_token_id": 2, **criteria(Multiples(7))},
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED)
def test_what_generate_is_asked_for_is_done(model: Any, asked: str) -> None:
    made = ASKED[asked]
    for ids, mask in ((PROMPT, {}), (BATCH, {"attention_mask": MASK})):
        theirs, ours = (
            outcome(lambda call=call, ids=ids, mask=mask: model.generate(ids, **mask, **{**GREEDY, **made()}, **call))
            for call in ({}, OURS)
        )
        assert ours == theirs


def test_a_prompt_for_guidance_away_from_it(model: Any) -> None:
    away = {"negative_prompt_ids": torch.tensor([[3, 4]]), "negative_prompt_attention_mask": torch.tensor([[0, 1]])}
    texts = []
    for asked in ({}, away):
        texts.append(model.generate(PROMPT, guidance_scale=1.5, **GREEDY, **asked).tolist())
        assert model.generate(PROMPT, guidance_scale=1.5, **OURS, **GREEDY, **asked).tolist() == texts[-1]
    assert texts[0] != texts[1]


def test_a_watermark_is_detected(model: Any) -> None:
    asked = {"bias": 5.0, "seeding_scheme": "lefthash", "greenlist_ratio": 0.25, "hashing_key": 15485863}
    plain = {**GREEDY, "max_new_tokens": 40, "eos_token_id": -1, "repetition_penalty": 1.2}
    detector = WatermarkDetector(
        model_config=model.config, device="cpu", watermarking_config={**asked, "context_width": 1}
    )
    marked = model.generate(PROMPT, watermarking_config=asked, **OURS, **plain)
    found, other = (detector(ids[:, PROMPT.shape[1] :]) for ids in (marked, model.generate(PROMPT, **OURS, **plain)))
    assert found.tolist() == [True] and other.tolist() == [False]


@pytest.mark.parametrize("number", [4, 7, 13])
@pytest.mark.parametrize("pad", [None, 60])
def test_rows_that_a_criterion_ended_go_on_where_no_token_ends_a_text(number: int, pad: int | None) -> None:
    model, settings = endless(), {**GREEDY, "pad_token_id": pad, "repetition_penalty": 1.3, "attention_mask": MASK}
    theirs, ours = (model.generate(BATCH, **criteria(Multiples(number)), **settings, **call) for call in ({}, OURS))
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours[:, BATCH.shape[1] :].flatten().tolist()) - {60}) > 1


def test_the_default_length_is_warned_about(model: Any) -> None:
    settings = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    with pytest.warns(UserWarning, match="max_length"):
        ours = model.generate(PROMPT, **OURS, **settings)
    with pytest.warns(UserWarning, match="max_length"):
        assert ours.tolist() == model.generate(PROMPT, **settings).tolist()


def test_the_configs_say_what_the_call_leaves_open(model: Any) -> None:
    """The call's config first, then the model's. A length or end of text that the call resets is the call's."""
    model = copy.deepcopy(model)
    model.generation_config.update(min_length=30, max_length=30, bos_token_id=7, pad_token_id=0)
    for config in (
        GenerationConfig(max_length=20, min_length=0, do_sample=False, eos_token_id=-1),
        GenerationConfig(max_new_tokens=9, do_sample=False, bos_token_id=50),
        GenerationConfig(max_new_tokens=9, do_sample=False),
    ):
        for ids in ({"inputs": PROMPT}, {"input_ids": PROMPT}, {}):
            theirs = model.generate(generation_config=config, **ids).tolist()
            assert model.generate(generation_config=config, **OURS, **ids).tolist() == theirs
            assert hf.generate(model, generation_config=config, **ids).tolist() == theirs
    settings = {"do_sample": False, "eos_token_id": None, "attention_mask": MASK, "max_new_tokens": 30}
    assert hf.generate(model, BATCH, **settings).tolist() == model.generate(BATCH, **settings).tolist()


# Inputs


INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "positions": lambda _: {
        "inputs": BATCH, "attention_mask": MASK, "position_ids": (MASK.cumsum(1) - 1).masked_fill(MASK == 0, 1)
    },
    "one row of positions": lambda _: {"inputs": BATCH[:, 3:], "position_ids": torch.arange(3)[None]},
    "a mask of truth values": lambda _: {"inputs": BATCH, "attention_mask": MASK.bool()},
    "a mask of floats": lambda _: {"inputs": BATCH, "attention_mask": MASK.float()},
    "padding without a mask": lambda _: {"inputs": BATCH, "pad_token_id": 0},
    "32 bits": lambda _: {"inputs": PROMPT.int(), **criteria(Multiples(7))},
    "one token, then another": lambda _: {"inputs": PROMPT[:, :1], "forced_bos_token_id": 7},
    "one token, and the next not": lambda _: {
        "inputs": PROMPT[:, :1], "forced_bos_token_id": 7, "begin_suppress_tokens": [10, 33, 24]
    },
    "nothing": lambda _: {},
    "twice": lambda _: {"inputs": PROMPT, "input_ids": PROMPT},
    "a prompt too long": lambda _: {"inputs": PROMPT, "max_new_tokens": None, "max_length": 5},
    "an empty cache": lambda model: {"inputs": PROMPT, "past_key_values": DynamicCache(config=model.config)},
    "a static cache": lambda model: {"inputs": PROMPT, "past_key_values": StaticCache(model.config, max_cache_len=64)},
}  # fmt: skip


@pytest.mark.parametrize("given", INPUTS)
def test_inputs_are_read_as_generate_reads_them(model: Any, given: str) -> None:
    theirs, ours = (
        outcome(lambda call=call: model.generate(**{**GREEDY, **INPUTS[given](model)}, **call)) for call in ({}, OURS)
    )
    assert ours == theirs


# Text in and out


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.bos_token, tokenizer.padding_side = "<|endoftext|>", "<|im_start|>", "left"
    return tokenizer


@pytest.fixture(scope="module")
def speaker(tokenizer: Any) -> Any:
    return model_of("llama", vocab_size=len(tokenizer), num_hidden_layers=2)


def encoded(tokenizer: Any, *texts: str) -> dict[str, Any]:
    found = tokenizer(list(texts), return_tensors="pt", padding=True)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("end", [2, None])
@pytest.mark.parametrize("place", ["call", "config", "model"])
def test_a_stop_string_ends_the_rows_that_have_it(speaker: Any, tokenizer: Any, end: Any, place: str) -> None:
    prompts = encoded(tokenizer, "the cat and the dog", "the bird", "and then the rain began and the cat sat")
    settings = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": end}
    texts = tokenizer.batch_decode(speaker.generate(**prompts, **settings)[:, prompts["input_ids"].shape[1] :])
    stop = texts[1][len(texts[1]) // 2 :][:2]
    assert any(stop not in text for text in texts)
    speaker = copy.deepcopy(speaker)
    if place == "model":
        speaker.generation_config.stop_strings = [stop]
    elif place == "config":
        settings = {"generation_config": GenerationConfig(stop_strings=stop, **settings)}
    else:
        settings["stop_strings"] = stop
    theirs = speaker.generate(**prompts, tokenizer=tokenizer, **settings)
    assert hf.generate(speaker, **prompts, tokenizer=tokenizer, **settings).tolist() == theirs.tolist()


@pytest.mark.parametrize("texts", [("the ca",), ("the ca", "and the bir"), ("the cat and ",), ("the cat",), ("t",)])
def test_prompts_are_healed(speaker: Any, tokenizer: Any, texts: tuple[str, ...]) -> None:
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "token_healing": True}
    prompts = encoded(tokenizer, *texts)
    theirs = speaker.generate(**prompts, tokenizer=tokenizer, **settings)
    assert hf.generate(speaker, **prompts, tokenizer=tokenizer, **settings).tolist() == theirs.tolist()


@pytest.mark.parametrize("asked", [{}, {"skip_prompt": True}, {"skip_prompt": True, "skip_special_tokens": True}])
def test_a_streamer_prints_the_text(
    speaker: Any, tokenizer: Any, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, printed = encoded(tokenizer, "the cat")["input_ids"], []
    for call in ({}, OURS):
        streamer = TextStreamer(tokenizer, **asked)
        speaker.generate(prompt, streamer=streamer, do_sample=False, max_new_tokens=20, pad_token_id=0, **call)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_an_asynchronous_streamer_brings_the_text(speaker: Any, tokenizer: Any) -> None:
    prompt = encoded(tokenizer, "the cat")["input_ids"]

    async def streamed(**call: Any) -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True)
        speaker.generate(prompt, streamer=streamer, do_sample=False, max_new_tokens=20, pad_token_id=0, **call)
        return "".join([piece async for piece in streamer])

    assert asyncio.run(streamed(**OURS)) == asyncio.run(streamed()) != ""


def test_a_streamer_of_text_takes_one_row(speaker: Any, tokenizer: Any) -> None:
    prompts = encoded(tokenizer, "the cat", "the dog")
    for call in ({}, OURS):
        with pytest.raises(ValueError, match="batch size 1"):
            speaker.generate(**prompts, streamer=TextStreamer(tokenizer), max_new_tokens=3, pad_token_id=0, **call)


# Cases of what is not done here: it is refused by name


def continued(model: Any, whole: bool) -> dict[str, Any]:
    """Returns inputs that go on from the cache of an earlier call, with all tokens or the last one."""
    first = model.generate(PROMPT, **{**GREEDY, "max_new_tokens": 3}, eos_token_id=-1, return_dict_in_generate=True)
    ids = first.sequences if whole else first.sequences[:, -1:]
    return {"inputs": ids, "attention_mask": torch.ones_like(first.sequences), "past_key_values": first.past_key_values}


def embedded(model: Any) -> dict[str, Any]:
    return {"inputs_embeds": model.get_input_embeddings()(PROMPT).detach()}


REFUSED: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "embeddings": ("inputs_embeds", embedded),
    "embeddings and ids": ("inputs_embeds", lambda model: {"inputs": PROMPT, **embedded(model)}),
    "a cache and all tokens": ("past_key_values", lambda model: continued(model, whole=True)),
    "a cache and the last token": ("past_key_values", lambda model: continued(model, whole=False)),
    "a quantised cache": (
        "past_key_values",
        lambda _: {"inputs": PROMPT, "cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    ),
    "a text between those of two models": (
        "assistant_ensemble_weight",
        lambda model: {"inputs": PROMPT, "assistant_model": model, "assistant_ensemble_weight": 0.4},
    ),
    "a hole in the mask": ("attention_mask", lambda _: {"inputs": torch.tensor([[5, 0, 9, 4]]), "pad_token_id": 0}),
    "padding on the right": ("attention_mask", lambda _: {"inputs": BATCH.flip(1), "attention_mask": MASK.flip(1)}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_done_is_refused_by_name(model: Any, case: str) -> None:
    name, made = REFUSED[case]
    with pytest.raises(UserError, match=f"^{name}: ") as error:
        model.generate(**{**GREEDY, **made(model)}, **OURS)
    assert "\n" not in str(error.value)


def test_models_of_other_kinds_are_refused_by_name() -> None:
    sizes = {"vocab_size": 61, "d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16}
    encoder = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", decoder_start_token_id=0, **sizes))
    other = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=61, n_embd=48, n_layer=1, n_head=4, n_positions=64)
    )
    for model, name in ((encoder, "t5"), (other, "gpt2")):
        with pytest.raises(UserError, match=rf"^model family: '{name}'"):
            model.eval().generate(PROMPT, **OURS, **GREEDY)
    with pytest.raises(UserError, match=r"^assistant_model: model family: 'gpt2'"):
        model_of("llama").generate(PROMPT, assistant_model=other.eval(), **OURS, **GREEDY)


def test_what_transformers_would_write_without_us_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match=r"^cache_implementation: 'paged'"):
        hf.generate(model, PROMPT, cache_implementation="paged", **GREEDY)
