"""Command lines for tests. The program refuses a flag that is given twice with two values."""

from __future__ import annotations

from collections.abc import Sequence


def with_flags(base: Sequence[str], *more: str) -> list[str]:
    """Returns the flags of `base`, each with a value, where those of `more` replace the ones it gives again."""
    pairs = zip(base[::2], base[1::2], strict=True)
    return [*(word for flag, value in pairs if flag not in more for word in (flag, value)), *more]
