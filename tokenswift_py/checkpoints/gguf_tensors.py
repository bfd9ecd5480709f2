"""Reads the weights of a GGUF file, either dequantised or, for --dtype gguf, in the file's own blocks.

As values it reads every type that the gguf package dequantises, in fp32, and rounds them to the type asked for. As
blocks it reads these types:
NATIVE        as they are
F32 F16 BF16  as tensors; the engine rounds matrices to blocks of 8 bits
all others    dequantised and rounded to blocks of 8 bits, which one line of the log says
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokenswift_py.checkpoints.gguf_config import FACTORS, TOKENS
from tokenswift_py.checkpoints.gguf_file import GgufFile, StoredTensor
from tokenswift_py.checkpoints.stored_tensors import Part, Tensors
from tokenswift_py.errors import check, one_line
from tokenswift_py.models.blocks import FORMATS, Blocks
from tokenswift_py.models.devices import available_threads
from tokenswift_py.models.spec import ModelSpec, family_named

logger = logging.getLogger("tokenswift")

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# The engine's name of each type whose blocks it multiplies (kernels/cpu/math/formats.h).
NATIVE = {kind.upper(): kind for kind in FORMATS if "_" in kind} | {"Q8_0": "q8", "Q4_1": "q4"}
VALUES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
AT_ONCE = 2**17  # how many weights a thread dequantises together, so that they stay in its core's cache
FEWEST_PARTS = 4  # of AT_ONCE weights for each thread that is begun
ALONE = 2**15  # the number of elements up to which torch starts no threads of its own to convert them


class GgufIndex:
    """The index of a file: which of its tensors each of Hugging Face's names is.

    Raises UserError for a tensor that is missing, has another shape or a type that nothing dequantises, and for one
    that no model of this config reads. A bias that a file does not have is zero, like in llama.cpp.
    """

    def __init__(self, file: GgufFile, spec: ModelSpec):
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        architecture = file.metadata["general.architecture"]
        number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
        names, family = get_tensor_name_map(number, spec.layers), family_named(spec.family)
        self.file, self.spec, self.shapes = file, spec, spec.shapes()
        self._paired = family.paired
        self.tensors: dict[str, StoredTensor] = {}
        self._first: dict[str, int] = {}  # the first row of ours, for a tensor that also holds others
        for name, shape in self.shapes.items():
            stored = family.gguf_slice(name, shape, spec)
            stem, suffix = stored.name.rsplit(".", 1)
            theirs = f"{names.get_name(stem)}.{suffix}"
            there = theirs in file.tensors
            check(there or suffix == "bias", f"model: tensor {theirs}", None, f"{file.name} must hold it")
            if there:
                self.tensors[name] = checked(file.tensors[theirs], stored.shape)
                self._first[name] = stored.first + (stored.index or 0) * shape[0]
        unread = file.tensors.keys() - {tensor.name for tensor in self.tensors.values()}
        others = sorted(unread - set(FACTORS))  # those are in the config's RoPE parameters
        check(not others, f"model: tensor {others[0] if others else ''}", file.name, "no model of this config reads it")

    def bytes_of(self, name: str) -> Bytes:
        """Returns [rows, bytes of a row] of a matrix, [1, bytes] of a vector, mapped from the file.

        Rows of q and k are in Hugging Face's order. Files of some families hold the two halves of a head, which RoPE
        turns against each other, row by row.
        """
        tensor, shape = self.tensors[name], self.shapes[name]
        rows, whole = (shape[0], math.prod(tensor.shape[:-1])) if len(shape) == 2 else (1, 1)
        width = tensor.nbytes // whole
        start = tensor.offset + self._first[name] * width if len(shape) == 2 else tensor.offset
        data: Bytes = np.asarray(np.memmap(tensor.path, np.uint8, "r", start, (rows, width)))
        heads = {"q_proj": self.spec.heads, "k_proj": self.spec.kv_heads}.get(name.split(".")[-2])
        if not self._paired or heads is None:
            return data
        values = data.reshape(shape[0], -1)  # a bias has a value a row
        halves: Bytes = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(data.shape)
        return halves

    def unfolded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a norm's weight in Hugging Face's form. Files of a family whose norms multiply by 1 + weight hold the
        sum."""
        offset = self.spec.norm_offset
        return tensor.float() - offset if offset and name.endswith("norm.weight") else tensor


class GgufTensors(Tensors):
    """Tensors under Hugging Face's names, or a part of each, dequantised when they are asked for and not kept.

    dtype: what matrices in blocks are rounded to. Vectors and tensors without blocks have the file's own type.
    """

    def __init__(self, index: GgufIndex, part: Part | None = None, dtype: torch.dtype = torch.float32):
        self._index, self._part, self._dtype = index, part, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        index, shape = self._index, self._index.shapes[name]
        part = self._part(name, shape) if self._part else (slice(None),)
        if name not in index.tensors:
            return torch.zeros(shape)[part]
        kind = index.tensors[name].kind
        with one_line(f"{where(index, name)} cannot be read"):
            data = index.bytes_of(name)
            if kind in VALUES:
                return self._index.unfolded(name, valued(data, kind, shape))[part]
            found = dequantised(data[part[0]], kind, self._dtype)
        check(found is not None, where(index, name), "inf or nan", "finite scales")
        assert found is not None
        return found[:, part[1]] if len(part) > 1 else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.shapes)

    def __len__(self) -> int:
        return len(self._index.shapes)


