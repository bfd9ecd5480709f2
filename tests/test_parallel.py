"""One model held by two processes: what they write, what they share out, and what they refuse.

The processes are started once and asked to run functions of this file, both the same one at the same time.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import decoder_of, tiny_config, tiny_model, weights_of
from interpreter import DEVICE
from processes import LOCAL, Group, free_port, processes
from random_heads import random_heads
from scripted import Scripted, write
from small_models import saved
from tokenswift_py import TokenSwift, registry
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.checkpoints.stored_tensors import StoredTensors, weight_files
from tokenswift_py.cli.main import main
from tokenswift_py.core import DraftTree, SamplingParams, Segment
from tokenswift_py.decoding.eviction import Eviction, pooled
from tokenswift_py.decoding.passes import Passes
from tokenswift_py.drafters.base import Context, create
from tokenswift_py.drafters.cascade import Cascade
from tokenswift_py.drafters.head_files import fingerprint, heads_file, write_heads
from tokenswift_py.drafters.head_weights import FORMS
from tokenswift_py.drafters.heads import Heads
from tokenswift_py.errors import UserError
from tokenswift_py.models.executors import choose_engine
from tokenswift_py.models.ops import Ops
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.parallel.ranks import Ranks, RanksError, join
from tokenswift_py.parallel.shards import ParallelDecoder, Shard
from tokenswift_py.runs import journal, snapshot
from tokenswift_py.runs.journal import JournalError, read

ROOT = Path(__file__).resolve().parent.parent
PROMPT = [int(t) for t in np.random.default_rng(2).integers(0, 61, 50)]
LONG_PROMPT = (PROMPT * 3)[:130]
Pair = Group
ranks: Ranks  # in the processes


def begin() -> None:
    global ranks
    ranks = join()
    ranks.place(torch.device("cpu"))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    yield from processes(2, begin)


def share_of(
    model: Any,
    attention: str = "sdpa",
    ops: Ops | None = None,
    gather: bool = False,
    kv_dtype: torch.dtype | None = None,
) -> ParallelDecoder:
    """This process's part of a model of Hugging Face's."""
    shard = Shard(ranks.rank, ranks.world, gather)
    weights = {n: t[shard.of(n, t.shape)].contiguous() for n, t in weights_of(model).items()}
    backend = registry.create("tokenswift_py.kernels", "BACKEND", "attention", attention)
    spec, rope = ModelSpec.from_config(model.config), rope_tables(model.config, 512)
    return ParallelDecoder(spec, weights, rope, backend, ops, False, kv_dtype, shard, ranks)


def texts(config: Any, params: SamplingParams, truth: list[int]) -> list[list[int]]:
    model = tiny_model(config)
    decoder, embedding = share_of(model), weights_of(model)["model.embed_tokens.weight"]
    drafted = [(create("none"), {}), (create("ngram"), {"draft_tokens": 6}), (create("cascade", policy="quest"), {}),
               (create("partial", view_tokens=64), {}), (create("partial", view_tokens=64), {"draft_tokens": 5}),
               (Scripted(LONG_PROMPT + truth, 61, 0.7), {"draft_tokens": 30}),
               *((Heads(random_heads(form), embedding), {"draft_tokens": 7}) for form in FORMS),
               (Cascade(heads=Heads(random_heads("recurrent"), embedding)), {}),
               (Cascade(heads=Heads(random_heads("medusa"), embedding)), {"draft_tokens": 9})]  # fmt: skip
    return [write(decoder, LONG_PROMPT, 24, params, d, prefill_chunk=64, ranks=ranks, **more)[0] for d, more in drafted]


@pytest.mark.parametrize(
    ("family", "temperature", "trained"), [("llama", 0.0, 512), ("qwen3", 0.9, 200), ("qwen2_moe", 0.9, 512)]
)
def test_every_drafter_writes_what_one_process_does(pair: Pair, family: str, temperature: float, trained: int) -> None:
    """Measured: in float64 no rounding comes near a choice. Where no number is given, rank 0's clock plans for both.
    With few trained positions most of the text is met by Self-Extend."""
    config = tiny_config(family, max_position_embeddings=trained)
    params = SamplingParams(temperature=temperature, seed=5, penalty=1.1, min_p=0.02)
    alone, _, _ = write(decoder_of(tiny_model(config)), LONG_PROMPT, 24, params)
    for by_rank in pair(texts, config, params, alone):
        assert by_rank == [alone] * 11


def evicting() -> tuple[list[list[int]], int]:
    decoder, texts = share_of(tiny_model(tiny_config())), []
    for drafter in (create("none"), create("ngram"), create("partial", view_tokens=64)):
        policy = registry.create("tokenswift_py.kvcache.policies", "POLICY", "kv_policy", "mass")
        eviction = Eviction(policy, 256, ranks=ranks)
        texts.append(write(decoder, LONG_PROMPT, 140, None, drafter, eviction=eviction, ranks=ranks)[0])
    return texts, eviction.evictions


def pooled_scores(scores: np.ndarray) -> np.ndarray:
    return ranks.all(pooled(scores[:, ranks.rank :: 2], 10)).sum(0)


def test_all_heads_have_a_say_in_what_is_evicted(pair: Pair) -> None:
    (texts, evictions), (others, _) = pair(evicting)
    assert texts == others == [texts[0]] * 3 and evictions == 1
    scores = np.random.default_rng(0).random((3, 4, 12))
    for mine in pair(pooled_scores, scores):
        np.testing.assert_allclose(mine, pooled(scores, 10), rtol=1e-12)


def passes(decoder: Any, heads: slice = slice(None)) -> torch.Tensor:
    """Logits of a chunk, of a tree that crosses the page boundary at 64, and of a row alone. What lies before is drawn,
    for both KV heads, of which the decoder has these."""
    cache, tree = decoder.new_cache(), DraftTree([9, 8, 7, 6, 5, 4], [-1, 0, 0, 2, 2, 4])
    torch.manual_seed(0)
    for part in (cache.pool.keys, cache.pool.values):
        layers, _, _, lanes, size = part.shape
        part[:, :, 0] = torch.randn(layers, 2, lanes, size)[:, heads].to(part)
    cache.append(np.arange(58, dtype=np.int32), True)
    cache.commit(range(58))
    first = decoder.forward([Segment(DraftTree.chain(PROMPT[:4]), cache, causal=True)], [0, 3]).logits
    cache.commit(range(4))
    together = decoder.forward([Segment(tree, cache)]).logits
    cache.drop_tail()
    alone = decoder.forward([Segment(DraftTree.chain(tree.tokens[:1]), cache)]).logits
    return torch.cat([first, together, alone])


def shared_passes(config: Any, gather: bool, dtype: torch.dtype) -> tuple[torch.Tensor, str, str, tuple[int, ...]]:
    decoder = share_of(tiny_model(config, dtype), gather=gather)
    logits = passes(decoder, slice(ranks.rank, ranks.rank + 1))
    return logits, decoder.numerics, decoder.guarantee, tuple(decoder.new_pool(4).keys.shape)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_shares_of_a_model_compute_what_it_does(pair: Pair, gather: bool, tied: bool) -> None:
    """A vocabulary of 61 and biases everywhere."""
    config = tiny_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    expected = passes(decoder_of(tiny_model(config)))
    (logits, numerics, guarantee, pool), (others, *_) = pair(shared_passes, config, gather, torch.float64)
    assert torch.equal(logits, others), "every rank has the same bits"
    assert (logits - expected).abs().max() < 1e-9
    assert numerics.endswith("/tp-2-gather" if gather else "/tp-2-all-reduce") and guarantee == "measured"
    assert pool == (3, 1, 4, 64, 8), "pages of its own KV head only"


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in ("smollm3", "phi3", "gemma2", "gemma3_text", "mixtral", "qwen2_moe", "qwen3_moe")),
        ("qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    ],
)
def test_shares_of_families_with_layers_of_several_kinds(
    pair: Pair, family: str, changes: dict[str, Any], gather: bool
) -> None:
    """Layers without RoPE or with a base of their own, norms after attention and feed-forward, a scaled embedding
    and soft caps;
    mixtures of experts in all layers or in some, with an expert that every row takes and without. `decoder_of` is held
    to transformers in test_families.py."""
    config = tiny_config(family, **changes)
    expected = passes(decoder_of(tiny_model(config)))
    logits, others = (found[0] for found in pair(shared_passes, config, gather, torch.float64))
    assert torch.equal(logits, others)
    assert (logits - expected).abs().max() < 1e-9


def test_bf16_travels_too(pair: Pair) -> None:
    config = tiny_config("qwen2")
    expected = passes(decoder_of(tiny_model(config, torch.bfloat16)))
    for gather in (False, True):
        logits = pair(shared_passes, config, gather, torch.bfloat16)[0][0]
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


TRITON = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
          "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64,
          "shared_expert_intermediate_size": 128}  # fmt: skip  # every share begins at a tile's edge


def triton_decoder(make: Callable[..., Any], family: str, dtype: torch.dtype, **more: Any) -> Any:
    from tokenswift_py.kernels.triton.ops import TritonOps

    model = tiny_model(tiny_config(family, **TRITON), dtype).to(DEVICE)
    return make(model, attention="triton", ops=TritonOps(), **more)


def triton_passes(family: str, dtype: torch.dtype) -> tuple[torch.Tensor, str]:
    decoder = triton_decoder(share_of, family, dtype, gather=True)
    return passes(decoder, slice(ranks.rank, ranks.rank + 1)), decoder.guarantee


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: tokenswift-py[triton]")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="two processes of this test have no GPU each")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen3", torch.float32), ("qwen3", torch.bfloat16), ("qwen2_moe", torch.bfloat16)],
)
def test_in_fixed_order_the_bits_are_those_of_one_process(pair: Pair, family: str, dtype: torch.dtype) -> None:
    """Law 1, and more: a row's logits do not depend on how many processes computed them."""
    expected = passes(triton_decoder(decoder_of, family, dtype))
    for logits, guarantee in pair(triton_passes, family, dtype):
        assert torch.equal(logits, expected)
        assert torch.equal(logits[2], logits[-1]), "in a tree and alone"
        assert guarantee == "bitwise, unverified on hardware"


