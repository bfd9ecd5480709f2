"""`tokenswift audit` proves that a recorded text is what plain decoding writes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from tokenswift_py.cli.arguments import Parser, named_path, whole
from tokenswift_py.cli.inputs import origin_of
from tokenswift_py.errors import UserError, check, check_new, new_file
from tokenswift_py.runs import journal


def parser() -> argparse.ArgumentParser:
    root = Parser(
        prog="tokenswift audit",
        description="Prove that a recorded text is what plain decoding writes, without decoding it. "
        "Exit code 0: it is; 1: it is not; 2: it cannot be told.",
    )
    root.add_argument("folder", type=named_path, metavar="DIR", help="what --out wrote")
    root.add_argument(
        "--sample", type=whole, default=0, metavar="K", help="decode K random windows token by token, too"
    )
    root.add_argument("--model", help="where the model lies now (default: as recorded)")
    root.add_argument("--engine", help="native or torch: another arithmetic cross-checks (default: as recorded)")
    root.add_argument("--dtype", help="of the weights, as --engine")
    root.add_argument("--attention", help="a backend of kernels/ (torch engine), as --engine")
    root.add_argument("--device", help="auto, cpu, cuda, ..., as --engine")
    root.add_argument("--threads", type=whole, help="CPU threads")
    root.add_argument("--kv-gates", metavar="FILE", help="where the gates of its memory lie now (default: as recorded)")
    root.add_argument("--pipeline-parallel-size", type=whole, default=1, metavar="N", help="stages, as in writing")
    root.add_argument("--json", type=named_path, metavar="FILE", help="the findings as JSON")
    root.add_argument("--quiet", action="store_true", help="no bar, no words: the exit code alone")
    return root


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Raises UserError for wrong input."""
    args = parser().parse_args(arguments)
    check(args.sample >= 0, "sample", args.sample, "at least 0")
    if args.json:
        check_new("json", args.json)
    record = journal.read(args.folder)
    check(not record.header["parameters"]["logits_processors"], "journal", str(args.folder), "processors need Python")

    # Imported here, because torch and transformers take seconds.
    from tokenswift_py.api import TokenSwift
    from tokenswift_py.models.devices import compute_as
    from tokenswift_py.runs.audit import audit, strict, verdict
    from tokenswift_py.runs.progress import work_bar

    compute_as(record.header["numerics"])
    rows = len(record.header["prompt"]) + len(record.tokens)
    hidden = args.quiet or not sys.stderr.isatty()
    try:
        swift = TokenSwift.from_pretrained(
            **origin_of(record, args), threads=args.threads, pipeline_parallel_size=args.pipeline_parallel_size
        )
        with work_bar("auditing", swift.checkpoint.spec, rows, hidden) as progress:
            found = audit(swift, args.folder, args.sample, progress, kv_gates=args.kv_gates)
    except (RuntimeError, MemoryError, OSError) as error:  # 1 would say that the text is wrong
        told = " ".join(str(error).split())
        raise UserError(f"audit: it broke off and says nothing ({type(error).__name__}: {told})") from error
    if not args.quiet:
        print(verdict(found, lambda token: str(swift.tokenizer.decode([token]))), flush=True)
    if args.json and swift.executor.ranks.leads:
        with new_file("json", args.json) as file:
            file.write(json.dumps(strict(found.to_dict()), indent=2, allow_nan=False) + "\n")
    return 0 if found.passed else 1
