"""`generate` for transformers: to be given to `model.generate` as `custom_generate`, or called with a model itself."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import QuantizedCache, StoppingCriteriaList, StopStringCriteria
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, GenerationMixin, MaxLengthCriteria

from tokenswift_py.checkpoints.loading import check_same_vocabulary
from tokenswift_py.drafters.base import kind_of
from tokenswift_py.errors import about, check, check_text
from tokenswift_py.hf.held import EngineSettings, Held, HeldCheckpoint, executor_of, held
from tokenswift_py.hf.rows import AsInTransformers, Criteria, Until
from tokenswift_py.hf.settings import Asked, Prompts, asked, check_config, own_settings
from tokenswift_py.loaded import LoadedModel
from tokenswift_py.models.executors import Executor
from tokenswift_py.options import Options
from tokenswift_py.runs.plan import prepare
from tokenswift_py.runs.result import Result
from tokenswift_py.runs.stream import Stream

logger = logging.getLogger("tokenswift")

ASSISTANT, TOKENIZERS = "assistant_model", ("tokenizer", "assistant_tokenizer")
# These arguments of a model's forward change no token here, because the cache is ours.
UNUSED = ("use_cache", "logits_to_keep", "cache_position")
DROPPED = ("streamer", ASSISTANT, "synced_gpus")
STRINGS, HEALING = "stop_strings", "token_healing"


def generate(
    model: Any,
    input_ids: torch.Tensor | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    tokenswift: Mapping[str, Any] | None = None,
    **model_kwargs: Any,
) -> Any:
    """Writes the text that `model.generate` writes, by speculation.

    In `model.generate(inputs, custom_generate=generate, ...)` transformers calls it, everything prepared. Called by
    `generate(model, inputs, ...)` it takes the arguments of `model.generate`, and has transformers prepare them.

    tokenswift: settings: engine (torch over the model's own tensors, which is the default, or native), dtype, kv_dtype,
                attention, threads and deterministic of `TokenSwift.from_pretrained`; and of `Options` those of
                drafting, of positions, the lossy mode and penalties of ours, `seed` and `tokenizer`.

    Returns the result of `model.generate`, with an attribute `tokenswift`: a report for each sequence. Raises UserError
    in one line for whatever is not done here.
    """
    if not hasattr(generation_config, "_eos_token_tensor"):  # then nothing is prepared
        own = {
            "inputs": input_ids, "logits_processor": logits_processor, "stopping_criteria": stopping_criteria,
            "generation_config": generation_config, "synced_gpus": synced_gpus, "streamer": streamer,
        }  # fmt: skip
        own = {name: value for name, value in own.items() if value is not None}
        return through_transformers(model, tokenswift, **own, **model_kwargs)
    assert input_ids is not None
    told = {"streamer": streamer, "synced_gpus": synced_gpus, ASSISTANT: model_kwargs.pop(ASSISTANT, None)}
    told = {name: value or not_handed_over(name) for name, value in told.items()}
    check(not told["synced_gpus"], "synced_gpus", True, "one process writes here")
    tokenizers = [model_kwargs.pop(name, None) for name in TOKENIZERS]
    call = Call(model, input_ids, told["streamer"], told[ASSISTANT], tokenizers, generation_config)
    return call.write(logits_processor or (), stopping_criteria or (), tokenswift, model_kwargs)


def through_transformers(model: Any, tokenswift: Mapping[str, Any] | None, **given: Any) -> Any:
    """Has `model.generate` prepare the inputs and call `generate` again, with the arguments that it would not hand
    over."""
    paged = given.get("cache_implementation")
    check(paged != "paged", "cache_implementation", paged, "transformers writes by itself with it; leave it out")
    kept = {name: given.pop(name) for name in TOKENIZERS if name in given}
    kept |= {name: given[name] for name in ("streamer", ASSISTANT) if name in given}
    if (tokenizer := kept.get("tokenizer")) is not None:
        configs = (given.get("generation_config"), model.generation_config)
        if strings := given.get(STRINGS, told_by(configs, STRINGS)):
            criteria = with_strings(given.get("stopping_criteria") or (), tokenizer, strings)
            given |= {"stopping_criteria": criteria, STRINGS: None}
        if given.get(HEALING, told_by(configs, HEALING)):
            given = {**healed(model, tokenizer, given), HEALING: False}
    return type(model).generate(model, custom_generate=partial(generate, tokenswift=tokenswift, **kept), **given)


def told_by(configs: Sequence[Any], name: str) -> Any:
    """Returns the first of the configs' values that is not None."""
    values = [getattr(config, name, None) for config in configs]
    return next((value for value in values if value is not None), None)


def with_strings(criteria: Sequence[Any], tokenizer: Any, strings: str | list[str]) -> StoppingCriteriaList:
    """Returns the criteria and the one of stop strings, which transformers does not make where it calls another's
    function."""
    wanted = [strings] if isinstance(strings, str) else list(strings)
    for string in wanted:
        check_text(STRINGS, string)
    return StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, wanted)])


