"""Makes the config of a model whose frequencies are stretched for good. transformers and our engines can read it."""

from __future__ import annotations

from typing import Any

from tokenswift_py.errors import check
from tokenswift_py.models.families.base import LOCAL
from tokenswift_py.models.rope import head_dim, standardized, trained_length
from tokenswift_py.models.spec import layers_of


def stretched_config(config: Any, context: int, scheme: str) -> Any:
    """Returns a copy of a transformers config that reaches `context` positions by its own tables.

    linear: frequencies are divided by the factor (arXiv 2306.15595).
    ntk:    the base is multiplied by factor ** (d / (d - 2)), so that the lowest frequency is divided by the factor and
            the highest stays (NTK-aware RoPE). In the config only the base is new.
    yarn:   YaRN (arXiv 2309.00071).
    The factor is the context over the length that the frequencies were made for. Raises UserError for a context that
    the model has already, for a model with a scaling of another kind, and for layers that no such table serves alone.
    """
    trained = original_length(config)
    check(context > trained, "context", context, f"more than the {trained} positions that the model was trained for")
    cap = getattr(config, "attn_logit_softcapping", None)
    check(not cap, "attn_logit_softcapping", cap, "the attention of extend-context has no soft cap")
    config = standardized(config)
    parameters = dict(config.rope_parameters)
    kind = parameters.get("rope_type", "default")
    allowed = f"rope type {kind} of this model is not to be stretched so"
    check(kind == "default" or kind == scheme, "positions", scheme, allowed)
    known = parameters.get("original_max_position_embeddings") if kind == "yarn" else None
    first = int(known or config.max_position_embeddings)
    factor = context / first
    if scheme == "linear":
        parameters |= {"rope_type": "linear", "factor": factor * parameters.get("factor", 1.0)}
    elif scheme == "ntk":
        width = head_dim(config)
        parameters["rope_theta"] = parameters["rope_theta"] * factor ** (width / (width - 2))
    else:
        parameters |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": first}
    config.rope_parameters = parameters
    config.max_position_embeddings = context
    return config


def original_length(config: Any) -> int:
    """Returns how many positions a model was trained for. Raises UserError for layers that see only a part of them."""
    specs = layers_of(config)
    windows = {layer.window for layer in specs} - {None}
    allowed = "extend-context trains models whose layers see the whole text, and rotate by one base"
    check(not windows, "sliding_window", sorted(window or 0 for window in windows), allowed)
    check(all(layer.rope != LOCAL for layer in specs), "rope_parameters", "local layers", allowed)
    return trained_length(standardized(config))