def test_a_share_is_read_alone_and_shares_make_the_whole(tiny_folder: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_folder))
    whole, files = checkpoint.tensors(), weight_files(tiny_folder)
    for gather in (False, True):
        parts = [StoredTensors(files, checkpoint.spec.shapes(), Shard(r, 2, gather).of) for r in (0, 1)]
        for name, tensor in whole.items():
            shares = [part[name] for part in parts]
            if any(kind in name for kind in ("norm",)):
                assert all(torch.equal(share, tensor) for share in shares)
            else:
                along = 1 if not gather and any(kind in name for kind in ("o_proj.w", "down_proj.w")) else 0
                assert torch.equal(torch.cat(shares, along), tensor)
                assert shares[0].numel() < 0.6 * tensor.numel() + 1000


def test_what_cannot_be_shared_out_is_refused() -> None:
    spec = ModelSpec.from_config(tiny_config())  # 6 heads, 2 KV heads, a feed-forward of 80
    with pytest.raises(UserError, match="num_key_value_heads: 2 is not allowed; 3 ranks must divide it"):
        Shard(0, 3, False).spec(spec)
    with pytest.raises(UserError, match="num_attention_heads: 6 is not allowed; 4 ranks"):
        Shard(0, 4, False).spec(spec)
    with pytest.raises(UserError, match="intermediate_size: 81 is not allowed; 2 ranks"):
        Shard(0, 2, True).spec(ModelSpec.from_config(tiny_config(intermediate_size=81)))
    for family, name, says in (
        ("mixtral", "intermediate_size", "^an expert's"),
        ("qwen3_moe", "moe_intermediate_size", "^an expert's"),
        ("qwen2_moe", "shared_expert_intermediate_size", "^the shared expert's"),
    ):
        spec = ModelSpec.from_config(tiny_config(family, **{name: 81}))
        with pytest.raises(UserError, match=f"{says} intermediate_size: 81 is not allowed; 2 ranks must divide it"):
            Shard(0, 2, False).spec(spec)
    Shard(0, 2, False).spec(ModelSpec.from_config(tiny_config("qwen3_moe", intermediate_size=81)))  # no dense layer
    with pytest.raises(UserError, match="engine: 'native' is not allowed; it runs in one process"):
        choose_engine("native", torch.device("cpu"), "auto", 2)
    assert choose_engine("auto", torch.device("cpu"), "auto", 2) == "torch"


