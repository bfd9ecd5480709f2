"""A text on the device, for rules that look at it: uploaded token by token as it grows, not round by round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokenswift_py.core import DraftTree, IntArray, SamplingParams
from tokenswift_py.kernels.base import on_device

if TYPE_CHECKING:
    from tokenswift_py.kernels.triton.scores import Rows, Rules

LONGEST_PATH = 128  # the most tokens after the committed text; if there are more they join it
ALIGNED = 4  # the int32 numbers of 16 bytes; for aligned pointers a kernel is compiled separately


class DeviceText:
    """The committed text, where each token came last in it and how often the model wrote it.

    tokens: [room] int32. last: [vocab] int32, -1 for none. written: [vocab] int32. All on the device.
    """

    def __init__(self, vocab: int, device: torch.device):
        self.tokens = torch.zeros(1024, dtype=torch.int32, device=device)
        self.last = torch.full((vocab,), -1, dtype=torch.int32, device=device)
        self.written = torch.zeros(vocab, dtype=torch.int32, device=device)
        self._known = np.zeros(0, np.int32)
        self._spans = 0  # how many spans of forced tokens were known when tokens were counted

    def follow(self, tokens: IntArray, forced: Sequence[tuple[int, int]], settled: bool) -> int:
        """Brings it to a text that has grown, or is another. Returns how many of its tokens are on the device.

        tokens:  [n] int32. forced: spans [start, stop) of it that the model did not write.
        settled: all of them are committed; else the latest may be guesses, which are left out if they are few.
        """
        known = len(self._known)
        recounted = any(start < known for start, _ in forced[self._spans :]) or len(forced) < self._spans
        if recounted or known > len(tokens) or not np.array_equal(self._known, tokens[:known]):
            self.last.fill_(-1)
            self.written.zero_()
            known = 0
        self._spans = len(forced)
        kept = known if not settled and len(tokens) - known <= LONGEST_PATH else len(tokens)
        kept = max(kept, *(min(stop, len(tokens)) for _, stop in forced[-1:]), known)
        if kept > known:
            self._grow(tokens[known:kept], known, forced)
        if kept != len(self._known) or not known:
            self._known = tokens[:kept].copy()
        return kept

    def _grow(self, tokens: IntArray, start: int, forced: Sequence[tuple[int, int]]) -> None:
        stop = start + len(tokens)
        if stop > len(self.tokens):
            grown = self.tokens.new_zeros(2 * stop)
            grown[:start] = self.tokens[:start]
            self.tokens = grown
        own = np.ones(len(tokens), np.int32)
        for first, last in forced:
            own[max(0, first - start) : max(0, last - start)] = 0
        new, places, counts = uploaded([tokens, np.arange(start, stop, dtype=np.int32), own], self.tokens.device)
        self.tokens[start:stop] = new
        at = new.long()
        self.last.scatter_reduce_(0, at, places, "amax")
        self.written.index_add_(0, at, counts)


@dataclass
class Placed:
    """Values that stay on a device.

    key: the noise's key. top_p: [1] fp64. shape: [3] fp64, top_n_sigma, typical_p and xtc_threshold. breakers: [n]
    int64, of DRY.
    """

    params: SamplingParams
    rules: Rules
    key: torch.Tensor | None
    top_p: torch.Tensor
    shape: torch.Tensor
    breakers: torch.Tensor
    text: DeviceText = field(repr=False)

    @property
    def looks(self) -> bool:
        """Says whether any rule looks at the text."""
        params, rules = self.params, self.rules
        return params.dry_multiplier > 0 or params.no_repeat_ngram_size > 0 or rules.seen or rules.counted


@dataclass(frozen=True)
class Texts:
    """The texts of rows on the device, and what is excluded by the host.

    unbroken: [rows, n] the text from its end up to the first breaker of DRY, -2 after that. ends: [rows, n] the same
              for n-grams, as many tokens as are before the last of one. acting: [rows] 1 where XTC acts.
    out:      [2, n] rows and tokens that they may not choose. outside: [rows, vocab] whether a grammar has no place
              for a token. None where there are none of them.
    """

    rows: Rows
    unbroken: torch.Tensor
    ends: torch.Tensor
    acting: torch.Tensor
    out: torch.Tensor | None = None
    outside: torch.Tensor | None = None


def uploaded(arrays: Sequence[IntArray], device: torch.device) -> list[torch.Tensor]:
    """Returns int32 arrays as tensors on the device, which are parts of one upload."""
    return parted(on_device(packed(arrays), device), [array.shape for array in arrays])


def packed(arrays: Sequence[IntArray]) -> IntArray:
    """Returns int32 arrays as one, in which each begins on a multiple of 16 bytes."""
    sizes = [aligned(array.size) for array in arrays]
    whole = np.zeros(sum(sizes), np.int32)
    for array, end, size in zip(arrays, np.cumsum(sizes), sizes, strict=True):
        whole[end - size : end - size + array.size] = array.ravel()
    return whole


def parted(whole: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Returns the arrays of these shapes that were packed."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = whole.split([aligned(size) for size in sizes])
    return [part[:size].view(shape) for part, size, shape in zip(parts, sizes, shapes, strict=True)]


def aligned(size: int) -> int:
    return size + -size % ALIGNED


def paths_of(tree: DraftTree, before: IntArray) -> IntArray:
    """Returns [nodes, P] the tokens of `before` and then those on the way from the tree's root, without it, to each
    node; -1 after its end."""
    paths = np.full((len(tree), len(before) + int(tree.depth.max())), -1, np.int32)
    paths[0, : len(before)] = before
    for node in range(1, len(tree)):
        paths[node] = paths[tree.parents[node]]
        paths[node, len(before) + tree.depth[node] - 1] = tree.tokens[node]
    return paths


def ends_of(tokens: IntArray, tree: DraftTree, width: int) -> IntArray:
    """Returns [nodes, width] the text up to each node of the tree from its end, the last token first; -2 where there
    is none. tokens: the text up to the tree's root."""
    ends = np.full((len(tree), width), -2, np.int32)
    latest = tokens[max(0, len(tokens) - width) :][::-1]
    ends[0, : len(latest)] = latest
    for node in range(1, len(tree)):
        ends[node, 1:] = ends[tree.parents[node], : width - 1]
        ends[node, :1] = tree.tokens[node]
    return ends
