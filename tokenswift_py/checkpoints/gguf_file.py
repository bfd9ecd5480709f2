"""A GGUF file, or the parts of a split one: its metadata, and where each tensor lies. Nothing of the tensors is read.

Every length that a header claims is held against the file before anything believes it: an array said to have 2^60
elements would keep a reader busy until the memory is full, and a cut file would be read past its end.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenswift_py.errors import check, files

MAGIC = b"GGUF"
STRING, ARRAY, FLOAT32 = 8, 9, 6
# NumPy's type of a value, by GGUF's.
TYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: the file, its GGML type, its shape with the rows first, and its bytes there."""

    name: str
    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """parts: the one file, or all parts of a split one in their order. metadata: those of the first, arrays of numbers
    as NumPy's. tensors: of all parts, by name."""

    parts: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def name(self) -> str:
        return self.parts[0].name


def is_gguf(path: Path) -> bool:
    """Whether a file begins as one, whatever its name ends in. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_gguf(path: Path) -> GgufFile:
    """Read the header of a file, and those of the other parts where it is one part of a split model.

    Raises UserError for a part that is missing, and for a header that is not whole or speaks of what is not in the
    file.
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
    return GgufFile(tuple(header.path for header in headers), headers[0].metadata, tensors)


def parts_of(path: Path, header: Header) -> list[Path]:
    """All parts of the model that a file is one part of, in their order. Raises UserError for one that is missing."""
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
    """The one GGUF model of a folder, split or not; None where there is none. Raises UserError where there are several.

    A folder of safetensors files with a config is a model of its own, whatever GGUF files lie beside them.
    """
    if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
        return None
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.glob("*.gguf") if path.is_file()):
        named = PART.fullmatch(path.name)
        found.setdefault(f"{named['stem']}-of-{named['count']}" if named else path.name, path)
    names = ", ".join(path.name for path in found.values())
    check(len(found) <= 1, "model", str(folder), f"it has several models; name one of {names}")
    return next(iter(found.values()), None)


def read_header(path: Path) -> Header:
    """Raise UserError, with the byte, for a header that is not whole or speaks of what is not in the file."""
    check(path.stat().st_size >= len(MAGIC) and is_gguf(path), "model", path.name, "the file does not begin as GGUF")
    with path.open("rb") as file:
        return Header(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class Header:
    """The metadata and tensors of one file, read from its bytes; `at` is the next byte."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, len(MAGIC)
        self.metadata: dict[str, Any] = {}
        version = self.number("<I")
        wanted = f"little-endian of version {' or '.join(map(str, VERSIONS))}"
        check(version in VERSIONS, f"model: GGUF version of {path.name}", version, wanted)
        tensors, pairs = self.count(24), self.count(13)  # of the bytes that each takes at the least
        for _ in range(pairs):
            key = self.printable()
            check(key not in self.metadata, "model: metadata key", key, f"{path.name} has it twice: it is damaged")
            self.metadata[key] = self.value(key, self.number("<I"))
        for key, number in self.metadata.items():
            known = not key.endswith(".block_count") or not isinstance(number, int) or number <= tensors
            check(known, f"model: {key}", number, f"{path.name} has {tensors} tensors in all")
        self.tensors = self._placed([self.tensor() for _ in range(tensors)])

    def _placed(self, tensors: Sequence[StoredTensor]) -> dict[str, StoredTensor]:
        """The tensors with offsets from the beginning of the file, by name."""
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
        """The place of the next `size` bytes."""
        at, left = self.at, len(self.data) - self.at
        if size > left:  # the message is made only then: there are as many strings as tokens and merges
            where = f"model: bytes needed at byte {at} of {self.path.name}"
            check(False, where, size, f"{left} are left: it is damaged")
        self.at += size
        return at

    def number(self, form: str) -> int:
        return int(struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0])

    def count(self, least: int) -> int:
        """How many things follow that take `least` bytes each, or more."""
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
        """As many times `string`, in a loop of its own: a vocabulary has hundreds of thousands."""
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
        """A name as messages have it: what cannot be printed, and what is too long, shows that it is damaged."""
        size = self.number("<Q")
        at = self.take(size)
        text = self.data[at : at + min(size, 100)].decode("utf-8", "replace")
        return "".join(char if char.isprintable() else "?" for char in text)

    def value(self, key: str, kind: int) -> Any:
        """A string, a number, or an array of either. A number of 32 bits with a fraction is the shortest decimal that
        rounds to it, as in the config.json that it was taken from."""
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
        """A tensor whose offset is still that from the beginning of all tensors."""
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
