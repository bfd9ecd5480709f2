"""Two executors with one contract: torch on any device, and the native C++ engine on CPUs."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from tokenswift_py import registry
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.core import Model
from tokenswift_py.errors import UserError, check
from tokenswift_py.memory import check_memory
from tokenswift_py.models.blocks import FEW_BITS, Blocks, FourBits
from tokenswift_py.models.decoder import TorchDecoder, check_moves_queries, reads_int8
from tokenswift_py.models.devices import (
    DETERMINISTIC,
    DTYPES,
    EXTENSION,
    KV_DTYPES,
    OWN_KERNELS,
    check_all_logits,
    check_attention,
    check_draft_kv,
    check_draft_weights,
    check_torch_draft_weights,
    choose_attention,
    choose_ops,
    tell_of_refused_tiles,
)
from tokenswift_py.models.native import VECTOR, NativeDecoder, NativeWeights, round_up
from tokenswift_py.models.ops import Ops, TorchOps, join_weights, matrices_of, parts_in_few_bits
from tokenswift_py.models.rope import RopeTables
from tokenswift_py.models.spec import ModelSpec, check_caps
from tokenswift_py.parallel.ranks import ALONE, Ranks
from tokenswift_py.parallel.shards import ParallelDecoder, Shard
from tokenswift_py.planning.vocabulary import draft_vocabulary
from tokenswift_py.sampling.native import NativeSampler
from tokenswift_py.sampling.reference import Sampler

logger = logging.getLogger("tokenswift")

ENGINES = ("auto", "native", "torch")


class Executor(Protocol):
    """Holds a model's weights once, and makes a `Model` for the RoPE tables of a run.

    name, dtype, kv_dtype, device, threads: entries of the report. dtype is a name of --dtype.
    multiplied_nbytes: bytes of the weights that every token is multiplied with (this rank's).
    sampler: class that chooses tokens from rows of its logits.
    ranks: the processes that hold the model.
    remembers: whether its attention can be joined with a memory of evicted rows.
    copies_all: whether `reads_copies` means copies of all full pages, not only of those that are seen.
    layers: number of layers whose keys and values one process holds at the most. kinds: types of packed matrices.
    products: names the kernels beside attention, in which all stages of a pipeline must be alike.
    """

    name: str
    dtype: str
    kv_dtype: torch.dtype
    device: torch.device
    ranks: Ranks
    remembers: bool
    copies_all: bool
    layers: int
    kinds: set[str]
    products: str

    @property
    def threads(self) -> int: ...

    @property
    def multiplied_nbytes(self) -> int: ...

    @property
    def sampler(self) -> type[Sampler]: ...

    def padded_head(self, head_dim: int) -> int:
        """Returns the size that a head of this size takes in the KV cache."""

    def check_rope(self, rope: RopeTables) -> None:
        """Raises UserError for tables whose far keys this executor cannot meet."""

    def model(self, rope: RopeTables) -> Model:
        """Makes the model for a run of these RoPE tables. Weights are shared."""

    def self_draft(self, rope: RopeTables, weights: str, kv: str = "auto", vocabulary: str | int = "auto") -> Model:
        """Makes the same model for draft passes over the same cache. Its rows can never be committed.

        weights: bf16 is the target's own weights, whatever their type. int8 is weights in blocks of 8 bits, on native
                 of 4 bits where the target's are no finer. int4 is blocks of 4 bits. auto is int8 on native, else
                 bf16.
        kv:      own reads the cache's keys and values. int8 reads copies of the full pages that drafts see. auto is
                 int8 where the engine has it and the cache is bf16.
        vocabulary: how many first tokens its logits are of, see `planning.vocabulary`. auto is what pays where the
                 engine chooses rows of the LM head, else all.

        Raises UserError for others, for weights that this executor has not, and where memory has no room for them.
        """

    def reads_copies(self, kv: str) -> bool:
        """Returns whether a self-draft made with this `kv` reads int8 copies of pages."""

    def draft_bytes(self, weights: str) -> int:
        """Returns the bytes that `self_draft` will take for weights of its own, 0 where it has them."""

    def beside(self, checkpoint: Checkpoint, weights: str) -> Executor:
        """Loads another model that drafts for this one, on the same device, threads and kernels, with the same type of
        KV cache.

        weights: bf16 is the type that the target's weights were asked for in (bf16 where those are in blocks). The
                 others are those of `self_draft`, and so is what is raised.
        """


class TorchExecutor:
    name, copies_all = "torch", True

    def __init__(
        self, checkpoint: Checkpoint, dtype: str, kv_dtype: str, device: torch.device, attention: str,
        deterministic: str, ranks: Ranks = ALONE, spec: ModelSpec | None = None,
    ):  # fmt: skip
        self.dtype, self.kv_dtype = dtype, KV_DTYPES[kv_dtype]
        self.device, self.ranks = device, ranks
        self._spec = spec or checkpoint.spec  # of the layers that this process holds
        self.layers, self.kinds = self._spec.layers, set[str]()
        backend = choose_attention(device, checkpoint.spec) if attention == "auto" else attention
        check_attention(backend, device)
        self._attention = registry.create("tokenswift_py.kernels", "BACKEND", "attention", backend)
        self.remembers = getattr(self._attention, "reports_lse", False)
        matrices = None if ranks.world > 1 else matrices_of(checkpoint.spec, apart=checkpoint.borrowed)
        self._ops = choose_ops(backend, device, deterministic, matrices, DTYPES[dtype])
        self.products = self._ops.label
        check_caps(checkpoint.spec, backend)
        int8 = reads_int8(self._attention, self._ops)
        allowed = f"with engine torch and attention {backend} only that of the weights ({dtype})"
        allowed += " or int8" if int8 else "; attention triton and engine native have int8 as well"
        check(kv_dtype == dtype or (int8 and kv_dtype == "int8"), "kv_dtype", kv_dtype, allowed)
        self._kernels = (kv_dtype, device, backend, deterministic)
        self._sampler = OWN_KERNELS[backend].sampler if backend in OWN_KERNELS else Sampler
        self._shard: Shard | None = None
        if ranks.world > 1:
            self._shard = Shard(ranks.rank, ranks.world, gather=self._ops.guarantee != TorchOps.guarantee)
            self._shard.spec(self._spec)  # refuses what cannot be shared out
        part = self._shard.of if self._shard else None
        self._draft_ops: dict[str, Ops] = {}  # those of few bits, once they were asked for
        self._weights = checkpoint.tensors(part, DTYPES[dtype]).to(DTYPES[dtype], device, self._spec.shapes())
        if self._ops.joins and not checkpoint.borrowed:
            join_weights(self._weights, self._spec)

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    @property
    def sampler(self) -> type[Sampler]:
        return self._sampler

    @property
    def multiplied_nbytes(self) -> int:
        return self._spec.multiplied * DTYPES[self.dtype].itemsize // self.ranks.world

    def padded_head(self, head_dim: int) -> int:
        return head_dim

    def check_rope(self, rope: RopeTables) -> None:
        check_moves_queries(self._attention, rope)

    def model(self, rope: RopeTables) -> Model:
        return self._decoder(rope, self._ops, draft=False)

    def self_draft(self, rope: RopeTables, weights: str, kv: str = "auto", vocabulary: str | int = "auto") -> Model:
        check_torch_draft_weights(weights, hasattr(self._ops, "in_few_bits"), self._attention.name)
        check_draft_kv(kv)
        check_all_logits(vocabulary, "engine torch")
        able = not self._shard and getattr(self._attention, "reads_copies", False)
        allowed = "with engine torch only own, or int8 with attention triton in one process; engine native has int8"
        check(able or kv != "int8", "draft_kv", kv, allowed)
        check(self.kv_dtype != torch.int8 or kv != "int8", "draft_kv", kv, "the cache itself is int8 (kv_dtype)")
        ops = self._in_few_bits(weights) if weights in FEW_BITS else self._ops
        return self._decoder(rope, ops, draft=True, copies=self.reads_copies(kv))

    def reads_copies(self, kv: str) -> bool:
        return kv == "int8"  # what auto should be, a card has to tell

    def draft_bytes(self, weights: str) -> int:
        packed = weights not in FEW_BITS or weights in self._draft_ops
        return 0 if packed else int(FEW_BITS[weights].nbytes * self._spec.parameters)

    def _decoder(self, rope: RopeTables, ops: Ops, draft: bool, copies: bool = False) -> Model:
        parts = (self._spec, self._weights, rope, self._attention, ops, draft, self.kv_dtype)
        return ParallelDecoder(*parts, self._shard, self.ranks) if self._shard else TorchDecoder(*parts, copies)

    def _in_few_bits(self, kind: str) -> Ops:
        """Returns operations with int8 or int4 weights, which are packed at the first use beside the others."""
        if kind not in self._draft_ops:
            parts, (bits, nbytes) = list(parts_in_few_bits(self._spec, self._weights)), FEW_BITS[kind]
            packing: Any = self._ops
            whole = packing.weights_a_step(bits)
            sizes = (weight.shape for weights, _ in parts for weight in weights)
            numbers = sum(columns * round_up(depth, whole) for columns, depth in sizes)
            check_memory(int(numbers * nbytes), self.device, f"{kind} weights for drafts")
            self._draft_ops[kind] = packing.in_few_bits(parts, bits)
        return self._draft_ops[kind]

    def beside(self, checkpoint: Checkpoint, weights: str) -> Executor:
        check_torch_draft_weights(weights, hasattr(self._ops, "in_few_bits"), self._attention.name)
        checkpoint.check_memory_for_drafts(self.dtype, self.device)
        beside = TorchExecutor(checkpoint, self.dtype, *self._kernels)
        beside._ops = beside._in_few_bits(weights) if weights in FEW_BITS else beside._ops
        return beside


class NativeExecutor:
    name, products, copies_all = "native", "", False
    sampler = NativeSampler
    ranks = ALONE
    remembers = True

    def __init__(
        self, checkpoint: Checkpoint, dtype: str, kv_dtype: torch.dtype, threads: int | None = None, team: Any = None,
        spec: ModelSpec | None = None, four_bits: bool = False,
    ):  # fmt: skip
        self.dtype, self.kv_dtype = dtype, kv_dtype
        self.device = torch.device("cpu")
        self._checkpoint, self._spec = checkpoint, spec or checkpoint.spec
        self.layers = self._spec.layers
        packed = DTYPES.get(dtype, torch.int8)
        tensors: Mapping[str, torch.Tensor | Blocks]
        if dtype == "gguf":
            tensors = checkpoint.blocks()
            tensors.tell_rounded()
        else:
            tensors = checkpoint.tensors(dtype=DTYPES.get(dtype, torch.float32))
            tensors = FourBits(tensors, self._spec) if four_bits else tensors
        self._weights = NativeWeights(self._spec, tensors, packed, threads, team)
        self.kinds = self._weights.kinds
        self._draft_weights = {"int8": self._weights} if packed == torch.int8 and not four_bits else {}

    @property
    def threads(self) -> int:
        return self._weights.threads

    @property
    def multiplied_nbytes(self) -> int:
        return self._weights.multiplied_nbytes

    def padded_head(self, head_dim: int) -> int:
        return round_up(head_dim, VECTOR)

    def check_rope(self, rope: RopeTables) -> None:
        pass

    def model(self, rope: RopeTables) -> Model:
        return NativeDecoder(self._weights, rope, self.kv_dtype)

    def self_draft(self, rope: RopeTables, weights: str, kv: str = "auto", vocabulary: str | int = "auto") -> Model:
        check_draft_weights(weights)
        check_draft_kv(kv)
        copies = self.reads_copies(kv)
        check(copies or kv != "int8", "draft_kv", kv, "copies are made of a bf16 cache only (kv_dtype)")
        chosen = self._weights if weights == "bf16" else self._in_blocks("int4" if weights == "int4" else "int8")
        tokens = draft_vocabulary(chosen.native, self._spec.vocab_size, vocabulary)
        return NativeDecoder(chosen, rope, self.kv_dtype, draft=True, int8_pages=copies, vocabulary=tokens)

    def reads_copies(self, kv: str) -> bool:
        return kv != "own" and self.kv_dtype == torch.bfloat16

    def draft_bytes(self, weights: str) -> int:
        kind = "int4" if weights == "int4" else "int8"
        packed = weights == "bf16" or kind in self._draft_weights
        return 0 if packed else int(FEW_BITS[kind].nbytes * self._spec.parameters)

    def beside(self, checkpoint: Checkpoint, weights: str) -> Executor:
        check_draft_weights(weights)
        own = self.dtype if self.dtype in DTYPES else "bf16"
        dtype = own if weights == "bf16" else "int8"
        checkpoint.check_memory_for_drafts(dtype, self.device)
        team = self._weights.team
        return NativeExecutor(checkpoint, dtype, self.kv_dtype, team=team, four_bits=weights == "int4")

    def _in_blocks(self, kind: str) -> NativeWeights:
        """Returns int8 or int4 weights for drafts, which are packed at the first use. int8 ones of a GGUF file are the
        file's own blocks, which are no larger."""
        if kind not in self._draft_weights:
            checkpoint, nbytes = self._checkpoint, FEW_BITS[kind].nbytes
            check_memory(int(nbytes * self._spec.parameters), self.device, f"{kind} weights for drafts")
            tensors: Mapping[str, Any]
            if kind == "int4":
                tensors = FourBits(checkpoint.tensors(), self._spec)
            else:
                tensors = checkpoint.tensors() if checkpoint.gguf is None else checkpoint.blocks()
            self._draft_weights[kind] = NativeWeights(
                self._spec, tensors, torch.int8, team=self._weights.team, fewest_bits=kind == "int8"
            )
        return self._draft_weights[kind]


def choose_engine(engine: str, device: torch.device, attention: str, world: int = 1) -> str:
    """Returns native or torch. Raises UserError where native was asked for and cannot be. `auto` is native on a CPU,
    unless an attention backend of torch's was asked for or several processes share the model."""
    check(engine in ENGINES, "engine", engine, f"one of {', '.join(ENGINES)}")
    if engine == "native":
        check(device.type == "cpu", "engine", engine, f"only on the CPU, not on {device.type}")
        check(attention == "auto", "attention", attention, "the native engine has its own; engine torch takes it")
        check(world == 1, "engine", engine, f"it runs in one process, not in torchrun's {world}; engine torch does")
    if engine == "torch" or device.type != "cpu" or attention != "auto" or world > 1:
        return "torch"
    try:
        importlib.import_module(EXTENSION)
    except ImportError as error:
        reason = f"the C++ engine is not built ({' '.join(str(error).split())})"
        if engine == "native":
            raise UserError(f"engine: 'native' is not allowed; {reason}: install with a C++ compiler") from error
        logger.warning("%s: using torch, which is slower", reason)
        return "torch"
    tell_of_refused_tiles()
    return "native"


def load(
    checkpoint: Checkpoint, engine: str, dtype: str, kv_dtype: str | None, device: torch.device, attention: str,
    threads: int | None, deterministic: str = "auto", ranks: Ranks = ALONE, spec: ModelSpec | None = None,
) -> Executor:  # fmt: skip
    """Reads the weights into the chosen executor. `engine` is native or torch. spec: that of a stage's layers; None is
    the whole model."""
    check(deterministic in DETERMINISTIC, "deterministic", deterministic, f"one of {', '.join(DETERMINISTIC)}")
    if engine == "native":
        check(deterministic in ("auto", "on"), "deterministic", deterministic, "the native engine always is")
        kv = kv_dtype or (dtype if dtype in DTYPES else "bf16")
        return NativeExecutor(checkpoint, dtype, KV_DTYPES[kv], threads, spec=spec)
    check(dtype in DTYPES, "dtype", dtype, f"with engine torch one of {', '.join(DTYPES)}; engine native has {dtype}")
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchExecutor(checkpoint, dtype, kv_dtype or dtype, device, attention, deterministic, ranks, spec)