class GgufBlocks(Mapping[str, "torch.Tensor | Blocks"]):
    """Tensors under Hugging Face's names: matrices as blocks where the file has blocks, the others as values."""

    def __init__(self, index: GgufIndex):
        self._index = index

    def tell_rounded(self) -> None:
        """Says in one line of the log which of the file's types the engine has no products for."""
        kinds = {tensor.kind for tensor in self._index.tensors.values()} - NATIVE.keys() - VALUES.keys()
        if kinds:
            logger.warning("%s: %s: rounded to blocks of 8 bits", self._index.file.name, ", ".join(sorted(kinds)))

    @property
    def nbytes(self) -> int:
        """Returns the bytes that the packed tensors take: matrices in blocks, norms and biases in fp32."""
        tensors = self._index.tensors
        return sum(packed_bytes(tensors[name].kind if name in tensors else "F32", self._index.shapes[name])
                   for name in self)  # fmt: skip

    def __getitem__(self, name: str) -> torch.Tensor | Blocks:
        index = self._index
        if name not in index.tensors:
            return torch.zeros(index.shapes[name])
        kind = index.tensors[name].kind
        with one_line(f"{where(index, name)} cannot be read"):
            data = index.bytes_of(name)
            if kind in VALUES:
                return index.unfolded(name, valued(data, kind, index.shapes[name]))
            blocks = Blocks(NATIVE[kind], data) if kind in NATIVE else rounded(data, kind)
            finite = blocks.finite()
        check(finite, where(index, name), "inf or nan", "finite scales")
        return blocks

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.shapes)

    def __len__(self) -> int:
        return len(self._index.shapes)


def where(index: GgufIndex, name: str) -> str:
    return f"model: tensor {name} of {index.tensors[name].path.name}"


def checked(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """Raises UserError unless it has this shape and a type that can be read."""
    name = f"model: tensor {tensor.name}"
    rows = f"; there are as many tokens in {TOKENS}" if tensor.name == "token_embd.weight" else ""
    check(
        (1,) * (len(shape) - len(tensor.shape)) + tensor.shape == shape, name, tensor.shape, f"it must be {shape}{rows}"
    )
    usable = len(shape) > 1 or tensor.kind in VALUES
    check(usable, f"{name}: type", tensor.kind, f"norms and biases are {', '.join(VALUES)}")
    known = tensor.kind in VALUES or quantisation(tensor.kind) is not None
    check(known, f"{name}: type", tensor.kind, "one that the gguf package dequantises")
    return tensor


def quantisation(kind: str) -> Any:
    """Returns the gguf package's class for a type in blocks, or None if the package knows only the type's size."""
    from gguf import quants

    return getattr(quants, kind, None)


def valued(data: Bytes, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.array(data)).view(VALUES[kind]).reshape(shape)


def dequantised(data: Bytes, kind: str, dtype: torch.dtype) -> torch.Tensor | None:
    """Returns [rows, columns] values of blocks, None where one is not finite."""
    out = torch.empty((len(data), columns_of(data, kind)), dtype=dtype)

    def put(rows: slice, values: Floats) -> bool:
        into, found = (tensor.view(-1).split(ALONE) for tensor in (out[rows], torch.from_numpy(values)))
        for target, source in zip(into, found, strict=True):
            target.copy_(source)
        return bool(np.isfinite(values).all())

    return out if all(by_rows(data, kind, put)) else None


def rounded(data: Bytes, kind: str) -> Blocks:
    """Returns blocks of 8 bits, made from blocks of a type that the engine does not have."""
    from tokenswift_py.kernels.cpu import _native

    form = FORMATS["q8"]
    out = np.empty((len(data), columns_of(data, kind) // form.weights * form.stored), np.uint8)
    by_rows(data, kind, lambda rows, values: _native.quantise(values, out[rows]))
    return Blocks("q8", out)


def by_rows(data: Bytes, kind: str, put: Callable[[slice, Floats], Any]) -> list[Any]:
    """Gives the values to `put`, some rows at a time, on as many threads as this process may use. Returns what `put`
    returned."""
    values_of, columns = dequantiser(kind), columns_of(data, kind)
    step = max(1, AT_ONCE // columns)
    starts = range(0, len(data), step)

    def convert(start: int) -> Any:
        return put(slice(start, start + step), values_of(np.ascontiguousarray(data[start : start + step]), columns))

    threads = min(available_threads(), len(starts) // FEWEST_PARTS)
    if threads < 2:
        return [convert(start) for start in starts]
    with ThreadPoolExecutor(threads) as team:
        return list(team.map(convert, starts))


def dequantiser(kind: str) -> Callable[[Bytes, int], Floats]:
    """Returns the function from rows of blocks and the number of columns to values: the engine's where it is built and
    knows the type, or else the gguf package's. Both give the same bits."""
    with suppress(ImportError):
        from tokenswift_py.kernels.cpu import _native

        if kind in NATIVE:

            def widened(rows: Bytes, columns: int) -> Floats:
                values = np.empty((len(rows), columns), np.float32)
                _native.dequantise(NATIVE[kind], rows, values)
                return values

            return widened
    type_of = quantisation(kind)
    type_of.init_grid()

    def computed(rows: Bytes, columns: int) -> Floats:
        with np.errstate(all="ignore"):  # scales that are not finite show in the results
            values = type_of.dequantize_blocks(rows.reshape(-1, type_of.type_size))
        return np.ascontiguousarray(values, np.float32).reshape(-1, columns)

    return computed


def columns_of(data: Bytes, kind: str) -> int:
    type_of = quantisation(kind)
    return int(data.shape[1] // type_of.type_size * type_of.block_size)


def packed_bytes(kind: str, shape: tuple[int, ...]) -> int:
    weights = int(np.prod(shape))
    if len(shape) == 1:
        return 4 * weights
    form = FORMATS[NATIVE.get(kind, "q8")]
    return weights * form.packed // form.weights
