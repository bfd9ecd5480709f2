"""Wrong input is told in one line. A leaf: every layer may import it."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input, told in one line: the field, the value and what is allowed."""


def check(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise the one-line `UserError` that every wrong setting gets."""
    if not condition:
        raise UserError(f"{field}: {value!r} is not allowed; {allowed}")
