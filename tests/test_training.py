"""Training of draft heads: what is learned from, that it is learned, and the command around it."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from conftest import decoder_of, tiny_config, tiny_model
from flags import with_flags
from scripted import write as write_one
from tokenswift_py import UserError
from tokenswift_py.cli.main import main
from tokenswift_py.cli.train_heads import read_prompts
from tokenswift_py.core import DraftTree, SamplingParams, Segment
from tokenswift_py.drafters import training
from tokenswift_py.drafters.head_files import read_heads
from tokenswift_py.drafters.head_weights import FORMS, HeadWeights
from tokenswift_py.drafters.training import Candidates, Rows
from tokenswift_py.sampling.reference import Sampler
from toys import save_tiny

PROMPTS = [[int(t) for t in np.random.default_rng(i).integers(0, 61, 5 + i)] for i in range(7)]
EOS = 3


def sampler_of(number: int) -> Sampler:
    return Sampler(SamplingParams(temperature=0.4, seed=9, stream=number), 61, [EOS])


@pytest.fixture(scope="module")
def decoder() -> Any:
    return decoder_of(tiny_model(tiny_config(), torch.float32))


def fresh(decoder: Any, form: str, heads: int = 2) -> HeadWeights:
    return training.new_heads(form, heads, decoder.weights["model.norm.weight"], decoder.spec.norm_eps)


def written(decoder: Any, form: str = "recurrent", tokens: int = 600, **options: Any) -> tuple[Rows, list[list[int]]]:
    prompts = itertools.cycle(PROMPTS)
    return training.write(
        decoder, fresh(decoder, form), prompts, sampler_of, tokens, 60, 80, [EOS], quiet=True, **options
    )


@pytest.mark.parametrize("form", ["medusa", "tokenswift"])
def test_rows_are_those_of_the_texts(decoder: Any, form: str) -> None:
    """What each text is, plain decoding writes too; what each row holds, a causal pass over the text says too."""
    rows, texts = written(decoder, form, 200)
    at = 0
    for number, (prompt, text) in enumerate(zip(itertools.cycle(PROMPTS), texts, strict=False)):
        count = len(text) - len(prompt)
        assert text[: len(prompt)] == prompt
        assert count == 60 or (text[-1] == EOS and count < 60)
        params = sampler_of(number).params
        assert write_one(decoder, prompt, 60, params, eos=[EOS])[0] == text[len(prompt) :]
        output = decoder.forward([Segment(DraftTree.chain(text[:-1]), decoder.new_cache(), causal=True)])
        states = output.hidden if form == "medusa" else output.residual
        own = slice(at, at + count)
        assert torch.allclose(rows.states[own].float(), states[-count:], rtol=0.01, atol=0.02)
        assert rows.following[own].tolist() == text[len(prompt) :]
        assert rows.left[own].tolist() == list(range(count - 1, -1, -1))
        best = output.logits[-count:].softmax(-1).topk(32)
        assert torch.allclose(rows.probabilities[own], best.values, atol=1e-4)
        at += count
    assert at == len(rows) >= 200
    assert len(rows) - rows.left[len(rows) - 1] - 60 < 200  # no more texts than needed


def test_how_many_are_written_at_once_does_not_matter(decoder: Any) -> None:
    one, texts = written(decoder, tokens=300, lanes=1)
    for lanes in (2, 5):
        many, others = written(decoder, tokens=300, lanes=lanes)
        assert others == texts
        assert torch.equal(many.following, one.following) and torch.equal(many.left, one.left)


def test_a_deadline_cuts_the_writing(decoder: Any) -> None:
    rows, texts = written(decoder, tokens=10_000, deadline=time.monotonic() + 0.5)
    assert 0 < len(rows) < 10_000 and len(texts) > 0


def test_with_every_token_a_candidate_the_loss_is_the_cross_entropy() -> None:
    torch.manual_seed(0)
    lm_head, states = torch.randn(40, 16), torch.randn(9, 16)
    tokens, probabilities = torch.randn(9, 40).softmax(-1).topk(6)[::-1]
    candidates = Candidates(lm_head, tokens, torch.arange(40), torch.Generator())
    share = probabilities / probabilities.sum(-1, keepdim=True)
    exact = -(share * F.log_softmax(states @ lm_head.T, -1).gather(-1, tokens)).sum(-1).mean()
    assert abs(candidates.loss(states, tokens, probabilities) - exact) < 0.02 * exact


def test_the_sample_stands_for_the_tokens_left_out() -> None:
    """Averaged over draws, the sampled softmax's sum is that over the whole vocabulary."""
    torch.manual_seed(0)
    vocab, states = 20_000, torch.randn(4, 16)
    lm_head = 0.3 * torch.randn(vocab, 16)
    tokens, probabilities = torch.tensor([[5], [6], [7], [8]]), torch.ones(4, 1)
    exact = F.cross_entropy(states @ lm_head.T, tokens[:, 0])
    draws = torch.Generator().manual_seed(1)
    losses = [
        Candidates(lm_head, tokens, torch.arange(100), draws).loss(states, tokens, probabilities) for _ in range(50)
    ]
    assert abs(torch.stack(losses).mean() - exact) < 0.02 * exact


