"""Wrong input is told in one line. A leaf: every layer may import it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Wrong input, told in one line: the field, the value and what is allowed."""


def check(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise the one-line `UserError` that every wrong setting gets."""
    if not condition:
        raise UserError(f"{field}: {value!r} is not allowed; {allowed}")


def need_extra(field: str, value: str, package: str) -> None:
    """Raise a `UserError` with the line that installs it unless an optional package can be imported. Its extra has the
    name of what was asked for."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        allowed = f"it needs {package}: pip install 'tokenswift-py[{value}]'"
        raise UserError(f"{field}: {value!r} is not allowed; {allowed} ({' '.join(str(error).split())})") from error


@contextmanager
def files(field: str, path: object, allowed: str) -> Iterator[None]:
    """Turn what the system has against a file or folder into the one line that every wrong setting gets."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{field}: {str(path)!r} is not allowed; {allowed} ({error.strerror})") from error


@contextmanager
def about(field: str) -> Iterator[None]:
    """Put the parameter that led there in front of whatever `UserError` is raised."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error}") from error


@contextmanager
def one_line(message: str) -> Iterator[None]:
    """Turn whatever a library throws at a bad file into one line that says which file it was."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise every kind there is at a bad file, bare Exception included
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{message} ({type(error).__name__}: {detail})") from error
