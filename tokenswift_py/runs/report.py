"""report.json: a run's settings, its results and the evidence for its claims. docs/report.md has every field."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.statistics import GenerationStats, distinct_n, find_loop
from tokenswift_py.errors import UserError, check_new, new_file
from tokenswift_py.loaded import LoadedModel
from tokenswift_py.models.devices import dtype_name
from tokenswift_py.runs.plan import Run
from tokenswift_py.runs.result import Result
from tokenswift_py.version import __version__

logger = logging.getLogger("tokenswift")

SCHEMA = 1


def text_figures(tokens: Sequence[int]) -> dict[str, Any]:
    """Returns diversity and the loop verdict, which stand beside every speed-up (law 7). tokens: the model's own."""
    loop = find_loop(tokens)
    return {
        **{f"distinct_{n}": rounded(distinct_n(tokens, n)) for n in (1, 2, 3, 4)},
        "looping": loop is not None,
        "loop": None if loop is None else {"start": loop.start, "stop": loop.stop, "period": loop.period},
    }


def of_run(
    loaded: LoadedModel, run: Run, loop: DecodeLoop, result: Result, numerics: str, guarantee: str, recorded: int
) -> dict[str, Any]:
    """Returns the report of a text so far, before it is compared with plain decoding.

    recorded: tokens that a resumed run went on from.
    """
    eviction = loop.eviction
    return {
        "schema": SCHEMA,
        "version": __version__,
        "model": loaded.checkpoint.name,
        "dtype": loaded.executor.dtype,
        "kv_dtype": dtype_name(loaded.executor.kv_dtype),
        "prompt_sha256": hashlib.sha256(np.array(run.prompt, np.int32).tobytes()).hexdigest(),
        "parameters": run.parameters(),
        "seed": run.sampling.seed,
        "drafter": loop.drafter.name,
        "engine": loaded.executor.name,
        "numerics": numerics,
        "guarantee": guarantee,
        "lossy": eviction is not None,
        "eviction": eviction.figures() if eviction else None,
        "prompt_tokens": len(run.prompt),
        "resumed_behind": recorded or None,
        "ending": result.ending,
        "forced": [list(span) for span in result.forced],
        **run_figures(loop.stats),
        **NO_BASELINE,
        **text_figures(result.chosen),
        "loops": [asdict(found) for found in loop.stops.loops.loops],
        "window_perplexity": None,  # needs passes of its own: TokenSwift.window_perplexity
        "peak_memory_bytes": peak_memory(loaded.executor.device),
    }


class Trace:
    """A file of JSON lines, one for each round, made with the first. Raises UserError where it cannot be written.

    A later error (most often a full disk) ends only the trace, with a line to the log.
    """

    def __init__(self, path: str):
        check_new("trace", path)
        self._path, self._ended = path, False
        self._file: TextIO | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        if self._ended:
            return
        try:
            self._file = self._file or new_file("trace", self._path)
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except (OSError, UserError) as error:
            self._end(error)

    def close(self) -> None:
        try:
            if self._file is not None and not self._ended:
                self._file.close()
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError | UserError) -> None:
        self._ended = True
        why = error.strerror if isinstance(error, OSError) else str(error).removeprefix("trace: ")
        logger.warning("trace: %s: it ends here, the text goes on", why)
        if self._file is not None:
            with suppress(OSError):  # closing may fail as the write did
                self._file.close()


def run_figures(stats: GenerationStats) -> dict[str, Any]:
    return {
        "prefill_tokens": stats.prefill_tokens,
        "new_tokens": stats.new_tokens,
        "forced_tokens": stats.forced_tokens,
        "ms_per_token": rounded(stats.ms_per_token),
        "phase_ms": {phase: rounded(ms) for phase, ms in stats.phase_ms.items()},
        **{name: rounded(value) for name, value in stats.to_dict().items()},
    }


def baseline_figures(
    stats: GenerationStats,
    baseline: GenerationStats,
    tokens: Sequence[int],
    ar_tokens: Sequence[int],
    step_bytes: float,
    bandwidth: float,
) -> dict[str, Any]:
    """Compares the run with plain decoding of the same prompt, parameters and seed by the same engine.

    step_bytes: bytes of weights and KV that plain decoding must read for a token, on average over the run.
    bandwidth:  bytes per second that the machine reads.

    A pass over a tree costs no less than a pass over one row. So a speed-up above the tokens a pass brings is due to
    the machine (something else ran beside the baseline), and `timing_doubtful` says so.
    """
    divergence = first_divergence(tokens, ar_tokens)
    ar_ms, ms = baseline.ms_per_token, stats.ms_per_token
    speedup = ar_ms / ms if ar_ms and ms else None  # a coarse clock may show no time between two tokens
    passes = stats.to_dict()["mean_acceptance_length"]
    share = step_bytes / bandwidth / (ar_ms / 1e3) if ar_ms else None
    return {
        "baseline": {
            "what": "plain autoregressive decoding by the same engine, prompt, parameters and seed",
            "memory_bandwidth_gb_s": rounded(bandwidth / 1e9),
            "bytes_per_token": round(step_bytes),
            "share_of_memory_limit": rounded(share),
        },
        "identical": divergence is None,
        "first_divergence": divergence,
        "ar_ms_per_token": rounded(ar_ms),
        "speedup": rounded(speedup),
        "timing_doubtful": None if speedup is None else speedup > 1.05 * passes,
    }


