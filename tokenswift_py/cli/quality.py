"""`tokenswift quality` measures how recorded texts read, window by window, beside texts that people wrote."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tokenswift_py.cli.arguments import Parser, named_path, whole
from tokenswift_py.cli.inputs import origin_of
from tokenswift_py.errors import check, check_new, files, new_file, one_line
from tokenswift_py.extending.human import EVERYWHERE
from tokenswift_py.parallel.processes import world_size
from tokenswift_py.runs import journal

if TYPE_CHECKING:
    from tokenswift_py.api import TokenSwift
    from tokenswift_py.runs.journal import Record

HUMAN_WINDOWS = 10  # the windows of each human text
FIRST_WORDS = 70  # the characters of a window that --per-window shows


def parser() -> argparse.ArgumentParser:
    root = Parser(
        prog="tokenswift quality",
        description="How a recorded text reads: the perplexity of its windows, each read on its own by the model that "
        "wrote it, or by another. Forced turns are left out. In the table: median / worst.",
    )
    root.add_argument("folders", nargs="*", type=named_path, metavar="DIR", help="what --out wrote")
    root.add_argument("--window", type=whole, help="tokens (default: 1000, or what the judge's trained positions hold)")
    root.add_argument("--judge", metavar="MODEL", help="reads the text, in its own tokens (default: who wrote it)")
    root.add_argument("--human", action="store_true", help="beside it: Python's documentation and standard library")
    root.add_argument("--text", action="append", default=[], type=named_path, metavar="FILE", help="a UTF-8 text, too")
    root.add_argument("--per-window", action="store_true", help="every window with its first words, the worst first")
    root.add_argument("--json", metavar="FILE|-", help="the figures as JSON, every window among them")
    root.add_argument("--write", action="store_true", help="put window_perplexity into each DIR's report.json")
    root.add_argument("--model", help="where the model that wrote lies now (default: as recorded)")
    root.add_argument("--dtype", help="of the judge's weights (default: as recorded; of another judge bf16)")
    root.add_argument("--engine", help="native or torch (default: as recorded)")
    root.add_argument("--device", help="auto, cpu, cuda, ... (default: as recorded)")
    root.add_argument("--threads", type=whole, help="CPU threads")
    root.add_argument("--quiet", action="store_true", help="no bar, no table")
    return root


@dataclass(frozen=True)
class Text:
    """A text to be read. tokens: tokens of `tokenizer`, which is the writer's; a human text's is the judge's own."""

    name: str
    tokens: list[int]
    tokenizer: Any
    folder: Path | None = None


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Raises UserError for wrong input."""
    args = parser().parse_args(arguments)
    check(world_size() == 1, "WORLD_SIZE", world_size(), "quality runs in one process")
    check(bool(args.folders or args.text or args.human), "DIR", None, "a run's folder, --text FILE or --human")
    if args.json and args.json != "-":
        check_new("json", args.json)
    for folder in args.folders if args.write else ():
        there = (folder / "report.json").is_file()
        check(there, "write", str(folder), "a finished run's folder, with a report.json")
    records = [journal.read(folder) for folder in args.folders]
    plain = {str(path): read_text(path) for path in args.text}
    found = []
    for text, judge in texts(args, records, plain):
        found.append(judged(text, judge, args))
        if args.write and text.folder:
            write(text.folder, found[-1])
    tell(found, args)
    return 0


def read_text(path: Path) -> str:
    with files("text", path, "a readable UTF-8 file is"):
        return path.read_text(encoding="utf-8")


class Judges:
    """The models that read: the one that was asked for, else the one that wrote. One is loaded at a time."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self._asked: dict[str, Any] | None = None
        self._loaded: TokenSwift | None = None

    def of(self, record: Record | None) -> TokenSwift:
        """Returns the judge of a text. record: record of its run; None is a text that no run wrote, which the last
        judge reads, too."""
        from tokenswift_py.api import TokenSwift  # imported here, because torch and transformers take seconds

        asked = self._origin(record)
        if self._loaded is None or (record is not None and asked != self._asked):
            self._loaded = None  # frees its weights first
            self._loaded, self._asked = TokenSwift.from_pretrained(**asked, threads=self.args.threads), asked
        return self._loaded

    def _origin(self, record: Record | None) -> dict[str, Any]:
        args = self.args
        if record is not None and not args.judge:
            return origin_of(record, args)
        asked = {"model": args.judge or args.model, "dtype": args.dtype, "engine": args.engine, "device": args.device}
        return {name: value for name, value in asked.items() if value is not None}


def texts(
    args: argparse.Namespace, records: Sequence[Record], plain: dict[str, str]
) -> Iterator[tuple[Text, TokenSwift]]:
    """Yields every text with its judge."""
    from tokenswift_py.text import token_ids

    judges = Judges(args)
    for folder, record in zip(args.folders, records, strict=True):
        judge = judges.of(record)
        tokenizer = writer(record, args) if args.judge else judge.tokenizer
        if not args.judge:
            check_writer(record, judge.checkpoint, weights=True)
        yield Text(str(folder), record.chosen_tokens, tokenizer, folder), judge
    judge = judges.of(None)
    for name, text in plain.items():
        yield Text(name, token_ids(judge.tokenizer, text), judge.tokenizer), judge
    for name in EVERYWHERE if args.human else ():
        yield human(name, judge, args.window), judge


