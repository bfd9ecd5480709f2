"""Command lines, prompts and surroundings that nobody means well with: one clear line and exit code 2, or the text."""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf_writer
from flags import with_flags
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.cli.flags import parser
from tokenswift_py.cli.main import main
from tokenswift_py.runs import journal

ROOT = Path(__file__).resolve().parent.parent
BASE = ("--dtype", "fp32", "--max-new-tokens", "8", "--seed", "1")

NUMBERS = [
    "0", "1", "-1", "2", "64", "256", "1000", "65536", "1e3", "0.5", "-0.0", "nan", "inf", "-inf", "1e308", "1e-320",
    str(2**31 - 1), str(2**31), str(2**63), str(2**64), "9" * 30, "-" + "9" * 30, "9" * 5000, "1_000", " 5 ", "+5",
    "0x10", "²", "٣", "True", "None", "1=1", "1=nan", "2=1e308", "5=-1e308", "-5=1", "99999=1", "=", "1=",
]  # fmt: skip
WORDS = [
    "auto", "none", "native", "torch", "bf16", "fp32", "int8", "gguf", "cascade", "partial", "heads", "draft_model",
    "quest", "recent", "warn", "stop", "cpu", "cuda", "cuda:99", "meta", "mps", "xla", "on", "off", "naive", "triton",
    "sdpa", "a/b", "%s", "{}", "--", "-x",
]  # fmt: skip
TEXTS = [
    "",
    " ",
    "\x00",
    "a\x00b",
    "\ud800",
    "\udcff",
    "é",
    "日本語",
    "👨‍👩‍👧‍👦",
    "\u202e",
    "\ufeff",
    "\n",
    "a\nb",
    "x" * 5000,
]
PATHS = [
    "~", "~nobody-of-this-name/x", "/", ".", "..", "/dev/null", "/nowhere/x", "keep.txt", "keep.txt/x", "model", "run",
    "a" * 300 + ".gguf", "keep.gguf",
]  # fmt: skip
VALUES = [*NUMBERS, *WORDS, *TEXTS, *PATHS]


