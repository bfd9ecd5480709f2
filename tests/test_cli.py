"""The command line, as a person or a script meets it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from flags import with_flags
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.cli import terminal
from tokenswift_py.cli.main import main
from tokenswift_py.runs.folder import save_tokens
from tokenswift_py.runs.journal import read
from tokenswift_py.text import Chat, prompt_tokens

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cli(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ["--model", str(tiny_folder), "--dtype", "fp32", "--max-new-tokens", "40", "--seed", "3"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "generate.py"), *arguments]


def test_out_holds_text_tokens_and_report(cli: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*cli, "--prompt", "the cat", "--out", str(out), "--baseline"]) == 0
    printed = capsys.readouterr()
    text = (out / "text.txt").read_text(encoding="utf-8")
    assert printed.out.rstrip("\n") == text.rstrip("\n")
    report = json.loads((out / "report.json").read_text())
    tokens = np.load(out / "tokens.npy", allow_pickle=False)
    assert report["identical"] is True
    assert len(tokens) == report["new_tokens"]
    assert "speed-up" in printed.err
    assert "distinct-4" in printed.err
    assert sorted(path.name for path in out.iterdir()) == ["journal.bin", "report.json", "text.txt", "tokens.npy"]


def test_prompts_from_argument_file_and_standard_input_are_one(
    cli: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("the cät 🙂", encoding="utf-8")
    outputs = []
    for extra in (["--prompt", "the cät 🙂"], ["--prompt-file", str(file)]):
        assert main([*cli, "--quiet", *extra]) == 0
        outputs.append(capsys.readouterr().out)
    piped = subprocess.run(command(*cli, "--quiet"), input="the cät 🙂".encode(), capture_output=True, check=True)
    assert outputs[0] == outputs[1] == piped.stdout.decode() != ""


def test_quiet_prints_the_text_alone(cli: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*cli, "--prompt", "the cat", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out
    assert printed.err == ""


def test_chapters_from_a_file_and_by_number(cli: list[str], tmp_path: Path) -> None:
    (tmp_path / "chapters.txt").write_text("and then\n\nthe rain\n")
    base = with_flags(cli, "--prompt", "a", "--max-new-tokens", "300", "--logit-bias", "2=6")
    for value, out in ((str(tmp_path / "chapters.txt"), "file"), ("2", "number")):
        assert main([*base, "--chapters", value, "--out", str(tmp_path / out)]) == 0
        assert len(json.loads((tmp_path / out / "report.json").read_text())["forced"]) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", ""], "prompt: ''"),
        (["--prompt", "x", "--drafter", "oracle"], "drafter: 'oracle'"),
        (["--prompt", "x", "--temperature", "-1"], "temperature: -1.0"),
        (["--prompt", "x", "--top-p", "nan"], "top_p: nan"),
        (["--prompt", "x", "--min-new-tokens", "90"], "min_new_tokens: 90"),
        (["--prompt", "x", "--min-chapter-tokens", "-1"], "min_chapter_tokens: -1"),
        (["--prompt", "x", "--context", "10"], "context: 10"),
        (["--prompt", "x", "--chapters", "0"], "chapters: '0'"),
        (["--prompt", "x", "--chapters", "nowhere.txt"], "chapters: 'nowhere.txt'"),
        (["--prompt", "x", "--logit-bias", "much"], "logit_bias: 'much'"),
        (["--prompt", "x", "--dtype", "int3"], "dtype: 'int3'"),
        (["--prompt-file", "nowhere.txt"], "prompt_file: 'nowhere.txt'"),
        (["--prompt", "x", "--model", "nothing here"], "model: 'nothing here'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    cli: list[str], arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(with_flags(cli, *arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"tokenswift: {says}")
    assert printed.err.count("\n") == 1


def test_a_prompt_file_that_is_not_text(cli: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"abc\xff")
    assert main([*cli, "--prompt-file", str(tmp_path / "binary")]) == 2
    assert "byte 3" in capsys.readouterr().err


def test_nothing_is_overwritten(cli: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("mine")
    assert main([*cli, "--prompt", "x", "--out", str(tmp_path)]) == 2
    assert main([*cli, "--prompt", "x", "--out", str(tmp_path / "text.txt")]) == 2
    assert main([*cli, "--prompt", "x", "--out", str(tmp_path / "text.txt" / "below")]) == 2
    assert capsys.readouterr().err.count("tokenswift: out:") == 3
    assert (tmp_path / "text.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_what_is_refused_leaves_no_folder(cli: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (tmp_path / "new" / "run", tmp_path / "new" / ".." / "run"):
        flags = with_flags(cli, "--prompt", "the cat", "--max-new-tokens", "9", "--context", "10", "--out", str(out))
        assert main(flags) == 2
        assert capsys.readouterr().err.startswith("tokenswift: context: 10 is not allowed")
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_is_refused_before_a_model_is_loaded(
    cli: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert main([*cli, "--prompt", "the cat", "--out", str(run), "--quiet"]) == 0
    monkeypatch.setattr(TokenSwift, "from_pretrained", lambda *_, **__: pytest.fail("it has begun"))
    capsys.readouterr()
    for trace in (tmp_path / "missing" / "trace", run / "text.txt" / "trace", run / "text.txt", run):
        for arguments in ([*cli, "--prompt", "the cat"], ["resume", str(run), "--extend", "5"]):
            assert main([*arguments, "--trace", str(trace)]) == 2
            told = capsys.readouterr().err
            assert told.startswith("tokenswift: trace: ") and told.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_of_the_trace_is_one_line_of_a_run_that_ends_well(cli: list[str], tmp_path: Path) -> None:
    arguments = [*cli, "--prompt", "the cat", "--out"]
    assert main([*arguments, str(tmp_path / "plain")]) == 0
    done = subprocess.run(
        command(*arguments, str(tmp_path / "full"), "--trace", "/dev/full"), capture_output=True, text=True, check=True
    )
    told = done.stderr
    assert told.count("tokenswift: trace: No space left on device: it ends here, the text goes on\n") == 1
    assert told.count("trace: ") == 1
    for name in ("text.txt", "tokens.npy"):
        assert (tmp_path / "full" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert json.loads((tmp_path / "full" / "report.json").read_text())["ending"] in ("eos", "length")
    assert read(tmp_path / "full").tokens == read(tmp_path / "plain").tokens


def heed_ctrl_c() -> None:
    """A process that a shell starts in the background ignores Ctrl-C, and so do the processes that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_keeps_the_text_and_writes_the_report(cli: list[str], tmp_path: Path, sent: int, status: int) -> None:
    """Ctrl-C, a machine that goes away, a terminal that does."""
    out = tmp_path / "run"
    arguments = with_flags(cli, "--prompt", "the cat", "--max-new-tokens", "20000", "--context", "21000")
    arguments += ["--ignore-eos"]
    process = subprocess.Popen(
        command(*arguments, "--out", str(out), "--baseline"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (out / "text.txt").is_file() or (out / "text.txt").stat().st_size < 100:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(sent)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert b"Traceback" not in errors
    assert errors.endswith(f"\n`tokenswift resume {out}` goes on from there\n".encode())
    report = json.loads((out / "report.json").read_text())
    assert report["ending"] == "interrupted"
    assert 0 < report["new_tokens"] == len(np.load(out / "tokens.npy"))
    text = (out / "text.txt").read_bytes()
    assert len(text) >= 100
    assert printed.rstrip(b"\n") == text.rstrip(b"\n")


def test_a_reader_that_goes_away_is_no_traceback(cli: list[str]) -> None:
    longer = with_flags(cli, "--max-new-tokens", "3000", "--context", "4000")
    process = subprocess.Popen(
        command(*longer, "--prompt", "the cat", "--ignore-eos"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(20)
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert b"Traceback" not in errors
    assert b"BrokenPipe" not in errors


def test_help_is_quick_and_names_every_flag() -> None:
    """It must not import torch: that takes seconds."""
    code = (
        "import sys; from tokenswift_py.cli.flags import parser; print(parser().format_help());"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    for flag in ("--chapters", "--dry-breakers", "--min-p", "--draft-policy", "--baseline", "--prompt-file"):
        assert flag in done.stdout


def test_on_a_terminal_the_text_can_be_read(cli: list[str]) -> None:
    """The bar is drawn on the last line, between saving the cursor and restoring it: without that, the text stands
    in what the terminal received as it is."""
    received = on_terminal(*with_flags(cli, "--prompt", "the cat", "--max-new-tokens", "900", "--ignore-eos"))
    swift = TokenSwift.from_pretrained(cli[1], dtype="fp32")
    text = swift.generate("the cat", max_new_tokens=900, seed=3, ignore_eos=True).text
    bars = re.findall(rb"\x1b7.*?\x1b8", received, re.DOTALL)
    assert any(b"tok/s" in bar and b"tok/pass" in bar for bar in bars)
    for bar in bars:
        received = received.replace(bar, b"")
    assert text.encode() in received.replace(b"\r\n", b"\n")


def on_terminal(*arguments: str, stdout: int | None = None) -> bytes:
    """Returns what a terminal receives from the command line."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        if stdout is not None:
            os.dup2(stdout, 1)
        os.execv(sys.executable, command(*arguments))
    received = b""
    with contextlib.suppress(OSError):  # the end of a terminal whose process is gone
        while chunk := os.read(terminal, 4096):
            received += chunk
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return received


LOOPING = ["--prompt", "the cat", "--ignore-eos", "--logit-bias", "68=1000", "--max-new-tokens", "300"]
LOOPING += ["--draft-tokens", "4"]
WARNING = b"tokenswift: the text loops: from new token 0 on it is one token over and over, 64 tokens so far\r\n"


def test_a_warning_stands_on_a_line_of_its_own_between_text_and_bar(cli: list[str], tmp_path: Path) -> None:
    received = re.sub(rb"\x1b7.*?\x1b8", b"", on_terminal(*with_flags(cli, *LOOPING)), flags=re.DOTALL)
    before, after = received.split(b"\r\n" + WARNING)
    text = TokenSwift.from_pretrained(cli[1]).tokenizer.decode([68]).encode()
    assert before.endswith(10 * text) and after.startswith(10 * text)
    with (tmp_path / "text").open("wb") as file:
        received = on_terminal(*with_flags(cli, *LOOPING), stdout=file.fileno())
    assert (tmp_path / "text").read_bytes() == 300 * text + b"\n"
    before, after = received.split(WARNING)
    assert before.endswith(b"\r" + 99 * b" " + b"\r")  # the bar's line was cleared
    assert b"tok/s" in after


def test_on_loop_stop_ends_the_text_there(cli: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(with_flags(cli, *LOOPING, "--on-loop", "stop")) == 0
    assert "64 new tokens after a prompt of" in (printed := capsys.readouterr().err)
    assert "ended by: loop" in printed and "LOOPS with period 1 from token 0 on" in printed


def test_the_lossy_mode_says_so(cli: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lossy = [*cli, "--prompt", "the cat", "--kv-budget", "256", "--kv-policy", "recent"]
    assert main(with_flags(lossy, "--max-new-tokens", "400", "--baseline", "--ignore-eos")) == 0
    printed = capsys.readouterr().err
    assert "LOSSY: the cache keeps 256 tokens at most (policy recent); 192 were evicted" in printed
    assert "kv-recent-256-64 (lossy)" in printed and "plain decoding, just as lossy, " in printed
    assert main([*lossy, "--ignore-eos"]) == 0
    assert "the text fitted, nothing was evicted" in capsys.readouterr().err


def test_an_error_in_the_middle_keeps_what_was_written(
    cli: list[str], tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that breaks at a token it writes: one line with the position, and all three files."""
    swift = TokenSwift.from_pretrained(cli[1], dtype="fp32")
    prompt = prompt_tokens(swift.tokenizer, "the cat", Chat())
    tokens = swift.generate("the cat", max_new_tokens=40, seed=3).tokens
    broken = Path(shutil.copytree(tiny_folder, tmp_path / "broken"))
    late = next(token for token in tokens[5:] if token not in (*prompt, *tokens[:5]))
    for shard in broken.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in ("model.embed_tokens.weight",):
            if name in tensors:
                tensors[name][late] = float("nan")
                save_file(tensors, shard, metadata={"format": "pt"})
    out = tmp_path / "run"
    flags = with_flags(cli, "--model", str(broken), "--drafter", "none", "--prompt", "the cat", "--out", str(out))
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert "position" in error
    assert "Traceback" not in error
    written = np.load(out / "tokens.npy").tolist()
    assert written == tokens[: len(written)]
    assert len(written) >= 5
    assert json.loads((out / "report.json").read_text())["ending"] == "interrupted"
    assert (out / "text.txt").read_text()


FILES = ["journal.bin", "report.json", "text.txt", "tokens.npy"]


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("broken", [False, True])
def test_each_file_is_kept_by_itself(
    cli: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    broken: bool,
) -> None:
    """One that cannot be written leaves the others whole, and what went wrong first is told; broken: an engine that
    fails before."""
    arguments = [*cli, "--prompt", "the cat", "--ignore-eos", "--drafter", "none", "--out"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    run, steps = tmp_path / "run", iter(range(10))
    step = {"report.json": "save_report", "text.txt": "Output.save_rest", "tokens.npy": "save_tokens"}[name]

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    def fails(*_: Any) -> None:
        if next(steps, None) is None:
            raise RuntimeError("the engine broke")

    with monkeypatch.context() as patch:
        patch.setattr(f"tokenswift_py.cli.write.{step}", full)
        if broken:
            patch.setattr("tokenswift_py.decoding.statistics.GenerationStats.record", fails)
        assert main([*arguments, str(run)]) == 1
    told = capsys.readouterr().err
    assert told == f"tokenswift: {'RuntimeError: the engine broke' if broken else f'No space left on device: {name}'}\n"
    kept = [file for file in FILES if file != name or name == "text.txt"]
    assert sorted(path.name for path in run.iterdir()) == kept
    whole, written = read(tmp_path / "whole").tokens, read(run).tokens
    assert written == whole[: len(written)] and (len(written) == len(whole)) is not broken
    if "tokens.npy" in kept:
        assert np.load(run / "tokens.npy").tolist() == written
    if "report.json" in kept:
        assert json.loads((run / "report.json").read_text())["ending"] == ("interrupted" if broken else "length")
    (run / name).unlink(missing_ok=True)
    assert main(["resume", str(run), "--quiet"]) == 0
    for file in ("text.txt", "tokens.npy"):
        assert (run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def after_first(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Call something when the first piece has been written out."""
    write, waiting = terminal.Output.write, [change]

    def written(self: terminal.Output, *arguments: Any) -> None:
        write(self, *arguments)
        while waiting:
            waiting.pop()()

    monkeypatch.setattr(terminal.Output, "write", written)


def test_a_text_that_is_removed_is_written_again(
    cli: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    after_first(monkeypatch, (tmp_path / "run" / "text.txt").unlink)
    assert main([*cli, "--prompt", "the cat", "--out", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "text.txt").read_text(encoding="utf-8")
    assert text and capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")


def test_an_output_folder_that_is_removed_is_one_line(
    cli: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    after_first(monkeypatch, lambda: shutil.rmtree(run))
    assert main([*cli, "--prompt", "the cat", "--out", str(run)]) == 1
    assert capsys.readouterr().err == f"tokenswift: No such file or directory: {run / 'text.txt'}\n"
    assert not run.exists()


def test_an_output_folder_that_can_no_longer_be_written_is_one_line(
    cli: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, write_bytes = tmp_path / "run", Path.write_bytes

    def refused(path: Path, data: bytes) -> int:  # as the system does, but for root
        if path.parent == run:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", refused)
    assert main([*cli, "--prompt", "the cat", "--out", str(run)]) == 1
    assert capsys.readouterr().err == f"tokenswift: Permission denied: {run / 'tokens.npy.new'}\n"
    assert sorted(path.name for path in run.iterdir()) == ["journal.bin", "text.txt"]


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokens(tmp_path, [1, 2, 3])

    def full(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_tokens(tmp_path, list(range(1000)))
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]
    assert np.load(tmp_path / "tokens.npy").tolist() == [1, 2, 3]


def test_a_comparison_that_is_refused_leaves_the_run_whole(
    cli: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any) -> None:
        raise UserError("memory: '1 MiB' is not allowed")

    monkeypatch.setattr(TokenSwift, "baseline", refused)
    assert main([*cli, "--prompt", "the cat", "--out", str(tmp_path / "run"), "--baseline"]) == 2
    told = capsys.readouterr().err
    assert "new tokens after a prompt of" in told and told.endswith("\ntokenswift: memory: '1 MiB' is not allowed\n")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
