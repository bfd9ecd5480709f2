"""A small decoder on Triton's kernels, and caches whose rows are drawn, which costs nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from conftest import decoder_of, tiny_config, tiny_model
from row_products import stand_in_blocks
from tokenswift_py.kernels.triton.ops import TritonOps
from tokenswift_py.kernels.triton.products import LIBRARY, TILES
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.spec import ModelSpec

SMALL = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32,
    "intermediate_size": 32, "vocab_size": 61,
}  # fmt: skip


def new_decoder(family: str = "qwen3", way: str = "tiles", **changes: Any) -> TorchDecoder:
    """Norms of queries and keys, and one layer with a window of 70 beside one without."""
    changes = {"sliding_window": 70, "use_sliding_window": True, "max_window_layers": 1, **changes}
    config = tiny_config(family, **SMALL, **(changes if family != "llama" else {}))
    products: Any = {"tiles": TILES, "library": LIBRARY}.get(way)
    ops = TritonOps(products or stand_in_blocks(ModelSpec.from_config(config), torch.float32))
    return decoder_of(tiny_model(config, torch.float32), context=8192, attention="triton", ops=ops)


def drawn_cache(decoder: TorchDecoder, length: int, pool: Any = None) -> KVCache:
    """Committed rows whose keys and values are drawn, which costs nothing; what nobody attends to is NaN."""
    pool = pool or decoder.new_pool(80)
    cache = KVCache(pool, 8192)
    slots = cache.append(np.arange(length, dtype=np.int32), True)
    cache.commit(range(length))
    noise = torch.Generator().manual_seed(0)
    for part in (pool.keys, pool.values):
        part.fill_(torch.nan)
        part.flatten(2, 3)[:, :, slots] = torch.randn(2, 1, length, part.shape[-1], generator=noise)
    return cache
