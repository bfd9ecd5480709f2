"""`tokenswift extend-context` lets a model learn to read longer texts than it was trained for."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenswift_py.cli.arguments import Parser, named_path, number, whole
from tokenswift_py.cli.terminal import CtrlC
from tokenswift_py.errors import check, shown
from tokenswift_py.extending.settings import Flag, Lengths, Settings, described_settings, settings_of
from tokenswift_py.parallel.processes import world_size
from tokenswift_py.sampling.kinds import Real, Texts, Whole


def parser() -> argparse.ArgumentParser:
    """Makes the parser. Every flag comes from `Settings`. A flag that is not given is None, so that a resumed run knows
    what is asked."""
    root = Parser(
        prog="tokenswift extend-context",
        description="Train a model for a longer context: stretched positions, and LoRA or every weight. "
        "DIR gets the merged model, which `tokenswift --model DIR` runs, and in DIR/training a journal of the loss.",
    )
    for name, described in described_settings().items():
        flag, told = f"--{name.replace('_', '-')}", f"{described.help} (default: {default_of(name, described)})"
        if isinstance(described.kind, Texts):
            root.add_argument(flag, nargs="+", metavar="FILE", help=told)
        else:
            root.add_argument(flag, type=typed(described), help=told)
    place = root.add_mutually_exclusive_group()
    place.add_argument("--out", type=named_path, metavar="DIR", help="a new or empty folder")
    place.add_argument("--resume", type=named_path, metavar="DIR", help="go on with the run in this folder")
    root.add_argument("--quiet", action="store_true", help="no bar, no figures")
    return root


def typed(described: Flag) -> Callable[[str], Any]:
    """Returns the function that makes a value of the word on the command line."""
    if isinstance(described.kind, Lengths):
        return lengths
    if isinstance(described.kind, Whole):
        return whole
    return number if isinstance(described.kind, Real) else str


def lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        allowed = f"{shown(text)} is not allowed; whole numbers with commas between them"
        raise argparse.ArgumentTypeError(allowed) from error


def default_of(name: str, described: Flag) -> str:
    return described.unset or str(getattr(Settings, name))


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Raises UserError for wrong input."""
    args = parser().parse_args(arguments)
    check(world_size() == 1, "WORLD_SIZE", world_size(), "extend-context runs in one process")
    given = {name: getattr(args, name) for name in described_settings() if getattr(args, name) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = Settings(**given)
    check(args.out is not None or args.resume is not None, "out", args.out, "a folder, after --out or --resume")

    # Imported here, because torch and transformers take seconds.
    from tokenswift_py.extending.extend import begin, go_on
    from tokenswift_py.extending.state import TrainingFolder

    if args.resume is not None:
        for name in given:
            check(described_settings()[name].again, name, given[name], "not with --resume, which keeps the run's own")
        kept = TrainingFolder.open(args.resume)[1]["settings"]
        settings = settings_of({**kept, "minutes": None, **given})  # minutes are a session's
        folder = go_on(settings, args.resume, args.quiet, between_steps)
    else:
        command = shlex.join(["tokenswift", "extend-context", *arguments])
        folder = begin(settings, args.out, command, args.quiet, between_steps)
    if not args.quiet:
        print(table(folder.path.parent, folder.lines(), settings.steps))
    return 0


@contextmanager
def between_steps() -> Iterator[Callable[[], bool]]:
    """Hears Ctrl-C between two steps. The second one interrupts at once."""
    with CtrlC() as keys:
        keys.hold()
        yield lambda: keys.pressed


def table(out: Path, lines: Sequence[dict[str, Any]], wanted: int) -> str:
    """Returns the journal as a table: the loss at both ends, and how held-out texts were read before and after.

    wanted: the number of steps of the whole course.
    """
    steps = [line for line in lines if "loss" in line]
    told = [str(out)]
    if steps:
        left = "" if len(steps) >= wanted else f" of {wanted}; --resume {out} goes on"
        losses = f"loss {steps[0]['loss']:.3f} at first, {steps[-1]['loss']:.3f} at last"
        told.append(f"{len(steps)} steps{left}; {losses}")
    read = [line for line in lines if "held_out" in line]
    if read:
        told.append("nats a token in each quarter of held-out texts, full attention")
    for line in (read[:1] + read[-1:]) if len(read) > 1 else read:
        for source, quarters in line["held_out"].items():
            figures = "  ".join(f"{nats:.3f}" for nats in quarters)
            told.append(f"  {source:8} after {line['step']:5} steps   {figures}")
    return "\n".join(told)


def reference() -> str:
    """Returns the table of flags for docs/extend-context.md: `python -m tokenswift_py.cli.extend_context`."""
    lines = ["| flag | default | what it does |", "|---|---|---|"]
    for name, described in described_settings().items():
        lines.append(f"| `--{name.replace('_', '-')}` | {default_of(name, described)} | {described.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
