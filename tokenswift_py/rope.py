"""Rotary position tables, made once per run in fp32 for a fixed context N (law 2)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tokenswift_py.errors import UserError, check

SUPPORTED = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class RopeTables:
    """cos, sin: [context, head_dim / 2] fp32, the attention factor included. `label` is part of the numerics
    contract, `note` says what was chosen when the model's own scaling did not reach."""

    cos: torch.Tensor
    sin: torch.Tensor
    label: str
    note: str | None = None

    @property
    def context(self) -> int:
        return self.cos.shape[0]


def rope_tables(config: Any, context: int) -> RopeTables:
    """Tables of a transformers config for positions 0 .. context - 1.

    Beyond the trained length a model without scaling gets YaRN (arXiv 2309.00071) with the smallest whole factor
    that suffices (whole, so that runs of similar length share their numerics), and a YaRN model a larger factor.
    Dynamic NTK is frozen at N, and so is LongRoPE's choice between factors for short and for long texts. Raises
    UserError for scalings that end before `context`.
    """
    config = copy.deepcopy(config)
    check_rope(config)
    parameters = dict(config.rope_parameters)
    kind = parameters.get("rope_type", "default")
    trained = trained_length(config)
    note = None
    if context > trained and kind != "dynamic":
        if kind not in ("default", "yarn"):
            raise UserError(f"context: {context} is not allowed; rope type {kind} of this model ends at {trained}")
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        factor = float(math.ceil(context / original))
        parameters |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        note = f"context {context} is beyond the {trained} trained positions: YaRN with factor {factor:g}"
        kind = "yarn"
    config.rope_parameters = parameters
    inverse, scale = inverse_frequencies(config, kind, context)
    check(bool(inverse.isfinite().all()), "rope_parameters", parameters, "frequencies must be finite")
    angles = torch.arange(context, dtype=torch.float32)[:, None] * inverse[None, :]
    factor_label = f"x{parameters['factor']:g}" if "factor" in parameters else ""
    frozen = f"@{max(context, config.max_position_embeddings)}" if kind == "dynamic" else ""
    if kind == "longrope":
        frozen = "@long" if context > parameters["original_max_position_embeddings"] else "@short"
    return RopeTables(angles.cos() * scale, angles.sin() * scale, f"rope-{kind}{factor_label}{frozen}", note)


def rope_bytes(config: Any, context: int) -> int:
    """What the tables take while they are made: angles, cos and sin."""
    return 3 * context * head_dim(config) // 2 * torch.float32.itemsize


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_rope(config: Any) -> None:
    """Raise UserError for a scaling that is not supported."""
    config.standardize_rope_params()
    kind = config.rope_parameters.get("rope_type", "default")
    whole = config.rope_parameters.get("partial_rotary_factor", 1.0) == 1.0
    if kind not in SUPPORTED or not whole:
        raise UserError(
            f"rope_type: {kind!r} is not allowed; supported are {', '.join(SUPPORTED)}, over the whole head"
        )


def trained_length(config: Any) -> int:
    """Positions the model reaches without further scaling."""
    parameters = config.rope_parameters
    length = int(config.max_position_embeddings)
    original = parameters.get("original_max_position_embeddings")
    if parameters.get("rope_type") == "yarn" and original:
        return max(length, int(original * parameters["factor"]))
    return length


def inverse_frequencies(config: Any, kind: str, context: int) -> tuple[torch.Tensor, float]:
    """[head_dim / 2] fp32 and the factor on cos and sin, from transformers' own functions."""
    if kind == "default":
        steps = torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config)
        return 1.0 / (config.rope_parameters["rope_theta"] ** steps), 1.0
    inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=context)
    return inverse.float(), float(scale)
