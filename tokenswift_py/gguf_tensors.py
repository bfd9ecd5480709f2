"""The weights of a GGUF file in the file's own blocks, for --dtype gguf.

Q8_0, Q4_1    as they are
Q4_0          as Q4_1 blocks with the minimum -8 d, which is exact
Q4_K          as eight Q4_1 blocks whose scale and minimum, there products of two numbers, are rounded to fp16
F32 F16 BF16  as tensors; the engine rounds matrices to blocks of 8 bits
all others    dequantised by the gguf package and rounded to blocks of 8 bits, some rows at a time
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tokenswift_py.errors import check, one_line
from tokenswift_py.gguf_config import FREQUENCIES
from tokenswift_py.gguf_layout import check_layout
from tokenswift_py.models.blocks import BLOCK, BLOCK_BYTES, Blocks
from tokenswift_py.models.spec import ModelSpec

Bytes = npt.NDArray[np.uint8]

VALUES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROUNDED_AT_ONCE = 2**24  # weights of a tensor of another type that are dequantised together


class Place(NamedTuple):
    """Where a tensor lies in the file: its GGML type, [rows, bytes of a row] and the offset."""

    kind: str
    shape: tuple[int, ...]
    rows: int
    row_bytes: int
    offset: int


class GgufTensors(Mapping[str, "torch.Tensor | Blocks"]):
    """Tensors under Hugging Face's names, mapped from the file when they are asked for and not kept.

    Raises UserError for a tensor that is missing or has another shape, and whatever the gguf package raises for a file
    that is cut or broken.
    """

    def __init__(self, path: Path, spec: ModelSpec):
        from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

        check_layout(path)
        reader = GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = "" if field is None else str(field.contents())
        known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        check(architecture in known, "general.architecture", architecture, "one that the gguf package knows")
        names = get_tensor_name_map(known[architecture], spec.layers)
        found = {tensor.name: tensor for tensor in reader.tensors}
        self.path, self._spec = path, spec
        self._permuted = architecture == "llama"
        self._places: dict[str, Place] = {}
        for name, shape in spec.shapes().items():
            stem, suffix = name.rsplit(".", 1)
            theirs = f"{names.get_name(stem)}.{suffix}"
            check(theirs in found, f"model: tensor {theirs}", None, f"{path.name} must hold it")
            self._places[name] = place(found.pop(theirs), shape)
        unread = sorted(found.keys() - {FREQUENCIES})  # that is ones, see `gguf_config.check_metadata`
        check(not unread, f"model: tensor {unread[0] if unread else ''}", path.name, "no model of this config reads it")

    @property
    def nbytes(self) -> int:
        """What the tensors take when packed: matrices in blocks, norms and biases as fp32."""
        return sum(packed_bytes(place) for place in self._places.values())

    def __getitem__(self, name: str) -> torch.Tensor | Blocks:
        at, where = self._places[name], f"model: tensor {name} of {self.path.name}"
        with one_line(f"{where} cannot be read"):
            data: Bytes = np.memmap(self.path, np.uint8, "r", at.offset, (at.rows, at.row_bytes))
            data = self._in_order(name, data)
            if at.kind in VALUES:
                return torch.from_numpy(np.array(data)).view(VALUES[at.kind]).reshape(at.shape)
            blocks = (REPACKED.get(at.kind) or rounded(at.kind))(data)
        check(finite(blocks), where, "inf or nan", "finite scales")
        return blocks

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _in_order(self, name: str, data: Bytes) -> Bytes:
        """Rows of q and k in Hugging Face's order: llama.cpp's files for the llama architecture hold the two halves of
        a head, which RoPE turns against each other, row by row."""
        heads = {"q_proj": self._spec.heads, "k_proj": self._spec.kv_heads}.get(name.split(".")[-2])
        if not self._permuted or heads is None:
            return data
        rows = data.reshape(self._places[name].shape[0], -1)  # a bias has a value a row
        paired: npt.NDArray[np.uint8] = rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(data.shape)
        return paired


def place(tensor: Any, shape: tuple[int, ...]) -> Place:
    """A ReaderTensor's place. Raises UserError where it has not this shape, or a type that is not for weights."""
    name, kind = f"model: tensor {tensor.name}", tensor.tensor_type.name
    found = tuple(int(size) for size in reversed(tensor.shape))
    check(found == shape, name, found, f"it must be {shape}")
    usable = len(shape) == 2 or kind in VALUES
    check(usable, f"{name}: type", kind, f"norms and biases are {', '.join(VALUES)}")
    rows = shape[0] if len(shape) == 2 else 1
    return Place(kind, shape, rows, int(tensor.n_bytes) // rows, int(tensor.data_offset))


def packed_bytes(place: Place) -> int:
    weights = int(np.prod(place.shape))
    if len(place.shape) == 1:
        return 4 * weights
    return weights * BLOCK_BYTES["q4" if place.kind in ("Q4_0", "Q4_1", "Q4_K") else "q8"] // BLOCK


def blocks_of(data: Bytes, size: int) -> Bytes:
    """[rows, blocks of a row, size]"""
    return data.reshape(len(data), -1, size)


def from_q4_0(data: Bytes) -> Blocks:
    """d (q - 8) = d q - 8 d"""
    blocks = blocks_of(data, 18)
    d, quants = blocks[..., :2].copy(), blocks[..., 2:]
    m = np.float16(-8) * d.view(np.float16)
    return Blocks("q4", np.concatenate([d, m.view(np.uint8), quants], -1).reshape(len(data), -1))


def from_q4_k(data: Bytes) -> Blocks:
    """A block of 256: d, dmin, eight 6-bit scales and minima, then 32 bytes for each two of the blocks of 32, whose
    low halves are the first."""
    from gguf.quants import Q4_K

    blocks = data.reshape(-1, 144)
    d, dmin = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    scales, minima = Q4_K.get_scale_min(blocks[:, 4:16].copy())
    with np.errstate(over="ignore"):  # it shows as not finite
        halves = np.stack([d * scales, -dmin * minima], -1).astype(np.float16)  # [blocks, 8, 2]
    pairs = blocks[:, 16:].reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & np.uint8(15)
    quants = pairs.reshape(-1, 8, 2, 16)  # k = 0 .. 15 and 16 .. 31 of each block of 32
    packed = quants[:, :, 0] | quants[:, :, 1] << np.uint8(4)
    return Blocks("q4", np.concatenate([halves.view(np.uint8), packed], -1).reshape(len(data), -1))


def rounded(kind: str) -> Callable[[Bytes], Blocks]:
    """What turns rows of a type that the engine has no blocks for into those of 8 bits."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    from tokenswift_py.kernels.cpu import _native

    type_of = GGMLQuantizationType[kind]
    block, block_bytes = GGML_QUANT_SIZES[type_of]

    def convert(data: Bytes) -> Blocks:
        columns = data.shape[1] // block_bytes * block
        out = np.empty((len(data), columns // BLOCK * BLOCK_BYTES["q8"]), np.uint8)
        step = max(1, ROUNDED_AT_ONCE // columns)
        for start in range(0, len(data), step):
            rows = slice(start, start + step)
            weights = np.ascontiguousarray(dequantize(data[rows], type_of), np.float32)
            _native.quantise(weights, out[rows])
        return Blocks("q8", out)

    return convert


REPACKED: dict[str, Callable[[Bytes], Blocks]] = {
    "Q8_0": lambda data: Blocks("q8", data),
    "Q4_1": lambda data: Blocks("q4", data),
    "Q4_0": from_q4_0,
    "Q4_K": from_q4_k,
}


def finite(blocks: Blocks) -> bool:
    """Whether all scales and minima are numbers."""
    halves = 2 if blocks.kind == "q4" else 1
    scales = blocks_of(blocks.data, BLOCK_BYTES[blocks.kind])[..., : 2 * halves].copy()
    return bool(np.isfinite(scales.view(np.float16)).all())
