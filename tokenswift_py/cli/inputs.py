"""Reads and checks the input of the command line before a model is loaded: prompt, chapters, options, folders."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from tokenswift_py.cli.arguments import lines_of, unescaped
from tokenswift_py.cli.flags import SINGLE
from tokenswift_py.errors import UserError, check, check_new, files, one_line, shown
from tokenswift_py.options import Options
from tokenswift_py.runs.journal import Journal, Record, shared
from tokenswift_py.text import Prompt

logger = logging.getLogger("tokenswift")

MOST_SAMPLES = 1024
MOST_CHAPTERS = 10_000  # these options are asked for by number
MOST_TEXT = 64 * 2**20  # bytes of a prompt or of chapters: far more than any context holds
BOM = "\ufeff"  # it stands at the start of a file, says how the file is written, and is no text


def follows() -> bool:
    """Returns whether this is one of torchrun's processes, and not rank 0."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def read_input(args: argparse.Namespace) -> tuple[Prompt, dict[str, Any]]:
    """Returns the prompt and the options. Everything that can be refused without a model is refused before one is
    loaded."""
    prompt, options = read_prompt(args), read_options(args)
    Options.of(**options)
    check(1 <= args.n <= MOST_SAMPLES, "n", args.n, f"1 to {MOST_SAMPLES}; `tokenswift batch` writes more")
    check(args.n == 1 or not args.baseline, "baseline", True, "not with n")
    check(args.n == 1 or not args.trace, "trace", args.trace, "not with n: it is the file of one text")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(args, name)
        check(value is None or args.out is not None or follows(), name, value, "only with out, where they go")
    check_trace(args.trace)
    check_out(args.out)
    return prompt, options


def shared_input(args: argparse.Namespace) -> tuple[Prompt, dict[str, Any]]:
    """Returns the same where several ranks share the model. Rank 0 reads the prompt for all, and writes all files."""
    from tokenswift_py.parallel.ranks import join

    ranks = join(args.pipeline_parallel_size)
    with ranks.same_fate():
        if not ranks.leads:
            args.prompt, args.prompt_file, args.messages, args.out = "of rank 0", None, None, None
        prompt, options = read_input(args)
    return json.loads(ranks.first_text(json.dumps(prompt))), options


def shared_journal(folder: Path, stages: int) -> Journal:
    """Returns the journal of a run that several ranks go on with. Rank 0 opens it."""
    from tokenswift_py.parallel.ranks import join

    return shared(join(stages), lambda: Journal.open(folder))


