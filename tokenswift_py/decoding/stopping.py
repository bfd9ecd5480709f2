"""The rules that end a text. Each is a function of the token sequence, asked after each token inside the walk."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.statistics import Loop, LoopDetector
from tokenswift_py.text import BAD, TextJoiner

logger = logging.getLogger("tokenswift")


class Stops:
    """Decides where a text ends: at EOS tokens, stop tokens and strings, loops, or the number of new tokens.

    decode:  function from token ids to text, needed for stop strings only.
    special: ids that decode to nothing.
    on_loop: reaction where the text begins to repeat itself: warn (a line to the log), stop or ignore.
    tokens:  ids that end the text like a stop string.
    may_end_from: function from a position to the first position that may end its text or chapter
             (`Sampler.may_end_from`, which bans EOS and stop tokens before it). A stop string that an earlier token
             completes is text, like with vLLM's min_tokens.
    goes_on: whether the text continues the tokens before it, so that a space at its start belongs to it. A
             SentencePiece vocabulary drops a space at the start of the tokens it decodes.

    Call it with a history, once for each new token. It returns "eos", "stop", "loop", "length" or None. Forced tokens
    do not count as new, and no stop string begins in them. Loops are looked for in the new tokens alone, joined across
    forced ones, so a model that answers every turn with the same words loops.
    """

    def __init__(
        self,
        max_new_tokens: int,
        eos: Collection[int] = (),
        strings: Sequence[str] = (),
        decode: Callable[[Sequence[int]], str] | None = None,
        special: Collection[int] = (),
        on_loop: str = "ignore",
        tokens: Collection[int] = (),
        may_end_from: Callable[[int], int] = lambda position: 0,
        goes_on: bool = False,
    ):
        if strings and decode is None:
            raise ValueError("stop strings need a decoder")
        self.tokens_left = max_new_tokens
        self.also: Callable[[History], bool] | None = None  # another end of the text, asked after each token
        self.loops = LoopDetector()
        self._on_loop = on_loop
        self._goes_on = goes_on
        self._before: list[int] = []  # the token that the new text goes on from
        self._eos = frozenset(eos)
        self._tokens = frozenset(tokens)
        self._may_end_from = may_end_from
        self._passed = False  # whether the latest tokens may hold a stop string that ended nothing
        self._strings = tuple(strings)
        self._decode = decode
        self._special = frozenset(special)
        # A token carries at least one byte, so this many tokens hold any stop string and a character before it.
        reach = max((len(text.encode()) for text in strings), default=0) + BYTES
        self._recent: deque[int] = deque(maxlen=reach)  # the latest new tokens that have a text

    def begin_chapter(self) -> None:
        """Begins a chapter. No stop string may begin in earlier tokens, which are over or were forced."""
        self._recent.clear()
        self._passed = False

    def __call__(self, history: History) -> str | None:
        self.tokens_left -= 1
        token = history[-1]
        loop = self.loops.push(token)
        ended = self.also is not None and self.also(history)
        if loop and self._on_loop == "warn":
            logger.warning(loop_note(loop))
        if token in self._eos:
            return "eos"
        if ended or token in self._tokens or self._stopped_by(history):
            return "stop"
        if self.loops.following and self._on_loop == "stop":
            return "loop"
        return "length" if self.tokens_left <= 0 else None

    def _stopped_by(self, history: History) -> bool:
        """Returns whether a stop string ends in the latest token, and may end there. A token without text ends none."""
        token, position = history[-1], len(history) - 1
        if self._decode is None or not self._strings or token in self._special:
            return False
        if not self._recent:
            self._before = self._latest_text(history)
        self._recent.append(token)
        found = any(self._completed(before, tokens) for before, tokens in self._readings())
        early = found and position < self._may_end_from(position)
        self._passed |= early
        return found and not early

    def _readings(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yields pairs: the tokens before, and the latest tokens, which are decoded after them. The first may be none.

        The latest tokens may begin within a character. Its rest makes a byte-fallback vocabulary decode the whole
        characters after it as bad bytes, so up to three tokens are left out. A character has four bytes at most.
        """
        recent = list(self._recent)
        for first in range(min(BYTES, len(recent))):
            yield [], recent[first:]
        if self._before and len(recent) < (self._recent.maxlen or 0):
            yield self._before, recent

    def _completed(self, before: list[int], tokens: list[int]) -> bool:
        """Returns whether the last token completes a stop string in the text of the tokens.

        Where an earlier stop string may have been passed over, one that was whole before the last token does not count.
        """
        text = self._text(before, tokens)
        known = len(self._text(before, tokens[:-1]).rstrip(BAD)) if self._passed else 0
        return any(text.rfind(string) + len(string) > known for string in self._strings if string in text)

    def _text(self, before: list[int], tokens: list[int]) -> str:
        assert self._decode is not None
        return self._decode([*before, *tokens])[len(self._decode(before)) if before else 0 :]

    def _latest_text(self, history: History) -> list[int]:
        """Returns the last token with a text before the latest one, if the text goes on from it. Else none."""
        places = range(len(history) - 2, -1, -1) if self._goes_on else ()
        return next(([history[place]] for place in places if history[place] not in self._special), [])


class ChapterText(TextJoiner):
    """A `TextJoiner` that cuts the text before a stop string only where that ended the text (`stopped`).

    A stop string that came before the text was allowed to end is text.
    """

    def push(self, tokens: Sequence[int], stopped: bool = False) -> str:
        """Adds tokens and returns the text that is certain. stopped: whether the last one completed a stop string."""
        if stopped:
            return self.push(tokens[:-1]) + super().push(tokens[-1:])
        return super().push(tokens) + self._passed_over()

    def _passed_over(self) -> str:
        """Releases the held text up to the start of the last whole stop string in it, and what is certain after."""
        begins = [self._held.rfind(stop) for stop in self._stops if stop in self._held]
        if not begins:
            return ""
        text, self._held = self._held[: max(begins) + 1], self._held[max(begins) + 1 :]
        certain = self._certain()
        text, self._held = text + self._held[:certain], self._held[certain:]
        return text


BYTES = 4  # the most bytes of a character


def loop_note(loop: Loop) -> str:
    block = "one token" if loop.period == 1 else f"a block of {loop.period} tokens"
    length = loop.stop - loop.start
    return f"the text loops: from new token {loop.start} on it is {block} over and over, {length} tokens so far"
