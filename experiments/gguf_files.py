"""Makes GGUF files to measure: a random model of a Qwen 2 shape, and files in other types by llama.cpp's quantiser."""

from __future__ import annotations

import ctypes
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers.pre_tokenizers import ByteLevel

from tokenswift_py.checkpoints.cache import cache_folder
from tokenswift_py.checkpoints.gguf_file import open_gguf
from tokenswift_py.errors import check

# llama.cpp's names of mixes of types (llama.h, LLAMA_FTYPE_MOSTLY_*).
MIXES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen 2 model. Its heads have hidden / heads values, its embedding is its output matrix too."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int


SHAPES = {
    "qwen2-0.5b": Shape(896, 4864, 24, 14, 2, 151_936),  # Qwen2.5-0.5B
    "tiny": Shape(256, 512, 2, 4, 2, 2048),
}


def made_file(name: str, mix: str) -> Path:
    """Returns the file of a random model of one of SHAPES, which is made once and kept in the cache folder."""
    path = cache_folder() / f"made-{name}-{mix}.gguf"
    if not path.is_file():
        source, part = (path.with_name(f"{path.stem}-{os.getpid()}.{kind}") for kind in ("f16", "part"))
        try:
            write_random(source, SHAPES[name])
            quantise(source, part, mix)
            part.replace(path)
        finally:
            source.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
    return path


def write_random(path: Path, shape: Shape) -> None:
    """Writes a Qwen 2 model with normal weights in fp16, tensor by tensor, so that no memory holds it whole."""
    from gguf import GGUFWriter, TokenType

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "qwen2")
    for key, value in {
        "block_count": shape.layers, "context_length": 32768, "embedding_length": shape.hidden,
        "feed_forward_length": shape.intermediate, "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
    }.items():  # fmt: skip
        writer.add_uint32(f"qwen2.{key}", value)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens, merges = vocabulary(shape.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * (shape.vocab - 2) + [TokenType.CONTROL] * 2)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(shape.vocab - 2)
    writer.add_eos_token_id(shape.vocab - 1)
    tensors = list(tensors_of(shape))
    for name, size in tensors:
        dtype = np.dtype(np.float16 if len(size) == 2 else np.float32)
        writer.add_tensor_info(name, size, dtype, int(np.prod(size)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for name, size in tensors:
        writer.write_tensor_data(values(rng, name, size))
    writer.close()


def tensors_of(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the names and sizes of the tensors, by llama.cpp's names."""
    wide, narrow = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    yield "token_embd.weight", (shape.vocab, wide)
    yield "output_norm.weight", (wide,)
    for layer in range(shape.layers):
        for name, rows in (("q", wide), ("k", narrow), ("v", narrow)):
            yield f"blk.{layer}.attn_{name}.weight", (rows, wide)
            yield f"blk.{layer}.attn_{name}.bias", (rows,)
        yield f"blk.{layer}.attn_output.weight", (wide, wide)
        yield f"blk.{layer}.ffn_gate.weight", (shape.intermediate, wide)
        yield f"blk.{layer}.ffn_up.weight", (shape.intermediate, wide)
        yield f"blk.{layer}.ffn_down.weight", (wide, shape.intermediate)
        yield f"blk.{layer}.attn_norm.weight", (wide,)
        yield f"blk.{layer}.ffn_norm.weight", (wide,)


def values(rng: np.random.Generator, name: str, size: tuple[int, ...]) -> npt.NDArray[Any]:
    if len(size) == 1:
        return np.full(size, 0.0 if name.endswith("bias") else 1.0, np.float32)
    drawn = rng.standard_normal(size, np.float32)
    drawn *= size[1] ** -0.5  # products keep the size of what they multiply
    return drawn.astype(np.float16)


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Returns tokens and merges of a byte-level BPE: all bytes, then pairs and triples of them, then two markers."""
    alphabet = sorted(ByteLevel.alphabet())
    pairs = [(a, b) for a, b in product(alphabet, repeat=2)]
    triples = ((a + b, c) for (a, b), c in product(pairs, alphabet))
    merged = [*pairs, *islice(triples, max(0, size - 2 - len(alphabet) - len(pairs)))][: size - 2 - len(alphabet)]
    tokens = [*alphabet, *(a + b for a, b in merged), "<|begin|>", "<|end|>"]
    return tokens, [f"{a} {b}" for a, b in merged]


def quantise(source: Path, target: Path, mix: str) -> None:
    """Writes a file's model in one of MIXES with llama.cpp's quantiser, without an importance matrix.

    A matrix whose rows are not whole blocks of 256 gets the type with blocks of 32 that llama.cpp puts in its place.
    """
    import llama_cpp

    check(mix in MIXES, "types", mix, f"known are {', '.join(MIXES)}")
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # a line for each tensor otherwise
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix}")
    settings.allow_requantize = True
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    check(not failed, "types", mix, f"llama.cpp's quantiser failed on {source.name}")


def stored_types(path: Path) -> str:
    """Returns the types of a file's matrices with their shares of the weights, the largest first: Q5_0 72 %, ..."""
    weights: Counter[str] = Counter()
    for tensor in open_gguf(path).tensors.values():
        if len(tensor.shape) > 1:
            weights[tensor.kind] += int(np.prod(tensor.shape))
    return ", ".join(f"{kind} {100 * count / weights.total():.0f} %" for kind, count in weights.most_common())
