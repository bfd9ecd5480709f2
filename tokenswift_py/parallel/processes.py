"""How many processes torchrun has started, and how they share a model. Nothing here takes time to import."""

from __future__ import annotations

import os

from tokenswift_py.errors import check
from tokenswift_py.sampling.kinds import is_whole


def world_size() -> int:
    """Returns how many processes torchrun started to hold the model together (WORLD_SIZE), 1 without it."""
    world = os.environ.get("WORLD_SIZE", "1")
    check(world.isdecimal() and int(world) >= 1, "WORLD_SIZE", world, "a whole number, as torchrun sets it")
    return int(world)


def tensor_ranks(stages: int) -> int:
    """Returns how many processes share each stage of a pipeline. Where there is one stage, all of torchrun's do.

    Raises UserError for a number of stages that does not divide them.
    """
    world = world_size()
    allowed = f"a whole number that divides torchrun's {world} processes (WORLD_SIZE)"
    check(is_whole(stages) and stages >= 1 and world % stages == 0, "pipeline_parallel_size", stages, allowed)
    return world // stages


def check_one_rank(command: str, stages: int) -> None:
    """Raises UserError for a command whose processes may be stages of a pipeline only, where several share one."""
    allowed = f"{command} runs in one process, or with pipeline_parallel_size in as many as there are stages"
    check(tensor_ranks(stages) == 1, "WORLD_SIZE", world_size(), allowed)


def stage_of(stages: int) -> int:
    """Returns the stage that this process holds, by torchrun's RANK. The ranks of a stage follow one another."""
    return int(os.environ.get("RANK", "0")) // tensor_ranks(stages) if world_size() > 1 else 0