NO_BASELINE = dict.fromkeys(
    ("baseline", "identical", "first_divergence", "ar_ms_per_token", "speedup", "timing_doubtful")
)


def first_divergence(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """Returns the index of the first difference, the shorter length if one text only goes on, None for equal texts."""
    for index, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return index
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def resident_peak(status: Path = Path("/proc/self/status")) -> int:
    """Returns the bytes of the process's largest resident set.

    On Linux it is VmHWM, because a process inherits ru_maxrss from the one that started it. Elsewhere it is ru_maxrss.
    """
    with suppress(OSError):
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Returns the bytes of the process's largest resident set and, on a GPU, the most that was allocated there."""
    peak = {"host": resident_peak()}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def rounded(value: Any) -> Any:
    """Rounds floats to five significant digits. Infinities and NaN, which JSON lacks, become None."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def summary(report: dict[str, Any]) -> str:
    """Returns the report as lines for people."""
    ms, ar = report["ms_per_token"], report["ar_ms_per_token"]
    lines = [
        f"{report['new_tokens']} new tokens after a prompt of {report['prompt_tokens']}, ended by: {report['ending']}",
        f"model {report['model']}, drafter {report['drafter']}, seed {report['parameters']['seed']}",
        f"numerics {report['numerics']} ({report['guarantee']})",
    ]
    if report["resumed_behind"]:
        lines.append(f"resumed after {report['resumed_behind']} recorded tokens; the milliseconds are of the others")
    if report["lossy"]:
        lines.append(lossy_note(report["eviction"]))
    if ms:
        length = report["mean_acceptance_length"]
        lines.append(f"{ms:.2f} ms a token ({1e3 / ms:.1f} tokens/s), {length:.2f} tokens a pass")
    if report["speedup"] is not None:
        baseline = report["baseline"]
        same = "identical" if report["identical"] else f"DIFFERENT from token {report['first_divergence']} on"
        of_limit = baseline["share_of_memory_limit"]
        share = "memory limit unknown" if of_limit is None else f"{100 * of_limit:.0f} % of the memory limit"
        doubt = " (more than the passes allow: the machine was busy)" if report["timing_doubtful"] else ""
        speedup = f"speed-up {report['speedup']:.2f}x{doubt}"
        plain = "plain decoding, just as lossy," if report["lossy"] else "plain decoding"
        lines.append(f"{plain} {ar:.2f} ms a token ({share}): {speedup}, output {same}")
    diversity = ", ".join(f"distinct-{n} {report[f'distinct_{n}']}" for n in (1, 4))
    loop = report["loop"]
    verdict = f"LOOPS with period {loop['period']} from token {loop['start']} on" if loop else "does not loop"
    lines.append(f"{diversity}; the text {verdict}")
    if read := report.get("window_perplexity"):  # reports of earlier versions have none
        lines.append(readability(read))
    return "\n".join(lines)


def readability(read: dict[str, Any]) -> str:
    """Returns `window_perplexity` as one line."""
    if not read["windows"]:
        return "too short to be read by windows"
    many = f"{read['windows']} windows of {read['window']} tokens" if read["windows"] > 1 else "one window"
    return (
        f"{many}, read alone by {read['judge']}: perplexity {read['median']} (worst {read['worst']}), "
        f"{read['bits_per_byte_median']} bits a byte (worst {read['bits_per_byte_worst']})"
    )


def lossy_note(eviction: dict[str, Any]) -> str:
    """Returns a line that says what the lossy mode did to the text."""
    mode = f"LOSSY: the cache keeps {eviction['budget']} tokens at most (policy {eviction['policy']})"
    if not eviction["evictions"]:
        return f"{mode}; the text fitted, nothing was evicted"
    memory = f" into a memory ({eviction['memory']})" if eviction["memory"] else ""
    return f"{mode}; {eviction['evicted_tokens']} were evicted{memory}, and the text may differ from the full cache's"
