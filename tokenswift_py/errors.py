"""Errors that tell wrong input in one line. This is a leaf module, which every layer may import."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TextIO

SHOWN = 200  # how many characters of a wrong value are shown; it may be a whole prompt


class UserError(ValueError):
    """Wrong input, told in one line: the field, its value and what is allowed."""


def check(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises the one-line `UserError` that every wrong setting gets, unless the condition holds."""
    if not condition:
        raise UserError(f"{field}: {shown(value)} is not allowed; {allowed}")


def shown(value: object) -> str:
    """Returns a value for a message, as the user typed it, and only the beginning of a long one.

    A path is shown like a text, and a numpy number like a number.
    """
    if isinstance(value, PurePath):
        value = str(value)
    item = getattr(value, "item", None)
    try:
        text = repr(item() if callable(item) and getattr(value, "shape", None) == () else value)
    except ValueError:  # Python writes no number of more than a few thousand digits
        text = f"this {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def check_text(field: str, text: str) -> None:
    """Raises UserError for lone surrogates, which UTF-8 cannot encode. Python makes them of bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        allowed = f"character {error.start} of it is half of a surrogate pair: the text must be UTF-8"
        check(False, field, text, allowed)


def need_extra(field: str, value: str, package: str) -> None:
    """Raises a `UserError` with the line that installs an optional package, unless the package can be imported.

    The extra has the name of the value that was asked for.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        allowed = f"it needs {package}: pip install 'tokenswift-py[{value}]'"
        raise UserError(f"{field}: {value!r} is not allowed; {allowed} ({' '.join(str(error).split())})") from error


class NumericsError(RuntimeError):
    """Logits or scores that no token can be chosen from."""


@contextmanager
def files(field: str, path: object, allowed: str) -> Iterator[None]:
    """Turns the system's error about a file or folder into the one line that every wrong setting gets."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # NUL in a name: ValueError; unknown ~user: RuntimeError
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{field}: {shown(str(path))} is not allowed; {allowed} ({why})") from error


def new_file(field: str, path: str | Path) -> TextIO:
    """Opens a new file to write UTF-8 into. Raises UserError where there is one already: nothing is overwritten."""
    check_new(field, path)
    with files(field, path, "a file that can be written"):
        return Path(path).open("w", encoding="utf-8")


def check_new(field: str, path: str | Path) -> None:
    """Raises UserError for a file or folder that exists. A device or pipe is allowed, for it keeps nothing."""
    with files(field, path, "a file that can be written"):
        there = Path(path).is_file() or Path(path).is_dir()
        check(not there, field, str(path), "a new file; nothing is overwritten")
        if not Path(path).exists():
            folder, allowed = Path(path).absolute().parent, "a file that can be written, in a folder that"
            check(folder.is_dir(), field, str(path), f"{allowed} is there")
            check(os.access(folder, os.W_OK | os.X_OK), field, str(path), f"{allowed} lets this user write")


def check_kept(field: str, path: Path) -> None:
    """Makes the folder of a file that long work will end in. Raises UserError where it cannot be written into."""
    with files(field, path, "a file that can be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK | os.X_OK)
        check(writable, field, str(path), "a file that can be written, in a folder that lets this user write")


@contextmanager
def about(field: str) -> Iterator[None]:
    """Puts the parameter that led there in front of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error}") from error


@contextmanager
def one_line(message: str) -> Iterator[None]:
    """Turns any error of a library about a bad file into one line that says which file it was."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise every kind at a bad file, bare Exception included
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{message} ({type(error).__name__}: {detail})") from error
