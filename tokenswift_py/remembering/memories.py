"""The memory that a run asked for (--kv-memory): whether it can be had, what it takes, and how it is made."""

from __future__ import annotations

from typing import Any

import torch

from tokenswift_py import registry
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.errors import check
from tokenswift_py.kvcache.memories.base import Memory, Shape
from tokenswift_py.models.executors import Executor
from tokenswift_py.models.rope import RopeTables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.options import GATED, MEMORIES, Options
from tokenswift_py.remembering.gates import find_gates


def check_remembers(options: Options, executor: Executor, rope: RopeTables, checkpoint: Checkpoint) -> None:
    """Raises UserError where this executor cannot join attention with the memory, or the memory cannot be had."""
    kind, spec = options.kv_memory, checkpoint.spec
    if kind == "none":
        return
    able = "this attention or pipeline has no memory; engine native's can, and attention sdpa, flash and xformers"
    check(executor.remembers, "kv_memory", kind, able)
    world = executor.ranks.world
    check(world == 1, "kv_memory", kind, f"in one process, not in torchrun's {world}")
    windows = [layer.window for layer in spec.layer_specs]
    check(None in windows, "kv_memory", kind, "every layer of this model has a sliding window and forgets by design")
    moved = f"positions {rope.positions.scheme} would have to rotate one sum for many distances"
    wanted = f"{moved}; {' and '.join(GATED)} can, and positions trained, linear, ntk and yarn need not"
    check(rope.shifts is None or kind in GATED, "kv_memory", kind, wanted)
    capped = f"it estimates scores without the soft cap of {spec.family}; {' and '.join(GATED)} need no scores"
    check(kind in GATED or not spec.attention_cap, "kv_memory", kind, capped)
    if kind in GATED:
        find_gates(checkpoint, kind, options.kv_gates)


def memory_of(options: Options, model: Any, checkpoint: Checkpoint) -> Memory | None:
    """Makes the memory of a run that `check_remembers` has passed; None where none was asked for. model: executor's."""
    if options.kv_memory == "none":
        return None
    gates = find_gates(checkpoint, options.kv_memory, options.kv_gates) if options.kv_memory in GATED else None
    own = {} if gates is None else {"gates": gates.values, "label": gates.label}
    kind = options.kv_memory
    plain = registry.create(MEMORIES, "MEMORY", "kv_memory", kind, shape=model.remembers(), **own)
    memory: Memory = model.new_memory(plain, kind)
    return memory


def memory_bytes(options: Options, spec: ModelSpec) -> int:
    """Returns the bytes of a memory's states, which every token reads."""
    if options.kv_memory == "none":
        return 0
    keeps = tuple(layer.window is None for layer in spec.layer_specs)
    shape = Shape(keeps, spec.kv_heads, spec.heads, spec.head_dim, device="meta")
    kind = registry.module(MEMORIES, "kv_memory", options.kv_memory).MEMORY
    own = {"gates": torch.empty(len(keeps), spec.heads)} if options.kv_memory in GATED else {}
    return int(kind(shape, **own).nbytes)
