"""The lengths that a GGUF file's header claims, held against the file before anything believes them.

The gguf package reads past the end of a cut file without noticing, and an array said to have 2^60 elements keeps it
busy until the memory is full. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from tokenswift_py.errors import check

STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4


def check_layout(path: Path) -> None:
    """Raise UserError, with the byte, for a file whose header is not whole or speaks of what is not in the file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        Header(path.name, data).check()


class Header:
    """Walks the header of one file; `at` is the next byte."""

    def __init__(self, name: str, data: mmap.mmap):
        self.name, self.data, self.at = name, data, 0
        self.numbers: dict[str, int] = {}  # whole numbers among the metadata

    def check(self) -> None:
        self.take(4)
        version = self.number("<I")
        wanted = f"little-endian of version {' or '.join(map(str, VERSIONS))}"
        check(version in VERSIONS, f"model: GGUF version of {self.name}", version, wanted)
        tensors, pairs = self.count(24), self.count(13)  # of the bytes that each takes at the least
        for _ in range(pairs):
            key = self.string()
            self.value(key, self.number("<I"))
        for key, number in self.numbers.items():
            known = not key.endswith(".block_count") or number <= tensors
            check(known, f"model: {key}", number, f"{self.name} has {tensors} tensors in all")
        ends = [self.tensor() for _ in range(tensors)]
        alignment = self.numbers.get("general.alignment", 32)
        check(alignment > 0, f"model: general.alignment of {self.name}", alignment, "above 0")
        begin = -(-self.at // alignment) * alignment
        for key, end in ends:
            there = f"{self.name} ends at byte {len(self.data)}: it is cut or damaged"
            check(begin + end <= len(self.data), f"model: end of tensor {key}", begin + end, there)

    def take(self, size: int) -> int:
        """The place of the next `size` bytes."""
        at, left = self.at, len(self.data) - self.at
        check(size <= left, f"model: bytes needed at byte {at} of {self.name}", size, f"{left} are left: it is damaged")
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
        """As messages have it: what cannot be printed, and what is too long for a name, shows that it is damaged."""
        size = self.number("<Q")
        at = self.take(size)
        text = self.data[at : at + min(size, 100)].decode("utf-8", "replace")
        return "".join(char if char.isprintable() else "?" for char in text)

    def value(self, key: str, kind: int) -> None:
        at = self.at
        if kind == STRING:
            self.take(self.number("<Q"))
        elif kind == ARRAY:
            self.array(key)
        else:
            self.take(self.size_of(key, kind))
            if kind in (4, 10):
                self.numbers[key] = int.from_bytes(self.data[at : self.at], "little")

    def array(self, key: str) -> None:
        kind = self.number("<I")
        if kind == STRING:
            for _ in range(self.count(8)):
                self.take(self.number("<Q"))
        else:
            size = self.size_of(key, kind)
            self.take(size * self.count(size))

    def size_of(self, key: str, kind: int) -> int:
        check(kind in SIZES, f"model: type of {key} in {self.name}", kind, "one that GGUF has: it is damaged")
        return SIZES[kind]

    def tensor(self) -> tuple[str, int]:
        """A tensor's name and where it ends, from the beginning of all tensors."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        key, dimensions = self.string(), self.number("<I")
        field = f"model: tensor {key} of {self.name}"
        check(dimensions <= MOST_DIMENSIONS, f"{field}: dimensions", dimensions, f"at most {MOST_DIMENSIONS}")
        shape = [self.number("<Q") for _ in range(dimensions)]
        kind, offset = self.number("<I"), self.number("<Q")
        known = kind in set(GGMLQuantizationType)
        check(known, f"{field}: type", kind, "one that the gguf package knows")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return key, offset + -(-math.prod(shape) // block) * size
