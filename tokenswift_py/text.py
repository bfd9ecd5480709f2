"""The way between text and tokens: prompts and turns in, correctly joined UTF-8 out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

from tokenswift_py.errors import UserError, check, check_text, one_line

logger = logging.getLogger("tokenswift")

Message = dict[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]

BAD = "\ufffd"  # stands for invalid UTF-8, and for a character that is not whole yet
# It is longer than anything that may still become whole. A byte-fallback vocabulary decodes to a BAD for each byte of
# a character that is not whole, at most 3, and for each byte of the whole character before it.
INVALID_RUN = 8 * BAD
MARKS = "\ufdd0\ufdd1\ufdd2\ufdd3"  # Unicode's noncharacters: the first of these that no message has marks names
ROLES = ("user", "assistant", "user")
ANSWER = "\u241f answer \u241f"  # stands for the model's answer while a turn is cut out of the chat template


@dataclass(frozen=True)
class Chat:
    """The rules by which a prompt becomes tokens.

    raw:       whether no chat template is used: the prompt is the beginning of the text.
    system:    a system message before the prompt.
    template:  a chat template instead of the tokenizer's.
    arguments: further variables of the template.
    continues: whether the last message is the assistant's, and the text goes on from it.
    no_bos:    whether no token that begins a sequence is put before the prompt.
    special:   whether the name of a control token in a message is that token.
    """

    raw: bool = False
    system: str | None = None
    template: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False
    no_bos: bool = False
    special: bool = False

    def templated(self, tokenizer: Any) -> bool:
        """Returns whether there is a chat template, and it is wanted."""
        return not self.raw and bool(self.template or tokenizer.chat_template)


def prompt_tokens(tokenizer: Any, prompt: Prompt, chat: Chat) -> list[int]:
    """Returns the token ids of a text or of chat messages; ids are returned unchanged.

    A text is one user message, unless `raw` is set or there is no chat template.
    """
    listed = isinstance(prompt, Sequence) or hasattr(prompt, "__array__")
    check(listed, "prompt", prompt, "a text, chat messages or token ids")
    if not isinstance(prompt, str) and all(isinstance(item, Integral) for item in prompt):
        tokens = [int(item) for item in prompt]  # type: ignore[arg-type]
        check(min(tokens, default=0) >= 0, "prompt", min(tokens, default=0), "token ids are not negative")
        check(chat.system is None, "system", chat.system, "not with token ids")
        check(not chat.continues, "continue_final_message", True, "not with token ids, which are gone on from")
        return tokens
    templated = chat.templated(tokenizer)
    if isinstance(prompt, str) and not templated:
        check(chat.system is None, "system", chat.system, "only with a chat template, and not with raw")
        check(not chat.continues, "continue_final_message", True, "only with messages; a raw prompt is gone on from")
        check_text("prompt", prompt)
        return raw_tokens(tokenizer, prompt, chat)
    fine = isinstance(prompt, str) or all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    check(fine, "prompt", prompt, "a text, messages with role and content, or token ids")
    allowed = "not with raw; give a text" if chat.raw else "this tokenizer has no chat template; give a text"
    check(templated, "prompt", "messages", allowed)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if chat.system is not None:
        there = any(message["role"] == "system" for message in messages)  # type: ignore[index]
        check(not there, "system", chat.system, "the messages have a system message already")
        messages.insert(0, {"role": "system", "content": chat.system})
    if chat.continues:
        role = messages[-1]["role"] if messages else None  # type: ignore[index]
        check(role == "assistant", "continue_final_message", True, "only where the last message is the assistant's")
    tokens = templated_ids(tokenizer, messages, chat)
    return tokens[1:] if chat.no_bos and tokens[:1] == [tokenizer.bos_token_id] else tokens


def raw_tokens(tokenizer: Any, prompt: str, chat: Chat) -> list[int]:
    """Returns the token ids of the beginning of a text, with the tokens that the tokenizer puts around one. A text that
    begins with a BOS gets no second one, because no model has seen two."""
    around = not chat.no_bos
    if not chat.special:
        inside = next((text for text in special_texts(tokenizer) if text in prompt), None)
        if inside is not None:
            logger.warning("prompt: %s in it is text; with special it is the control token", inside)
        return token_ids(tokenizer, prompt, special=around, as_text=True)
    tokens, bos = token_ids(tokenizer, prompt, special=around), tokenizer.bos_token_id
    if bos is None or tokens[:2] != [bos, bos] or token_ids(tokenizer, prompt)[:2] == [bos, bos]:
        return tokens
    logger.warning("prompt: it begins with %s, so the tokenizer's own is left out", tokenizer.bos_token)
    return tokens[1:]


def turn_tokens(tokenizer: Any, request: str, eos: Collection[int], chat: Chat) -> list[int]:
    """Returns the tokens that are forced into the text when a chapter ended and `request` asks for the next.

    The chat template puts them between the model's answer and its next one. The end-of-sequence token that ended the
    chapter is not among them.
    """
    if not chat.templated(tokenizer):
        return token_ids(tokenizer, f"\n\n{request}\n\n", as_text=not chat.special)
    messages = [{"role": role, "content": text} for role, text in zip(ROLES, ("", ANSWER, request), strict=True)]
    mark, text = rendered(tokenizer, messages, replace(chat, continues=False))
    check(ANSWER in text, "chapters", request, "this model's chat template drops earlier answers")
    tokens = marked_ids(tokenizer, mark, text.split(ANSWER, 1)[1])
    return tokens[1:] if tokens and tokens[0] in eos else tokens


def end_tokens(tokenizer: Any, eos: Collection[int], chat: Chat | None = None) -> tuple[int, ...]:
    """Returns every token that ends a text: the checkpoint's own, the tokenizer's, and the special token that the chat
    template puts after an answer, whether or not the checkpoint names it."""
    ends, chat = [*eos, *([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)])], chat or Chat()
    if chat.templated(tokenizer):
        messages = [{"role": role, "content": text} for role, text in zip(ROLES, ("x", ANSWER, "x"), strict=True)]
        with suppress(UserError):  # a template that takes no such talk is reported when it is used
            text = rendered(tokenizer, messages, replace(chat, continues=False))[1]
            behind = token_ids(tokenizer, text.partition(ANSWER)[2].lstrip())
            ends += [token for token in behind[:1] if token in special_ids(tokenizer) - {tokenizer.bos_token_id}]
    return tuple(dict.fromkeys(ends))


def token_ids(tokenizer: Any, text: str, special: bool = False, as_text: bool = False) -> list[int]:
    """Returns the token ids of a text. Raises UserError for a tokenizer that fails.

    special: whether the tokens that the tokenizer puts around a text are included.
    as_text: whether the names of control tokens in it are text.
    """
    with one_line("tokenizer: it does not take the text"):
        if as_text and any(name in text for name in special_texts(tokenizer)):
            return list(reading_text(tokenizer)[0].encode(text, add_special_tokens=special).ids)
        return list(tokenizer(text, add_special_tokens=special).input_ids)


def word_ids(tokenizer: Any, word: str | Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the ways in which the tokenizer writes a word: alone, and after a space. Ids are one way."""
    if not isinstance(word, str):
        return [tuple(int(token) for token in word)]
    alone, spaced = (tuple(token_ids(tokenizer, text)) for text in (word, f" {word.lstrip()}"))
    check(len(alone) > 0, "ban_words", word, "a text that has tokens")
    return list(dict.fromkeys((alone, spaced)))


