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
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, GenerationMixin, MaxLengthCriteria

from tokenswift_py.drafters.base import kind_of
from tokenswift_py.errors import about, check, check_text
from tokenswift_py.hf.held import EngineSettings, HeldCheckpoint, executor_of, held
from tokenswift_py.hf.settings import AsInTransformers, Asked, Criteria, asked, check_config, own_settings
from tokenswift_py.loaded import LoadedModel
from tokenswift_py.models.executors import Executor
from tokenswift_py.options import Options
from tokenswift_py.runs.plan import prepare
from tokenswift_py.runs.result import Result
from tokenswift_py.runs.stream import Stream

logger = logging.getLogger("tokenswift")

ASSISTANT = "assistant_model"
# These arguments of a model's forward change no token here, because the cache is ours.
UNUSED = ("use_cache", "logits_to_keep", "cache_position")
DROPPED = ("streamer", ASSISTANT, "synced_gpus")
STRINGS = "stop_strings"


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
        given = {
            "inputs": input_ids, "logits_processor": logits_processor, "stopping_criteria": stopping_criteria,
            "generation_config": generation_config, "synced_gpus": synced_gpus, "streamer": streamer, **model_kwargs,
        }  # fmt: skip
        return through_transformers(model, tokenswift, **given)
    assert input_ids is not None
    told = {"streamer": streamer, "synced_gpus": synced_gpus, ASSISTANT: model_kwargs.pop(ASSISTANT, None)}
    told = {name: value or not_handed_over(name) for name, value in told.items()}
    check(not told["synced_gpus"], "synced_gpus", True, "one process writes here")
    call = Call(model, input_ids, told["streamer"], told[ASSISTANT], generation_config)
    return call.write(logits_processor or (), stopping_criteria or (), tokenswift, model_kwargs)


def through_transformers(model: Any, tokenswift: Mapping[str, Any] | None, **given: Any) -> Any:
    """Has `model.generate` prepare the inputs and call `generate` again, with the arguments that it would not hand
    over."""
    given = {name: value for name, value in given.items() if value is not None}
    tokenizer = given.pop("tokenizer", None)
    strings = given.get(STRINGS)
    for config in (given.get("generation_config"), model.generation_config):
        strings = strings or getattr(config, STRINGS, None)
    if strings and tokenizer is not None:  # transformers makes no criterion of them where it calls another's function
        for string in [strings] if isinstance(strings, str) else strings:
            check_text(STRINGS, string)
        criterion = StopStringCriteria(tokenizer, strings)
        given["stopping_criteria"] = StoppingCriteriaList([*given.get("stopping_criteria", ()), criterion])
        given[STRINGS] = None
    kept = {name: given[name] for name in ("streamer", ASSISTANT) if name in given}
    return type(model).generate(model, custom_generate=partial(generate, tokenswift=tokenswift, **kept), **given)


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

    eos: the tokens that end a text, and no others. assistant: the model that drafts.
    """

    def __init__(
        self, checkpoint: HeldCheckpoint, eos: tuple[int, ...], tokenizer: Any, executor: Executor, assistant: Any
    ):
        super().__init__(checkpoint, tokenizer, executor, {})
        self.checkpoint = replace(checkpoint, eos=eos)
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
    config: Any

    def write(
        self, processors: Any, criteria: Any, tokenswift: Mapping[str, Any] | None, model_kwargs: Mapping[str, Any]
    ) -> Any:
        check_config(self.config)
        padding = paddings(self.input_ids, model_kwargs)
        rows, length = self.input_ids.shape
        check(self.streamer is None or rows == 1, "streamer", rows, "with one sequence only")
        engine, own = own_settings(tokenswift)
        check(own.get("trace") is None or rows == 1, "trace", own.get("trace"), "with one sequence only")
        eos, room, others = ends(criteria, length)
        found = asked(processors, bool(self.config.do_sample), length, eos, rows)
        loaded = self.load(engine, eos, own.pop("tokenizer", None) or NoTokenizer(), own)
        options = {**self.options(found, room), **own}
        results = []
        for row, pad in enumerate(padding):
            ids = self.input_ids[row]
            called = [AsInTransformers(processor, ids[:pad], row) for processor in found.processors]
            run = prepare(
                loaded, ids[pad:].tolist(), Options.of(**options, logits_processors=called, stream=row)
            )  # fmt: skip
            with Stream(loaded, run) as stream:
                stream.loop.stops.also = Criteria(others, ids, pad, room) if others else None
                results.append(self.follow(stream))
        return self.returned(results)

    def load(self, engine: EngineSettings, eos: tuple[int, ...], tokenizer: Any, own: Mapping[str, Any]) -> InMemory:
        kept = held(self.model)
        executor, assistant = executor_of(kept, engine), None
        if self.assistant is not None:
            with about(ASSISTANT):
                second = held(self.assistant)
                sizes = second.checkpoint.spec.vocab_size, kept.checkpoint.spec.vocab_size
                check(sizes[0] == sizes[1], "vocab_size", sizes[0], f"the model's vocabulary, of {sizes[1]}")
                if executor.name == "native":
                    beside = executor.beside(second.checkpoint, own.get("draft_weights", "auto"))
                else:
                    beside = executor_of(second, replace(engine, dtype=None, kv_dtype=None))
                assistant = LoadedModel(second.checkpoint, NoTokenizer(), beside, {})
        return InMemory(kept.checkpoint, eos, tokenizer, executor, assistant)

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
        new = self.input_ids.new_full((len(results), longest), 0 if pad is None else int(pad))
        for row, result in enumerate(results):
            new[row, : len(result.tokens)] = torch.tensor(result.tokens, dtype=new.dtype)
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
    mask = given.pop("attention_mask", None)
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device)
    check(mask.shape == input_ids.shape, "attention_mask", tuple(mask.shape), f"of {tuple(input_ids.shape)}, as ids")
    real = mask != 0
    padding: list[int] = (~real).sum(1).tolist()
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    left = bool((real == (places >= torch.tensor(padding, device=input_ids.device)[:, None])).all())
    check(left, "attention_mask", "one with zeros behind a one", "padding stands on the left")
    check(max(padding) < input_ids.shape[1], "attention_mask", "one of zeros", "a prompt needs a token")
    if (positions := given.pop("position_ids", None)) is not None:
        wanted = (real.cumsum(1) - 1).expand(len(input_ids), -1)
        same = bool(((positions.to(wanted.device) == wanted) | ~real).all())
        check(same, "position_ids", "others", "a token's position is the number of tokens before it")
    cache = given.pop("past_key_values", None)
    used = 0 if cache is None else int(cache.get_seq_length())
    check(used == 0, "past_key_values", f"a cache of {used} tokens", "none: the text has a cache of its own")
    for name, value in given.items():
        shown = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
        check(name in ("output_attentions", "output_hidden_states"), name, shown, "token ids alone are read")
    return padding
