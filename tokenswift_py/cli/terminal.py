"""The terminal while a text is written: the text itself, a bar, lines of the log, and Ctrl-C."""

from __future__ import annotations

import argparse
import io
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tokenswift_py.parallel.processes import world_size

if TYPE_CHECKING:
    from tokenswift_py.runs.stream import Stream


def open_standard_streams() -> None:
    """Opens standard streams that are closed, so that they lead nowhere. Otherwise the next file to be opened, the
    journal, would be standard output.

    Characters that standard output's encoding lacks are no reason to stop, because text.txt has them.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


class CtrlC:
    """Turns Ctrl-C into a question that the loop asks between two pieces, from `hold` on. In the middle of a piece, the
    engine has counted tokens that the text has not. In one process SIGTERM and SIGHUP, by which a machine or a terminal
    goes away, are heard like it.

    Before that (a long prompt is being read), and the second time, it interrupts at once, like anywhere else.

    pressed: whether it was heard.
    status:  the exit status that says so.
    """

    def __init__(self) -> None:
        self.pressed, self.status = False, 128 + signal.SIGINT
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> CtrlC:
        return self

    def hold(self) -> None:
        if self.pressed or self._usual or threading.current_thread() is not threading.main_thread():
            return  # Python handles signals in the main thread only
        usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
        if world_size() == 1:
            usual |= {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
        for number, handler in usual.items():
            if signal.getsignal(number) is handler or signal.getsignal(number) == handler:
                self._usual[number] = handler
                signal.signal(number, self._press)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed, self.status = True, 128 + number
        self._release()

    def _release(self) -> None:
        for number, handler in self._usual.items():
            if signal.getsignal(number) == self._press:
                signal.signal(number, handler)

    def __exit__(self, *raised: object) -> None:
        self._release()


class LogLines(logging.Handler):
    """The log on standard error. It goes through whatever else writes to the terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.show: Callable[[str], None] = show_plainly

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.show(self.format(record))
        except OSError:  # a closed pipe, a full disk: no reason to end a text
            self.handleError(record)


def show_plainly(line: str) -> None:
    print(line, file=sys.stderr)


class BottomLine:
    """The last line of a terminal, kept for the bar while text scrolls above it (the scrolling region of VT100).

    A bar drawn below the text in the usual way would overwrite the line that is being written.
    """

    def __init__(self) -> None:
        self._size = shutil.get_terminal_size()
        # A line of room, then everything but the last line scrolls; setting the region moves the cursor.
        self._send(f"\n\x1b7\x1b[1;{self._size.lines - 1}r\x1b8\x1b[1A")

    def draw(self, bar: tqdm[Any]) -> None:
        bar.ncols = self._size.columns - 1
        self._send(f"\x1b7\x1b[{self._size.lines};1H\x1b[2K{bar}\x1b8")

    def close(self) -> None:
        self._send(f"\x1b7\x1b[r\x1b[{self._size.lines};1H\x1b[2K\x1b8")

    def _send(self, text: str) -> None:
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()


class Output:
    """The places where the text goes while it is written: standard output, text.txt, and a bar on a terminal's standard
    error."""

    def __init__(self, args: argparse.Namespace, stream: Stream, folder: Path | None, lines: LogLines):
        self.written = self._saved = len(stream.text)  # only the new part of a resumed text is shown
        self._lines = lines
        self._mid_line = False
        self._file = None
        if folder:
            mode = "w" if args.resume else "x"
            self._file = (folder / "text.txt").open(mode, encoding="utf-8", newline="")
            self._file.write(stream.text)
        self._bottom = None if no_bar(args) or not sys.stdout.isatty() else BottomLine()
        self._bar = tqdm(
            initial=stream.stats.new_tokens, total=stream.run.options.max_new_tokens, unit="tok", disable=no_bar(args),
            file=sys.stderr if self._bottom is None else io.StringIO(), dynamic_ncols=self._bottom is None,
        )  # fmt: skip

    def __enter__(self) -> Output:
        self._lines.show = self.log
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lines.show = show_plainly
        if self._bottom:
            self._bottom.close()
        self._bar.close()
        if self._file:
            with suppress(*([OSError] if kind else [])):  # the first error is told
                self._file.close()

    def write(self, text: str, tokens: int, per_pass: float | None) -> None:
        if text:
            if self._file:
                self._saved += len(text)  # also where the disk is full: the file keeps what it could not write yet
                self._file.write(text)
                self._file.flush()
            self.written += len(text)
            self._mid_line = not text.endswith("\n")
            sys.stdout.write(text)
            sys.stdout.flush()
        if per_pass is not None:
            self._bar.set_postfix_str(f"{per_pass:.2f} tok/pass", refresh=False)
        if self._bar.update(tokens) and self._bottom:  # true where tqdm finds it time to draw
            self._bottom.draw(self._bar)

    def log(self, line: str) -> None:
        """Writes a line of the log, on a line of its own. A bar on standard error is drawn again below it."""
        sys.stdout.flush()
        tqdm.write(f"\n{line}" if self._bottom and self._mid_line else line, file=sys.stderr)
        self._mid_line = False

    def save_rest(self, text: str) -> None:
        """Writes the text that an interruption kept from text.txt, or all of it where someone removed the file."""
        if self._file:
            rest, self._saved = text[self._saved :], len(text)
            self._file.write(rest)
            self._file.flush()
            if not Path(self._file.name).exists():
                Path(self._file.name).write_bytes(text.encode())

    def end(self, text: str, goes_on: bool) -> None:
        """Writes what an interruption kept from standard output, and ends the last line.

        goes_on: whether a resumed run may write the rest, which then follows in a file or a pipe byte for byte.
        """
        sys.stdout.write(text[self.written :])
        if sys.stdout.isatty() or not (goes_on or text.endswith("\n")):
            sys.stdout.write("\n")
        sys.stdout.flush()


def no_bar(args: argparse.Namespace) -> bool:
    return bool(args.quiet) or not sys.stderr.isatty()


def note(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"\n{text}", file=sys.stderr)