def other_choices() -> None:
    params = SamplingParams(temperature=1.0, seed=ranks.rank)
    write(share_of(tiny_model(tiny_config())), PROMPT, 20, params, ranks=ranks)


def other_rows() -> None:
    decoder = share_of(tiny_model(tiny_config()))
    decoder.forward([Segment(DraftTree.chain([1, 2, ranks.rank]), decoder.new_cache())])


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (other_choices, r"ranks disagree on the tokens from position \d+ on: \[1\] differ from rank 0"),
        (other_rows, r"ranks disagree on a pass \(draft, rows\)"),
    ],
)
def test_ranks_that_disagree_stop(pair: Pair, function: Callable[[], None], says: str) -> None:
    with pytest.raises(RanksError, match=says):
        pair(function)


def other_heads(folder: str, scratch: str, leads: str | None, follows: str | None) -> str:
    """Each rank finds the heads of this form in a cache folder of its own, or none. Returns what is said to that."""
    before, cache = os.environ.get("TOKENSWIFT_CACHE"), Path(scratch) / str(ranks.rank)
    os.environ["TOKENSWIFT_CACHE"] = str(cache)
    try:
        if form := leads if ranks.leads else follows:
            write_heads(random_heads(form), heads_file(cache, fingerprint(open_checkpoint(folder))))
        swift = TokenSwift.from_pretrained(folder, dtype="fp32", engine="torch")
        swift.generate("the cat", max_new_tokens=9, raw=True, seed=1, drafter="cascade", draft_heads="auto")
    except (RanksError, UserError) as error:
        return str(error)
    finally:
        del os.environ["TOKENSWIFT_CACHE"]
        os.environ |= {} if before is None else {"TOKENSWIFT_CACHE": before}
    return "nothing"


