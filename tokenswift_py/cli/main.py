"""The command line: long-form text on standard output, progress and the report's summary on standard error."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from tqdm import tqdm

from tokenswift_py import __version__
from tokenswift_py.cli import quality as quality_command
from tokenswift_py.cli import train_heads
from tokenswift_py.cli.arguments import Parser, lines_of, named_path, number, unescaped, whole
from tokenswift_py.errors import UserError, check, check_new, files, shown
from tokenswift_py.options import Options, world_size
from tokenswift_py.runs import audit
from tokenswift_py.runs.journal import Journal, JournalError, shared

if TYPE_CHECKING:
    from tokenswift_py.api import Stream, TokenSwift

logger = logging.getLogger("tokenswift")

INTERRUPTED = 130
MOST_CHAPTERS = 10_000  # that are asked for by number
MOST_TEXT = 64 * 2**20  # bytes of a prompt or of chapters: far more than any context holds
BOM = "\ufeff"  # at the start of a file it says how the file is written, and is no text
COMMANDS = {"audit": audit.main, "quality": quality_command.main, "train-heads": train_heads.main}

OPTION_HELP: dict[str, tuple[str, Callable[[str], Any] | None, str]] = {
    "max_new_tokens": ("text", whole, "tokens to write at the most"),
    "min_new_tokens": ("text", whole, "nothing ends the text before so many"),
    "min_chapter_tokens": ("text", whole, "nor a chapter before it has so many"),
    "ignore_eos": ("text", None, "an end-of-sequence token does not end the text"),
    "on_loop": ("text", str, "warn, stop or ignore, where the text says one block of tokens over and over"),
    "raw": ("text", None, "no chat template: the prompt is the beginning of the text"),
    "context": ("model", whole, "positions the run is made for (default: what it needs)"),
    "positions": (
        "model",
        str,
        "auto, trained, linear, ntk, yarn, self-extend or log-extend: how positions beyond the trained ones are met",
    ),
    "positions_window": (
        "model",
        whole,
        "of an extension: nearer than this, distances stay true (default: a quarter of the trained length)",
    ),
    "positions_block": (
        "model",
        whole,
        "of an extension: positions that are moved together, 64 to 1024 (default: an eighth of it, at most 1024)",
    ),
    "temperature": ("sampling", number, "0 is greedy (default: the checkpoint's, else 0)"),
    "top_k": ("sampling", whole, "keep the k best tokens; 0 is off (default: the checkpoint's)"),
    "top_p": ("sampling", number, "keep the best tokens of this much mass; 1 is off (default: the checkpoint's)"),
    "min_p": ("sampling", number, "keep tokens this probable beside the best; 0 is off (default: the checkpoint's)"),
    "penalty": ("sampling", number, "contextual penalty; 1 is off (default: the checkpoint's)"),
    "penalty_window": ("sampling", whole, "of the latest tokens (default: 1024; with the checkpoint's penalty: all)"),
    "dry_multiplier": ("sampling", number, "DRY repetition penalty; 0 is off"),
    "dry_base": ("sampling", number, "its growth per repeated token"),
    "dry_length": ("sampling", whole, "longest repeat that goes unpunished"),
    "seed": ("sampling", whole, "of the noise (default: random, and recorded)"),
    "drafter": ("drafting", str, "auto (cascade), none, ngram, partial, heads, cascade or draft_model"),
    "draft_tokens": ("drafting", whole, "draft so many in every tree (default: what pays)"),
    "draft_policy": ("drafting", str, "whose pages a partial cache has: h2o, importance, mass, quest, recent, snapkv"),
    "draft_budget": ("drafting", whole, "tokens of the cache that it sees (default: what pays; of a draft model: all)"),
    "draft_weights": ("drafting", str, "bf16 or int8, of a partial cache's or a draft model's; auto is int8 on native"),
    "draft_kv": ("drafting", str, "own or int8, of the keys and values in a partial cache; auto is int8 on native"),
    "draft_model": ("drafting", str, "a smaller model with the same vocabulary, which then drafts under auto too"),
    "draft_heads": (
        "drafting",
        str,
        "a file or folder of draft heads, or auto: those made for the model (default for drafter heads)",
    ),
    "trace": ("output", str, "a file that gets a JSON line for every round"),
    "kv_budget": ("lossy", whole, "tokens the target keeps of its cache; the text is no longer the full cache's"),
    "kv_policy": ("lossy", str, "by whose scores pages are evicted from it, as --draft-policy (default: recent)"),
}


def parser(resumes: bool = False) -> argparse.ArgumentParser:
    """Every flag. Those of `Options` take their defaults from it. resumes: of `tokenswift resume DIR`."""
    root = Parser(
        prog="tokenswift resume" if resumes else "tokenswift",
        description="Go on with the run that was written to DIR. What the text depends on is as recorded."
        if resumes
        else "Long text from a language model, losslessly faster: the text goes to standard output. "
        "For example: tokenswift --prompt 'Write a story about a lighthouse.' --max-new-tokens 2000 --out runs/story",
        epilog="`tokenswift resume DIR`: as --resume DIR. `tokenswift audit --help`: prove that a recorded text is "
        "what plain decoding writes. `tokenswift quality --help`: how a recorded text reads, window by window. "
        "`tokenswift train-heads --help`: train draft heads on text that the model writes.",
    )
    root.stray = "--help lists the flags" if resumes else "the prompt goes behind --prompt, and --help lists the flags"
    root.add_argument("--version", action="version", version=f"tokenswift {__version__}")
    groups = {
        name: root.add_argument_group(name) for name in ("model", "text", "sampling", "drafting", "lossy", "output")
    }
    model, text, output = groups["model"], groups["text"], groups["output"]
    model.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder, a .gguf file or a hub id")
    model.add_argument("--revision", help="of a hub id")
    model.add_argument(
        "--dtype", default="bf16", help="of the weights: bf16, fp32, int8 or gguf (the blocks of a .gguf file)"
    )
    model.add_argument(
        "--kv-dtype", help="of the KV cache: bf16, fp32 or int8 (default: as the weights, bf16 beside int8 and gguf)"
    )
    model.add_argument("--engine", default="auto", help="auto, native (C++, CPU) or torch")
    model.add_argument("--attention", default="auto", help="auto, or a backend of kernels/ (torch engine)")
    model.add_argument("--deterministic", default="auto", help="on, off (cuBLAS) or auto: a row's bits are its own")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    model.add_argument("--threads", type=whole, help="CPU threads")
    source = text.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the prompt itself (default: standard input)")
    source.add_argument("--prompt-file", type=named_path, help="a UTF-8 file that holds the prompt")
    text.add_argument(
        "-e", "--escape", action="store_true",
        help=r"read \n, \t, \r, \\, \" and \xHH in --prompt, --stop, --stop-token, --ban and --dry-breakers as escapes",
    )  # fmt: skip
    text.add_argument("--chapters", metavar="FILE|N", help="follow-up requests: a line each, or N generic ones")
    text.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    text.add_argument(
        "--stop-token", dest="stop_tokens", action="append", default=[], metavar="TOKEN",
        help="end before this token: its id, or its text (repeatable)",
    )  # fmt: skip
    defaults = {f.name: f.default for f in fields(Options) if f.default is not MISSING}
    for name, (group, kind, explained) in OPTION_HELP.items():
        flag = f"--{name.replace('_', '-')}"
        default = defaults[name]
        if kind is None:
            groups[group].add_argument(flag, action="store_true", help=explained)
        else:
            shown = "" if default is None else f" (default: {default})"
            groups[group].add_argument(flag, type=kind, default=default, help=explained + shown)
    sampling = groups["sampling"]
    sampling.add_argument(
        "--dry-breakers", nargs="*", action="extend", metavar="TEXT", help="no repeat is counted across these"
    )
    sampling.add_argument(
        "--ban",
        nargs="*",
        action="extend",
        metavar="TOKEN",
        help="token ids or one-token texts (default: the checkpoint's)",
    )
    sampling.add_argument(
        "--logit-bias", nargs="*", action="extend", default=[], metavar="ID=BIAS", help="added to a token's logit"
    )
    output.add_argument("--out", type=named_path, metavar="DIR", help="journal, text and report go there; new or empty")
    output.add_argument(
        "resume" if resumes else "--resume", type=named_path, metavar="DIR", help="go on with the run in this folder"
    )
    output.add_argument("--extend", type=whole, default=0, metavar="N", help="with --resume: N tokens more")
    output.add_argument("--kv-snapshot", action="store_true", help="keep the KV cache in DIR too, for a quick resume")
    output.add_argument("--baseline", action="store_true", help="decode again without drafts and compare")
    output.add_argument("--quality", action="store_true", help="let the model read windows of the text: perplexity")
    output.add_argument("--quiet", action="store_true", help="no bar, no summary")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for wrong input, 130 after Ctrl-C.

    Of several processes that torchrun started only rank 0 prints, writes files and hears Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    open_standard_streams()
    if not follows():
        return run(given)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return run(given)


def open_standard_streams() -> None:
    """What was closed leads nowhere: else the next file to be opened, the journal, would be standard output.

    And characters that standard output's encoding lacks are no reason to stop; text.txt has them.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def follows() -> bool:
    """Whether this is one of torchrun's processes, and not rank 0."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def run(given: Sequence[str]) -> int:
    command = COMMANDS.get(given[0]) if given else None
    resumes = given[:1] == ["resume"]
    given = given[1:] if command or resumes else given
    root = parser(resumes)
    try:
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
        # Whoever read our output has gone; what else is buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk that is full
        print(f"tokenswift: {error.strerror}: {error.filename or 'no file could be written'}", file=sys.stderr)
        return 1


def write(args: argparse.Namespace, lines: LogLines) -> int:
    """Check, load, write, compare, report."""
    prompt, options = read_input(args) if world_size() == 1 else shared_input(args)
    nowhere = args.kv_snapshot and args.out is None and world_size() == 1
    check(not nowhere, "kv_snapshot", True, "only with out or resume")
    check(args.extend == 0, "extend", args.extend, "only with resume")

    # Here, because torch and transformers take seconds to import.
    from tokenswift_py.api import TokenSwift

    swift = TokenSwift.from_pretrained(
        args.model, revision=args.revision, dtype=args.dtype, kv_dtype=args.kv_dtype, engine=args.engine,
        attention=args.attention, device=args.device, threads=args.threads,
        deterministic=args.deterministic,
    )  # fmt: skip
    stream = swift.stream(prompt, out=args.out, kv_snapshot=args.kv_snapshot, **options)
    return write_out(args, swift, stream, args.out, lines)


def resume(args: argparse.Namespace, given: dict[str, Any], lines: LogLines) -> int:
    """Go on with a recorded run. given: the flags that were given; the others are as recorded."""
    for name in ("prompt", "prompt_file", "out", "baseline"):
        check(name not in given, name, given.get(name), "not with resume")
    check(args.extend >= 0, "extend", args.extend, "at least 0")
    check_trace(args.trace)
    journal = Journal.open(args.resume) if world_size() == 1 else shared_journal(args.resume)
    record = journal.record
    if record.torn:
        note(args, f"{record.torn} bytes behind token {len(record.tokens)} are torn and were cut off")
    note(args, f"{len(record.tokens)} tokens are recorded")

    from tokenswift_py.api import TokenSwift
    from tokenswift_py.runs.progress import work_bar

    origin = {name: given.get(name, value) for name, value in record.header["origin"].items()}
    swift = TokenSwift.from_pretrained(**origin, threads=args.threads)
    settings = {name: value for name, value in read_options(args).items() if name in given}
    stream = swift.resume(journal, args.extend, args.kv_snapshot, **settings)
    finished = stream.ending != "interrupted" and (args.resume / "report.json").is_file()
    folder = args.resume if swift.executor.ranks.leads else None
    if swift.executor.ranks.first(np.array([finished])).item():
        note(args, f"the run is finished, ended by: {stream.ending}")
        with stream:
            restored = restore(folder, stream) if folder else []
        if restored:
            note(args, f"written again: {', '.join(restored)}")
        if args.quality:
            note(args, f"`tokenswift quality {args.resume} --write` reads it")
        return 0
    rows = len(stream.run.prompt) + len(stream.tokens)
    with work_bar("reading them again", swift.checkpoint.spec, rows, no_bar(args)) as progress:
        stream.catch_up(progress)
    for name in ("tokens.npy", "report.json") if folder else ():  # of an earlier session; written again at the end
        (args.resume / name).unlink(missing_ok=True)
    return write_out(args, swift, stream, folder, lines)


def given_options(root: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """What the command line says itself, without defaults."""
    nothing = argparse.Namespace(**{action.dest: None for action in root._actions})
    given = vars(root.parse_args(arguments, nothing))
    return {name: value for name, value in given.items() if value is not None}


def write_out(args: argparse.Namespace, swift: TokenSwift, stream: Stream, folder: Path | None, lines: LogLines) -> int:
    """Write, compare, report. folder: what gets the files."""
    from tokenswift_py.runs.report import summary

    interrupted = False
    failures: list[Exception] = []
    with Output(args, stream, folder, lines) as output:
        try:
            with CtrlC() as ctrl_c:
                for piece in stream:
                    ctrl_c.hold()
                    output.write(piece.text, len(piece.tokens), stream.stats.to_dict()["mean_acceptance_length"])
                    if ctrl_c.pressed:
                        interrupted = True
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
        if failures:
            raise failures[0]
        output.end(result.text)
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
    return INTERRUPTED if interrupted else 0


def attempted(step: Callable[..., object], *arguments: object) -> list[Exception]:
    """What the step has failed with, if it has: the steps behind it are no worse for that."""
    try:
        step(*arguments)
    except (OSError, JournalError) as error:
        return [error]
    return []


class CtrlC:
    """From `hold` on, Ctrl-C is a question that the loop asks between two pieces: in the middle of one, the engine has
    counted tokens that the text has not. Before that (a long prompt is being read), and the second time, it interrupts
    at once, as it does anywhere else.
    """

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> CtrlC:
        return self

    def hold(self) -> None:
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        main = threading.current_thread() is threading.main_thread()  # where alone Python lets signals be handled
        if usual and main and not self.pressed:
            signal.signal(signal.SIGINT, self._press)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *raised: object) -> None:
        if signal.getsignal(signal.SIGINT) == self._press:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class LogLines(logging.Handler):
    """The log on standard error, by way of what else writes to the terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.show: Callable[[str], None] = show_plainly

    def emit(self, record: logging.LogRecord) -> None:
        self.show(self.format(record))


