"""What is typed or read from a file is what the model gets: marks, line ends, escapes, flags given twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tokenswift_py import TokenSwift, UserError
from tokenswift_py.cli import train_heads
from tokenswift_py.cli.arguments import lines_of, unescaped
from tokenswift_py.cli.flags import parser
from tokenswift_py.cli.inputs import read_options, read_prompt
from tokenswift_py.cli.main import main
from tokenswift_py.errors import check
from tokenswift_py.text import Chat, prompt_tokens
from toys import tiny_tokenizer


def options(*arguments: str) -> dict[str, Any]:
    return read_options(parser().parse_args(arguments))


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        options(*arguments)
    return str(error.value)


def test_a_mark_of_the_bytes_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes("\ufeffthe \ufeffcat".encode())
    (tmp_path / "chapters").write_bytes("\ufeffone\ntwo".encode())
    for arguments in (["--prompt-file", str(tmp_path / "prompt")], ["--prompt", "\ufeffthe \ufeffcat"]):
        assert read_prompt(parser().parse_args(arguments)) == "the \ufeffcat"
    assert options("--chapters", str(tmp_path / "chapters"))["chapters"] == ["one", "two"]
    assert train_heads.read_prompts(tmp_path / "chapters") == ([("one", False)], [("two", False)])


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    inside = "a\x0bb\x0cc\x1cd\x1ee\x85f\u2028g\u2029h"
    assert lines_of(f"{inside}\nx\r\ny\rz") == [inside, "x", "y", "z"]
    (tmp_path / "chapters").write_bytes(f" {inside}\t\r\n\r\n \nlast\u2028\r".encode())
    assert options("--chapters", str(tmp_path / "chapters"))["chapters"] == [inside, "last\u2028"]
    (tmp_path / "prompts").write_bytes(f"{inside}\nlast".encode())
    assert train_heads.read_prompts(tmp_path / "prompts") == ([(inside, False)], [("last", False)])


def test_a_bos_that_is_typed_is_not_doubled(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
    )
    ids = tokenizer("the cat", add_special_tokens=False).input_ids
    assert prompt_tokens(tokenizer, "the cat", Chat(raw=True)) == [0, *ids, 2] and not caplog.records
    assert prompt_tokens(tokenizer, "<|endoftext|>the cat", Chat(raw=True, special=True)) == [0, *ids, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "prompt: it begins with <|endoftext|>, so the tokenizer's own is left out"
    ]
    assert prompt_tokens(tokenizer, "<|endoftext|><|endoftext|>the", Chat(raw=True, special=True))[:3] == [
        0,
        0,
        0,
    ]  # as was typed
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert prompt_tokens(tokenizer, "<|endoftext|>the cat", Chat(raw=True, special=True)) == [0, *ids]
    assert prompt_tokens(tokenizer, "<|endoftext|><|endoftext|>the cat", Chat(raw=True, special=True)) == [0, 0, *ids]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--seed", "1", "--seed", "2"], "seed: given twice, as 1 and as 2"),
        (["--prompt", "a", "--prompt", "b"], "prompt: given twice, as 'a' and as 'b'"),
        (["--out", "a", "--out", "b"], "out: given twice, as 'a' and as 'b'"),
        (["--top-p", "0.5", "--model", "m", "--top-p=0.6"], "top_p: given twice, as 0.5 and as 0.6"),
        (
            ["--logit-bias", "5=1", "7=1", "--logit-bias", "5=2"],
            "logit_bias: '5=2.0' is not allowed; it was given as 5=1.0",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(given: list[str], says: str) -> None:
    assert refused(*given).startswith(says)


def test_flags_that_repeat_themselves_or_add_up_are_not() -> None:
    same = options("--seed", "1", "--stop", "a", "--seed", "1", "--stop", "b", "--ban", "5", "--ban", "the", "7")
    assert (same["seed"], same["stop"], same["ban"]) == (1, ["a", "b"], [5, "the", 7])
    more = options("--dry-breakers", "x", "--dry-breakers", "y", "--logit-bias", "5=1", "--logit-bias", "5=1", "6=2")
    assert more["dry_breakers"] == ["x", "y"] and more["logit_bias"] == {5: 1.0, 6: 2.0}
    assert options()["ban"] is None and options("--ban")["ban"] == [] and "dry_breakers" not in options()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"a\nb", "a\nb"), (r"\t\r\\n", "\t\r\\n"), (r"\"x\'", "\"x'"), (r"\x41\x0a", "A\n"), ("\\", "\\"),
        (r"\q\xg1\x8f\d", r"\q\xg1\x8f\d"), (r"\\\n", "\\\n"), ("", ""), ("é\n", "é\n"),
    ],
)  # fmt: skip
def test_escapes_are_read_where_they_are_asked_for(typed: str, meant: str, caplog: pytest.LogCaptureFixture) -> None:
    assert unescaped(typed) == meant
    flags = ["--prompt", typed, "--stop", typed, "--ban", typed, "--dry-breakers", typed, "--stop-token", typed]
    for arguments, text in ((flags, typed), ([*flags, "-e"], meant), (["--escape", *flags], meant)):
        caplog.clear()
        found = options(*arguments)
        assert (found["stop"], found["stop_tokens"], found["ban"], found["dry_breakers"]) == ([text],) * 4
        warned = [record.getMessage() for record in caplog.records]
        assert warned == ([f"stop: {typed!r} is taken as it is typed; with -e it is {meant!r}"] * (text != meant))
        if text:
            assert read_prompt(parser().parse_args(arguments)) == text


def test_a_file_has_no_escapes(tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text(r"C:\new")
    assert read_prompt(parser().parse_args(["-e", "--prompt-file", str(tmp_path / "prompt")])) == r"C:\new"


def test_messages_show_values_as_they_are_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(tmp_path), "--out", "new folder"]) == 2
    assert capsys.readouterr().err == "tokenswift: out: 'new folder' is not allowed; not with resume\n"
    number = torch.arange(9).numpy()[5]
    for value, text in (
        (Path("a") / "b", "'a/b'"),
        (number, "5"),
        (torch.tensor(5), "5"),
        ([1], "[1]"),
        (None, "None"),
    ):
        with pytest.raises(UserError, match=f"^x: {text}".replace("[", r"\[")):
            check(False, "x", value, "else")


def test_a_run_reads_escapes_and_goes_on_with_them(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_folder), "--dtype", "fp32", "--max-new-tokens", "9", "--seed", "1", "--quiet"]
    run = str(tmp_path / "run")
    assert main([*arguments, "--prompt", r"a\nb", "--raw", "--stop", r"\n\n", "-e", "--out", run]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["parameters"]["stop"] == ["\n\n"]
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32")
    assert report["prompt_tokens"] == len(prompt_tokens(swift.tokenizer, "a\nb", Chat(raw=True)))
    assert main(["resume", run, "--stop", r"\n\n", "-e", "--quiet"]) == 0
    assert main(["resume", run, "--stop", r"\n\n", "--quiet"]) == 2
