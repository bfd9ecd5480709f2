"""DFlash's draft: a few decoder layers that guess a whole block of tokens in one pass (Chen et al. 2026, arXiv
2602.06036, and the authors' code).

Each layer's keys and values of the text's rows are made of c_p = rms(fc [what entered some layers of the target at p]).
The block stands after these rows: the pending token first, then tokens that are masks. Its rows attend to the text's
and to all of the block's, and go through the layers like those of any decoder. The target's LM head reads the last norm
of each masked row, and guesses the token at the row's own position.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.drafters.draft_folders import (
    FIELD,
    check_tensors,
    checked_layer,
    checked_taps,
    config_of,
    rope_config,
    stored_tensors,
    whole,
)
from tokenswift_py.drafters.own_layers import OwnLayers, Window
from tokenswift_py.errors import check
from tokenswift_py.models.spec import ModelSpec

UNREAD = re.compile(r".*rotary_emb\.inv_freq")


@dataclass(frozen=True)
class DFlashShape:
    """The sizes of a draft.

    hidden: size of its states and the target's. ffn: columns of a feed-forward. block: rows of a block at most.
    mask: the token whose embedding stands for one that is not known. taps: layers of the target, ascending, whose
    inputs it reads. rope: config of transformers by which it rotates.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    block: int
    mask: int
    eps: float
    taps: tuple[int, ...]
    rope: Any

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor."""
        q, kv, hidden = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden
        found: dict[str, tuple[int, ...]] = {
            "fc.weight": (hidden, len(self.taps) * hidden),
            "hidden_norm.weight": (hidden,),
            "norm.weight": (hidden,),
        }
        for layer in range(self.layers):
            at = f"layers.{layer}."
            found |= {f"{at}{name}layernorm.weight": (hidden,) for name in ("input_", "post_attention_")}
            found |= {f"{at}self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
            found |= {f"{at}self_attn.{name}_proj.weight": (kv, hidden) for name in "kv"}
            found |= {f"{at}self_attn.q_proj.weight": (q, hidden), f"{at}self_attn.o_proj.weight": (hidden, q)}
            found |= {f"{at}mlp.{name}_proj.weight": (self.ffn, hidden) for name in ("gate", "up")}
            found[f"{at}mlp.down_proj.weight"] = (hidden, self.ffn)
        return found


class DFlashLayers(OwnLayers):
    """The tensors of a draft, those of `DFlashShape.shapes`, and its arithmetic. embedding: [vocab, hidden] the
    target's."""

    def __init__(self, shape: DFlashShape, tensors: Mapping[str, torch.Tensor], embedding: torch.Tensor):
        super().__init__(tensors, embedding, shape.taps, shape.eps, shape.rope)
        self.shape = shape

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """Returns c [R, hidden] of rows [R, taps, hidden] of the target."""
        return self.norm(self.linear(taps.flatten(1), "fc"), "hidden_norm")

    def keys_values(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a layer's keys, not rotated, and values, [R, kv_heads, head_dim] each."""
        at = f"layers.{layer}.self_attn."
        keys, values = (
            self.linear(x, f"{at}{part}_proj").unflatten(1, (self.shape.kv_heads, self.shape.head_dim)) for part in "kv"
        )
        return self.norm(keys, f"{at}k_norm"), values

    def guess(self, windows: Sequence[Window], pending: int) -> torch.Tensor:
        """Returns [block - 1, hidden] what the target's LM head reads of a block after the rows of these windows.

        windows: one for each layer.
        """
        shape, first = self.shape, len(windows[0])
        self.reach(first + shape.block)
        tokens = torch.full((shape.block,), shape.mask)
        tokens[0] = pending
        x = self.embedded(tokens)
        for layer, window in enumerate(windows):
            at = f"layers.{layer}."
            normed = self.norm(x, f"{at}input_layernorm")
            own_keys, own_values = self.keys_values(layer, normed)
            keys, values = (torch.cat(pair) for pair in ((window.keys, own_keys), (window.values, own_values)))
            queries = self.linear(normed, f"{at}self_attn.q_proj").unflatten(1, (shape.heads, shape.head_dim))
            queries = self.rotate(self.norm(queries, f"{at}self_attn.q_norm"), first)
            mixed = self._attention(queries, self.rotate(keys, 0), values)
            x = x + self.linear(mixed, f"{at}self_attn.o_proj")
            normed = self.norm(x, f"{at}post_attention_layernorm")
            x = x + self.gated(normed, f"{at}mlp.")
        return self.norm(x[1:], "norm")

    def _attention(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns [Q, heads head_dim]. All queries see all keys.

        queries: [Q, heads, head_dim]. keys, values: [K, kv_heads, head_dim].
        """
        q, k, v = (x.transpose(0, 1)[None] for x in (queries, keys, values))
        attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return attended[0].transpose(0, 1).flatten(1)


def read_dflash(folder: Path, checkpoint: Checkpoint) -> DFlashLayers:
    """Reads a draft and checks it against the model that it drafts for. Raises UserError."""
    shape = shape_of(config_of(str(folder)) or {}, checkpoint.spec)
    found = dict(stored_tensors(folder, lambda name: name.removeprefix("model."), UNREAD))
    check_tensors(found, shape.shapes())
    return DFlashLayers(shape, found, checkpoint.tensors(dtype=torch.bfloat16)["model.embed_tokens.weight"])


def shape_of(config: Mapping[str, Any], spec: ModelSpec) -> DFlashShape:
    """Reads a config.json and checks it against the model. Raises UserError for what is not computed here."""
    own = config.get("dflash_config") or {}
    check(isinstance(own, dict), f"{FIELD}: dflash_config", own, "fields")
    for name, allowed in (("projector_type", (None, "dflash")), ("shift_label", (None, False))):
        check(own.get(name) in allowed, f"{FIELD}: {name}", own.get(name), "only DFlash's own")
    kinds = set(config.get("layer_types") or ["full_attention"])
    check(kinds == {"full_attention"}, f"{FIELD}: layer_types", sorted(map(str, kinds)), "only full_attention")
    eps, hidden, heads = checked_layer(config), whole(config, "hidden_size"), whole(config, "num_attention_heads")
    layers, block = whole(config, "num_hidden_layers"), whole(config, "block_size")
    check(hidden == spec.hidden_size, f"{FIELD}: hidden_size", hidden, f"the model's is {spec.hidden_size}")
    check(block >= 2, f"{FIELD}: block_size", block, "at least 2")
    mask = own.get("mask_token_id")
    fine = isinstance(mask, int) and 0 <= mask < spec.vocab_size
    check(fine, f"{FIELD}: mask_token_id", mask, f"a token of 0 to {spec.vocab_size - 1}")
    assert mask is not None
    ids = own.get("target_layer_ids") or usual_ids(whole(config, "num_target_layers", spec.layers), layers)
    check(isinstance(ids, list) and all(isinstance(i, int) for i in ids), f"{FIELD}: target_layer_ids", ids, "layers")
    taps = checked_taps(tuple(i + 1 for i in ids), len(ids), spec.layers)  # they name what leaves a layer
    return DFlashShape(
        hidden, layers, heads, whole(config, "num_key_value_heads", heads),
        whole(config, "head_dim", hidden // heads), whole(config, "intermediate_size"), block, mask, eps, taps,
        rope_config(config),
    )  # fmt: skip


def usual_ids(layers: int, count: int) -> list[int]:
    """Returns the layers of a target whose outputs the authors' code reads: `count` from the second to the last but
    three."""
    if count == 1:
        return [layers // 2]
    return [round(1 + i * (layers - 4) / (count - 1)) for i in range(count)]