def show_plainly(line: str) -> None:
    print(line, file=sys.stderr)


class BottomLine:
    """The last line of a terminal, kept for the bar while text scrolls above it (the scrolling region of VT100).

    A bar drawn below the text in the usual way would overwrite the line that is being written.
    """

    def __init__(self) -> None:
        self._size = shutil.get_terminal_size()
        # A line of room, then everything but the last line scrolls; setting the region moves the cursor.
        self._send(f"\n\x1b7\x1b[1;{self._size.lines - 1}r\x1b8\x1b[1A")

    def draw(self, bar: tqdm[Any]) -> None:
        bar.ncols = self._size.columns - 1
        self._send(f"\x1b7\x1b[{self._size.lines};1H\x1b[2K{bar}\x1b8")

    def close(self) -> None:
        self._send(f"\x1b7\x1b[r\x1b[{self._size.lines};1H\x1b[2K\x1b8")

    def _send(self, text: str) -> None:
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()


class Output:
    """Where the text goes while it is written: standard output, text.txt, and a bar on a terminal's standard error."""

    def __init__(self, args: argparse.Namespace, stream: Stream, folder: Path | None, lines: LogLines):
        self.written = self._saved = len(stream.text)  # of a resumed text only what is new is shown
        self._lines = lines
        self._mid_line = False
        self._file = None
        if folder:
            mode = "w" if args.resume else "x"
            self._file = (folder / "text.txt").open(mode, encoding="utf-8", newline="")
            self._file.write(stream.text)
        self._bottom = None if no_bar(args) or not sys.stdout.isatty() else BottomLine()
        self._bar = tqdm(
            initial=stream.stats.new_tokens, total=stream.run.options.max_new_tokens, unit="tok", disable=no_bar(args),
            file=sys.stderr if self._bottom is None else io.StringIO(), dynamic_ncols=self._bottom is None,
        )  # fmt: skip

    def __enter__(self) -> Output:
        self._lines.show = self.log
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lines.show = show_plainly
        if self._bottom:
            self._bottom.close()
        self._bar.close()
        if self._file:
            with suppress(*([OSError] if kind else [])):  # what went wrong first is told
                self._file.close()

    def write(self, text: str, tokens: int, per_pass: float | None) -> None:
        if text:
            if self._file:
                self._saved += len(text)  # also where the disk is full: the file keeps what it could not write yet
                self._file.write(text)
                self._file.flush()
            self.written += len(text)
            self._mid_line = not text.endswith("\n")
            sys.stdout.write(text)
            sys.stdout.flush()
        if per_pass is not None:
            self._bar.set_postfix_str(f"{per_pass:.2f} tok/pass", refresh=False)
        if self._bar.update(tokens) and self._bottom:  # true where tqdm finds it time to draw
            self._bottom.draw(self._bar)

    def log(self, line: str) -> None:
        """A line of the log, on a line of its own; a bar on standard error is drawn again below it."""
        sys.stdout.flush()
        tqdm.write(f"\n{line}" if self._bottom and self._mid_line else line, file=sys.stderr)
        self._mid_line = False

    def save_rest(self, text: str) -> None:
        """What an interruption kept from text.txt, or all of it where someone removed the file."""
        if self._file:
            rest, self._saved = text[self._saved :], len(text)
            self._file.write(rest)
            self._file.flush()
            if not Path(self._file.name).exists():
                Path(self._file.name).write_bytes(text.encode())

    def end(self, text: str) -> None:
        """What an interruption kept from standard output, and the end of the last line."""
        sys.stdout.write(text[self.written :])
        if sys.stdout.isatty() or not text.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()


