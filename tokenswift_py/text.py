"""Between text and tokens: prompts and turns in, correctly joined UTF-8 out."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from numbers import Integral
from typing import Any

from tokenswift_py.errors import UserError, check, check_text, one_line

logger = logging.getLogger("tokenswift")

Message = dict[str, str]
Prompt = str | Sequence[Message] | Sequence[int]

BAD = "\ufffd"  # what decoding has for invalid UTF-8, and for a character that is not whole yet
# More than a character that is not whole can be: a byte-fallback vocabulary has one for each of its bytes, at most 3,
# and for each of the whole character's before it, which it decodes together.
HOPELESS = 8 * BAD
ROLES = ("user", "assistant", "user")
ANSWER = "\u241f answer \u241f"  # stands for the model's answer while a turn is cut out of the chat template


def prompt_tokens(tokenizer: Any, prompt: Prompt, raw: bool) -> list[int]:
    """Token ids of a text, of chat messages, or of ids as they are.

    A text is one user message, unless `raw` or the tokenizer has no chat template.
    """
    listed = isinstance(prompt, Sequence) or hasattr(prompt, "__array__")
    check(listed, "prompt", prompt, "a text, chat messages or token ids")
    if not isinstance(prompt, str) and all(isinstance(item, Integral) for item in prompt):
        tokens = [int(item) for item in prompt]  # type: ignore[arg-type]
        check(min(tokens, default=0) >= 0, "prompt", min(tokens, default=0), "token ids are not negative")
        return tokens
    if isinstance(prompt, str) and (raw or not tokenizer.chat_template):
        check_text("prompt", prompt)
        return raw_tokens(tokenizer, prompt)
    fine = isinstance(prompt, str) or all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    check(fine, "prompt", prompt, "a text, messages with role and content, or token ids")
    check(bool(tokenizer.chat_template), "prompt", "messages", "this tokenizer has no chat template; give a text")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = templated(tokenizer, messages)
    check_text("prompt", text)
    return token_ids(tokenizer, text)


def raw_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of the beginning of a text, with what the tokenizer puts around one: but no second BOS before one that
    the text begins with, for no model has seen two."""
    tokens, bos = token_ids(tokenizer, prompt, special=True), tokenizer.bos_token_id
    if bos is None or tokens[:2] != [bos, bos] or token_ids(tokenizer, prompt)[:2] == [bos, bos]:
        return tokens
    logger.warning("prompt: it begins with %s, so the tokenizer's own is left out", tokenizer.bos_token)
    return tokens[1:]


def turn_tokens(tokenizer: Any, request: str, eos: Collection[int], raw: bool) -> list[int]:
    """What is forced into the text when a chapter ended and `request` asks for the next.

    It is what the chat template puts between the model's answer and its next one, without the end-of-sequence token
    that ended the chapter.
    """
    if raw or not tokenizer.chat_template:
        return token_ids(tokenizer, f"\n\n{request}\n\n")
    messages = [{"role": role, "content": text} for role, text in zip(ROLES, ("", ANSWER, request), strict=True)]
    text = templated(tokenizer, messages)
    check(ANSWER in text, "chapters", request, "this model's chat template drops earlier answers")
    tokens = token_ids(tokenizer, text.split(ANSWER, 1)[1])
    return tokens[1:] if tokens and tokens[0] in eos else tokens


def end_tokens(tokenizer: Any, eos: Collection[int]) -> tuple[int, ...]:
    """Every token that ends a text: the checkpoint's own, the tokenizer's, and the special token that the chat template
    puts behind an answer, whether or not the checkpoint names it."""
    ends = [*eos, *([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)])]
    if tokenizer.chat_template:
        messages = [{"role": role, "content": text} for role, text in zip(ROLES, ("x", ANSWER, "x"), strict=True)]
        with suppress(UserError):  # a template that takes no such talk is told of where one is asked for
            behind = token_ids(tokenizer, templated(tokenizer, messages).partition(ANSWER)[2].lstrip())
            ends += [token for token in behind[:1] if token in special_ids(tokenizer) - {tokenizer.bos_token_id}]
    return tuple(dict.fromkeys(ends))


def token_ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """special: with the tokens that the tokenizer puts around a text. Raises UserError for a tokenizer that fails."""
    with one_line("tokenizer: it does not take the text"):
        return list(tokenizer(text, add_special_tokens=special).input_ids)


def templated(tokenizer: Any, messages: Sequence[Any]) -> str:
    """What the chat template makes of them, up to where the model answers. Raises UserError for one that is broken."""
    with one_line("prompt: the model's chat template does not take it"):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that are no text: chat markup, end of sequence and the like."""
    return frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)


class TextJoiner:
    """Tokens in, text out as soon as it is certain: no half characters, nothing of a stop string.

    The pieces of one chapter, `finish` included, join to exactly what decoding all of its tokens gives, cut before
    the first stop string. (But for invalid UTF-8 in byte-fallback vocabularies: there a bad byte turns the whole
    characters before it bad, which may have been told.)

    before: tokens that the text goes on from. A SentencePiece vocabulary drops the space at the start of what it
    decodes, so a text that continues another is decoded behind it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), before: Sequence[int] = ()):
        self._tokenizer = tokenizer.backend_tokenizer
        self._special = special_ids(tokenizer)
        self._stops = tuple(stops)
        # The latest tokens, the first of them told: they are the context of the others.
        self._window = [token for token in before if self._has_text(token)]
        self._context = len(self._window)  # how many these are
        self._told = len(self._decode(self._window).rstrip(BAD))  # characters of the window's text that were told
        self._held = ""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain after these tokens; empty while a character or a stop string may go on."""
        for token in tokens:
            if not self._has_text(token):
                continue
            self._window.append(token)
            text = self._decode(self._window)
            if text.endswith(HOPELESS):
                self._tell(text, len(text) - len(HOPELESS) + 1)
                self._shorten(text[self._told :])
            elif not text.endswith(BAD) and len(text) > self._told:
                self._tell(text, len(text))
                del self._window[: self._context]
                self._context, self._told = len(self._window), len(self._decode(self._window))
        certain = self._certain()
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def finish(self) -> str:
        """The rest of the chapter: what was held back, cut before a stop string."""
        rest = self._held + self._decode(self._window)[self._told :]
        starts = [rest.find(stop) for stop in self._stops if stop in rest]
        return rest[: min(starts, default=len(rest))]

    def _has_text(self, token: int) -> bool:
        """An id without a token has none."""
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def _decode(self, tokens: Sequence[int]) -> str:
        """(tokenizers' DecodeStream does this too, but raises an exception where invalid UTF-8 in a byte-fallback
        vocabulary changes the context's text.)"""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _tell(self, text: str, stop: int) -> None:
        """The window's text up to character `stop`."""
        self._held += text[self._told : stop]
        self._told = max(self._told, stop)

    def _shorten(self, untold: str) -> None:
        """Of a long run of invalid bytes the last tokens are context enough: decoding falls into step within a
        character. Else each token would decode all of the run again."""
        if len(self._window) > 4 * len(HOPELESS):
            del self._window[: -2 * len(HOPELESS)]
            self._context, self._told = 0, len(self._decode(self._window)) - len(untold)

    def _certain(self) -> int:
        """Characters held before anything that is, or may become, a stop string."""
        held = self._held
        found = [held.index(stop) for stop in self._stops if stop in held]
        begun = [len(held) - size for stop in self._stops for size in range(1, len(stop)) if held.endswith(stop[:size])]
        return min(found + begun, default=len(held))
