"""Saves a smaller model on disk, to draft with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conftest import tiny_config, tiny_model, tiny_tokenizer

SMALLER = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def saved(folder: Path, tokenizer: Any = None, **changes: Any) -> Path:
    tokenizer = tokenizer or tiny_tokenizer()
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 160, **SMALLER, **changes}
    tiny_model(tiny_config(**shape), torch.float32, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
