"""The ways in which a family of models differs from a llama: its config, its safetensors files and its GGUF files.

Each family is one file. Its name is the `model_type` of config.json, and it ends in `FAMILY`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenswift_py.core import is_whole
from tokenswift_py.errors import UserError, check

GLOBAL, LOCAL = "global", "local"


@dataclass(frozen=True)
class LayerSpec:
    """Properties that one layer has of its own.

    window:  sliding window in tokens; None is full attention.
    rope:    name of the run's tables that rotate its queries and keys: GLOBAL, or LOCAL where the family has two bases;
             None rotates nothing (NoPE).
    experts: whether its feed-forward is a mixture of experts.
    """

    window: int | None = None
    rope: str | None = GLOBAL
    experts: bool = False


@dataclass(frozen=True)
class Experts:
    """The mixtures of a model. A row takes the `chosen` of `count` feed-forwards whose probabilities are the largest.

    width:      columns of an expert's feed-forward.
    normalised: whether the shares of the chosen ones sum to 1; else they are their probabilities among all.
    shared:     columns of the feed-forward that every row takes besides, under a gate of its own; 0 is none.
    """

    count: int
    chosen: int
    width: int
    normalised: bool
    shared: int = 0

    def __post_init__(self) -> None:
        check(self.chosen <= self.count, "num_experts_per_tok", self.chosen, f"no more than the {self.count} experts")


@dataclass(frozen=True)
class StoredSlice:
    """The part of a stored tensor that is one tensor of the model: in the tensor `name` of this shape, from row `first`
    on, and in a stack of matrices in number `index`."""

    name: str
    shape: tuple[int, ...]
    first: int = 0
    index: int | None = None


class Family:
    """A family as a llama without biases; each differs by what it overrides.

    hidden_act:   activations that its feed-forward may have, under transformers' names.
    architecture: GGUF's name of it; empty where there is none of its own.
    class_name:   transformers' class, which a GGUF file's config names.
    keys:         metadata of a GGUF file that this family reads, beyond those that all read.
    paired:       whether GGUF files hold the two halves of a head of q and k row by row.
    frequencies:  whether GGUF files may hold a factor for each frequency of RoPE (`rope_freqs`).
    lengths:      whether factors for short and long texts are read without a `rope.scaling.type` that says so.
    """

    hidden_act: tuple[str, ...] = ("silu", "swish")
    activation = "silu"
    architecture = ""
    class_name = ""
    keys: tuple[str, ...] = ()
    paired = False
    frequencies = False
    lengths = False

    def fields(self, config: Any) -> dict[str, Any]:
        """Returns the fields of ModelSpec that this family sets otherwise."""
        return {}

    def act(self, config: Any) -> Any:
        return getattr(config, "hidden_act", "silu")

    def layers(self, config: Any) -> tuple[LayerSpec, ...]:
        return tuple(LayerSpec(window) for window in windows_by_type(config))

    def stored(self, name: str, shape: tuple[int, ...], config: Any) -> Sequence[StoredSlice]:
        """Returns where safetensors files may hold a tensor, the likeliest first. The last one is where transformers'
        model holds it in memory. config: the ModelSpec."""
        return (StoredSlice(name, shape),)

    def gguf_slice(self, name: str, shape: tuple[int, ...], config: Any) -> StoredSlice:
        """Returns where a GGUF file holds a tensor, under Hugging Face's names. config: the ModelSpec."""
        return StoredSlice(name, shape)

    def gguf_fits(self, metadata: Mapping[str, Any]) -> bool:
        """Returns whether a file of this architecture is of this family."""
        return True

    def gguf_config(self, said: Any, config: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of config.json that this family adds or sets otherwise. said: the checked metadata."""
        return {}


class Mixture(Family):
    """A family whose experts are stacks in transformers, gate above up, and single matrices in files."""

    def stored(self, name: str, shape: tuple[int, ...], config: Any) -> Sequence[StoredSlice]:
        return StoredSlice(name, shape), stacked_halves(name, shape, config)

    def gguf_slice(self, name: str, shape: tuple[int, ...], config: Any) -> StoredSlice:
        return stacked(name, shape, config)


def window_of(config: Any) -> int | None:
    """Returns the width of the config's sliding windows, None where it has none."""
    width: int | None = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        return None
    check(width is None or (is_whole(width) and width >= 1), "sliding_window", width, "a number of tokens, at least 1")
    return width


def windows_everywhere(config: Any) -> tuple[int | None, ...]:
    """Returns one sliding window for all layers, or none."""
    return (window_of(config),) * int(config.num_hidden_layers)


def windows_by_type(config: Any) -> tuple[int | None, ...]:
    """Returns a sliding window for the layers that `layer_types` names, or for all if it is missing."""
    width, kinds = window_of(config), getattr(config, "layer_types", None)
    if kinds is None:
        return windows_everywhere(config)
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) != config.num_hidden_layers:
        raise UserError(
            f"layer_types: {unknown or len(kinds)} is not allowed; full_attention and sliding_attention are"
        )
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)


def count_of(config: Any, name: str) -> int:
    """Returns a size of the config. Raises UserError unless it is a whole number from 1 on."""
    size = getattr(config, name, None)
    check(is_whole(size) and size is not None and size >= 1, f"config.json: {name}", size, "a whole number, at least 1")
    return int(size or 0)


EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")


def mixture_layers(config: Any) -> tuple[bool, ...]:
    """Returns which layers of Qwen's mixtures have experts."""
    step, plain = count_of(config, "decoder_sparse_step"), config.mlp_only_layers or ()
    return tuple(layer not in plain and (layer + 1) % step == 0 for layer in range(config.num_hidden_layers))


def stacked(name: str, shape: tuple[int, ...], config: Any) -> StoredSlice:
    """Returns where an expert's matrix lies in a stack of those of all experts, as GGUF files have them. config: the
    ModelSpec."""
    found = EXPERT.fullmatch(name)
    if found is None:
        return StoredSlice(name, shape)
    at, expert, part = found.groups()
    return StoredSlice(f"{at}{part}_proj.weight", (config.experts.count, *shape), index=int(expert))


def stacked_halves(name: str, shape: tuple[int, ...], config: Any) -> StoredSlice:
    """Returns the same where gate and up are halves of one matrix, as transformers has them in memory."""
    found = EXPERT.fullmatch(name)
    if found is None:
        return StoredSlice(name, shape)
    (at, expert, part), width = found.groups(), config.experts.width
    if part == "down":
        return StoredSlice(f"{at}down_proj", (config.experts.count, *shape), index=int(expert))
    whole = (config.experts.count, 2 * width, config.hidden_size)
    return StoredSlice(f"{at}gate_up_proj", whole, width if part == "up" else 0, int(expert))
