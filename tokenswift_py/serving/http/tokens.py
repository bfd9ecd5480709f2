"""Tokens in the form of OpenAI's answers: their text, its bytes, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenswift_py.core import Likeliest
from tokenswift_py.runs.result import Piece
from tokenswift_py.text import BAD, TextJoiner, special_ids

MOST_BYTES = 4  # of a character
CONTEXT = 32  # tokens before a text that are read with it, as many as a character can have and more
CHAPTER_GAP = "\n\n"  # the gap between chapters in the text


@dataclass(frozen=True)
class Told:
    """A token with its log-probability, and the likeliest tokens in its place with theirs, the best first."""

    token: int
    logprob: float | None  # None for the first token of a prompt
    likeliest: Sequence[tuple[int, float]]


class TokenTexts:
    """Reads single tokens of a tokenizer as text."""

    def __init__(self, tokenizer: Any):
        self._whole, self._tokenizer = tokenizer, tokenizer.backend_tokenizer
        self._special = special_ids(tokenizer)
        # A SentencePiece vocabulary drops the space at the start of what it decodes, so a token is read behind another.
        letter = self._tokenizer.token_to_id("a")
        self._before = [] if letter is None or self._tokenizer.decode([letter]) != "a" else [letter]

    def offsets(self, before: Sequence[int], told: int) -> Offsets:
        """Returns the offsets of a text that goes on from these tokens, after this many characters."""
        return Offsets(self, self._whole, before[-CONTEXT:], told)

    def text(self, token: int) -> str:
        """Returns the text of a token alone, its leading space included. A token of half a character has U+FFFD."""
        return str(self._tokenizer.decode([*self._before, token], skip_special_tokens=False))[len(self._before) :]

    def told(self, pieces: Sequence[Piece], special: bool = False) -> list[Told]:
        """Returns the log-probability of each token that has a text. An end-of-sequence token has none. special: also
        of tokens that have none."""
        found = []
        for piece in pieces:
            likeliest = piece.top_logprobs or [()] * len(piece.tokens)
            for token, logprob, likely in zip(piece.tokens, piece.logprobs or (), likeliest, strict=False):
                if special or token not in self._special:
                    found.append(Told(token, logprob, likely))
        return found

    def entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        """Returns a token in the form of chat completions and responses. The bytes are null if it is half of a
        character."""
        text = self.text(token)
        return {"token": text, "bytes": None if BAD in text else list(text.encode()), "logprob": logprob}

    def content(self, told: Sequence[Told]) -> list[dict[str, Any]]:
        """Returns the tokens in the form of chat completions and responses."""
        return [
            {**self.entry(one.token, one.logprob), "top_logprobs": [self.entry(*likely) for likely in one.likeliest]}
            for one in told
        ]

    def columns(self, told: Sequence[Told], offsets: Sequence[int], likeliest: bool) -> dict[str, Any]:
        """Returns the tokens in the form of completions.

        offsets:   the offsets of the characters at which the tokens begin.
        likeliest: whether the likeliest tokens were asked for.
        """
        top = [None if one.logprob is None else self._by_text(one.likeliest) for one in told]
        return {
            "tokens": [self.text(one.token) for one in told],
            "token_logprobs": [one.logprob for one in told],
            "top_logprobs": top if likeliest else None,
            "text_offset": list(offsets),
        }

    def of_prompt(
        self, prompt: Sequence[int], found: Sequence[tuple[float, Likeliest] | None], likeliest: bool
    ) -> dict[str, Any]:
        """Returns the tokens of a prompt in the form of completions, special ones included: clients count them.

        found: `Result.prompt_logprobs`.
        """
        told = [Told(token, *(one or (None, ()))) for token, one in zip(prompt, found, strict=True)]
        offsets, at, start = [], 0, 0
        whole = str(self._tokenizer.decode(list(prompt), skip_special_tokens=False))
        for number, token in enumerate(prompt):
            offsets.append(at)
            text = self.text(token)
            if BAD in text:  # half of a character: all its tokens begin where it begins
                run = str(self._tokenizer.decode(list(prompt[start : number + 1]), skip_special_tokens=False))
                if BAD in run and number + 1 - start < MOST_BYTES:
                    continue
                text = run
            elif not at and not whole.startswith(text):
                text = text.lstrip(" ")
            at, start = at + len(text), number + 1
        return self.columns(told, offsets, likeliest)

    def _by_text(self, likeliest: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Returns the best of the tokens that read alike, like halves of characters."""
        return {self.text(token): logprob for token, logprob in reversed(likeliest)}


class Offsets:
    """Counts the characters of a text before each of its tokens. All tokens of one character have the offset at which
    the character begins.

    before: the tokens that the text goes on from.
    told:   the number of characters before the text.
    """

    def __init__(self, texts: TokenTexts, tokenizer: Any, before: Sequence[int], told: int):
        self._texts, self._tokenizer, self._told = texts, tokenizer, told
        self._joiner = TextJoiner(tokenizer, (), before)
        self._special = special_ids(tokenizer)

    def of(self, piece: Piece, special: bool = False) -> list[int]:
        """Returns the offsets of the tokens of a piece that have a text, or of all. Pieces come in order."""
        if piece.forced:  # a chapter is over: an empty line comes before the next one
            self._told += len(self._joiner.finish()) + len(CHAPTER_GAP)
            self._joiner = TextJoiner(self._tokenizer)
        found = []
        for token in piece.tokens:
            if token in self._special:
                found += [self._told] if special else []
            else:
                alone = self._texts.text(token)
                told = self._joiner.push([token])
                before = len(told) - len(alone) if told.endswith(alone) else 0  # the text that was held back until now
                found.append(self._told + before)
                self._told += len(told)
        return found
