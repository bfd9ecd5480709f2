"""The shapes of a decoder of the supported families, read from its Hugging Face config."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokenswift_py import registry
from tokenswift_py.core import is_whole
from tokenswift_py.errors import check
from tokenswift_py.kernels.base import BlockShifts
from tokenswift_py.models.families.base import GLOBAL, Experts, Family, LayerSpec, count_of

FOLDER = "tokenswift_py.models.families"
FAMILIES = tuple(registry.names(FOLDER))
MOST_EXPERTS = 2**18  # each has three names and shapes, which are made before any tensor is looked for


def family_named(name: str) -> Family:
    """Returns the family of this name. Raises UserError for one that has no file in the folder."""
    check(name in FAMILIES, "model family", name, f"supported are {', '.join(FAMILIES)}")
    family: Family = registry.module(FOLDER, "model family", name).FAMILY
    return family


def layers_of(config: Any) -> tuple[LayerSpec, ...]:
    return family_named(str(getattr(config, "model_type", None))).layers(config)


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and switches of one model.

    layer_specs:     properties that single layers have of their own.
    norm_offset:     number that is added to a norm's weight before it multiplies.
    post_norms:      whether the results of attention and feed-forward are normed before they are added to the residual
                     stream.
    embedding_scale: factor on a token's row of the embedding, rounded to the weights' type.
    query_scale:     factor on queries, beyond the head_dim ** -0.5 that every attention has.
    attention_cap:   soft cap of attention's scaled scores: s becomes cap * tanh(s / cap) before masks; 0 is none.
    logit_cap:       soft cap of the logits, likewise.
    activation:      activation of the gate: silu, or gelu by the tanh.
    first_layer:     number in the whole model of the first layer, where this is a stage of it.
    vocabulary:      whether embedding, final norm and LM head are there, which only the first stage has.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool
    layer_specs: tuple[LayerSpec, ...]
    trained_context: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    embedding_scale: float = 1.0
    query_scale: float = 1.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    activation: str = "silu"
    experts: Experts | None = None
    first_layer: int = 0
    vocabulary: bool = True

    @classmethod
    def from_config(cls, config: Any) -> ModelSpec:
        """Reads a transformers config. Raises UserError for a family or feature that is not supported."""
        name = str(getattr(config, "model_type", None))
        family = family_named(name)
        act = family.act(config)
        check(act in family.hidden_act, "hidden_act", act, f"of {name} supported is {family.hidden_act[0]}")
        for size in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            count_of(config, size)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        check(is_whole(kv_heads) and kv_heads >= 1, "num_key_value_heads", kv_heads, "a whole number, at least 1")
        check(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"it must divide the {heads} attention heads")
        layers, fields = family.layers(config), family.fields(config)
        experts = fields["experts"].count * len(layers) if fields.get("experts") else 0
        check(experts <= MOST_EXPERTS, "experts", experts, f"at most {MOST_EXPERTS} in all layers together")
        return cls(
            family=name,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            norm_eps=config.rms_norm_eps,
            tied=bool(config.tie_word_embeddings),
            layer_specs=layers,
            trained_context=config.max_position_embeddings,
            activation=family.activation,
            **fields,
        )

    @property
    def layers(self) -> int:
        return len(self.layer_specs)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Returns [layers] the sliding window of each layer in tokens; None is full attention."""
        return tuple(layer.window for layer in self.layer_specs)

    def at(self, layer: int) -> str:
        """Returns the beginning of the names of a layer's tensors."""
        return f"model.layers.{self.first_layer + layer}."

    def stage(self, first: int, stop: int) -> ModelSpec:
        """Returns the spec of the stage of a pipeline that holds these layers."""
        return replace(self, layer_specs=self.layer_specs[first:stop], first_layer=first, vocabulary=first == 0)

    def moved(self, shifts: BlockShifts | None) -> tuple[bool, ...]:
        """Returns [layers] whether queries are moved for far keys. They are not where windows hide such keys, nor where
        nothing rotates."""
        return tuple(
            shifts is not None and layer.rope == GLOBAL and shifts.serves(layer.window) for layer in self.layer_specs
        )

    @property
    def mlp_norm(self) -> str:
        """Returns the name of the norm before the feed-forward."""
        return "pre_feedforward_layernorm" if self.post_norms else "post_attention_layernorm"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the name and shape of every tensor of the model, under Hugging Face's names."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        if self.vocabulary:
            shapes["model.embed_tokens.weight"] = (self.vocab_size, hidden)
        for layer, kind in enumerate(self.layer_specs):
            at = self.at(layer)
            linear = {
                "self_attn.q_proj": (q, hidden, self.qkv_bias),
                "self_attn.k_proj": (kv, hidden, self.qkv_bias),
                "self_attn.v_proj": (kv, hidden, self.qkv_bias),
                "self_attn.o_proj": (hidden, q, self.o_bias),
                **self._feed_forward(kind, ffn, hidden),
            }
            for name, (rows, columns, bias) in linear.items():
                shapes[f"{at}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{at}{name}.bias"] = (rows,)
            if self.qk_norm:
                shapes[f"{at}self_attn.q_norm.weight"] = shapes[f"{at}self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
            if self.post_norms:
                for name in ("pre", "post"):
                    shapes[f"{at}{name}_feedforward_layernorm.weight"] = (hidden,)
        if self.vocabulary:
            shapes["model.norm.weight"] = (hidden,)
        if self.vocabulary and not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def _feed_forward(self, layer: LayerSpec, ffn: int, hidden: int) -> dict[str, tuple[int, int, bool]]:
        """Returns rows, columns and bias of the matrices of a layer's feed-forward."""

        def gated(at: str, width: int, bias: bool) -> dict[str, tuple[int, int, bool]]:
            wide, narrow = (width, hidden, bias), (hidden, width, bias)
            return {f"{at}gate_proj": wide, f"{at}up_proj": wide, f"{at}down_proj": narrow}

        if self.experts is None or not layer.experts:
            return gated("mlp.", ffn, self.mlp_bias)
        found = {"mlp.gate": (self.experts.count, hidden, False)}
        for expert in range(self.experts.count):
            found |= gated(f"mlp.experts.{expert}.", self.experts.width, False)
        if self.experts.shared:
            found |= gated("mlp.shared_expert.", self.experts.shared, False)
            found["mlp.shared_expert_gate"] = (1, hidden, False)
        return found

    def folded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a norm's weight with its offset and scale applied, in fp32 or better where it has any. Any other
        tensor is returned unchanged."""
        own = (self.norm_offset, self.query_scale) == (0.0, 1.0) or not name.endswith("norm.weight")
        if own:
            return tensor
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        return (wide + self.norm_offset) * (self.query_scale if name.endswith("q_norm.weight") else 1.0)

    @property
    def score_scale(self) -> float:
        """Returns the factor on attention's scores that is left where no norm of queries has taken `query_scale`."""
        return 1.0 if self.qk_norm else self.query_scale

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    @property
    def multiplied(self) -> int:
        """Returns the number of parameters that every token is multiplied with. Of an untied embedding only rows are
        read, of experts only those that are chosen."""
        idle = 0 if self.tied or not self.vocabulary else self.vocab_size * self.hidden_size
        if self.experts is not None:
            mixtures = sum(layer.experts for layer in self.layer_specs)
            each = 3 * self.experts.width * self.hidden_size
            idle += mixtures * (self.experts.count - self.experts.chosen) * each
        return self.parameters - idle

    def kv_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Returns the bytes of keys and values of `tokens` tokens in all layers, and of the scales beside int8."""
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        return 2 * self.layers * self.kv_heads * (self.head_dim * dtype.itemsize + scale) * tokens

    def keys_seen(self, context: float) -> float:
        """Returns the number of keys that a row after `context` tokens meets in all layers: windows hide some."""
        return sum(min(context, window or context) for window in self.windows)

    def kv_bytes_read(self, context: float, dtype: torch.dtype) -> float:
        """Returns the bytes of keys and values that such a row reads."""
        return self.kv_bytes(1, dtype) / self.layers * self.keys_seen(context)


def check_caps(spec: ModelSpec, attention: str) -> None:
    """Raises UserError for a model whose scores the attention of this name does not cap."""
    uncapped = f"it has no soft cap of scores ({spec.family}); sdpa, flash and triton have one"
    check(caps(spec, attention), "attention", attention, uncapped)


def caps(spec: ModelSpec, attention: str) -> bool:
    """Returns whether a backend caps attention's scores, or need not."""
    able: bool = registry.says("tokenswift_py.kernels", "attention", attention, "CAPS_SCORES", False)
    return able or not spec.attention_cap


def part_of(name: str, spec: ModelSpec) -> tuple[str, int]:
    """Returns the native engine's name of a weight or bias, and its layer, -1 for those of no layer."""
    stem, kind = name.rsplit(".", 1)
    layer = -1
    if stem.startswith("model.layers."):
        _, _, number, stem = stem.split(".", 3)
        layer = int(number) - spec.first_layer
    if stem == "post_attention_layernorm":
        part = "attention_norm" if spec.post_norms else "post_norm"
    elif stem == spec.mlp_norm:
        part = "post_norm"
    else:
        part = stem.removeprefix("self_attn.").removeprefix("mlp.").replace("shared_expert.", "shared.")
        part = PARTS.get(part, part.removesuffix("_proj"))
    return part + ("_bias" if kind == "bias" else ""), layer


PARTS = {"model.embed_tokens": "embed", "lm_head": "head", "model.norm": "final_norm", "input_layernorm": "input_norm",
         "post_feedforward_layernorm": "ffn_norm", "gate": "router", "shared_expert_gate": "shared_gate"}  # fmt: skip
