"""The executor of a pipeline, on its first stage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from tokenswift_py.checkpoints import checkpoint as files
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.core import Model
from tokenswift_py.errors import check
from tokenswift_py.models.devices import check_all_logits
from tokenswift_py.models.executors import Executor
from tokenswift_py.models.rope import RopeTables
from tokenswift_py.parallel.column import Column, column
from tokenswift_py.parallel.pipeline import PipelineModel
from tokenswift_py.parallel.stages import Place, load_stage, stage_specs
from tokenswift_py.sampling.reference import Sampler


class PipelineExecutor:
    """Holds the weights of the first stage, and knows what the others hold.

    source: what the other stages find the checkpoint by. settings: see `load_stage`.
    """

    remembers = False  # a memory would be spread over the stages

    def __init__(
        self,
        line: Column,
        checkpoint: Checkpoint,
        device: torch.device,
        source: Mapping[str, Any],
        settings: dict[str, Any],
    ):
        self._column, self._spec = line, checkpoint.spec
        self._specs = stage_specs(checkpoint.spec, line.place.stages)
        self._number = line.number(self)
        told = {"do": "load", "number": self._number, "source": dict(source), "settings": settings}
        told["model"], others = files.model_fingerprint(checkpoint), line.others
        own, answers = line.beside(
            [told] * len(others), [[]] * len(others), lambda: load_stage(line.place, checkpoint, device, settings)
        )
        self._own: Executor = own
        self.products = own.products
        for words, _ in answers:
            found, allowed = words["products"], f"as the first stage's, {self.products!r}: --deterministic on"
            check(found == self.products, "deterministic", found, allowed)
            self._own.kinds.update(words["kinds"])  # numerics name the types of all layers
        self._multiplied: int = self._own.multiplied_nbytes + sum(words["multiplied"] for words, _ in answers)
        self.name, self.dtype, self.kv_dtype = self._own.name, self._own.dtype, self._own.kv_dtype
        self.device, self.ranks, self.kinds = self._own.device, self._own.ranks, self._own.kinds
        self.copies_all = self._own.copies_all
        self.layers = max(spec.layers for spec in self._specs)

    @property
    def threads(self) -> int:
        return self._own.threads

    @property
    def multiplied_nbytes(self) -> int:
        return self._multiplied

    @property
    def sampler(self) -> type[Sampler]:
        return self._own.sampler

    def padded_head(self, head_dim: int) -> int:
        return self._own.padded_head(head_dim)

    def check_rope(self, rope: RopeTables) -> None:
        self._own.check_rope(rope)

    def model(self, rope: RopeTables) -> Model:
        return self._model(rope, self._own.model(rope), "target", "auto", "auto")

    def self_draft(self, rope: RopeTables, weights: str, kv: str = "auto", vocabulary: str | int = "auto") -> Model:
        check_all_logits(vocabulary, "a pipeline")
        return self._model(rope, self._own.self_draft(rope, weights, kv, "all"), "draft", weights, kv)

    def reads_copies(self, kv: str) -> bool:
        return self._own.reads_copies(kv)

    def draft_bytes(self, weights: str) -> int:
        return self._own.draft_bytes(weights)

    def beside(self, checkpoint: Checkpoint, weights: str) -> Executor:
        return self._own.beside(checkpoint, weights)

    def close(self) -> None:
        """Lets the other stages go. Afterwards no model of this executor computes any more."""
        self._column.end()

    def _model(self, rope: RopeTables, own: Any, kind: str, weights: str, kv: str) -> PipelineModel:
        model = PipelineModel(self._column, own, self._specs, self._spec, rope, self.ranks)
        positions = [rope.positions.scheme, rope.positions.window, rope.positions.block]
        self._column.ask({
            "do": "model", "number": model.number, "executor": self._number, "kind": kind, "context": rope.context,
            "positions": positions, "weights": weights, "kv": kv, "tables": fingerprint(rope),
        })  # fmt: skip
        return model


def load_all(
    place: Place, checkpoint: Checkpoint, device: torch.device, source: Mapping[str, Any], settings: dict[str, Any]
) -> Executor:
    """Reads the weights into this process, and on the first stage of a pipeline into all that follow it.

    source: the model, its revision and the device, as they were asked for.
    """
    if place.stages == 1:
        return load_stage(place, checkpoint, device, settings)
    return PipelineExecutor(column(place), checkpoint, device, source, settings)


def fingerprint(rope: RopeTables) -> str:
    """Returns a hash of the tables, by which stages know that theirs are the same."""
    found = hashlib.sha256(rope.label.encode())
    for table in (rope.cos, rope.sin):
        found.update(table.contiguous().numpy().tobytes())
    return found.hexdigest()
