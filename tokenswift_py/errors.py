"""Wrong input is told in one line. A leaf: every layer may import it."""

from __future__ import annotations

import importlib


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
