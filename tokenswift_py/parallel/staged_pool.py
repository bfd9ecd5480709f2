"""The pages of a pipeline: the first stage decides which page is whose, each holds those of its own layers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from tokenswift_py.kvcache.base import Bytes, IntArray
from tokenswift_py.kvcache.pages import BoundedPages
from tokenswift_py.parallel.column import Column


class StagedPool(BoundedPages):
    """A pool whose layers are spread over the stages. It is used like one that holds all of them.

    own:    the pool of the first stage's layers. number: the number by which the others know theirs.
    starts: first layer of each stage, and the number of all layers.
    fresh:  pages that the other stages have not made usable yet. They learn of them with the next command.
    """

    def __init__(self, column: Column, own: Any, starts: list[int], head_dim: int):
        super().__init__((starts[-1], own.kv_heads, own.pages, head_dim), own._device)
        self.column, self.own, self.starts = column, own, starts
        self.number = column.number(self)
        self.layers, self.kv_heads = starts[-1], own.kv_heads
        self.page_bytes = own.page_bytes // own.layers * self.layers
        self.fresh: list[int] = []

    def reserve(self, page: int) -> None:
        super().reserve(page)
        self.own.reserve(page)
        self.fresh.append(page)

    def words(self, action: str, **more: Any) -> dict[str, Any]:
        """Returns the words of a command about this pool."""
        fresh, self.fresh = self.fresh, []
        return {"do": action, "pool": self.number, "fresh": fresh, **more}

    def move(self, source: IntArray, target: IntArray) -> None:
        self.column.tell(self.words("move"), [source, target])
        self.own.move(source, target)

    def dump(self, page: int) -> Bytes:
        others = self.column.ask(self.words("dump", page=page))
        stages = [self.own.dump(page), *(arrays[0] for _, arrays in others)]
        return np.concatenate([part for parts in zip(*map(self._parts, stages), strict=True) for part in parts])

    def restore(self, page: int, data: Bytes) -> None:
        layers = np.diff(self.starts)
        shares: list[list[Bytes]] = [[] for _ in layers]
        for part in np.split(data, np.cumsum([size * self.layers for size in self._layer_bytes])[:-1]):
            bounds = np.array(self.starts[1:-1]) * (len(part) // self.layers)
            for share, piece in zip(shares, np.split(part, bounds), strict=True):
                share.append(piece)
        first, *others = (np.concatenate(share) for share in shares)
        self.column.tell_each([self.words("restore", page=page)] * len(others), [[share] for share in others])
        self.own.restore(page, first)

    @property
    def _layer_bytes(self) -> list[int]:
        """The bytes that a layer has in each part of a dumped page."""
        return [size // self.own.layers for size in self.own.part_bytes]

    def _parts(self, dumped: Bytes) -> list[Bytes]:
        """Returns the parts of a stage's dumped page."""
        layers = len(dumped) // sum(self._layer_bytes)
        return np.split(dumped, np.cumsum([size * layers for size in self._layer_bytes])[:-1])

    def key_scores(self, pages: IntArray, queries: torch.Tensor) -> torch.Tensor:
        asked = [queries[start:stop].cpu().numpy() for start, stop in pairwise(self.starts)]
        words = [self.words("scores")] * (len(asked) - 1)
        arrays = [[pages, query] for query in asked[1:]]
        own, others = self.column.beside(words, arrays, lambda: self.own.key_scores(pages, queries[: self.starts[1]]))
        return torch.cat([own, *(torch.from_numpy(scores).to(own) for _, (scores,) in others)])

    def page_keys(self, layer: int, pages: IntArray) -> torch.Tensor:
        if layer < self.starts[1]:
            keys: torch.Tensor = self.own.page_keys(layer, pages)
            return keys
        stage = int(np.searchsorted(self.starts, layer, side="right")) - 1
        words = self.words("keys", layer=layer - self.starts[stage])
        _, (found,) = self.column.ask(words, [pages])[stage - 1]
        return torch.from_numpy(found).to(self._device)

    def _bound_keys(self, pages: IntArray, low: torch.Tensor, high: torch.Tensor) -> None:
        count, words, first = len(self.starts) - 2, self.words("bounds"), self.starts[1]
        _, others = self.column.beside(
            [words] * count, [[pages]] * count, lambda: self.own._bound_keys(pages, low[:first], high[:first])
        )
        chosen = torch.from_numpy(pages.astype(np.int64)).to(self._device)
        for stage, (_, bounds) in enumerate(others, start=1):
            layers = slice(self.starts[stage], self.starts[stage + 1])
            for whole, part in zip((low, high), bounds, strict=True):
                whole[layers][:, :, chosen] = torch.from_numpy(part).to(whole)
