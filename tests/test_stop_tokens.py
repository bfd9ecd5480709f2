"""What ends a text in a whole run: stop tokens, stop strings that are special tokens, ends that only the tokenizer
names, and how many tokens must come first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tokenswift_py import TokenSwift, UserError
from tokenswift_py.cli.main import main
from tokenswift_py.runs import audit
from tokenswift_py.text import end_tokens
from toys import tiny_tokenizer

PROMPT = [5, 9, 40, 9, 40]
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 60, "on_loop": "ignore"}


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32")


@pytest.fixture(scope="module")
def plain(swift: TokenSwift) -> list[int]:
    return swift.generate(PROMPT, ignore_eos=True, **GREEDY).tokens


def generated(folder: Path, ends: list[int], least: int = 0) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = model.generate(
        torch.tensor([PROMPT]),
        do_sample=False,
        max_new_tokens=60,
        eos_token_id=ends,
        min_new_tokens=least,
        pad_token_id=0,
    )
    return list(text[0].tolist()[len(PROMPT) :])


@pytest.mark.parametrize("least", [0, 20, 45])
@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_a_stop_token_ends_where_transformers_ends_and_leaves_no_text(
    swift: TokenSwift, plain: list[int], tiny_folder: Path, least: int, drafter: str
) -> None:
    stop = plain[12]
    wanted = generated(tiny_folder, [stop, 2, 0], least)
    result = swift.generate(PROMPT, stop_tokens=[stop], min_new_tokens=least, drafter=drafter, **GREEDY)
    assert result.tokens == wanted and len(wanted) > least
    if result.tokens[-1] == stop:
        assert result.ending == "stop"
        assert result.text == swift.tokenizer.decode(wanted[:-1], skip_special_tokens=True)


def test_a_stop_token_is_an_id_or_a_text(swift: TokenSwift, plain: list[int]) -> None:
    place = next(i for i, token in enumerate(plain) if i > 5 and swift.tokenizer.decode([token]).isascii()
                 and len(swift.tokenizer(swift.tokenizer.decode([token])).input_ids) == 1
                 and token not in swift.tokenizer.all_special_ids)  # fmt: skip
    for named in (plain[place], swift.tokenizer.decode([plain[place]])):
        result = swift.generate(PROMPT, stop_tokens=[named], ignore_eos=True, **GREEDY)
        assert result.tokens == plain[: plain.index(plain[place]) + 1] and result.ending == "stop"
    for wrong, says in (
        ([99_999], "stop_tokens: 99999 is not allowed; token ids are 0 to"),
        ([-1], "stop_tokens: -1 is not allowed; token ids are 0 to"),
        (["the dog and the cat"], r"stop_tokens: 'the dog and the cat' is not allowed; .* one token \(this is"),
        ([True], r"stop_tokens: \[True\] is not allowed; a list of token ids and one-token texts"),
        ("x", "stop_tokens: 'x' is not allowed"),
    ):
        with pytest.raises(UserError, match=says):
            swift.generate(PROMPT, stop_tokens=wrong, **GREEDY)


def test_a_stop_string_that_is_a_special_token_is_found_by_its_id(swift: TokenSwift) -> None:
    favoured = {1: 30.0}  # <|im_start|>, which ends nothing by itself
    settings: dict[str, Any] = {"logit_bias": favoured, "temperature": 0, "max_new_tokens": 9, "ignore_eos": True}
    assert len(swift.generate(PROMPT, **settings).tokens) == 9
    result = swift.generate(PROMPT, stop=["<|im_start|>"], **settings)
    assert (result.tokens, result.ending, result.text) == ([1], "stop", "")
    late = swift.generate(PROMPT, stop=["<|im_start|>"], min_new_tokens=4, **settings)
    assert len(late.tokens) == 5 and late.tokens.index(1) == 4 and late.ending == "stop"
    with pytest.raises(
        UserError, match=r"stop: 'a<\|im_start\|>' is not allowed; the special token '<\|im_start\|>' in"
    ):
        swift.generate(PROMPT, stop=["a<|im_start|>"], **settings)


@pytest.mark.parametrize("least", [0, 10, 30])
@pytest.mark.parametrize("chapters", [False, True])
def test_the_text_is_cut_before_the_stop_string_that_ended_it_and_no_other(
    swift: TokenSwift, least: int, chapters: bool
) -> None:
    """By definition: the first match that ends after the first `least` tokens; those before it are text."""
    settings: dict[str, Any] = {"temperature": 0.9, "seed": 5, "max_new_tokens": 80, "ignore_eos": True}
    settings |= {"logit_bias": {7: 3.0, 40: 3.0}, "ban": [0, 1, 2]}
    stop = swift.tokenizer.decode([40])
    tokens = swift.generate(PROMPT, **settings).tokens
    texts = [swift.tokenizer.decode(tokens[:count]) for count in range(len(tokens) + 1)]
    count = next(n for n in range(least + 1, len(texts)) if stop in texts[n][len(texts[n - 1].rstrip("\ufffd")) :])
    assert least == 0 or stop in texts[least]
    least_of = {"min_chapter_tokens": least} if chapters else {"min_new_tokens": least}
    with swift.stream(PROMPT, stop=[stop], **least_of, **settings) as stream:
        told = "".join(piece.text for piece in stream)
    assert stream.result().tokens == tokens[:count] and stream.result().ending == "stop"
    assert told == stream.result().text == texts[count][: texts[count].rindex(stop)]


def test_a_run_with_stop_tokens_is_recorded_resumed_and_audited(
    swift: TokenSwift, plain: list[int], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"stop_tokens": [plain[30]], "min_new_tokens": 25, "ignore_eos": True, **GREEDY}
    whole = swift.generate(PROMPT, **settings)
    with swift.stream(PROMPT, out=tmp_path / "run", **settings) as stream:
        for _ in stream:
            if len(stream.tokens) > 10:
                break
    with swift.resume(tmp_path / "run", stop_tokens=[plain[30]]) as stream:
        list(stream)
    assert (stream.result().tokens, stream.result().text) == (whole.tokens, whole.text)
    assert audit.audit(swift, tmp_path / "run").passed


def test_ends_that_only_the_tokenizer_names_end_a_text(tiny_folder: Path, tmp_path: Path) -> None:
    """A checkpoint whose generation_config.json forgot its end of turn."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**said, "eos_token_id": 0}))
    swift = TokenSwift.from_pretrained(str(folder), dtype="fp32")
    assert swift.checkpoint.eos == (0, 2)
    assert swift.generate("the cat", max_new_tokens=9, logit_bias={2: 50.0}).ending == "eos"


LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (LLAMA3, ["<|endoftext|>", "<|eot_id|>"]),
        (None, ["<|endoftext|>"]),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", ["<|endoftext|>"]),
        ("{{ raise_exception('never') }}", ["<|endoftext|>"]),
    ],
    ids=["llama 3", "none", "no end of turn", "broken"],
)
def test_the_end_of_turn_is_read_off_the_chat_template(template: str | None, named: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
    )
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", template
    assert end_tokens(tokenizer, (7,)) == (7, *tokenizer.convert_tokens_to_ids(named))


def test_the_command_line_takes_stop_tokens(
    tiny_folder: Path, swift: TokenSwift, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_folder), "--dtype", "fp32", "--prompt", "x", "--max-new-tokens", "9", "--quiet"]
    arguments += ["--logit-bias", "1=50", "--stop-token", "5", "--stop-token", "<|im_start|>", "--ignore-eos"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--seed", "1"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["ending"] == "stop" and report["new_tokens"] == 1
    assert report["parameters"]["stop_tokens"] == [5, "<|im_start|>"]
    assert main([*arguments, "--stop-token", "400"]) == 2
    assert capsys.readouterr().err == "tokenswift: stop_tokens: 400 is not allowed; token ids are 0 to 288\n"
