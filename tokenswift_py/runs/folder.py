"""The files of a run's folder beside its journal: text.txt, tokens.npy, report.json."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from tokenswift_py.core import Likeliest
from tokenswift_py.errors import UserError, shown

if TYPE_CHECKING:
    from tokenswift_py.runs.result import Result

logger = logging.getLogger("tokenswift")


def save_text(folder: Path, text: str) -> None:
    put(folder / "text.txt", text.encode())


def save_logprobs(folder: Path, prompt: Sequence[int], result: Result) -> None:
    """Writes a JSON line for each token whose log-probability was asked for. It has the token's absolute position, its
    id, and the likeliest tokens there. If none was asked for, nothing is written."""
    lines = []
    if result.prompt_logprobs is not None:
        for place, found in enumerate(result.prompt_logprobs):
            lines += [] if found is None else [logprob_line(place, prompt[place], *found)]
    if result.logprobs is not None:
        likely = result.top_logprobs or [()] * len(result.logprobs)
        inside = {place for span in result.forced for place in range(*span)}
        places = [place for place in range(len(result.tokens)) if place not in inside]
        for place, logprob, top in zip(places, result.logprobs, likely, strict=True):
            lines.append(logprob_line(len(prompt) + place, result.tokens[place], logprob, top))
    if result.prompt_logprobs is not None or result.logprobs is not None:
        put(folder / "logprobs.jsonl", "".join(lines).encode())


def logprob_line(position: int, token: int, logprob: float, likely: Likeliest) -> str:
    top = [[other, value if math.isfinite(value) else None] for other, value in likely]
    value = logprob if math.isfinite(logprob) else None
    return json.dumps({"position": position, "token": token, "logprob": value, "top": top}) + "\n"


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


def sync_folder(folder: Path) -> None:
    """Puts the folder's own entries on the disk, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def lock(file: BinaryIO, field: str, path: Path, allowed: str) -> None:
    """Locks the file until it is closed, or until the process ends in whatever way. Some network folders have no
    locks. Raises UserError about `path`, and closes the file, where another process has it."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            logger.warning("%s cannot be locked (%s): let no other process write it", path, error.strerror)
            return
        file.close()
        raise UserError(f"{field}: {shown(str(path))} is not allowed; {allowed}") from error
