"""The workloads of the experiments: prompts of our own, and real texts to go on from (`extending.human`).

README.md describes them.

A script in experiments/ imports this as `workloads`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenswift_py.extending.human import CONTINUATIONS as CONTINUATIONS
from tokenswift_py.extending.human import continuation as continuation

HERE = Path(__file__).resolve().parent
WORKLOADS = ("story", "manual", "records")


@dataclass(frozen=True)
class FreeRun:
    """A prompt, follow-up requests, and arguments of `TokenSwift.generate` to write with.

    sha256: of prompt, requests and settings.
    """

    name: str
    prompt: str
    chapters: tuple[str, ...]
    settings: dict[str, Any]
    sha256: str


def free_run(name: str) -> FreeRun:
    """One of WORKLOADS. Raises ValueError for another name."""
    if name not in WORKLOADS:
        raise ValueError(f"workload: {name!r} is not allowed; one of {', '.join(WORKLOADS)}")
    prompt, chapters, settings = (
        (HERE / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("prompt.txt", "chapters.txt", "json")
    )
    digest = hashlib.sha256("\0".join((prompt, chapters, settings)).encode()).hexdigest()
    # Logit biases stay a mapping from text to number, as `generate` takes them from JSON.
    return FreeRun(name, prompt.strip(), tuple(chapters.splitlines()), json.loads(settings), digest)


def held_to_grammar(run: FreeRun) -> dict[str, Any]:
    """The run's settings under which each of its answers is of NAME.lark. Only the grammar says how short an answer may
    be. Raises ValueError for a workload without a grammar."""
    path = HERE / f"{run.name}.lark"
    if not path.exists():
        raise ValueError(f"grammar: {run.name!r} is not allowed; records has one")
    settings = {name: value for name, value in run.settings.items() if name != "min_chapter_tokens"}
    return {**settings, "grammar": path.read_text(encoding="utf-8")}
