"""Pipeline parallelism: the layers of a model over the stages of a pipeline, each of which may be several tensor ranks.

Process RANK holds stage RANK // T as tensor rank RANK % T, where T tensor ranks share each stage. The first stage has
the embedding, the final norm and the LM head too, beside fewer layers. So activations come back to it rather than
logits, which are many times as wide, a tied matrix is held once, and the sampler and the drafters have both where they
are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.errors import check
from tokenswift_py.memory import check_memory
from tokenswift_py.models.executors import Executor, load
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.parallel.processes import stage_of
from tokenswift_py.parallel.ranks import Ranks, join


@dataclass(frozen=True)
class Place:
    """This process among those that hold a model. ranks: those that share its stage."""

    stage: int
    stages: int
    ranks: Ranks

    @property
    def processes(self) -> int:
        return self.stages * self.ranks.world

    def process(self, stage: int) -> int:
        """Returns torchrun's RANK of the process that holds another stage for this tensor rank."""
        return stage * self.ranks.world + self.ranks.rank


@cache
def find_place(stages: int) -> Place:
    """Finds this process's place in a pipeline of so many stages. Raises UserError where they do not divide the
    processes."""
    ranks = join(stages)
    return Place(stage_of(stages), stages, ranks)


def stage_specs(spec: ModelSpec, stages: int) -> list[ModelSpec]:
    """Returns the layers of each stage, such that all multiply by about as many weights. Raises UserError for more
    stages than layers."""
    count = spec.layers
    check(stages <= count, "pipeline_parallel_size", stages, f"no more than the model's {count} layers")
    head = spec.vocab_size * spec.hidden_size
    sizes = [spec.stage(layer, layer + 1).multiplied for layer in range(count)]
    sizes[0] = spec.multiplied - sum(sizes[1:]) - head
    total, done, bounds = head + sum(sizes), float(head), [0]
    for layer, size in enumerate(sizes):
        due = total * len(bounds) / stages  # a stage ends behind the layer that comes nearest to its share
        left, open_stages = count - layer, stages - len(bounds)
        if len(bounds) < stages and layer > bounds[-1] and (done + size / 2 > due or left <= open_stages):
            bounds.append(layer)
        done += size
    return [spec.stage(first, stop) for first, stop in zip(bounds, [*bounds[1:], count], strict=True)]


def load_stage(place: Place, checkpoint: Checkpoint, device: torch.device, settings: dict[str, Any]) -> Executor:
    """Reads the weights of this process's stage. settings: the other arguments of `load`."""
    spec = stage_specs(checkpoint.spec, place.stages)[place.stage]
    dtype = settings["dtype"]
    needed = checkpoint.weight_bytes(dtype) * spec.parameters // checkpoint.spec.parameters // place.ranks.world
    check_memory(needed, device, f"the weights of {checkpoint.name} in {dtype}")
    return load(checkpoint, device=device, ranks=place.ranks, spec=spec, **settings)
