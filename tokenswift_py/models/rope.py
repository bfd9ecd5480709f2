"""Rotary position tables, made once per run in fp32 for a fixed context N (law 2).

They include the scheme for positions that the model was not trained for (law 8).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tokenswift_py.errors import check
from tokenswift_py.kernels.base import BlockShifts, QueryTurns
from tokenswift_py.models.families.base import LOCAL
from tokenswift_py.models.positions import (
    EXTENSIONS,
    STRETCHES,
    Positions,
    extent,
    group_size,
    grouped_shifts,
    log_scale,
    log_shifts,
)
from tokenswift_py.models.spec import ModelSpec, layers_of

SUPPORTED = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


AUTO, TRAINED = Positions(), Positions("trained")


@dataclass(frozen=True)
class RopeTables:
    """The rotary tables of a run.

    cos, sin:  [context, head_dim / 2] fp32, the attention factor included.
    label:     part of the numerics contract.
    note:      line that says which scheme was chosen, where the config's own tables do not reach the context.
    positions: the scheme that was chosen, never auto.
    shifts:    rule by which queries meet far keys. None meets all keys at their true distances.
    local:     tables of layers with a base of their own (LayerSpec.rope). Positions change nothing there.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    label: str
    note: str | None = None
    positions: Positions = TRAINED
    shifts: BlockShifts | None = None
    local: RopeTables | None = None

    @property
    def context(self) -> int:
        return self.cos.shape[0]


def rope_tables(config: Any, context: int, positions: Positions = AUTO) -> RopeTables:
    """Makes the tables of a transformers config for positions 0 .. context - 1.

    Factors are whole numbers, so that runs of similar length share their numerics. Dynamic NTK is frozen at N, and so
    is LongRoPE's choice between factors for short and for long texts. Raises UserError for a scheme that this config
    cannot have.
    """
    local = local_config(config)
    config = standardized(config)
    tables = global_tables(config, context, positions)
    if local is None:
        return tables
    check_local(config, tables)
    kind = local.rope_parameters["rope_type"]
    own = tables_of(local, kind, context, context, exact=tables.shifts is not None)
    return replace(tables, local=own, label=f"{tables.label}+local-{own.label}")


def global_tables(config: Any, context: int, positions: Positions) -> RopeTables:
    """Without those of layers with a base of their own. config: standardized."""
    trained, kind = trained_length(config), config.rope_parameters.get("rope_type", "default")
    positions = chosen_positions(config, context, positions)
    if positions.scheme in STRETCHES:
        return stretched(config, context, positions.scheme)
    if positions.scheme == "trained":
        tables = tables_of(config, kind, context, context)
        note = f"context {context} is beyond the {trained} trained positions, which are met as they are"
        return replace(tables, note=None if covered(config, context) or kind == "dynamic" else note)
    return extended(tables_of(config, kind, context, trained, exact=True), trained, positions)


EXTENSION = "log-extend"  # the choice of auto; experiments/positions.py measures all schemes


def chosen_positions(config: Any, context: int, positions: Positions) -> Positions:
    """Resolves the positions asked for: never to auto, and to trained where the model needs nothing else.

    An extension gets its window and block. Raises UserError where the trained length does not hold these.
    """
    config = standardized(config)
    if covered(config, context):
        return TRAINED
    scheme = positions.scheme
    if scheme == "auto":
        dynamic = config.rope_parameters.get("rope_type") == "dynamic"  # such a config asks to be stretched
        scheme = "trained" if dynamic else EXTENSION
    if scheme not in EXTENSIONS:
        return Positions(scheme)
    return Positions(scheme, *extent(trained_length(config), replace(positions, scheme=scheme)))


def covered(config: Any, context: int) -> bool:
    """Returns whether the model knows every distance in a text of this length. Sliding windows may hide the others."""
    trained = trained_length(config)
    return context <= trained or all(
        layer.window is not None and layer.window <= trained for layer in layers_of(config)
    )


def extended(tables: RopeTables, trained: int, positions: Positions) -> RopeTables:
    """Adds an extension to the config's own tables, which moves queries for the keys beyond a window.

    positions: result of `chosen_positions`.
    """
    window, block = positions.window, positions.block
    assert window is not None and block is not None
    size = (tables.context, trained, window, block)
    if positions.scheme == "self-extend":
        group = group_size(*size)
        shifts, label = grouped_shifts(tables.context, window, block, group), f"g{group}"
        how = f"Self-Extend, beyond a window of {window} in blocks of {block} at 1/{group} of their distances"
    else:
        scale = log_scale(*size)
        shifts, label = log_shifts(tables.context, window, block, scale), f"s{scale}"
        how = f"log-extend, beyond a window of {window} in blocks of {block} at distances that grow ever slower"
    return replace(
        tables,
        label=f"{tables.label}+{positions.scheme}-w{window}-b{block}-{label}",
        note=f"context {tables.context} is beyond the {trained} trained positions: {how}",
        positions=positions,
        shifts=BlockShifts(block, shifts, trained),
    )