def test_all_ranks_draft_with_the_same_heads(pair: Pair, tiny_folder: Path, tmp_path: Path) -> None:
    """A pass that one of them makes and the others do not would never end."""
    disagree, missing = "ranks disagree on the draft heads: [1] differ", "draft_heads: 'auto' is not allowed"
    for leads, follows, says in (
        ("medusa", None, missing), (None, "medusa", missing), ("medusa", "tokenswift", disagree),
    ):  # fmt: skip
        told = pair(other_heads, str(tiny_folder), str(tmp_path / f"{leads} {follows}"), leads, follows)
        assert all(says in line for line in told), told
    assert pair(other_heads, str(tiny_folder), str(tmp_path / "same"), "medusa", "medusa") == ["nothing"] * 2


def other_trees() -> tuple[list[int], int]:
    """Rank 1 proposes what rank 0 does not."""
    truth = write(share_of(tiny_model(tiny_config())), PROMPT, 60, ranks=ranks)[0]
    drafter = Scripted(PROMPT + truth, 61, 0.9, seed=ranks.rank)
    text, engine, _ = write(share_of(tiny_model(tiny_config())), PROMPT, 60, None, drafter, ranks=ranks, draft_tokens=9)
    assert text == truth
    return text, engine.stats.num_accepted_draft_tokens


def test_rank_0_proposes(pair: Pair) -> None:
    first, second = pair(other_trees)
    assert first == second and first[1] > 0


def other_plans() -> tuple[list[int], int]:
    """Rank 0 looks for guesses where rank 1 looks for none, as it may where it alone has a draft model."""
    truth = write(share_of(tiny_model(tiny_config())), PROMPT, 60, ranks=ranks)[0]
    drafter = Hasty(PROMPT + truth, 61, 0.9, seed=ranks.rank)
    text, engine, _ = write(share_of(tiny_model(tiny_config())), PROMPT, 60, None, drafter, ranks=ranks)
    assert text == truth
    return text, engine.stats.num_accepted_draft_tokens


