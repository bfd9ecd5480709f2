"""Self-Extend by the query alone (law 8): the logits of a dense reference that knows no pages, the row law across the
borders of blocks, and faults that each would be found."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import decoder_of, tiny_config, tiny_model, weights_of
from journals import cut_short
from native_rows import assert_row_law, extend, one_by_one, prefill, random_tree, tokens
from tokenswift_py import TokenSwift, registry
from tokenswift_py.core import DraftTree, Output, Segment
from tokenswift_py.drafters.base import committed
from tokenswift_py.errors import UserError
from tokenswift_py.kernels.base import BlockShifts
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import RopeTables, rope_tables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.runs import audit, journal
from tokenswift_py.runs.journal import Journal
from tokenswift_py.runs.plan import recorded_run
from toys import save_tiny

_native = pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the native engine is not built")

TRAINED, CONTEXT, LENGTH = 256, 768, 700  # the context in whole blocks: all distances are there
ISAS = _native.runnable_isas().split(", ")
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, yarn": {"rope_parameters": ROPES["yarn"]},
    "llama, llama3": {"rope_parameters": ROPES["llama3"]},
    "mistral": {"sliding_window": None},
    "mistral, a window wider than trained": {"sliding_window": 500},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "smollm3": {},
    "qwen3, every other layer under a window as trained": {
        "use_sliding_window": True, "sliding_window": 200,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}  # fmt: skip


@cache
def model_of(name: str) -> Any:
    """A model whose attention is sharp: random weights alone would hide a wrong distance."""
    config = tiny_config(
        name.partition(",")[0],
        **{"max_position_embeddings": TRAINED, "rope_parameters": ROPES["default"], **MODELS[name]},
    )
    model = tiny_model(config, torch.float32)
    with torch.no_grad():
        for part, tensor in model.named_parameters():
            if "q_proj.weight" in part or "q_norm" in part:
                tensor.mul_(2.5)
    return model


def distances(window: int, block: int, group: int, length: int = LENGTH) -> torch.Tensor:
    """[row, key] how far each row meets each key, by the definition."""
    near = window // block
    row, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    apart = (row // block - key // block - near).clamp(min=0)
    return row - key - apart * block * (group - 1) // group


def reference(model: Any, ids: np.ndarray, met: torch.Tensor) -> torch.Tensor:
    """Logits in fp64, one rotation a pair of row and key by its distance in `met`."""
    config, weights = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    spec = ModelSpec.from_config(config)
    tables = rope_tables(config, 2, Positions("trained"))
    scale = float((tables.cos[0, 0] ** 2 + tables.sin[0, 0] ** 2) ** 0.5)  # the attention factor
    inverse = torch.atan2(tables.sin[1].double(), tables.cos[1].double())  # of angles below pi
    at = torch.arange(len(ids))
    past = at[:, None] - at[None, :]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return weights[name] * x / (x.pow(2).mean(-1, keepdim=True) + spec.norm_eps).sqrt()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    x = weights["model.embed_tokens.weight"][torch.from_numpy(ids).long()]
    for layer in range(spec.layers):
        part, window = f"model.layers.{layer}", spec.windows[layer]
        y = norm(x, f"{part}.input_layernorm.weight")
        q, k, v = (linear(y, f"{part}.self_attn.{n}_proj").view(len(ids), -1, spec.head_dim) for n in "qkv")
        if spec.qk_norm:
            q, k = norm(q, f"{part}.self_attn.q_norm.weight"), norm(k, f"{part}.self_attn.k_norm.weight")
        k, v = (z.repeat_interleave(spec.heads // spec.kv_heads, 1) for z in (k, v))
        far = met if window is None or window > TRAINED else past
        if spec.layer_specs[layer].rope is None:
            far = torch.zeros_like(past)
        scores = torch.zeros(spec.heads, len(ids), len(ids), dtype=torch.float64)
        half = spec.head_dim // 2
        for i in range(half):
            q1, q2, k1, k2 = (z[:, :, i + j].T for z in (q, k) for j in (0, half))
            angle = far.double() * inverse[i]
            aligned = q1[:, :, None] * k1[:, None] + q2[:, :, None] * k2[:, None]
            across = q1[:, :, None] * k2[:, None] - q2[:, :, None] * k1[:, None]
            scores += aligned * angle.cos() + across * angle.sin()
        unseen = (past < 0) | (past >= (window or CONTEXT))
        p = (scores * scale**2 * spec.head_dim**-0.5).masked_fill(unseen, -torch.inf).softmax(-1)
        x = x + linear(torch.einsum("hij,jhd->ihd", p, v).flatten(1), f"{part}.self_attn.o_proj")
        y = norm(x, f"{part}.post_attention_layernorm.weight")
        gate, up = linear(y, f"{part}.mlp.gate_proj"), linear(y, f"{part}.mlp.up_proj")
        x = x + linear(torch.nn.functional.silu(gate) * up, f"{part}.mlp.down_proj")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, "model.norm.weight") @ head.T


@cache
def expected(name: str, window: int, block: int) -> torch.Tensor:
    return reference(model_of(name), tokens(LENGTH), distances(window, block, least_group(window, block)))


def least_group(window: int, block: int, length: int = CONTEXT) -> int:
    """The first G that keeps every distance of the context among the trained ones."""
    return next(g for g in range(1, length) if int(distances(window, block, g, length).max()) < TRAINED)


def tables_of(name: str, window: int = 128, block: int = 64) -> RopeTables:
    return rope_tables(model_of(name).config, CONTEXT, Positions("self-extend", window, block))


def native_of(
    name: str, tables: RopeTables, dtype: torch.dtype = torch.float32, threads: int = 2, **options: Any
) -> NativeDecoder:
    spec = ModelSpec.from_config(model_of(name).config)
    return NativeDecoder(NativeWeights(spec, weights_of(model_of(name)), dtype, threads), tables, **options)


def executor_of(executor: str, name: str, tables: RopeTables) -> Any:
    if executor == "native":
        return native_of(name, tables)
    return decoder_of(model_of(name), attention=executor, rope=tables)


@pytest.mark.parametrize("executor", ["native", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_dense_reference(executor: str, name: str) -> None:
    wanted = expected(name, 128, 64)
    assert wanted.std() > 0.5
    decoder = executor_of(executor, name, tables_of(name))
    _, logits = prefill(decoder, tokens(LENGTH), [1, 63, 200, 130])
    assert (logits - wanted).abs().max() < 1e-3


@pytest.mark.parametrize(("window", "block"), [(64, 64), (128, 64)])
def test_every_window_and_block(window: int, block: int) -> None:
    tables = tables_of("llama", window, block)
    assert tables.label == f"rope-default+self-extend-w{window}-b{block}-g{least_group(window, block)}"
    for executor in ("native", "sdpa"):
        _, logits = prefill(executor_of(executor, "llama", tables), tokens(LENGTH), [300, 300])
        assert (logits - expected("llama", window, block)).abs().max() < 1e-3


def test_naive_attention_meets_keys_likewise() -> None:
    """The ground truth of the torch backends, at the end of a text: it takes a rotation a pair."""
    decoder = executor_of("sdpa", "qwen3", tables_of("qwen3"))
    truth = executor_of("naive", "qwen3", tables_of("qwen3"))
    cache, _ = prefill(decoder, tokens(LENGTH), [500])
    tree = random_tree(1, 12, 0.4)
    wanted = truth.forward([Segment(tree, cache)], want_mass=True)
    cache.drop_tail()
    got = decoder.forward([Segment(tree, cache)], want_mass=True)
    cache.drop_tail()
    assert (got.logits - wanted.logits).abs().max() < 1e-4
    assert got.page_mass is not None and wanted.page_mass is not None
    assert (got.page_mass - wanted.page_mass).abs().max() < 1e-5


def border(shifts: np.ndarray) -> np.ndarray:
    """One block more is near."""
    return np.concatenate([shifts[:1], shifts[:-1]])


def near_on_far(shifts: np.ndarray) -> np.ndarray:
    """The last far block is met from the rows' own positions."""
    return np.where(np.arange(len(shifts)) == 7, 0, shifts)


