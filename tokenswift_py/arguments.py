"""What the commands' parsers share: every wrong value is told in the one line that wrong settings get everywhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from tokenswift_py.errors import UserError, shown


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong command line, rather than to print every flag there is and end the process.

    stray: what is said to words that belong to no flag.
    """

    stray = "--help lists what there is"

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            raise UserError(f"{message}; {self.stray}")
        flag, colon, rest = message.removeprefix("argument ").partition(": ")
        name = flag.removeprefix("--").replace("-", "_") if colon and message.startswith("argument ") else None
        raise UserError(f"{name}: {rest}" if name else message)


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not allowed; a whole number") from error


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not allowed; a number") from error


def named_path(text: str) -> Path:
    """An empty name, from a variable that is not set, is not the folder one is in."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; the name of a file or folder")
    return Path(text)