def test_rows_are_fitted_block_by_block(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To what all rows at once are fitted to."""
    rows, _ = written(decoder, "recurrent")
    embedding = decoder.weights["model.embed_tokens.weight"]
    whole = training.regressed(fresh(decoder, "recurrent"), rows, embedding)
    monkeypatch.setattr(training, "BLOCK", 37)
    parts = training.regressed(fresh(decoder, "recurrent"), rows, embedding)
    for name, tensor in whole.tensors.items():
        assert torch.allclose(parts.tensors[name], tensor, atol=1e-3 * float(tensor.abs().max()))


@pytest.mark.parametrize("form", FORMS)
def test_training_lowers_the_loss_and_can_be_repeated(decoder: Any, form: str) -> None:
    rows, texts = written(decoder, form)
    embedding, lm_head = decoder.weights["model.embed_tokens.weight"], decoder.weights["lm_head.weight"]
    results = []
    for _ in range(2):
        start = training.regressed(fresh(decoder, form), rows, embedding)
        results.append(training.train(start, rows, lm_head, embedding, 30, seed=4, rate=3e-3, batch=64, quiet=True))
    (heads, losses), (again, repeated) = results
    assert losses == repeated
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in heads.tensors.items())
    assert np.mean(losses[-20:]) < np.mean(losses[:5]) - 0.15
    before = training.accuracy(fresh(decoder, form), rows, lm_head, embedding)["top1"]
    after = training.accuracy(heads, rows, lm_head, embedding)
    assert all(a > b + 0.05 for a, b in zip(after["top1"], before, strict=True))
    assert all(0 <= one <= three <= 1 for one, three in zip(after["top1"], after["top3"], strict=True))
    table = training.acceptance(heads, rows, texts, sampler_of, lm_head, embedding)
    assert table.shape[0] == 2 and (table.sum(1) <= 1).all() and (table[:, 0] > 0.1).all()


def test_regression_finds_a_linear_law() -> None:
    """States that follow x' = x + A rms(x) + B rms(token) are predicted exactly."""
    torch.manual_seed(0)
    vocab, size, count = 30, 12, 4000
    embedding, a, b = torch.randn(vocab, size), torch.randn(size, size), torch.randn(size, size)
    tokens = torch.randint(vocab, (count,))
    states = [torch.randn(size)]

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean() + 1e-5)

    for token in tokens[:-1]:
        states.append(0.5 * (states[-1] + a @ unit(states[-1]) + b @ unit(embedding[token])))
    left = torch.arange(count - 1, -1, -1)
    none = torch.zeros(count, 1)
    rows = Rows(2.0 ** torch.zeros(count)[:, None] * torch.stack(states), tokens, left, none.long(), none)
    start = training.new_heads("recurrent", 1, torch.ones(size), 1e-5)
    heads = training.regressed(start, rows, embedding)
    assert heads.tensors["token"][0].sub(0.5 * b).abs().max() < 0.15
    assert (start.tensors["token"] == 0).all()


def test_texts_too_short_for_the_heads_are_said_so(decoder: Any) -> None:
    rows, _ = written(decoder, tokens=50)
    with pytest.raises(UserError, match=r"^tokens: "):
        training.train(
            fresh(decoder, "medusa", 8), Rows(**{**vars(rows), "left": rows.left.clamp_max(3)}),
            decoder.weights["lm_head.weight"], decoder.weights["model.embed_tokens.weight"], 1, quiet=True,
        )  # fmt: skip


def test_the_built_in_prompts_hold_out_whole_subjects() -> None:
    learned, held = read_prompts(None)
    assert len(learned) > 2000 and len(held) > 200
    assert len({text for text, _ in learned + held}) == len(learned) + len(held)
    subjects = json.loads(training.PROMPTS.read_text())["subjects"]
    assert not any(subject in text for subject in subjects[-8:] for text, _ in learned)


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("the cat\n\nthe dog and\nthe rain\n")
    sizes = ["--tokens", "300", "--held-out", "80", "--length", "40", "--heads", "2", "--epochs", "3"]
    return ["train-heads", "--model", str(tiny_folder), "--prompts", str(tmp_path / "prompts.txt"), *sizes]


