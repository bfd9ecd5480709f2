"""Measures whether a text holds up over its length: perplexity, distinct-4, compression and loops, by windows.

Word salad is as varied as prose, so no measure of diversity tells them apart. A model that reads them does. It reads
each window by itself, in a fresh cache and at positions from 0 on, where it was trained, whatever the positions at
which the text was written.

- Perplexity is that of the judge's own tokens. Salad of short, frequent tokens looks better in it than it is, and two
  judges with different vocabularies cannot be compared.
- Bits per byte (Gao et al. 2020, arXiv 2101.00027, section 3.1) spread the same nats over the UTF-8 bytes of the text,
  which are the same for every judge.
- A low figure alone is no praise, because a loop is easy to foresee. So distinct-4, compression and loops stand beside.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from tokenswift_py.core import DraftTree, Model, Segment
from tokenswift_py.decoding.statistics import distinct_n, find_loop
from tokenswift_py.errors import check
from tokenswift_py.memory import check_memory
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.runs.report import rounded
from tokenswift_py.text import special_ids

if TYPE_CHECKING:
    from tokenswift_py.kvcache.cache import KVCache
    from tokenswift_py.loaded import LoadedModel

WINDOW = 1000  # the tokens of a window
LEAST = 4  # the least tokens of a window, because fewer have no 4-gram
CHUNK = 128  # the rows of a pass, each of which gives a row of logits

Decode = Callable[[Sequence[int]], str]


def windows_of(tokens: Sequence[int], window: int = WINDOW) -> list[Sequence[int]]:
    """Cuts tokens into windows, one after the other. A rest is left out, but a shorter text is one window.

    Raises ValueError for fewer tokens than LEAST.
    """
    if len(tokens) < LEAST:
        raise ValueError(f"tokens: {len(tokens)} is not allowed; at least {LEAST}")
    return [tokens[start : start + window] for start in range(0, max(1, len(tokens) - window + 1), window)]


def text_tokens(tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """Returns the tokens that are text, without markup such as the end of a chapter."""
    special = special_ids(tokenizer)
    return [token for token in tokens if token not in special]


def decoder(tokenizer: Any) -> Decode:
    """Returns a function from tokens to their text."""
    return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


@dataclass(frozen=True)
class WindowQuality:
    """The measures of a text's windows that need no model.

    distinct_4:  different 4-grams over all 4-grams of each window. Low where a text repeats itself.
    compression: UTF-8 bytes over their zlib (level 9) size, of each window. High where a text repeats itself in any
                 way, low in word salad.
    looping:     numbers of the windows in which one block is repeated over and over (`find_loop`).
    """

    distinct_4: tuple[float, ...]
    compression: tuple[float, ...]
    looping: tuple[int, ...]

    def summary(self) -> dict[str, Any]:
        """Returns median and worst of the windows: lowest distinct-4, highest compression. None without windows."""
        return {
            "windows": len(self.distinct_4),
            "distinct_4_median": median(self.distinct_4),
            "distinct_4_worst": min(self.distinct_4, default=None),
            "compression_median": median(self.compression),
            "compression_worst": max(self.compression, default=None),
            "looping_windows": len(self.looping),
        }


def window_quality(tokens: Sequence[int], decode: Decode, window: int = WINDOW) -> WindowQuality:
    """Measures `windows_of` the tokens. They are those that the model chose, without forced ones."""
    windows = windows_of(tokens, window)
    texts = [decode(part).encode() for part in windows]
    return WindowQuality(
        tuple(distinct_n(part, 4) or 0.0 for part in windows),
        tuple(len(text) / len(zlib.compress(text, 9)) for text in texts),
        tuple(number for number, part in enumerate(windows) if find_loop(part)),
    )


@dataclass(frozen=True)
class Reading:
    """A judge's probability of one window.

    nats:   -ln p, summed over the tokens that have something before them.
    tokens: number of these tokens. size: UTF-8 bytes of their text.
    """

    nats: float
    tokens: int
    size: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean nats per token of the judge, infinite beyond the range of a double."""
        mean = self.nats / self.tokens if self.tokens else math.inf
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.size if self.size else math.inf


@dataclass(frozen=True)
class WindowPerplexity:
    """A judge's readings of the windows of a text. judge: name of the model. window: the writer's tokens in each."""

    judge: str
    window: int
    readings: tuple[Reading, ...]

    def summary(self) -> dict[str, Any]:
        """Returns the report's `window_perplexity`: median and worst, which is the highest. None without windows."""
        figures: dict[str, Any] = {}
        for name, prefix in (("perplexity", ""), ("bits_per_byte", "bits_per_byte_")):
            values = [getattr(reading, name) for reading in self.readings]
            figures[f"{prefix}median"] = rounded(median(values))
            figures[f"{prefix}worst"] = rounded(max(values, default=None))
        return {**figures, "windows": len(self.readings), "window": self.window, "judge": self.judge}


