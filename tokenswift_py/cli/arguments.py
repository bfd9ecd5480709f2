"""Parts that the commands' parsers share. Every wrong value gets the one line that wrong settings get everywhere."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from tokenswift_py.errors import UserError, shown


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong command line. It does not print every flag there is, nor end the process.

    stray: answer to words that belong to no flag.
    """

    stray = "--help lists what there is"

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.given: dict[str, Any] = {}
        self.register("action", None, Once)
        self.register("action", "store", Once)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = {}
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            raise UserError(f"{message}; {self.stray}")
        flag, colon, rest = message.removeprefix("argument ").partition(": ")
        name = (
            flag.rpartition("/")[2].removeprefix("--").replace("-", "_")
            if colon and message.startswith("argument ")
            else None
        )
        raise UserError(f"{name}: {rest}" if name else message)


class Once(argparse.Action):
    """Keeps a flag's value. Another value for the same flag contradicts it."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        earlier = parser.given.setdefault(self.dest, values)
        if earlier is not values and earlier != values:  # NaN, given once, is not equal to itself
            raise argparse.ArgumentError(self, f"given twice, as {shown(earlier)} and as {shown(values)}")
        setattr(namespace, self.dest, values)


def lines_of(text: str) -> list[str]:
    """Returns the lines of a text, which end with a line feed, a carriage return or both. str.splitlines also ends them
    at other characters of Unicode."""
    return re.split(r"\r\n|\n|\r", text)


ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", "'": "'", '"': '"'}


def unescaped(text: str) -> str:
    r"""Replaces \n, \r, \t, \\, \', \" and \xHH (a byte of ASCII) by the characters they stand for. Any other backslash
    is one."""

    def meant(found: re.Match[str]) -> str:
        return ESCAPES.get(found[1]) or chr(int(found[1][1:], 16))

    return re.sub(r"""\\(x[0-7][0-9a-fA-F]|[nrt\\'"])""", meant, text)


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not allowed; a whole number") from error


def whole_or_name(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not allowed; a number") from error


def named_path(text: str) -> Path:
    """Makes a path of a name. Refuses an empty name, from a variable that is not set, which would be the present
    folder."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; the name of a file or folder")
    return Path(text)
