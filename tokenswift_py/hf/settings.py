"""Turns the settings of transformers' `generate` into the sampler's own, or leaves them to transformers' own
processors. Nothing is dropped without a word.

`generate` makes a list of processors of its config and hands it over. The sampler has its own for a run of them at the
list's head and for one at its tail, in the same order. These become its parameters, which are faster and guessed with.
Those between are called once for every token, by transformers' own rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from tokenswift_py.checkpoints.generation_defaults import NEUTRAL, UNREAD
from tokenswift_py.core import SamplingParams
from tokenswift_py.errors import UserError, check
from tokenswift_py.hf.held import EngineSettings
from tokenswift_py.options import Options, described_options
from tokenswift_py.sampling.processors import TRANSFORMERS

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
# With this field, transformers' drafts change the text.
LOSSY = ("assistant_ensemble_weight",)
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
        "dry_base", "dry_length", "dry_window", "dry_breakers", "seed", "on_loop",
        *(name for name, said in described_options().items() if said.group in ("drafting", "lossy", "output")),
    )
) - {"draft_model", "logprobs", "prompt_logprobs"}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """The result of reading the settings.

    options: fields of `Options`. processors: processors that are left to transformers' own, in their order.
    """

    options: dict[str, Any]
    processors: tuple[Any, ...]


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch, as far as processors know them.

    length: ids of each, padding included. padding: how many of them are padding, for each row. eos: tokens that end a
    text. vocab: number of tokens the model knows. transformers takes ids of others, which change nothing.
    """

    length: int
    padding: Sequence[int]
    eos: Sequence[int]
    vocab: int

    def known(self, tokens: Iterable[Any]) -> list[int]:
        """Returns the ids that the model knows, each once, in order."""
        return sorted({int(token) for token in tokens if 0 <= int(token) < self.vocab})


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
        read = name in MADE or (name in UNREAD and name not in LOSSY)
        if not read and not name.startswith("_"):
            neutral = value in (None, False, defaults.get(name)) or value in NEUTRAL.get(name, ())
            check(neutral, name, value, "tokenswift_py has nothing for it; leave it out")
    if config.return_dict_in_generate:
        for name in OUTPUTS:
            check(not getattr(config, name, None), name, True, "sequences alone are returned; leave it out")


def asked(processors: Sequence[Any], do_sample: bool, prompts: Prompts) -> Asked:
    """Reads a prepared list of processors."""
    left = list(processors)
    options: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    while left and (found := at_head(left[0], prompts, options)) is not None:
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


def at_head(processor: Any, prompts: Prompts, before: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the options that do what this processor does, the first that is left; None leaves it. before: options of
    the processors in front of it."""
    kind = class_name(processor)
    if kind == "RepetitionPenaltyLogitsProcessor" and "repetition_penalty" not in before:
        return repetition(processor, prompts.padding)
    if kind == "NoRepeatNGramLogitsProcessor" and "no_repeat_ngram_size" in OPTIONS and not any(prompts.padding):
        return {"no_repeat_ngram_size": int(processor.ngram_size)}  # transformers counts n-grams of padding, too
    if kind in ("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"):
        if prompts.known(processor.eos_token_id) != prompts.known(prompts.eos):
            return None
        least = (
            processor.min_length
            if kind.startswith("MinLength")
            else (processor.min_new_tokens + processor.prompt_length_to_skip)
        )
        new = least - prompts.length
        return {"min_new_tokens": max(int(new), before.get("min_new_tokens", 0))}
    if kind == "SuppressTokensLogitsProcessor" and "ban" not in before:
        return {"ban": prompts.known(processor.suppress_tokens)}
    return None


def repetition(processor: Any, padding: Sequence[int]) -> dict[str, Any] | None:
    """Returns the option of a repetition penalty over prompt and text, but not over padding, which is ours, too."""
    penalty, ignored = float(processor.penalty), processor.prompt_ignore_length
    ignored = ignored.tolist() if isinstance(ignored, torch.Tensor) else ignored
    plain = ignored == list(padding) or (ignored is None and not any(padding))
    return {"repetition_penalty": penalty} if plain and fits("repetition_penalty", penalty) else None


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