class Hasty(Scripted):
    """On rank 0 it takes all the time that the planner would give to rounds of plain decoding."""

    def propose(self, context: Context, budget: int) -> Passes[DraftTree]:
        if ranks.leads:
            context.plan.may_probe(1e9, "plain")
        tree = yield from super().propose(context, budget)
        return tree


def test_rank_0_plans(pair: Pair) -> None:
    first, second = pair(other_plans)
    assert first == second and first[1] > 0


def drafted_by_rank_0(folder: str, smaller: str) -> tuple[list[Any], int, int]:
    """A text that a draft model of rank 0 alone must not change, and how many of its guesses were right."""
    swift = TokenSwift.from_pretrained(folder, dtype="fp32", engine="torch")
    run = {"max_new_tokens": 60, "seed": 4, "ignore_eos": True, "raw": True}
    plain = swift.generate("the cat", drafter="none", **run)
    own, other, fixed = (
        swift.generate("the cat", draft_model=name, **run, **more)
        for name, more in ((folder, {}), (smaller, {}), (folder, {"draft_tokens": 4}))
    )
    texts = [result.tokens for result in (plain, own, other, fixed)]
    return texts, fixed.stats.num_accepted_draft_tokens, 0 if swift._draft is None else 1


def test_a_draft_model_is_rank_0s_alone(pair: Pair, tiny_folder: Path, tmp_path: Path) -> None:
    smaller = saved(tmp_path / "smaller")
    (texts, accepted, has), (others, also, lacks) = pair(drafted_by_rank_0, str(tiny_folder), str(smaller))
    assert texts == others == [texts[0]] * 4
    assert accepted == also > 40, "it drafts for itself, so its guesses are right"
    assert (has, lacks) == (1, 0)
    int8 = {"draft_model": str(smaller), "draft_weights": "int8"}
    wrong = (("draft_model: model: 'nowhere'", {"draft_model": "nowhere"}), ("draft_weights: 'int8'", int8))
    for says, settings in wrong:
        assert all(error.startswith(says) for error in pair(refused_run, str(tiny_folder), **settings))


def refused_run(folder: str, **settings: Any) -> str:
    swift = TokenSwift.from_pretrained(folder, dtype="fp32", engine="torch", attention="sdpa")
    with pytest.raises(UserError) as error:
        swift.generate("the cat", max_new_tokens=5, raw=True, **settings)
    return str(error.value)


RUN = {"max_new_tokens": 220, "seed": 3, "ignore_eos": True, "raw": True}


def small_shards() -> None:
    snapshot.SHARD, snapshot.ROWS = 1, 64


def recorded(folder: str, out: str | None, stop: int) -> list[int]:
    """Writes until rank 0 stops after so many tokens. None for `out` is nowhere."""
    small_shards()
    swift = TokenSwift.from_pretrained(folder, dtype="fp32", engine="torch")
    with swift.stream("the cat", out=out, kv_snapshot=out is not None, **RUN) as stream:
        for _ in stream:
            if ranks.leads and len(stream.tokens) >= stop:
                break
    return stream.tokens


def resumed(folder: str, out: str, **settings: Any) -> tuple[list[int], int, str]:
    swift = TokenSwift.from_pretrained(folder, dtype="fp32", engine="torch")
    with swift.resume(out, **settings) as stream:
        list(stream)
    return stream.tokens, stream.stats.prefill_tokens, stream.result().ending


