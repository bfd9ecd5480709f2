"""The cache folder for files that are made from models, and the names of these files."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

WRITABLE = "a cache folder that can be written; TOKENSWIFT_CACHE names another"
LARGE = 16 * 2**20  # the least bytes of a file whose hash is kept; smaller ones are hashed in no time


def cache_folder() -> Path:
    """Returns the folder for files made from models: $TOKENSWIFT_CACHE, else one in the user's cache folder."""
    if own := os.environ.get("TOKENSWIFT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenswift"


def cache_name(*paths: Path) -> str:
    """Returns a name for a result made from these files, which is another when one is another file or has changed."""
    stats = [(path.resolve(), path.resolve().stat()) for path in paths]
    said = ":".join(f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in stats)
    return f"{paths[0].stem}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def write_beside(path: Path, write: Callable[[Path], Any], also: Path | None = None) -> None:
    """Writes a file or folder of the cache folder that holds hours of training. The one that is there gets another name
    once the new one is whole. also: a file beside it that is renamed with it."""
    when = time.time_ns()
    fresh = path.with_name(f".{path.stem}-{when}{path.suffix}")
    write(fresh)
    for old in (path, also):
        if old is not None and old.exists():
            old.replace(old.with_name(f"{old.stem}-{when}{old.suffix}"))
    fresh.replace(path)


@contextmanager
def full_disks() -> Iterator[None]:
    """Turns the error of safetensors' own that it raises for a full disk into an OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def keep(path: Path, text: str) -> None:
    """Writes a file of the cache folder, whole or not at all. Where it cannot be written, its work is done again."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            fresh = Path(scratch) / path.name  # with a new file's permissions: others may share the folder
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(path)


def kept_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file. A large file's is kept in the cache folder under path, size and time of change."""
    if path.stat().st_size < LARGE:
        return sha256(path)
    kept = cache_folder() / "sha256" / cache_name(path)
    try:
        known = kept.read_text()
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    except OSError:
        pass
    digest = sha256(path)
    keep(kept, digest)
    return digest
