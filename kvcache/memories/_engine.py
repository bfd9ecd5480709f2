"""A memory in the C++ engine (kernels/cpu/engine/recall.h), of whatever kind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tokenswift_py.kvcache.base import Committed, FloatArray, IntArray
from tokenswift_py.kvcache.memories.base import Memory, Pages
from tokenswift_py.kvcache.memories.infini import Infini
from tokenswift_py.kvcache.memories.linear import Linear, page_scale
from tokenswift_py.kvcache.memories.performer import Performer

VECTOR = 16  # heads are padded with zeros to a multiple
STEP = 1024  # linear's scales are rounded to so many steps an octave, so that no last bit of a sum matters


class NativeMemory(Memory):
    """Has the constants of another memory, and states in the engine, where pages are folded and rows read them.

    make:   makes the engine's memory of its kind, the layers that keep one, a table and shares.
    engine: arguments of the engine's `fold` before the pages: decoder, and behind them: cos, sin, local tables.
    """

    def __init__(self, plain: Memory, kind: str, make: Callable[..., Any], decoder: Any, tables: tuple[Any, ...]):
        super().__init__(plain.shape)
        self.needs, self.gated, self.label = plain.needs, plain.gated, plain.label
        self._decoder, self._tables = decoder, tables
        self._linear = plain if isinstance(plain, Linear) else None
        keeps = np.array(self.shape.keeps, np.int32)
        shares = plain.gates.float().sigmoid().numpy() if isinstance(plain, Infini) else None
        self.native = make(kind, keeps, table_of(plain) if isinstance(plain, Performer) else None, shares)

    @property
    def nbytes(self) -> int:
        return int(self.native.nbytes)

    @property
    def held_bytes(self) -> int:
        return self.nbytes + (0 if self._linear is None else self._linear.queries.nbytes)

    def observe(self, committed: Committed) -> None:
        if self._linear is not None:
            self._linear.observe(committed)

    def fold(self, pool: Any, numbers: IntArray, pages: IntArray) -> None:
        numbers, pages = (np.ascontiguousarray(array, np.int32) for array in (numbers, pages))
        shifts = None if self._linear is None else shifts_of(self._linear, pool, pages)
        self.native.fold(self._decoder, pool.native, numbers, pages, *self._tables, shifts)
        self.folded += len(pages)

    def copy(self) -> NativeMemory:
        other = copy.copy(self)
        other.native = self.native.copy()
        other._linear = copy.copy(self._linear)  # which replaces its queries, and never changes them
        return other

    def clear(self) -> None:
        self.folded = 0
        self.native.clear()
        if self._linear is not None:
            self._linear.clear()


def engine_memory(memory: Memory | None) -> Any:
    """Returns the engine's part of a memory, None for none. Raises ValueError for another executor's."""
    if memory is None:
        return None
    if not isinstance(memory, NativeMemory):
        raise ValueError(f"this executor reads a NativeMemory, not a {type(memory).__name__}")
    return memory.native


def table_of(plain: Performer) -> FloatArray:
    """Returns the random rows as the engine multiplies with them, [padded head_dim, features]: for powers of two."""
    size = plain.shape.head_dim
    table = np.zeros((-(-size // VECTOR) * VECTOR, len(plain.rows)), np.float32)
    table[:size] = plain.rows.T.double().numpy() * (size**-0.25 / math.log(2))
    return table


def shifts_of(linear: Linear, pool: Pages, pages: IntArray) -> FloatArray:
    """Returns the logarithms (base 2) of the pages' scales, [layers, kv_heads, n]."""
    shifts = np.zeros((len(linear.shape.keeps), linear.shape.kv_heads, len(pages)), np.float32)
    for layer in (layer for layer, kept in enumerate(linear.shape.keeps) if kept):
        keys = pool.page_keys(layer, pages).double()
        queries = linear.grouped(torch.from_numpy(linear.queries[:, layer])).double()
        for page in range(len(pages)):
            scale = page_scale(queries, keys[:, page]) / math.log(2)
            shifts[layer, :, page] = (scale * STEP).round().numpy() / STEP
    return shifts