def test_an_interrupted_run_goes_on(pair: Pair, tiny_folder: Path, tmp_path: Path) -> None:
    """Each rank keeps the KV of its own heads; what one of them lacks, all compute."""
    folder, out = str(tiny_folder), tmp_path / "run"
    (whole, _) = pair(recorded, folder, None, 1000)
    begun, same = pair(recorded, folder, str(out), 140)
    assert begun == same == whole[: len(begun)] and 140 <= len(begun) < 220
    names = [f"{shard:06d}-{rank}of2.safetensors" for shard in (0, 1) for rank in (0, 1)]
    assert sorted(path.name for path in (out / "kv").iterdir()) == names
    assert read(out).tokens == begun
    rows = len(read(out).header["prompt"]) + len(begun) - 1
    copies = []
    for name, spared in (("000001-1of2", 64), ("000000-0of2", 0), (None, 128)):
        copies.append(Path(shutil.copytree(out, tmp_path / f"copy{len(copies)}")))
        if name:
            damaged = copies[-1] / "kv" / f"{name}.safetensors"
            damaged.write_bytes(damaged.read_bytes()[:-7])
        for tokens, computed, ending in pair(resumed, folder, str(copies[-1]), drafter="partial"):
            assert (tokens, ending) == (whole, "length")
            assert computed == rows - spared
        assert read(copies[-1]).tokens == whole
    for error in pair(refused_resume, folder, str(copies[-1]), seed=9):
        assert error == "seed: 9 is not allowed; the run was written with 3"
    for error in pair(refused_resume, folder, str(tmp_path / "none")):
        assert error.startswith("journal: ")
    alone = TokenSwift.from_pretrained(folder, dtype="fp32", engine="torch")
    with pytest.raises(UserError, match=r"^numerics: .* the run was written with '.*/tp-2-all-reduce'"):
        alone.resume(out)


def refused_resume(folder: str, out: str, **settings: Any) -> str:
    swift = TokenSwift.from_pretrained(folder, dtype="fp32", engine="torch")
    with pytest.raises(UserError) as error:
        swift.resume(out, **settings)
    return str(error.value)


