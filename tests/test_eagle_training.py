"""Training of EAGLE-3 drafts: what it learns from, that it learns, and that what it makes drafts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import decoder_of, tiny_config, tiny_model
from dense_eagle import dense
from random_eagle import random_eagle
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.cli.main import main
from tokenswift_py.core import SamplingParams
from tokenswift_py.drafters import eagle_training as training
from tokenswift_py.drafters.eagle_files import read_eagle, usual_taps
from tokenswift_py.drafters.eagle_training import Lesson
from tokenswift_py.drafters.training import rising_and_falling, write
from tokenswift_py.sampling.reference import Sampler

V, EOS, STEPS = 61, 3, 3
PROMPTS = [[int(t) for t in np.random.default_rng(i).integers(0, V, 5 + i)] for i in range(7)]


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def decoder(hugging_face: Any) -> Any:
    return decoder_of(hugging_face)


@pytest.fixture(scope="module")
def written(decoder: Any) -> tuple[Any, list[list[int]]]:
    def sampler_of(number: int) -> Sampler:
        return Sampler(SamplingParams(temperature=0.4, seed=9, stream=number), V, [EOS])

    reader = training.Nothing()
    return write(decoder, reader, itertools.cycle(PROMPTS), sampler_of, 600, 60, 80, [EOS], quiet=True)


@pytest.fixture(scope="module")
def lessons(decoder: Any, written: Any) -> list[Lesson]:
    rows, texts = written
    return training.read(decoder, (0, 1, 2), texts, training.lengths(rows), quiet=True)


@torch.inference_mode()
def test_lessons_are_what_the_model_says_of_its_texts(hugging_face: Any, written: Any, lessons: list[Lesson]) -> None:
    prompts = [len(prompt) for prompt in PROMPTS]
    for number, (text, lesson) in enumerate(zip(written[1], lessons, strict=True)):
        assert lesson.tokens.tolist() == text and lesson.first == prompts[number % len(prompts)]
        said = hugging_face(torch.tensor([text]), output_hidden_states=True)
        for i in range(3):
            assert torch.allclose(lesson.taps[:, i].double(), said.hidden_states[i][0], rtol=0.01, atol=0.02)
        best = said.logits[0].softmax(-1).topk(32)
        assert torch.equal(lesson.likeliest, best.indices)
        assert torch.allclose(lesson.probabilities, best.values.float(), atol=1e-6)


@torch.inference_mode()
def test_steps_of_training_are_those_of_drafting(hugging_face: Any, lessons: list[Lesson]) -> None:
    """After every beginning of a text, and so many of its own tokens as if they were drafted."""
    layer = random_eagle(hugging_face.get_input_embeddings().weight.detach())
    lesson = lessons[0]
    text = lesson.tokens[:30].tolist()
    taps = hugging_face(torch.tensor([text]), output_hidden_states=True).hidden_states
    states = torch.stack([taps[i][0] for i in range(3)], 1)
    exact = Lesson(states, torch.tensor(text), 0, lesson.likeliest, lesson.probabilities)
    for step, h in enumerate(training.unrolled(layer, exact, STEPS)):
        assert len(h) == len(text) - 1 - step
        for row in (0, 1, 13, len(h) - 1):
            begun = row + 2
            expected = dense(layer, hugging_face, text[:begun], text[begun : begun + step], 1000)
            assert torch.allclose(layer.logits(h)[row].double(), expected, atol=1e-4)


def fresh(decoder: Any, written: Any, draft_vocab: int = 50) -> Any:
    counts = torch.bincount(written[0].following, minlength=V)
    tensors = {name: tensor.float() for name, tensor in decoder.weights.items()}
    return training.new_eagle(decoder.spec, tensors, tiny_config(), counts, draft_vocab, seed=1)


def test_training_lowers_the_loss_and_can_be_repeated(decoder: Any, written: Any, lessons: list[Lesson]) -> None:
    start = fresh(decoder, written)

    def trained(epochs: float) -> tuple[Any, list[float]]:
        return training.train(start, lessons, STEPS, epochs, seed=4, rate=3e-3, batch=200, quiet=True)

    (one, losses), (again, repeated) = trained(2), trained(2)
    assert losses == repeated
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in one.tensors.items())
    layer, losses = trained(20)
    assert np.mean(losses[-10:]) < np.mean(losses[:5]) - 0.3
    before, after = (training.accuracy(each, lessons, STEPS) for each in (start, layer))
    assert all(a > b + 0.05 for a, b in zip(after["top1"], before["top1"], strict=True))
    assert all(0 <= one <= three <= 1 for one, three in zip(after["top1"], after["top3"], strict=True))


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_over_what_the_draft_can_guess(hugging_face: Any, lessons: list[Lesson]) -> None:
    """Against the model's distribution over the 32 tokens that are kept of it, for the tokens that it wrote alone."""
    layer = random_eagle(hugging_face.get_input_embeddings().weight.detach())
    place = torch.full((V,), -1).index_copy_(0, layer.targets, torch.arange(len(layer.targets)))
    lesson = lessons[1]
    for step, (loss, h) in enumerate(
        zip(training.losses(layer, lesson, 2, place), training.unrolled(layer, lesson, 2), strict=True)
    ):
        expected = torch.zeros(())
        for row in range(len(h)):
            guessed = row + 2 + step
            if not lesson.first <= guessed < len(lesson):
                continue
            target = torch.zeros(V).index_copy_(0, lesson.likeliest[guessed - 1], lesson.probabilities[guessed - 1])
            expected -= target[layer.targets] @ layer.own_logits(h[row : row + 1])[0].log_softmax(-1)
        assert abs(loss - expected) < 1e-5 * expected


