"""An interrupted text and its rest are, byte for byte, the whole: in the result, in text.txt and on standard output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokenswift_py import TokenSwift
from tokenswift_py.cli import write
from tokenswift_py.cli.main import main
from tokenswift_py.runs.stream import Stream

PROMPT = "the cat"
BAD = "\ufffd"


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", threads=1)


@pytest.fixture(scope="module")
def bias(swift: TokenSwift) -> dict[str, float]:
    """Makes the model write é, whose two bytes are two tokens, and now and then one of them alone."""
    halves = swift.tokenizer("é").input_ids
    assert len(halves) == 2
    return {str(token): 14.0 for token in halves}


def interrupted_at(stream: Stream, tokens: int) -> Stream:
    """Leaves a stream with its first piece that makes it so long."""
    with stream:
        for _ in stream:
            if len(stream.tokens) >= tokens:
                break
    return stream


@pytest.mark.parametrize("stop", [False, True])
def test_first_part_and_rest_are_the_whole(
    swift: TokenSwift, bias: dict[str, float], stop: bool, tmp_path: Path
) -> None:
    """Cut at every token: among them those in the middle of a character, and of a stop string."""
    settings: dict[str, Any] = {
        "max_new_tokens": 40, "seed": 1, "temperature": 1.0, "ignore_eos": True, "logit_bias": bias, "drafter": "none",
        "context": 200,
    }  # fmt: skip
    plain = swift.generate(PROMPT, **settings)
    assert "é" in plain.text
    if stop:
        settings["stop"] = [plain.text[12:16]]
    whole = swift.generate(PROMPT, **settings)
    assert whole.ending == ("stop" if stop else "length")
    in_character = in_stop = 0
    for cut in range(1, len(whole.tokens)):
        out = tmp_path / str(cut)
        first = interrupted_at(swift.stream(PROMPT, out=out, **settings), cut).result()
        decoded = swift.tokenizer.decode(first.tokens, skip_special_tokens=True)
        in_character += decoded.endswith(BAD) and not whole.text.startswith(decoded)
        in_stop += stop and len(first.text) < len(decoded.rstrip(BAD))
        with swift.resume(out) as again:
            rest = "".join(piece.text for piece in again)
        assert (first.ending, first.text + rest) == ("interrupted", whole.text)
        assert again.result().text == whole.text
    assert in_character and (in_stop or not stop)


def test_a_text_that_ended_keeps_its_last_bytes(swift: TokenSwift, bias: dict[str, float]) -> None:
    """A text whose limit cuts a character is what its tokens decode to, as with transformers."""
    settings: dict[str, Any] = {"seed": 1, "temperature": 1.0, "ignore_eos": True, "logit_bias": bias}
    texts = [swift.generate(PROMPT, max_new_tokens=count, **settings) for count in range(1, 9)]
    assert any(text.text.endswith(BAD) for text in texts)
    for text in texts:
        assert text.text == swift.tokenizer.decode(text.tokens, skip_special_tokens=True)


def test_standard_output_goes_on_where_it_broke_off(
    tiny_folder: Path, swift: TokenSwift, bias: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`generate.py --out DIR` and Ctrl-C, then `resume DIR`: both outputs together are the whole text."""

    class Pressed(write.CtrlC):
        def hold(self) -> None:
            pieces.append(None)
            self.pressed = len(pieces) >= cut

    flags = ["--model", str(tiny_folder), "--quiet", "--dtype", "fp32", "--prompt", PROMPT, "--max-new-tokens", "24",
             "--seed", "1", "--temperature", "1", "--ignore-eos", "--drafter", "none", "--context", "200"]  # fmt: skip
    flags += [text for token, value in bias.items() for text in ("--logit-bias", f"{token}={value}")]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    whole = (tmp_path / "whole" / "text.txt").read_bytes().decode()
    assert capsys.readouterr().out == f"{whole}\n"
    usual, held_back = write.CtrlC, False
    for cut in range(1, 9):
        pieces: list[None] = []
        out = tmp_path / str(cut)
        monkeypatch.setattr(write, "CtrlC", Pressed)
        assert main([*flags, "--out", str(out)]) == write.INTERRUPTED
        first = capsys.readouterr().out
        assert (out / "text.txt").read_bytes().decode() == first
        held_back |= len(first.encode()) < cut
        monkeypatch.setattr(write, "CtrlC", usual)
        assert main(["resume", str(out), "--quiet"]) == 0
        assert first + capsys.readouterr().out == f"{whole}\n"
        assert (out / "text.txt").read_bytes().decode() == whole
    assert held_back
