"""Makes the config.json of a GGUF file from its metadata. Keys, defaults and their meaning are llama.cpp's.

Metadata that would change the text and that is not computed here is refused in one line. It is never dropped.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; defaults: `load_hparams` in llama.cpp's
src/llama-model.cpp, RoPE scaling: the constructor in its src/llama-context.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from tokenswift_py.checkpoints.gguf_file import GgufFile, StoredTensor
from tokenswift_py.checkpoints.gguf_tokenizer import ENDINGS
from tokenswift_py.core import is_finite, is_whole
from tokenswift_py.errors import check
from tokenswift_py.models.spec import FAMILIES, family_named

# These keys of an architecture are read by `config_of`, or the tensors' shapes give their values too.
READ = (
    "context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned",
)  # fmt: skip
# These are other keys, each with the only value that leaves the arithmetic as it is here.
NEUTRAL: dict[str, Any] = {
    "expert_count": 0, "expert_used_count": 0, "attention.causal": True, "attention.sliding_window": 0,
    "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.yarn_log_multiplier": 0.0,
    "tensor_data_layout": "Meta AI original pth",
}  # fmt: skip
# These tensors hold factors of RoPE's frequencies: those of Llama 3's scaling, and the two sets of LongRoPE.
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (FREQUENCIES, LONG, SHORT)
# These are the families of each of GGUF's names, some with several. llama.cpp calls Mistral's models llama, too.
ARCHITECTURES: dict[str, list[str]] = {}
for _name in FAMILIES:
    if _architecture := family_named(_name).architecture:
        ARCHITECTURES.setdefault(_architecture, []).append(_name)
ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
TOKENS = "tokenizer.ggml.tokens"
SAMPLING = "general.sampling."  # what begins the keys of recommended sampling parameters
# These of them have other names in transformers. The rest have the same, or are not read.
SAMPLING_NAMES = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
SAMPLED = ("temperature", "top_k", "top_p", "min_p")  # transformers reads these with do_sample only


class Metadata:
    """The values of a file's own architecture, each checked when it is asked for."""

    def __init__(self, file: GgufFile):
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture", ""))
        allowed = f"GGUF files of {', '.join(ARCHITECTURES)} are supported"
        check(self.architecture in ARCHITECTURES, "model family", self.architecture, allowed)
        families = ARCHITECTURES[self.architecture]
        self.name = next(name for name in families if family_named(name).gguf_fits(file.metadata))
        self.family = family_named(self.name)
        kind = file.metadata.get("general.type", "model")
        check(kind == "model", "model: general.type", kind, f"{file.name} must be a model")

    def check_keys(self) -> None:
        """Raises UserError for a key that nothing here reads, unless its value changes nothing."""
        for key, found in self.file.metadata.items():
            part = key.removeprefix(f"{self.architecture}.")
            if part != key and part not in (*READ, *self.family.keys):
                wanted = NEUTRAL.get(part)
                only = "it is not read" if wanted is None else f"only {wanted!r}"
                allowed = f"from a GGUF file {only}; a folder of the same model has it in config.json"
                check(wanted is not None and np.array_equal(found, wanted), f"model: {key}", found, allowed)

    def number(self, part: str, default: float | None = None, whole: bool = False) -> Any:
        """Returns a finite number. If there is one for each layer, all must be the same. Without a default the file
        must have it."""
        key = f"{self.architecture}.{part}"
        found = self.file.metadata.get(key, default)
        values = np.unique(found).tolist() if isinstance(found, np.ndarray) else [found]
        check(len(values) == 1, f"model: {key}", found, "only the same number for every layer")
        value = values[0]
        right = is_whole(value) if whole else is_finite(value)
        check(right, f"model: {key}", value, f"{self.file.name} must have {'a whole' if whole else 'a finite'} number")
        return value

    def size(self, part: str, default: int | None = None) -> int:
        found: int = self.number(part, default, whole=True)
        check(found >= 1, f"model: {self.architecture}.{part}", found, "at least 1")
        return found


