"""Reads a job's text window by window, beside the texts that are being written, and says how well it reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenswift_py import quality
from tokenswift_py.runs import journal
from tokenswift_py.runs.report import rounded
from tokenswift_py.serving.engine import Engine
from tokenswift_py.serving.jobs.proof import between_passes
from tokenswift_py.text import special_ids


def read_windows(engine: Engine, folder: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """Lets the engine's model read the windows of a recorded text, each on its own.

    Returns the report's `window_perplexity`, and the place and the figures of each window. start and stop are numbers
    of tokens that the model chose, as in `loops` of a report. Some windows contain markup, which is not read.

    Raises Busy while the engine closes.

    progress: a function that gets the share of the windows that is read.
    """
    loaded, _ = between_passes(engine)
    chosen = journal.read(folder).chosen_tokens
    special = special_ids(loaded.tokenizer)
    places = [place for place, token in enumerate(chosen) if token not in special]
    size = quality.window_size(loaded, None)
    cut = quality.windows_of(places, size) if len(places) >= quality.LEAST else []
    windows = [[chosen[place] for place in part] for part in cut]
    done = 0

    def read() -> None:
        nonlocal done
        done += 1
        progress(done / len(windows))

    readings = quality.read(loaded, windows, read)
    decode = quality.decoder(loaded.tokenizer)
    varied = [quality.window_quality(window, decode, len(window)) for window in windows]
    found = [
        {
            "start": part[0], "stop": part[-1] + 1, "perplexity": rounded(reading.perplexity),
            "bits_per_byte": rounded(reading.bits_per_byte), "distinct_4": rounded(measures.distinct_4[0]),
            "looping": bool(measures.looping),
        }
        for part, reading, measures in zip(cut, readings, varied, strict=True)
    ]  # fmt: skip
    summary = quality.WindowPerplexity(loaded.checkpoint.name, size, readings).summary()
    return {**summary, "per_window": found}
