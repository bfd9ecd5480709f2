"""`tokenswift` and `tokenswift resume` load a model, write a text, compare it and report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenswift_py.cli.flags import MODEL
from tokenswift_py.cli.inputs import (
    check_trace,
    read_input,
    read_options,
    recorded_origin,
    shared_input,
    shared_journal,
)
from tokenswift_py.cli.terminal import CtrlC, LogLines, Output, no_bar, note
from tokenswift_py.errors import check
from tokenswift_py.parallel.processes import tensor_ranks
from tokenswift_py.runs.folder import restore, save_logprobs, save_report, save_tokens
from tokenswift_py.runs.journal import Journal, JournalError

if TYPE_CHECKING:
    from tokenswift_py.api import TokenSwift
    from tokenswift_py.runs.stream import Stream

INTERRUPTED = 130


def write(args: argparse.Namespace, lines: LogLines) -> int:
    """Checks the input, loads the model, writes, compares and reports."""
    alone = tensor_ranks(args.pipeline_parallel_size) == 1
    prompt, options = read_input(args) if alone else shared_input(args)
    nowhere = args.kv_snapshot and args.out is None and alone
    check(not nowhere, "kv_snapshot", True, "only with out or resume")
    check(args.extend == 0, "extend", args.extend, "only with resume")

    # Imported here, because torch and transformers take seconds.
    from tokenswift_py.api import TokenSwift

    swift = TokenSwift.from_pretrained(**{name: getattr(args, name) for name in MODEL})
    if args.n == 1:
        stream = swift.stream(prompt, out=args.out, kv_snapshot=args.kv_snapshot, **options)
        return write_out(args, swift, stream, args.out, lines)
    streams = swift.streams(prompt, args.n, out=args.out, kv_snapshot=args.kv_snapshot, **options)
    for number, stream in enumerate(streams, start=1):
        print(f"--- sample {number} of {args.n} ---", flush=True)
        if code := write_out(args, swift, stream, args.out / str(number) if args.out else None, lines):
            return code
    return 0


def resume(args: argparse.Namespace, given: dict[str, Any], lines: LogLines) -> int:
    """Goes on with a recorded run. given: the flags that were given; the others have their recorded values."""
    for name in ("prompt", "prompt_file", "messages", "n", "out", "baseline"):
        check(name not in given, name, given.get(name), "not with resume")
    check(args.extend >= 0, "extend", args.extend, "at least 0")
    check_trace(args.trace)
    stages = args.pipeline_parallel_size
    journal = Journal.open(args.resume) if tensor_ranks(stages) == 1 else shared_journal(args.resume, stages)
    record = journal.record
    if record.torn:
        note(args, f"{record.torn} bytes after token {len(record.tokens)} are torn and were cut off")
    note(args, f"{len(record.tokens)} tokens are recorded")

    from tokenswift_py.api import TokenSwift
    from tokenswift_py.models.devices import compute_as
    from tokenswift_py.runs.progress import work_bar

    compute_as(record.header["numerics"])
    origin = {name: given.get(name, value) for name, value in recorded_origin(record, given.get("model")).items()}
    swift = TokenSwift.from_pretrained(**origin, threads=args.threads, pipeline_parallel_size=stages)
    settings = {name: value for name, value in read_options(args).items() if name in given}
    stream = swift.resume(journal, args.extend, args.kv_snapshot, **settings)
    finished = stream.ending != "interrupted" and (args.resume / "report.json").is_file()
    folder = args.resume if swift.executor.ranks.leads else None
    if swift.executor.ranks.first(np.array([finished])).item():
        note(args, f"the run is finished, ended by: {stream.ending}")
        with stream:
            restored = restore(folder, stream.result()) if folder else []
        if restored:
            note(args, f"written again: {', '.join(restored)}")
        if args.quality:
            note(args, f"`tokenswift quality {args.resume} --write` reads it")
        return 0
    rows = len(stream.run.prompt) + len(stream.tokens)
    with work_bar("reading them again", swift.checkpoint.spec, rows, no_bar(args)) as progress:
        stream.catch_up(progress)
    for name in (
        ("tokens.npy", "report.json", "logprobs.jsonl") if folder else ()
    ):  # these are of an earlier session, and are written again at the end
        (args.resume / name).unlink(missing_ok=True)
    return write_out(args, swift, stream, folder, lines)


def write_out(args: argparse.Namespace, swift: TokenSwift, stream: Stream, folder: Path | None, lines: LogLines) -> int:
    """Writes, compares and reports. folder: folder that gets the files."""
    from tokenswift_py.runs.report import summary

    interrupted, status = False, INTERRUPTED
    failures: list[Exception] = []
    with Output(args, stream, folder, lines) as output:
        try:
            with CtrlC() as ctrl_c:
                for piece in stream:
                    ctrl_c.hold()
                    output.write(piece.text, len(piece.tokens), stream.stats.to_dict()["mean_acceptance_length"])
                    if ctrl_c.pressed:
                        interrupted, status = True, ctrl_c.status
                        break
        except KeyboardInterrupt:
            interrupted = True
        except Exception as error:
            failures.append(error)
        failures += attempted(stream.close)  # whatever happened, what was written is kept
        result = stream.result()
        if folder:
            failures += attempted(output.save_rest, result.text)
        if folder and not any(isinstance(failure, JournalError) for failure in failures):
            failures += attempted(save_tokens, folder, result.tokens)  # these are of what the journal holds
            failures += attempted(save_report, folder, result.report)
            failures += attempted(save_logprobs, folder, stream.run.prompt, result)
        if failures:
            raise failures[0]
        output.end(result.text, goes_on=folder is not None and result.ending == "interrupted")
        interrupted |= result.ending == "interrupted"  # on other ranks, by rank 0
    try:
        if args.baseline and not interrupted:
            note(args, "decoding again without drafts, to compare")
            result = swift.baseline(stream)
            if folder:
                save_report(folder, result.report)
        if args.quality and not interrupted:
            note(args, "reading the text again, window by window")
            read = swift.window_perplexity(result).summary()
            result = replace(result, report={**result.report, "window_perplexity": read})
            if folder:
                save_report(folder, result.report)
    except KeyboardInterrupt:
        interrupted = True
    finally:  # of the text, which is whole though there be no memory to compare it
        note(args, summary(result.report))
    if folder and result.ending == "interrupted":
        note(args, f"`tokenswift resume {folder}` goes on from there")
    return status if interrupted else 0


def attempted(step: Callable[..., object], *arguments: object) -> list[Exception]:
    """Returns the error that the step has failed with, if it has. The steps after it are no worse for that."""
    try:
        step(*arguments)
    except (OSError, JournalError) as error:
        return [error]
    return []
