"""The command line. It writes long-form text to standard output, and progress and the report's summary to standard
error."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress

from tokenswift_py.cli import audit, batch, extend_context, quality, serve, train_heads, train_memory
from tokenswift_py.cli.arguments import Parser, whole
from tokenswift_py.cli.flags import given_options, parser
from tokenswift_py.cli.inputs import follows
from tokenswift_py.cli.terminal import LogLines, open_standard_streams
from tokenswift_py.cli.write import INTERRUPTED, resume, write
from tokenswift_py.errors import UserError
from tokenswift_py.parallel.processes import stage_of, world_size
from tokenswift_py.runs.journal import JournalError

logger = logging.getLogger("tokenswift")
COMMANDS = {
    "audit": audit.main, "batch": batch.main, "extend-context": extend_context.main, "quality": quality.main,
    "serve": serve.main, "train-heads": train_heads.main, "train-memory": train_memory.main,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, 2 for wrong input, 130 after Ctrl-C.

    Of several processes that torchrun started only rank 0 prints, writes files and hears Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    open_standard_streams()
    if not follows():
        return run(given)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return run(given)


def take_place(given: Sequence[str]) -> bool:
    """Takes this process's place in a pipeline, where there is one. Returns whether it was one of a later stage, which
    has nothing to read or write, and is over. The first stage lets the others go at the end, whatever it does."""
    if world_size() == 1:
        return False
    flag = Parser(add_help=False, allow_abbrev=False)
    flag.add_argument("--pipeline-parallel-size", type=whole, default=1)
    stages = flag.parse_known_args(given)[0].pipeline_parallel_size
    later = stage_of(stages) > 0
    if stages == 1:
        return False

    # Imported here, because torch takes seconds.
    from tokenswift_py.parallel.column import column
    from tokenswift_py.parallel.stages import find_place
    from tokenswift_py.parallel.worker import serve_stage

    if not later:
        column(find_place(stages))
        return False
    place = find_place(stages)
    usual = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to all, and a server ends its texts first
    try:
        with suppress(SystemExit):
            serve_stage(place)
    finally:
        signal.signal(signal.SIGTERM, usual)
    return True


def run(given: Sequence[str]) -> int:
    command = COMMANDS.get(given[0]) if given else None
    resumes = given[:1] == ["resume"]
    given = given[1:] if command or resumes else given
    root = parser(resumes)
    try:
        if take_place(given):
            return 0
        args = None if command else root.parse_args(given)
        quiet = args.quiet if args else "--quiet" in given
        lines = LogLines()
        level = logging.ERROR if quiet else logging.WARNING
        logging.basicConfig(format="tokenswift: %(message)s", level=level, handlers=[lines])
        if command:
            return command(given)
        assert args is not None
        return resume(args, given_options(root, given), lines) if args.resume else write(args, lines)
    except UserError as error:
        line = str(error).replace("\n", "\\n")  # a file's name may have them
        print(f"tokenswift: {line}", file=sys.stderr)
        return 2
    except JournalError as error:
        print(f"tokenswift: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:  # logits that are not finite, memory that ran out
        # On another rank it may be that rank's alone, and rank 0 only waits for it.
        where = f"rank {os.environ.get('RANK')}: " if follows() else ""
        line = f"tokenswift: {where}{type(error).__name__}: {' '.join(str(error).split())}"
        print(line, file=sys.__stderr__ if follows() else sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone, so the rest of the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk that is full
        print(f"tokenswift: {error.strerror}: {error.filename or 'no file could be written'}", file=sys.stderr)
        return 1
