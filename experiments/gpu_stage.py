"""Parts that the steps of `gpu_check.py` share.

They are the stage that steps run on, a model of the 8B shape with random weights, caches of random keys and values, and
times by the device's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from tokenswift_py.core import DraftTree, TreeBuilder
from tokenswift_py.decoding.statistics import memory_bandwidth
from tokenswift_py.kernels.triton.attention import TritonAttention
from tokenswift_py.kernels.triton.ops import TritonOps
from tokenswift_py.kernels.triton.products import LIBRARY, TILES, Blocks, Products, blocks_on
from tokenswift_py.kernels.triton.row_test import Matrix
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import TorchPagePool, pages_for
from tokenswift_py.models.captured import Recorder, recorder_for
from tokenswift_py.models.clock import clock_of
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.ops import join_weights, matrices_of, parts_in_few_bits
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from toys import tiny_config

Row = dict[str, Any]
Step = Callable[["Stage"], Iterator[Row]]
T = TypeVar("T")

# The shape of Llama-3.1-8B.
LARGE = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
}  # fmt: skip
# The shape of the default model.
NARROW = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 131_072,
}  # fmt: skip
TINY = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
TINY_NARROW = {**TINY, "hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}


@dataclass(frozen=True)
class Stage:
    """The place and the limits of a step.

    tiny:     whether sizes are small enough for Triton's interpreter.
    until:    the time.monotonic() after which no cell begins.
    scratch:  a folder that is removed afterwards.
    ceilings: measured bandwidths, filled when they are first needed.
    """

    device: torch.device
    tiny: bool
    until: float
    scratch: Path
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def pick(self, full: T, tiny: T) -> T:
        return tiny if self.tiny else full

    @property
    def dtype(self) -> torch.dtype:
        return self.pick(torch.bfloat16, torch.float32)

    @property
    def bandwidth(self) -> float:
        """The bytes per second of a plain read, measured once."""
        if "read" not in self.ceilings:
            self.ceilings["read"] = memory_bandwidth(self.pick(None, 1), self.device)
        return self.ceilings["read"]

    def ms(self, function: Callable[[], Any], rounds: int = 10, warm: int = 3) -> float:
        """Returns the median milliseconds that the function takes on the device."""
        clock, laps = clock_of(self.device), []
        for _ in range(self.pick(warm, 1)):
            function()
        for _ in range(self.pick(rounds, 1)):
            lap = clock.start()
            function()
            lap.stop()
            laps.append(lap.ms)
        return statistics.median(laps)


class Parts:
    """Random weights of the shape, from which decoders of several kinds are made.

    They can show bits and times, but never acceptance.
    """

    def __init__(
        self, stage: Stage, context: int, layers: int | None = None, trained: int | None = None,
        sizes: Mapping[str, int] | None = None,
    ):  # fmt: skip
        sizes = {**(sizes or stage.pick(LARGE, TINY))}
        sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
        sizes["max_position_embeddings"] = trained or max(sizes["max_position_embeddings"], context)
        self.stage, self.context, self.config = stage, context, tiny_config("llama", **sizes)
        self.spec = ModelSpec.from_config(self.config)
        torch.manual_seed(0)
        self.weights = {name: self._drawn(shape) for name, shape in self.spec.shapes().items()}
        join_weights(self.weights, self.spec)

    @property
    def blocks(self) -> Blocks:
        """The library's products in blocks, with the row test's verdict on this model's matrices."""
        matrices = tuple(Matrix(*matrix) for matrix in matrices_of(self.spec, apart=False))
        library = self.stage.pick(F.linear, summed)
        return blocks_on(matrices, self.stage.dtype, self.stage.device, library, recorder_for)

    def _drawn(self, shape: tuple[int, ...]) -> torch.Tensor:
        made = torch.empty(shape, dtype=self.stage.dtype, device=self.stage.device)
        return made.fill_(1.0) if len(shape) == 1 else made.normal_(0.0, self.stage.pick(0.02, 0.2))

    def decoder(
        self,
        products: str = "tiles",
        kv_dtype: torch.dtype | None = None,
        positions: str = "trained",
        graphs: bool = True,
        draft: bool = False,
        bits: int = 0,
    ) -> TorchDecoder:
        """Makes a decoder. products: tiles, blocks or library. bits: 4 or 8 of the weights, or 0 for all of them."""
        rope = rope_tables(self.config, self.context, Positions(positions))
        chosen: Products = self.blocks if products == "blocks" else {"tiles": TILES, "library": LIBRARY}[products]
        decoder = TorchDecoder(self.spec, self.weights, rope, TritonAttention(), TritonOps(chosen), draft, kv_dtype)
        if bits:
            decoder.ops = TritonOps(chosen).in_few_bits(list(parts_in_few_bits(self.spec, self.weights)), bits)
        if not graphs:
            decoder.recorder = Recorder(None)
        return decoder

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights that every token is multiplied with."""
        return self.spec.multiplied * self.stage.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """The bytes of a token's keys and values."""
        return 2 * self.spec.layers * self.spec.kv_heads * self.spec.head_dim * self.stage.dtype.itemsize


def summed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Stands in for a GPU's library where there is none. Sums each element by itself."""
    total = (x[:, None] * weight).sum(-1)
    return total if bias is None else total + bias


def drawn_pool(decoder: TorchDecoder, spare: int = 8) -> TorchPagePool:
    """Makes a pool for the decoder's context and `spare` pages more, with random keys and values."""
    pool = decoder.new_pool(pages_for(decoder.context) + spare)
    for part, scales in ((pool.keys, pool.key_scales), (pool.values, pool.value_scales)):
        if scales is None:
            part.normal_()
        else:
            part.random_(-127, 128)
            scales.fill_(1 / 64)
    return pool


def drawn_cache(pool: TorchPagePool, context: int, length: int) -> KVCache:
    """Makes a cache of `length` committed rows, whose keys and values are those that the pool holds."""
    cache = KVCache(pool, context)
    cache.append(np.arange(length, dtype=np.int32), True)
    cache.commit(range(length))
    return cache


def random_tree(rng: np.random.Generator, nodes: int, vocab: int) -> DraftTree:
    """Makes a tree with branches, and with paths deep enough to cross a page."""
    builder = TreeBuilder(int(rng.integers(vocab)))
    while len(builder) < nodes:
        builder.add(int(rng.integers(max(0, len(builder) - 3), len(builder))), int(rng.integers(vocab)))
    return builder.build()
