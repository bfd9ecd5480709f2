"""The two files of a batch in OpenAI's format. Each line of the first is a request. Each line of the second is an
answer, and the lines that are written survive a crash."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from tokenswift_py.errors import check, files, shown
from tokenswift_py.runs.folder import lock, sync_folder

MOST_LINE = 64 * 2**20  # the most bytes that a request may have: far more than any context holds
METHOD = "POST"


@dataclass(frozen=True)
class Line:
    """A request of a batch.

    number:    the number of its line, from 1 on.
    custom_id: the caller's name for the request. It is None if the line has none.
    wrong:     the reason why the line is not a request, as (code, message).
    """

    number: int
    custom_id: str | None
    url: str = ""
    body: Any = None
    wrong: tuple[str, str] | None = None

    @property
    def key(self) -> bytes:
        return key_of(self.custom_id, self.number)


def key_of(custom_id: str | None, number: int | None) -> bytes:
    """Returns 16 bytes that tell requests apart. A million of them fit into memory, however long the names are."""
    name = f"id {custom_id}" if custom_id is not None else f"line {number}"
    return blake2b(name.encode(errors="surrogatepass"), digest_size=16).digest()


def read_line(number: int, data: bytes | None, urls: Sequence[str]) -> Line:
    """Reads a request.

    data: the bytes of the line. None means that the line is too long.
    urls: the endpoints that a request may name.
    """
    if data is None:
        return Line(number, None, wrong=("line_too_long", f"line {number} has more than {MOST_LINE} bytes"))
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8 and endless numbers end here, too
        return Line(number, None, wrong=("invalid_json", f"line {number} is no JSON: {' '.join(str(error).split())}"))
    if not isinstance(said, dict):
        return Line(number, None, wrong=("invalid_line", f"line {number} is no JSON object"))
    name, url, body = said.get("custom_id"), said.get("url"), said.get("body")
    if not isinstance(name, str) or not name:
        message = f"line {number}: custom_id: {shown(name)} is not allowed; a text that names the request"
        return Line(number, None, wrong=("missing_custom_id", message))
    if said.get("method", METHOD) != METHOD:
        message = f"method: {shown(said['method'])} is not allowed; {METHOD}"
        return Line(number, name, wrong=("invalid_method", message))
    if url not in urls:
        message = f"url: {shown(url)} is not allowed; one of {', '.join(urls)}"
        return Line(number, name, wrong=("invalid_url", message))
    if not isinstance(body, dict):
        return Line(number, name, wrong=("invalid_body", f"body: {shown(body)} is not allowed; a JSON object"))
    return Line(number, name, str(url), body)


def lines_in(path: Path, urls: Sequence[str]) -> Iterator[Line]:
    """Yields the requests of a file. Each is read only when it is asked for. Empty lines are skipped."""
    with files("input", path, "a readable file is"), path.open("rb") as file:
        for number, data in enumerate(pieces_of(file), 1):
            if data is None or data.strip():
                yield read_line(number, data, urls)


def pieces_of(file: BinaryIO) -> Iterator[bytes | None]:
    """Yields each line, and None for a line that is too long to be held."""
    while data := file.readline(MOST_LINE + 1):
        fits = len(data) <= MOST_LINE or data.endswith(b"\n")
        yield data if fits else None
        while not fits and data and not data.endswith(b"\n"):
            data = file.readline(MOST_LINE)


def survey(path: Path, urls: Sequence[str]) -> set[bytes]:
    """Returns the keys of all requests. Raises UserError if two requests have the same custom_id."""
    check(path.is_file(), "input", str(path), "a file of requests, which is read twice")
    seen: set[bytes] = set()
    for line in lines_in(path, urls):
        if line.key in seen:
            first = next(other.number for other in lines_in(path, urls) if other.key == line.key)
            check(False, "custom_id", line.custom_id, f"lines {first} and {line.number} both have it")
        seen.add(line.key)
    return seen


def answer_of(line: Line, status: int | None, body: Any, wrong: tuple[str, str] | None = None) -> dict[str, Any]:
    """Returns an answer in the form that OpenAI's batches have.

    status: the HTTP status. It is None if there was no request to answer.
    """
    error: dict[str, Any] | None = {"code": wrong[0], "message": wrong[1]} if wrong else None
    if error and line.custom_id is None:
        error["line"] = line.number
    response = {"status_code": status, "request_id": secrets.token_hex(16), "body": body} if status else None
    return {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }


class Answers:
    """The file of answers. Only this process writes it. If a crash left a torn line at its end, that line is cut off.

    Raises UserError if the file holds anything else, or if another process writes it.

    answered: the keys of the requests that have an answer.
    origin:   the model, numerics and context of the last text in the file.
    """

    def __init__(self, path: Path):
        self.path, self.answered = path, set[bytes]()
        self.origin: tuple[Any, ...] | None = None
        with files("output", path, "a file that can be written"):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            try:
                check(path.is_file(), "output", str(path), "a file, from which a later run goes on")
                self._lock()
                self._size = self._read()
                if self._size < os.fstat(self._file.fileno()).st_size:
                    os.ftruncate(self._file.fileno(), self._size)
                os.fsync(self._file.fileno())
                sync_folder(path.absolute().parent)
            except BaseException:
                self._file.close()
                raise

    def _lock(self) -> None:
        lock(self._file, "output", self.path, "another process writes it")

    def _read(self) -> int:
        """Reads the answers. Returns how many bytes they have. A torn last line does not count."""
        size, bad = 0, 0
        with self.path.open("rb") as file:
            for number, data in enumerate(file, 1):
                check(not bad, "output", str(self.path), f"line {bad} is no answer of a batch: nothing is overwritten")
                if data.endswith(b"\n") and self._take(data):
                    size += len(data)
                else:
                    bad = number
        torn = bad == 0 or size > 0 or b'{"id":"batch_req_'.startswith(data[:17])
        check(torn, "output", str(self.path), "it holds something else: nothing is overwritten")
        return size

    def _take(self, data: bytes) -> bool:
        """Reads one answer. Returns whether it is one."""
        try:
            said = json.loads(data)
            name, error, response = said["custom_id"], said["error"] or {}, said["response"] or {}
            number = error.get("line")
            if not isinstance(name, str) and not isinstance(number, int):
                return False
            self.answered.add(key_of(name, number))
            body = response.get("body") or {}
            if "numerics" in body:
                self.origin = body["model"], body["numerics"], body["context"]
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            return False
        return True

    def check_origin(self, *origin: Any) -> None:
        """Raises UserError if the answers so far come from another model, numerics or context."""
        for name, found, here in zip(("model", "numerics", "context"), self.origin or origin, origin, strict=True):
            check(found == here, name, here, f"the answers in {self.path} are of {shown(found)}")

    def write(self, answers: Sequence[dict[str, Any]]) -> None:
        """Puts answers on the disk: whole lines, or nothing of them. Raises OSError."""
        data, at = b"".join(encoded(answer) for answer in answers), 0
        try:
            while at < len(data):
                at += os.write(self._file.fileno(), data[at:])
            os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._size)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._size += len(data)

    def close(self) -> None:
        self._file.close()


def encoded(answer: dict[str, Any]) -> bytes:
    """Returns an answer as its line. Halves of surrogate pairs are kept as they are, for a custom_id may have them."""
    for ascii_only in (False, True):
        text = json.dumps(answer, ensure_ascii=ascii_only, separators=(",", ":"))
        try:
            return text.encode() + b"\n"
        except UnicodeEncodeError:
            continue
    raise AssertionError("ASCII can be encoded")
