"""Command lines in tests: a flag that is given twice with two values is refused."""

from __future__ import annotations

from collections.abc import Sequence


def with_flags(base: Sequence[str], *more: str) -> list[str]:
    """`base`, which is flags with a value each, without those that `more` gives again, and `more`."""
    pairs = zip(base[::2], base[1::2], strict=True)
    return [*(word for flag, value in pairs if flag not in more for word in (flag, value)), *more]
