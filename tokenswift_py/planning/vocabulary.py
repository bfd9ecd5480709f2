"""The tokens whose logits draft passes compute."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]


class Rows(Protocol):
    """An engine's choice of rows of the LM head: the `first` ones, and copies of others, each in a place."""

    first: int

    def put(self, place: int, row: int) -> None: ...


class DraftVocabulary:
    """The tokens whose logits draft passes compute: the first ones of the model's vocabulary, and beside them the
    latest ones of the texts.

    The LM head is a large part of what a draft pass reads, and most of its rows are of tokens that this text will never
    have. A draft cannot guess a token that is left out, so its chain goes wrong there. Verification knows all tokens,
    and no text changes.

    Most tokenizers number tokens by how common they were in the texts that they were made from. How many first tokens
    pay is measured all the same, by how often the model chooses one that would have been left out. It does so often at
    the beginning of a text, and hardly ever after some ten thousand tokens of it. Where tokens are in another order, or
    are not made for the text's language, it takes longer, and more first tokens or all are in meanwhile.

    Texts in company share one, so that their passes can travel together.

    rows:  the engine's choice.
    sizes: how many first tokens there may be, ascending. The last is the whole vocabulary, for which no row is chosen.
           A single size is taken always.
    room:  how many of the texts' tokens there may be beside them.
    share: the part of the weights that the whole head is.
    """

    def __init__(self, rows: Rows, sizes: list[int], room: int, share: float, whole: int):
        self.sizes, self.room, self.share, self.whole = sizes, room, share, whole
        self._rows = rows
        self._places: OrderedDict[int, int] = OrderedDict()  # of the texts' tokens, the latest last
        self._seen = 0.0  # tokens of the texts, of which old ones count less
        self._missed = np.zeros(len(sizes) + 1)  # those that were new, by the least size that has them
        self._lost = self._written = 0.0  # see `walked`
        self._price = PRICE
        self._use(len(sizes) - 1)

    @property
    def rows(self) -> Rows | None:
        """Returns the choice for the next pass, None where it computes all logits."""
        return None if self.size == self.whole else self._rows

    @property
    def size(self) -> int:
        """Returns how many first tokens are in."""
        return self.sizes[self._chosen]

    @property
    def count(self) -> int:
        """Returns the number of logits that a pass computes at the most."""
        return self._count(self._chosen)

    def read(self, tokens: IntArray) -> None:
        """Takes in tokens that a text has grown by. Those that were taken in already may be among them."""
        for token in tokens[tokens >= self.sizes[0]].tolist():
            self._take(token)

    def walked(self, accepted: int, tokens: Sequence[int], price: float | None = None) -> None:
        """Takes in the tokens of a round, and learns how often one would have been left out and what that costs.

        accepted: guesses of the draft that were right. Those after one that is left out are lost with it.
        price:    the time that a token of the text takes, in draft passes; None where that is not known yet.
        """
        if price is not None:
            self._price += (price - self._price) / PRICES
        self._lost = self._lost * KEEP + accepted * (accepted + 1) / 2
        self._written = self._written * KEEP + len(tokens)
        keep = math.exp(-len(tokens) / MEMORY)
        self._seen = self._seen * keep + len(tokens)
        self._missed *= keep
        for token in tokens:
            if token >= self.sizes[0] and self._take(token):
                self._missed[bisect_right(self.sizes, token)] += 1
        self._choose()

    def _take(self, token: int) -> bool:
        """Returns whether the token was not among the texts' latest ones."""
        if token in self._places:
            self._places.move_to_end(token)
            return False
        free = len(self._places)
        place = free if free < self.room else self._places.popitem(last=False)[1]
        self._places[token] = place
        self._rows.put(place, token)
        return True

    def _choose(self) -> None:
        """Changes to the size that costs least, if it costs clearly less than the present one."""
        lost = (self._lost + LOST * TRUST) / (self._written + TRUST)
        costs = [self._cost(i, lost) for i in range(len(self.sizes))]
        best = int(np.argmin(costs))
        if costs[best] < costs[self._chosen] - CLEARLY:
            self._use(best)

    def _cost(self, i: int, lost: float) -> float:
        """Returns what the head and the tokens that are left out cost, in parts of a draft pass.

        lost: tokens that are lost with each that is left out.
        """
        head = SHARE * self.share * self._count(i) / self.whole
        if self.sizes[i] == self.whole:
            return head
        missed = (self._missed[i + 1 :].sum() + UNSEEN) / (self._seen + UNSEEN)
        return float(head + self._price * GUESSED * lost * missed)

    def _count(self, i: int) -> int:
        size = self.sizes[i]
        return self.whole if size == self.whole else min(self.whole, size + len(self._places))

    def _use(self, i: int) -> None:
        self._chosen = i
        if self.size < self.whole:
            self._rows.first = self.size


def draft_vocabulary(engine: Any, tokens: int, asked: str | int) -> DraftVocabulary | None:
    """Makes the vocabulary of a draft's passes, or returns None where they compute all logits.

    engine: the weights, which make the rows. tokens: how many the model has.
    asked: auto, all, or a number of first tokens.
    """
    if asked == "all" or (asked == "auto" and tokens <= 2 * LEAST):
        return None
    if asked == "auto":
        sizes = [LEAST << i for i in range(tokens.bit_length()) if LEAST << i < tokens] + [tokens]
    else:
        sizes = [-(-int(asked) // PANEL) * PANEL]
        if sizes[0] >= tokens:
            return None
    room, share = min(ROOM, tokens), engine.head_bytes / engine.multiplied_bytes
    return DraftVocabulary(engine.head_rows(room), sizes, room, share, tokens)


PANEL = 32  # first tokens are whole panels of the packed head, on every ISA
LEAST = 8192  # the least number of first tokens that is tried: a fourth of that saved 3 % of a pass more
ROOM = 1024  # for the texts' tokens; twice as many spare a text of 100 000 tokens one miss in 2 000
MEMORY = 1024  # tokens after which one counts 1/e
UNSEEN = 1.0  # tokens that are taken for missed before any was seen
LOST, TRUST = 2.5, 32.0  # tokens lost with one that is left out, before any round was seen; counts as so many tokens
KEEP = 1 - 1 / 200  # how much of a round counts after the next one
PRICE, PRICES = 2.0, 32  # see `walked`: before it is known; the number of rounds of which it is a mean
GUESSED = 0.6  # how often a token that is new to the text is guessed where it is in; from replays of recorded texts
SHARE = 0.65  # the head's part of a draft pass's time, over its part of the weights; keys and values take time as well
CLEARLY = 0.005  # of a draft pass
