"""Writes GGUF files of a vocabulary and next to no model, for tests of tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

WIDTH = 32


def write_vocabulary(path: Path, fields: Mapping[str, Any], name: str = "tiny") -> Path:
    """Writes a llama of one layer of zeros with these fields of `tokenizer.ggml`. None leaves a field out."""
    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH)
    for field, value in fields.items():
        if value is not None:
            add(writer, "tokenizer.chat_template" if field == "chat_template" else f"tokenizer.ggml.{field}", value)
    size = len(fields["tokens"])
    for tensor in ("token_embd", "output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        shape = (size, WIDTH) if tensor == "token_embd" else (WIDTH,)
        writer.add_tensor(f"{tensor}.weight", np.zeros(shape, np.float32))
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{part}.weight", np.zeros((WIDTH, WIDTH), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    adds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    adds[type(value)](key, value)
