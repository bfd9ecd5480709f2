"""Calls processors and stopping criteria of transformers about one row of a batch alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from tokenswift_py.decoding.history import History
from tokenswift_py.hf.settings import class_name
from tokenswift_py.sampling.processors import LARGEST, is_pure


class AsInTransformers:
    """A processor, called in the way of `generate`: with ids of the whole row, padding included, and fp32 scores, both
    on the device of the inputs.

    padding: [n] ids in front of the prompt. row: place in a batch of `rows`.
    """

    def __init__(self, processor: Any, padding: torch.Tensor, row: int, rows: int):
        self._processor = processor if rows == 1 else of_row(processor, row, rows)
        self._padding = padding
        self.pure = is_pure(processor)
        self.__name__ = str(getattr(processor, "__name__", type(processor).__name__))

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        device = self._padding.device
        whole = torch.cat([self._padding, ids[0].to(device)])[None]
        given: torch.Tensor = self._processor(whole, scores.to(device, torch.float32))
        return given.double().clamp(max=LARGEST)  # +inf forces a token in transformers, and no sampler takes it


def of_row(processor: Any, row: int, rows: int) -> Any:
    """Returns the processor that `generate` would have made for this row alone, if transformers made it for a whole
    batch of `rows`, or it keeps something about each of them. Any other comes back as it is."""
    kind, alone = class_name(processor).removesuffix("LogitsProcessor"), copy.copy(processor)
    if kind == "RepetitionPenalty":
        alone.prompt_ignore_length = share(processor.prompt_ignore_length, row, rows)
    elif kind == "EncoderRepetitionPenalty":
        alone.encoder_input_ids = share(processor.encoder_input_ids, row, rows)
    elif kind == "EncoderNoRepeatNGram":
        alone.generated_ngrams, alone.batch_size = share(processor.generated_ngrams, row, rows), 1
    elif kind == "PrefixConstrained":
        alone._prefix_allowed_tokens_fn = lambda _, ids: processor._prefix_allowed_tokens_fn(row, ids)
    elif kind == "UnbatchedClassifierFreeGuidance":
        context = processor.unconditional_context
        alone.unconditional_context = {name: share(value, row, rows) for name, value in context.items()}
    elif kind == "SynthIDTextWatermark":
        alone.state = None
    else:
        return processor
    return alone


def share(values: Any, row: int, rows: int) -> Any:
    """Returns the part of a tensor or list that belongs to one of `rows` rows. Several rows may share one entry. Any
    other value belongs to all rows."""
    if not isinstance(values, torch.Tensor | list):
        return values
    entry = row * len(values) // rows
    return values[entry : entry + 1]


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


@dataclass(frozen=True)
class Until:
    """Ends a text at a length, prompt included."""

    length: int

    def __call__(self, history: History) -> bool:
        return len(history) >= self.length