def read_prompt(args: argparse.Namespace) -> Prompt:
    if args.messages is not None:
        return read_messages(args.messages)
    if args.prompt is not None:
        text = typed(args, args.prompt)
    elif args.prompt_file is not None:
        text = read_text(args.prompt_file, "prompt_file")
    else:
        if sys.stdin.isatty():
            print("tokenswift: reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
        text = read_bytes(sys.stdin.buffer, "standard input")
    text = str(text).removeprefix(BOM)
    check(bool(text), "prompt", text, "it must not be empty")
    return text


def read_messages(path: Path) -> list[dict[str, Any]]:
    text = read_text(path, "messages").removeprefix(BOM)
    with one_line(f"messages: {path} is not JSON"):
        messages = json.loads(text)
    fine = isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    check(fine and len(messages) > 0, "messages", str(path), "a list of {role, content}")
    return list(messages)


def read_template(value: str) -> str:
    """Reads a chat template from a file, or from the command line itself: that has braces."""
    if "{" in value and not os.path.isfile(value):  # not Path.is_file, which fails with a name as long as a template
        return value
    return read_text(Path(value), "chat_template").removeprefix(BOM)


def read_template_args(items: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        check(bool(equals) and name.isidentifier(), "template_arg", item, "NAME=VALUE, like enable_thinking=false")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        check(name not in found or found[name] == value, "template_arg", item, f"{name} was given before")
        found[name] = value
    return found


def read_text(path: Path, field: str) -> str:
    with files(field, path, "a readable file is"), path.open("rb") as file:
        return read_bytes(file, field)


def read_bytes(file: BinaryIO, field: str) -> str:
    data = file.read(MOST_TEXT + 1)  # a device never ends
    check(len(data) <= MOST_TEXT, field, f"more than {MOST_TEXT} bytes", "less, which is already more than a context")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: byte {error.start} is not allowed; the text must be UTF-8") from error


def read_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of `Options` that the flags stand for."""
    options = {name: getattr(args, name) for name in SINGLE}
    options["stop"] = [typed(args, item) for item in args.stop]
    options["stop_tokens"] = [token_or_text(typed(args, item)) for item in args.stop_tokens]
    for item in args.stop:
        if not args.escape and unescaped(item) != item:
            logger.warning("stop: %s is taken as it is typed; with -e it is %s", shown(item), shown(unescaped(item)))
    options["chapters"] = read_chapters(args.chapters)
    options["json_schema"] = read_language("json_schema", args.json_schema)
    options["grammar"] = read_language("grammar", args.grammar)
    options["ban"] = None if args.ban is None else [token_or_text(typed(args, item)) for item in args.ban]
    options["ban_words"] = None if args.ban_words is None else [typed(args, item) for item in args.ban_words]
    options["logit_bias"] = read_biases(args.logit_bias)
    options["template_args"] = read_template_args(args.template_args)
    if args.system is not None:
        options["system"] = typed(args, args.system)
    if args.chat_template is not None:
        options["chat_template"] = read_template(args.chat_template)
    if args.dry_breakers is not None:
        options["dry_breakers"] = [typed(args, item) for item in args.dry_breakers]
    return options


def read_chapters(value: str | None) -> list[str]:
    if value is None:
        return []
    if value.isdecimal():
        count = int(value) if len(value) < 20 else MOST_CHAPTERS + 1
        check(1 <= count <= MOST_CHAPTERS, "chapters", value, f"between 1 and {MOST_CHAPTERS}, or a file")
        return [f"Continue. Write part {part}." for part in range(2, count + 2)]
    lines = [line.strip(" \t") for line in lines_of(read_text(Path(value), "chapters").removeprefix(BOM))]
    check(any(lines), "chapters", value, "a file with a request on each line, or a number")
    return [line for line in lines if line]


def read_language(name: str, value: str | None) -> str | None:
    """Reads a schema or a grammar, or the file that holds it. A word that looks like neither must be a file's name."""
    if value is None or ("{" in value if name == "json_schema" else "\n" in value or "start:" in value):
        return value
    return read_text(Path(value), name).removeprefix(BOM)


def token_or_text(item: str) -> int | str:
    """Returns a number as a token's id, and any other word unchanged."""
    return int(item) if item.isdecimal() and len(item) < 20 else item


def typed(args: argparse.Namespace, text: str) -> str:
    """Returns a text of the command line, with its escapes replaced under -e."""
    return unescaped(text) if args.escape else text


def read_biases(items: Sequence[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for token, bias in map(read_bias, items):
        earlier = biases.setdefault(token, bias)
        same = earlier == bias or bias != bias  # NaN is refused elsewhere
        check(same, "logit_bias", f"{token}={bias}", f"it was given as {token}={earlier} before")
    return biases


def read_bias(item: str) -> tuple[int, float]:
    token, _, bias = item.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise UserError(f"logit_bias: {shown(item)} is not allowed; ID=BIAS is, like 42=-1.5") from error


def check_trace(path: str | None) -> None:
    """Refuses a trace that rank 0, which writes it, could not begin."""
    if path is not None and not follows():
        check_new("trace", path)


def check_out(folder: Path | None) -> None:
    """Refuses an output folder that holds anything or cannot be written. None is left behind, because much else may be
    refused yet."""
    if folder is None:
        return
    with files("out", folder, "a writable folder is"):
        check(not folder.exists() or folder.is_dir(), "out", str(folder), "a new or empty folder")
        empty = not folder.is_dir() or not any(folder.iterdir())
        check(empty, "out", str(folder), "it must be empty; nothing is overwritten")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".tokenswift"
        probe.touch()
        probe.unlink()
        for path in made:
            with suppress(OSError):  # new/../run is made of more than it names
                path.rmdir()


def origin_of(record: Record, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained`: the recorded ones, replaced by those that were given. Another engine
    goes without the settings that are the recorded one's own."""
    given = {name: getattr(args, name, None) for name in ("model", "engine", "dtype", "attention", "device")}
    given = {name: value for name, value in given.items() if value is not None}
    recorded = recorded_origin(record, given.get("model"))
    if {"engine", "dtype", "attention", "device"} & given.keys():
        recorded |= {"kv_dtype": None, "attention": "auto", "deterministic": "auto"}
    return {**recorded, **given}


def recorded_origin(record: Record, model: str | None = None) -> dict[str, Any]:
    """Returns the recorded arguments of `from_pretrained`. The products are those that the contract names, whatever
    `auto` would choose now.

    model: the model where it is named anew. The revision is that of the recorded one, and of a hub's only: earlier
           versions recorded it of any.
    """
    from tokenswift_py.checkpoints.finding import HUB_ID  # imports that only resumed runs need

    products = recorded_products(record.header["numerics"])
    found = {**record.header["origin"], **({"deterministic": products} if products else {})}
    asked = found.get("model") if model is None else model
    if (
        asked != found.get("model")
        or not HUB_ID.fullmatch(str(asked))
        or os.path.exists(os.path.expanduser(str(asked)))
    ):
        found["revision"] = None
    return found


def recorded_products(numerics: str) -> str | None:
    """Returns the value of `deterministic` that takes the products which a numerics contract names; None where it names
    none, because its kernels leave no choice."""
    found = re.search(r"/kernels-[0-9a-f]{8}(?:/(fixed-tiles|blocks-\d+-[0-9a-f]{8}))?(?=/|$)", numerics)
    return found and {"f": "on", "b": "blocks", "": "off"}[(found[1] or "")[:1]]
