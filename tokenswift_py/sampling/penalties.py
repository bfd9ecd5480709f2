"""Penalties on text that was written already.

Each is a function of the token sequence up to the row it changes. So a tree node is judged by the committed history
plus its own ancestors (law 5).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tokenswift_py.core import IntArray

LONGEST_TEXT = 2**31 - 1  # tokens; a window of so many is the whole text
DRY_LONGEST = 64  # a longer match counts as this long, because the penalty then excludes the token anyway


def contextual_penalty(scores: npt.NDArray[np.float64], tokens: IntArray, theta: float, window: int) -> None:
    """Divides positive scores of the last `window` tokens by theta and multiplies negative ones, in place.

    scores: [vocab_size]. Source: TokenSwift (arXiv 2502.18890) section 3.4, with the sign rule of CTRL from Hugging
            Face's implementation. Dividing a negative score would raise it.
    """
    recent = np.flatnonzero(np.bincount(tokens[-window:]))  # ascending; np.unique would sort a long text
    values = scores[recent]
    scores[recent] = np.where(values > 0, values / theta, values * theta)


def count_penalty(scores: npt.NDArray[np.float64], written: IntArray, frequency: float, presence: float) -> None:
    """Subtracts frequency * count and then presence from the scores of the tokens in `written`, in place.

    Source: OpenAI's API reference, with vLLM's reading of it: only tokens that the model wrote count, not those of the
            prompt.
    """
    counts = np.bincount(written)
    tokens = np.flatnonzero(counts)
    if frequency:
        scores[tokens] -= frequency * counts[tokens]
    if presence:
        scores[tokens] -= presence


def repeated_ngrams(tokens: IntArray, size: int) -> IntArray:
    """Returns the tokens after which a sequence of `size` tokens would stand in the text a second time, some of them
    twice."""
    before = size - 1
    if len(tokens) < size:
        return np.zeros(0, np.int32)
    same = np.ones(len(tokens) - before, np.bool_)
    for back in range(before):
        same &= tokens[before - 1 - back : len(tokens) - 1 - back] == tokens[len(tokens) - 1 - back]
    return tokens[before:][same]


def finished_words(tokens: IntArray, words: Sequence[Sequence[int]]) -> list[int]:
    """Returns the last token of each word whose other tokens are the end of the text."""
    return [word[-1] for word in words if len(word) - 1 <= len(tokens) and ends_with(tokens, word[:-1])]


def ends_with(tokens: IntArray, end: Sequence[int]) -> bool:
    return not end or tokens[-len(end) :].tolist() == list(end)


def dry_matches(tokens: IntArray, shortest: int, breakers: IntArray) -> tuple[IntArray, IntArray]:
    """Returns the tokens that would continue an earlier occurrence of the text's end, and the longest match before
    each.

    A match ends where the text ends, is at least `shortest` and counts at most DRY_LONGEST tokens, and crosses no
    breaker. A breaker itself is never returned. Both results are [n], with the tokens ascending.
    """
    nothing = np.zeros(0, np.int32)
    n = len(tokens)
    suffix = tokens[max(0, n - DRY_LONGEST) :][::-1]  # the last token first
    broken = np.flatnonzero(np.isin(suffix, breakers))
    limit = int(broken[0]) if len(broken) else len(suffix)
    if limit < shortest or n <= shortest:
        return nothing, nothing
    # ends[i]: an earlier position at which the last `shortest` tokens occur; its successor is what to avoid.
    same = np.ones(n - shortest, np.bool_)
    for back in range(shortest):
        same &= tokens[shortest - 1 - back : n - 1 - back] == suffix[back]
    ends = np.flatnonzero(same) + shortest - 1
    ends = ends[~np.isin(tokens[ends + 1], breakers)]
    matched = np.full(len(ends), shortest, np.int32)
    going = np.arange(len(ends))
    for length in range(shortest, limit):
        going = going[ends[going] >= length]
        going = going[tokens[ends[going] - length] == suffix[length]]
        if not len(going):
            break
        matched[going] = length + 1
    following, at = np.unique(tokens[ends + 1], return_inverse=True)
    longest = np.zeros(len(following), np.int32)
    np.maximum.at(longest, at, matched)
    return following, longest


def dry_powers(multiplier: float, base: float) -> npt.NDArray[np.float64]:
    """Returns [DRY_LONGEST + 1] multiplier * base^k, multiplied one by one so that C++ gets the same bits."""
    powers = np.empty(DRY_LONGEST + 1)
    powers[0] = multiplier
    for k in range(1, len(powers)):
        powers[k] = powers[k - 1] * base
    return powers


def dry_penalty(
    scores: npt.NDArray[np.float64],
    tokens: IntArray,
    shortest: int,
    powers: npt.NDArray[np.float64],
    breakers: IntArray,
    window: int,
) -> None:
    """Subtracts multiplier * base^(matched - shortest) from tokens that would go on repeating, in place.

    window: of how many latest tokens; 0 is the whole text.
    Source: DRY ("don't repeat yourself"), text-generation-webui#5677, like llama.cpp's.
    """
    following, matched = dry_matches(tokens[-window:], shortest, breakers)
    scores[following] -= powers[matched - shortest]