class Place:
    """A folder with files that must outlive whatever is asked for, and the command line run in it."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("TOKENSWIFT_CACHE", str(folder / "cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        self._patch, self._capsys = monkeypatch, capsys
        (folder / "model").symlink_to(model)
        for name in ("keep.txt", "keep.gguf"):
            (folder / name).write_text("keep this")
        assert main(["--model", "model", *BASE, "--prompt", "the cat", "--out", "run"]) == 0
        self.before = self.files()
        capsys.readouterr()

    def files(self) -> dict[Path, bytes]:
        kept = (*Path("run").iterdir(), *Path("model").iterdir(), Path("keep.txt"), Path("keep.gguf"))
        return {path: path.read_bytes() for path in kept}

    def run(self, arguments: Sequence[str], stdin: bytes = b"the cat") -> tuple[int, str, str]:
        self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(arguments)
        printed = self._capsys.readouterr()
        return code, printed.out, printed.err


@pytest.fixture
def place(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Place:
    return Place(tmp_path, tiny_folder, monkeypatch, capsys)


def some_flags(rng: random.Random, root: Any, count: int) -> list[str]:
    """Flags of a parser, each with a value that may or may not be one of its own."""
    flags = [action for action in root._actions if action.option_strings and action.dest not in ("help", "version")]
    arguments: list[str] = []
    for action in rng.choices(flags, k=count):
        least, most = {0: (0, 0), "*": (0, 2)}.get(action.nargs, (1, 1))
        arguments += [action.option_strings[0], *rng.choices(VALUES, k=rng.randint(least, most))]
    return arguments


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_asked_for_is_done_or_refused_in_one_line(place: Place, seed: int) -> None:
    """Wrong types, extremes, contradictions, empty strings, NUL bytes, huge numbers and Unicode, one to three flags at
    a time, over all of them; nothing that was there is lost or changed."""
    rng, codes = random.Random(seed), []
    for _ in range(240):
        arguments = with_flags(["--model", "model", *BASE], *some_flags(rng, parser(), rng.choice([1, 1, 1, 2, 3])))
        arguments += ["--prompt", "the cat"] if rng.random() < 0.8 else []
        code, out, told = place.run(arguments)
        codes.append(code)
        assert code in (0, 2), (arguments, told)
        if code == 2:
            line = told.rpartition("tokenswift: ")[2]  # after what was warned of before
            assert line.count("\n") == 1 and line.endswith("\n") and 10 < len(line) < 1000, (arguments, told)
            assert out == ""
    assert place.files() == place.before
    assert codes.count(0) > 20 and codes.count(2) > 50


@pytest.mark.parametrize("command", ["resume", "audit", "train-heads", "extend-context"])
def test_the_other_commands_refuse_in_one_line_too(place: Place, command: str) -> None:
    from tokenswift_py.cli import audit, extend_context, train_heads

    roots = {
        "resume": lambda: parser(resumes=True), "audit": audit.parser, "train-heads": train_heads.parser,
        "extend-context": extend_context.parser,
    }  # fmt: skip
    rng = random.Random(command)
    for _ in range(100):
        folder = {"audit": ["run"], "resume": ["run"]}.get(command, ["--model", "model", "--minutes", "nan"])
        arguments = [command, *folder, *some_flags(rng, roots[command](), rng.choice([1, 2]))]
        code, _, told = place.run(arguments)
        assert code in (0, 2) or (code == 1 and command == "audit" and told == ""), (arguments, told)
        line = told.rpartition("tokenswift: ")[2]
        assert code != 2 or (line.count("\n") == 1 and 10 < len(line) < 1000), (arguments, told)
        assert place.files() == place.before, arguments


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seed", "soon"], "seed: 'soon' is not allowed; a whole number"),
        (["--top-p", ""], "top_p: '' is not allowed; a number"),
        (["--out", ""], "out: '' is not allowed; the name of a file or folder"),
        (["--prompt-file", "x"], "prompt_file: not allowed with argument --prompt"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag; the prompt goes after --prompt, and"),
        (["--drafter"], "drafter: expected one argument"),
        (["--threads", "1025"], "threads: 1025 is not allowed; between 1 and 1024"),
        (["--chapters", "99999999999"], "chapters: '99999999999' is not allowed; between 1 and 10000, or a file"),
        (["--stop", "\udcff"], r"stop: '\udcff' is not allowed; character 0 of it is half of a surrogate pair"),
        (["--out", "a\x00b"], r"out: 'a\x00b' is not allowed; a writable folder is (embedded null byte)"),
        (["--model", "m" * 5000], "model: '" + "m" * 199 + "... (5002 characters) is not allowed; smollm2-135m, an"),
        (["--draft-heads", "~nobody-of-this-name"], "draft_heads: '~nobody-of-this-name' is not allowed; an existing"),
        (["--trace", "keep.txt"], "trace: 'keep.txt' is not allowed; a new file; nothing is overwritten"),
        (["--device", "mps"], "device: 'mps' is not allowed; auto, cpu, cuda or another device"),
        (["--kv-budget", "256", "--max-new-tokens", "99999999999"], "memory: '"),
    ],
)
def test_what_is_wrong_is_named(place: Place, arguments: list[str], says: str) -> None:
    code, out, told = place.run(with_flags(["--model", "model", "--prompt", "the cat"], *arguments))
    assert (code, out, told.count("\n")) == (2, "", 1)
    assert told.startswith(f"tokenswift: {says}")
    assert place.files() == place.before


def test_an_audit_overwrites_nothing(place: Place) -> None:
    code, _, told = place.run(["audit", "run", "--json", "run/journal.bin"])
    assert code == 2 and told.startswith("tokenswift: json: 'run/journal.bin' is not allowed; a new file")
    assert place.run(["audit", "run", "--json", "found.json", "--quiet"])[0] == 0
    assert json.loads(Path("found.json").read_text())["passed"] is True
    assert place.files() == place.before


def test_a_device_that_never_ends_is_no_prompt(place: Place) -> None:
    for flag in ("--prompt-file", "--chapters"):
        code, _, told = place.run(["--model", "model", flag, "/dev/zero"])
        assert code == 2 and "more than 67108864 bytes" in told and told.count("\n") == 1


def test_the_name_of_a_file_need_not_be_utf8(place: Place) -> None:
    """Python has such names with lone surrogates; journal and report keep them, and the run goes on."""
    name, plain = "t\udcff\n", ["--model", "model", *BASE, "--prompt", "the cat"]
    assert place.run([*plain, "--out", "o\udcff", "--trace", name])[0] == 0
    assert json.loads(Path("o\udcff/report.json").read_bytes())["parameters"]["trace"] == name
    assert place.run(["resume", "o\udcff", "--quiet"])[0] == place.run(["audit", "o\udcff", "--quiet"])[0] == 0
    code, _, told = place.run(["--model", "m\udcff", "--prompt", "x"])
    assert code == 2 and told.startswith(r"tokenswift: model: 'm\udcff' is not allowed; character 1 of it is half")


def child(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    """The command line in a process of its own."""
    command = [sys.executable, str(ROOT / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, check=False, timeout=120, **settings)


def closing(*descriptors: int) -> Callable[[], None]:
    return lambda: [os.close(descriptor) for descriptor in descriptors] and None


def test_standard_streams_that_are_closed(place: Place) -> None:
    """No file of the run becomes standard output by getting its number."""
    for closed in ((1,), (0, 1, 2)):
        out = ["--out", str(closed)]
        done = child("--model", "model", *BASE, "--prompt", "the cat", *out, preexec_fn=closing(*closed))
        assert done.returncode == 0 and b"Traceback" not in done.stderr
        for name in ("journal.bin", "text.txt", "tokens.npy"):
            assert Path(str(closed), name).read_bytes() == place.before[Path("run", name)]
    done = child("--model", "model", preexec_fn=closing(0))
    assert (done.returncode, done.stderr) == (2, b"tokenswift: prompt: '' is not allowed; it must not be empty\n")


def test_an_encoding_that_lacks_the_texts_characters(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = with_flags(["--model", str(tiny_folder), *BASE], "--max-new-tokens", "300", "--ignore-eos")
    arguments += ["--prompt", "日本"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = child(*arguments, "--out", str(tmp_path / "run"), env=env)
    text = (tmp_path / "run" / "text.txt").read_bytes().decode()
    assert done.returncode == 0 and not text.isascii()
    assert done.stdout.decode("ascii").rstrip("\n") == text.encode("ascii", "replace").decode().rstrip("\n")


# Prompts


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32")


@settings(max_examples=60)
@given(
    st.one_of(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=60),
        st.lists(
            st.sampled_from(
                [
                    "👨‍👩‍👧‍👦",
                    "\ufeff",
                    "\0",
                    "\u202eשלום",
                    "e\u0301\u0327",
                    "\U0010ffff",
                    "\r\n",
                    "<|im_end|>",
                    "\u2028",
                ]
            ),
            min_size=1,
            max_size=8,
        ).map("".join),
    ),
    st.booleans(),
)
def test_the_pieces_of_a_text_join_whatever_the_prompt(swift: TokenSwift, prompt: str, raw: bool) -> None:
    with swift.stream(prompt, raw=raw, max_new_tokens=30, seed=len(prompt), ignore_eos=True) as stream:
        told = "".join(piece.text for piece in stream)
    result = stream.result()
    assert told == result.text == swift.tokenizer.decode(result.tokens, skip_special_tokens=True)
    if raw:
        assert swift.tokenizer.decode(stream.run.prompt) == prompt


@pytest.mark.parametrize(
    "content",
    ["e\u0301 👨‍👩‍👧‍👦 \u202eשלום", "\ufeffthe cat\r\n", "a\0b", "\U0010ffff\ue000\u2028", "   \n\t"],
    ids=ascii,
)
def test_a_prompt_reaches_the_model_as_it_is(place: Place, content: str) -> None:
    """From a file, standard input and (where the system lets it through) the command line; text.txt is what was
    printed."""
    Path("prompt.txt").write_bytes(content.encode())
    texts = []
    for number, source in enumerate((["--prompt-file", "prompt.txt"], ["--prompt", content], [])):
        out = f"out{number}"
        code, printed, _ = place.run(["--model", "model", *BASE, *source, "--out", out], content.encode())
        assert code == 0
        texts.append(Path(out, "text.txt").read_bytes())
        assert printed.encode().rstrip(b"\n") == texts[-1].rstrip(b"\n")
        assert place.run(["audit", out, "--quiet"])[0] == 0
    assert texts[0] == texts[1] == texts[2]


def test_prompts_that_are_no_text_are_refused_with_the_place(place: Place) -> None:
    for data, at in ((b"\xff", 0), (b"the c\xe6\x97", 5), (b"\xed\xa0\x80", 0), (b"ok\xc0\x80", 2)):
        Path("prompt.bin").write_bytes(data)
        for source, field in ((["--prompt-file", "prompt.bin"], "prompt_file"), ([], "standard input")):
            code, _, told = place.run(["--model", "model", *source], data)
            assert (code, told) == (2, f"tokenswift: {field}: byte {at} is not allowed; the text must be UTF-8\n")
    for raw in ([], ["--raw"]):
        code, _, told = place.run(["--model", "model", "--prompt", "the \udce6", *raw])
        assert code == 2 and "of it is half of a surrogate pair: the text must be UTF-8" in told
    for source in (["--prompt", ""], []):
        code, _, told = place.run(["--model", "model", *source], b"")
        assert (code, told) == (2, "tokenswift: prompt: '' is not allowed; it must not be empty\n")


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_prompts_from_one_token_to_a_full_context(tiny_folder: Path, engine: str) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine=engine)
    whole: dict[str, Any] = {"seed": 3, "ignore_eos": True, "drafter": "none"}
    for length in (1, 63, 64, 65, 199):
        prompt = [5 + i % 50 for i in range(length)]
        room = 200 - length
        plain = swift.generate(prompt, context=200, max_new_tokens=room, **whole)
        assert len(plain.tokens) == room and plain.ending == "length"
        for drafter in ("ngram", "partial"):
            same = swift.generate(prompt, context=200, max_new_tokens=room, **{**whole, "drafter": drafter})
            assert same.tokens == plain.tokens
        says = rf"context: 200 is not allowed; prompt \({length}\) \+ max_new_tokens \({room + 1}\) need 201"
        with pytest.raises(UserError, match=says):
            swift.generate(prompt, context=200, max_new_tokens=room + 1)
    for length in (200, 201, 500):
        with pytest.raises(UserError, match=rf"context: 200 .* prompt \({length}\) \+ max_new_tokens \(1\) need"):
            swift.generate([5] * length, context=200, max_new_tokens=1)
    for empty in ("", [], ()):
        with pytest.raises(UserError, match=r"prompt: .* it must not be empty"):
            swift.generate(empty)


# Two runs at once


def test_two_runs_convert_one_model_and_write_what_each_writes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first conversion is raced for; a second writer of the same folder is refused."""
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    path = gguf_writer.write_gguf(tmp_path / "tiny.gguf", gguf_writer.gguf_config("llama"), {}, "Q8_0")
    arguments = [
        "--model",
        str(path),
        "--prompt",
        "the cat",
        "--max-new-tokens",
        "200",
        "--ignore-eos",
        "--temperature",
    ]
    arguments += ["0.8", "--quiet", "--seed"]
    command = [sys.executable, str(ROOT / "generate.py"), *arguments]
    env = {**os.environ, "TOKENSWIFT_CACHE": str(tmp_path / "shared")}
    runs = [("1", "one"), ("2", "two"), ("3", "same"), ("4", "same")]
    racing = [
        subprocess.Popen([*command, seed, "--out", str(tmp_path / out)], stdout=-1, stderr=-1, env=env)
        for seed, out in runs
    ]
    ended = [(*process.communicate(timeout=200), process.returncode) for process in racing]
    assert [code for *_, code in ended[:2]] == [0, 0], ended
    assert sorted(code for *_, code in ended[2:]) == [0, 2], ended
    refused = next(errors for _, errors, code in ended if code)
    assert refused.startswith(b"tokenswift: out: ") and refused.count(b"\n") == 1
    assert len(list((tmp_path / "shared").glob("tiny-*"))) == 1 and len(list((tmp_path / "shared").iterdir())) <= 2
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "own"))
    for (seed, out), (text, _, code) in zip(runs, ended, strict=True):
        if code == 0:
            assert main([*arguments, seed, "--out", str(tmp_path / "alone" / seed)]) == 0
            for name in ("text.txt", "tokens.npy"):
                assert (tmp_path / "alone" / seed / name).read_bytes() == (tmp_path / out / name).read_bytes()
            assert text.rstrip(b"\n") == (tmp_path / out / "text.txt").read_bytes().rstrip(b"\n")


# A disk that fills up


@pytest.mark.parametrize("limit", [3_000, 12_000])
def test_a_disk_that_fills_up_keeps_what_was_written(place: Place, limit: int) -> None:
    """No file may become larger than the limit, be it the journal or the text: one line, and the run goes on later."""
    arguments = with_flags(["--model", "model", *BASE], "--max-new-tokens", "2500", "--context", "3000", "--ignore-eos")
    arguments += ["--prompt", "the cat"]
    done = child(
        *arguments, "--out", "full", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert re.search(rb"\ntokenswift: .*File too large.*\n$", b"\n" + done.stderr)
    safe = journal.read(Path("full")).tokens
    assert place.run([*arguments, "--out", "whole"])[0] == 0
    assert safe == np.load("whole/tokens.npy").tolist()[: len(safe)]
    assert place.run(["resume", "full", "--quiet"])[0] == 0
    for name in ("text.txt", "tokens.npy"):
        assert Path("full", name).read_bytes() == Path("whole", name).read_bytes()
