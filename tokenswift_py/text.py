"""Between text and tokens: prompts and turns in, correctly joined UTF-8 out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from tokenswift_py.errors import check

Message = dict[str, str]
Prompt = str | Sequence[Message] | Sequence[int]

ANSWER = "\u241f answer \u241f"  # stands for the model's answer while a turn is cut out of the chat template


def prompt_tokens(tokenizer: Any, prompt: Prompt, raw: bool) -> list[int]:
    """Token ids of a text, of chat messages, or of ids as they are.

    A text is one user message, unless `raw` or the tokenizer has no chat template.
    """
    if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
        for token in prompt:
            check(token >= 0, "prompt", token, "token ids are not negative")  # type: ignore[operator]
        return list(prompt)  # type: ignore[arg-type]
    if isinstance(prompt, str) and (raw or not tokenizer.chat_template):
        return list(tokenizer(prompt).input_ids)
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


class TextJoiner:
    """Tokens in, text out as soon as it is certain: no half characters, nothing of a stop string.

    The pieces of one chapter, `finish` included, join to exactly what decoding all of its tokens gives, cut before
    the first stop string.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._streamed = 0
        self._held = ""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain after these tokens; empty while a character or a stop string may go on."""
        for token in tokens:
            self._tokens.append(token)
            text = self._stream.step(self._tokenizer.backend_tokenizer, token)
            if text is not None:
                self._streamed += len(text)
                self._held += text
        certain = len(self._held) - self._maybe_stop()
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def finish(self) -> str:
        """The rest of the chapter: what was held back, cut before a stop string."""
        whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        rest = self._held + whole[self._streamed :]
        starts = [rest.find(stop) for stop in self._stops if stop in rest]
        return rest[: min(starts, default=len(rest))]

    def _maybe_stop(self) -> int:
        """Characters at the end that are, or may become, a stop string."""
        for stop in self._stops:
            if stop in self._held:
                return len(self._held) - self._held.index(stop)
        ends = (size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size]))
        return max(ends, default=0)
