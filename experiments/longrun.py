"""Writes one very long text, and compares its time with that of plain decoding over the same contexts.

    python experiments/longrun.py --tokens 100000 --out runs/100k

The run is an ordinary one with a journal. If it is interrupted, the same command goes on with it. At SPOTS places it
pauses, and a fork of its cache goes on by plain decoding for a window of tokens. These tokens are compared one by one
with those that the run then writes there. Their milliseconds are fitted as a + b context, and the fit is summed over
the contexts of the whole run. The sum is the time that plain decoding would have taken. Both are measured in the same
minutes of the same process. On a machine that others need in between, `--pause FILE` keeps the run waiting between two
marks, outside all times, for as long as the file is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from results import ROOT, add_line, need_pictures, read_journal, save_picture, start
from tokenswift_py import TokenSwift
from tokenswift_py.decoding.statistics import memory_bandwidth
from tokenswift_py.errors import check
from tokenswift_py.quality import decoder, text_tokens, window_quality
from tokenswift_py.runs.assembly import decode_loop
from tokenswift_py.runs.folder import save_report, save_text, save_tokens
from tokenswift_py.runs.journal import read
from tokenswift_py.runs.report import rounded, text_figures
from tokenswift_py.runs.stream import Stream
from workloads import WORKLOADS, free_run, held_to_grammar

Record = dict[str, Any]


class Log:
    """Lines of JSON in the run's folder, which outlive the process: spots, and marks of the text's progress."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[Record] = list(read_journal(path))

    def append(self, record: Record) -> None:
        add_line(self.path, record)
        self.lines.append(record)

    def kind(self, kind: str) -> list[Record]:
        return [line for line in self.lines if line["kind"] == kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="story", choices=WORKLOADS)
    parser.add_argument("--grammar", action="store_true", help="hold each answer to the workload's grammar")
    parser.add_argument("--tokens", type=int, default=100_000, help="new tokens that the model chooses")
    parser.add_argument("--context", type=int, default=0, help="default: what the run needs")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--dtype", default="bf16", help="of the weights")
    parser.add_argument("--kv-dtype")
    parser.add_argument("--spots", type=int, default=10)
    parser.add_argument("--window", type=int, default=200, help="tokens of plain decoding at each spot")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="the run's own folder")
    parser.add_argument("--pause", type=Path, metavar="FILE", help="wait between marks while this file is there")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR",
                        help="gets a folder of the same name: report, picture, sample")  # fmt: skip
    args = parser.parse_args()
    need_pictures()
    swift = TokenSwift.from_pretrained(args.model, threads=args.threads, dtype=args.dtype, kv_dtype=args.kv_dtype)
    stream = begin(swift, args)
    log = Log(args.out / "longrun.jsonl")
    with stream:
        stream.catch_up()
        write(swift, stream, log, args)
        figures = summary(swift, stream, log)
    if stream.stats.step_tokens or not (args.out / "report.json").exists():  # or else the run is finished
        result = stream.result()
        save_text(args.out, result.text)
        save_tokens(args.out, result.tokens)
        save_report(args.out, {**result.report, "window_perplexity": figures["window_perplexity"]})
    (args.out / "longrun.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    keep(args.out, args.results / args.out.name, figures)
    print(json.dumps({key: value for key, value in figures.items() if key != "marks"}, indent=1))


def keep(run: Path, folder: Path, figures: Record) -> None:
    """Copies the parts of a finished run that are shown. `make report` reads every folder of this kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "longrun.json"):
        shutil.copyfile(run / name, folder / name)
    text = (run / "text.txt").read_bytes().decode()  # keeps line ends, unlike read_text
    places = [i * len(text) // EXCERPTS for i in range(EXCERPTS)]
    marks = [f"[... from character {place} of {len(text)} on]\n" if place else "" for place in places]
    parts = [mark + text[place : place + EXCERPT] for mark, place in zip(marks, places, strict=True)]
    (folder / "sample.txt").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    save_picture(folder / "speed.png", lambda figure: draw(figure.subplots(), figures))


def draw(panel: Any, figures: Record) -> None:
    """Draws milliseconds a token against the tokens before it, for the run and for plain decoding at the spots."""
    marks = figures["marks"]
    per_token = [mark["wall_ms"] / (mark["to"] - mark["from"]) for mark in marks]
    panel.plot([mark["context"] for mark in marks], per_token, linewidth=1, label="this run, forced turns included")
    spots = figures["spots"]
    panel.plot([s["context"] for s in spots], [s["median_ms"] for s in spots], "o", label="plain decoding, median")
    limit = [s["median_ms"] * s["share_of_memory_limit"] for s in spots]
    panel.plot([s["context"] for s in spots], limit, ":", color="gray", label="what a plain read of its bytes takes")
    panel.set_xlabel("tokens before")
    panel.set_ylabel("milliseconds a token")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8)


def begin(swift: TokenSwift, args: argparse.Namespace) -> Stream:
    """Begins the run, or resumes it from its journal."""
    workload = free_run(args.workload)
    settings = held_to_grammar(workload) if args.grammar else workload.settings
    settings = {**settings, "chapters": workload.chapters, "max_new_tokens": args.tokens, "seed": args.seed,
                "on_loop": "warn", **({"context": args.context} if args.context else {})}  # fmt: skip
    if (args.out / "journal.bin").exists():
        tokens = read(args.out).max_new_tokens
        check(tokens == settings.pop("max_new_tokens"), "tokens", args.tokens, f"the run in {args.out} has {tokens}")
        return swift.resume(args.out, drafter=args.drafter, **settings)  # refuses what is not as it was
    return swift.stream(workload.prompt, out=args.out, drafter=args.drafter, **settings)


def write(swift: TokenSwift, stream: Stream, log: Log, args: argparse.Namespace) -> None:
    """Lets the run write to its end, with a pause at each spot that is still ahead."""
    first = args.tokens // (2 * args.spots)
    left = [first + i * args.tokens // args.spots for i in range(args.spots)]
    left = [spot for spot in left if spot > stream.stats.new_tokens]
    before, at, clock = dict(stream.stats.phase_ms), stream.stats.new_tokens, time.perf_counter()
    for _ in stream:
        new = stream.stats.new_tokens
        due = stream.ending != "interrupted" or new >= at + MARK or (left and new >= left[0])
        if due and new > at:
            phases = {name: ms - before.get(name, 0.0) for name, ms in stream.stats.phase_ms.items()}
            before, wall = dict(stream.stats.phase_ms), 1e3 * (time.perf_counter() - clock)
            log.append(
                {"kind": "mark", "from": at, "to": new, "context": stream.loop.cache.length, "wall_ms": rounded(wall),
                 "passes": stream.stats.num_spec_steps, **{name: rounded(ms) for name, ms in phases.items()}}
            )  # fmt: skip
            print(json.dumps(log.lines[-1]), flush=True)
            at = new
            if left and new >= left[0]:
                left.pop(0)
                log.append(spot(swift, stream, args.window))
                print(json.dumps({k: v for k, v in log.lines[-1].items() if k not in ("tokens", "ms")}), flush=True)
            while args.pause and args.pause.exists():
                time.sleep(0.2)
            clock = time.perf_counter()


def spot(swift: TokenSwift, stream: Stream, window: int) -> Record:
    """Decodes plainly from here on, on a fork of the run's cache. Returns the tokens and their milliseconds."""
    run = replace(stream.run, options=replace(stream.run.options, drafter="none", on_loop="ignore", trace=None))
    bandwidth = memory_bandwidth(threads=swift.executor.threads)
    plain = decode_loop(swift, run, cache=stream.loop.cache.fork())
    last = list(plain.replay(run.prompt, stream.tokens))[-1]
    steps = plain.run(run.prompt, last)
    tokens: list[int] = []
    times: list[float] = []
    clock = time.perf_counter()
    for step in islice(steps, window):
        ms, clock = 1e3 * (time.perf_counter() - clock), time.perf_counter()
        tokens += (*step.forced, *step.tokens)
        if not step.forced:
            times.append(round(ms, 3))
    steps.close()  # type: ignore[attr-defined]
    context = stream.loop.cache.length
    median = statistics.median(times)
    share = 1e3 * swift.step_bytes(context + window / 2) / bandwidth / median
    return {
        "kind": "spot", "behind": len(stream.tokens), "new": stream.stats.new_tokens, "context": context,
        "tokens": tokens, "ms": times, "median_ms": round(median, 3), "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "share_of_memory_limit": round(share, 3),
    }  # fmt: skip


def summary(swift: TokenSwift, stream: Stream, log: Log) -> Record:
    spots, marks = log.kind("spot"), log.kind("mark")
    fit = np.polyfit([s["context"] + len(s["ms"]) / 2 for s in spots], [s["median_ms"] for s in spots], 1)
    start = len(stream.run.prompt)
    forced = np.zeros(len(stream.tokens), np.bool_)
    for first, stop in stream.forced:
        forced[first:stop] = True
    # A run that was killed has tokens that no mark tells the time of, or that two do.
    tokens_ms = np.polyval(fit, start + np.flatnonzero(~forced))
    plain = float(sum(tokens_ms[mark["from"] : mark["to"]].sum() for mark in marks))
    turns = sum(mark.get("prefill", 0.0) for mark in marks)
    decode = sum(mark[phase] for mark in marks for phase in PHASES)
    wall = sum(mark["wall_ms"] for mark in marks)
    chosen = stream.result().chosen
    quality = window_quality(text_tokens(swift.tokenizer, chosen), decoder(swift.tokenizer))
    return {
        "new_tokens": stream.stats.new_tokens,
        "timed_tokens": sum(mark["to"] - mark["from"] for mark in marks),
        "forced_tokens": int(forced.sum()),
        "context": stream.run.context,
        "wall_minutes": round(wall / 6e4, 2),
        "plain_minutes": round((plain + turns) / 6e4, 2),
        "plain_is": "median milliseconds of a token at the spots, as a + b context, over the contexts of every timed"
        " token, and this run's own time for the forced turns",
        "speedup": round((plain + turns) / wall, 3),
        "decode_speedup": round(plain / decode, 3),
        "phase_minutes": {name: round(sum(m.get(name, 0.0) for m in marks) / 6e4, 2) for name in (*PHASES, "prefill")},
        "spots_identical": [same(stream.tokens, s) for s in spots],
        "spots": [
            {**{k: v for k, v in s.items() if k not in ("kind", "tokens", "ms")}, "speedup": nearby(s, marks)}
            for s in spots
        ],
        "marks": marks,
        **text_figures(chosen),
        **{key: round(value, 3) for key, value in quality.summary().items()},
        "window_perplexity": swift.window_perplexity(chosen).summary(),
        "answers": len(told := answers(swift, stream)),
        "answers_in_json": sum(map(is_object, told)),
        "answers_with_json": sum(map(has_object, told)),
        "guarantee": stream.guarantee,
        "numerics": stream.numerics,
    }


def answers(swift: TokenSwift, stream: Stream) -> list[str]:
    """Returns the model's answer to each request, without the last one, which the end of the run cuts."""
    starts = [0, *(stop for _, stop in stream.forced)]
    stops = [start for start, _ in stream.forced]
    return [
        str(swift.tokenizer.decode(stream.tokens[start:stop], skip_special_tokens=True))
        for start, stop in zip(starts, stops, strict=False)
    ]


def is_object(answer: str) -> bool:
    """Returns whether an answer is one JSON object and nothing else, in a code fence or not."""
    inside = answer.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        return isinstance(json.loads(inside), dict)
    except ValueError:
        return False


def has_object(answer: str) -> bool:
    """Returns whether the first brace of an answer begins a JSON object, which the workload `records` asks for.

    Words before and after it ("Here is the record:") are allowed.
    """
    try:
        json.JSONDecoder().raw_decode(answer, answer.index("{"))
    except ValueError:
        return False
    return True


def nearby(spot: Record, marks: Sequence[Record]) -> float:
    """Returns plain decoding's milliseconds a token at a spot, divided by the run's own.

    The run's are those of the NEARBY tokens around, without forced turns.
    """
    here = [m for m in marks if abs((m["from"] + m["to"]) / 2 - spot["new"]) <= NEARBY / 2]
    ms = sum(mark[phase] for mark in here for phase in PHASES) / sum(m["to"] - m["from"] for m in here)
    return rounded(spot["median_ms"] / ms)


def same(tokens: Sequence[int], spot: Record) -> bool:
    """Returns whether the run wrote the same tokens as plain decoding from the spot on."""
    there = tokens[spot["behind"] :][: len(spot["tokens"])]
    return len(there) > 0 and list(there) == spot["tokens"][: len(there)]


MARK = 1000  # the number of new tokens between marks
NEARBY = 5000  # the number of tokens around a spot
EXCERPTS, EXCERPT = 10, 1000  # one excerpt from each tenth of the text, and its characters (about ten lines)
PHASES = ("draft", "verify", "accept", "commit", "learn")

if __name__ == "__main__":
    start(main)
