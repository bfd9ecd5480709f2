"""`tokenswift train-memory` trains the gates of a memory of evicted rows, on texts that are given or built in."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
from collections.abc import Sequence
from typing import Any

from tokenswift_py.checkpoints.cache import write_beside
from tokenswift_py.cli.arguments import Parser, named_path, number, whole
from tokenswift_py.errors import check, check_kept, check_new
from tokenswift_py.options import GATED
from tokenswift_py.parallel.processes import world_size
from tokenswift_py.version import __version__


def parser() -> argparse.ArgumentParser:
    root = Parser(
        prog="tokenswift train-memory",
        description="Train the gates of a memory for --kv-memory infini: one number a head. The model stays as it is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    root.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder, a .gguf file or a hub id")
    root.add_argument("--revision", help="of a hub id")
    root.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    root.add_argument("--threads", type=whole, help="CPU threads")
    root.add_argument("--kind", default="infini", help=" or ".join(GATED))
    root.add_argument("--texts", nargs="+", default=[], metavar="FILE", help="to learn from (default: built in)")
    root.add_argument("--length", type=whole, default=4096, help="tokens of a text")
    root.add_argument("--budget", type=whole, default=1024, help="tokens of the cache, as kv_budget")
    root.add_argument("--steps", type=whole, default=96, help="steps of 256 tokens at the most")
    root.add_argument("--rate", type=number, default=0.1, help="peak learning rate")
    root.add_argument("--held-out", type=whole, default=1, help="texts of each source for the figures")
    root.add_argument("--minutes", type=number, help="stop by then, with what there is; such a run is not repeatable")
    root.add_argument("--seed", type=whole, default=0, help="of the order of the texts")
    root.add_argument("--out", type=named_path, metavar="FILE", help="a .safetensors file (default: in the cache)")
    root.add_argument("--quiet", action="store_true", help="no bars, no figures")
    return root


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Raises UserError for wrong input."""
    args = parser().parse_args(arguments)
    check(world_size() == 1, "WORLD_SIZE", world_size(), "train-memory runs in one process")
    check_arguments(args)
    began = time.monotonic()
    deadline = began + 60 * args.minutes if args.minutes else math.inf

    # Imported here, because torch and transformers take seconds.
    from tokenswift_py.api import TokenSwift
    from tokenswift_py.checkpoints.checkpoint import fingerprint
    from tokenswift_py.extending.texts import read_sources
    from tokenswift_py.models.rope import rope_tables
    from tokenswift_py.remembering import gates, training

    swift = TokenSwift.from_pretrained(
        args.model, revision=args.revision, dtype="fp32", engine="torch", attention="sdpa", device=args.device,
        threads=args.threads,
    )  # fmt: skip
    checkpoint, windows = swift.checkpoint, [layer.window for layer in swift.checkpoint.spec.layer_specs]
    check(None in windows, "model", checkpoint.name, "every layer of it has a sliding window and forgets by design")
    target = args.out or gates.gates_file(checkpoint, args.kind)
    check_kept("out", target)
    sources = read_sources(args.texts, swift.tokenizer, args.length, args.held_out)
    tables = rope_tables(checkpoint.config, args.length + 1)
    model: Any = swift.executor.model(tables)
    model.ops = training.FrozenRows()
    loaded = time.monotonic() - began
    texts = training.texts_to_learn(sources, args.length, args.seed)
    values, losses = training.train(
        model, args.kind, texts, args.budget, args.steps, args.rate, deadline, args.quiet
    )  # fmt: skip
    check(bool(losses), "minutes", args.minutes, f"time for a step; loading alone took {loaded:.0f} s")
    figures = {
        name: round(training.held_out_nats(model, args.kind, used, sources, args.length, args.budget), 4)
        for name, used in (("nats_without", None), ("nats_with", values))
    }
    provenance = {
        "command": shlex.join(["tokenswift", "train-memory", *arguments]),
        "version": __version__,
        "model": checkpoint.name,
        "seed": args.seed,
        "steps": len(losses),
        "minutes": round((time.monotonic() - began) / 60, 1),
        **figures,
    }
    made = gates.Gates(values.cpu(), args.kind, fingerprint(checkpoint), provenance)
    if args.out is None:
        write_beside(target, lambda fresh: gates.write_gates(made, fresh))
    else:
        gates.write_gates(made, target)
    if not args.quiet:
        shares = values.sigmoid()
        least, most = float(shares.min()), float(shares.max())
        print(f"{target}\n{json.dumps(provenance, indent=1)}\nshares recalled: {least:.3f} to {most:.3f}")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Checks the arguments that need no model. Raises UserError."""
    check(args.kind in GATED, "kind", args.kind, f"one of {', '.join(GATED)}")
    check(args.budget >= 256, "budget", args.budget, "at least 256 tokens, 4 pages")
    check(args.length > args.budget, "length", args.length, f"more than the budget ({args.budget})")
    for name in ("steps", "held_out"):
        check(getattr(args, name) >= 1, name, getattr(args, name), "at least 1")
    check(0 < args.rate < 10, "rate", args.rate, "between 0 and 10")
    check(args.minutes is None or args.minutes > 0, "minutes", args.minutes, "above 0")
    check(0 <= args.seed < 2**63, "seed", args.seed, "between 0 and 2^63 - 1")
    if args.out is not None:
        check(args.out.suffix == ".safetensors", "out", str(args.out), "a new file that ends in .safetensors")
        check_new("out", args.out)
