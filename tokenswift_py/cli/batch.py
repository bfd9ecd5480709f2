"""`tokenswift batch` answers a file of requests in OpenAI's batch format by one engine."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tokenswift_py.cli.arguments import Parser, named_path, whole
from tokenswift_py.cli.flags import MODEL, model_flags
from tokenswift_py.cli.terminal import CtrlC, no_bar, note
from tokenswift_py.errors import UserError, check
from tokenswift_py.parallel.processes import check_one_rank

PACKAGES = ("fastapi", "sse_starlette", "prometheus_client")  # packages of the server, which makes the answers
RATE_S = 0.5  # seconds between two looks at the rate


def parser() -> argparse.ArgumentParser:
    root = Parser(
        prog="tokenswift batch",
        description="Answer a file of requests in OpenAI's batch format, many at once. A run that was stopped or "
        "killed goes on when it is started again with the same files.",
    )
    root.add_argument("input", type=named_path, metavar="IN.jsonl",
                      help="a request each line: custom_id, method, url, body")  # fmt: skip
    root.add_argument("output", type=named_path, metavar="OUT.jsonl",
                      help="gets an answer each line; requests that have one there are left out")  # fmt: skip
    model_flags(root.add_argument_group("model"))
    engine = root.add_argument_group("engine")
    engine.add_argument("--context", type=whole, help="positions of every text (default: the trained length)")
    engine.add_argument("--drafter", default="auto", help="auto, none, ngram, partial, heads, cascade or eagle")
    engine.add_argument("--running", type=whole, default=16, help="texts that are written at once (default: 16)")
    engine.add_argument("--kv-tokens", type=whole, help="tokens that the KV cache holds (default: by the memory)")
    text = root.add_argument_group("requests")
    text.add_argument("--served-name", help="the model's name in requests (default: the model's, without folders)")
    text.add_argument("--default-tokens", type=whole, default=2048,
                      help="a text's most where a request does not say (default: 2048)")  # fmt: skip
    text.add_argument("--seed", type=whole, help="of requests that have none (default: one is drawn for each)")
    root.add_argument("--quiet", action="store_true", help="no bar, no summary")
    return root


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Raises UserError for wrong input. Requests that fail are lines of the output, not errors."""
    args = parser().parse_args(arguments)
    check_one_rank("batch", args.pipeline_parallel_size)
    check(args.running >= 1, "running", args.running, "at least 1")
    check(args.seed is None or 0 <= args.seed < 2**63, "seed", args.seed, "between 0 and 2^63 - 1")
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"batch: it needs {package}: pip install 'tokenswift-py[server]' ({error})") from error

    # Imported here, because torch, transformers and FastAPI take seconds.
    from tokenswift_py.serving.bulk.lines import Answers, survey
    from tokenswift_py.serving.bulk.requests import SHAPES
    from tokenswift_py.serving.limits import Limits

    limits = Limits(default_tokens=args.default_tokens)
    keys = survey(args.input, tuple(SHAPES))  # wrong input is refused before anything is made
    answers = Answers(args.output)
    try:
        left = len(keys - answers.answered)
        if answers.answered:
            note(args, f"{len(answers.answered)} requests have an answer in {args.output}")
        return answer(args, answers, left, limits) if left else 0
    finally:
        answers.close()


def answer(args: argparse.Namespace, answers: Any, left: int, limits: Any) -> int:
    """Loads the model and answers the requests. left: number of requests that have no answer."""
    from tokenswift_py.api import TokenSwift
    from tokenswift_py.serving.bulk.batch import AHEAD, Batch
    from tokenswift_py.serving.bulk.lines import lines_in
    from tokenswift_py.serving.bulk.requests import SHAPES, Requests
    from tokenswift_py.serving.engine import Engine

    swift = TokenSwift.from_pretrained(**{name: getattr(args, name) for name in MODEL})
    engine = Engine(
        swift, args.context, drafter=args.drafter, most_running=args.running, most_waiting=AHEAD + limits.choices,
        kv_tokens=args.kv_tokens,
    )  # fmt: skip
    try:
        requests = Requests(engine, args.served_name or Path(args.model).name, limits, args.seed)
        answers.check_origin(requests.name, engine.loaded.target.numerics, engine.context)
        bar = tqdm(total=left, unit="text", disable=no_bar(args), dynamic_ncols=True, file=sys.stderr)
        began = time.monotonic()
        with bar, CtrlC() as ctrl_c:
            ctrl_c.hold()
            batch = Batch(requests, answers, args.running + AHEAD, shown_on(bar, engine))
            done = batch.run(lines_in(args.input, tuple(SHAPES)), lambda: ctrl_c.pressed)
    finally:
        engine.close()
    tokens, seconds = engine.figures()["generated_tokens"], time.monotonic() - began
    told = f"{batch.answered} requests answered, {batch.failed} of them with an error"
    note(args, f"{told}; {tokens} tokens in {seconds:.0f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s)")
    if not done:
        note(args, f"stopped with {left - batch.answered} requests left: the same command goes on from there")
    return 0 if done else ctrl_c.status


def shown_on(bar: Any, engine: Any) -> Callable[[int, int], None]:
    """Returns a function that shows on a bar how many requests are answered, and tokens a second since the last
    look."""
    at, tokens = time.monotonic(), 0

    def show(answered: int, failed: int) -> None:
        nonlocal at, tokens
        now = time.monotonic()
        if now - at >= RATE_S and not bar.disable:
            so_far = engine.figures()["generated_tokens"]
            errors = f", {failed} errors" if failed else ""
            bar.set_postfix_str(f"{(so_far - tokens) / (now - at):.1f} tok/s{errors}", refresh=False)
            at, tokens = now, so_far
        bar.update(answered - bar.n)
        bar.refresh()

    return show