def stretched(config: Any, context: int, scheme: str) -> RopeTables:
    """Makes tables of frequencies stretched by the least whole factor of the original length that gives the context."""
    parameters = dict(config.rope_parameters)
    kind = parameters.get("rope_type", "default")
    allowed = f"rope type {kind} of this model is not to be stretched so; trained, self-extend and log-extend are"
    check(kind == "default" or kind == scheme, "positions", scheme, allowed)
    trained = trained_length(config)
    known = parameters.get("original_max_position_embeddings") if kind != "linear" else None
    original = known or config.max_position_embeddings
    factor = float(math.ceil(context / original))
    beyond = f"context {context} is beyond the {trained} trained positions"
    note = f"{beyond}: {NAMES[scheme]} with factor {factor:g}, {COST}"
    if scheme == "yarn":
        config.rope_parameters = parameters | {
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original
        }  # fmt: skip
        tables = tables_of(config, "yarn", context, context)
    elif scheme == "linear":
        factor *= parameters.get("factor", 1.0)  # a linear config's positions are those that it reaches by its factor
        config.rope_parameters = parameters | {"rope_type": "linear", "factor": factor}
        tables = tables_of(config, "linear", context, context)
    else:
        config.rope_parameters = parameters | {"rope_type": "dynamic", "factor": 1.0}
        tables = tables_of(config, "dynamic", context, int(factor) * original, label=f"rope-ntkx{factor:g}")
    return replace(tables, note=note, positions=Positions(scheme))


NAMES = {"linear": "position interpolation", "ntk": "NTK-aware RoPE", "yarn": "YaRN"}
COST = "which the weights were not trained for; log-extend keeps the distances that they were"


def tables_of(
    config: Any, kind: str, context: int, frozen: int, label: str | None = None, exact: bool = False
) -> RopeTables:
    """Makes the config's tables.

    frozen: length that dynamic frequencies are made for.
    exact:  whether angles are fp64. In fp32, like Hugging Face's own, they are off by up to 2^-24 of the position.
    """
    inverse, scale = inverse_frequencies(config, kind, frozen)
    parameters = config.rope_parameters
    check(bool(inverse.isfinite().all()), "rope_parameters", parameters, "frequencies must be finite")
    wide = torch.float64 if exact else torch.float32
    angles = torch.arange(context, dtype=wide)[:, None] * inverse.to(wide)[None, :]
    if label is None:
        factor_label = f"x{parameters['factor']:g}" if "factor" in parameters else ""
        length = f"@{max(frozen, config.max_position_embeddings)}" if kind == "dynamic" else ""
        if kind == "longrope":
            length = "@long" if frozen > parameters["original_max_position_embeddings"] else "@short"
        label = f"rope-{kind}{factor_label}{length}"
    cos, sin = angles.cos(), angles.sin_()
    return RopeTables(cos.float() * scale, sin.float() * scale, label)


def query_turns(rope: RopeTables, spec: ModelSpec) -> QueryTurns | None:
    """Returns the rule by which a model's queries meet far keys, None where these tables move no queries."""
    return None if rope.shifts is None else QueryTurns(rope.shifts, rope.cos, rope.sin, spec.moved(rope.shifts))


def rope_bytes(config: Any, context: int) -> int:
    """Returns the bytes that the tables take while they are made: angles, cos and sin, at most in fp64."""
    sets = 2 if any(layer.rope == LOCAL for layer in layers_of(config)) else 1
    return sets * 3 * context * head_dim(config) // 2 * torch.float64.itemsize


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_local(config: Any, tables: RopeTables) -> None:
    """Raises UserError where layers with a base of their own would meet distances that they were not trained for."""
    trained = trained_length(config)
    wide = max((layer.window or tables.context for layer in layers_of(config) if layer.rope == LOCAL), default=0)
    allowed = f"the local layers' window of {wide} is beyond {trained} trained positions; only trained"
    check(tables.shifts is None or wide <= trained, "positions", tables.positions.scheme, allowed)


def local_config(config: Any) -> Any:
    """Returns the config as layers with a RoPE base of their own see it, None where there are no such layers."""
    if not any(layer.rope == LOCAL for layer in layers_of(config)):
        return None
    return standardized(config, "sliding_attention")


def standardized(config: Any, kind_of_layer: str = "full_attention") -> Any:
    """Returns a copy with rope_parameters completed by transformers, those of one kind of layer where kinds differ.

    Raises UserError for an unsupported scaling.
    """
    config = copy.deepcopy(config)
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = head_dim(config)  # transformers' functions of frequencies multiply with it
    config.standardize_rope_params()
    if kind_of_layer in config.rope_parameters:
        config.rope_parameters = config.rope_parameters[kind_of_layer]
    kind = config.rope_parameters.get("rope_type", "default")
    check(kind in SUPPORTED, "rope_type", kind, f"supported are {', '.join(SUPPORTED)}")
    part = config.rope_parameters.get("partial_rotary_factor", 1.0)
    check(part == 1.0, "partial_rotary_factor", part, "only RoPE over the whole head is computed here")
    return config


def trained_length(config: Any) -> int:
    """Returns how many positions the model reaches without further scaling."""
    parameters = config.rope_parameters
    length = int(config.max_position_embeddings)
    original = parameters.get("original_max_position_embeddings")
    if parameters.get("rope_type") == "yarn" and original:
        return max(length, int(original * parameters["factor"]))
    return length


def inverse_frequencies(config: Any, kind: str, context: int) -> tuple[torch.Tensor, float]:
    """Returns inverse frequencies [head_dim / 2] fp32 and the factor on cos and sin, by transformers' own functions."""
    if kind == "default":
        steps = torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config)
        return 1.0 / (config.rope_parameters["rope_theta"] ** steps), 1.0
    inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=context)
    return inverse.float(), float(scale)
