"""Training for a longer context: the attention, positions and tables it learns with, and the command around it."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import tiny_config, tiny_model
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.cli.main import main
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.extending import adapters, attention
from tokenswift_py.extending.extend import begin, go_on
from tokenswift_py.extending.human import CONTINUATIONS, continuation
from tokenswift_py.extending.schedule import Sample, draw, plan, skipped, stages
from tokenswift_py.extending.settings import LEARN, Settings
from tokenswift_py.extending.state import TrainingFolder
from tokenswift_py.extending.tables import stretched_config
from tokenswift_py.extending.texts import Source, unread_by_tests
from tokenswift_py.extending.training import losses, precision, rate_at
from tokenswift_py.models.positions import STRETCHES, Positions
from tokenswift_py.models.rope import rope_tables
from toys import save_tiny, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("peft", reason="the extra train is not installed")


def dense_s2(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: int, scale: float) -> torch.Tensor:
    """S2-Attn by masks: a row sees those before it that its head puts into the same group. query: [H, N, D]."""
    heads, rows, _ = query.shape
    out = []
    for head in range(heads):
        shared = head * len(key) // heads
        scores = scale * query[head] @ key[shared].T
        shift = group - group // 2 if head >= heads // 2 else 0  # shifted: the first group has group // 2 rows
        groups = torch.tensor([(row + shift) // group for row in range(rows)])
        row = torch.arange(rows)
        seen = (groups[:, None] == groups[None]) & (row[:, None] >= row[None])
        out.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[shared])
    return torch.stack(out)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "group"),
    [(4, 4, 32, 8), (6, 2, 40, 8), (9, 3, 37, 8), (4, 2, 23, 7), (2, 1, 9, 8), (4, 4, 16, 16), (4, 4, 16, 99)],
)
def test_shifted_groups_equal_dense_masks(heads: int, kv_heads: int, rows: int, group: int) -> None:
    torch.manual_seed(rows)
    query, key, value = (torch.randn(2, n, rows, 8, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    out, _ = attention.s2_attention(None, query, key, value, None, scaling=0.3, s2_group=group)
    for text in range(2):
        whole = rows if group >= rows else group
        wanted = dense_s2(query[text], key[text], value[text], whole, 0.3)
        if group >= rows:  # one group for all heads: full attention
            causal = torch.ones(rows, rows).tril().bool()
            shared = [x[text].repeat_interleave(heads // kv_heads, 0) for x in (key, value)]
            wanted = (0.3 * query[text] @ shared[0].mT).masked_fill(~causal, -torch.inf).softmax(-1) @ shared[1]
        torch.testing.assert_close(out[text].transpose(0, 1), wanted)


def test_information_crosses_groups_and_never_comes_from_later_rows() -> None:
    """Two layers of it carry a row's value further than a group; no layer carries it back."""
    value = torch.zeros(1, 4, 32, 1)
    value[0, :, 5] = 1
    flat = torch.zeros(1, 4, 32, 1)
    first, _ = attention.s2_attention(None, flat, flat, value, None, s2_group=8)
    mixed = first.mean(2, keepdim=True).expand(-1, -1, 4, -1).transpose(1, 2)
    second, _ = attention.s2_attention(None, flat, flat, mixed, None, s2_group=8)
    reached = second.sum((0, 2, 3)) > 0
    assert not reached[:5].any() and reached[5:12].all() and reached[8:16].any()


@pytest.mark.parametrize(("rows", "reach", "chunks"), [(16, 64, 2), (16, 64, 3), (10, 11, 4), (64, 1000, 2), (8, 8, 1)])
def test_skipped_positions_are_the_papers(rows: int, reach: int, chunks: int) -> None:
    """arXiv 2309.10400, equations 3 to 5: what any draw must hold, and what many draws must reach."""
    drawn = np.random.default_rng(0)
    seen, distances = set(), set()
    for _ in range(3000):
        positions, places = skipped(drawn, rows, reach, chunks)
        for found in (positions, places):
            steps = np.diff(found)
            assert len(found) == rows and found[0] == 0 and found[-1] < reach
            assert (steps >= 1).all() and (steps > 1).sum() < chunks
        seen |= set(positions.tolist())
        distances |= set((positions[-1] - positions).tolist())
    assert seen == set(range(reach)) and distances == set(range(reach))