def without_disk(folder: str, out: str, resume: bool = False) -> str:
    """How a run is refused that rank 0, which alone writes, has no room to record."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    swift = TokenSwift.from_pretrained(folder, dtype="fp32", engine="torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.os, "pwrite", full)
        with pytest.raises((JournalError, UserError)) as error:
            swift.resume(out, extend=5) if resume else swift.stream("the cat", out=out, **RUN)
    return f"{error.type.__name__}: {error.value}"


def test_what_rank_0_cannot_record_no_rank_begins(pair: Pair, tiny_folder: Path, tmp_path: Path) -> None:
    """Otherwise the others would wait for rank 0, which has left."""
    folder, out = str(tiny_folder), tmp_path / "a name that is not UTF-8: \udcff"
    for _ in range(2):
        told, same = pair(without_disk, folder, str(out))
        assert told == same and told.startswith("JournalError: out: No space left on device: nothing could be recorded")
        assert told.endswith(r"UTF-8: \udcff") and list(out.iterdir()) == [], "the folder can be taken again"
    arguments = ["--model", folder, "--engine", "torch", "--dtype", "fp32", "--prompt", "the cat", "--raw", "--quiet"]
    arguments += ["--max-new-tokens", "3", "--context", "90", "--out", str(out), "--ignore-eos", "--seed", "3"]
    assert pair(by_command_line, *arguments) == [0, 0]
    told, same = pair(without_disk, folder, str(out))
    assert told == same and told.startswith("UserError: out: ") and told.endswith("(File exists)")
    told, same = pair(without_disk, folder, str(out), resume=True)
    assert told == same and told.startswith("JournalError: out: No space left on device: 3 tokens are safe")
    assert read(out).tokens == np.load(out / "tokens.npy").tolist() and read(out).extended == 0


def by_command_line(*arguments: str) -> int:
    small_shards()
    return main(arguments)


def test_the_command_line_goes_on_too(pair: Pair, tiny_folder: Path, tmp_path: Path) -> None:
    """Rank 0 alone has the folder: the other writes its shards there and nothing else."""
    out = tmp_path / "run"
    arguments = ["--model", str(tiny_folder), "--engine", "torch", "--dtype", "fp32", "--prompt", "the cat", "--raw",
                 "--ignore-eos", "--seed", "3", "--quiet"]  # fmt: skip
    context = ("--context", "300")
    assert pair(by_command_line, *arguments, *context, "--max-new-tokens", "220", "--out", str(tmp_path / "whole")) \
        == [0, 0]  # fmt: skip
    assert pair(by_command_line, *arguments, *context, "--max-new-tokens", "130", "--out", str(out),
                "--kv-snapshot") == [0, 0]  # fmt: skip
    assert pair(by_command_line, "resume", str(out), "--quiet") == [0, 0], "finished: nothing to do"
    assert len(list((out / "kv").iterdir())) == 4
    assert pair(by_command_line, "resume", str(out), "--extend", "90", "--drafter", "none", "--quiet") == [0, 0]
    files = {path.name for path in out.iterdir()}
    assert files == {"journal.bin", "kv", "report.json", "text.txt", "tokens.npy"}
    assert np.array_equal(np.load(out / "tokens.npy"), np.load(tmp_path / "whole" / "tokens.npy"))
    assert json.loads((out / "report.json").read_text())["resumed_behind"] == 130
    assert pair(by_command_line, "audit", str(out), "--json", str(tmp_path / "audit.json"), "--quiet") == [0, 0]
    assert json.loads((tmp_path / "audit.json").read_text())["passed"] is True
    assert pair(by_command_line, "resume", str(tmp_path / "none"), "--quiet") == [2, 2]


def stopped_by_rank_0(folder: str) -> tuple[list[int], str]:
    swift = TokenSwift.from_pretrained(folder, dtype="fp32", engine="torch")
    with swift.stream("the cat", max_new_tokens=40, ignore_eos=True, raw=True) as stream:
        for _ in stream:
            if ranks.leads and len(stream.tokens) >= 5:
                break
    return stream.tokens, stream.result().ending


def test_where_rank_0_stops_all_stop(pair: Pair, tiny_folder: Path) -> None:
    """The seed is drawn, by rank 0 for all."""
    first, second = pair(stopped_by_rank_0, str(tiny_folder))
    assert first == second and len(first[0]) >= 5 and first[1] == "interrupted"


def leave_alone() -> bool:
    return ranks.go_on(ranks.leads)


def refused_by_rank_1() -> None:
    with ranks.same_fate():
        if not ranks.leads:
            raise UserError("memory: too little")


def refused(**settings: Any) -> str:
    with pytest.raises(UserError) as error:
        TokenSwift.from_pretrained(**settings)
    return str(error.value)


def test_errors_of_one_are_errors_of_all(pair: Pair, tiny_folder: Path) -> None:
    with pytest.raises(RanksError, match="rank 1 stopped while rank 0 goes on"):
        pair(leave_alone)
    with pytest.raises(UserError, match=r"^memory: too little \(rank 1\)$"):
        pair(refused_by_rank_1)
    for settings, says in (({"engine": "native"}, "engine: 'native'"), ({"device": "cuda:0"}, "device: 'cuda:0'"),
                           ({"dtype": "int8"}, "dtype: 'int8'"), ({"model": "no/such/folder"}, "model: ")):  # fmt: skip
        first, second = pair(refused, **{"model": str(tiny_folder), **settings})
        assert first == second and first.startswith(says)


def test_torchrun_writes_one_text(tiny_folder: Path, tmp_path: Path) -> None:
    """The prompt comes by standard input, which is rank 0's; files and output are rank 0's too."""
    out = tmp_path / "out"
    arguments = ["--model", str(tiny_folder), "--dtype", "fp32", "--raw", "--max-new-tokens", "24", "--seed", "3",
                 "--ignore-eos"]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
                "--master-port", str(free_port()), str(ROOT / "generate.py")]  # fmt: skip
    started = subprocess.Popen(
        [*launcher, *arguments, "--trace", str(tmp_path / "trace"), "--baseline", "--out", str(out)],
        stdin=-1, stdout=-1, stderr=-1, text=True, cwd=tmp_path, env={**os.environ, **LOCAL, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        said, noted = started.communicate("the cat and", timeout=150)
    finally:
        started.terminate()  # and with it what it started
    assert started.returncode == 0, noted
    report = json.loads((out / "report.json").read_text())
    assert said.strip() == (out / "text.txt").read_text().strip()
    assert noted.count("24 new tokens after a prompt") == 1
    assert report["numerics"].endswith("/tp-2-all-reduce") and report["guarantee"] == "measured"
    assert report["identical"] is True
    assert len((tmp_path / "trace").read_text().splitlines()) == report["num_spec_steps"]
    assert main([*arguments, "--engine", "torch", "--prompt", "the cat and", "--out", str(tmp_path / "alone"),
                 "--quiet"]) == 0  # fmt: skip
    assert np.array_equal(np.load(tmp_path / "alone" / "tokens.npy"), np.load(out / "tokens.npy"))