def templated_ids(tokenizer: Any, messages: Sequence[Any], chat: Chat) -> list[int]:
    """Returns the token ids of chat messages in the chat template."""
    mark, text = rendered(tokenizer, messages, chat)
    check_text("prompt", text)
    return marked_ids(tokenizer, mark, text)


def rendered(tokenizer: Any, messages: Sequence[Any], chat: Chat) -> tuple[str, str]:
    """Renders messages by the chat template, up to where the model answers. Returns the text, and before it the
    character that marks names of control tokens which are text ("" where no message has one). Raises UserError for a
    template that is broken, and for messages with such names and all of MARKS."""
    said, names = "\n".join(texts_in([*messages, chat.arguments])), () if chat.special else special_texts(tokenizer)
    mark = ""
    if named := next((name for name in names if name in said), ""):
        mark = next((mark for mark in MARKS if mark not in said), "")
        check(bool(mark), "prompt", named, "beside U+FDD0 to U+FDD3 it cannot be told from the control token")
    with one_line("prompt: the model's chat template does not take it"):
        text = tokenizer.apply_chat_template(
            [marked(message, names, mark) for message in messages] if mark else list(messages),
            chat_template=chat.template, tokenize=False, add_generation_prompt=not chat.continues,
            continue_final_message=chat.continues, **chat.arguments,
        )  # fmt: skip
    return mark, str(text)


