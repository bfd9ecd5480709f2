"""What ends a text. Every rule is a function of the token sequence, asked after each token inside the walk."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

from tokenswift_py.history import History
from tokenswift_py.stats import Loop, LoopDetector

logger = logging.getLogger("tokenswift")


class Stops:
    """End-of-sequence tokens, stop strings, loops and the number of new tokens.

    decode:  token ids -> text, needed for stop strings only.
    special: ids that decode to nothing.
    on_loop: what to do where the text begins to repeat itself: warn (a line to the log), stop or ignore.
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
        goes_on: bool = False,
    ):
        if strings and decode is None:
            raise ValueError("stop strings need a decoder")
        self.tokens_left = max_new_tokens
        self.loops = LoopDetector()
        self._on_loop = on_loop
        self._goes_on = goes_on
        self._before: list[int] = []  # the token that the new text goes on from
        self._eos = frozenset(eos)
        self._strings = tuple(strings)
        self._decode = decode
        self._special = frozenset(special)
        # A token carries a byte at least, so this many tokens hold any stop string and what it is glued to.
        reach = max((len(text.encode()) for text in strings), default=0) + BYTES
        self._recent: deque[int] = deque(maxlen=reach)  # the latest new tokens that have a text

    def begin_chapter(self) -> None:
        """What was written so far is over, or was forced: no stop string begins in it."""
        self._recent.clear()

    def __call__(self, history: History) -> str | None:
        self.tokens_left -= 1
        loop = self.loops.push(history[-1])
        if loop and self._on_loop == "warn":
            logger.warning(loop_note(loop))
        if history[-1] in self._eos:
            return "eos"
        if self._stopped_by(history):
            return "stop"
        if self.loops.following and self._on_loop == "stop":
            return "loop"
        return "length" if self.tokens_left <= 0 else None

    def _stopped_by(self, history: History) -> bool:
        """Whether a stop string ends in the latest token. One without a text ends none."""
        if self._decode is None or not self._strings or history[-1] in self._special:
            return False
        if not self._recent:
            self._before = self._latest_text(history)
        self._recent.append(history[-1])
        return any(string in text for text in self._texts(self._decode) for string in self._strings)

    def _texts(self, decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
        """Of the latest tokens; those of a text's start also behind the token that it goes on from."""
        recent = list(self._recent)
        # The latest tokens may begin within a character, whose rest makes a byte-fallback vocabulary decode the whole
        # characters behind it as bad bytes; a character has four at most.
        for first in range(min(BYTES, len(recent))):
            yield decode(recent[first:])
        if self._before and len(recent) < (self._recent.maxlen or 0):
            yield decode(self._before + recent)[len(decode(self._before)) :]

    def _latest_text(self, history: History) -> list[int]:
        """The last token with a text before the latest one, if the text goes on from it."""
        places = range(len(history) - 2, -1, -1) if self._goes_on else ()
        return next(([history[place]] for place in places if history[place] not in self._special), [])


BYTES = 4  # of a character, at most


def loop_note(loop: Loop) -> str:
    block = "one token" if loop.period == 1 else f"a block of {loop.period} tokens"
    length = loop.stop - loop.start
    return f"the text loops: from new token {loop.start} on it is {block} over and over, {length} tokens so far"