def healed(model: Any, tokenizer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments with healed prompts, whose length may have changed."""
    name = "inputs" if given.get("inputs") is not None else "input_ids"
    check(given.get(name) is not None, HEALING, True, "there must be prompts, as token ids")
    ids, mask = model.heal_tokens(given[name], tokenizer), given.get("attention_mask")
    if mask is not None and bool((mask == 1).all()):
        mask = torch.ones_like(ids)
    return {**given, name: ids, "attention_mask": mask}


def not_handed_over(name: str) -> Any:
    """Returns an argument of the `model.generate` that called us. Up to 5.23 transformers hands none of DROPPED to a
    function of another's, and to leave them out without a word would be wrong."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame.f_locals.get(name) if frame.f_code is code and name in DROPPED else None


class NoTokenizer:
    """Stands for a tokenizer where there are only token ids: no token is special, none has a text."""

    chat_template = None
    eos_token_id = None
    added_tokens_decoder: Mapping[int, Any] = {}

    @property
    def backend_tokenizer(self) -> NoTokenizer:
        return self

    def id_to_token(self, token: int) -> None:
        """Returns None, because no id has a text."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""

    def batch_decode(self, tokens: Sequence[Any]) -> list[str]:
        check(False, "tokenswift", "dry_multiplier", "it reads texts of tokens: give tokenizer beside it")
        return []

    def __len__(self) -> int:
        return 0


class InMemory(LoadedModel):
    """A model of transformers, ready to write.

    eos: the tokens that end a text, and no others. assistant: the model that drafts. kept: see `LoadedModel`.
    """

    def __init__(
        self, checkpoint: HeldCheckpoint, eos: tuple[int, ...], tokenizer: Any, executor: Executor, assistant: Any,
        kept: dict[str, Any],
    ):  # fmt: skip
        super().__init__(checkpoint, tokenizer, executor, {})
        self.checkpoint = replace(checkpoint, eos=eos)
        self.kept = kept
        self._assistant: LoadedModel | None = assistant

    def draft(self, options: Options) -> LoadedModel | None:
        return self._assistant if kind_of(options.chosen_drafter).has_second_model else None


@dataclass(frozen=True)
class Call:
    """One call: a batch of prompts, padded on the left, whose texts are written one after the other."""

    model: Any
    input_ids: torch.Tensor
    streamer: Any
    assistant: Any
    tokenizers: Sequence[Any]
    config: Any

    def write(
        self, processors: Any, criteria: Any, tokenswift: Mapping[str, Any] | None, model_kwargs: Mapping[str, Any]
    ) -> Any:
        kept = held(self.model)
        check_config(self.config)
        padding = paddings(self.input_ids, model_kwargs)
        rows, length = self.input_ids.shape
        check(self.streamer is None or rows == 1, "streamer", rows, "with one sequence only")
        engine, own = own_settings(tokenswift)
        check(own.get("trace") is None or rows == 1, "trace", own.get("trace"), "with one sequence only")
        eos, room, others = ends(criteria, length)
        prompts = Prompts(length, padding, eos, kept.checkpoint.spec.vocab_size)
        found = asked(processors, bool(self.config.do_sample), prompts)
        known = tuple(prompts.known(eos))
        loaded = self.load(kept, engine, known, own.pop("tokenizer", None) or NoTokenizer(), own)
        options = {**self.options(found, room), **own}

        write_row = partial(self.write_row, loaded, found, options, padding)
        results = [
            write_row(row, Criteria(others, self.input_ids[row], pad, room) if others else None)
            for row, pad in enumerate(padding)
        ]
        if not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
            # Where no token ends a text, transformers writes on what a criterion ended until it has ended every row.
            longest = max(len(result.tokens) for result in results)
            for row, result in enumerate(results):
                if len(result.tokens) < longest:
                    results[row] = write_row(row, Until(length - padding[row] + longest))
        return self.returned(results)

    def write_row(
        self, loaded: InMemory, found: Asked, options: Mapping[str, Any], padding: Sequence[int], row: int, also: Any
    ) -> Result:
        """Writes the text of one row. also: another end of it, asked after each token."""
        ids, pad = self.input_ids[row], padding[row]
        called = [AsInTransformers(processor, ids[:pad], row, len(padding)) for processor in found.processors]
        run = prepare(loaded, ids[pad:].tolist(), Options.of(**options, logits_processors=called, stream=row))
        with Stream(loaded, run) as stream:
            stream.loop.stops.also = also
            return self.follow(stream)

    def load(
        self, kept: Held, engine: EngineSettings, eos: tuple[int, ...], tokenizer: Any, own: Mapping[str, Any]
    ) -> InMemory:
        executor, assistant = executor_of(kept, engine), None
        if self.assistant is not None:
            with about(ASSISTANT):
                second = held(self.assistant)
                self.check_vocabulary(second, kept)
                weights = own.get("draft_weights", "auto")
                if executor.name == "native":
                    beside = second.beside(executor, weights)
                else:
                    check(weights in ("auto", "bf16"), "draft_weights", weights, "engine torch has its own as they are")
                    beside = executor_of(second, replace(engine, dtype=None, kv_dtype=None))
                assistant = LoadedModel(second.checkpoint, NoTokenizer(), beside, {})
        return InMemory(kept.checkpoint, eos, tokenizer, executor, assistant, kept.kept)

    def check_vocabulary(self, second: Held, first: Held) -> None:
        """Raises UserError for an assistant of another vocabulary. Where both tokenizers are told, they show it. The
        same vocabulary may have more rows in one embedding than in the other."""
        if all(tokenizer is not None for tokenizer in self.tokenizers):
            target, own = (tokenizer.get_vocab() for tokenizer in self.tokenizers)
            check_same_vocabulary(second.checkpoint.name, own, target)
        else:
            sizes = second.checkpoint.spec.vocab_size, first.checkpoint.spec.vocab_size
            allowed = f"the model's vocabulary, of {sizes[1]}; tokenizer and assistant_tokenizer would show it"
            check(sizes[0] == sizes[1], "vocab_size", sizes[0], allowed)

    def options(self, found: Asked, room: int) -> dict[str, Any]:
        options = {**found.options, "max_new_tokens": room}
        options["min_new_tokens"] = min(options.get("min_new_tokens", 0), room)
        if self.assistant is not None:
            options["draft_model"] = ASSISTANT
        if self.config.do_sample:  # one draw from torch's generator, so that torch.manual_seed tells the text
            options["seed"] = int(torch.randint(2**63 - 1, ()))
        return options

    def follow(self, stream: Stream) -> Result:
        """Writes the text and shows each token to the streamer. transformers has shown it the prompt."""
        for piece in stream:
            for token in piece.tokens if self.streamer is not None else ():
                self.streamer.put(torch.tensor([token]))
        if self.streamer is not None:
            self.streamer.end()
        return stream.result()

    def returned(self, results: Sequence[Result]) -> Any:
        """Returns [rows, longest] ids after their prompts, padded on the right, or the output that has them."""
        longest = max(len(result.tokens) for result in results)
        pad = self.config._pad_token_tensor
        ragged = any(len(result.tokens) < longest for result in results)
        check(pad is not None or not ragged, "pad_token_id", None, "sequences of different lengths need one")
        filler = 0 if pad is None else int(pad)
        new = torch.full((len(results), longest), filler, dtype=torch.int64, device=self.input_ids.device)
        for row, result in enumerate(results):
            new[row, : len(result.tokens)] = torch.tensor(result.tokens)
        sequences: Any = torch.cat([self.input_ids, new], 1)
        whole = self.config.return_dict_in_generate
        output: Any = GenerateDecoderOnlyOutput(sequences=sequences) if whole else sequences
        output.tokenswift = [result.report for result in results]
        return output


def ends(criteria: Sequence[Any], length: int) -> tuple[tuple[int, ...], int, Any]:
    """Returns the tokens that end a text, the number of tokens it may have, and the criteria that are left to be
    asked."""
    lengths = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
    eos = [
        int(token)
        for criterion in criteria
        if type(criterion) is EosTokenCriteria
        for token in criterion.eos_token_id.reshape(-1)
    ]
    left = [criterion for criterion in criteria if type(criterion) not in (MaxLengthCriteria, EosTokenCriteria)]
    check(bool(lengths), "max_length", None, "max_new_tokens or max_length")
    return tuple(dict.fromkeys(eos)), max(1, min(lengths) - length), StoppingCriteriaList(left) if left else None


def paddings(input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]) -> list[int]:
    """Returns how many ids in front of each prompt are padding. Raises UserError for inputs that are more than ids
    padded on the left."""
    given = {name: value for name, value in model_kwargs.items() if name not in UNUSED and value is not None}
    mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
    check_inputs(given)
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device)
    check(mask.shape == input_ids.shape, "attention_mask", tuple(mask.shape), f"of {tuple(input_ids.shape)}, as ids")
    real = mask != 0
    padding: list[int] = (~real).sum(1).tolist()
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    left = bool((real == (places >= torch.tensor(padding, device=input_ids.device)[:, None])).all())
    check(left, "attention_mask", "one with zeros behind a one", "padding stands on the left")
    check(max(padding) < input_ids.shape[1], "attention_mask", "one of zeros", "a prompt needs a token")
    if positions is not None:
        wanted = (real.cumsum(1) - 1).expand(len(input_ids), -1)
        same = bool(((positions.to(wanted.device) == wanted) | ~real).all())
        check(same, "position_ids", "others", "a token's position is the number of tokens before it")
    return padding


def check_inputs(given: dict[str, Any]) -> None:
    """Raises UserError for inputs beside token ids, their mask and positions."""
    cache = given.pop("past_key_values", None)
    quantised = isinstance(cache, QuantizedCache)
    check(not quantised, "past_key_values", "a quantised cache", 'tokenswift={"kv_dtype": "int8"} has one here')
    used = 0 if cache is None else int(cache.get_seq_length())
    check(used == 0, "past_key_values", f"a cache of {used} tokens", "none: the text has a cache of its own")
    for name, value in given.items():
        shown = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
        check(name in ("output_attentions", "output_hidden_states"), name, shown, "token ids alone are read")
