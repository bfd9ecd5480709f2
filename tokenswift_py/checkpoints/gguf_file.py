"""Reads the header of a GGUF file, or of a split one's parts: metadata and the places of tensors, but no tensor.

Every length that a header claims is compared with the file first. Else an array said to have 2^60 elements would keep
the reader busy until the memory is full, and a cut file would be read past its end.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenswift_py.errors import check, files

MAGIC = b"GGUF"
STRING, ARRAY, FLOAT32 = 8, 9, 6
# The NumPy type of a value, by GGUF's number of the type.
TYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor: its file, GGML type, shape with the rows first, and its bytes in the file."""

    name: str
    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that was opened.

    parts:    the one file, or all parts of a split one in order.
    metadata: metadata of the first part, with arrays of numbers as NumPy arrays.
    tensors:  tensors of all parts, by name.
    """

    parts: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def name(self) -> str:
        return self.parts[0].name


def is_gguf(path: Path) -> bool:
    """Returns whether a file begins as GGUF, whatever its name. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_gguf(path: Path) -> GgufFile:
    """Reads the header of a file, and those of the other parts where it is one part of a split model.

    Raises UserError for a part that is missing, and for a header that is not whole or names data that the file lacks.
    """
    named = read_header(path)
    headers = [named if part == path else read_header(part) for part in parts_of(path, named)]
    tensors: dict[str, StoredTensor] = {}
    for number, header in enumerate(headers):
        said = {key: header.metadata.get(f"split.{key}", default) for key, default in (("no", 0), ("count", 0))}
        fits = len(headers) == 1 or said == {"no": number, "count": len(headers)}
        check(fits, f"model: split.no and split.count of {header.path.name}", said, f"{number} and {len(headers)}")
        for name, tensor in header.tensors.items():
            twice = f"it is in {tensors[name].path.name} and in {header.path.name}" if name in tensors else ""
            check(not twice, "model: tensor", name, twice)
            tensors[name] = tensor
    total = headers[0].metadata.get("split.tensors.count", len(tensors))
    check(len(headers) == 1 or total == len(tensors), "model: split.tensors.count", total, f"{len(tensors)} are there")
    for key, number in headers[0].metadata.items():
        counts = key.endswith(".block_count") and isinstance(number, (int, float, np.ndarray))
        known = not counts or bool(np.all(np.asarray(number) <= len(tensors)))
        check(known, f"model: {key}", number, f"{path.name} has {len(tensors)} tensors in all")
    return GgufFile(tuple(header.path for header in headers), headers[0].metadata, tensors)


