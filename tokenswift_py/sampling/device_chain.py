"""The tokens of a draft's chain, chosen where their logits lie: each by the text that ends with the one before.

The host reads all of them at once. What it knows of the text goes to the device before the first of them. From there
on the device makes the text longer by its own choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from tokenswift_py.core import IntArray
from tokenswift_py.decoding.history import History
from tokenswift_py.kernels.base import MOST_LINKS, upload
from tokenswift_py.sampling.device_text import LONGEST_PATH, Placed, Texts, packed, parted
from tokenswift_py.sampling.reference import Doubles

Ranked = list[tuple[int, float]]


class Rules(Protocol):
    """The parts of a sampler that a chain needs; see `TritonSampler`."""

    def found(self, placed: Placed, logits: torch.Tensor, texts: Texts, count: int) -> torch.Tensor: ...

    def ends(self, history: History) -> tuple[IntArray, IntArray]: ...

    def acting(self, positions: IntArray) -> IntArray: ...

    def read(self, found: Doubles, position: int) -> Ranked: ...


class DeviceChain:
    """Chooses up to MOST_LINKS tokens by the rules of a sampler, in memory that stays in place.

    count: how many of the best tokens are told.
    found: [MOST_LINKS, 1 + 2 count] fp64, see `TritonSampler.found`.
    """

    def __init__(self, sampler: Rules, placed: Placed, count: int):
        self.sampler, self.placed, self.count = sampler, placed, count
        self.tokens, device = placed.text.tokens, placed.text.tokens.device
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        self.found = torch.zeros((MOST_LINKS, 1 + 2 * count), dtype=torch.float64, device=device)
        self._values = self._values_of(History(), 0)
        self._there = torch.from_numpy(packed(self._values)).to(device)
        self._parts = parted(self._there, [values.shape for values in self._values])

    def serves(self, placed: Placed, count: int) -> bool:
        """Returns whether it chooses by these rules, and its memory is where the text is."""
        return self.placed is placed and self.count == count and self.tokens is placed.text.tokens

    def begin(self, history: History, base: int) -> None:
        """Begins after this text, of which the first `base` tokens are on the device."""
        self.start = len(history)
        self._values = self._values_of(history, base)

    def _values_of(self, history: History, base: int) -> list[IntArray]:
        """Returns all that changes from chain to chain: the text's length, `base`, the tokens after it and their
        number, the text's end for DRY and for n-grams, and where XTC acts."""
        length, before = len(history), history.tokens[base:] if self.placed.looks else history.tokens[:0]
        path = np.full(LONGEST_PATH + MOST_LINKS, -1, np.int32)
        path[: len(before)] = before
        unbroken, ends = self.sampler.ends(history)
        acting = self.sampler.acting(np.arange(length, length + MOST_LINKS, dtype=np.int32))
        numbers = (np.array([number], np.int32) for number in (length, base, len(before)))
        return [*numbers, path[None], unbroken, ends, acting]

    def fill(self) -> None:
        upload(self._there, packed(self._values))

    def choose(self, logits: torch.Tensor, link: torch.Tensor) -> torch.Tensor:
        from tokenswift_py.kernels.triton.scores import Rows

        first, base, before, path, unbroken, ends, acting = self._parts
        text, length = self.placed.text, self.length.copy_(first + link)
        rows = Rows(self.tokens, text.last, text.written, base, len(self.tokens) + path.shape[1], length, path)
        texts = Texts(rows, unbroken, ends, acting.index_select(0, link) if len(acting) else acting)
        found = self.sampler.found(self.placed, logits, texts, self.count)
        self.found.index_copy_(0, link, found)
        # Where nothing can be chosen there is no such token, and the rows after it are of any.
        token = found[0, 1:2].long().clamp(0, logits.shape[1] - 1)
        path.index_copy_(1, before + link, token.int()[None])
        broken = (self.placed.breakers == token).any()
        for end in (part for part in (unbroken, ends) if part.shape[1]):
            longer = torch.cat([token.int()[None], end], 1)[:, : end.shape[1]]
            end.copy_(torch.where(broken, -2, longer) if end is unbroken else longer)
        return token

    def read(self, links: int) -> Callable[[int], Ranked]:
        """Waits for the device, and returns what gives the ranking of each token. It raises NumericsError where nothing
        can be chosen."""
        read = self.found[:links].cpu().numpy()
        return lambda link: self.sampler.read(read[link], self.start + link)
