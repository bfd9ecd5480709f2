"""The texts that a model learns from, as tokens. The documents of a source are joined, and its last texts held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenswift_py.errors import check, files
from tokenswift_py.extending.human import CONTINUATIONS
from tokenswift_py.extending.settings import BUILT_IN
from tokenswift_py.quality import start_tokens

RESERVED = 131_072
"""Tokens at the beginning of each built-in text that experiments read (`human.continuation`), and that nothing learns.

experiments/positions.py reads the first 98 816.
"""
TEST_MODULE = "pydoc_data"  # a part of the library's code that is the text of the continuation `docs`
Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Source:
    """The tokens of joined documents. learned: those to learn from. held_out: the last ones, for the figures."""

    name: str
    learned: Tokens
    held_out: Tokens


def read_sources(names: Sequence[str], tokenizer: Any, context: int, held_out: int) -> list[Source]:
    """Reads files, all of which are one source, or the built-in texts where there are none.

    context:  length of the longest text to be drawn. held_out: texts of that length that are held out of each source.
    Raises UserError for files that cannot be read, and for a source with fewer tokens than two such texts and those
    held out.
    """
    if names:
        documents = {"files": joined([partial(read_file, name) for name in names], tokenizer)}
    else:
        documents = {name: joined(unread_by_tests(name, tokenizer), tokenizer) for name in BUILT_IN}
    found = []
    for name, tokens in documents.items():
        least = (2 + held_out) * (context + 1)
        check(len(tokens) >= least, "texts", f"{name} ({len(tokens)} tokens)", f"at least {least} for this context")
        cut = len(tokens) - held_out * (context + 1)
        found.append(Source(name, tokens[:cut], tokens[cut:]))
    return found


def read_file(name: str) -> str:
    with files("texts", name, "a readable UTF-8 file is"):
        return Path(name).expanduser().read_text(encoding="utf-8-sig")


def joined(readers: Sequence[Callable[[], str]], tokenizer: Any) -> Tokens:
    """Encodes documents and joins them. Before each stand the tokens that the tokenizer puts before a text, if any."""
    start = start_tokens(tokenizer)
    encoded = tokenizer([read() for read in readers], add_special_tokens=False).input_ids
    return np.array([token for ids in encoded for token in (*start, *ids)], np.int32)


def unread_by_tests(name: str, tokenizer: Any) -> list[Callable[[], str]]:
    """Returns the documents of a built-in text that hold none of its first `RESERVED` tokens."""
    left, readers = RESERVED, CONTINUATIONS[name]()
    for number, read in enumerate(readers):
        if left <= 0:
            return [later for later in readers[number:] if not is_test_text(later)]
        left -= len(tokenizer(read(), add_special_tokens=False).input_ids)
    return []


def is_test_text(read: Callable[[], str]) -> bool:
    """Returns whether a document is a file of the library that holds what the continuation `docs` is made of."""
    path = (read.__defaults__ or (None,))[0]
    return isinstance(path, Path) and TEST_MODULE in path.parts


def texts_of(tokens: Tokens, length: int) -> Iterator[Tokens]:
    """Yields texts of `length` rows, one after the other, each with the token after its last row."""
    for start in range(0, len(tokens) - length, length + 1):
        yield tokens[start : start + length + 1]


def digest(sources: Sequence[Source]) -> str:
    """Returns the SHA-256 of all tokens, by which a resumed run knows its texts."""
    made = hashlib.sha256()
    for source in sources:
        made.update(source.name.encode() + source.learned.tobytes() + b"|" + source.held_out.tobytes())
    return made.hexdigest()
