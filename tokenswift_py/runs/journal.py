"""The record of a run: its parameters, then every token, in a file that outlives whatever ends the process.

The file is MAGIC, then frames: MARKER, kind, length of the payload and CRC32C (little-endian 32-bit numbers), payload.
The CRC is of kind, length and payload. After the header it goes on from the header's, so that no frame of another run
is taken for one of this. HEADER is JSON. TOKENS has the number of tokens before it, the number it holds, their ids
(int32) and a bit for each, set where the token was forced. EXTEND has the number of tokens more that were asked for.

A frame is written at once and holds whole steps. So a kill or a power cut leaves whole frames and, at most, one torn
frame after them.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import google_crc32c
import numpy as np

from tokenswift_py.errors import check, files, one_line
from tokenswift_py.runs.folder import lock, sync_folder

if TYPE_CHECKING:
    from tokenswift_py.parallel.ranks import Ranks

NAME = "journal.bin"
MAGIC = b"tokenswift journal\n"
VERSION = 1
MARKER = b"\xf5TSj"
FRAME = struct.Struct("<4sIII")
COUNTS = struct.Struct("<II")
EXTENSION = struct.Struct("<Q")
HEADER, TOKENS, EXTEND = 1, 2, 3

ALONE = "another process writes it, or a stream of this one that is not closed"
SYNC_TOKENS = 256
SYNC_SECONDS = 1.0


class JournalError(RuntimeError):
    """The journal can no longer be written: a full disk, most often."""


@dataclass(frozen=True)
class Record:
    """The contents of a journal.

    header:   what the text is a function of (see contract.py).
    tokens:   every token after the prompt. forced: for each, whether it was forced.
    extended: tokens asked for later, beyond the header's max_new_tokens.
    size:     bytes of the file that are whole. torn: bytes after them.
    seed:     CRC that the frames after the header go on from.
    """

    path: Path
    header: dict[str, Any]
    tokens: list[int]
    forced: list[bool]
    extended: int
    size: int
    torn: int
    seed: int

    @property
    def chosen(self) -> int:
        """The number of tokens that the model chose."""
        return len(self.forced) - sum(self.forced)

    @property
    def chosen_tokens(self) -> list[int]:
        """The tokens that the model chose."""
        return [token for token, forced in zip(self.tokens, self.forced, strict=True) if not forced]

    @property
    def max_new_tokens(self) -> int:
        return int(self.header["parameters"]["max_new_tokens"]) + self.extended


def read(folder: Path) -> Record:
    """Reads the journal of a folder, as far as it is whole. It needs no lock, so that a run can be watched.

    Raises UserError where there is none, where its header is not whole, and where it is damaged before its last frame.
    """
    path = folder / NAME
    with files("journal", path, "a run's folder has one"):
        data = path.read_bytes()
    return parse(data, path)


def parse(data: bytes, path: Path) -> Record:
    """Parses the bytes of a journal, with the errors of `read`. path: name of the file, for messages."""
    name = str(path)
    check(data[: len(MAGIC)] == MAGIC[: len(data)], "journal", name, "this file does not begin as one")
    first = whole_frame(data, len(MAGIC), 0)
    if first is None or first.kind != HEADER:
        behind = data.find(MARKER, len(MAGIC) + 1)
        why = f"its header is damaged; its blocks from byte {behind} on say nothing without it"
        check(False, "journal", name, why if behind >= 0 else "its header is not whole: nothing was recorded")
    assert first is not None
    with one_line(f"journal: {name}: its header is none that this program writes"):
        header = dict(json.loads(first.payload))
    version = header.get("version")
    check(version == VERSION, "journal version", version, f"this program reads version {VERSION}")

    tokens: list[int] = []
    forced: list[bool] = []
    extended, end = 0, first.end
    while (frame := whole_frame(data, end, first.crc)) is not None:
        check(frame.kind in (TOKENS, EXTEND), "journal", name, f"a frame of kind {frame.kind} at byte {end} is unknown")
        with one_line(f"journal: {name}: its block at byte {end} is none that this program writes"):
            if frame.kind == EXTEND:
                extended += EXTENSION.unpack(frame.payload)[0]
            else:
                start, ids, marks = token_block(frame.payload)
                check(start == len(tokens), "journal", name, f"its block at byte {end} follows token {start}")
                tokens += ids
                forced += marks
        end = frame.end
    check(
        not whole_frame_behind(data, end, first.crc), "journal", name,
        f"it is damaged at byte {end}, after {len(tokens)} tokens, and whole blocks follow: "
        f"`truncate -s {end}` of a copy keeps those tokens",
    )  # fmt: skip
    return Record(path, header, tokens, forced, extended, end, len(data) - end, first.crc)


@dataclass(frozen=True)
class Frame:
    kind: int
    payload: bytes
    crc: int
    end: int


def whole_frame(data: bytes, start: int, seed: int) -> Frame | None:
    """Returns the frame that begins at byte `start`, or None where no whole one does."""
    if start + FRAME.size > len(data):
        return None
    marker, kind, length, crc = FRAME.unpack_from(data, start)
    end = start + FRAME.size + length
    if marker != MARKER or end > len(data):
        return None
    payload = data[start + FRAME.size : end]
    return Frame(kind, payload, crc, end) if crc == checksum(kind, payload, seed) else None


def whole_frame_behind(data: bytes, start: int, seed: int) -> bool:
    """Returns whether a whole frame begins anywhere after byte `start`. Then the bytes between are no torn end."""
    while (start := data.find(MARKER, start + 1)) >= 0:
        if whole_frame(data, start, seed):
            return True
    return False


def frame_bytes(kind: int, payload: bytes, seed: int) -> bytes:
    return FRAME.pack(MARKER, kind, len(payload), checksum(kind, payload, seed)) + payload


def checksum(kind: int, payload: bytes, seed: int) -> int:
    """Returns a frame's CRC32C, which goes on from `seed`."""
    return int(google_crc32c.extend(seed, COUNTS.pack(kind, len(payload)) + payload))