@pytest.mark.parametrize("form", FORMS)
def test_the_command_trains_heads_that_generate_then_finds(
    command: list[str], tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = command[1:3]
    write = [*model, "--prompt", "the cat", "--max-new-tokens", "50", "--ignore-eos", "--seed", "1", "--quiet"]
    assert main([*write, "--drafter", "heads"]) == 2
    assert "train-heads" in capsys.readouterr().err
    assert main([*command, "--form", form]) == 0
    printed = capsys.readouterr().out
    (file,) = (tmp_path / "cache").glob("heads-*.safetensors")
    heads = read_heads(file)
    assert json.loads(file.with_suffix(".json").read_text()) == heads.provenance
    assert heads.form == form and len(heads) == 2
    assert json.dumps(heads.provenance["top1"]) in printed.replace("\n  ", "").replace("\n ]", "]").replace(",", ", ")
    assert heads.provenance["tokens"] >= 300 and heads.provenance["command"].startswith("tokenswift train-heads")
    assert main([*write, "--drafter", "heads"]) == 0
    drafted = capsys.readouterr().out
    assert main([*write, "--drafter", "none"]) == 0
    assert capsys.readouterr().out == drafted
    for name in ("a", "b"):
        assert main([*command, "--form", form, "--quiet", "--out", str(tmp_path / f"{name}.safetensors")]) == 0
    a, b = (read_heads(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
    assert (a.acceptance == b.acceptance).all()


class Written(Exception):
    """Ends the command where the model begins to write."""


def test_heads_begin_with_the_models_own_final_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gemma's is 1 + weight. Heads whose blocks add nothing yet have the logits of transformers."""
    save_tiny(tmp_path, "gemma2")
    made: list[Any] = []

    def write(model: Any, fresh: HeadWeights, *given: Any, **options: Any) -> Any:
        output = model.forward([Segment(DraftTree.chain([5, 9, 7]), model.new_cache(), causal=True)])
        norm = fresh.tensors["norm_out"][0]
        made.append(training.rms_norm(output.residual, fresh.eps) * norm @ model.weights["model.embed_tokens.weight"].T)
        raise Written

    monkeypatch.setattr(training, "write", write)
    with pytest.raises(Written):
        main(["train-heads", "--model", str(tmp_path), "--engine", "torch", "--dtype", "fp32"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([[5, 9, 7]])).logits[0]
    cap = model.config.final_logit_softcapping
    assert (cap * torch.tanh(made[0] / cap) - expected).abs().max() < 1e-3


def test_minutes_end_it(command: list[str], tmp_path: Path) -> None:
    began = time.monotonic()
    out = tmp_path / "h.safetensors"
    arguments = ["--tokens", "10000000", "--epochs", "100000", "--minutes", "0.1", "--quiet", "--out", str(out)]
    assert main([command[0], *with_flags(command[1:], *arguments)]) == 0
    assert time.monotonic() - began < 60
    assert 0 < read_heads(out).provenance["tokens"] < 10_000_000


def test_a_deadline_leaves_every_text_long_enough_to_learn_from(tiny_decoder: Any) -> None:
    """Where loading took all the time that writing had, each text still has a token for each head and one more."""
    weights = training.new_heads("recurrent", 3, torch.ones(tiny_decoder.spec.hidden_size), 1e-6)
    sampler = lambda number: Sampler(SamplingParams(seed=number), tiny_decoder.spec.vocab_size)  # noqa: E731
    rows, texts = training.write(
        tiny_decoder, weights, iter([[5, 9, 7]] * 9), sampler, 1000, 64, 128, (), least=4, deadline=0.0, quiet=True
    )
    assert [len(text) for text in texts] == [3 + 4] and len(training.usable_rows(rows, weights)) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--heads", "0"], "heads: 0"),
        (["--heads", "99"], "heads: 99"),
        (["--tokens", "0"], "tokens: 0"),
        (["--length", "3"], "length: 3"),
        (["--epochs", "0"], "epochs: 0"),
        (["--rate", "nan"], "rate: nan"),
        (["--minutes", "-1"], "minutes: -1"),
        (["--seed", "-1"], "seed: -1"),
        (["--temperature", "-1"], "temperature: -1"),
        (["--out", "heads.pt"], "out: 'heads.pt'"),
        (["--out", "nowhere/heads.safetensors"], "out: 'nowhere/heads.safetensors'"),
        (["--prompts", "nowhere.txt"], "prompts: 'nowhere.txt'"),
        (["--form", "hydra"], "form: 'hydra'"),
        (["--form", "eagle", "--out", "heads.safetensors"], "out: 'heads.safetensors'"),
        (["--form", "eagle", "--draft-vocab", "9"], "draft_vocab: 9"),
        (["--model", "nothing here"], "model: 'nothing here'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    command: list[str], arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command[0], *with_flags(command[1:], *arguments)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"tokenswift: {says}") and printed.count("\n") == 1