def writer(record: Record, args: argparse.Namespace) -> Any:
    """Returns the tokenizer of the model that wrote, without its weights."""
    from tokenswift_py.checkpoints.loading import open_checkpoint

    asked = origin_of(record, args)
    checkpoint = open_checkpoint(asked["model"], asked["revision"], asked["dtype"])
    check_writer(record, checkpoint, weights=False)
    return checkpoint.tokenizer()


def human(name: str, judge: TokenSwift, window: int | None) -> Text:
    from tokenswift_py.extending.human import continuation
    from tokenswift_py.quality import window_size

    count = HUMAN_WINDOWS * window_size(judge, window)
    return Text(f"human: {name}", continuation(name, judge.tokenizer, count).tokens, judge.tokenizer)


def check_writer(record: Record, checkpoint: Any, weights: bool) -> None:
    """Raises UserError where the recorded token ids are not this checkpoint's. With `weights` it also does where
    another model would read them than the one that wrote them, because that is the purpose of --judge."""
    from tokenswift_py.runs import contract

    now = {**record.header, "tokenizer": contract.tokenizer_fingerprint(checkpoint)}
    if weights:
        now["model"] = contract.model_fingerprint(checkpoint)
    contract.check_same(record.header, now, numerics=False)


def judged(text: Text, judge: TokenSwift, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of a text: the report's `window_perplexity`, the measures that need no model, and
    `per_window`."""
    from tokenswift_py import quality
    from tokenswift_py.runs.report import rounded
    from tokenswift_py.text import token_ids

    decode = quality.decoder(text.tokenizer)
    tokens, size = quality.text_tokens(text.tokenizer, text.tokens), quality.window_size(judge, args.window)
    windows = quality.windows_of(tokens, size) if len(tokens) >= quality.LEAST else []
    read = windows
    if text.tokenizer is not judge.tokenizer:
        read = [token_ids(judge.tokenizer, decode(part)) for part in windows]
    hidden = args.quiet or not sys.stderr.isatty()
    with tqdm(total=len(windows), desc=text.name, unit="window", disable=hidden, delay=1, file=sys.stderr) as bar:
        readings = quality.read(judge, read, bar.update)
    perplexity = quality.WindowPerplexity(judge.checkpoint.name, size, readings)
    varied = quality.window_quality(tokens, decode, size) if windows else quality.WindowQuality((), (), ())
    per_window = [
        {
            "window": number, "perplexity": rounded(reading.perplexity),
            "bits_per_byte": rounded(reading.bits_per_byte), "distinct_4": rounded(varied.distinct_4[number]),
            "compression": rounded(varied.compression[number]), "looping": number in varied.looping,
            "first_words": decode(windows[number][:FIRST_WORDS])[:FIRST_WORDS],
        }
        for number, reading in enumerate(readings)
    ]  # fmt: skip
    figures = {name: rounded(value) for name, value in varied.summary().items()}
    read_by = {"window_perplexity": perplexity.summary()}
    return {"text": text.name, "tokens": len(tokens), **read_by, **figures, "per_window": per_window}


def write(folder: Path, found: dict[str, Any]) -> None:
    """Puts the figures into the run's report, where the run itself would have put them."""
    from tokenswift_py.runs.folder import save_report

    path = folder / "report.json"
    with one_line(f"write: {path} is no report"):
        report = dict(json.loads(path.read_text(encoding="utf-8")))
    save_report(folder, {**report, "window_perplexity": found["window_perplexity"]})


def tell(found: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    if args.json:
        text = json.dumps({"texts": found}, indent=2, allow_nan=False) + "\n"
        if args.json == "-":
            print(text, end="", flush=True)
            return
        with new_file("json", args.json) as file:
            file.write(text)
    if not args.quiet:
        print(table(found), flush=True)
        for one in found if args.per_window else ():
            print(f"\n{worst_first(one)}", flush=True)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Returns a line for each text, and the names of its judge."""
    heads = ["text", "windows", "perplexity", "bits/byte", "distinct-4", "compression", "loops", "judge"]
    lines = [heads]
    for one in found:
        read = one["window_perplexity"]
        pairs = [(read["median"], read["worst"]), (read["bits_per_byte_median"], read["bits_per_byte_worst"])]
        pairs += [(one[f"{name}_median"], one[f"{name}_worst"]) for name in ("distinct_4", "compression")]
        shown = [f"{short(median)} / {short(worst)}" for median, worst in pairs]
        windows = f"{read['windows']} of {read['window']}"
        lines.append([one["text"], windows, *shown, str(one["looping_windows"]), read["judge"]])
    return f"{aligned(lines)}\nMedian / worst of the windows, each read on its own."


def worst_first(one: dict[str, Any]) -> str:
    """Returns the windows of a text by their bits per byte."""
    ranked = sorted(one["per_window"], key=lambda w: w["bits_per_byte"] or math.inf, reverse=True)
    lines = [["window", "perplexity", "bits/byte", "distinct-4", "begins"]]
    for window in ranked:
        figures = (short(window[name]) for name in ("perplexity", "bits_per_byte", "distinct_4"))
        lines.append([str(window["window"]), *figures, repr(window["first_words"])])
    return f"{one['text']}\n{aligned(lines)}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def short(value: float | None) -> str:
    """Returns a number with three digits. A table of such figures says no more."""
    return "-" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
