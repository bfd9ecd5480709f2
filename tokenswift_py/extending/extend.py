"""A whole training run: it reads, trains, saves and merges. `tokenswift extend-context` calls it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tokenswift_py.checkpoints.cache import sha256
from tokenswift_py.checkpoints.checkpoint import DTYPES, Checkpoint
from tokenswift_py.checkpoints.loading import open_checkpoint, transformers_config
from tokenswift_py.errors import check
from tokenswift_py.extending.adapters import base_model, check_peft, learner, merged, trained_parameters
from tokenswift_py.extending.merging import write_model
from tokenswift_py.extending.schedule import draw, plan, stages
from tokenswift_py.extending.settings import Settings
from tokenswift_py.extending.state import TrainingFolder, check_empty
from tokenswift_py.extending.tables import original_length, stretched_config
from tokenswift_py.extending.texts import Source, digest, read_sources, texts_of
from tokenswift_py.extending.training import ROWS, optimiser_of, rate_at, read, take_step
from tokenswift_py.memory import check_memory, free_on
from tokenswift_py.models.devices import fast_bf16, find_device
from tokenswift_py.version import __version__

logger = logging.getLogger("tokenswift")

SAVE_SECONDS = 600.0  # the state is saved at least so often

Stopping = Callable[[], AbstractContextManager[Callable[[], bool]]]


def never() -> AbstractContextManager[Callable[[], bool]]:
    return nullcontext(lambda: False)


@dataclass(frozen=True)
class Prepared:
    """The parts that a run needs before its first step. about: the entries that its folder keeps. trained: the model's
    own length."""

    checkpoint: Checkpoint
    config: Any
    sources: list[Source]
    trained: int
    device: torch.device
    dtype: torch.dtype
    about: dict[str, Any]


def prepare(settings: Settings, command: str) -> Prepared:
    """Finds the model and reads the texts. Raises UserError for what cannot be trained."""
    if settings.learn != "full":
        check_peft()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = find_device(settings.device)
    wanted = ("bf16" if fast_bf16(device) else "fp32") if settings.dtype == "auto" else settings.dtype
    checkpoint = open_checkpoint(settings.model, settings.revision)
    config = stretched_config(transformers_config(checkpoint.folder), settings.context, settings.positions)
    trained = original_length(checkpoint.config)
    longest = stages(settings, trained)[-1]
    check(longest == settings.context, "lengths", longest, f"the last is the context ({settings.context})")
    check_memory(training_bytes(checkpoint, settings, DTYPES[wanted]), device, f"training {checkpoint.name}")
    # Loading holds the weights twice, and merging holds them in fp32.
    host = checkpoint.spec.parameters * max(2 * DTYPES[wanted].itemsize, torch.float32.itemsize)
    check_memory(host, torch.device("cpu"), f"loading and merging {checkpoint.name}")
    sources = read_sources(settings.texts, checkpoint.tokenizer(), settings.context, settings.held_out)
    most = max(int(tokens.max(initial=0)) for source in sources for tokens in (source.learned, source.held_out))
    check(most < checkpoint.spec.vocab_size, "texts", most, f"token ids are 0 to {checkpoint.spec.vocab_size - 1}")
    about = {
        "version": __version__,
        "command": command,
        "settings": settings.plain(),
        "trained": trained,
        "texts": digest(sources),
        "tokens": {source.name: len(source.learned) for source in sources},
        "weights": {path.name: sha256(path) for path in checkpoint.weight_files},
    }
    return Prepared(checkpoint, config, sources, trained, device, DTYPES[wanted], about)


def training_bytes(checkpoint: Checkpoint, settings: Settings, dtype: torch.dtype) -> int:
    """Returns the bytes that training takes at least.

    They are the weights, those that learn with their gradients and AdamW's two moments in fp32, the residual stream of
    the longest text at every layer, and the logits of some rows with their gradients. LoRA's own and norms are few.
    """
    spec = checkpoint.spec
    learning = {"lora": 0, "lora+": spec.vocab_size * spec.hidden_size, "full": spec.parameters}[settings.learn]
    rows = settings.context if settings.held_out else most_rows(settings)
    streams = rows * spec.hidden_size * (spec.layers + 8)  # and the activations of one layer
    return spec.parameters * dtype.itemsize + 4 * (4 * learning + streams + 3 * ROWS * spec.vocab_size)


def activation_bytes(checkpoint: Checkpoint, settings: Settings) -> float:
    """Returns about what the activations of one text take where all layers keep theirs for the backward pass. For
    mixtures of experts it is not known."""
    spec = checkpoint.spec
    each = 4 * spec.layers * (16 * spec.hidden_size + 8 * spec.intermediate_size)
    return math.inf if spec.experts else most_rows(settings) * each


def most_rows(settings: Settings) -> int:
    """Returns the tokens of the longest text of a step."""
    return settings.window if settings.window and not settings.full_steps else settings.context


def begin(
    settings: Settings, out: Path, command: str, quiet: bool = False, stopping: Stopping = never
) -> TrainingFolder:
    """Trains a model and writes it to a new folder. Raises UserError for wrong input, and KeyboardInterrupt as `run`
    does."""
    check_empty(out)
    began, prepared = time.monotonic(), prepare(settings, command)
    folder = TrainingFolder.create(out, prepared.about)
    run(settings, prepared, folder, began, quiet, stopping)
    return folder


def go_on(settings: Settings, out: Path, quiet: bool = False, stopping: Stopping = never) -> TrainingFolder:
    """Goes on with a run from its latest state. The result is the same as without a break.

    settings: the settings that its folder keeps, except where a setting of `Flag.again` was given a new value. Raises
    UserError if the model or the texts are not the same as before.
    """
    began = time.monotonic()
    folder, about = TrainingFolder.open(out)
    prepared = prepare(settings, about["command"])
    for name in ("trained", "texts", "weights"):
        check(about.get(name) == prepared.about[name], f"resume: {name}", prepared.about[name], "as the run began")
    run(settings, prepared, folder, began, quiet, stopping)
    return folder


def run(
    settings: Settings, prepared: Prepared, folder: TrainingFolder, began: float, quiet: bool, stopping: Stopping
) -> None:
    """Makes the steps that are left, or as many as the minutes allow, and merges.

    stopping: made around the steps; its value is asked after each whether to stop. Then the state is saved, and
              KeyboardInterrupt raised.
    """
    with folder.held():
        merge(make_steps(settings, prepared, folder, began, quiet, stopping), prepared, folder, settings)


def make_steps(
    settings: Settings, prepared: Prepared, folder: TrainingFolder, began: float, quiet: bool, stopping: Stopping
) -> Any:
    """Makes the steps, and returns the model that learned."""
    deadline = began + 60 * (settings.minutes or math.inf)
    recompute = activation_bytes(prepared.checkpoint, settings) > free_on(prepared.device) / 2
    learning = learner(prepared.checkpoint, prepared.config, settings, prepared.dtype, recompute)
    parameters = trained_parameters(learning)
    learning.to(prepared.device)
    model, optimiser = base_model(learning), optimiser_of(list(parameters.values()))
    done = folder.load(parameters, optimiser)
    folder.cut(done)
    if done == 0:
        tell_held_out(model, prepared, folder, 0)
    bar, saved = tqdm(range(done, settings.steps), unit="step", desc="training", disable=quiet), time.monotonic()
    with stopping() as stopped:
        for number in bar:
            if time.monotonic() > deadline:
                break
            step, start = plan(settings, prepared.trained, number), time.monotonic()
            samples, rate = draw(settings, prepared.sources, step, number), rate_at(settings, number)
            loss = take_step(model, optimiser, samples, step.group, rate, prepared.device, prepared.dtype)
            done = number + 1
            seconds = round(time.monotonic() - start, 2)
            told = {"texts": step.texts, "rows": step.rows, "reach": step.reach, "group": step.group}
            folder.log({"step": done, "loss": loss, "rate": rate, **told, "seconds": seconds})
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            late = done % settings.save_every == 0 or time.monotonic() > saved + SAVE_SECONDS
            if (late and done < settings.steps) or stopped():
                folder.save(done, parameters, optimiser)
                saved = time.monotonic()
            if stopped():
                bar.close()
                logger.warning("%d of %d steps are kept; --resume %s goes on", done, settings.steps, folder.path.parent)
                raise KeyboardInterrupt
    bar.close()
    folder.save(done, parameters, optimiser)
    tell_held_out(model, prepared, folder, done)
    return learning


def merge(learning: Any, prepared: Prepared, folder: TrainingFolder, settings: Settings) -> None:
    """Writes the model that learned to where it is wanted."""
    write_model(merged(learning), prepared.checkpoint, folder.path.parent, settings.save_dtype)


def tell_held_out(model: Any, prepared: Prepared, folder: TrainingFolder, step: int) -> None:
    """Reads the held-out texts, and adds the nats a token of each quarter of them to the journal.

    A run that was killed at its end may have added them already.
    """
    if any("held_out" in line and line["step"] == step for line in folder.lines()):
        return
    found = {}
    for source in prepared.sources:
        context = prepared.config.max_position_embeddings
        texts = [read(model, text, prepared.device, prepared.dtype) for text in texts_of(source.held_out, context)]
        if texts:
            found[source.name] = mean(texts)
    if found:
        folder.log({"step": step, "held_out": found})


def mean(columns: Sequence[Sequence[float]]) -> list[float]:
    return [round(sum(column) / len(columns), 5) for column in zip(*columns, strict=True)]
