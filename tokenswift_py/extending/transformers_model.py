"""Makes transformers' model of a checkpoint, whether its files are safetensors or GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.checkpoints.loading import transformers_config
from tokenswift_py.models.spec import ModelSpec, family_named


def in_hugging_faces_form(spec: ModelSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns tensors as transformers' model holds them in memory. tensors: those of a checkpoint, by its names."""
    family, state = family_named(spec.family), dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        place = family.stored(name, tuple(tensor.shape), spec)[-1]
        whole = state.setdefault(place.name, tensor.new_empty(place.shape))
        rows = slice(place.first, place.first + len(tensor))
        (whole if place.index is None else whole[place.index])[rows] = tensor
    return state


def hugging_face(checkpoint: Checkpoint, dtype: torch.dtype, config: Any = None, **settings: Any) -> Any:
    """Makes transformers' own model of a checkpoint. It gets the weights that we read, also those of a GGUF file.

    config: another config than the checkpoint's, of the same shapes. settings: arguments of `from_config`.
    """
    from transformers import AutoModelForCausalLM

    config = config or transformers_config(checkpoint.folder)
    state = in_hugging_faces_form(checkpoint.spec, dict(checkpoint.tensors(dtype=dtype)))
    if checkpoint.spec.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **settings).eval()
    model.load_state_dict(state)
    return model