def texts_in(value: Any) -> Iterator[str]:
    """Yields every text in a message, or in any part of it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def marked(value: Any, names: Sequence[str], mark: str) -> Any:
    """Returns a message, or any part of it, with the number of each name behind a mark in the name's place."""
    if isinstance(value, str):
        for number, name in enumerate(names):
            value = value.replace(name, f"{mark}n{number};")
        return value
    if isinstance(value, dict):
        return {key: marked(item, names, mark) for key, item in value.items()}
    return [marked(item, names, mark) for item in value] if isinstance(value, list) else value


def marked_ids(tokenizer: Any, mark: str, text: str) -> list[int]:
    """Returns the token ids of a text in which names between marks are text, and all others control tokens."""
    if not mark:
        return token_ids(tokenizer, text)
    backend, control = reading_text(tokenizer, mark)
    added = tokenizer.added_tokens_decoder  # made anew each time
    # A mark only begins something, so what a user types between two of them cannot become a token's name.
    for token in sorted(control.values(), key=lambda token: -len(added[token].content)):
        text = text.replace(added[token].content, f"{mark}t{token};")
    for number, name in enumerate(special_texts(tokenizer)):
        text = text.replace(f"{mark}n{number};", name)
    with one_line("tokenizer: it does not take the text"):
        ids = backend.encode(text, add_special_tokens=False).ids
    return [control.get(token, token) for token in ids]


# What is made once of a tokenizer and kept as long as it, for texts that are read or begun at the same time.
READING_TEXT: WeakKeyDictionary[Any, dict[tuple[str, int], tuple[Any, dict[int, int]]]] = WeakKeyDictionary()
TOKEN_TEXTS: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()


def reading_text(tokenizer: Any, mark: str = "") -> tuple[Any, dict[int, int]]:
    """Returns a copy of the tokenizer that reads the names of control tokens as text, because to switch the tokenizer
    itself would switch it for all threads. With a mark the copy knows each control token by another name, which stays a
    token: the second value has the control token of each. So the chat template's are told from those in messages."""
    from tokenizers import AddedToken

    kept = READING_TEXT.setdefault(tokenizer, {})
    key = mark, len(tokenizer)
    if key not in kept:
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()  # which a file, or an earlier call, may ask for
        backend.no_padding()
        special = {token: added for token, added in tokenizer.added_tokens_decoder.items() if added.special and mark}
        backend.add_tokens([
            AddedToken(f"{mark}t{token};", lstrip=added.lstrip, rstrip=added.rstrip, single_word=added.single_word,
                       normalized=added.normalized, special=False)
            for token, added in special.items()
        ])  # fmt: skip
        backend.encode_special_tokens = True
        kept[key] = backend, {backend.token_to_id(f"{mark}t{token};"): token for token in special}
    return kept[key]


