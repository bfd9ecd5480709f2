"""The decoder on the C++ CPU engine (`kernels/cpu`). It keeps the forward contract of `core.Model`, with one native
call a pass.

A row's bits depend on its own ancestors only (law 1): not on the rows beside it, chunks, batches, or threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from tokenswift_py.core import Output, Segment
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE, Bytes, IntArray
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.memories._engine import NativeMemory, engine_memory
from tokenswift_py.kvcache.memories.base import Memory, Shape
from tokenswift_py.kvcache.pages import BoundedPages, grouped, pages_for
from tokenswift_py.models.blocks import BLOCK, FP32, Blocks
from tokenswift_py.models.clock import Clock, HostClock
from tokenswift_py.models.devices import DTYPES, available_threads, check_dtype, dtype_name, isa_contract, made
from tokenswift_py.models.families.base import GLOBAL, LOCAL
from tokenswift_py.models.rope import RopeTables, query_turns
from tokenswift_py.models.rows import (
    Passed,
    Rows,
    attention_arrays,
    chosen_rows,
    lay_out,
    native_ints,
    shared_pool,
)
from tokenswift_py.models.spec import ModelSpec, part_of
from tokenswift_py.planning.vocabulary import DraftVocabulary
from tokenswift_py.version import __version__

VECTOR = 16  # the kernels work on whole vectors: heads, and the pages of a row's mass, are padded with zeros

ROPES = {GLOBAL: 0, LOCAL: 1, None: -1}


class NativePool(BoundedPages):
    """Pages in native memory, with keys and values packed for dot products. Memory grows by slabs as pages are first
    held, and nothing is ever copied to grow. The threads of `weights` compute the statistics."""

    def __init__(self, weights: NativeWeights, pages: int, dtype: torch.dtype):
        from tokenswift_py.kernels.cpu import _native

        spec = weights.spec
        super().__init__((spec.layers, spec.kv_heads, pages, spec.head_dim), torch.device("cpu"))
        self.layers, self.kv_heads, self.dtype = spec.layers, spec.kv_heads, dtype
        width = round_up(spec.head_dim, VECTOR)
        self.native = _native.Pool(spec.layers, spec.kv_heads, width, dtype_name(dtype), pages)
        self.page_bytes: int = self.native.page_bytes
        self._engine = weights.native

    def reserve(self, page: int) -> None:
        super().reserve(page)
        self.native.reserve(page)

    def move(self, source: IntArray, target: IntArray) -> None:
        self.native.move(native_ints(source), native_ints(target))

    def dump(self, page: int) -> Bytes:
        return np.concatenate(self._blocks(page))

    @property
    def part_bytes(self) -> tuple[int, ...]:
        return (self.page_bytes,)

    def restore(self, page: int, data: Bytes) -> None:
        blocks = self._blocks(page)
        for block, part in zip(blocks, np.split(data, len(blocks)), strict=True):
            block[:] = part

    def _blocks(self, page: int) -> list[Bytes]:
        """Returns the memory of a page, with a block for each layer and KV head."""
        return [self.native.block(layer, head, page) for layer in range(self.layers) for head in range(self.kv_heads)]

    def key_scores(self, pages: IntArray, queries: torch.Tensor) -> torch.Tensor:
        sums = grouped(queries, self.kv_heads)
        query = np.zeros((self.layers, self.kv_heads, round_up(sums.shape[-1], VECTOR)), np.float32)
        query[..., : sums.shape[-1]] = sums.numpy()
        scores = np.empty((self.layers, self.kv_heads, len(pages)), np.float32)
        self._engine.key_scores(self.native, native_ints(pages), query, scores)
        return torch.from_numpy(scores)

    def page_keys(self, layer: int, pages: IntArray) -> torch.Tensor:
        keys = np.empty((self.kv_heads, len(pages), PAGE_SIZE, self._shape[-1]), np.float32)
        self._engine.page_keys(self.native, layer, native_ints(pages), keys)
        return torch.from_numpy(keys)

    def _bound_keys(self, pages: IntArray, low: torch.Tensor, high: torch.Tensor) -> None:
        self._engine.key_bounds(self.native, native_ints(pages), low.numpy(), high.numpy())


class NativeWeights:
    """Weights packed from Hugging Face's names, and the team of threads that multiplies with them.

    weights: read once, tensor by tensor, and not kept. Norms and biases are tensors and stay fp32. A matrix is a
             tensor, or with dtype int8 also `Blocks`, which are packed without a change.
    dtype:   type of the packed matrices: bfloat16, float32, or int8, which is blocks of 32 with an fp16 scale.
    threads: number of threads; None is what the affinity mask and the cgroup's quota allow.
    team:    team of other weights, to be shared. Passes take turns, and no two teams wait for each other's cores.
    fewest_bits: whether, with dtype int8, a matrix of values becomes blocks of 4 bits where these lose no more than 1 %
                 (root mean square).
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, torch.Tensor | Blocks],
        dtype: torch.dtype,
        threads: int | None = None,
        team: Any = None,
        fewest_bits: bool = False,
    ):
        from tokenswift_py.kernels.cpu import _native

        self.spec, self.dtype = spec, dtype
        check_dtype("dtype", self.dtype)
        check(spec.head_dim % 2 == 0 and spec.head_dim <= 512, "head_dim", spec.head_dim, "an even number up to 512")
        check(threads is None or threads >= 1, "threads", threads, "at least 1")
        self.team = team or made(_native.Team, threads or available_threads())
        self.kinds: set[str] = set()  # the types that matrices have
        embedding = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self._fewest_bits = fewest_bits
        self.native = made(
            _native.Decoder,
            vocab=spec.vocab_size if spec.vocabulary else 1,
            hidden=spec.hidden_size,
            ffn=spec.intermediate_size,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            norm_eps=spec.norm_eps,
            tied=spec.tied or not spec.vocabulary,
            qk_norm=spec.qk_norm,
            layers=[(layer.window or 0, ROPES[layer.rope], layer.experts) for layer in spec.layer_specs],
            experts=None if spec.experts is None else dataclasses.astuple(spec.experts),
            post_norms=spec.post_norms,
            gelu=spec.activation == "gelu",
            embedding_scale=float(torch.tensor(spec.embedding_scale).to(embedding)),
            score_scale=spec.score_scale,
            attention_cap=spec.attention_cap,
            logit_cap=spec.logit_cap,
            dtype="q8" if self.dtype == torch.int8 else dtype_name(self.dtype),
            team=self.team,
        )
        for name, shape in spec.shapes().items():
            tensor = weights[name]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {list(shape)}, not {list(tensor.shape)}")
            self._pack(name, tensor)

    @property
    def threads(self) -> int:
        return int(self.team.threads)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the packed matrices."""
        return int(self.native.weight_bytes)

    @property
    def multiplied_nbytes(self) -> int:
        """Returns the bytes of the matrices that every token is multiplied with. Of an untied embedding only rows are
        read."""
        return int(self.native.multiplied_bytes)

    @property
    def label(self) -> str:
        """Returns the numerics of a multiplication: bf16, fp32, or the kinds of blocks."""
        return "+".join(sorted(self.kinds)) + (f"-block{BLOCK}" if self.dtype == torch.int8 else "")

    def _pack(self, name: str, tensor: torch.Tensor | Blocks) -> None:
        part, layer = part_of(name, self.spec)
        if part in FP32:
            values = isinstance(tensor, torch.Tensor)
            check(values, f"model: type of tensor {name}", "blocks", "values: it is kept in fp32")
            assert isinstance(tensor, torch.Tensor)
            self.native.set_matrix(part, layer, tensor.detach().float().contiguous().numpy())
            return
        if isinstance(tensor, Blocks):
            self.kinds.add(tensor.kind)
            self.native.set_blocks(part, layer, tensor.kind, np.ascontiguousarray(tensor.data))
            return
        if tensor.ndim == 1:
            vector = self.spec.folded(name, tensor.detach().float())
            self.native.set_vector(part, layer, vector.contiguous().numpy())
            return
        half = torch.bfloat16 in (self.dtype, tensor.dtype) and self.dtype != torch.float32
        matrix = tensor.detach().to(torch.bfloat16 if half else torch.float32).contiguous()
        packed = (matrix.view(torch.uint16) if half else matrix).numpy()
        self.kinds.add(self.native.set_matrix(part, layer, packed, self._fewest_bits))


class NativeDecoder:
    """Packed weights and the RoPE tables of one context.

    kv_dtype: type of keys and values; None is that of the weights, or bfloat16 beside weights in blocks. int8 keeps a
              scale (fp32, largest magnitude / 127) for each token's key and value of each head, and the nearest whole
              multiples of it, ties to even.
    draft:    whether rows are for drafts only and can never be committed.
    int8_pages: whether drafts read int8 copies of a bfloat16 cache's full pages, as with kv_dtype int8. Copies are made
                when a draft first sees the page, and take 66 % of the bytes of the largest view.
    vocabulary: the tokens whose logits are computed in a draft. None is all.

    Sums, norms and the residual stream are fp32. Where the ISA has bf16 dot products (avx512bf16), what meets a bf16
    weight, key or value is rounded to bf16. On the others it stays fp32. What meets a weight in blocks is rounded to
    int8 in blocks. What meets an int8 key or value is rounded to bytes as well (kernels/cpu/math/page_bytes.h).
    `Output.hidden` is the final norm's fp32.
    """

    guarantee = "bitwise"
    streams = 1

    def __init__(
        self,
        weights: NativeWeights,
        rope: RopeTables,
        kv_dtype: torch.dtype | None = None,
        draft: bool = False,
        int8_pages: bool = False,
        vocabulary: DraftVocabulary | None = None,
    ):
        self.spec, self.weights, self.vocabulary = weights.spec, weights, vocabulary
        self.context = rope.context
        self.clock: Clock = HostClock()
        # A small tile costs about as much with one row as with all. In a large tile every row costs its own arithmetic.
        tile = weights.native.tile
        self.row_shapes: tuple[int, ...] = (1, 2, *range(tile, 65, tile)) if tile <= 4 else ()
        self.draft, self.int8_pages = draft, draft and int8_pages
        self.kv_dtype = kv_dtype or (weights.dtype if weights.dtype in DTYPES.values() else torch.bfloat16)
        check_dtype("kv_dtype", self.kv_dtype)
        self._cos, self._sin = (table.float().contiguous().numpy() for table in (rope.cos, rope.sin))
        local = rope.local
        self._local = None if local is None else tuple(t.float().contiguous().numpy() for t in (local.cos, local.sin))
        shifts, self._turns = rope.shifts, query_turns(rope, self.spec)
        self._shifts = None if shifts is None else (shifts.block, native_ints(shifts.shifts), shifts.trained)
        # int8 pages were widened once, under the label of the type alone.
        kv = dtype_name(self.kv_dtype) + ("-products" if self.kv_dtype == torch.int8 else "")
        kinds = f"{weights.label}/kv-{kv}"
        self.numerics = f"native-{__version__}/{isa_contract(weights.native.isa)}/{kinds}/{rope.label}"

    def new_cache(self) -> KVCache:
        return KVCache(self.new_pool(pages_for(self.context)), self.context)

    def new_pool(self, pages: int) -> NativePool:
        """Makes room for the pages of one or several sequences, which must share a pool to share a pass."""
        return NativePool(self.weights, pages, self.kv_dtype)

    def remembers(self) -> Shape:
        """Returns what a memory of this model's evicted rows has to know of it. A layer with a window has none."""
        keeps = tuple(layer.window is None for layer in self.spec.layer_specs)
        return Shape(keeps, self.spec.kv_heads, self.spec.heads, self.spec.head_dim, tables=[None] * self.spec.layers)

    def new_memory(self, plain: Memory, kind: str) -> NativeMemory:
        """Makes a memory in the engine, with the constants of `plain`, one of the file `kind`."""
        from tokenswift_py.kernels.cpu import _native

        engine = self.weights.native
        return NativeMemory(plain, kind, partial(_native.Memory, engine), engine, (self._cos, self._sin, self._local))

    def forward(
        self, segments: Sequence[Segment], logit_rows: Sequence[int] | None = None, want_mass: bool = False,
        want_queries: bool = False, taps: Sequence[int] = (),
    ) -> Output:  # fmt: skip
        pool = shared_pool(segments, NativePool)
        rows = lay_out(segments, target_weights=not self.draft)
        memories = [engine_memory(segment.cache.memory) for segment in segments]
        pages = rows.pages if want_mass else None
        return self._compute(pool, rows, None, logit_rows, pages, want_queries, memories, taps)

    def advance(
        self, pool: NativePool, rows: Rows, stream: torch.Tensor | None, mass_pages: int | None, want_queries: bool
    ) -> Passed:
        """Computes the layers of one stage of a pipeline. stream: result of the stage before; None embeds tokens."""
        output = self._compute(pool, rows, stream, [], mass_pages, want_queries)
        assert output.residual is not None
        return Passed(output.residual[None], output.page_mass, output.queries)

    def finish(self, stream: torch.Tensor, logit_rows: Sequence[int] | None) -> Output:
        """Returns the output of rows from what the last stage has left, without page masses and queries."""
        wanted = chosen_rows(logit_rows, stream.shape[1])
        hidden, residual, logits = self._room(stream.shape[1], len(wanted))
        self.weights.native.close(stream[0].numpy(), wanted, hidden, residual, logits)
        states = torch.from_numpy(hidden), torch.from_numpy(logits)
        return Output(*states, None, None, torch.from_numpy(residual), self._turns)

    def _room(self, rows: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        hidden, residual = np.empty((2, rows, self.spec.hidden_size), np.float32)
        return hidden, residual, np.empty((wanted, self.spec.vocab_size if self.spec.vocabulary else 1), np.float32)

    def _compute(
        self, pool: NativePool, rows: Rows, stream: torch.Tensor | None, logit_rows: Sequence[int] | None,
        mass_pages: int | None, want_queries: bool, memories: Sequence[Any] = (), taps: Sequence[int] = (),
    ) -> Output:  # fmt: skip
        count, spec = len(rows.tokens), self.spec
        wanted = chosen_rows(logit_rows, count)
        hidden, residual, logits = self._room(count, len(wanted))
        mass = None if mass_pages is None else self._room_for_mass(count, mass_pages)
        queries = np.empty((count, spec.layers, spec.heads, spec.head_dim), np.float32) if want_queries else None
        states = np.empty((count, len(taps), spec.hidden_size), np.float32) if taps else None
        self.weights.native.forward(
            pool=pool.native,
            tokens=native_ints(rows.tokens if stream is None else np.zeros(count)),
            positions=native_ints(rows.positions),
            slots=native_ints(rows.slots),
            segments=attention_arrays(rows),
            logit_rows=wanted,
            cos=self._cos,
            sin=self._sin,
            shifts=self._shifts,
            local=self._local,
            hidden=hidden,
            residual=residual,
            logits=logits,
            mass=mass,
            queries=queries,
            int8_pages=self.int8_pages,
            memories=list(memories),
            stream=None if stream is None else stream[0].numpy(),
            taps=None if states is None else (native_ints(np.array(taps)), states),
            chosen=None if self.vocabulary is None else self.vocabulary.rows,
        )
        page_mass = None if mass is None else torch.from_numpy(mass)[..., :mass_pages]
        asked = None if queries is None else torch.from_numpy(queries)
        tapped = None if states is None else torch.from_numpy(states)
        rest = (page_mass, asked, torch.from_numpy(residual), self._turns, tapped)
        return Output(torch.from_numpy(hidden), torch.from_numpy(logits), *rest)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.detach().to("cpu", torch.float32).contiguous()
        logits = np.empty((len(rows), self.spec.vocab_size), np.float32)
        self.weights.native.project(rows.numpy(), logits)
        return torch.from_numpy(logits)

    def _room_for_mass(self, rows: int, pages: int) -> np.ndarray:
        padded = round_up(pages, VECTOR)
        return np.zeros((self.spec.layers, rows, self.spec.kv_heads, padded), np.float32)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
