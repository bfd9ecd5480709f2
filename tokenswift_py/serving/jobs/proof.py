"""An audit that runs beside the texts that are being written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenswift_py.core import Model, Output
from tokenswift_py.loaded import LoadedModel
from tokenswift_py.models.rope import RopeTables
from tokenswift_py.runs import journal
from tokenswift_py.runs.audit import audit, conclusion, strict
from tokenswift_py.serving.engine import Engine


class Between:
    """A model whose passes the engine's thread computes, each between two of its own.

    So an audit and the texts in work never meet in an executor, whichever it is. They take turns pass by pass. They
    share the weights, but the audit has its own pages.
    """

    def __init__(self, model: Model, engine: Engine):
        self._model, self._engine = model, engine
        self.beside = False  # whether any pass came between passes of texts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, *segments: Any, **wanted: Any) -> Output:
        self.beside |= self._engine.figures()["running"] > 0
        return self._engine.between(lambda: self._model.forward(*segments, **wanted))


class BetweenExecutor:
    """An executor of such models."""

    def __init__(self, executor: Any, engine: Engine):
        self._executor, self._engine = executor, engine
        self.made: list[Between] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def model(self, rope: RopeTables) -> Model:
        self.made.append(Between(self._executor.model(rope), self._engine))
        return self.made[-1]


def between_passes(engine: Engine) -> tuple[LoadedModel, BetweenExecutor]:
    """Returns the model of a text alone, and its executor. Its passes come between the passes of the engine."""
    alone = engine.loaded.alone
    executor = BetweenExecutor(alone.executor, engine)
    return LoadedModel(alone.checkpoint, alone.tokenizer, executor, alone.origin), executor


def audited(engine: Engine, folder: Path, sample: int, progress: Callable[[float], None]) -> dict[str, Any]:
    """Audits a run's folder. Returns the findings as JSON has them.

    Raises the errors of `audit`, and Busy while the engine closes. `ar_seconds` is None if texts were written
    meanwhile: single steps that wait for others say nothing about plain decoding.

    progress: a function that gets the share of the text that is checked.
    """
    loaded, executor = between_passes(engine)
    record = journal.read(folder)
    done, rows = 0, max(1, len(record.header["prompt"]) + len(record.tokens))

    def checked(count: int) -> None:
        nonlocal done
        done += count
        progress(done / rows)

    found = audit(loaded, folder, sample, checked)
    if any(model.beside for model in executor.made):
        found.ar_seconds = None
    told: dict[str, Any] = strict({**found.to_dict(), "folder": folder.name, "conclusion": conclusion(found)})
    return told