def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """Returns the names of control tokens, the longest first."""
    names = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special and added.content}
    return tuple(sorted(names, key=lambda name: (-len(name), name)))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Returns the tokens that are no text: chat markup, end of sequence and the like."""
    return frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)


class TextJoiner:
    """Turns tokens into text as soon as it is certain. It returns no half characters, and nothing of a stop string.

    The pieces of one chapter, `finish` included, join to exactly what decoding all of its tokens gives, cut before the
    first stop string. Invalid UTF-8 in byte-fallback vocabularies is an exception: there a bad byte turns the whole
    characters before it bad, which may have been returned already.

    before: tokens that the text goes on from. A SentencePiece vocabulary drops the space at the start of the tokens it
            decodes, so a text that continues another is decoded together with its end.
    keep: whether the text is cut after the first stop string rather than before it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), before: Sequence[int] = (), keep: bool = False):
        self._tokenizer = tokenizer.backend_tokenizer
        self._special = special_ids(tokenizer)
        self._stops, self._keep = tuple(stops), keep
        # The latest tokens. The first of them were told, and are the context of the others.
        self._window = [token for token in before if self._has_text(token)]
        self._context = len(self._window)  # how many of them were told
        self._told = len(self._decode(self._window).rstrip(BAD))  # characters of the window's text that were told
        self._held = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Returns the text that is certain after these tokens, empty while a character or a stop string may go on."""
        for token in tokens:
            if not self._has_text(token):
                continue
            self._window.append(token)
            text = self._decode(self._window)
            if text.endswith(INVALID_RUN):
                self._tell(text, len(text) - len(INVALID_RUN) + 1)
                self._shorten(text[self._told :])
            elif not text.endswith(BAD) and len(text) > self._told:
                self._tell(text, len(text))
                del self._window[: self._context]
                self._context, self._told = len(self._window), len(self._decode(self._window))
        certain = self._certain()
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def finish(self) -> str:
        """Returns the rest of the chapter: the text that was held back, cut at a stop string."""
        rest = self._held + self._decode(self._window)[self._told :]
        cuts = [rest.find(stop) + (len(stop) if self._keep else 0) for stop in self._stops if stop in rest]
        return rest[: min(cuts, default=len(rest))]

    def _has_text(self, token: int) -> bool:
        """Returns whether a token has a text. An id without a token has none."""
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def _decode(self, tokens: Sequence[int]) -> str:
        """Decodes tokens to text. (tokenizers' DecodeStream does this too, but raises an exception where invalid UTF-8
        in a byte-fallback vocabulary changes the context's text.)"""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _tell(self, text: str, stop: int) -> None:
        """Returns the window's text up to character `stop`."""
        self._held += text[self._told : stop]
        self._told = max(self._told, stop)

    def _shorten(self, untold: str) -> None:
        """Drops tokens of a long run of invalid bytes. The last ones are context enough, because decoding falls into
        step within a character. Otherwise each token would decode all of the run again."""
        if len(self._window) > 4 * len(INVALID_RUN):
            del self._window[: -2 * len(INVALID_RUN)]
            self._context, self._told = 0, len(self._decode(self._window)) - len(untold)

    def _certain(self) -> int:
        """Returns how many characters stand before anything that is, or may become, a stop string."""
        held = self._held
        found = [held.index(stop) for stop in self._stops if stop in held]
        begun = [len(held) - size for stop in self._stops for size in range(1, len(stop)) if held.endswith(stop[:size])]
        return min(found + begun, default=len(held))


def tokens_containing(tokenizer: Any, strings: Sequence[str]) -> set[int]:
    """Returns every token whose text holds one of the strings, and all special tokens, which no repetition should
    cross."""
    texts = TOKEN_TEXTS.get(tokenizer)
    if texts is None or len(texts) != len(tokenizer):
        texts = TOKEN_TEXTS[tokenizer] = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    found = {string: {token for token, text in enumerate(texts) if string in text} for string in strings}
    for string in (string for string, tokens in found.items() if not tokens):
        logger.warning("dry_breakers: no token holds %r, so it breaks nothing; name its end", string)
    return set(special_ids(tokenizer)).union(*found.values())


def token_of(tokenizer: Any, item: int | str, field: str) -> int:
    """Returns a token id unchanged, and the id of a string, which must be one token."""
    if isinstance(item, int):
        return item
    tokens = token_ids(tokenizer, item)
    check(len(tokens) == 1, field, item, f"token ids, or texts that are one token (this is {len(tokens)})")
    return tokens[0]
