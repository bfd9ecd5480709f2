"""The files that a training run leaves and goes on from: settings, a journal of the loss, and the latest state."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tokenswift_py.checkpoints.cache import full_disks
from tokenswift_py.errors import check, files, one_line
from tokenswift_py.runs.folder import lock

SETTINGS, JOURNAL, STATE = "settings.json", "journal.jsonl", "state.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # the parts of AdamW's state


@dataclass(frozen=True)
class TrainingFolder:
    """The folder `training`, which is inside of the folder that gets the merged model."""

    path: Path

    @classmethod
    def create(cls, out: Path, about: Mapping[str, Any]) -> TrainingFolder:
        """Makes it in a new or empty folder. about: the settings, and values that a resumed run must find unchanged."""
        check_empty(out)
        with files("out", out, "a folder that can be written"):
            made = cls(out / "training")
            made.path.mkdir(parents=True)
            (made.path / SETTINGS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        return made

    @classmethod
    def open(cls, out: Path) -> tuple[TrainingFolder, dict[str, Any]]:
        """Opens the folder of a run that was begun. Returns it with what `create` was given."""
        found = cls(out / "training")
        with one_line(f"resume: {out} has no readable training/{SETTINGS}"):
            about = json.loads((found.path / SETTINGS).read_text(encoding="utf-8"))
            whole = isinstance(about, dict) and {"settings", "command"} <= about.keys()
            check(whole and isinstance(about["settings"], dict), "resume", str(out), "the folder of a training run")
        return found, about

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes from training here. Raises UserError where one does. The lock ends with the process."""
        with (self.path / SETTINGS).open("rb") as file:
            lock(file, "resume", self.path.parent, "a folder in which no other process trains")
            yield

    def log(self, line: Mapping[str, Any]) -> None:
        """Adds a line to the journal."""
        with (self.path / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Returns the journal's whole lines, up to the first that a cut of power left damaged."""
        path = self.path / JOURNAL
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        found: list[dict[str, Any]] = []
        for line in text.splitlines(keepends=True):
            with suppress(ValueError):
                said = json.loads(line)
                if line.endswith("\n") and isinstance(said, dict) and "step" in said:
                    found.append(said)
                    continue
            break
        return found

    def cut(self, step: int) -> None:
        """Drops the journal's lines about later steps. These steps will be made again."""
        kept = [json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step]
        replace(self.path / JOURNAL, lambda scratch: scratch.write_text("".join(kept), encoding="utf-8"))

    def save(self, step: int, parameters: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
        """Writes the state after `step` steps. It replaces the state before it as a whole or not at all."""
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            for moment, value in optimiser.state.get(parameter, {}).items():
                tensors[f"{moment}:{name}"] = value
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        replace(self.path / STATE, lambda scratch: save_file(kept, scratch, {"step": str(step)}))

    def load(self, parameters: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
        """Reads the latest state into parameters and optimiser. Returns its step, or 0 if none was saved.

        Raises UserError for a state of other parameters.
        """
        path = self.path / STATE
        if not path.exists():
            return 0
        with one_line(f"resume: {path.name} is not a readable state"), safe_open(path, "pt") as tensors:
            step = int(tensors.metadata()["step"])
            names = set(tensors.keys())
            expected = {f"{moment}:{name}" for name in parameters for moment in MOMENTS} if step else set()
            fits = names == expected | parameters.keys()
            check(fits, "resume", path.name, "a state of the very parameters that learn")
            for name, parameter in parameters.items():
                with torch.no_grad():
                    parameter.copy_(tensors.get_tensor(name))
                if step:
                    state = {moment: tensors.get_tensor(f"{moment}:{name}") for moment in MOMENTS}
                    on_device = {m: t if m == "step" else t.to(parameter.device) for m, t in state.items()}
                    optimiser.state[parameter] = on_device
        return step


def check_empty(out: Path) -> None:
    """Raises UserError unless the folder is new or empty."""
    with files("out", out, "a folder that can be written"):
        free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        check(free, "out", str(out), "a new or empty folder")


def replace(path: Path, write: Any) -> None:
    """Writes a file beside its place, makes sure that it is on the disk, and moves it there."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        with full_disks():
            write(scratch)
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
