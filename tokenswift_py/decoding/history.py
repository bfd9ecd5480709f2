"""The token sequence so far: prompt, committed output and, while a tree is walked or drafted, its path's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from tokenswift_py.core import IntArray


class History:
    """An int32 array that grows and can be cut back. cuts: how often tokens were forgotten."""

    def __init__(self, tokens: Iterable[int] = ()):
        initial = np.fromiter(tokens, np.int32)
        self._buffer = np.resize(initial, max(1024, 2 * len(initial))) if len(initial) else np.zeros(1024, np.int32)
        self._length = len(initial)
        self.cuts = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return int(self.tokens[index])

    @property
    def tokens(self) -> IntArray:
        """The tokens, [len], as a read-only view that is valid until the next change."""
        view = self._buffer[: self._length]
        view.flags.writeable = False
        return view

    def append(self, token: int) -> None:
        if self._length == len(self._buffer):
            self._buffer = np.resize(self._buffer, 2 * self._length)
        self._buffer[self._length] = token
        self._length += 1

    def extend(self, tokens: Iterable[int]) -> None:
        added = np.fromiter(tokens, np.int32)
        length = self._length + len(added)
        if length > len(self._buffer):
            self._buffer = np.resize(self._buffer, max(length, 2 * len(self._buffer)))
        self._buffer[self._length : length] = added
        self._length = length

    @contextmanager
    def guesses(self) -> Iterator[None]:
        """Forgets all tokens that join the history inside this context when it is left, because they are guesses."""
        length = self._length
        try:
            yield
        finally:
            self.truncate(length)

    def truncate(self, length: int) -> None:
        """Forgets everything from position `length` on."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot cut {self._length} tokens to {length}")
        self.cuts += length < self._length
        self._length = length
