"""The files that an experiment leaves, from which it goes on where it was stopped.

An experiment is a list of cells, each a few rows under a key. A finished cell is written to `results/NAME.jsonl` at
once. The next run of the same settings, code, machine and versions reads it from there instead of measuring it again.
At the end `results/NAME.json` holds every row and the conditions it was measured under, `NAME.md` the table, `NAME.png`
the picture.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from tokenswift_py.decoding.statistics import memory_bandwidth
from tokenswift_py.errors import UserError, need_extra
from tokenswift_py.models.devices import available_threads
from tokenswift_py.runs.report import rounded

SCHEMA = 1
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENGINE = ("tokenswift_py", "drafters", "kvcache", "kernels")
LOOSE_FLAGS = ("again", "results", "trace", "json", "kept")  # flags that no number depends on, such as places of files

Row = dict[str, Any]
Plot = Callable[[Any, list[Row]], None]  # draws rows on a matplotlib Figure


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--again", action="store_true", help="measure finished cells anew")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="where they are written")


def command(argv: Sequence[str]) -> str:
    """Returns the command that was typed, without the flags that no number depends on."""
    kept, words = [], iter(argv[1:])
    for word in words:
        flag, equals, _ = word.removeprefix("--").partition("=")
        if not word.startswith("--") or flag not in LOOSE_FLAGS:
            kept.append(word)
        elif not equals and flag != "again":
            next(words, None)
    return " ".join(["python", f"experiments/{Path(argv[0]).name}", *map(shlex.quote, kept)])


def start(main: Callable[[], None]) -> None:
    """Runs a script. Wrong input ends it with its one line."""
    try:
        main()
    except UserError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


class Results:
    """The cells of one run of an experiment. Raises UserError without matplotlib, before anything is measured.

    name:       name of the files.
    question:   the question that the experiment answers, in a sentence.
    args:       all flags (`add_flags` among them). Bandwidth is read with `threads` threads, where that is a flag.
    guarantees: what each figure rests on: {"tokens of the native engine": "bitwise", "milliseconds": "measured", ...}.
    axes:       flags that only choose the cells. A cell does not depend on them beyond its key.
    peers:      further distributions whose versions count.
    """

    def __init__(
        self,
        name: str,
        question: str,
        args: argparse.Namespace,
        *,
        guarantees: Mapping[str, str],
        axes: Sequence[str] = (),
        peers: Sequence[str] = (),
    ):
        need_pictures()
        self.name, self.question, self.guarantees = name, question, dict(guarantees)
        self.folder, self._again = Path(args.results), bool(args.again)
        told = {flag: value for flag, value in vars(args).items() if flag not in LOOSE_FLAGS}
        self.settings: dict[str, Any] = json.loads(json.dumps(told, default=str))
        self.machine = machine(getattr(args, "threads", None))
        self.versions = versions(peers)
        lasting = {fact: value for fact, value in self.machine.items() if fact != "memory_bandwidth_gb_s"}
        common = {flag: value for flag, value in self.settings.items() if flag not in axes}
        self._rests_on = [common, lasting, self.versions, code_digest()]
        self._journal = self.folder / f"{name}.jsonl"
        self._finished = {cell["id"]: cell for cell in read_journal(self._journal)}
        self.cells: list[dict[str, Any]] = []

    @property
    def rows(self) -> list[Row]:
        return [row for cell in self.cells for row in cell["rows"]]

    def cell(self, key: Mapping[str, Any], compute: Callable[[], Row | Iterable[Row]]) -> list[Row]:
        """Returns the rows of one cell, each beginning with the key's fields. Computes them unless they are finished.

        Values are numbers, texts, booleans or None. Raises ValueError for others, and for a key used twice.
        """
        digest = hashlib.sha256(json.dumps([self._rests_on, key], sort_keys=True).encode()).hexdigest()
        if any(cell["id"] == digest for cell in self.cells):
            raise ValueError(f"key: {dict(key)!r} is not allowed; each cell needs one of its own")
        cell = None if self._again else self._finished.get(digest)
        if cell is None:
            started = time.perf_counter()
            found = compute()
            rows = [flat({**key, **row}) for row in ([found] if isinstance(found, dict) else found)]
            seconds = rounded(time.perf_counter() - started)
            cell = {"id": digest, "created": now(), "seconds": seconds, **commit(), "rows": rows}
            add_line(self._journal, cell)
        self.cells.append(cell)
        for row in cell["rows"]:
            print(json.dumps(row), flush=True)
        return list(cell["rows"])

    def save(self, plot: Plot | None = None) -> None:
        """Writes the JSON, the table and, where there is a `plot`, the picture. Prints the table."""
        record = {
            "schema": SCHEMA,
            "name": self.name,
            "question": self.question,
            "command": command(sys.argv),
            "created": now(),
            **commit(),
            "machine": self.machine,
            "versions": self.versions,
            "settings": self.settings,
            "guarantees": self.guarantees,
            "cells": [{name: value for name, value in cell.items() if name != "rows"} for cell in self.cells],
            "rows": self.rows,
        }
        replace(self.folder / f"{self.name}.json", (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
        replace(self.folder / f"{self.name}.md", page(record, plot is not None).encode())
        if plot is not None:
            save_picture(self.folder / f"{self.name}.png", lambda figure: plot(figure, self.rows))
        print(f"\n{tables(self.rows)}\n\n{self.folder / self.name}.json, .md{', .png' if plot else ''}")


def need_pictures() -> None:
    """Raises UserError, before anything is measured, where the picture at the end could not be drawn."""
    need_extra("extra", "experiments", "matplotlib")


def save_picture(path: Path, draw: Callable[[Any], None]) -> None:
    """Saves the matplotlib Figure that `draw` draws on as a PNG."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    draw(figure)
    figure.savefig(path)