def test_a_bias_is_uniform_and_content_has_its_own() -> None:
    from scipy import stats

    drawn, counts, both = np.random.default_rng(1), np.zeros((2, 21)), []
    for _ in range(21 * 200):
        biases = [int(found[-1]) - 15 for found in skipped(drawn, 16, 36, 2)]  # of the second chunk
        counts[[0, 1], biases] += 1
        both.append(biases)
    assert all(stats.chisquare(row).pvalue > 1e-3 for row in counts)
    assert abs(np.corrcoef(np.array(both).T)[0, 1]) < 0.06


@pytest.mark.parametrize("scheme", STRETCHES)
@pytest.mark.parametrize("context", [1024, 800])
def test_a_stretched_config_is_read_alike(scheme: str, context: int, tmp_path: Path) -> None:
    """transformers' own rotary module, and our tables for the saved config and for --positions."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    original = tiny_config(max_position_embeddings=256)
    stretched_config(original, context, scheme).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.max_position_embeddings == context
    tables = rope_tables(config, context)
    assert tables.note is None  # the model reaches it by itself
    assert rope_tables(config, context + 64).note is not None
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(context)[None])
    half = cos.shape[-1] // 2
    torch.testing.assert_close(tables.cos, cos[0, :, :half], atol=1e-4, rtol=0)
    torch.testing.assert_close(tables.sin, sin[0, :, :half], atol=1e-4, rtol=0)
    if context == 1024:  # a whole factor, as --positions has
        asked = rope_tables(original, context, Positions(scheme))
        torch.testing.assert_close(tables.cos, asked.cos, atol=1e-4, rtol=0)


def test_what_cannot_be_stretched_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^context: 512 is not allowed; more than the 512 positions"):
        stretched_config(tiny_config(), 512, "yarn")
    with pytest.raises(UserError, match=r"^sliding_window: \[40\]"):
        stretched_config(tiny_config("gemma3_text"), 1024, "yarn")
    with pytest.raises(UserError, match=r"^attn_logit_softcapping: 3\.0 is not allowed"):
        stretched_config(tiny_config("gemma2", layer_types=["full_attention"] * 3), 1024, "yarn")
    scaled = tiny_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UserError, match=r"^positions: 'yarn' is not allowed; rope type linear"):
        stretched_config(scaled, 1024, "yarn")
    assert stretched_config(scaled, 1024, "linear").rope_parameters["factor"] == 4.0


def test_schedules_have_the_lengths_they_name() -> None:
    def reaches(**settings: Any) -> list[int]:
        made = Settings(context=1024, steps=12, **settings)
        return [plan(made, 256, step).reach for step in range(12)]

    assert reaches() == [1024] * 12
    assert reaches(schedule="progressive") == [256] * 4 + [512] * 4 + [1024] * 4
    assert reaches(schedule="progressive", lengths=(300, 1024)) == [300] * 6 + [1024] * 6
    mixed = reaches(schedule="mixed")
    assert set(mixed) == {256, 512, 1024} and mixed != sorted(mixed) and mixed == reaches(schedule="mixed")
    assert stages(Settings(context=1000, schedule="mixed"), 256) == [256, 512, 1000]

    skipping = Settings(context=1024, window=128, chunks=3, steps=12, full_steps=2, batch_tokens=1024)
    first, last = plan(skipping, 256, 0), plan(skipping, 256, 11)
    assert (first.rows, first.reach, first.chunks, first.group, first.texts) == (128, 1024, 3, None, 8)
    assert (last.rows, last.reach, last.chunks, last.group, last.texts) == (1024, 1024, 1, None, 1)
    grouped = plan(Settings(context=1024, steps=2, full_steps=1), 256, 0)
    assert (grouped.rows, grouped.group, grouped.texts) == (1024, 256, 1)
    assert plan(Settings(context=1024, steps=2, full_steps=1), 256, 1).group is None


def test_texts_are_slices_of_the_sources() -> None:
    """Each row's token stands at its place of one source, and what follows is what stands after it there."""
    sources = [Source(name, np.arange(start, start + size, dtype=np.int32), np.zeros(0, np.int32))
               for name, start, size in (("a", 0, 500), ("b", 10_000, 4_000))]  # fmt: skip
    settings = Settings(context=256, window=32, batch_tokens=3200, steps=4)
    step = plan(settings, 64, 0)
    samples = draw(settings, sources, step, 0)
    assert len(samples) == 100
    for sample in samples:
        assert (sample.following == sample.tokens + 1).all()
        assert sample.tokens[-1] - sample.tokens[0] < 256 and sample.positions[-1] < 256
    assert 0 < sum(sample.tokens[0] < 10_000 for sample in draw(settings, sources, step, 1)) < 25  # by size
    again = draw(settings, sources, step, 0)
    assert all((a.tokens == b.tokens).all() for a, b in zip(samples, again, strict=True))
    assert any((a.tokens != b.tokens).any() for a, b in zip(samples, draw(settings, sources, step, 1), strict=True))


