"""What policies share: numbers per page of a text that grows, and the queries of its last row."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokenswift_py.kvcache.base import Committed

Array = npt.NDArray[Any]
ROOM = 64  # pages to begin with


class PerPage:
    """[..., pages] numbers, zero until they are written. The length doubles, so that growing costs little."""

    def __init__(self, dtype: npt.DTypeLike = np.float64):
        self._dtype = np.dtype(dtype)
        self._array: Array | None = None

    def window(self, *shape: int) -> Array:
        """The first `shape[-1]` pages, to be read or written in place; the other axes are the same in every call."""
        held = self._array
        if held is None or held.shape[-1] < shape[-1]:
            before = 0 if held is None else held.shape[-1]
            self._array = np.zeros((*shape[:-1], max(ROOM, shape[-1], 2 * before)), self._dtype)
            if held is not None:
                self._array[..., :before] = held
            held = self._array
        return held[..., : shape[-1]]


class LastQueries:
    """The queries of the last committed row, for policies that ask them about keys."""

    needs = frozenset({"queries"})

    def __init__(self) -> None:
        self._queries: torch.Tensor | None = None

    def observe(self, committed: Committed) -> None:
        assert committed.queries is not None
        self._queries = torch.tensor(committed.queries[-1])  # a copy