def no_bar(args: argparse.Namespace) -> bool:
    return bool(args.quiet) or not sys.stderr.isatty()


def read_input(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The prompt and the options. Everything that needs no model is refused before one is loaded."""
    prompt, options = read_prompt(args), read_options(args)
    Options.of(**options)
    check_trace(args.trace)
    check_out(args.out)
    return prompt, options


def shared_input(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The same where several ranks share the model: rank 0 reads the prompt for all, and writes all files."""
    from tokenswift_py.models.ranks import join

    ranks = join()
    with ranks.same_fate():
        if not ranks.leads:
            args.prompt, args.prompt_file, args.out = "of rank 0", None, None
        prompt, options = read_input(args)
    return ranks.first_text(prompt), options


def shared_journal(folder: Path) -> Journal:
    """The journal of a run that several ranks go on with: rank 0 opens it."""
    from tokenswift_py.models.ranks import join

    return shared(join(), lambda: Journal.open(folder))


def read_prompt(args: argparse.Namespace) -> str:
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
    """The keyword arguments of `Options` that the flags stand for."""
    options = {name: getattr(args, name) for name in OPTION_HELP}
    options["stop"] = [typed(args, item) for item in args.stop]
    options["stop_tokens"] = [token_or_text(typed(args, item)) for item in args.stop_tokens]
    for item in args.stop:
        if not args.escape and unescaped(item) != item:
            logger.warning("stop: %s is taken as it is typed; with -e it is %s", shown(item), shown(unescaped(item)))
    options["chapters"] = read_chapters(args.chapters)
    options["ban"] = None if args.ban is None else [token_or_text(typed(args, item)) for item in args.ban]
    options["logit_bias"] = read_biases(args.logit_bias)
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


def token_or_text(item: str) -> int | str:
    """A number is a token's id."""
    return int(item) if item.isdecimal() and len(item) < 20 else item


def typed(args: argparse.Namespace, text: str) -> str:
    """A text of the command line, its escapes told apart with -e."""
    return unescaped(text) if args.escape else text


def read_biases(items: Sequence[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for token, bias in map(read_bias, items):
        earlier = biases.setdefault(token, bias)
        same = earlier == bias or bias != bias  # which is refused for itself
        check(same, "logit_bias", f"{token}={bias}", f"it was given as {token}={earlier} before")
    return biases


def read_bias(item: str) -> tuple[int, float]:
    token, _, bias = item.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise UserError(f"logit_bias: {shown(item)} is not allowed; ID=BIAS is, like 42=-1.5") from error


def check_trace(path: str | None) -> None:
    """Refuse a trace that rank 0, which writes it, could not begin."""
    if path is not None and not follows():
        check_new("trace", path)


def check_out(folder: Path | None) -> None:
    """Refuse an output folder that holds anything or cannot be written. None is left: much else may be refused yet."""
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


def save_tokens(folder: Path, tokens: Sequence[int]) -> None:
    data = io.BytesIO()
    np.save(data, np.array(tokens, np.int32), allow_pickle=False)
    put(folder / "tokens.npy", data.getvalue())


def restore(folder: Path, stream: Stream) -> list[str]:
    """Write what a finished run's folder lacks of the files that its journal says; their names."""
    result = stream.result()
    missing = [name for name in ("text.txt", "tokens.npy") if not (folder / name).exists()]
    if "text.txt" in missing:
        (folder / "text.txt").write_bytes(result.text.encode())
    if "tokens.npy" in missing:
        save_tokens(folder, result.tokens)
    return missing


def save_report(folder: Path, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    put(folder / "report.json", text.encode("utf-8", "backslashreplace"))  # as JSON has what is not UTF-8, too


def put(path: Path, data: bytes) -> None:
    """Replace a file whole, so that no moment, and no full disk, leaves half of one."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise


def note(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"\n{text}", file=sys.stderr)
