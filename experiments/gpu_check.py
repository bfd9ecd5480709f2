"""Checks whether the GPU path is right, and measures how fast it is, in a few minutes of a card.

    make gpu                                          # steps 0 to 7
    make gpu ARGS="--steps 8,9"                       # in a second call
    make gpu ARGS="--tiny --steps 0-9"                # all of it on Triton's interpreter, to exercise this script
    make gpu ARGS="--pack build/gpu"                  # where there is a network; then, where build/gpu has come to:
    make gpu ARGS="--join build/gpu"

A machine that is lent for minutes has no network and little time. `--pack DIR` runs where there is a network. It lays
out what has to travel: two loads, of wheels and halves of the default model's file. `--join DIR` puts together on the
machine what has come. Every row is printed and written to results/gpu.json at once. A step that does not fit the time
that is left is skipped. A step that fails does not stop the others. The steps of a later call take their places beside
those of earlier calls.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1


@dataclass(frozen=True)
class Planned:
    """A step of the check. seconds: time that it is expected to take on an H100, compiling included."""

    number: int
    title: str
    seconds: int
    module: str
    function: str


# In the order in which they run: bits and milliseconds of the pass before what can wait.
PLAN = (
    Planned(0, "versions and ceilings", 8, "gpu_kernels", "ceilings"),
    Planned(2, "noise and choices", 6, "gpu_kernels", "noise_bits"),
    Planned(3, "row law", 60, "gpu_kernels", "row_law"),
    Planned(6, "passes of the 8B shape", 60, "gpu_loops", "passes"),
    Planned(1, "tests", 100, "gpu_kernels", "tests"),
    Planned(7, "the loop at 100 000 tokens", 80, "gpu_loops", "loop"),
    Planned(4, "products at 64 rows", 12, "gpu_kernels", "products"),
    Planned(5, "attention variants", 60, "gpu_kernels", "attention_variants"),
    Planned(8, "texts of the default model", 150, "gpu_loops", "texts"),
    Planned(9, "20 000 tokens", 45, "gpu_loops", "long_text"),
)


OVERRUN = 1.5  # how much longer than planned a step may take; then it is cut short after the row at hand


class Record:
    """The contents of results/gpu.json, which is written anew with every row."""

    def __init__(self, path: Path, device: torch.device, tiny: bool):
        self.results = importlib.import_module("results")
        self.path = path
        self.head = {
            "schema": SCHEMA, "name": "gpu",
            "question": "Is the GPU path right on hardware, and how fast is it?",
            "command": self.results.command(sys.argv), "created": self.results.now(), **self.results.commit(),
            "code": self.results.code_digest(), "card": card(device), "versions": versions(), "tiny": tiny,
        }  # fmt: skip
        self.steps: dict[str, dict[str, Any]] = {}
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            alike = ("code", "card", "versions", "tiny")
            if old.get("schema") == SCHEMA and all(old.get(name) == self.head[name] for name in alike):
                self.steps = old["steps"]
            else:  # minutes of a card, which may be gone
                path.replace(path.with_name(f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}.json"))

    def write(self) -> None:
        steps = {number: self.steps[number] for number in sorted(self.steps, key=int)}
        data = json.dumps({**self.head, "steps": steps}, indent=1, allow_nan=False) + "\n"
        self.results.replace(self.path, data.encode())

    def tables(self) -> Iterator[str]:
        for number, step in sorted(self.steps.items(), key=lambda pair: int(pair[0])):
            yield f"\n{number}. {step['title']}: {step['verdict']}, {step['seconds']:.1f} s\n"
            if step["rows"]:
                yield str(self.results.tables(step["rows"]))


def card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": f"none: Triton's interpreter on {platform.machine()}"}
    told = torch.cuda.get_device_properties(device)
    return {
        "name": told.name, "memory_gb": round(told.total_memory / 1e9, 1), "processors": told.multi_processor_count,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
    }  # fmt: skip


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda or torch.version.hip)}
    return found | {name: importlib.import_module(name).__version__ for name in ("torch", "triton", "transformers")}


def run(planned: Planned, stage: Any, record: Record) -> bool:
    """Runs one step, row by row. Returns whether everything held."""
    began, rows, verdict = time.monotonic(), [], "ok"
    step = record.steps[str(planned.number)] = {
        "title": planned.title, "verdict": "cut short", "seconds": 0.0, "rows": rows,
    }  # fmt: skip
    try:
        for row in getattr(importlib.import_module(planned.module), planned.function)(stage):
            rows.append({name: record.results.rounded(value) for name, value in row.items()})
            print(f"  {planned.number} {json.dumps(rows[-1])}", flush=True)
            step["seconds"] = round(time.monotonic() - began, 1)
            record.write()
            if stage.left < 0:
                verdict = "cut short"
                break
    except Exception as error:  # one step's failure must not cost the others their time on the card
        rows.append({"error": f"{type(error).__name__}: {error}"[:2000]})
        print(f"  {planned.number} {json.dumps(rows[-1])}", flush=True)
        verdict = "failed"
    if any(row.get("ok") is False for row in rows):
        verdict = "failed"
    step.update(verdict=verdict, seconds=round(time.monotonic() - began, 1))
    record.write()
    print(f"{planned.number} {planned.title}: {verdict}, {step['seconds']} s", flush=True)
    return verdict != "failed"


def check_all(args: argparse.Namespace) -> bool:
    """Runs every step that was asked for and fits the time. Returns whether everything held."""
    gpu_stage = importlib.import_module("gpu_stage")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = Record(args.results / ("gpu-tiny.json" if args.tiny else "gpu.json"), device, args.tiny)
    print(f"{record.head['card']['name']}; {record.head['versions']}; {args.seconds} s", flush=True)
    held, scratch, ceilings = True, Path(tempfile.mkdtemp()), {}
    until = time.monotonic() + args.seconds
    try:
        for planned in PLAN:
            left = until - time.monotonic()
            if planned.number not in args.steps:
                continue
            if left < planned.seconds and not args.tiny:
                told = f"skipped, {left:.0f} s are left of {planned.seconds}"
                print(f"{planned.number} {planned.title}: {told}", flush=True)
                continue
            # A step that takes longer than was planned, as for compiling, must not cost the later ones all their time.
            end = until if args.tiny else min(until, time.monotonic() + OVERRUN * planned.seconds)
            held &= run(planned, gpu_stage.Stage(device, args.tiny, end, scratch, ceilings), record)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print("\n".join(record.tables()))
    return held


def numbers(text: str) -> list[int]:
    """Parses numbers of steps and ranges of them, like 0-3,7."""
    ranges = [part.partition("-") for part in text.split(",")]
    try:
        found = [n for first, dash, last in ranges for n in range(int(first), int(last if dash else first) + 1)]
    except ValueError:
        found = [-1]
    if not found or not set(found) <= {planned.number for planned in PLAN}:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; numbers of steps and ranges of them: 0-7,9")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=numbers, default="0-7", help="numbers and ranges (default: 0-7)")
    parser.add_argument("--seconds", type=float, default=460, help="no step begins that would not end in this time")
    parser.add_argument("--tiny", action="store_true", help="sizes for Triton's interpreter, where there is no GPU")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="where gpu.json is")
    parser.add_argument("--kept", type=Path, default=ROOT / "build" / "gpu", metavar="DIR", help="what --join left")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="lay out what has to travel, and end")
    parser.add_argument("--join", type=Path, metavar="DIR", help="put together what has come, and end")
    args = parser.parse_args(argv)
    folders = map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "support", ROOT / "experiments"))
    sys.path[:0] = [path for path in folders if path not in sys.path]
    importlib.import_module("interpreter")  # before anything that imports Triton
    errors = importlib.import_module("tokenswift_py.errors")
    try:
        gpu_pack = importlib.import_module("gpu_pack")
        for folder, done in ((args.pack, gpu_pack.pack), (args.join, gpu_pack.join)):
            if folder is not None:
                print(*done(folder), sep="\n")
        if args.pack or args.join:
            return 0
        there = torch.cuda.is_available() or args.tiny
        errors.check(there, "device", "cpu", "a GPU; --tiny exercises all steps on Triton's interpreter")
        gpu_pack.use(args.kept)
        return 0 if check_all(args) else 1
    except errors.UserError as error:
        print(f"gpu_check.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
