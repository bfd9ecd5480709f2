"""Grammars: which tokens may come next, by llguidance (https://github.com/guidance-ai/llguidance).

The tokens that may follow are a function of the chapter's own tokens so far, so each node of a tree has its own (law
5). One matcher serves the walk and every drafter. It follows the history that it is asked about, and goes back where
guesses were forgotten.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tokenswift_py.decoding.history import History
from tokenswift_py.errors import NumericsError, UserError, check, check_text, need_extra, one_line

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# JSON is written on one line like Python's json.dumps, where its schema does not say otherwise (`x-guidance`). Room for
# any whitespace would leave no token forced, and let a model write blanks for ever.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Vocabulary:
    """A tokenizer in llguidance's form, made in a second, for all grammars of a model.

    vocab_size: size of the model's vocabulary.
    eos:        its end-of-sequence tokens, one of which ends a text of a grammar.
    version:    version of llguidance, on which masks depend.
    ends:       a bit for each token: whether it is an EOS.

    Raises UserError without llguidance, for a tokenizer that it cannot read, and for a model that has no token to end a
    text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos: Sequence[int]):
        need_extra("grammar", "grammar", "llguidance")
        from llguidance import LLTokenizer, get_version

        self.size, self.eos = vocab_size, frozenset(token for token in eos if 0 <= token < vocab_size)
        self.version = get_version()
        check(bool(self.eos), "grammar", "a grammar", "this model has no end-of-sequence token to end its text")
        self.ends = np.zeros((vocab_size + 31) // 32, np.uint32)
        for token in self.eos:
            self.ends[token // 32] |= np.uint32(1 << token % 32)
        with one_line("grammar: llguidance cannot read this model's tokenizer"):
            described = tokenizer.backend_tokenizer.to_str()
            self.tokenizer: LLTokenizer = LLTokenizer(described, n_vocab=vocab_size, eos_token=sorted(self.eos))


class Grammar:
    """The language that a text must belong to. Raises UserError for a text that is no grammar, and for a grammar that
    no token of the vocabulary begins.

    kind: json_schema, grammar (Lark, in llguidance's dialect) or regex. text: the grammar itself.
    """

    def __init__(self, kind: str, text: str, vocabulary: Vocabulary):
        from llguidance import LLMatcher

        self.kind, self.vocabulary = kind, vocabulary
        with one_line(f"{kind}: llguidance cannot read it"):
            if kind == "json_schema":
                self._compiled = LLMatcher.grammar_from_json_schema(text, defaults=JSON_FORM)  # type: ignore[arg-type]
            else:
                make = LLMatcher.grammar_from_lark if kind == "grammar" else LLMatcher.grammar_from_regex
                self._compiled = make(text)
        matcher = self.matcher()
        if matcher.is_error():
            raise UserError(f"{kind}: {' '.join(matcher.get_error().split())[:300]}")
        try:
            begins = bool(Follower(self).mask(History()).any())
        except NumericsError:
            begins = False
        check(begins, kind, text, "this model's tokenizer has no token that begins such a text")

    def matcher(self) -> Any:
        """Makes a new matcher, at the beginning."""
        from llguidance import LLMatcher

        return LLMatcher(self.vocabulary.tokenizer, self._compiled, log_level=0)


class Follower:
    """A grammar's matcher beside a history. Every method is about the token after the history's last. Each chapter
    begins anew."""

    def __init__(self, grammar: Grammar):
        self.grammar = grammar
        self._matcher = grammar.matcher()
        self._chapters: list[int] = []
        self._start = 0  # the position of the chapter that the matcher is in
        self._seen = History()  # the chapter's tokens, as far as they were shown to the matcher
        self._taken = 0  # how many of these it took; it sees none after a token that it refuses, or after an EOS
        self._history: History | None = None  # the latest one, when it had been cut so often
        self._cuts = 0
        # The text before a token that no matcher could follow, and why.
        self._refused: tuple[bytes, str] | None = None

    def begin_chapter(self, position: int) -> None:
        """Begins a chapter, whose own text begins at absolute `position`, after those of the chapters before it."""
        self._chapters.append(position)

    def holds(self, history: History) -> bool:
        """Returns whether the chapter's tokens begin a text of the grammar, or are one with its EOS."""
        self._follow(history)
        behind, eos = self._seen.tokens[self._taken :].tolist(), self.grammar.vocabulary.eos
        return not behind or (len(behind) == 1 and behind[0] in eos and bool(self._matcher.is_accepting()))

    def mask(self, history: History) -> npt.NDArray[np.uint32]:
        """Returns a bit for each token, the lowest first: whether it may be next. None may after a text's end, nor
        after tokens that the grammar has no place for.

        Raises NumericsError where a limit of the matcher's is met. It never leaves an error, which a guess may have led
        to: a new matcher must meet it at this very place.
        """
        why, ends = "", self.grammar.vocabulary.ends
        if self._refused is not None and self._refused[0] == history.tokens.tobytes():  # the same guess once more
            raise NumericsError(self._refused[1])
        for _ in range(2):
            self._follow(history)
            if not self._matcher.is_error():
                if self._taken < len(self._seen):
                    return np.zeros_like(ends)
                bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(ends)]  # it may be a word longer
                if not self._matcher.is_error():
                    # Where no token fits, the forced one may be unknown to the tokenizer, and that its EOS.
                    return bits if self._matcher.is_accepting() else bits & ~ends
            why = " ".join(self._matcher.get_error().split())[:200]
            self._begin_again()
        refused = f"the grammar cannot be followed beyond position {len(history)}: {why}"
        self._refused = history.tokens.tobytes(), refused
        raise NumericsError(refused)

    def outside(self, history: History) -> npt.NDArray[np.bool_]:
        """Returns [vocab_size] whether a token may not be next."""
        bits = self.mask(history).view(np.uint8)
        return ~np.unpackbits(bits, bitorder="little", count=self.grammar.vocabulary.size).view(np.bool_)

    def forced(self, history: History) -> int | None:
        """Returns the only token that may be next, if there is but one."""
        mask = self.mask(history)
        words = np.flatnonzero(mask)
        word = int(mask[words[0]]) if len(words) == 1 else 0
        return 32 * int(words[0]) + word.bit_length() - 1 if word and not word & (word - 1) else None

    def _follow(self, history: History) -> None:
        """Brings the matcher to the place after the history's last token."""
        chapter = bisect_right(self._chapters, len(history))
        start = self._chapters[chapter - 1] if chapter else 0
        if start != self._start:
            self._go_back(0)
            self._start, self._history = start, None
        tokens, known = history.tokens[start:], len(self._seen)
        if history is not self._history or history.cuts != self._cuts:
            known = common(self._seen.tokens, tokens)
            self._history, self._cuts = history, history.cuts
        if known < len(self._seen):
            self._go_back(known)
        if len(tokens) > known:
            self._show(tokens[known:].tolist())

    def _begin_again(self) -> None:
        self._matcher, self._taken, self._history = self.grammar.matcher(), 0, None
        self._seen.truncate(0)

    def _go_back(self, length: int) -> None:
        if length < self._taken:
            self._matcher.rollback(self._taken - length)
            self._taken = length
        self._seen.truncate(length)

    def _show(self, tokens: list[int]) -> None:
        if self._taken == len(self._seen):
            eos = self.grammar.vocabulary.eos
            end = next((place for place, token in enumerate(tokens) if token in eos), len(tokens))
            self._taken += self._matcher.try_consume_tokens(tokens[:end])
        self._seen.extend(tokens)


def common(one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> int:
    """Returns how many tokens both begin with."""
    shorter = min(len(one), len(other))
    unequal = one[:shorter] != other[:shorter]
    return int(unequal.argmax()) if unequal.any() else shorter


def schema_text(schema: Any) -> str:
    """Returns a JSON schema, given as JSON or as the value of it, as JSON on one line. The order of keys stays, because
    texts follow it. Raises UserError."""
    with one_line("json_schema: it is no JSON"):
        value = json.loads(schema) if isinstance(schema, str) else json.loads(json.dumps(schema))
        check(isinstance(value, dict), "json_schema", schema, "a JSON schema, which is an object")
        return json.dumps(value)


@dataclass(frozen=True)
class Language:
    """The kind of a grammar: a text, which llguidance reads where there is a tokenizer, or None. json: whether it is
    JSON, or the value of it."""

    json: bool = False

    def check(self, name: str, value: Any) -> None:
        if self.json and value is not None:
            value = schema_text(value)
        check(value is None or (isinstance(value, str) and value != ""), name, value, "a text, not empty")
        check_text(name, value or "")
