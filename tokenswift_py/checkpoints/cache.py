"""The cache folder for files that are made from models, and the names of these files."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path


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
        handle, scratch = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(scratch).replace(path)
        finally:
            Path(scratch).unlink(missing_ok=True)