def token_payload(start: int, tokens: Sequence[int], forced: Sequence[bool]) -> bytes:
    ids = np.asarray(tokens, "<i4").tobytes()
    return COUNTS.pack(start, len(tokens)) + ids + np.packbits(np.asarray(forced, np.bool_)).tobytes()


def token_block(payload: bytes) -> tuple[int, list[int], list[bool]]:
    """Returns the arguments of `token_payload`. Raises ValueError or struct.error for another payload."""
    start, count = COUNTS.unpack_from(payload)
    ids = np.frombuffer(payload, "<i4", count, COUNTS.size)
    marks = np.frombuffer(payload, np.uint8, -(-count // 8), COUNTS.size + ids.nbytes)
    return start, ids.tolist(), np.unpackbits(marks, count=count).astype(bool).tolist()


def shared(ranks: Ranks, open_: Callable[[], Journal]) -> Journal:
    """Returns the journal that rank 0 opens or creates. Other ranks get its contents, and write nothing.

    Raises, on all ranks, whatever UserError or JournalError rank 0 meets.
    """
    with ranks.same_fate(JournalError):
        own = open_() if ranks.leads else None
    if ranks.world == 1:
        assert own is not None
        return own
    record = from_text(ranks.first_text(to_text(own.record) if own else ""))
    return own or Followed(record)


def to_text(record: Record) -> str:
    return json.dumps({**asdict(record), "path": str(record.path)})


def from_text(text: str) -> Record:
    fields = json.loads(text)
    return Record(**{**fields, "path": Path(fields["path"])})


class Journal:
    """Writes the record of one run and holds its lock. Make it with `create` or `open`.

    Tokens are written and fsynced at the first step that brings SYNC_TOKENS of them, or SYNC_SECONDS after the last
    time. A kill loses tokens that are not on the disk yet, and a resumed run writes the same again.
    """

    def __init__(self, file: BinaryIO, record: Record, clock: Callable[[], float] = time.monotonic):
        self.record = record
        self._file = file
        self._size = record.size
        self._safe = len(record.tokens)  # tokens on the disk
        self._pending: list[tuple[int, bool]] = []
        self._clock = clock
        self._synced = clock()

    @classmethod
    def create(cls, folder: Path, header: dict[str, Any]) -> Journal:
        """Creates a journal in an empty or new folder. Raises UserError where there is one, or none can be, and
        JournalError, leaving none, where it cannot be written."""
        path = folder.absolute() / NAME  # whatever the working directory becomes
        header = {"version": VERSION, **header}
        payload = json.dumps(header).encode()  # ASCII, because the name of a model need not be UTF-8
        seed = checksum(HEADER, payload, 0)
        with files("out", folder, "a new or empty folder is"):
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("xb", buffering=0)
        try:
            lock(file, "journal", path, ALONE)
            journal = cls(file, Record(path, header, [], [], 0, 0, 0, seed))
            begun = MAGIC + frame_bytes(HEADER, payload, 0)
            journal._put(begun)
            journal._size = len(begun)
            sync_folder(folder)
        except OSError as error:
            file.close()
            with suppress(OSError):
                path.unlink()
            raise JournalError(f"out: {error.strerror}: nothing could be recorded in {folder}") from error
        return journal

    @classmethod
    def open(cls, folder: Path) -> Journal:
        """Opens a folder's journal to go on with it, and cuts a torn end off. Raises the UserErrors of `read`, and one
        where another process writes it."""
        path = folder.absolute() / NAME
        with files("journal", path, "a run's folder holds one that can be written"):
            file = path.open("r+b", buffering=0)
        try:
            lock(file, "journal", path, ALONE)
            journal = cls(file, parse(file.read(), path))
            if journal.record.torn:
                with files("journal", path, "its torn end must be cut off"):
                    os.ftruncate(file.fileno(), journal.record.size)
                    os.fsync(file.fileno())
        except BaseException:
            file.close()
            raise
        return journal

    def append(self, tokens: Sequence[int], forced: Sequence[int] = ()) -> None:
        """Appends one step of the text: forced tokens, then those the model chose. Raises JournalError."""
        self.add(tokens, forced)
        if self.due(len(self._pending)):
            self.sync()

    def add(self, tokens: Sequence[int], forced: Sequence[int] = ()) -> None:
        """Appends one step, which the next sync puts on the disk."""
        self._pending += [*((token, True) for token in forced), *((token, False) for token in tokens)]

    def due(self, tokens: int) -> bool:
        """Returns whether so many tokens that are not on the disk have to be put there now."""
        return tokens >= SYNC_TOKENS or self._clock() - self._synced >= SYNC_SECONDS

    def extend(self, count: int) -> None:
        """Records that `count` tokens more were asked for. Raises JournalError."""
        self.sync()
        self._size = self._write(frame_bytes(EXTEND, EXTENSION.pack(count), self.record.seed))

    def sync(self) -> None:
        """Puts everything appended so far on the disk. Raises JournalError."""
        if self._pending and not self._file.closed:
            payload = token_payload(self._safe, *zip(*self._pending, strict=True))
            size, safe = self._write(frame_bytes(TOKENS, payload, self.record.seed)), self._safe + len(self._pending)
            # Without a call between them: after a KeyboardInterrupt the next sync writes the same place, or none.
            self._size, self._safe, self._pending = size, safe, []
        self._synced = self._clock()

    def close(self) -> None:
        """Syncs, and lets another process write. Raises JournalError."""
        try:
            self.sync()
        finally:
            self._file.close()

    def _write(self, frame: bytes) -> int:
        """Puts a frame, and returns the size with it. If that fails, cuts it off and ends with JournalError."""
        try:
            self._put(frame)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)
                os.fsync(self._file.fileno())
            self._file.close()
            path = self.record.path
            safe = f"{self._safe} tokens are safe in {path}; `tokenswift resume {path.parent}` goes on from there"
            raise JournalError(f"out: {error.strerror}: {safe}") from error
        return self._size + len(frame)

    def _put(self, frame: bytes) -> None:
        """Writes after the safe bytes, always at that place, so that the next write covers an interrupted one."""
        file, at = self._file.fileno(), 0
        while at < len(frame):
            at += os.pwrite(file, frame[at:], self._size + at)
        os.fsync(file)


class Followed(Journal):
    """The journal of a rank that only follows. Rank 0 writes it for all."""

    def __init__(self, record: Record):
        self.record = record

    def append(self, tokens: Sequence[int], forced: Sequence[int] = ()) -> None:
        pass

    def extend(self, count: int) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass
