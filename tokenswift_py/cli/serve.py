"""`tokenswift serve` puts a model behind OpenAI's API."""

from __future__ import annotations

import argparse
import importlib
import ipaddress
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenswift_py.cli.arguments import Parser, named_path, number, whole
from tokenswift_py.cli.flags import MODEL, model_flags
from tokenswift_py.errors import UserError, check
from tokenswift_py.options import Options, described_options
from tokenswift_py.parallel.processes import check_one_rank
from tokenswift_py.serving.limits import Limits

KEY = "TOKENSWIFT_API_KEY"  # a variable of the environment
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+", re.IGNORECASE)
POSITIONS = ("positions", "positions_window", "positions_block")
PACKAGES = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")


def parser() -> argparse.ArgumentParser:
    root = Parser(
        prog="tokenswift serve",
        description="Serve a model: OpenAI's /v1/chat/completions, /v1/completions, /v1/responses and /v1/models, and "
        "/tokenize, /detokenize, /health and /metrics. Ctrl-C or SIGTERM ends it.",
    )
    root.stray = "--help lists the flags"
    model_flags(root.add_argument_group("model"))
    engine = root.add_argument_group("engine")
    engine.add_argument("--context", type=whole, help="positions of every text (default: the trained length)")
    for name in POSITIONS:
        described, typed = described_options()[name], str if name == "positions" else whole
        default = "auto" if name == "positions" else None
        engine.add_argument(f"--{name.replace('_', '-')}", type=typed, default=default, help=described.help)
    engine.add_argument("--drafter", default="auto", help="auto, none, ngram, partial, heads, cascade or eagle")
    engine.add_argument("--running", type=whole, default=16, help="texts that are written at once (default: 16)")
    engine.add_argument("--waiting", type=whole, default=64, help="texts that may wait for it (default: 64)")
    engine.add_argument("--kv-tokens", type=whole, help="tokens that the KV cache holds (default: by the memory)")
    door = root.add_argument_group("door")
    door.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1: this machine)")
    door.add_argument("--port", type=whole, default=8000, help="0 is any that is free (default: 8000)")
    door.add_argument("--api-key", help=f"what clients must send; also from the environment, {KEY} (default: none)")
    door.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="whose pages may ask (repeatable)")
    door.add_argument("--served-name", help="the model's name in requests (default: the model's, without folders)")
    kept = "keep jobs here, which outlive the server, and show them at / (default: no jobs)"
    door.add_argument("--data", type=named_path, metavar="DIR", help=kept)
    limits, usual = root.add_argument_group("limits"), Limits()

    def limit(flag: str, kind: Callable[[str], Any], metavar: str, value: Any, told: str) -> None:
        shown = "what the context holds" if value is None else f"{value:g}"
        limits.add_argument(flag, type=kind, metavar=metavar, default=value, help=f"{told} (default: {shown})")

    limit("--max-body", whole, "MIB", usual.body_mib, "of a request")
    limit("--max-prompt-tokens", whole, "N", usual.prompt_tokens, "of a prompt")
    limit("--max-tokens", whole, "N", usual.max_tokens, "that a text may have")
    limit("--default-tokens", whole, "N", usual.default_tokens, "a text's most where a request does not say")
    limit("--max-n", whole, "N", usual.choices, "texts of one request")
    limit("--timeout", number, "SECONDS", usual.timeout, "after which texts are cut; 0 is never")
    limit("--stall", number, "SECONDS", usual.stall, "that a client may leave a stream unread; 0 is for ever")
    limit("--drain", number, "SECONDS", 30.0, "that texts have when the server is stopped")
    root.add_argument("--quiet", action="store_true", help="errors alone on standard error")
    return root


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Raises UserError for wrong input."""
    args = parser().parse_args(arguments)
    check_one_rank("serve", args.pipeline_parallel_size)
    for name in ("max_body", "max_prompt_tokens", "max_tokens", "default_tokens", "max_n"):
        value = getattr(args, name)
        check(value is None or value >= 1, name, value, "at least 1")
    limits = Limits(
        args.max_body, args.max_prompt_tokens, args.max_tokens, args.default_tokens, args.max_n, args.timeout,
        args.stall,
    )  # fmt: skip
    key, positions = checked_key(args), Options(**{name: getattr(args, name) for name in POSITIONS}).met_positions()
    check(0 <= args.port < 2**16, "port", args.port, "between 0 and 65535")
    check(0 <= args.drain <= 86400, "drain", args.drain, "seconds, at most a day")
    for origin in args.cors:
        check(
            bool(ORIGIN.fullmatch(origin)), "cors", origin, "an origin, like https://example.org or app://obsidian.md"
        )
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"serve: it needs {package}: pip install 'tokenswift-py[server]' ({error})") from error

    # Imported here, because torch, transformers and FastAPI take seconds.
    from tokenswift_py.api import TokenSwift
    from tokenswift_py.serving.engine import Engine
    from tokenswift_py.serving.http.gate import LOOPBACK
    from tokenswift_py.serving.http.run import bound, serve
    from tokenswift_py.serving.http.server import Service
    from tokenswift_py.serving.jobs.jobs import Jobs

    with bound(args.host, args.port) as listening:  # before the model is loaded, so a taken address is told soon
        swift = TokenSwift.from_pretrained(**{name: getattr(args, name) for name in MODEL})
        engine = Engine(
            swift, args.context, drafter=args.drafter, most_running=args.running, most_waiting=args.waiting,
            kv_tokens=args.kv_tokens, positions=positions,
        )  # fmt: skip
        jobs = None if args.data is None else Jobs(engine, args.data)
        name = args.served_name or Path(args.model).name
        hosts = None if key else {*LOOPBACK, args.host.lower()}
        service = Service(engine, name, limits, key, hosts, args.cors, jobs)
        if not args.quiet:
            port = listening.getsockname()[1]
            where = f"{address(args.host, port)}/v1"
            where += f", its page at {address(args.host, port)}" if jobs else ""
            print(f"tokenswift: {name} is at {where}, Ctrl-C ends it", file=sys.stderr, flush=True)
        serve(service, listening, args.drain)
    return 0


def checked_key(args: argparse.Namespace) -> str | None:
    """Returns the key that clients must send. Only this machine's own programs may go without one."""
    key = os.environ.get(KEY) if args.api_key is None else args.api_key
    fine = key is None or (key != "" and key.isascii() and key.isprintable() and " " not in key)
    check(fine, "api_key", "***", "printable ASCII without spaces, not empty")
    allowed = f"beyond this machine only with a key (--api-key or {KEY})"
    check(key is not None or is_loopback(args.host), "host", args.host, allowed)
    return str(key) if key is not None else None


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