class Quarters:
    """Stands for a fast tokenizer: four characters are a token."""

    def __call__(self, text: str, **settings: Any) -> Any:
        starts = range(0, len(text), 4)
        return SimpleNamespace(
            input_ids=[ord(text[at]) for at in starts], offset_mapping=[(at, min(at + 4, len(text))) for at in starts]
        )


def test_no_test_text_is_learned() -> None:
    """No document to learn from stands in what experiments/positions.py reads of the built-in texts."""
    for name in ("code", "prose"):
        read = 4 * len(continuation(name, Quarters(), 98_816).tokens)
        documents, begun = iter(CONTINUATIONS[name]()), ""
        while len(begun) < read:
            begun += next(documents)()
        learned = [document() for document in unread_by_tests(name, Quarters())]
        assert sum(map(len, learned)) > 3_000_000 and begun[:200] not in "".join(learned)
        assert not any(text in begun[:read] for text in learned if len(text) > 400)
        if name == "code":  # the library has the very text of `docs` in it
            lines = {line for topic in CONTINUATIONS["docs"]() for line in topic().split("\n") if len(line) > 70}
            everything = "".join(learned)
            assert len(lines) > 200 and not any(line in everything for line in sorted(lines)[::23])


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3", "phi3", "mixtral"])
def test_loss_at_skipped_positions_is_transformers_own(family: str, tmp_path: Path) -> None:
    """Against eager attention with a mask that we give: no text is cut where positions skip."""
    save_tiny(tmp_path, family, max_position_embeddings=64)
    from tokenswift_py.checkpoints.loading import open_checkpoint, transformers_config

    checkpoint = open_checkpoint(str(tmp_path))
    settings = Settings(context=256, rank=4)
    config = stretched_config(transformers_config(checkpoint.folder), 256, "yarn")
    adapted = adapters.learner(checkpoint, config, settings, torch.float32)
    sources = [Source("a", np.arange(600, dtype=np.int32) % 61, np.zeros(0, np.int32))]
    skipping = Settings(context=256, window=48, steps=2)
    (sample, *_) = draw(skipping, sources, plan(skipping, 64, 0), 0)
    assert np.diff(sample.positions).max() > 1
    found = losses(adapters.base_model(adapted), sample, torch.device("cpu"), None)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, attn_implementation="eager").eval()
    mask = torch.full((48, 48), -torch.inf).triu(1)[None, None]
    kinds = getattr(reference.config, "layer_types", None)
    masks: Any = {kind: mask for kind in set(kinds)} if kinds and family == "qwen3" else mask
    tokens, positions = torch.from_numpy(sample.tokens)[None], torch.from_numpy(sample.positions)[None]
    logits = reference(tokens, position_ids=positions, attention_mask=masks).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits, torch.from_numpy(sample.following), reduction="none")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_products_in_bf16_are_near(tiny_folder: Path) -> None:
    from tokenswift_py.checkpoints.loading import open_checkpoint, transformers_config

    checkpoint = open_checkpoint(str(tiny_folder))
    config, cpu = stretched_config(transformers_config(checkpoint.folder), 2048, "yarn"), torch.device("cpu")
    sample = Sample(np.arange(3, 99), np.arange(4, 100), np.arange(96))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        adapted = adapters.learner(checkpoint, config, Settings(context=2048), dtype)
        assert all(p.dtype == torch.float32 for p in adapters.trained_parameters(adapted).values())
        with precision(cpu, dtype):
            loss = losses(adapters.base_model(adapted), sample, cpu, 32)
        loss.sum().backward()
        found.append((loss, adapters.base_model(adapted).model.embed_tokens.weight.grad))
    (loss, gradient), (near, near_gradient) = found
    assert near.dtype == torch.float32 and (near - loss).abs().max() < 0.2
    assert torch.cosine_similarity(gradient.flatten(), near_gradient.flatten(), dim=0) > 0.99


