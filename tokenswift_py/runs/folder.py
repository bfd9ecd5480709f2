"""The files of a run's folder beside its journal: text.txt, tokens.npy, report.json."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenswift_py.runs.result import Result


def save_text(folder: Path, text: str) -> None:
    put(folder / "text.txt", text.encode())


def save_tokens(folder: Path, tokens: Sequence[int]) -> None:
    data = io.BytesIO()
    np.save(data, np.array(tokens, np.int32), allow_pickle=False)
    put(folder / "tokens.npy", data.getvalue())


def restore(folder: Path, result: Result) -> list[str]:
    """Writes the files that a finished run's folder lacks, and returns their names."""
    missing = [name for name in ("text.txt", "tokens.npy") if not (folder / name).exists()]
    if "text.txt" in missing:
        save_text(folder, result.text)
    if "tokens.npy" in missing:
        save_tokens(folder, result.tokens)
    return missing


def save_report(folder: Path, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    put(folder / "report.json", text.encode("utf-8", "backslashreplace"))  # surrogates become the escapes that JSON has


def put(path: Path, data: bytes) -> None:
    """Replaces a file as a whole, so that neither a kill nor a full disk leaves half of one."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise
