"""Checks whether the GPU path is right, and measures how fast it is, in a few minutes of a card.

    make gpu                                          # steps 0 to 7
    make gpu ARGS="--steps 8,9"                       # in a second call
    make gpu ARGS="--tiny --steps 0-9"                # all of it on Triton's interpreter, to exercise this script
    make gpu ARGS="--pack build/gpu"                  # where there is a network; then, where build/gpu has come to:
    make gpu ARGS="--join build/gpu"

A machine that is lent for minutes has no network and little time. `--pack DIR` runs where there is a network. It lays
out what has to travel: two loads, of wheels and halves of the default model's file. `--join DIR` puts together on the
machine what has come. Every row is printed and written to results/gpu.json at once. A step that does not fit the time
that is left is skipped. A step that fails does not stop the others. Where it leaves the GPU unusable for this process,
or does not return, the others run in a new process. The steps of a later call take their places beside those of earlier
calls.

Exit status: 0 where all steps that were asked for were made whole and held, 1 where something did not hold, 3 where
nothing failed but a step was skipped or cut short, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
STUCK = 60  # seconds after that in which the row at hand must end; then the process is replaced
OK, CUT_SHORT, SKIPPED, FAILED = "ok", "cut short", "skipped", "failed"
STATUS = {OK: 0, FAILED: 1, CUT_SHORT: 3, SKIPPED: 3}


class Record:
    """The contents of results/gpu.json, which is written anew with every row."""

    def __init__(self, path: Path, device: torch.device, tiny: bool):
        self.results = importlib.import_module("results")
        modules = [importlib.import_module(name) for name in sorted({planned.module for planned in PLAN})]
        self.path = path
        self.head = {
            "schema": SCHEMA, "name": "gpu",
            "question": "Is the GPU path right on hardware, and how fast is it?",
            "command": self.results.command(sys.argv), "created": self.results.now(), **self.results.commit(),
            "code": self.results.code_digest(), "tests": digest_of_tests(modules), "card": card(device),
            "versions": versions(), "tiny": tiny,
        }  # fmt: skip
        self.steps: dict[str, dict[str, Any]] = {}
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            alike = ("code", "tests", "card", "versions", "tiny")
            if old.get("schema") == SCHEMA and all(old.get(name) == self.head[name] for name in alike):
                self.steps = old["steps"]
            else:  # minutes of a card, which may be gone
                path.replace(path.with_name(f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}.json"))

    def put(self, planned: Planned, verdict: str, seconds: float, rows: list[dict[str, Any]]) -> None:
        """Takes what is known of a step, and writes the file. A step that held before, whole, is not replaced by a part
        of it."""
        number = str(planned.number)
        if verdict in (CUT_SHORT, SKIPPED) and self.steps.get(number, {}).get("verdict") == OK:
            return
        if verdict == SKIPPED and number in self.steps:
            return
        self.steps[number] = {
            "title": planned.title, "verdict": verdict, "seconds": round(seconds, 1), "rows": rows,
        }  # fmt: skip
        self.write()

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


def digest_of_tests(modules: list[Any]) -> str:
    """Returns a digest of the test files that the steps run."""
    named = {name for module in modules for group in getattr(module, "TESTS", {}).values() for name in group}
    files = sorted(path for name in named if (path := ROOT / name).is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def run(planned: Planned, stage: Any, record: Record, watch: Callable[[], None]) -> str:
    """Runs one step, row by row. Returns its verdict. watch: called in another thread where a row does not end."""
    began, rows, verdict = time.monotonic(), list[dict[str, Any]](), OK

    def told(row: dict[str, Any], verdict: str) -> None:
        rows.append(row)
        print(f"  {planned.number} {json.dumps(row)}", flush=True)
        record.put(planned, verdict, time.monotonic() - began, rows)

    def stuck() -> None:
        told({"error": f"not over {STUCK} s after its time"}, FAILED)
        watch()

    alarm = threading.Timer(max(0, stage.left) + STUCK, stuck)
    alarm.daemon = True
    alarm.start()
    try:
        for row in getattr(importlib.import_module(planned.module), planned.function)(stage):
            told({name: record.results.rounded(value) for name, value in row.items()}, CUT_SHORT)
            if stage.left < 0 or row.get("ok", True) is None:
                verdict = CUT_SHORT
                break
    except Exception as error:  # one step's failure must not cost the others their time on the card
        told({"error": f"{type(error).__name__}: {error}"[:2000]}, FAILED)
        verdict = FAILED
    alarm.cancel()
    if any(row.get("ok") is False for row in rows):
        verdict = FAILED
    record.put(planned, verdict, time.monotonic() - began, rows)
    print(f"{planned.number} {planned.title}: {verdict}, {time.monotonic() - began:.1f} s", flush=True)
    return verdict


def usable(device: torch.device) -> bool:
    """Returns whether this process can still use the GPU. After an illegal address, for example, it cannot."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def check_all(args: argparse.Namespace) -> int:
    """Runs every step that was asked for and fits the time. Returns the exit status."""
    gpu_stage = importlib.import_module("gpu_stage")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = Record(args.results / ("gpu-tiny.json" if args.tiny else "gpu.json"), device, args.tiny)
    print(f"{record.head['card']['name']}; {record.head['versions']}; {args.seconds} s", flush=True)
    verdicts, scratch, ceilings = [FAILED] * args.failed, Path(tempfile.mkdtemp()), {}
    until = time.monotonic() + args.seconds
    asked = [planned for planned in PLAN if planned.number in args.steps]

    def replaced(done: int) -> None:
        """Goes on with the steps that are left in a new process, in this one's place. Returns where none is left."""
        if rest := ",".join(str(planned.number) for planned in asked[done:]):
            print(f"steps {rest} go on in a new process", flush=True)
            seconds = str(until - time.monotonic())
            flags = ["--steps", rest, "--seconds", seconds, "--results", str(args.results), "--kept", str(args.kept)]
            os.execv(sys.executable, [sys.executable, __file__, *flags, "--failed", *["--tiny"] * args.tiny])
        os._exit(STATUS[FAILED])

    try:
        for number, planned in enumerate(asked, 1):
            left = until - time.monotonic()
            if left < planned.seconds and not args.tiny:
                told = f"skipped, {left:.0f} s are left of {planned.seconds}"
                print(f"{planned.number} {planned.title}: {told}", flush=True)
                record.put(planned, SKIPPED, 0.0, [])
                verdicts.append(SKIPPED)
                continue
            # A step that takes longer than was planned, as for compiling, must not cost the later ones all their time.
            end = until if args.tiny else min(until, time.monotonic() + OVERRUN * planned.seconds)
            stage = gpu_stage.Stage(device, args.tiny, end, scratch, ceilings)
            verdicts.append(run(planned, stage, record, partial(replaced, number)))
            if not usable(device) and number < len(asked):
                replaced(number)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print("\n".join(record.tables()))
    return 1 if FAILED in verdicts else max((STATUS[verdict] for verdict in verdicts), default=0)


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
    parser.add_argument("--failed", action="store_true", help=argparse.SUPPRESS)  # an earlier process's step
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
        return check_all(args)
    except errors.UserError as error:
        print(f"gpu_check.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
