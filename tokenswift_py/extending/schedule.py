"""The schedule of training: the length of each step's texts, how they attend, and the positions of their tokens.

All of it is a function of the settings, the seed and the number of the step, so that a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenswift_py.extending.settings import Settings
from tokenswift_py.extending.texts import Source

Whole = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepPlan:
    """The texts of a step.

    reach:  the number of positions that a text spans.
    rows:   the number of its tokens that are learned from. It is smaller than `reach` if positions are skipped.
    chunks: the number of pieces of a text that skips positions.
    group:  the rows of a group of S2-Attn, or None for full attention.
    texts:  the number of texts in a step.
    """

    reach: int
    rows: int
    chunks: int
    group: int | None
    texts: int


@dataclass(frozen=True)
class Sample:
    """A text to learn from. tokens, following, positions: [rows] ids, the ids that come next, absolute positions."""

    tokens: Whole
    following: Whole
    positions: Whole


def stages(settings: Settings, trained: int) -> list[int]:
    """Returns the lengths of a schedule: those asked for, or doublings from the trained length to the context."""
    if settings.schedule == "constant":
        return [settings.context]
    if settings.lengths is not None:
        return list(settings.lengths)
    found = [trained]
    while 2 * found[-1] < settings.context:
        found.append(2 * found[-1])
    return [*found, settings.context]


def plan(settings: Settings, trained: int, step: int) -> StepPlan:
    """Returns the plan of a step, which is counted from 0. trained: the model's own length."""
    lengths = stages(settings, trained)
    at = step * len(lengths) // settings.steps
    if settings.schedule == "mixed":
        at = int(generator(settings, step, 0).integers(len(lengths)))
    reach = lengths[at]
    whole = step >= settings.steps - settings.full_steps  # the last steps attend as the model will be used
    rows = reach if whole or settings.window is None else min(settings.window, reach)
    grouped = settings.chosen_attention == "s2" and not whole
    group = min(rows, settings.group or max(2, rows // 4)) if grouped else None
    texts = max(1, (settings.batch_tokens or settings.context) // rows)
    return StepPlan(reach, rows, settings.chunks if rows < reach else 1, group, texts)


def draw(settings: Settings, sources: Sequence[Source], step: StepPlan, number: int) -> list[Sample]:
    """Draws the texts of a step. Every place of every source is equally likely."""
    drawn = generator(settings, number, 1)
    places = np.array([len(source.learned) - step.reach for source in sources])
    samples = []
    for _ in range(step.texts):
        source = sources[drawn.choice(len(sources), p=places / places.sum())]
        start = int(drawn.integers(len(source.learned) - step.reach))
        positions, content = skipped(drawn, step.rows, step.reach, step.chunks)
        samples.append(
            Sample(
                source.learned[start + content].astype(np.int64),
                source.learned[start + content + 1].astype(np.int64),
                positions,
            )
        )
    return samples


def skipped(drawn: np.random.Generator, rows: int, reach: int, chunks: int) -> tuple[Whole, Whole]:
    """Draws positions and places of a text of `rows` tokens that stands for one of `reach` (PoSE, arXiv 2309.10400).

    The rows are cut into chunks of random lengths (section 3.2). Chunk i begins at row st_i. Its first token is at
    place v_i + st_i of the text and gets the position u_i + st_i. u_i is drawn from U{u_{i-1}, ..., reach - rows}, and
    v_i is drawn in the same way, independently of u_i. u_0 and v_0 are 0. A chunk has one token at least.
    Returns positions and places, [rows] each, which rise and are below `reach`. One chunk skips nothing.
    """
    cuts = np.sort(drawn.choice(np.arange(1, rows), chunks - 1, replace=False)) if chunks > 1 else np.array([], int)
    lengths = np.diff([0, *cuts, rows])
    biases = np.zeros((2, chunks), np.int64)
    for chunk in range(1, chunks):
        biases[:, chunk] = drawn.integers(biases[:, chunk - 1], reach - rows, endpoint=True)
    positions, places = np.arange(rows) + np.repeat(biases, lengths, axis=1)
    return positions, places


def generator(settings: Settings, step: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, step, purpose])
