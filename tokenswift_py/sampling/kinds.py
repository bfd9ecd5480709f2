"""Kinds of values that parameters take: each checks a value, and raises the one-line `UserError` for a wrong one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenswift_py import registry
from tokenswift_py.errors import check, check_text, files

MOST_BIAS = 3.4028234663852886e38  # the largest number of fp32


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Returns whether a value is a number that a double can hold."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True)
class Whole:
    """A whole number in a range, or None where `optional`. unit: the word after the least number in the message."""

    least: int | None = None
    most: int | None = None
    optional: bool = False
    unit: str = ""

    def check(self, name: str, value: Any) -> None:
        if value is None and self.optional:
            return
        small = is_whole(value) and (self.most is not None or abs(value) < 2**63)
        check(small, name, value, "a whole number" if self.most is not None else "a whole number below 2^63")
        fits = (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        between = f"at least {self.least}" if self.most is None else f"between {self.least} and {power(self.most)}"
        check(fits, name, value, between + self.unit)


@dataclass(frozen=True)
class WholeOr:
    """One of some names, or a whole number from `least` on."""

    names: tuple[str, ...]
    least: int

    def check(self, name: str, value: Any) -> None:
        fine = value in self.names if isinstance(value, str) else is_whole(value) and self.least <= value < 2**63
        check(fine, name, value, f"{', '.join(self.names)} or a whole number of at least {self.least}")


@dataclass(frozen=True)
class Real:
    """A finite number in a range.

    above: whether the least itself is not allowed. off: the value that changes nothing.
    """

    least: float
    most: float
    off: float | None = None
    above: bool = False

    def check(self, name: str, value: Any) -> None:
        check(is_finite(value), name, value, "a finite number")
        fits = self.least <= value <= self.most and not (self.above and value == self.least)
        between = (
            f"above {self.least:g}, at most {self.most:g}"
            if self.above
            else f"between {self.least:g} and {self.most:g}"
        )
        check(fits, name, value, between + ("" if self.off is None else f" ({self.off:g} is off)"))


@dataclass(frozen=True)
class Switch:
    """True or False."""

    def check(self, name: str, value: Any) -> None:
        check(isinstance(value, bool), name, value, "True or False")


@dataclass(frozen=True)
class Choice:
    """One of some names. package: folder of implementations, whose names are allowed beside those given here."""

    names: tuple[str, ...] = ()
    package: str = ""
    optional: bool = False

    def check(self, name: str, value: Any) -> None:
        if value is None and self.optional:
            return
        known = [*self.names, *(registry.names(self.package) if self.package else ())]
        check(value in known, name, value, f"one of {', '.join(known)}")


@dataclass(frozen=True)
class Named:
    """The name of a file, a folder or a model; None is none."""

    allowed: str
    exists: bool = False

    def check(self, name: str, value: Any) -> None:
        fine = value is None or (isinstance(value, str) and value != "")
        check(fine, name, value, self.allowed)
        if fine and self.exists and value not in (None, "auto"):
            with files(name, value, self.allowed):
                there = Path(value).expanduser().exists()
            check(there, name, value, self.allowed)


@dataclass(frozen=True)
class Text:
    """A text that is not empty; None is none."""

    def check(self, name: str, value: Any) -> None:
        check(value is None or (isinstance(value, str) and value != ""), name, value, "a text that is not empty")
        check_text(name, value or "")


@dataclass(frozen=True)
class Texts:
    """A list of texts, none of them empty."""

    def check(self, name: str, value: Any) -> None:
        fine = isinstance(value, (list, tuple)) and all(isinstance(text, str) and text for text in value)
        check(fine, name, value, "a list of texts, none of them empty")
        for text in value:
            check_text(name, text)


@dataclass(frozen=True)
class TokenIds:
    """Ids of tokens."""

    def check(self, name: str, value: Any) -> None:
        for token in value:
            check(is_whole(token), name, token, "token ids")


@dataclass(frozen=True)
class Tokens:
    """A list of token ids and of texts that are one token, or None where `optional`."""

    optional: bool = False

    def check(self, name: str, value: Any) -> None:
        if value is None and self.optional:
            return
        fine = isinstance(value, (list, tuple)) and all(is_whole(item) or isinstance(item, str) for item in value)
        check(fine, name, value, "a list of token ids and one-token texts")
        for item in value:
            check_text(name, str(item))


@dataclass(frozen=True)
class TokenLists:
    """Lists of token ids, none of them empty."""

    def check(self, name: str, value: Any) -> None:
        for tokens in value:
            fine = isinstance(tokens, (list, tuple)) and len(tokens) > 0 and all(is_whole(token) for token in tokens)
            check(fine, name, tokens, "lists of token ids, none of them empty")


@dataclass(frozen=True)
class Words:
    """A list of texts and of lists of token ids, none of them empty; None is the checkpoint's."""

    def check(self, name: str, value: Any) -> None:
        check(value is None or isinstance(value, (list, tuple)), name, value, "a list of texts and of lists of ids")
        Texts().check(name, [item for item in value or () if isinstance(item, str)])
        TokenLists().check(name, [item for item in value or () if not isinstance(item, str)])


@dataclass(frozen=True)
class Biases:
    """Token id -> number."""

    def check(self, name: str, value: Any) -> None:
        check(isinstance(value, Mapping), name, value, "token id -> number")
        for token, bias in value.items():
            check(is_whole(token), name, token, "token ids")
            fine = is_finite(bias) and abs(bias) <= MOST_BIAS
            check(fine, name, {token: bias}, "finite numbers that fp32 can hold; ban excludes a token")


@dataclass(frozen=True)
class Arguments:
    """Name -> value that JSON can hold."""

    def check(self, name: str, value: Any) -> None:
        fine = isinstance(value, Mapping) and all(isinstance(key, str) and key.isidentifier() for key in value)
        check(fine, name, value, "names with their values")
        check(is_plain(dict(value)), name, value, "values that JSON can hold")


def is_plain(value: Any) -> bool:
    """Returns whether JSON gives a value back unchanged."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    if isinstance(value, str):
        return value == value.encode(errors="replace").decode()
    return value is None or isinstance(value, bool) or (is_finite(value) and abs(value) < 2**63)


def power(number: int) -> str:
    """Returns a number in the form that messages have: one just below a large power of two by that power."""
    bits = number.bit_length()
    return f"2^{bits} - 1" if bits >= 32 and number == 2**bits - 1 else str(number)
