"""Between text and tokens: prompts and turns in, correctly joined UTF-8 out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any

from tokenswift_py.errors import check

Message = dict[str, str]
Prompt = str | Sequence[Message] | Sequence[int]

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
        return list(tokenizer(prompt).input_ids)
    fine = isinstance(prompt, str) or all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    check(fine, "prompt", prompt, "a text, messages with role and content, or token ids")
    check(bool(tokenizer.chat_template), "prompt", "messages", "this tokenizer has no chat template; give a text")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def turn_tokens(tokenizer: Any, request: str, eos: Collection[int], raw: bool) -> list[int]:
    """What is forced into the text when a chapter ended and `request` asks for the next.

    It is what the chat template puts between the model's answer and its next one, without the end-of-sequence token
    that ended the chapter.
    """
    if raw or not tokenizer.chat_template:
        return list(tokenizer(f"\n\n{request}\n\n", add_special_tokens=False).input_ids)
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, ("", ANSWER, request), strict=True)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    check(ANSWER in text, "chapters", request, "this model's chat template drops earlier answers")
    tokens = list(tokenizer(text.split(ANSWER, 1)[1], add_special_tokens=False).input_ids)
    return tokens[1:] if tokens and tokens[0] in eos else tokens


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that are no text: chat markup, end of sequence and the like."""
    return frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)


class TextJoiner:
    """Tokens in, text out as soon as it is certain: no half characters, nothing of a stop string.

    The pieces of one chapter, `finish` included, join to exactly what decoding all of its tokens gives, cut before
    the first stop string. (But for invalid UTF-8 in byte-fallback vocabularies: there a bad byte turns the whole
    characters before it bad, which may have been told.)
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self._tokenizer = tokenizer.backend_tokenizer
        self._special = special_ids(tokenizer)
        self._stops = tuple(stops)
        self._window: list[int] = []  # tokens not told yet, behind the last told ones, which are their context
        self._told = 0
        self._held = ""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain after these tokens; empty while a character or a stop string may go on."""
        for token in tokens:
            if token in self._special:
                continue
            self._window.append(token)
            text = self._untold()
            if text and not text.endswith("\ufffd"):
                self._held += text
                del self._window[: self._told]
                self._told = len(self._window)
        certain = self._certain()
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def finish(self) -> str:
        """The rest of the chapter: what was held back, cut before a stop string."""
        rest = self._held + self._untold()
        starts = [rest.find(stop) for stop in self._stops if stop in rest]
        return rest[: min(starts, default=len(rest))]

    def _untold(self) -> str:
        """Text of the window behind its context. (tokenizers' DecodeStream does this too, but raises an exception
        where invalid UTF-8 in a byte-fallback vocabulary changes the context's text.)"""
        context, window = self._window[: self._told], self._window
        known, text = (self._tokenizer.decode(ids, skip_special_tokens=True) for ids in (context, window))
        return str(text[len(known) :])

    def _certain(self) -> int:
        """Characters held before anything that is, or may become, a stop string."""
        held = self._held
        found = [held.index(stop) for stop in self._stops if stop in held]
        begun = [len(held) - size for stop in self._stops for size in range(1, len(stop)) if held.endswith(stop[:size])]
        return min(found + begun, default=len(held))
