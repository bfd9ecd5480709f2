"""A checkpoint's generation_config.json means what transformers' generate makes of it, or a line says why not."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tokenswift_py import TokenSwift
from tokenswift_py.checkpoints.generation_defaults import not_honoured
from tokenswift_py.decoding.history import History
from tokenswift_py.options import Options
from tokenswift_py.runs.journal import Record
from tokenswift_py.runs.plan import prepare, recorded_run
from tokenswift_py.sampling.reference import Sampler

PROMPT = [5, 9, 40, 9, 40, 9, 41]


def asking(tiny_folder: Path, folder: Path, **fields: Any) -> Path:
    """The tiny checkpoint with another generation_config.json."""
    shutil.copytree(tiny_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], **fields}))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "top_k": None},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.6, "top_k": 3},
        {"repetition_penalty": 1.7},
        {"do_sample": False, "repetition_penalty": 1.7},
        {"do_sample": True, "repetition_penalty": 1.3, "top_k": 20, "typical_p": 1.0},
        {"suppress_tokens": [40, 7, 100_000], "bad_words_ids": [[9], [2], [5]]},
        {"do_sample": True, "suppress_tokens": [40], "num_beams": 1, "no_repeat_ngram_size": 0},
        {"do_sample": True, "typical_p": 0.7, "top_k": 20, "no_repeat_ngram_size": 2, "repetition_penalty": 0.8},
        {"bad_words_ids": [[9], [9, 41, 7], [41, 7], [5, 6]], "no_repeat_ngram_size": 3},
    ],
    ids=str,
)
def test_the_scores_are_those_of_transformers(tiny_folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = asking(tiny_folder, tmp_path / "model", **fields)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=8, output_scores=True, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    swift = TokenSwift.from_pretrained(str(folder), dtype="fp32")
    params = Options().sampling(swift.checkpoint.defaults, swift.tokenizer)
    sampler, text = Sampler(params, model.config.vocab_size), theirs.sequences[0].tolist()
    assert (params.temperature > 0) == bool(fields.get("do_sample"))
    for step, (row, wanted) in enumerate(zip(theirs.logits, theirs.scores, strict=True)):
        scores = sampler.process(row[0], History(text[: len(PROMPT) + step]))
        if params.temperature:
            scores = scores / params.temperature
            scores[np.setdiff1d(np.arange(len(scores)), sampler.candidates(scores))] = -np.inf
        np.testing.assert_allclose(scores, wanted[0].double().numpy(), rtol=1e-5)
        assert params.temperature or scores.argmax() == text[len(PROMPT) + step]
    assert not_honoured(folder) == ("temperature 0.6, top_k 3" if fields.get("top_k") == 3 else "")


def test_a_long_text_is_penalised_for_all_of_it(tiny_folder: Path, tmp_path: Path) -> None:
    """The checkpoint's penalty looks at all of the text; a contextual one that is asked for takes its place."""
    swift = TokenSwift.from_pretrained(str(asking(tiny_folder, tmp_path / "m", repetition_penalty=1.5)), dtype="fp32")

    def penalties(**settings: Any) -> tuple[float, float, int]:
        run = prepare(swift, "the cat", Options(**settings))
        assert prepare(swift, "the cat", Options.of(**run.parameters())).sampling == run.sampling
        return run.sampling.repetition_penalty, run.sampling.penalty, run.sampling.penalty_window

    assert penalties() == (1.5, 1.0, 1024) and penalties(penalty=1) == (1.0, 1.0, 1024)
    assert penalties(penalty=1.1, penalty_window=9) == (1.0, 1.1, 9)
    assert penalties(penalty=1.1, repetition_penalty=1.2) == (1.2, 1.1, 1024)


def test_a_run_that_was_begun_before_these_defaults_were_known_goes_on_without_them(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """What is new in an option's list must not change a text that is half written."""
    swift = TokenSwift.from_pretrained(
        str(
            asking(tiny_folder, tmp_path / "m", repetition_penalty=1.5, no_repeat_ngram_size=2, bad_words_ids=[[5, 6]])
        ),
        dtype="fp32",
    )
    before = dict(prepare(swift, "the cat", Options(seed=1)).parameters(), penalty=1.5, penalty_window=2**31 - 1)
    for name in ("repetition_penalty", "no_repeat_ngram_size", "ban_words", "typical_p", "special", "system"):
        del before[name]
    header = {"parameters": {**before, "logprobs": False}, "prompt": [5, 6], "numerics": "x"}
    run = recorded_run(swift, Record(tmp_path, header, [], [], 0, 0, 0, 0))
    found = run.sampling
    assert (found.penalty, found.repetition_penalty, found.no_repeat_ngram_size, found.ban_words) == (1.5, 1.0, 0, ())
    assert run.options.special and run.options.logprobs is None


def test_bans_of_the_checkpoint_stay_until_others_are_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    folder = asking(tiny_folder, tmp_path / "model", suppress_tokens=[7, 9])
    swift = TokenSwift.from_pretrained(str(folder), dtype="fp32")
    for asked, ban in ((None, (7, 9)), ([], ()), ([11], (11,))):
        run = prepare(swift, "the cat", Options(ban=asked, seed=1))
        assert run.sampling.ban == ban and run.parameters()["ban"] == list(ban)
        assert prepare(swift, "the cat", Options.of(**run.parameters())).sampling == run.sampling


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"typical_p": 0.9, "do_sample": True, "top_h": 0.4}, "top_h 0.4"),
        ({"typical_p": 0.9, "no_repeat_ngram_size": 3}, "typical_p 0.9"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size 2.5"),
        ({"bad_words_ids": [[5], [5, 6]], "epsilon_cutoff": 1e-3}, "epsilon_cutoff 0.001"),
        ({"repetition_penalty": 0.8}, ""),
        ({"repetition_penalty": 1000.0}, "repetition_penalty 1000.0"),
        ({"min_new_tokens": 5, "stop_strings": ["END"]}, "min_new_tokens 5, stop_strings ['END']"),
        ({"begin_suppress_tokens": [5], "forced_eos_token_id": 2}, "begin_suppress_tokens [5], forced_eos_token_id 2"),
        ({"temperature": 0.5, "top_p": 1.0}, "temperature 0.5"),
        ({"a_field_of_later": "x"}, "a_field_of_later 'x'"),
        ({"eta_cutoff": 0.1, "encoder_repetition_penalty": 2.0}, "eta_cutoff 0.1, encoder_repetition_penalty 2.0"),
        ({"max_length": 4096, "pad_token_id": 0, "use_cache": True, "transformers_version": "4.1", "num_beams": 1}, ""),
    ],
    ids=str,
)
def test_what_is_not_honoured_is_told_in_one_line(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], told: str
) -> None:
    with caplog.at_level(logging.WARNING, "tokenswift"):
        TokenSwift.from_pretrained(str(asking(tiny_folder, tmp_path / "model", **fields)), dtype="fp32")
    lines = [record.getMessage() for record in caplog.records if record.name == "tokenswift"]
    assert lines == ([f"generation_config.json: these change nothing here: {told}"] if told else [])