def group_off_by_one(shifts: np.ndarray) -> np.ndarray:
    blocks = np.maximum(np.arange(len(shifts)) - 2, 0) * 64
    group = least_group(128, 64) + 1
    return (blocks * (group - 1) // group).astype(np.int32)


@pytest.mark.parametrize("fault", [border, near_on_far, group_off_by_one])
def test_a_wrong_rule_would_be_found(fault: Callable[[np.ndarray], np.ndarray]) -> None:
    tables = tables_of("llama")
    assert tables.shifts is not None
    wrong = BlockShifts(64, fault(tables.shifts.shifts).astype(np.int32), TRAINED)
    for executor in ("native", "sdpa"):
        decoder = executor_of(executor, "llama", RopeTables(tables.cos, tables.sin, "wrong", shifts=wrong))
        _, logits = prefill(decoder, tokens(LENGTH), [500])
        assert (logits - expected("llama", 128, 64)).abs().max() > 0.05


def test_a_neighbours_query_or_stale_tables_would_be_found() -> None:
    """By the reference: rows that take the distances of the row before at far keys; tables of another base."""
    model, right = model_of("llama"), distances(128, 64, least_group(128, 64))
    past = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    neighbours = torch.where(right != past, right.roll(1, 0) + 0, right)
    assert (reference(model, tokens(LENGTH), neighbours) - expected("llama", 128, 64)).abs().max() > 0.05
    tables = tables_of("llama")
    stale = rope_tables(tiny_config(max_position_embeddings=TRAINED), CONTEXT, Positions("trained"))
    decoder = native_of("llama", RopeTables(stale.cos, stale.sin, "stale", shifts=tables.shifts))
    _, logits = prefill(decoder, tokens(LENGTH))
    assert (logits - expected("llama", 128, 64)).abs().max() > 0.05


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("types", [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, torch.int8)])
def test_rows_of_a_tree_have_the_bits_of_tokens_decoded_one_by_one(
    isa: str, types: tuple[torch.dtype, torch.dtype | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across the border of a block (512), of two (576 and 640), and near one (704)."""
    monkeypatch.setenv("TOKENSWIFT_ISA", isa)
    decoder = native_of("qwen3", tables_of("qwen3"), types[0], kv_dtype=types[1])
    for prefix in (500, 570, 690):
        assert_row_law(decoder, prefix, random_tree(prefix, 60, 0.06))
        assert_row_law(decoder, prefix, random_tree(prefix, 40, 0.7))


def test_chunks_threads_mass_and_a_view_of_all_pages_change_no_bit() -> None:
    decoders = [native_of("llama", tables_of("llama"), torch.bfloat16, threads) for threads in (1, 2, 3)]
    chunks: list[list[int]] = [[], [70, 1, 300], [640]]
    first, *others = (prefill(d, tokens(LENGTH), c)[1] for d, c in zip(decoders, chunks, strict=True))
    assert all(torch.equal(logits, first) for logits in others)
    decoder, tree = decoders[1], random_tree(3, 30, 0.3)
    cache, _ = prefill(decoder, tokens(LENGTH))
    every = np.broadcast_to(np.arange(cache.full_pages, dtype=np.int32), (3, 2, cache.full_pages))
    plain = decoder.forward([Segment(tree, cache)])
    cache.drop_tail()
    for options, view in (({"want_mass": True}, None), ({}, PageView(every.copy()))):
        again = decoder.forward([Segment(tree, cache, view=view)], **options)
        cache.drop_tail()
        assert torch.equal(again.logits, plain.logits)


def test_several_sequences_in_one_pass_keep_their_bits() -> None:
    """Their rows stand in different blocks."""
    decoder = native_of("llama", tables_of("llama"), torch.bfloat16)
    pool, lengths = decoder.new_pool(40), (700, 130, 500)
    caches = [KVCache(pool, CONTEXT) for _ in lengths]
    for length, own in zip(lengths, caches, strict=True):
        extend(decoder, own, tokens(length, seed=length))
    trees = [random_tree(length, 9, 0.5) for length in lengths]
    together = decoder.forward([Segment(tree, own) for tree, own in zip(trees, caches, strict=True)])
    start = 0
    for tree, own in zip(trees, caches, strict=True):
        own.drop_tail()
        alone = decoder.forward([Segment(tree, own)])
        assert torch.equal(alone.logits, together.logits[start : start + len(tree)])
        start += len(tree)


@pytest.mark.parametrize("int8_pages", [False, True])
def test_drafts_over_views_move_their_queries_too(int8_pages: bool) -> None:
    """Rows under a view of all pages agree with the target's, as far as copies of them do."""
    weights = NativeWeights(
        ModelSpec.from_config(model_of("llama").config), weights_of(model_of("llama")), torch.bfloat16, 2
    )
    target = NativeDecoder(weights, tables_of("llama"))
    draft = NativeDecoder(weights, tables_of("llama"), draft=True, int8_pages=int8_pages)
    cache, _ = prefill(target, tokens(LENGTH))
    wanted = one_by_one(target, cache, [5]).logits
    every = np.broadcast_to(np.arange(cache.full_pages, dtype=np.int32), (3, 2, cache.full_pages)).copy()
    got = draft.forward([Segment(DraftTree.chain([5]), cache, view=PageView(every))]).logits
    tolerance = 0.1 if int8_pages else 1e-6
    assert (got - wanted).pow(2).mean() < tolerance**2 * wanted.pow(2).mean()


def test_shifts_that_would_read_outside_the_tables_are_refused() -> None:
    for block, shifts in ((64, [0, 65]), (64, [0, -1]), (96, [0, 0]), (32, [0, 0]), (192, [0, 0])):
        with pytest.raises(ValueError, match="shift"):
            BlockShifts(block, np.array(shifts, np.int32), TRAINED)
    short = BlockShifts(64, np.zeros(3, np.int32), TRAINED)
    tables = tables_of("llama")
    decoder = native_of("llama", RopeTables(tables.cos, tables.sin, "short", shifts=short))
    with pytest.raises(ValueError, match="shifts of too few blocks: 3"):
        prefill(decoder, tokens(10))


def test_a_backend_that_cannot_says_what_can() -> None:
    from tokenswift_py.kernels.xformers import with_function
    from tokenswift_py.models.decoder import TorchDecoder

    spec = ModelSpec.from_config(model_of("llama").config)
    tables = rope_tables(model_of("llama").config, CONTEXT)
    with pytest.raises(UserError, match=r"^positions: 'log-extend' .* xformers .* attention triton and sdpa"):
        TorchDecoder(spec, weights_of(model_of("llama")), tables, with_function(None))


@pytest.mark.parametrize("policy", ["quest", "importance", "clusters"])
@pytest.mark.parametrize("name", ["llama", "llama, yarn", "qwen3, every other layer under a window as trained"])
def test_policies_score_keys_with_the_query_that_meets_them(policy: str, name: str) -> None:
    """The last row's queries, rotated by definition for each key's distance, against the cache's own keys."""
    decoder = native_of(name, tables_of(name))
    spec, chosen = decoder.spec, registry.create("tokenswift_py.kvcache.policies", "POLICY", "draft_policy", policy)
    if policy == "clusters":
        chosen.clusters = PAGE_SIZE  # a cluster for every key, so that the mass is no estimate
    cache, _ = prefill(decoder, tokens(LENGTH - 1))
    output = decoder.forward([Segment(DraftTree.chain([7]), cache)], want_queries=True)
    cache.commit([0])
    chosen.observe(committed(output, [0], LENGTH - 1))
    scores = torch.from_numpy(chosen.score(cache.page_stats()))
    shape = (spec.layers, spec.kv_heads, cache.full_pages, PAGE_SIZE)
    keys = all_keys(decoder, cache)  # [layers, kv_heads, T, head_dim]
    moved = moved_queries(name, output, keys.shape[2])  # [layers, kv_heads, group, T, head_dim]
    if policy == "importance":
        wanted = (moved.sum(2) * keys).sum(-1).view(shape).amax(-1)
    elif policy == "clusters":
        keys = keys.to(torch.bfloat16)  # as an index has them
        wanted = ((moved * keys[:, :, None]).sum(-1) * spec.head_dim**-0.5).softmax(-1).sum(2).view(shape).sum(-1)
    else:
        low, high = keys.view(*shape, -1).aminmax(dim=3)
        first = moved.unflatten(3, (-1, PAGE_SIZE))[..., 0, :]  # a page is met from one position
        wanted = torch.maximum(first * low[:, :, None], first * high[:, :, None]).sum(-1).amax(2)
    assert (scores - wanted).abs().max() < 1e-4 * wanted.abs().max()


def all_keys(decoder: NativeDecoder, cache: KVCache) -> torch.Tensor:
    spec = decoder.spec
    blocks = [
        cache.pool.native.block(layer, head, int(page)).view(np.float32)[: PAGE_SIZE * 16 * -(-spec.head_dim // 16)]
        for layer in range(spec.layers)
        for head in range(spec.kv_heads)
        for page in cache.pages[: cache.full_pages]
    ]
    keys = torch.from_numpy(np.stack(blocks)).view(spec.layers, spec.kv_heads, cache.full_pages, -1, PAGE_SIZE)
    return keys.transpose(3, 4).flatten(2, 3)[..., : spec.head_dim].double()


def moved_queries(name: str, output: Output, count: int) -> torch.Tensor:
    """The queries of row LENGTH - 1 turned back by what each key is met nearer than it is."""
    spec, row = ModelSpec.from_config(model_of(name).config), LENGTH - 1
    tables = rope_tables(model_of(name).config, 2, Positions("trained"))
    inverse = torch.atan2(tables.sin[1].double(), tables.cos[1].double())
    met = distances(128, 64, least_group(128, 64))[row, :count]
    nearer = torch.stack([row - torch.arange(count) - met if w is None else 0 * met for w in spec.windows])
    angle = nearer.double()[:, None, None, :, None] * inverse  # [layers, 1, 1, T, half]
    assert output.queries is not None
    q = output.queries[0].double().unflatten(1, (spec.kv_heads, -1))[:, :, :, None]
    first, second = q.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() + second * angle.sin(), second * angle.cos() - first * angle.sin()], -1)


def log_distances(window: int, block: int, scale: int, length: int) -> torch.Tensor:
    """Returns `distances` that grow by a logarithm beyond the window."""
    row, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    beyond = ((row // block - key // block - window // block).clamp(min=0) * block).double()
    return row - key - (beyond - scale * torch.log1p(beyond / scale)).floor().long()


@pytest.mark.parametrize("executor", ["native", "sdpa"])
def test_distances_that_grow_by_a_logarithm(executor: str) -> None:
    tables = rope_tables(model_of("llama").config, CONTEXT, Positions("log-extend", 128, 64))
    scales = [s for s in range(16, 400, 16) if int(log_distances(128, 64, s, CONTEXT).max()) < TRAINED]
    assert tables.label == f"rope-default+log-extend-w128-b64-s{max(scales)}"
    wanted = reference(model_of("llama"), tokens(LENGTH), log_distances(128, 64, max(scales), LENGTH))
    assert (wanted - expected("llama", 128, 64)).abs().max() > 0.05
    _, logits = prefill(executor_of(executor, "llama", tables), tokens(LENGTH), [300])
    assert (logits - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("trained", [2048, 8192, 131_072])
@pytest.mark.parametrize("context", [140_000, 1_000_000])
def test_a_logarithm_keeps_its_distances_among_the_trained_ones(trained: int, context: int) -> None:
    shifts = rope_tables(tiny_config(max_position_embeddings=trained), context, Positions("log-extend")).shifts
    assert shifts is not None
    met = np.arange(len(shifts.shifts), dtype=np.int64) * shifts.block - shifts.shifts
    assert (np.diff(met) >= 0).all() and met.max() + shifts.block - 1 < trained
    assert met.max() + shifts.block - 1 > 0.9 * trained  # hardly any of the room is left


@pytest.mark.parametrize("context", [257, 300, 1000, 120_000])
@pytest.mark.parametrize("trained", [512, 2048, 8192, 131_072])
def test_no_distance_is_beyond_the_trained_ones(context: int, trained: int) -> None:
    """By every row of the last block, and G is the least that does it."""
    config = tiny_config(max_position_embeddings=trained)
    tables = rope_tables(config, context, Positions("self-extend"))
    if context <= trained:
        assert tables.shifts is None and tables.label == "rope-default"
        return
    shifts = tables.shifts
    assert shifts is not None and len(shifts.shifts) == (context - 1) // shifts.block + 1
    behind = np.arange(len(shifts.shifts), dtype=np.int64)
    largest = behind * shifts.block + shifts.block - 1 - shifts.shifts
    assert largest.max() < trained
    group = int(tables.label.rpartition("-g")[2])
    window = tables.positions.window
    assert window is not None and window % shifts.block == 0
    smaller = np.maximum(behind - window // shifts.block, 0) * shifts.block * (group - 2) // max(1, group - 1)
    assert group == 1 or (behind * shifts.block + shifts.block - 1 - smaller).max() >= trained
    assert math.isclose(float(shifts.shifts[: window // shifts.block + 1].sum()), 0)


RUN: dict[str, Any] = {"max_new_tokens": 90, "seed": 2, "raw": True, "ignore_eos": True, "temperature": 0.9}
LONG = "the cat and the dog and the bird sat on the mat, and then the rain began, " * 20


@pytest.fixture(scope="module", params=["native", "torch"])
def swift(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> TokenSwift:
    """A model of 256 trained positions, of which the prompt alone has more."""
    folder = tmp_path_factory.mktemp("trained") / str(TRAINED)
    save_tiny(folder, max_position_embeddings=TRAINED)
    return TokenSwift.from_pretrained(str(folder), dtype="fp32", engine=request.param)


def test_runs_are_resumed_and_audited(swift: TokenSwift, tmp_path: Path) -> None:
    plain = swift.generate(LONG, drafter="none", **RUN)
    assert plain.report["prompt_tokens"] > 300 and "+log-extend-w64-b64-s" in plain.report["numerics"]
    with swift.stream(LONG, out=tmp_path / "run", draft_budget=128, **RUN) as stream:
        list(stream)
    assert stream.tokens == plain.tokens
    for count in (1, 40, 89):
        cut_short(tmp_path / "run", count)
        with swift.resume(tmp_path / "run", drafter="ngram") as again:
            list(again)
        assert again.tokens == plain.tokens
    proved = audit.audit(swift, tmp_path / "run")
    assert not proved.faults and proved.proof is (swift.executor.name == "native")


def test_a_run_is_resumed_with_the_flags_that_it_was_begun_with(swift: TokenSwift, tmp_path: Path) -> None:
    """Journals record what came of them."""
    begun = {"beyond": (LONG, {"positions": "auto"}), "within": ("the cat", {"positions_window": 64})}
    for name, (prompt, flags) in begun.items():
        with swift.stream(prompt, out=tmp_path / name, **flags, **RUN) as stream:
            list(stream)
        assert stream.run.rope.positions.scheme == ("log-extend" if name == "beyond" else "trained")
        cut_short(tmp_path / name, 30)
        with swift.resume(tmp_path / name, **flags) as again:
            list(again)
        assert again.tokens == stream.tokens
    with pytest.raises(UserError, match="positions: 'self-extend' is not allowed; the run was written with 'log-ext"):
        swift.resume(tmp_path / "beyond", positions="self-extend")


def test_a_bounded_cache_and_a_snapshot_beyond_the_trained_length(swift: TokenSwift, tmp_path: Path) -> None:
    """In the lossy mode pages are evicted by scores of queries as they meet far keys: no drafter changes the text."""
    for policy in ("quest", "importance", "clusters"):
        lossy = {"kv_budget": 320, "kv_policy": policy, **RUN}
        plain = swift.generate(LONG, drafter="none", **lossy)
        assert plain.report["eviction"]["evictions"] > 0
        assert swift.generate(LONG, drafter="ngram", draft_tokens=6, **lossy).tokens == plain.tokens
    with swift.stream(LONG, out=tmp_path / "run", kv_snapshot=True, **RUN) as stream:
        pieces = iter(stream)
        while len(stream.tokens) < 40:
            next(pieces)
    with swift.resume(tmp_path / "run") as again:
        list(again)
    assert again.tokens == swift.generate(LONG, drafter="none", **RUN).tokens


def test_a_journal_of_dynamic_ntk_from_before_there_was_a_choice(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
    save_tiny(tmp_path / "model", max_position_embeddings=TRAINED, rope_parameters=rope)
    swift = TokenSwift.from_pretrained(str(tmp_path / "model"), dtype="fp32", engine="native")
    with swift.stream(LONG, out=tmp_path / "run", **RUN) as stream:
        list(stream)
    assert "/rope-dynamicx2@" in stream.numerics
    record = journal.read(tmp_path / "run")
    for name in ("positions", "positions_window", "positions_block"):
        del record.header["parameters"][name]
    assert recorded_run(swift, record).rope.label == stream.run.rope.label


def test_a_journal_from_before_there_was_a_choice_goes_on_under_yarn(swift: TokenSwift, tmp_path: Path) -> None:
    with swift.stream(LONG, out=tmp_path / "run", positions="yarn", **RUN) as stream:
        list(stream)
    record = journal.read(tmp_path / "run")
    assert "/rope-yarnx" in record.header["numerics"]
    for name in ("positions", "positions_window", "positions_block"):
        del record.header["parameters"][name]
    begun = Journal.create(tmp_path / "old", {k: v for k, v in record.header.items() if k != "version"})
    for token in record.tokens[:30]:
        begun._pending.append((token, False))
    begun.close()
    with swift.resume(tmp_path / "old") as again:
        list(again)
    assert again.tokens == stream.tokens and again.numerics == record.header["numerics"]
    with pytest.raises(UserError, match=r"positions: 'self-extend' is not allowed; the run was written with 'yarn'"):
        swift.resume(tmp_path / "run", positions="self-extend")