def test_activations_kept_or_computed_again_give_the_same_gradients(tiny_folder: Path) -> None:
    from tokenswift_py.checkpoints.loading import open_checkpoint, transformers_config

    checkpoint = open_checkpoint(str(tiny_folder))
    config, cpu = stretched_config(transformers_config(checkpoint.folder), 2048, "yarn"), torch.device("cpu")
    sample, found = Sample(np.arange(3, 51), np.arange(4, 52), np.arange(48)), []
    for recompute in (False, True):
        adapted = adapters.learner(checkpoint, config, Settings(context=2048), torch.float32, recompute)
        assert adapters.base_model(adapted).is_gradient_checkpointing == recompute
        losses(adapters.base_model(adapted), sample, cpu, 32).sum().backward()
        found.append([p.grad for p in adapters.trained_parameters(adapted).values()])
    assert found[0] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_learns(tiny_folder: Path) -> None:
    from tokenswift_py.checkpoints.loading import open_checkpoint, transformers_config

    checkpoint = open_checkpoint(str(tiny_folder))
    config = stretched_config(transformers_config(checkpoint.folder), 2048, "linear")
    every = {name for name, _ in AutoModelForCausalLM.from_pretrained(tiny_folder).model.named_parameters()}
    for learn in LEARN:
        learning = adapters.learner(checkpoint, config, Settings(context=2048, learn=learn), torch.float32)
        names = set(adapters.trained_parameters(learning))
        lora = {name for name in names if "lora_" in name}
        assert len(lora) == (0 if learn == "full" else 2 * 4 * 3)  # A and B, of q, k, v and o, in three layers
        others = {name.removeprefix("base_model.model.").removeprefix("model.") for name in names - lora}
        norms = {f"layers.{i}.{norm}_layernorm.weight" for i in range(3) for norm in ("input", "post_attention")}
        small = {"embed_tokens.weight", "norm.weight", *norms}
        assert others - {"lm_head.weight"} == {"lora": set(), "lora+": small, "full": every}[learn]


def test_the_rate_rises_then_falls() -> None:
    rates = [rate_at(Settings(steps=100, warmup=10, rate=0.01), step) for step in range(100)]
    assert rates[0] == pytest.approx(0.001) and max(rates) == rates[10] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.001, rel=0.01)
    assert all(b < a for a, b in itertools.pairwise(rates[10:]))
    short = [rate_at(Settings(steps=8, rate=0.01), step) for step in range(8)]  # the usual warm-up is longer
    assert max(short) == short[3] == pytest.approx(0.01) and short[-1] < 0.5 * max(short)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 positions, and a text whose words come in an order that can be learned."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder / "model", max_position_embeddings=64)
    drawn, words = random.Random(0), ["the cat", " and the dog", " sat on the mat", ", and then the rain began"]
    (folder / "text.txt").write_text("".join(drawn.choice(words) for _ in range(1500)))
    return folder


def settings_for(base: Path, **changes: Any) -> Settings:
    given: dict[str, Any] = {
        "model": str(base / "model"), "texts": (str(base / "text.txt"),), "context": 192, "steps": 6, "warmup": 2,
        "rate": 3e-3, "batch_tokens": 384, "save_every": 2, "threads": 1, "save_dtype": "fp32",
    }  # fmt: skip
    return Settings(**{**given, **changes})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "yarn"},
        {"positions": "linear", "window": 48},
        {"positions": "ntk", "schedule": "mixed"},
        {"learn": "full", "rate": 1e-3},
    ],
    ids=str,
)
def test_the_merged_model_is_learned_and_runs(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The loss falls at the new length; both engines give transformers' logits of the merged model."""
    out = tmp_path / "long"
    folder = begin(settings_for(base, **{"steps": 15, "rate": 6e-3, **changes}), out, "command", quiet=True)
    before, after = (line["held_out"]["files"] for line in folder.lines() if "held_out" in line)
    assert len(before) == len(after) == 4 and all(b < a - 0.3 for a, b in zip(before, after, strict=True))
    steps = [line for line in folder.lines() if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 16)) and steps[-1]["loss"] < steps[0]["loss"] - 0.3
    tokens = continuation_tokens(base, 190)
    reference = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    wanted = reference(torch.tensor([tokens])).logits[0]
    for engine in ("torch", "native"):
        if engine == "native":
            pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
        swift = TokenSwift.from_pretrained(str(out), dtype="fp32", engine=engine)
        tables = rope_tables(swift.checkpoint.config, 192)
        assert tables.shifts is None and tables.note is None
        model = swift.executor.model(tables)
        found = model.forward([Segment(DraftTree.chain(tokens), model.new_cache(), causal=True)]).logits
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
        written = swift.generate("the cat", raw=True, context=192, max_new_tokens=100, ignore_eos=True)
        assert len(written.tokens) == 100


def continuation_tokens(base: Path, count: int) -> list[int]:
    return list(tiny_tokenizer()((base / "text.txt").read_text()).input_ids[:count])


@pytest.mark.parametrize("tied", [False, True])
def test_merging_adds_what_the_adapter_added(tied: bool, tmp_path: Path) -> None:
    """Where the LM head is the embedding, it stays so."""
    from tokenswift_py.checkpoints.loading import open_checkpoint, transformers_config

    save_tiny(tmp_path, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(str(tmp_path))
    config = stretched_config(transformers_config(checkpoint.folder), 2048, "yarn")
    adapted = adapters.learner(checkpoint, config, Settings(context=2048), torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.trained_parameters(adapted).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.arange(3, 60)[None]
    plain = tiny_model(transformers_config(checkpoint.folder), torch.float32)
    adapted.eval()
    with torch.no_grad():
        wanted = adapted(input_ids=tokens).logits
        model = adapters.merged(adapted)
        found = model(input_ids=tokens).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert (found - plain(input_ids=tokens).logits).abs().max() > 0.1


def test_a_run_that_was_killed_goes_on_to_the_same_bits(base: Path, tmp_path: Path) -> None:
    settings = settings_for(base, steps=16, held_out=0, batch_tokens=240, window=48, full_steps=2)
    begin(settings, tmp_path / "whole", "command", quiet=True)
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in settings.plain().items()
        if value is not None and value is not False and name != "texts"
    ]  # fmt: skip
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "generate.py"), "extend-context", *flags, "--texts", *settings.texts]
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline, journal = time.monotonic() + 120, out / "training" / "journal.jsonl"
    while not journal.exists() or journal.read_text().count("\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "model.safetensors").exists()
    go_on(settings, out, quiet=True)
    wanted, found = weights(tmp_path / "whole"), weights(out)
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    lines = [[json.loads(line) for line in (run / "training" / "journal.jsonl").read_text().splitlines()]
             for run in (tmp_path / "whole", out)]  # fmt: skip
    assert [(line["step"], line["loss"]) for line in lines[0]] == [(line["step"], line["loss"]) for line in lines[1]]


def test_a_full_disk_is_the_systems_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = TrainingFolder(tmp_path)

    def full(tensors: Any, path: Path, about: Any) -> None:
        path.write_bytes(b"half of it")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("tokenswift_py.extending.state.save_file", full)
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(OSError, match="No space left on device"):
        folder.save(1, {"weight": weight}, torch.optim.AdamW([weight]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ['{"step": 3', '{"step": 3, "lo\n', "\0\0\0\0\n", "[]\n", "{}\n", "\ufffd\n"])
def test_a_journal_that_was_damaged_at_its_end_goes_on_before_it(tmp_path: Path, damage: str) -> None:
    folder = TrainingFolder(tmp_path)
    for step in (1, 2):
        folder.log({"step": step, "loss": 0.5})
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes() + damage.encode())
    assert folder.lines() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    folder.cut(1)
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'


def test_minutes_stop_it_and_resume_goes_on(base: Path, tmp_path: Path) -> None:
    settings = settings_for(base)
    begin(settings, tmp_path / "whole", "command", quiet=True)
    out = tmp_path / "short"
    begin(settings_for(base, minutes=1e-9), out, "command", quiet=True)
    assert (out / "model.safetensors").exists()
    assert main(["extend-context", "--resume", str(out), "--minutes", "10", "--quiet"]) == 0
    wanted, found = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_run_that_is_stopped_keeps_its_steps_and_goes_on(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C is heard between two steps. The model that is there stays until a whole one replaces it."""
    begin(settings_for(base), tmp_path / "whole", "command", quiet=True)
    out, asked = tmp_path / "stopped", iter([False, False, True, True])
    with pytest.raises(KeyboardInterrupt):
        begin(settings_for(base), out, "command", quiet=True, stopping=lambda: nullcontext(lambda: next(asked)))
    steps = [line["step"] for line in TrainingFolder(out / "training").lines() if "loss" in line]
    assert steps and f"{len(steps)} of {settings_for(base).steps} steps are kept; --resume {out}" in caplog.text
    assert not (out / "model.safetensors").exists()
    (out / "model.safetensors").write_bytes(b"an earlier one")
    folder = TrainingFolder(out / "training")
    with folder.held():
        assert main(["extend-context", "--resume", str(out), "--quiet"]) == 2
    assert (out / "model.safetensors").read_bytes() == b"an earlier one"
    assert main(["extend-context", "--resume", str(out), "--quiet"]) == 0
    wanted, found = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_disk_that_fills_while_merging_leaves_the_earlier_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    begin(settings_for(base, steps=1), out, "command", quiet=True)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tokenswift_py.extending.merging.shutil.copyfile", full)
    assert main(["extend-context", "--resume", str(out), "--quiet"]) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_run_whose_texts_changed_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text((base / "text.txt").read_text())
    out = tmp_path / "run"
    begin(settings_for(base, texts=(str(text),), steps=1), out, "command", quiet=True)
    text.write_text((base / "text.txt").read_text() + "the cat")
    assert main(["extend-context", "--resume", str(out)]) == 2
    assert capsys.readouterr().err.startswith("tokenswift: resume: texts: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--context", "8"], "context: 8"),
        (["--context", "64"], "context: 64 is not allowed; more than the 64 positions"),
        (["--positions", "rope"], "positions: 'rope'"),
        (["--steps", "0"], "steps: 0"),
        (["--steps", "soon"], "steps: 'soon' is not allowed; a whole number"),
        (["--rate", "nan"], "rate: nan"),
        (["--window", "192"], "window: 192 is not allowed; below the context (192)"),
        (["--chunks", "1"], "chunks: 1"),
        (["--group", "16", "--attention", "full"], "group: 16 is not allowed; only with attention s2"),
        (["--lengths", "64,192"], "lengths: (64, 192) is not allowed; not of schedule constant"),
        (["--lengths", "64,x", "--schedule", "mixed"], "lengths: '64,x' is not allowed; whole numbers"),
        (["--lengths", "64,99999", "--schedule", "mixed"], "lengths: 99999 is not allowed; at most the context"),
        (["--lengths", "64,128", "--schedule", "mixed"], "lengths: 128 is not allowed; the last is the context"),
        (["--full-steps", "7"], "full_steps: 7"),
        (["--texts", "nowhere.txt"], "texts: 'nowhere.txt'"),
        (["--context", "9999"], "texts: 'files ("),
        (["--model", "nothing here"], "model: 'nothing here'"),
        (["--device", "moon"], "device: 'moon'"),
        (["--context", "16777216", "--held-out", "0"], "memory: '"),
        (["--out", "{}"], "out: '{}' is not allowed; a new or empty folder"),
        (["--resume", "{}"], "out: not allowed with argument --resume"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    base: Path, arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--model": str(base / "model"), "--texts": str(base / "text.txt"), "--context": "192", "--steps": "6",
             "--out": str(tmp_path / "out")}  # fmt: skip
    flags = [word for flag, value in given.items() if flag not in arguments for word in (flag, value)]
    arguments = [word.replace("{}", str(base)) for word in arguments]
    assert main(["extend-context", *arguments, *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"tokenswift: {says.replace('{}', str(base))}") or "--out" in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_resume_keeps_the_runs_own_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extend-context", "--resume", str(tmp_path), "--rate", "0.1"]) == 2
    assert capsys.readouterr().err.startswith("tokenswift: rate: 0.1 is not allowed; not with --resume")
    assert main(["extend-context", "--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"tokenswift: resume: {tmp_path} has no readable training/settings.json")
    assert main(["extend-context"]) == 2
    assert capsys.readouterr().err.startswith("tokenswift: out: None is not allowed; a folder")


def test_a_missing_peft_names_the_extra(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["extend-context", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("tokenswift: extend-context: it needs peft: pip install 'tokenswift-py[train]'")
    assert printed.count("\n") == 1
