"""Hugging Face `LogitsProcessor`s: who may call them, and which scores they may give back.

A processor may keep state, like a counter or a grammar. So the walk calls each once for every token that it chooses, in
the order of the text, like transformers' `generate`, and nobody else calls it. A processor that is a function of its
arguments alone is called *pure*, and drafters guess with it too. It says so by an attribute `pure = True`. For
transformers' own classes this is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenswift_py.core import IntArray
from tokenswift_py.errors import NumericsError, UserError

Doubles = npt.NDArray[np.float64]

LARGEST = 1e300  # a larger score may be infinite after the temperature has divided it
TRANSFORMERS = "transformers.generation.logits_process"
# These are transformers' classes that keep nothing from call to call and call nothing of the user's.
PURE = frozenset(
    f"{name}{kind}"
    for kind, names in {
        "LogitsProcessor": (
            "MinLength", "MinNewTokensLength", "RepetitionPenalty", "EncoderRepetitionPenalty", "NoRepeatNGram",
            "EncoderNoRepeatNGram", "SequenceBias", "NoBadWords", "ForcedBOSToken", "ForcedEOSToken", "InfNanRemove",
            "SuppressTokensAtBegin", "SuppressTokens",
        ),
        "LogitsWarper": ("Temperature", "TopP", "TopK", "TopH", "MinP", "Typical", "Epsilon", "Eta"),
        "": ("ExponentialDecayLengthPenalty", "LogitNormalization"),
    }.items()
    for name in names
)  # fmt: skip


def is_pure(processor: Any) -> bool:
    """Returns whether a processor may be called for guesses too, in any order, because it is a function of its
    arguments alone."""
    kind = type(processor)  # a class derived from one of transformers' may do anything
    return (kind.__module__ == TRANSFORMERS and kind.__name__ in PURE) or getattr(processor, "pure", False) is True


def name_of(processor: Any) -> str:
    """Returns the name of a function, or that of an object's class."""
    return str(getattr(processor, "__name__", type(processor).__name__))


def check_processors(processors: Any) -> None:
    """Raises UserError for a value that is not a list of callable objects."""
    allowed = "a list of LogitsProcessors, or of other functions of (token ids, scores)"
    if not isinstance(processors, list | tuple):
        raise UserError(f"logits_processors: a {name_of(processors)} is not allowed; {allowed}")
    for processor in processors:
        if isinstance(processor, type):
            raise UserError(f"logits_processors: the class {processor.__name__} is not allowed; {allowed}: make one")
        if not callable(processor):
            raise UserError(f"logits_processors: a {name_of(processor)} is not allowed; {allowed}")


def apply_processors(processors: Sequence[Any], tokens: IntArray, scores: Doubles) -> Doubles:
    """Returns [vocab_size] scores of the token after `tokens`, changed by each processor in turn.

    Raises NumericsError with the name of a processor that gives anything but as many scores, of which -inf excludes a
    token and NaN and +inf are none, or that excludes every token.
    """
    import torch  # here, because options check processors before torch, which takes seconds, is needed

    for processor in processors:
        given = processor(torch.from_numpy(tokens.astype(np.int64))[None], torch.from_numpy(scores)[None])
        where = f"logits processor {name_of(processor)} at position {len(tokens)}"
        if not isinstance(given, torch.Tensor) or given.shape != (1, len(scores)):
            shape = list(given.shape) if isinstance(given, torch.Tensor) else name_of(given)
            raise NumericsError(f"{where} gave {shape}, not scores of shape [1, {len(scores)}]")
        scores = given[0].detach().to("cpu", torch.float64).numpy()
        top = scores.max()
        if not top <= LARGEST:
            raise NumericsError(f"{where} gave scores that are not finite (of which -inf alone may be one)")
        if top == -np.inf:
            raise NumericsError(f"{where} left no token to choose from: all of its scores are -inf")
    return scores
