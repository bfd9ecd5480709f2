"""Turns the settings of transformers' `generate` into the sampler's own, or leaves them to transformers' own
processors. Nothing is dropped without a word.

`generate` makes a list of processors of its config and hands it over. The sampler has its own for a run of them at the
list's head and for one at its tail, in the same order. These become its parameters, which are faster and guessed with.
Those between are called once for every token, by transformers' own rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from tokenswift_py.checkpoints.generation_defaults import NEUTRAL, UNREAD
from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.errors import UserError, check
from tokenswift_py.hf.held import EngineSettings
from tokenswift_py.options import Options, described_options
from tokenswift_py.sampling.processors import TRANSFORMERS, is_pure

# These fields of GenerationConfig are read here, or have become processors, stopping criteria and inputs before we are
# called.
MADE = frozenset(
    (
        "guidance_scale", "sequence_bias", "encoder_repetition_penalty", "repetition_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "forced_bos_token_id",
        "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff",
        "eta_cutoff", "watermarking_config", "renormalize_logits", "max_length", "max_new_tokens", "max_time",
        "stop_strings", "eos_token_id", "token_healing", "num_return_sequences", "do_sample", "pad_token_id",
        "return_dict_in_generate",
    )
)  # fmt: skip
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# These processors are made for the whole batch at once, or keep what belongs to one row of it.
OF_A_BATCH = frozenset(
    f"{name}LogitsProcessor"
    for name in ("EncoderRepetitionPenalty", "EncoderNoRepeatNGram", "PrefixConstrained",
                 "UnbatchedClassifierFreeGuidance", "SynthIDTextWatermark")
)  # fmt: skip
# The processors at the tail are here in the order of transformers and of the sampler: class, its attribute, option. If
# the option is missing, or the sampler does not take its value, the class is left to transformers.
WARPERS = (
    ("TemperatureLogitsWarper", "temperature", "temperature"),
    ("TopKLogitsWarper", "top_k", "top_k"),
    ("TopPLogitsWarper", "top_p", "top_p"),
    ("MinPLogitsWarper", "min_p", "min_p"),
    ("TypicalLogitsWarper", "mass", "typical_p"),
    ("EpsilonLogitsWarper", "epsilon", "epsilon_cutoff"),
    ("EtaLogitsWarper", "epsilon", "eta_cutoff"),
)
OPTIONS = frozenset(f.name for f in fields(Options))
ENGINE = frozenset(f.name for f in fields(EngineSettings))
# A caller may set these options beside what `generate` itself is told.
OWN_OPTIONS = frozenset(
    (
        "context", "positions", "positions_window", "positions_block", "penalty", "penalty_window", "dry_multiplier",
        "dry_base", "dry_length", "dry_breakers", "seed", "on_loop",
        *(name for name, said in described_options().items() if said.group in ("drafting", "lossy", "output")),
    )
) - {"draft_model"}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """The result of reading the settings.

    options: fields of `Options`. processors: processors that are left to transformers' own, in their order.
    """

    options: dict[str, Any]
    processors: tuple[Any, ...]


def own_settings(settings: Mapping[str, Any] | None) -> tuple[EngineSettings, dict[str, Any]]:
    """Returns the argument `tokenswift` split in engine settings and options, `tokenizer` among these. Raises
    UserError."""
    given = dict(settings or {})
    known = ENGINE | OWN_OPTIONS | {"tokenizer"}
    for name in given:
        instead = "give assistant_model" if name == "draft_model" else f"known here are {', '.join(sorted(known))}"
        check(name in known, "tokenswift", name, f"{instead}; what generate has a parameter for is told to generate")
    engine = EngineSettings(**{name: given.pop(name) for name in ENGINE & given.keys()})
    return engine, {"positions": "trained", **given}


def check_config(config: Any) -> None:
    """Raises UserError for a field of the config that asks for something that is not done here."""
    defaults = config._get_default_generation_params()
    for name, value in config.to_dict().items():
        if name not in MADE and name not in UNREAD and not name.startswith("_"):
            neutral = value in (None, False, defaults.get(name)) or value in NEUTRAL.get(name, ())
            check(neutral, name, value, "tokenswift_py has nothing for it; leave it out")
    if config.return_dict_in_generate:
        for name in OUTPUTS:
            check(not getattr(config, name, None), name, True, "sequences alone are returned; leave it out")


def asked(processors: Sequence[Any], do_sample: bool, length: int, eos: Sequence[int], rows: int) -> Asked:
    """Reads a prepared list of processors.

    length: length of the prompts, padding included. eos: tokens that end a text. rows: texts to write.
    """
    left = list(processors)
    for processor in left:
        alone = rows == 1 or class_name(processor) not in OF_A_BATCH
        check(alone, class_name(processor), rows, "with one sequence only: rows are written one after the other")
    options: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    while left and (found := at_head(left[0], length, eos, options)) is not None:
        options |= found
        del left[0]
    if do_sample:
        if left and class_name(left[-1]) == "LogitNormalization":  # it takes the same amount off every score
            del left[-1]
        place = len(WARPERS)
        while left and (warper := at_tail(left[-1], place)) is not None:
            place, option, value = warper
            options[option] = value
            del left[-1]
    return Asked(options, tuple(left))


def at_head(processor: Any, length: int, eos: Sequence[int], before: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the options that do what this processor does, the first that is left; None leaves it. before: options of
    the processors in front of it."""
    kind = class_name(processor)
    if kind == "RepetitionPenaltyLogitsProcessor" and "repetition_penalty" not in before:
        return repetition(processor)
    if kind == "NoRepeatNGramLogitsProcessor" and "no_repeat_ngram_size" in OPTIONS:
        return {"no_repeat_ngram_size": int(processor.ngram_size)}
    if kind in ("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"):
        if sorted(processor.eos_token_id.tolist()) != sorted(eos):
            return None
        new = processor.min_length - length if kind.startswith("MinLength") else processor.min_new_tokens
        return {"min_new_tokens": max(int(new), before.get("min_new_tokens", 0))}
    if kind == "SuppressTokensLogitsProcessor" and "ban" not in before:
        return {"ban": sorted({int(token) for token in processor.suppress_tokens})}
    return None