def config_of(file: GgufFile) -> dict[str, Any]:
    """Returns the config.json of the same model. Raises UserError for metadata that is missing or not supported."""
    said = Metadata(file)
    said.check_keys()
    heads, hidden = said.size("attention.head_count"), said.size("embedding_length")
    head_dim = said.size("attention.key_length", hidden // heads)
    for part in ("attention.value_length", "rope.dimension_count"):
        found = said.size(part, hidden // heads if "value" in part else head_dim)
        check(found == head_dim, f"model: {said.architecture}.{part}", found, f"only that of the keys, {head_dim}")
    tokens = file.metadata.get(TOKENS)
    check(isinstance(tokens, list), f"model: {TOKENS}", tokens, f"{file.name} must have a list of tokens")
    config = {
        "model_type": said.name,
        "architectures": [said.family.class_name],
        "vocab_size": len(tokens or ()),
        "hidden_size": hidden,
        "intermediate_size": said.size("feed_forward_length"),
        "num_hidden_layers": said.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": said.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": said.size("context_length"),
        "rms_norm_eps": said.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(said, head_dim),
        "sliding_window": None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": said.name != "qwen2" and any(biases(file, "attn")),
        "mlp_bias": any(biases(file, "ffn")),
        **token_ids(file),
    }
    return {**config, **said.family.gguf_config(said, config)}


def biases(file: GgufFile, block: str) -> Iterable[str]:
    return (name for name in file.tensors if f".{block}_" in name and name.endswith(".bias"))


def token_ids(file: GgufFile) -> dict[str, Any]:
    """Returns the token that begins a text, and those that the file says end one."""
    ends = named_ends(file)
    begin = file.metadata.get("tokenizer.ggml.bos_token_id")
    return {"bos_token_id": begin, "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None)}


def named_ends(file: GgufFile) -> dict[int, None]:
    return dict.fromkeys(int(file.metadata[key]) for key in ENDS if key in file.metadata)


def generation_of(file: GgufFile) -> dict[str, Any]:
    """Returns the generation_config.json of a file, empty where the config says all.

    It has all tokens that end a text. A file names one to three of them, and llama.cpp knows others by their text: a
    chat model of Qwen's ends an answer by <|im_end|>, which is named, and a text that is no answer by <|endoftext|>,
    which is not. Beside <eos>, </s> is a tag of HTML (Gemma).
    """
    named, tokens = named_ends(file), file.metadata[TOKENS]
    endings = ENDINGS - {"</s>"} if "<eos>" in tokens else ENDINGS
    ends = named | dict.fromkeys(token for token, text in enumerate(tokens) if text in endings)
    return {**sampling_of(file), **({"eos_token_id": list(ends)} if ends != named else {})}


def sampling_of(file: GgufFile) -> dict[str, Any]:
    """Returns the sampling parameters that a file recommends.

    With any of SAMPLED it is sampled from, unless its temperature is 0. transformers' own files leave out what is a
    default there, and so do the GGUF files that are made from them.
    """
    asked: dict[str, Any] = {
        SAMPLING_NAMES.get(name, name): float(f"{value:.6g}") if isinstance(value, float) else value
        for key, value in file.metadata.items()
        if (name := key.removeprefix(SAMPLING)) != key and isinstance(value, int | float | str)
    }
    sampled = not asked.keys().isdisjoint(SAMPLED) and asked.get("temperature", 1) > 0
    return {"do_sample": True, **asked} if sampled else {name: asked[name] for name in asked if name not in SAMPLED}


def rope_parameters(said: Metadata, head_dim: int) -> dict[str, Any]:
    """Returns RoPE's parameters under transformers' names.

    A factor for each frequency (llama.cpp divides by it) is LongRoPE's form, with the same factors for short and long
    texts where there is only one set.
    """
    kind = said.file.metadata.get(f"{said.architecture}.rope.scaling.type", "linear")
    if said.family.lengths and LONG in said.file.tensors:
        kind = "longrope"
    factor = said.number("rope.scaling.factor", said.number("rope.scale_linear", 0.0)) or 1.0
    attention = said.number("rope.scaling.attn_factor", 1.0)
    sets = factor_sets(said, kind, head_dim)
    key = f"model: {said.architecture}.rope.scaling"
    check(kind in ("none", "linear", "yarn", "longrope"), f"{key}.type", kind, "none, linear, yarn or longrope")
    check(factor > 0, f"{key}.factor", factor, "above 0")
    scaled = attention == 1 or (kind == "yarn" and factor != 1) or kind == "longrope"
    check(scaled, f"{key}.attn_factor", attention, f"with scaling {kind} only 1.0")
    base = {"rope_theta": said.number("rope.freq_base", 10_000.0)}
    original = said.size("rope.scaling.original_context_length", said.size("context_length"))
    if sets:
        check(kind != "yarn" or factor == 1, f"{key}.type", kind, f"not beside {FREQUENCIES}")
        scale = 1.0 if kind in ("none", "yarn") else factor
        short, long = ([scale * value for value in values] for values in sets)
        return {**base, "rope_type": "longrope", "short_factor": short, "long_factor": long, "factor": 1.0,
                "attention_factor": attention, "original_max_position_embeddings": original}  # fmt: skip
    if kind == "none" or factor == 1:
        return {**base, "rope_type": "default"}
    if kind == "linear":
        return {**base, "rope_type": "linear", "factor": factor}
    return {**base, **yarn(said, factor, attention), "original_max_position_embeddings": original}


def yarn(said: Metadata, factor: float, attention: float) -> dict[str, Any]:
    """Returns the parameters of YaRN. attention: the number by which llama.cpp multiplies YaRN's attention factor."""
    own = {} if attention == 1 else {"attention_factor": attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)}
    fast, slow = said.number("rope.scaling.yarn_beta_fast", 32.0), said.number("rope.scaling.yarn_beta_slow", 1.0)
    return {"rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow, **own}


def factor_sets(said: Metadata, kind: str, head_dim: int) -> tuple[list[float], list[float]] | None:
    """Returns the factors of the frequencies for short and for long texts, or None if all factors are one.

    Raises UserError for factors that llama.cpp does not read with this architecture or scaling.
    """
    there = [name for name in FACTORS if name in said.file.tensors]
    read = (said.family.frequencies or said.family.lengths) and kind == "longrope"
    used = [SHORT, LONG] if read else [FREQUENCIES] if said.family.frequencies else []
    for name in used if kind == "longrope" else ():
        check(name in there, f"model: tensor {name}", None, f"{said.file.name} must hold it, as its scaling is {kind}")
    scaling = f"model: {said.architecture}.rope.scaling.type"
    check(kind != "longrope" or bool(used), scaling, kind, f"not of {said.name}")
    found = {name: factors(said.file.tensors[name], head_dim) for name in there}
    for name, values in found.items():
        ones, allowed = set(values) == {1}, f"with {said.architecture} and scaling {kind} only ones"
        check(name in used or ones, f"model: tensor {name}", values, allowed)
    sets = [found[name] for name in used if name in found]
    if not sets or (kind != "longrope" and set(sets[0]) == {1}):
        return None
    return sets[0], sets[-1]


def factors(tensor: StoredTensor, head_dim: int) -> list[float]:
    name = f"model: tensor {tensor.name}"
    check(tensor.kind == "F32", f"{name}: type", tensor.kind, "F32")
    check(tensor.shape == (head_dim // 2,), name, tensor.shape, f"it must be {(head_dim // 2,)}")
    values = np.fromfile(tensor.path, "<f4", head_dim // 2, offset=tensor.offset)
    check(bool((np.isfinite(values) & (values > 0)).all()), name, values.tolist(), "finite factors above 0")
    return [float(value) for value in values]