def test_epochs_read_every_text_as_often(lessons: list[Lesson]) -> None:
    count = {id(lesson): 0 for lesson in lessons}
    batches = training.batches_of(lessons, 3, 100, torch.Generator().manual_seed(0))
    for lesson in itertools.chain(*batches):
        count[id(lesson)] += 1
    assert set(count.values()) == {3}
    assert all(100 <= sum(map(len, batch)) < 100 + 80 for batch in batches[:-1])
    half = training.batches_of(lessons, 0.5, 100, torch.Generator().manual_seed(0))
    assert 0 <= sum(map(len, itertools.chain(*half))) - 0.5 * sum(map(len, lessons)) < 80


def test_a_text_that_is_too_short_for_a_step_has_no_rows() -> None:
    two = Lesson(torch.zeros(2, 3, 4), torch.tensor([1, 2]), 1, torch.zeros(2, 1), torch.ones(2, 1))
    assert [training.guessed(two, step).tolist() for step in range(3)] == [[], [], []]


def test_the_rate_falls_to_nothing_at_the_end_or_the_deadline() -> None:
    never, share = float("inf"), rising_and_falling
    assert share(19, 200, 0.0, 5.0, never) == pytest.approx(0.5 * (1 + np.cos(np.pi * 19 / 200)))
    assert share(0, 200, 0.0, 0.0, never) == 1 / 20
    assert share(100, 200, 0.0, 1.0, never) == pytest.approx(0.5)
    assert share(100, 200, 0.0, 9.99, 10.0) < 1e-3
    assert share(100, 200, 0.0, 1.0, 10.0) == pytest.approx(0.5)


def test_a_new_draft_guesses_the_most_frequent_tokens(decoder: Any, written: Any) -> None:
    layer, counts = fresh(decoder, written, 20), torch.bincount(written[0].following, minlength=V)
    assert len(layer.targets) == 20 and layer.targets.tolist() == sorted(set(layer.targets.tolist()))
    others = torch.ones(V, dtype=torch.bool).index_fill_(0, layer.targets, False)
    assert counts[layer.targets].min() >= counts[others].max()
    assert torch.equal(layer.tensors["lm_head.weight"], decoder.weights["lm_head.weight"][layer.targets].float())


def test_a_draft_reads_the_layers_of_the_authors_where_there_are_so_many() -> None:
    assert training.taps_for(32) == usual_taps(32) == (2, 16, 29)
    assert training.taps_for(3) == (0, 1, 2) and training.taps_for(6) == (0, 3, 5)


def test_the_command_trains_a_draft_that_the_drafter_then_finds(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("the cat\n\nthe dog and\nthe rain\n")
    model = ["--model", str(tiny_folder)]
    sizes = ["--tokens", "300", "--held-out", "80", "--length", "40", "--heads", "2", "--epochs", "3"]
    command = ["train-heads", *model, "--form", "eagle", "--prompts", str(tmp_path / "prompts.txt"), *sizes]
    writing = [*model, "--prompt", "the cat", "--max-new-tokens", "50", "--ignore-eos", "--seed", "1", "--quiet"]
    assert main([*writing, "--drafter", "eagle"]) == 2
    assert "train-heads --form eagle" in capsys.readouterr().err
    assert main([*command, "--draft-vocab", "100"]) == 0
    printed = capsys.readouterr().out
    (folder,) = (tmp_path / "cache").glob("eagle-*")
    record = json.loads((folder / "training.json").read_text())
    assert record["tokens"] >= 300 and len(record["top1"]) == 2 and record["command"].startswith("tokenswift train-h")
    assert printed.startswith(str(folder)) and "top-1" in printed
    assert read_eagle(folder, open_checkpoint(str(tiny_folder))).shape.draft_vocab == 100
    assert main([*writing, "--drafter", "eagle"]) == 0
    drafted = capsys.readouterr().out
    assert main([*writing, "--drafter", "none"]) == 0
    assert capsys.readouterr().out == drafted
    for name in ("a", "b"):
        assert main([*command, "--quiet", "--out", str(tmp_path / name)]) == 0
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b, "the same seed gives the same draft"