def repetition(processor: Any) -> dict[str, Any] | None:
    """Returns the option of a repetition penalty over prompt and text, which is ours, too. Padding is no part of either
    here."""
    penalty = float(processor.penalty)
    if isinstance(processor.prompt_ignore_length, int) or not fits("repetition_penalty", penalty):
        return None
    return {"repetition_penalty": penalty}


def at_tail(processor: Any, place: int) -> tuple[int, str, Any] | None:
    """Returns place in WARPERS, option and value of the last processor, if the sampler has it and `place` is of a later
    one. None leaves it."""
    for number, (kind, attribute, option) in enumerate(WARPERS[:place]):
        if class_name(processor) == kind and option in OPTIONS:
            value = getattr(processor, attribute)
            value = int(value) if option == "top_k" else float(value)
            plain = getattr(processor, "min_tokens_to_keep", 1) == 1
            plain &= getattr(processor, "filter_value", -float("inf")) == -float("inf")
            return (number, option, value) if plain and fits(option, value) else None
    return None


def fits(option: str, value: Any) -> bool:
    """Returns whether the sampler takes the value."""
    try:
        SamplingParams(**{option: value})
    except UserError:
        return False
    return True


def class_name(processor: Any) -> str:
    """Returns the name of one of transformers' own classes. A class derived from it may do anything."""
    kind = type(processor)
    return kind.__name__ if kind.__module__ == TRANSFORMERS else ""


class AsInTransformers:
    """A processor, called in the way of `generate`: with ids of the whole row, padding included, and fp32 scores, both
    on the device of the inputs.

    padding: [n] ids in front of the prompt.
    """

    def __init__(self, processor: Any, padding: torch.Tensor, row: int):
        self._processor, self._padding = processor, padding
        self.pure = is_pure(processor)
        self.__name__ = str(getattr(processor, "__name__", type(processor).__name__))
        ignored = getattr(processor, "prompt_ignore_length", None)
        if class_name(processor) == "RepetitionPenaltyLogitsProcessor" and isinstance(ignored, torch.Tensor):
            self._processor = type(processor)(processor.penalty, ignored[row : row + 1])

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        device = self._padding.device
        whole = torch.cat([self._padding, ids[0].to(device)])[None]
        given: torch.Tensor = self._processor(whole, scores.to(device, torch.float32))
        return given


class Criteria:
    """transformers' stopping criteria, asked after each token in the way of `generate`: about the ids so far, padding
    included, without scores.

    prompt: [n] ids, padding included, `padding` of them. room: for so many more.
    """

    def __init__(self, criteria: Any, prompt: torch.Tensor, padding: int, room: int):
        self._criteria, self._padding = criteria, padding
        self._ids = torch.cat([prompt, prompt.new_zeros(room)])[None]

    def __call__(self, history: History) -> bool:
        length = self._padding + len(history)
        self._ids[0, length - 1] = history[-1]
        return bool(torch.as_tensor(self._criteria(self._ids[:, :length], None)).any())
