"""What ends a text. Every rule is a function of the token sequence, asked after each token inside the walk."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.statistics import Loop, LoopDetector
from tokenswift_py.text import BAD, TextJoiner

logger = logging.getLogger("tokenswift")


class Stops:
    """End-of-sequence tokens, stop tokens and strings, loops and the number of new tokens.

    decode:  token ids -> text, needed for stop strings only.
    special: ids that decode to nothing.
    on_loop: what to do where the text begins to repeat itself: warn (a line to the log), stop or ignore.
    tokens:  ids that end the text as a stop string does.
    may_end_from: the first position that may end what a given position lies in (`Sampler.may_end_from`, which bans EOS
             and stop tokens before it). A stop string that a token before it completes is text, as vLLM's min_tokens
             has it.
    goes_on: whether a text goes on from what stands before it, so that a space at its start is its own: a
             SentencePiece vocabulary drops the one at the start of what it decodes.

    Called with a history, once for each new token, it returns "eos", "stop", "loop", "length" or None. Forced tokens
    do not count as new, and no stop string begins in them. Loops are looked for in the new tokens alone, joined across
    what was forced: a model that answers every turn with the same words loops.
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
        self._passed = False  # whether a stop string that ended nothing may stand in the latest tokens
        self._strings = tuple(strings)
        self._decode = decode
        self._special = frozenset(special)
        # A token carries a byte at least, so this many tokens hold any stop string and what it is glued to.
        reach = max((len(text.encode()) for text in strings), default=0) + BYTES
        self._recent: deque[int] = deque(maxlen=reach)  # the latest new tokens that have a text

    def begin_chapter(self) -> None:
        """What was written so far is over, or was forced: no stop string begins in it."""
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
        """Whether a stop string ends in the latest token, and may. One without a text ends none."""
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
        """The latest tokens, and what they are decoded behind: at a text's start also the token that it goes on from.

        They may begin within a character, whose rest makes a byte-fallback vocabulary decode the whole characters
        behind it as bad bytes; a character has four at most.
        """
        recent = list(self._recent)
        for first in range(min(BYTES, len(recent))):
            yield [], recent[first:]
        if self._before and len(recent) < (self._recent.maxlen or 0):
            yield self._before, recent

    def _completed(self, before: list[int], tokens: list[int]) -> bool:
        """Whether a stop string stands in the tokens' text and, where one may have been passed over, did not without
        the last of them."""
        text = self._text(before, tokens)
        known = len(self._text(before, tokens[:-1]).rstrip(BAD)) if self._passed else 0
        return any(text.rfind(string) + len(string) > known for string in self._strings if string in text)

    def _text(self, before: list[int], tokens: list[int]) -> str:
        assert self._decode is not None
        return self._decode([*before, *tokens])[len(self._decode(before)) if before else 0 :]

    def _latest_text(self, history: History) -> list[int]:
        """The last token with a text before the latest one, if the text goes on from it."""
        places = range(len(history) - 2, -1, -1) if self._goes_on else ()
        return next(([history[place]] for place in places if history[place] not in self._special), [])


class ChapterText(TextJoiner):
    """As `TextJoiner`, but the text is cut before a stop string only where it ended by one (`stopped`): one that came
    before the text might end is text."""

    def push(self, tokens: Sequence[int], stopped: bool = False) -> str:
        """stopped: the last token completed the stop string that ended the text."""
        if stopped:
            return self.push(tokens[:-1]) + super().push(tokens[-1:])
        return super().push(tokens) + self._passed_over()

    def _passed_over(self) -> str:
        """What is certain behind the beginning of the last whole stop string that is held back."""
        begins = [self._held.rfind(stop) for stop in self._stops if stop in self._held]
        if not begins:
            return ""
        text, self._held = self._held[: max(begins) + 1], self._held[max(begins) + 1 :]
        certain = self._certain()
        text, self._held = text + self._held[:certain], self._held[certain:]
        return text


BYTES = 4  # of a character, at most


def loop_note(loop: Loop) -> str:
    block = "one token" if loop.period == 1 else f"a block of {loop.period} tokens"
    length = loop.stop - loop.start
    return f"the text loops: from new token {loop.start} on it is {block} over and over, {length} tokens so far"
