"""A model that transformers has loaded, in the form that the executors read: its config and its own tensors, not
copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.checkpoints.stored_tensors import Part, Tensors
from tokenswift_py.errors import check
from tokenswift_py.memory import check_memory
from tokenswift_py.models.devices import DTYPES, KV_DTYPES, WEIGHT_FORMATS
from tokenswift_py.models.executors import ENGINES, Executor, choose_engine, load
from tokenswift_py.models.families.base import StoredSlice
from tokenswift_py.models.spec import ModelSpec, family_named

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The modules of these libraries compute what the executors compute. A module of any other library may not.
KNOWN = ("transformers.", "torch.nn.")


class HeldTensors(Tensors):
    """Tensors of a model in memory, under the names of its checkpoint. `to` gives the tensors themselves where type and
    device are theirs. A tensor that is asked for by its name is on the CPU, copied only from a GPU."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors

    def to(
        self, dtype: torch.dtype, device: torch.device, names: Iterable[str] | None = None
    ) -> dict[str, torch.Tensor]:
        return {name: self._tensors[name].to(device, dtype) for name in (self._tensors if names is None else names)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class HeldCheckpoint(Checkpoint):
    """A checkpoint whose weights are in memory. It has no folder."""

    held: Mapping[str, torch.Tensor] = field(default_factory=dict)
    borrowed = True

    def tensors(self, part: Part | None = None, dtype: torch.dtype = torch.float32) -> Tensors:
        """Returns the model's own tensors. Raises ValueError where a part is asked for, because one process holds the
        model."""
        if part is not None:
            raise ValueError("a model in memory is not shared out to several processes")
        return HeldTensors(self.held)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return ()

    @property
    def dtype(self) -> torch.dtype:
        return self.held[EMBEDDING].dtype

    @property
    def device(self) -> torch.device:
        return self.held[EMBEDDING].device


@dataclass(frozen=True)
class EngineSettings:
    """The engine of a model and its settings, those of `TokenSwift.from_pretrained`, but for the defaults: engine torch
    over the model's own tensors, in the type that they have. engine native packs a copy of its own, on a CPU."""

    engine: str = "torch"
    dtype: str | None = None
    kv_dtype: str | None = None
    attention: str = "auto"
    threads: int | None = None
    deterministic: str = "auto"

    def __post_init__(self) -> None:
        check(self.engine in ENGINES, "engine", self.engine, f"one of {', '.join(ENGINES)}")
        known = [name for name in WEIGHT_FORMATS if name != "gguf"]
        check(self.dtype in (None, *known), "dtype", self.dtype, f"one of {', '.join(known)}")
        check(self.kv_dtype in (None, *KV_DTYPES), "kv_dtype", self.kv_dtype, f"one of {', '.join(KV_DTYPES)}")


@dataclass
class Held:
    """The parts that are kept of a model from call to call: executors of the weights as they were then.

    state: changes whenever a tensor is written to or replaced.
    """

    state: tuple[Any, ...]
    checkpoint: HeldCheckpoint
    executors: dict[EngineSettings, Executor] = field(default_factory=dict)
    drafting: WeakKeyDictionary[Executor, dict[str, Executor]] = field(default_factory=WeakKeyDictionary)
    kept: dict[str, Any] = field(default_factory=dict)  # what its drafters have read

    def beside(self, target: Executor, weights: str) -> Executor:
        """Returns the executor of this model that drafts for another's, which is made at its first use."""
        found = self.drafting.setdefault(target, {})
        if weights not in found:
            found[weights] = target.beside(self.checkpoint, weights)
        return found[weights]


_held: WeakKeyDictionary[torch.nn.Module, Held] = WeakKeyDictionary()


def forget(model: torch.nn.Module) -> None:
    """Forgets all that was kept of a model. It is needed where its weights were changed in a way that PyTorch does not
    count, for example through `.data`, and engine native has a copy of them."""
    _held.pop(model, None)


def held(model: Any) -> Held:
    """Returns the model's tensors, and all that was made of them as long as they are the same. Raises UserError for a
    model that the executors would not compute like transformers."""
    check_plain(model)
    spec = ModelSpec.from_config(model.config)
    tensors = tensors_of(model, spec)
    state = (spec, *(version_of(tensor) for tensor in tensors.values()))
    kept = _held.get(model)
    if kept is None or kept.state != state:
        name = str(getattr(model, "name_or_path", "") or type(model).__name__)
        checkpoint = HeldCheckpoint(name, Path(name), model.config, spec, {}, (), held=tensors)
        kept = _held[model] = Held(state, checkpoint)
    return kept


def executor_of(kept: Held, settings: EngineSettings) -> Executor:
    """Returns the executor, which is made at its first use. Raises UserError for settings that this model cannot have,
    and where a copy of the weights does not fit."""
    if settings not in kept.executors:
        checkpoint = kept.checkpoint
        own = next((name for name, dtype in DTYPES.items() if dtype == checkpoint.dtype), None)
        allowed = "a model in torch.bfloat16 or torch.float32"
        check(own is not None, "model: dtype", checkpoint.dtype, allowed)
        assert own is not None
        dtype, device = settings.dtype or own, checkpoint.device
        engine = choose_engine(settings.engine, device, settings.attention)
        if engine == "torch":
            check(dtype == own, "dtype", dtype, f"engine torch runs the model's own weights, which are {own}")
        else:
            what = f"engine native's copy of {checkpoint.name} in {dtype}"
            check_memory(checkpoint.weight_bytes(dtype), device, what)
        kept.executors[settings] = load(
            checkpoint, engine, dtype, settings.kv_dtype, device, settings.attention, settings.threads,
            settings.deterministic,
        )  # fmt: skip
    return kept.executors[settings]


def tensors_of(model: Any, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Returns the model's tensors under the names of its checkpoint: views where transformers keeps several as one.
    Raises UserError for one that is missing, misshapen or elsewhere than the others, and for one that no executor
    reads."""
    state = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    stored, shapes = family_named(spec.family).stored, spec.shapes()
    found = {name: part_of(state, name, stored(name, shape, spec)[-1], shape[0]) for name, shape in shapes.items()}
    first = found[EMBEDDING]
    for name, tensor in found.items():
        alike = (tensor.dtype, tensor.device) == (first.dtype, first.device)
        kind = f"{tensor.dtype} on {tensor.device}"
        check(alike, f"model: tensor {name}", kind, f"all must be {first.dtype} on {first.device}, as the embedding is")
    tied = not spec.tied or HEAD not in state or state[HEAD].data_ptr() == first.data_ptr()
    check(tied, f"model: tensor {HEAD}", "one of its own", "the config ties it to the embedding")
    storages = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    unread = [name for name, tensor in state.items() if tensor.untyped_storage().data_ptr() not in storages]
    check(not unread, "model: tensor", unread[:1], "no model of this config has it, and the text may depend on it")
    return found


def part_of(state: Mapping[str, torch.Tensor], name: str, stored: StoredSlice, rows: int) -> torch.Tensor:
    """Returns a tensor of a checkpoint from a model's state. transformers keeps some as parts of others."""
    whole = state.get(stored.name)
    shape = None if whole is None else tuple(whole.shape)
    check(whole is not None, f"model: tensor {name}", None, "the model must hold it (adapters must be merged first)")
    check(shape == stored.shape, f"model: tensor {stored.name}", shape, f"it must be {stored.shape}")
    assert whole is not None
    return (whole if stored.index is None else whole[stored.index])[stored.first : stored.first + rows]


def version_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns a value that changes with every change of the tensor that PyTorch counts. (It counts none for tensors
    that were made in inference mode.)"""
    count = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), count, tensor.dtype, tensor.device, tuple(tensor.shape)


def check_plain(model: Any) -> None:
    """Raises UserError for a model some of whose modules do more than its config tells: another library's, hooks of the
    user's, a replaced `forward`, dropout."""
    for name, module in model.named_modules():
        kind, at = type(module), f"model: module {name or 'model'}"
        mine = f"{kind.__module__}.".startswith(KNOWN)
        check(mine, at, f"{kind.__module__}.{kind.__qualname__}", "transformers' own modules (merge or remove others)")
        hooks: Sequence[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        foreign = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers.")]
        check(not foreign, at, "a forward hook", "none is run here; remove it")
        check("forward" not in vars(module), at, "another forward", "it is not run here; remove it")
    dropout = getattr(model.config, "attention_dropout", 0.0) if model.training else 0.0
    check(not dropout, "model: attention_dropout", dropout, "a model in training mode drops out; call model.eval()")
