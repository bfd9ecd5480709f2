"""Runs the command line of an experiment over a tiny model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Rows = list[dict[str, Any]]


def runner(
    module: ModuleType, folder: Path, results: Path, patch: pytest.MonkeyPatch, *flags: str
) -> Callable[..., Rows]:
    """Returns a function that runs an experiment with these flags and its own, and returns the rows it has written. The
    model of `folder` computes in fp32 on one thread. The machine's bandwidth is not measured."""
    patch.setattr("results.memory_bandwidth", lambda threads: 5e10)
    name = module.__name__
    common = ["--model", str(folder), "--dtype", "fp32", "--threads", "1", "--results", str(results)]

    def run(*more: str) -> Rows:
        patch.setattr(sys, "argv", [f"{name}.py", *common, *flags, *more])
        module.main()
        rows: Rows = json.loads((results / f"{name}.json").read_text())["rows"]
        return rows

    return run
