"""A memory of evicted rows in whole runs: contract, report, resume, audit, gates that are trained, and wrong input."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from conftest import decoder_of, tiny_config, tiny_model, weights_of
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.checkpoints.checkpoint import fingerprint
from tokenswift_py.cli.main import main
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.extending.texts import Source
from tokenswift_py.kernels.sdpa import SDPA
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.options import Options
from tokenswift_py.parallel.ranks import ALONE
from tokenswift_py.remembering import training
from tokenswift_py.remembering.gates import Gates, find_gates, gates_file, read_gates, write_gates
from tokenswift_py.remembering.memories import check_remembers
from tokenswift_py.runs import audit, journal
from toys import save_tiny

RUN: dict[str, Any] = {"max_new_tokens": 330, "seed": 5, "ignore_eos": True, "kv_budget": 256}


@pytest.fixture(scope="module", params=["torch", "native"])
def swift(tiny_folder: Path, request: pytest.FixtureRequest) -> TokenSwift:
    if request.param == "native":
        pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine=request.param)


@pytest.fixture(scope="module")
def gates(swift: TokenSwift, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of random gates, by kind."""
    folder, draw = tmp_path_factory.mktemp("gates"), torch.Generator().manual_seed(0)
    files = {}
    for kind in ("infini", "infini_linear"):
        made = Gates(torch.randn(3, 6, generator=draw), kind, fingerprint(swift.checkpoint), {"seed": 0})
        write_gates(made, folder / f"{kind}.safetensors")
        files[kind] = str(folder / f"{kind}.safetensors")
    return files


def asked(kind: str, gates: dict[str, str]) -> dict[str, Any]:
    return {**RUN, "kv_memory": kind, **({"kv_gates": gates[kind]} if kind in gates else {})}


@pytest.mark.parametrize("kind", ["linear", "performer", "infini"])
def test_a_run_goes_on_to_the_same_bytes_and_is_audited(
    swift: TokenSwift, gates: dict[str, str], kind: str, tmp_path: Path
) -> None:
    settings = asked(kind, gates)
    whole = swift.generate("the cat", **settings)
    plain = swift.generate("the cat", **RUN)
    assert whole.tokens != plain.tokens
    same = 256 - whole.report["prompt_tokens"] + 1
    assert whole.tokens[:same] == plain.tokens[:same]
    eviction, numerics = whole.report["eviction"], whole.report["numerics"]
    assert whole.report["guarantee"] == "lossy" and eviction["memory_bytes"] > 0
    assert numerics.endswith(f"/kv-recent-256-64+{eviction['memory']}")
    assert eviction["memory"].startswith(kind.replace("_", "-"))
    assert swift.generate("the cat", drafter="partial", **settings).tokens == whole.tokens
    run = tmp_path / "run"
    with swift.stream("the cat", out=run, **settings) as stream:
        for piece in stream:
            if len(stream.tokens) > 290:  # behind an eviction
                break
            assert piece.tokens
    with swift.resume(run) as stream:
        list(stream)
        result = stream.result()
    assert result.tokens == whole.tokens
    found = audit.audit(swift, run, sample=1)
    assert found.passed and found.guarantee == "lossy" and found.checked == 330
    assert found.proof == (swift.executor.name == "native")


@pytest.mark.parametrize("kind", ["linear", "performer", "infini"])
def test_plain_decoding_beside_a_run_folds_the_same(swift: TokenSwift, gates: dict[str, str], kind: str) -> None:
    """It goes into the pages that the run has given back, with a memory of its own."""
    with swift.stream("the cat", **asked(kind, gates)) as stream:
        list(stream)
    report = swift.baseline(stream).report
    assert report["eviction"]["evictions"] > 0 and report["identical"] is True


def test_the_memory_is_part_of_the_contract(swift: TokenSwift, gates: dict[str, str], tmp_path: Path) -> None:
    with swift.stream("the cat", out=tmp_path / "run", **asked("infini", gates)) as stream:
        next(iter(stream))
    with pytest.raises(UserError, match=r"kv_memory: 'linear' .* written with 'infini'"):
        swift.resume(tmp_path / "run", kv_memory="linear", kv_gates=None)
    other = Gates(torch.zeros(3, 6), "infini", fingerprint(swift.checkpoint))
    kept = Path(gates["infini"]).read_bytes()
    try:
        write_gates(other, Path(gates["infini"]))
        with pytest.raises(UserError, match=r"numerics: .*written with"):
            swift.resume(tmp_path / "run")
    finally:
        Path(gates["infini"]).write_bytes(kept)
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(kept)
    with swift.resume(tmp_path / "run", kv_gates=str(moved)) as stream:
        assert stream.tokens, "the same numbers, wherever they lie"
    Path(gates["infini"]).unlink()
    try:
        with pytest.raises(UserError, match=r"kv_gates: .* an existing file"):
            audit.audit(swift, tmp_path / "run")
        assert audit.audit(swift, tmp_path / "run", kv_gates=str(moved)).passed
    finally:
        Path(gates["infini"]).write_bytes(kept)
    record = journal.read(tmp_path / "run")
    assert record.header["parameters"]["kv_memory"] == "infini"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kv_memory": "linear"}, "kv_memory: 'linear' .* only with kv_budget"),
        (
            {"kv_budget": 256, "kv_memory": "lstm"},
            "kv_memory: 'lstm' .* none, infini, infini_linear, linear, performer",
        ),
        ({"kv_budget": 256, "kv_memory": "linear", "kv_gates": "auto"}, "kv_gates: 'auto' .* only with .* infini"),
        ({"kv_budget": 256, "kv_memory": "infini", "kv_gates": "nowhere"}, "kv_gates: 'nowhere' .* existing file"),
        ({"kv_budget": 256, "kv_memory": "infini"}, "kv_gates: None .* tokenswift train-memory"),
        (
            {"kv_budget": 256, "kv_memory": "performer", "positions": "log-extend", "context": 1100},
            "kv_memory: 'performer' .* log-extend .* infini",
        ),
        (
            {"kv_budget": 256, "kv_memory": "linear", "positions": "self-extend", "context": 1100},
            "kv_memory: 'linear' .* self-extend",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(
    swift: TokenSwift, settings: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=says):
        swift.generate("the cat", max_new_tokens=4, **settings)


def test_attention_that_cannot_be_joined_is_refused(swift: TokenSwift) -> None:
    """Triton's tells no log-sum-exp. Its kernels need no GPU to be refused."""
    options = Options(kv_budget=256, kv_memory="linear")
    triton = SimpleNamespace(remembers=False, ranks=ALONE)
    rope = rope_tables(swift.checkpoint.config, 512)
    with pytest.raises(UserError, match=r"kv_memory: 'linear' .* sdpa"):
        check_remembers(options, triton, rope, swift.checkpoint)
    several = SimpleNamespace(remembers=True, ranks=SimpleNamespace(world=2))
    with pytest.raises(UserError, match=r"kv_memory: 'linear' .* one process"):
        check_remembers(options, several, rope, swift.checkpoint)


def test_infini_works_where_queries_are_moved(swift: TokenSwift, gates: dict[str, str]) -> None:
    settings = {**asked("infini", gates), "positions": "log-extend", "context": 1100, "max_new_tokens": 300}
    plain, drafted = (swift.generate("the cat", drafter=name, **settings) for name in ("none", "partial"))
    assert "log-extend" in plain.report["numerics"] and plain.tokens == drafted.tokens
    assert plain.tokens != swift.generate("the cat", **{**settings, "kv_memory": "none", "kv_gates": None}).tokens


def test_files_of_gates_are_checked(swift: TokenSwift, gates: dict[str, str], tmp_path: Path) -> None:
    good, checkpoint = read_gates(Path(gates["infini"])), swift.checkpoint
    assert torch.equal(find_gates(checkpoint, "infini", gates["infini"]).values, good.values)

    def refused(made: Any, says: str) -> None:
        file = tmp_path / "gates.safetensors"
        made(file)
        with pytest.raises(UserError, match=says):
            find_gates(checkpoint, "infini", str(file))

    refused(lambda file: write_gates(replace(good, values=torch.zeros(3, 5)), file), "3 layers of 6 heads")
    refused(lambda file: write_gates(replace(good, values=torch.full((3, 6), torch.nan)), file), "finite")
    refused(lambda file: write_gates(replace(good, kind="infini_linear"), file), "these are of infini_linear")
    refused(lambda file: write_gates(replace(good, model="0" * 16), file), "made for 0000")
    refused(lambda file: save_file({"gates": torch.zeros(3, 6)}, file), "`tokenswift train-memory` made")
    refused(lambda file: file.write_bytes(b"not one"), "not a readable file")


SHAPE = {"vocab_size": 61, "num_hidden_layers": 2, "max_position_embeddings": 768}


def trainable() -> TorchDecoder:
    config = tiny_config(**SHAPE)
    model = tiny_model(config, torch.float32)
    spec = ModelSpec.from_config(config)
    return TorchDecoder(spec, weights_of(model), rope_tables(config, 768), SDPA(), training.FrozenRows())


def test_gradients_are_those_of_differences() -> None:
    """A chunk's gradient by the last layer's gates is the slope of its loss. (By those of the first it lacks the way
    through keys and values.)"""
    config = tiny_config(**SHAPE)
    double = decoder_of(tiny_model(config), 768)
    model = TorchDecoder(ModelSpec.from_config(config), double.weights, rope_tables(config, 768), SDPA(),
                         training.FrozenRows())  # fmt: skip
    text = np.random.default_rng(1).integers(0, 61, 258).astype(np.int32)

    def loss(gates: torch.Tensor) -> torch.Tensor:
        eviction = training.Eviction(training.Recent(), 256, memory=training.new_memory(model, "infini", gates))
        return next(training.losses_of(model, eviction, text))  # of one row, which sees no other row of its pass

    gates = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    loss(gates).backward()
    for layer, head in ((1, 0), (1, 3), (1, 5)):
        step = torch.zeros(2, 6, dtype=torch.float64)
        step[layer, head] = 1e-4
        slope = float(loss(step) - loss(-step)) / 2e-4
        assert abs(slope - float(gates.grad[layer, head])) < 1e-5 * max(1, abs(slope))
    assert (gates.grad.abs() > 0).all()


def test_training_lowers_the_loss_and_can_be_repeated() -> None:
    model = trainable()
    tokens = np.random.default_rng(0).integers(0, 61, 8 * 513).astype(np.int32)
    source = Source("random", tokens[: 7 * 513], tokens[7 * 513 :])
    results = [
        training.train(model, "infini", training.texts_to_learn([source], 512, 1), 256, 40, 0.3, quiet=True)
        for _ in range(2)
    ]
    (gates, losses), (again, repeated) = results
    assert losses == repeated and torch.equal(gates, again)
    learnt = Source("random", tokens[:0], tokens[: 7 * 513])  # random tokens can only be learnt by heart
    begun = torch.full((2, 6), training.START)
    before, after = (training.held_out_nats(model, "infini", g, [learnt], 512, 256) for g in (begun, gates))
    assert after < before - 0.001
    assert training.held_out_nats(model, "infini", None, [learnt], 512, 256) != before


def test_the_command_trains_gates_that_a_run_finds(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("the cat and the dog and the bird sat on the mat, and then the rain began. " * 120)
    command = ["train-memory", "--model", str(tiny_folder), "--texts", str(text), "--length", "400", "--budget", "256",
               "--steps", "3"]  # fmt: skip
    assert main([*command]) == 0
    told = capsys.readouterr().out
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine="torch")
    file = gates_file(swift.checkpoint, "infini")
    assert str(file) in told and json.loads(told[told.index("{") : told.index("}") + 1])["steps"] == 3
    found = find_gates(swift.checkpoint, "infini")
    assert (found.values != training.START).all() and found.provenance["nats_with"] > 0
    report = swift.generate("the cat", **{**RUN, "max_new_tokens": 260}, kv_memory="infini").report
    assert report["eviction"]["memory"] == f"infini-{found.label}"


class Trained(Exception):
    """Ends the command where it begins to train."""


def test_gates_are_trained_on_the_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gemma's norms are 1 + weight. Its logits are those of transformers."""
    save_tiny(tmp_path / "gemma", "gemma2")
    text, found = tmp_path / "text.txt", []
    text.write_text("the cat and the dog and the bird sat on the mat, and then the rain began. " * 120)

    def train(model: Any, *given: Any) -> Any:
        tokens = next(given[1])[:60]
        segment = Segment(DraftTree.chain(tokens), model.new_cache(), causal=True)
        found.append((tokens, model.forward([segment]).logits))
        raise Trained

    monkeypatch.setattr(training, "train", train)
    with pytest.raises(Trained):
        main(["train-memory", "--model", str(tmp_path / "gemma"), "--texts", str(text), "--length", "300", "--budget",
              "256", "--out", str(tmp_path / "gates.safetensors")])  # fmt: skip
    ((tokens, logits),) = found
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens).long()[None]).logits[0]
    assert (logits - expected).abs().max() < 1e-3


def test_gates_that_cannot_be_kept_are_not_trained(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "train", lambda *given: pytest.fail("trained in vain"))
    assert main(["train-memory", "--model", str(tiny_folder), "--length", "400", "--budget", "256"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("tokenswift: out: ") and told.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--kind", "linear"], "kind: 'linear' .* one of infini, infini_linear"),
        (["--budget", "100"], "budget: 100 .* 256"),
        (["--budget", "512", "--length", "512"], "length: 512 .* more than the budget"),
        (["--steps", "0"], "steps: 0 .* at least 1"),
        (["--rate", "0"], "rate: 0.0"),
        (["--out", "gates.pt"], "out: 'gates.pt' .* ends in .safetensors"),
        (["--out", "nowhere/gates.safetensors"], "out: 'nowhere/gates.safetensors' .* in a folder that is there"),
    ],
)
def test_wrong_flags_get_one_line(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-memory", *flags]) == 2
    told = capsys.readouterr().err
    assert re.search(says, told) and told.count("\n") == 1