def window_perplexity(loaded: LoadedModel, tokens: Sequence[int], window: int | None = None) -> WindowPerplexity:
    """Lets a model read a text as it was written, in its own tokens. Markup is left out (`text_tokens`).

    window: tokens of a window. None is WINDOW, or as many as the model's trained positions hold.
    """
    size = window_size(loaded, window)
    text = text_tokens(loaded.tokenizer, tokens)
    windows = windows_of(text, size) if len(text) >= LEAST else []
    return WindowPerplexity(loaded.checkpoint.name, size, read(loaded, windows))


def window_size(loaded: LoadedModel, window: int | None) -> int:
    """Returns the window asked for, else the default. Raises UserError for windows too small to measure."""
    if window is None:
        return min(WINDOW, most_tokens(loaded))
    check(window >= LEAST, "window", window, f"at least {LEAST}")
    return window


def most_tokens(loaded: LoadedModel) -> int:
    """Returns how many tokens of a window the model's trained positions hold."""
    return int(loaded.checkpoint.config.max_position_embeddings) - len(start_tokens(loaded.tokenizer))


def read(
    loaded: LoadedModel, windows: Sequence[Sequence[int]], progress: Callable[[], object] = lambda: None
) -> tuple[Reading, ...]:
    """Returns a judge's reading of each window. Windows are tokens of the judge's own vocabulary.

    The tokens that the judge's tokenizer puts before a text (BOS), if any, stand before each window. Without them the
    first token of a window has no context and is not scored.
    progress: function that is called after each window.
    Raises UserError for a window that the judge's trained positions do not hold, and for tokens that it does not know.
    """
    if not windows:
        return ()
    check_readable(loaded, windows)
    start = start_tokens(loaded.tokenizer)
    context = len(start) + max(1, *map(len, windows))
    with loaded.executor.ranks.same_fate():
        size = loaded.kv_bytes(context) // loaded.executor.ranks.world
        check_memory(size, loaded.executor.device, f"a KV cache of {context} tokens, to read windows,")
    model, decode = loaded.executor.model(rope_tables(loaded.checkpoint.config, context)), decoder(loaded.tokenizer)
    readings = []
    for window in windows:
        scored = window if start else window[1:]
        readings.append(Reading(nats(model, [*start, *window], len(scored)), len(scored), len(decode(scored).encode())))
        progress()
    return tuple(readings)


def check_readable(loaded: LoadedModel, windows: Sequence[Sequence[int]]) -> None:
    """Raises UserError for a window longer than the trained positions, and for ids that the model has no token for."""
    name, vocab = loaded.checkpoint.name, loaded.checkpoint.spec.vocab_size
    longest, most = max(map(len, windows)), most_tokens(loaded)
    check(longest <= most, "window", longest, f"{name} was trained to read at most {most} tokens")
    for token in {token for window in windows for token in window}:
        check(0 <= token < vocab, "tokens", token, f"{name} knows token ids 0 to {vocab - 1}")


def nats(model: Model, tokens: Sequence[int], scored: int) -> float:
    """Sums -ln p of the last `scored` tokens, each given all tokens before it (teacher forcing)."""
    cache = model.new_cache()
    try:
        return sum(
            float(torch.nn.functional.cross_entropy(logits, after, reduction="none").double().sum())
            for logits, after in teacher_forced(model, cache, tokens, scored)
        )
    finally:
        cache.release()


def teacher_forced(
    model: Model, cache: KVCache, tokens: Sequence[int], scored: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields logits [n, vocab] of the rows that predict the last `scored` tokens, with these tokens [n] int64.

    It goes chunk by chunk. The cache, which holds a beginning of the tokens, grows by all but the last.
    """
    first = len(tokens) - scored - 1  # the row that predicts the first scored token
    while (at := cache.length) < len(tokens) - 1:
        chunk = tokens[at : len(tokens) - 1][:CHUNK]
        rows = range(max(0, first - at), len(chunk))
        logits = model.forward([Segment(DraftTree.chain(chunk), cache, causal=True)], list(rows)).logits
        cache.commit(range(len(chunk)))
        yield logits, torch.tensor([tokens[at + row + 1] for row in rows], dtype=torch.int64, device=logits.device)


def start_tokens(tokenizer: Any) -> list[int]:
    """Returns the tokens that the tokenizer puts before every text: BOS, or none."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    special = takewhile(lambda pair: pair[1], zip(encoded.input_ids, encoded.special_tokens_mask, strict=True))
    return [int(token) for token, _ in special]
