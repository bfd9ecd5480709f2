"""Writes GGUF files of tiny models in the layout of llama.cpp's converter."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    TokenType,
    get_tensor_name_map,
)
from gguf.quants import quantize

from conftest import tiny_config, tiny_model, tiny_tokenizer
from k_quants import WRITERS, quantised
from tokenswift_py.models.spec import ModelSpec

Floats = npt.NDArray[np.float32]
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "smollm3": MODEL_ARCH.SMOLLM3,
    "phi3": MODEL_ARCH.PHI3,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "mixtral": MODEL_ARCH.LLAMA,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "qwen2_moe": MODEL_ARCH.QWEN2MOE,
}
PAIRED = ("llama", "smollm3", "mixtral")  # whose rows of q and k llama.cpp's converter puts in another order
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 32}
# Where the fp16 scales lie in a block, for types that neither gguf.quants nor k_quants writes.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,)}
VALUES = ("F32", "F16", "BF16")
EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *WRITERS, *VALUES)  # that --dtype gguf keeps to the bit
KINDS = (*EXACT, *SCALES)


def gguf_config(family: str, **changes: Any) -> Any:
    sizes = {**SIZES, "vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 1024}
    return tiny_config(family, **{**sizes, **changes})


def encoded(weights: Floats, kind: str, seed: int) -> npt.NDArray[Any]:
    """Returns the weights in this type. One that nothing writes gets random blocks of about their size instead."""
    if kind == "F16":
        return weights.astype(np.float16)
    if kind == "F32":
        return weights
    if kind in WRITERS:
        return quantised(weights, kind)
    if kind not in SCALES:
        return quantize(weights, GGMLQuantizationType[kind])
    columns, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (len(weights), weights.shape[1] // columns, block_bytes)).astype(np.uint8)
    for at in SCALES[kind]:
        scale = rng.uniform(1, 3, raw.shape[:2]) * 1e-3
        raw[..., at : at + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(len(weights), -1)


def own_metadata(config: Any) -> dict[str, int]:
    """Returns the metadata that llama.cpp's converter writes of a family besides what it writes of all."""
    names = {
        "expert_count": ("num_local_experts", "num_experts"),
        "expert_used_count": ("num_experts_per_tok",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    }
    found = {key: getattr(config, name, None) for key, known in names.items() for name in known}
    if config.model_type in ("phi3", "gemma2", "gemma3_text"):
        found["attention.sliding_window"] = config.sliding_window
    return {key: value for key, value in found.items() if value}


def write_gguf(
    path: Path,
    config: Any,
    kinds: Mapping[str, str],
    default: str = "F32",
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    change: Callable[[GGUFWriter], None] = lambda writer: None,
    without: Collection[str] = (),
    more: Mapping[str, npt.NDArray[Any]] | None = None,
    parts: int = 1,
    small_first: bool = False,
) -> Path:
    """Writes a model of this config, random unless `state` has its weights, and returns its (first) file.

    kinds:   GGML types by the last parts of Hugging Face's names.
    change:  function that gets the writer, to add metadata.
    without: keys of the architecture and names of tensors that are left out.
    more:    further tensors.
    parts:   number of files that the model is split into.
    small_first: whether a part without tensors comes before them.
    """
    family, spec = MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]], ModelSpec.from_config(config)
    tensors = gguf_tensors_of(config, state or tiny_model(config, torch.float32).state_dict(), kinds, default)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in without}
    tensors |= {name: (data, GGMLQuantizationType.F32) for name, data in (more or {}).items()}
    limit = {"split_max_tensors": -(-len(tensors) // parts)} if parts > 1 else {}
    writer = GGUFWriter(path, family, **limit, small_first_shard=small_first)
    for key, value in {
        "block_count": spec.layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "rope.dimension_count": spec.head_dim,
        "vocab_size": spec.vocab_size,
        **own_metadata(config),
    }.items():
        if key not in without:
            writer.add_uint32(f"{family}.{key}", value)
    if "rope.freq_base" not in without:
        rope = config.rope_parameters
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    for key, cap in {"attn_logit_softcapping": spec.attention_cap, "final_logit_softcapping": spec.logit_cap}.items():
        if cap and key not in without:
            writer.add_float32(f"{family}.{key}", cap)
    add_tokenizer(writer)
    change(writer)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts += small_first
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf")


def gguf_tensors_of(
    config: Any, state: Mapping[str, torch.Tensor], kinds: Mapping[str, str], default: str
) -> dict[str, tuple[npt.NDArray[Any], GGMLQuantizationType]]:
    """Returns the tensors under GGUF's names. q and k of llama have llama.cpp's order of rows."""
    spec = ModelSpec.from_config(config)
    names, tensors = get_tensor_name_map(ARCHITECTURES[config.model_type], spec.layers), {}
    for seed, (name, weights) in enumerate(as_converted(spec, config, state)):
        stem, suffix = name.rsplit(".", 1)
        shape = weights.shape
        part = stem.split(".")[-1]
        if config.model_type in PAIRED and part in ("q_proj", "k_proj"):
            heads = spec.heads if part == "q_proj" else spec.kv_heads
            weights = weights.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)
        kind = kinds.get(part, default) if len(shape) > 1 and not stem.endswith(("mlp.gate", "expert_gate")) else "F32"
        if stem.endswith("shared_expert_gate"):
            weights = weights.reshape(-1)  # ggml does not write outer dimensions of 1
        data = encoded(np.ascontiguousarray(weights), kind, seed)
        tensors[f"{names.get_name(stem)}.{suffix}"] = data, GGMLQuantizationType[kind]
    return tensors


def as_converted(spec: ModelSpec, config: Any, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Floats]]:
    """Returns transformers' tensors under its names, changed like llama.cpp's converter changes them but for the rows
    of q, k."""
    simple = all(name in state for name in spec.shapes())
    for name in spec.shapes() if simple else state:
        weights = state[name].numpy()
        if name == "lm_head.weight" and spec.tied:
            continue
        if spec.norm_offset and name.endswith("norm.weight"):
            weights = weights + 1
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), np.split(weights, 2, 1), strict=True):
                yield name.replace("gate_up_proj", f"{part}_proj.weight"), np.ascontiguousarray(half)
        else:
            yield name + ("" if "." in name and name.endswith(("weight", "bias")) else ".weight"), weights


def add_tokenizer(writer: GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = set(tokenizer.all_special_tokens) | {"<|endoftext|>", "<|im_start|>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