def parts_of(path: Path, header: Header) -> list[Path]:
    """Returns all parts of the model that a file is part of, in order. Raises UserError for one that is missing."""
    count = header.metadata.get("split.count", 0)
    if count in (0, 1):
        return [path]
    named = PART.fullmatch(path.name)
    allowed = f"a part of {count} must keep the name that it was given, <name>-00001-of-{count:05}.gguf"
    check(named is not None and int(named["count"]) == count, "model: file name", path.name, allowed)
    assert named is not None
    parts = [path.with_name(f"{named['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for part in parts:
        with files("model", part.name, f"{path.name} is one of {count} parts, and all of them are needed"):
            part.open("rb").close()
    return parts


def gguf_in(folder: Path) -> Path | None:
    """Returns the one GGUF model of a folder, split or not, None without one. Raises UserError for several.

    A folder of safetensors files with a config is a model of its own, whatever GGUF files lie beside them.
    """
    if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
        return None
    models = gguf_models(path.name for path in folder.glob("*.gguf") if path.is_file())
    names = ", ".join(parts[0] for parts in models)
    check(len(models) <= 1, "model", str(folder), f"it has several models; name one of {names}")
    return folder / models[0][0] if models else None


def gguf_models(names: Iterable[str]) -> list[list[str]]:
    """Groups names of GGUF files by the model that they hold: a file alone, or the parts of a split one in order."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        part = PART.fullmatch(name)
        found.setdefault(f"{part['stem']}-of-{part['count']}" if part else name, []).append(name)
    return list(found.values())


def read_header(path: Path) -> Header:
    """Reads one file's header. Raises UserError, with the byte, where it is not whole or names data that is missing."""
    check(path.stat().st_size >= len(MAGIC) and is_gguf(path), "model", path.name, "the file does not begin as GGUF")
    with path.open("rb") as file:
        return Header(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class Header:
    """The metadata and tensors of one file, read from its bytes. at: place of the next byte."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, len(MAGIC)
        self.metadata: dict[str, Any] = {}
        version = self.number("<I")
        wanted = f"little-endian of version {' or '.join(map(str, VERSIONS))}"
        check(version in VERSIONS, f"model: GGUF version of {path.name}", version, wanted)
        tensors, pairs = self.count(24), self.count(13)  # each takes at least so many bytes
        for _ in range(pairs):
            key = self.printable()
            check(key not in self.metadata, "model: metadata key", key, f"{path.name} has it twice: it is damaged")
            self.metadata[key] = self.value(key, self.number("<I"))
        self.tensors = self._placed([self.tensor() for _ in range(tensors)])

    def _placed(self, tensors: Sequence[StoredTensor]) -> dict[str, StoredTensor]:
        """Returns the tensors by name, with offsets from the beginning of the file."""
        alignment = self.metadata.get("general.alignment", 32)
        whole = isinstance(alignment, int) and alignment > 0
        check(whole, f"model: general.alignment of {self.path.name}", alignment, "above 0")
        begin = -(-self.at // alignment) * alignment
        placed: dict[str, StoredTensor] = {}
        for tensor in tensors:
            end = begin + tensor.offset + tensor.nbytes
            there = f"{self.path.name} ends at byte {len(self.data)}: it is cut or damaged"
            check(end <= len(self.data), f"model: end of tensor {tensor.name}", end, there)
            check(tensor.name not in placed, "model: tensor", tensor.name, f"{self.path.name} has it twice")
            placed[tensor.name] = StoredTensor(
                tensor.name, self.path, tensor.kind, tensor.shape, begin + tensor.offset, tensor.nbytes
            )
        return placed

    def take(self, size: int) -> int:
        """Takes the next `size` bytes and returns their place. Raises UserError where the file ends before."""
        at, left = self.at, len(self.data) - self.at
        if size > left:  # the message is made only here, because there is a string for each token and merge
            where = f"model: bytes needed at byte {at} of {self.path.name}"
            check(False, where, size, f"{left} are left: it is damaged")
        self.at += size
        return at

    def number(self, form: str) -> int:
        return int(struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0])

    def count(self, least: int) -> int:
        """Reads a number of things of at least `least` bytes each. Raises UserError if they cannot all follow."""
        count = self.number("<Q")
        at = self.at
        self.take(count * least)
        self.at = at
        return count

    def string(self) -> str:
        size = self.number("<Q")
        at = self.take(size)
        return self.texts([self.data[at : at + size]])[0]

    def strings(self, count: int) -> list[str]:
        """Reads `count` strings. It has a loop of its own, because a vocabulary has hundreds of thousands."""
        data, at, found = self.data, self.at, []
        for _ in range(count):
            begin = at + 8
            at = begin + int.from_bytes(data[begin - 8 : begin], "little")
            found.append(data[begin:at])
            if at > len(data):
                self.at = begin
                self.take(at - begin)
        self.at = at
        return self.texts(found)

    def texts(self, found: Sequence[bytes]) -> list[str]:
        try:
            return [str(text, "utf-8") for text in found]
        except UnicodeDecodeError as error:
            check(False, f"model: text before byte {self.at} of {self.path.name}", error.reason, "UTF-8: it is damaged")
            raise

    def printable(self) -> str:
        """Reads a name for messages. Question marks for unprintable characters, and a cut at 100, show damage."""
        size = self.number("<Q")
        at = self.take(size)
        text = self.data[at : at + min(size, 100)].decode("utf-8", "replace")
        return "".join(char if char.isprintable() else "?" for char in text)

    def value(self, key: str, kind: int) -> Any:
        """Reads a string, a number, or an array of either.

        A float of 32 bits becomes the shortest decimal that rounds to it, as in the config.json it was taken from.
        """
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(key)
        value = self.numbers(key, kind, 1)[0]
        return float(str(value)) if kind == FLOAT32 else value.item()

    def array(self, key: str) -> Any:
        kind = self.number("<I")
        if kind == STRING:
            return self.strings(self.count(8))
        return self.numbers(key, kind, self.count(np.dtype(self.type_of(key, kind)).itemsize))

    def numbers(self, key: str, kind: int, count: int) -> Any:
        form = np.dtype(self.type_of(key, kind))
        return np.frombuffer(self.data, form, count, self.take(count * form.itemsize))

    def type_of(self, key: str, kind: int) -> str:
        check(kind in TYPES, f"model: type of {key} in {self.path.name}", kind, "one that GGUF has: it is damaged")
        return TYPES[kind]

    def tensor(self) -> StoredTensor:
        """Reads a tensor's entry. Its offset still counts from the beginning of all tensors."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        key, dimensions = self.printable(), self.number("<I")
        field = f"model: tensor {key} of {self.path.name}"
        check(dimensions <= MOST_DIMENSIONS, f"{field}: dimensions", dimensions, f"at most {MOST_DIMENSIONS}")
        shape = [self.number("<Q") for _ in range(dimensions)]
        kind, offset = self.number("<I"), self.number("<Q")
        known = kind in set(GGMLQuantizationType)
        check(known, f"{field}: type", kind, "one that the gguf package knows")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        whole = not shape or shape[0] % block == 0
        check(whole, f"{field}: columns", shape[:1], f"whole blocks of {block}: it is damaged")
        nbytes = math.prod(shape) // block * size
        return StoredTensor(key, self.path, GGMLQuantizationType(kind).name, tuple(reversed(shape)), offset, nbytes)
