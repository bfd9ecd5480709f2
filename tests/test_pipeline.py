"""A model whose layers are spread over processes: every bit is that of one process, whatever is asked of the stages."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import decoder_of
from interpreter import DEVICE
from processes import LOCAL, Group, free_port, processes
from random_heads import random_heads
from served import ROOT, surroundings
from servers import until
from tokenswift_py import TokenSwift, registry
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.cli.main import main
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.drafters.head_files import write_heads
from tokenswift_py.errors import UserError
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.view import PageView
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.native import NativeDecoder, NativePool
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.rows import lay_out
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.parallel import worker
from tokenswift_py.parallel.column import column
from tokenswift_py.parallel.processes import stage_of
from tokenswift_py.parallel.ranks import RanksError
from tokenswift_py.parallel.stages import find_place, stage_specs
from tokenswift_py.runs import snapshot
from tokenswift_py.serving.engine import Engine
from toys import save_tiny, tiny_config, tiny_model, weights_of

pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")

TOKENS = np.random.default_rng(1).integers(3, 250, 400).tolist()
NATIVE = {"engine": "native", "threads": 1}
TORCH = {"engine": "torch", "dtype": "fp32"}


@pytest.fixture(scope="module")
def pair() -> Iterator[Group]:
    yield from processes(2)


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the checkpoint of a family once."""

    def made(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"pipeline-{family}"
        if not folder.exists():
            save_tiny(folder, family)
        return folder

    return made


def staged(function: Callable[..., Any], stages: int, *arguments: Any, **settings: Any) -> Any:
    """Runs a function on the first stage. The others serve it."""
    if stage_of(stages):
        with suppress(SystemExit):
            TokenSwift.from_pretrained(pipeline_parallel_size=stages)
        return None
    try:
        return function(*arguments, pipeline_parallel_size=stages, **settings)
    finally:
        column(find_place(stages)).end()


def observed(folder: Path, context: int = 400, **settings: Any) -> dict[str, torch.Tensor]:
    """All that a model and its pool tell: of a prompt, of a tree in two company segments, of drafts under a view, of
    pages that were moved, shared, dumped and brought back."""
    swift = TokenSwift.from_pretrained(str(folder), **settings)
    rope = swift.rope(context, Positions())
    model = swift.executor.model(rope)
    pool, found = model.new_pool(20), {}

    def note(name: str, output: Any) -> None:
        for part in ("hidden", "logits", "page_mass", "queries", "residual"):
            value = getattr(output, part)
            found[f"{name} {part}"] = torch.empty(0) if value is None else value.clone()

    first, second = KVCache(pool, context), KVCache(pool, context)
    note("prompt", model.forward([Segment(DraftTree.chain(TOKENS[:300]), first, causal=True)], [0, 299], True))
    first.commit(range(300))
    note("another", model.forward([Segment(DraftTree.chain(TOKENS[20:90]), second, causal=True)], []))
    second.commit(range(70))
    tree, other = DraftTree([9, 8, 7, 6, 5], [-1, 0, 0, 2, 2]), DraftTree([3, 4, 4], [-1, 0, 1])
    note("company", model.forward([Segment(tree, first), Segment(other, second)], None, True, True))
    first.commit([0, 2, 4])
    second.commit([0])
    fork = first.fork()
    note("fork", model.forward([Segment(tree, fork)], [4]))
    fork.drop_tail()
    spec = swift.checkpoint.spec
    view = np.broadcast_to([0, 1, 3], (spec.layers, spec.kv_heads // swift.executor.ranks.world, 3)).copy()
    view[-1] = [1, 2, 3]  # layers see different pages
    draft = swift.executor.self_draft(rope, "auto")
    note("draft", draft.forward([Segment(tree, fork, PageView(view))], None, False, True))
    pages = first.pages[:4]
    low, high = pool.key_bounds(pages)
    query = torch.linspace(-1, 1, spec.layers * spec.heads // swift.executor.ranks.world * spec.head_dim)
    query = query.view(spec.layers, -1, spec.head_dim)
    found |= {"low": low, "high": high, "scores": pool.key_scores(pages, query)}
    found["keys"] = torch.stack([pool.page_keys(layer, pages) for layer in range(spec.layers)])
    again = KVCache(pool, context)
    dumped = np.stack([pool.dump(int(page)) for page in first.pages[:4]])
    again.adopt(dumped)
    found["dumped"] = torch.from_numpy(dumped)
    note("brought back", model.forward([Segment(tree, again)], None, True))
    found["projected"] = model.project(found["fork hidden"])
    found["numerics"] = torch.tensor(list(model.numerics.encode()))
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    ("family", "context", "settings"),
    [
        ("llama", 1400, {**NATIVE, "dtype": "bf16"}),  # beyond the trained positions
        ("llama", 400, {**NATIVE, "dtype": "int8", "kv_dtype": "int8"}),
        ("gemma3_text", 400, {**NATIVE, "dtype": "fp32"}),
        ("qwen2_moe", 400, {**NATIVE, "dtype": "bf16"}),
        ("llama", 1400, TORCH),
        ("gemma3_text", 400, TORCH),
        ("qwen2_moe", 400, TORCH),
    ],
)
def test_every_bit_is_that_of_one_process(
    pair: Group, family_folder: Callable[[str], Path], family: str, context: int, settings: dict[str, Any]
) -> None:
    """On the native engine the prompt goes through the stages in parts."""
    folder = family_folder(family)
    found, nothing = pair(staged, observed, 2, folder, context, **settings)
    assert nothing is None
    same(observed(folder, context, **settings), found)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: tokenswift-py[triton]")
def test_a_stage_of_triton_kernels_begins_where_the_other_has_left() -> None:
    """In Triton's interpreter. Kernels add what a block has left and norm the sum at once, so both are handed on."""
    from tokenswift_py.kernels.triton.ops import TritonOps

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
             "hidden_size": 64, "intermediate_size": 128}  # fmt: skip
    model = tiny_model(tiny_config("qwen3", **sizes), torch.bfloat16).to(DEVICE)
    whole = decoder_of(model, attention="triton", ops=TritonOps())
    weights, rope = weights_of(model), rope_tables(model.config, 512)
    backend = registry.create("tokenswift_py.kernels", "BACKEND", "attention", "triton")
    stages = []
    for spec in stage_specs(whole.spec, 2):
        own = {name: weights[name] for name in spec.shapes()}
        stages.append(TorchDecoder(spec, own, rope, backend, TritonOps()))
    segment = Segment(DraftTree.chain(np.array(TOKENS[:5]) % 61), whole.new_cache(), causal=True)
    expected = whole.forward([segment], [1, 4])
    rows = lay_out([Segment(segment.tree, whole.new_cache(), causal=True)])
    stream = None
    for stage in stages:
        pool = stage.new_pool(8)
        stream = stage.advance(pool, rows, stream, None, False).stream.cpu()
    found = stages[0].finish(stream, [1, 4])
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.hidden, expected.hidden)


def texts(folder: Path, heads: Path, **settings: Any) -> list[list[int]]:
    swift = TokenSwift.from_pretrained(str(folder), **settings)
    asked = {"max_new_tokens": 90, "seed": 4, "raw": True, "ignore_eos": True, "temperature": 0.7}
    drafted = [{"drafter": "none"}, {"drafter": "auto"}, {"drafter": "partial", "draft_tokens": 4},
               {"drafter": "partial", "draft_policy": "clusters"}, {"drafter": "cascade", "draft_policy": "quest"},
               {"draft_model": str(folder)}, {"draft_heads": str(heads)},
               {"kv_budget": 256, "kv_policy": "mass", "drafter": "ngram"}]  # fmt: skip
    return [swift.generate(" the cat sat" * 60, **asked, **how).tokens for how in drafted]


@pytest.mark.parametrize("settings", [NATIVE, TORCH])
def test_texts_are_those_of_one_process(
    pair: Group, tiny_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    heads = tmp_path / "heads.safetensors"
    vocab = TokenSwift.from_pretrained(str(tiny_folder), **settings).checkpoint.spec.vocab_size
    write_heads(random_heads("recurrent", vocab=vocab), heads)
    found, _ = pair(staged, texts, 2, tiny_folder, heads, **settings)
    assert found == texts(tiny_folder, heads, **settings)
    assert found[:7] == [found[0]] * 7, "all but the lossy one"


RUN = {"max_new_tokens": 200, "seed": 3, "ignore_eos": True, "raw": True}


def begun(folder: Path, out: Path, stop: int, **settings: Any) -> list[int]:
    snapshot.SHARD, snapshot.ROWS = 1, 64
    swift = TokenSwift.from_pretrained(str(folder), **settings)
    with swift.stream("the cat", out=out, kv_snapshot=True, **RUN) as stream:
        for _ in stream:
            if len(stream.tokens) >= stop:
                break
    return stream.tokens


def resumed(folder: Path, out: Path, **settings: Any) -> tuple[list[int], int]:
    snapshot.SHARD, snapshot.ROWS = 1, 64
    swift = TokenSwift.from_pretrained(str(folder), **settings)
    with swift.resume(out) as stream:
        list(stream)
    return stream.tokens, stream.stats.prefill_tokens


def test_a_run_goes_on_under_another_number_of_stages(
    pair: Group, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its contract is the same, and so are the pages of a snapshot."""
    for name, value in (("SHARD", 1), ("ROWS", 64)):
        monkeypatch.setattr(snapshot, name, value)
    whole = begun(tiny_folder, tmp_path / "whole", 1000, **NATIVE)
    first = begun(tiny_folder, tmp_path / "alone", 140, **NATIVE)
    spared = 128
    (tokens, computed), _ = pair(staged, resumed, 2, tiny_folder, tmp_path / "alone", **NATIVE)
    prompt = len(TokenSwift.from_pretrained(str(tiny_folder), **NATIVE).tokenizer("the cat")["input_ids"])
    assert tokens == whole and computed <= prompt + len(first) - spared
    begun_there, _ = pair(staged, begun, 2, tiny_folder, tmp_path / "there", 140, **NATIVE)
    assert begun_there == whole[: len(begun_there)]
    tokens, computed = resumed(tiny_folder, tmp_path / "there", **NATIVE)
    assert tokens == whole and computed <= prompt + len(begun_there) - spared


def company(folder: Path, **settings: Any) -> tuple[list[list[int]], set[int]]:
    """What six texts are, with one that is cancelled in between, and how many passes were under way when one ended."""
    swift, under_way = TokenSwift.from_pretrained(str(folder), **settings), set()
    engine = Engine(swift, 400, most_running=7)
    scheduler = engine._scheduler
    end = scheduler._end

    def counted() -> None:
        under_way.add(len(scheduler._flights))
        end()

    scheduler._end = counted  # type: ignore[method-assign]
    try:
        asked = {"max_new_tokens": 40, "ignore_eos": True, "raw": True}
        left = engine.submit(TOKENS[:100], **{**asked, "max_new_tokens": 300})
        orders = [engine.submit(TOKENS[n : n + 30 * n + 1], seed=n, **asked) for n in range(6)]
        written = [order.result(60).tokens for order in orders[:3]]
        left.cancel()
        written += [order.result(60).tokens for order in orders[3:]]
    finally:
        engine.close()
    return written, under_way


def alone(folder: Path, **settings: Any) -> list[list[int]]:
    swift = TokenSwift.from_pretrained(str(folder), **settings)
    asked = {"max_new_tokens": 40, "ignore_eos": True, "raw": True, "context": 400}
    return [swift.generate(TOKENS[n : n + 30 * n + 1], seed=n, **asked).tokens for n in range(6)]


def test_many_texts_are_each_what_they_are_alone(pair: Group, tiny_folder: Path) -> None:
    (written, under_way), _ = pair(staged, company, 2, tiny_folder, **NATIVE)
    assert written == alone(tiny_folder, **NATIVE)
    assert under_way == {1, 2}, "while a pass is with the second stage, the first begins the next"


def test_stages_of_several_tensor_ranks(family_folder: Callable[[str], Path], pair: Group) -> None:
    """The pages and queries of each rank are those of its own heads, so hidden states and logits are compared."""
    folder = family_folder("llama")
    expected = observed(folder, 1400, **TORCH)
    four = processes(4)
    first, second, *nothing = next(four)(staged, observed, 2, folder, 1400, **TORCH)
    next(four, None)
    assert nothing == [None, None]
    whole = ("hidden", "logits", "residual", "projected")
    for name in (name for name in expected if name.endswith(whole)):
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected[name], rtol=1e-3, atol=2e-4)
    for part in ("prompt page_mass", "company queries", "low", "keys"):
        along = {"prompt page_mass": 2, "company queries": 2, "low": 1, "keys": 1}[part]
        torch.testing.assert_close(torch.cat([first[part], second[part]], along), expected[part], rtol=1e-3, atol=2e-4)


def broken(folder: Path, **settings: Any) -> tuple[str, list[int]]:
    """A pass that fails on the second stage, and a text after it."""
    swift = TokenSwift.from_pretrained(str(folder), **settings)
    asked = {**RUN, "max_new_tokens": 20, "drafter": "none"}
    with pytest.raises(RanksError) as error:
        swift.generate("the cat", **asked)
    return str(error.value), swift.generate("the cat", **asked).tokens


def failing(stage: int, at: int, stages: int, *arguments: Any, **settings: Any) -> Any:
    """`staged`, with a pass that fails on a stage: call `at` of its layers, counted from 1."""
    whole, calls = NativeDecoder.advance, [0]

    def advance(self: NativeDecoder, *given: Any) -> Any:
        calls[0] += 1
        if stage_of(stages) == stage and calls[0] == at:
            raise OSError("a cable was pulled")
        return whole(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeDecoder, "advance", advance)
        return staged(*arguments[:1], stages, *arguments[1:], **settings)


LONG = {"max_new_tokens": 20, "ignore_eos": True, "raw": True, "drafter": "none"}


def own_part_fails(folder: Path, **settings: Any) -> list[int]:
    """The first stage fails at the second part of a prompt. The text after it is whole."""
    swift = TokenSwift.from_pretrained(str(folder), **settings)
    with pytest.raises(OSError, match="a cable was pulled"):
        swift.generate(TOKENS[:300], seed=5, **LONG)
    return swift.generate(TOKENS[:300], seed=5, **LONG).tokens


def left_alone(folder: Path, **settings: Any) -> list[torch.Tensor]:
    """A pass for which nobody waits, as after Ctrl-C, and others after it."""
    swift = TokenSwift.from_pretrained(str(folder), **settings)
    model: Any = swift.executor.model(swift.rope(400, Positions()))
    cache, found = model.new_cache(), []
    for _ in range(2):
        model.begin([Segment(DraftTree.chain(TOKENS[:300]), cache, causal=True)], [0])
        cache.drop_tail()
        found.append(model.forward([Segment(DraftTree.chain(TOKENS[:70]), cache, causal=True)], [69]).logits)
        cache.drop_tail()
    return found


def slowly(stages: int, *arguments: Any, **settings: Any) -> Any:
    whole = NativeDecoder.advance

    def advance(self: NativeDecoder, *given: Any) -> Any:
        time.sleep(0.1 * stage_of(stages))
        return whole(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeDecoder, "advance", advance)
        return staged(left_alone, stages, *arguments, **settings)


def two_in_company(folder: Path, **settings: Any) -> list[list[int] | str]:
    """What two texts are, or the line that each has ended with."""
    swift, ends = TokenSwift.from_pretrained(str(folder), **settings), list[Any]()
    engine = Engine(swift, 400, drafter="none", most_running=2)
    try:
        orders = [engine.submit(TOKENS[n : n + 20], seed=n, **{**LONG, "max_new_tokens": 60}) for n in range(2)]
        for order in orders:
            try:
                ends.append(order.result(60).tokens)
            except RuntimeError as error:
                ends.append(str(error))
    finally:
        engine.close()
    return ends


def spoiled(folder: Path, **settings: Any) -> tuple[list[str], list[int]]:
    """Rows that could not be moved on the second stage, passes over their pool, and a text after them."""
    swift, told = TokenSwift.from_pretrained(str(folder), **settings), []
    model: Any = swift.executor.model(swift.rope(400, Positions()))
    cache = model.new_cache()
    model.forward([Segment(DraftTree.chain(TOKENS[:70]), cache, causal=True)], [])
    cache.commit(range(70))
    fork = cache.fork()  # moves the rows of the partial page
    for each in (fork, fork, cache):
        with pytest.raises(MemoryError) as error:
            model.forward([Segment(DraftTree.chain([5]), each)])
        each.drop_tail()
        told.append(str(error.value))
    return told, swift.generate("the cat", **{**RUN, "max_new_tokens": 20, "drafter": "none"}).tokens


def moves_fail(stages: int, *arguments: Any, **settings: Any) -> Any:
    def move(self: NativePool, *given: Any) -> None:
        if stage_of(stages):
            raise MemoryError("no room to move rows")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativePool, "move", move)
        return staged(spoiled, stages, *arguments, **settings)


def test_a_pass_that_fails_ends_its_own_texts_alone(pair: Group, tiny_folder: Path) -> None:
    """Passes of other texts are under way with it, and go on."""
    expected = alone_of_two(tiny_folder, **NATIVE)
    ends, _ = pair(failing, 1, 20, 2, two_in_company, tiny_folder, **NATIVE)
    failed = next(n for n, end in enumerate(ends) if isinstance(end, str))
    assert ends[failed] == "OSError: a cable was pulled (stage 1)"
    assert ends[1 - failed] == expected[1 - failed]


def alone_of_two(folder: Path, **settings: Any) -> list[list[int]]:
    swift = TokenSwift.from_pretrained(str(folder), **settings)
    asked = {**LONG, "max_new_tokens": 60, "context": 400}
    return [swift.generate(TOKENS[n : n + 20], seed=n, **asked).tokens for n in range(2)]


def test_stages_go_on_after_faults_of_any_kind(pair: Group, tiny_folder: Path) -> None:
    found, _ = pair(failing, 0, 2, 2, own_part_fails, tiny_folder, **NATIVE)
    swift = TokenSwift.from_pretrained(str(tiny_folder), **NATIVE)
    assert found == swift.generate(TOKENS[:300], seed=5, **LONG).tokens
    (first, second), _ = pair(slowly, 2, tiny_folder, **NATIVE)
    model: Any = swift.executor.model(swift.rope(400, Positions()))
    segment = Segment(DraftTree.chain(TOKENS[:70]), model.new_cache(), causal=True)
    assert torch.equal(first, second) and torch.equal(first, model.forward([segment], [69]).logits)
    (told, tokens), _ = pair(moves_fail, 2, tiny_folder, **NATIVE)
    assert told == ["no room to move rows (stage 1)"] * 3, "no pass reads rows that are not there"
    assert tokens == swift.generate("the cat", **{**RUN, "max_new_tokens": 20, "drafter": "none"}).tokens


def ignores_sigterm(pid: str) -> bool:
    """Returns whether a process has taken its place in a pipeline, where it ignores SIGTERM."""
    told = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text()) if pid else None
    return told is not None and bool(int(told[1], 16) >> (signal.SIGTERM - 1) & 1)


def helped(pid: Path) -> bool:
    """Asks for help, which needs no model. Returns whether the other stage is let go by the first, and by nobody else:
    not by the SIGTERM that torchrun sends to all, after which a server ends its texts."""
    flags = ["--pipeline-parallel-size", "2", "--help"]
    if stage_of(2):
        pid.write_text(str(os.getpid()))
        return main(flags) == 0
    try:
        with pytest.raises(SystemExit):
            main(flags)
        until(lambda: pid.is_file() and ignores_sigterm(pid.read_text()))
        os.kill(int(pid.read_text()), signal.SIGTERM)
        return column.cache_info().currsize == 1
    finally:
        column(find_place(2)).end()


def test_nobody_waits_for_a_first_stage_that_needs_no_model(pair: Group, tmp_path: Path) -> None:
    assert pair(helped, tmp_path / "pid") == [True, True]


def dies(folder: Path, told: Path) -> None:
    """The second stage's process ends in the middle of a text."""
    whole, calls = NativeDecoder.advance, [0]

    def advance(self: NativeDecoder, *given: Any) -> Any:
        calls[0] += 1
        if stage_of(2) and calls[0] == 5:
            os._exit(1)
        return whole(self, *given)

    def write(**settings: Any) -> None:
        swift = TokenSwift.from_pretrained(str(folder), **settings)
        with pytest.raises(RanksError) as error:
            swift.generate("the cat", **{**RUN, "drafter": "none"})
        told.write_text(str(error.value))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeDecoder, "advance", advance)
        staged(write, 2, **NATIVE)


def test_a_process_that_dies_is_told_in_a_line(tiny_folder: Path, tmp_path: Path) -> None:
    two = processes(2)
    with pytest.raises(BrokenProcessPool):
        next(two)(dies, tiny_folder, tmp_path / "told")
    next(two, None)
    assert (tmp_path / "told").read_text().startswith("process 1 of the pipeline does not answer any more (")


def refused(**settings: Any) -> str:
    with pytest.raises(UserError) as error:
        TokenSwift.from_pretrained(**settings)
    return str(error.value)


def other_files(stages: int, folder: Path, other: Path) -> Any:
    """The second stage finds another model under the same name, as on another machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "open_checkpoint", lambda *asked: open_checkpoint(str(other), *asked[1:]))
        return staged(differing, stages, folder)


def differing(folder: Path, **settings: Any) -> str:
    with pytest.raises(RanksError) as error:
        TokenSwift.from_pretrained(str(folder), **NATIVE, **settings)
    return str(error.value)


def refused_sizes(sizes: list[int], folder: Path) -> list[str]:
    return [refused(model=str(folder), pipeline_parallel_size=size) for size in sizes]


def test_what_goes_wrong_is_told_in_a_line(pair: Group, tiny_folder: Path, tmp_path: Path) -> None:
    (told, tokens), _ = pair(failing, 1, 1, 2, broken, tiny_folder, **NATIVE)
    assert told == "OSError: a cable was pulled (stage 1)"
    asked = {**RUN, "max_new_tokens": 20, "drafter": "none"}
    assert tokens == TokenSwift.from_pretrained(str(tiny_folder), **NATIVE).generate("the cat", **asked).tokens
    for first, second in zip(*pair(refused_sizes, [3, 0], tiny_folder), strict=True):
        assert first == second and first.endswith("a whole number that divides torchrun's 2 processes (WORLD_SIZE)")
    save_tiny(tmp_path / "flat", num_hidden_layers=1)
    (told, _) = pair(staged, refused, 2, model=str(tmp_path / "flat"))
    assert told == "pipeline_parallel_size: 2 is not allowed; no more than the model's 1 layers"
    (told, _) = pair(other_files, 2, tiny_folder, tmp_path / "flat")
    assert told == f"RanksError: the model's files differ from the first stage's: {tmp_path / 'flat'} (stage 1)"
    (told, _) = pair(staged, refused, 2, model="no/such/folder")
    assert told.startswith("model: 'no/such/folder'")
    (told, _) = pair(staged, refused, 2, model=str(tiny_folder), kv_dtype="int8", **TORCH)
    assert told.startswith("kv_dtype: 'int8'") and "stage" not in told


def test_stages_multiply_by_about_as_many_weights() -> None:
    """The first has the LM head, and so fewer layers."""
    spec = ModelSpec.from_config(tiny_config(num_hidden_layers=12))
    layer = (spec.multiplied - spec.vocab_size * spec.hidden_size - spec.hidden_size) // 12
    for stages in (1, 2, 3, 5, 12):
        found = stage_specs(spec, stages)
        assert [s.first_layer for s in found] == np.cumsum([0, *(s.layers for s in found)])[:-1].tolist()
        assert sum(s.layers for s in found) == 12 and [s.vocabulary for s in found] == [True] + [False] * (stages - 1)
        assert sum(s.parameters for s in found) == spec.parameters
        assert max(s.multiplied for s in found) - spec.multiplied / stages < layer
    wide = ModelSpec.from_config(tiny_config(num_hidden_layers=12, vocab_size=61 * 100))
    assert stage_specs(wide, 3)[0].layers == 1


def test_torchrun_writes_one_text(tiny_folder: Path, tmp_path: Path) -> None:
    """The second stage reads no prompt and writes nothing. The run goes on in one process."""
    out = tmp_path / "out"
    arguments = ["--model", str(tiny_folder), "--raw", "--seed", "3", "--ignore-eos", "--context", "60",
                 "--max-new-tokens"]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
                "--master-port", str(free_port()), str(ROOT / "generate.py")]  # fmt: skip
    done = subprocess.run(
        [*launcher, *arguments, "24", "--threads", "1", "--pipeline-parallel-size", "2", "--baseline",
         "--out", str(out)],
        input="the cat and", capture_output=True, text=True, timeout=150, env={**surroundings(), **LOCAL},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert done.stdout.strip() == (out / "text.txt").read_text().strip()
    assert report["identical"] is True and report["engine"] == "native"
    assert main(["resume", str(out), "--extend", "10", "--quiet"]) == 0
    assert main([*arguments, "34", "--prompt", "the cat and", "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    assert np.array_equal(np.load(out / "tokens.npy"), np.load(tmp_path / "whole" / "tokens.npy"))