def add_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a line to a journal and syncs it to the disk. Raises ValueError for NaN and infinities."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a journal, none where there is no file. Cuts off a last line that a killed run left torn."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    yield from (json.loads(line) for line in whole.splitlines())


def flat(row: Row) -> Row:
    for name, value in row.items():
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"{name}: {value!r} is not allowed; a number, text, boolean or None")
        if isinstance(value, float) and not math.isfinite(value):  # rounding would make it a silent null
            raise ValueError(f"{name}: {value!r} is not JSON compliant")
    return {name: rounded(value) for name, value in row.items()}


def replace(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".part")
    fresh.write_bytes(data)
    os.replace(fresh, path)


def page(record: Mapping[str, Any], picture: bool) -> str:
    name, host = record["name"], record["machine"]
    dirty = " with uncommitted changes" if record["dirty"] else ""
    lines = [
        f"# {name}", "", record["question"], "", f"`{record['command']}`", "",
        f"{record['created']}, commit {(record['commit'] or 'unknown')[:12]}{dirty}; {host_line(host)}; "
        + ", ".join(f"{package} {version}" for package, version in record["versions"].items()) + ".",
        "", *(f"- {what}: {guarantee}" for what, guarantee in record["guarantees"].items()), "", tables(record["rows"]),
    ]  # fmt: skip
    return "\n".join([*lines, *(["", f"![{name}]({name}.png)"] if picture else [])]) + "\n"


def host_line(host: Mapping[str, Any]) -> str:
    return (
        f"{host['cpu']}, {host['threads']} threads of {host['cores']} cores, {host['isa']}, "
        f"{host['memory_bandwidth_gb_s']:g} GB/s read"
    )


def parts(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups rows by their columns. Each group makes a table."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row), []).append(row)
    return list(found.values())


def tables(rows: Sequence[Row]) -> str:
    return "\n\n".join(map(table, parts(rows)))


def table(rows: Sequence[Row]) -> str:
    """Makes a Markdown table, padded so that it can be read as text. Columns of numbers are aligned to the right."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([shown(row.get(name)).replace("|", "\\|") for name in columns] for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    right = [all(numeric(row.get(name)) for row in rows) for name in columns]
    rule = ["-" * (width - 1) + (":" if to_right else "-") for width, to_right in zip(widths, right, strict=True)]
    lines.insert(1, rule)

    def padded(line: list[str]) -> Iterator[str]:
        for text, width, to_right in zip(line, widths, right, strict=True):
            yield text.rjust(width) if to_right else text.ljust(width)

    return "\n".join(f"| {' | '.join(padded(line))} |" for line in lines)


def numeric(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def shown(value: Any) -> str:
    """Returns a value as a table shows it."""
    if value is None:
        return "–"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def machine(threads: int | None = None) -> dict[str, Any]:
    """Describes the machine that the numbers depend on. memory_bandwidth_gb_s: a plain read by `threads` threads."""
    threads = threads or available_threads()
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=True),
        "threads": threads,
        "memory_bandwidth_gb_s": rounded(memory_bandwidth(threads=threads) / 1e9),
        "isa": isa(),
    }


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # the file is Linux's
    return platform.processor() or platform.machine()


def isa() -> str:
    """Returns the instruction set that the native engine uses here, or torch's where the engine is not built."""
    try:
        return str(importlib.import_module("tokenswift_py.kernels.cpu._native").chosen_isa())
    except ImportError:
        return f"torch {torch.backends.cpu.get_cpu_capability()}"


def versions(peers: Sequence[str] = ()) -> dict[str, str]:
    from tokenswift_py import __version__

    found = {"tokenswift_py": __version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in ("torch", "transformers", *peers)}


def commit() -> dict[str, Any]:
    """Returns the checkout's commit, and whether anything but results differs from it. None where there is no git."""

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changes = git("status", "--porcelain", "--", ".", ":!results")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def code_digest() -> str:
    """Returns a digest of the package's sources and of the files that Python has loaded from this folder."""
    sources = [path for folder in ENGINE for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    loaded = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    sources += [path for file in loaded if file and HERE in (path := Path(file).resolve()).parents]
    digest = hashlib.sha256()
    for path in sorted(set(sources)):
        digest.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
