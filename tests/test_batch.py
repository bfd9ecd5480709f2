"""`tokenswift batch`: each answer is the text that `generate` writes, and a crash loses none and doubles none."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from served import surroundings, text_of
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.cli.main import main
from tokenswift_py.errors import NumericsError
from tokenswift_py.serving.bulk import lines
from tokenswift_py.serving.bulk.batch import Batch
from tokenswift_py.serving.bulk.lines import Answers, Line, lines_in
from tokenswift_py.serving.bulk.requests import SHAPES, Requests
from tokenswift_py.serving.engine import Engine

CONTEXT = 512
URLS = tuple(SHAPES)
CHAT, COMPLETION, RESPONSE = URLS
SAID = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def requests(tiny_swift: TokenSwift) -> Iterator[Requests]:
    engine = Engine(tiny_swift, CONTEXT, most_running=4, most_waiting=20)
    yield Requests(engine, "tiny")
    engine.close()


def request(name: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    said = {"messages": SAID} if url == CHAT else {"input": "the cat"} if url == RESPONSE else {"prompt": "the cat"}
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "tiny", **said, **body}}


def put(path: Path, *said: Any) -> Path:
    """Writes a file of requests; bytes are lines as they are."""
    path.write_bytes(b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in said))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def answered(requests: Requests, tmp_path: Path, *said: Any) -> dict[str, Any]:
    """Runs a batch of these requests. Returns its answers by custom_id, or by line where there is none."""
    answers = Answers(tmp_path / "out.jsonl")
    assert Batch(requests, answers, 6).run(lines_in(put(tmp_path / "in.jsonl", *said), URLS))
    answers.close()
    found = read(tmp_path / "out.jsonl")
    by_name = {one["custom_id"] or one["error"]["line"]: one for one in found}
    assert len(by_name) == len(found)
    return by_name


def test_each_text_is_what_generate_writes(requests: Requests, tiny_swift: TokenSwift, tmp_path: Path) -> None:
    said = [request(f"{url} {i}", url, seed=i, temperature=1.0) for i in range(4) for url in URLS]
    for i, one in enumerate(said):
        one["body"]["max_output_tokens" if one["url"] == RESPONSE else "max_tokens"] = 10 + 7 * i
    found = answered(requests, tmp_path, *said)
    for i, one in enumerate(said):
        answer, raw = found[one["custom_id"]], one["url"] == COMPLETION
        wanted = tiny_swift.generate(
            "the cat", max_new_tokens=10 + 7 * i, seed=i // 3, temperature=1.0, context=CONTEXT, raw=raw
        )
        assert text_of(answer) == wanted.text != ""
        assert answer["error"] is None and answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["numerics"] == wanted.report["numerics"]
    assert len({answer["id"] for answer in found.values()}) == len(said)


def test_a_request_of_several_texts_is_one_line(requests: Requests, tiny_swift: TokenSwift, tmp_path: Path) -> None:
    found = answered(requests, tmp_path, request("a", COMPLETION, prompt=["the", "cat"], n=2, seed=3, max_tokens=9))
    choices = found["a"]["response"]["body"]["choices"]
    alone = [
        tiny_swift.generate(prompt, seed=3, stream=sample, max_new_tokens=9, context=CONTEXT, raw=True).text
        for prompt in ("the", "cat") for sample in (0, 1)
    ]  # fmt: skip
    assert [choice["text"] for choice in choices] == alone


def test_requests_without_a_seed_have_that_of_the_batch(
    tiny_swift: TokenSwift, requests: Requests, tmp_path: Path
) -> None:
    seeded = Requests(requests.engine, "tiny", seed=11)
    found = answered(seeded, tmp_path, request("own", seed=5, max_tokens=5), request("none", max_tokens=5))
    assert [found[name]["response"]["body"]["seed"] for name in ("own", "none")] == [5, 11]


@pytest.mark.parametrize(
    ("said", "status", "code", "tells"),
    [
        (b"{torn", None, "invalid_json", "line 1 is no JSON"),
        (b"\xff\xfe\xfd", None, "invalid_json", "line 1 is no JSON"),
        (b"[" * 100_000, None, "invalid_json", "line 1 is no JSON"),
        (b"[1]", None, "invalid_line", "line 1 is no JSON object"),
        ({"url": CHAT, "body": {}}, None, "missing_custom_id", "custom_id: None"),
        ({"custom_id": 7, "url": CHAT, "body": {}}, None, "missing_custom_id", "custom_id: 7"),
        ({**request("a"), "method": "GET"}, None, "invalid_method", "method: 'GET'"),
        ({**request("a"), "url": "/v1/embeddings"}, None, "invalid_url", "url: '/v1/embeddings'"),
        ({**request("a"), "url": ["/v1"]}, None, "invalid_url", "url: ['/v1']"),
        ({**request("a"), "body": "text"}, None, "invalid_body", "body: 'text'"),
        (request("a", temperature=-1), 400, "invalid_value", "temperature: -1"),
        (request("a", max_tokens="many"), 400, "invalid_value", "max_tokens: 'many'"),
        (request("a", no_such=1), 400, "unknown_parameter", "no_such"),
        (request("a", stream=True), 400, "invalid_value", "stream: True"),
        (request("a", model="gpt"), 404, "model_not_found", "model: 'gpt'"),
        (request("a", COMPLETION, prompt="the cat " * 400), 400, "context_length_exceeded", "prompt: "),
        (request("a", COMPLETION, prompt=[999]), 400, "invalid_value", "prompt: 999"),
    ],
)
def test_what_is_wrong_is_a_line(
    requests: Requests, tmp_path: Path, said: Any, status: int | None, code: str, tells: str
) -> None:
    found = answered(requests, tmp_path, said, request("right", max_tokens=3))
    wrong = next(answer for name, answer in found.items() if name != "right")
    assert wrong["error"]["code"] == code
    assert tells in wrong["error"]["message"] and "\n" not in wrong["error"]["message"]
    assert (wrong["response"] or {}).get("status_code") == status
    if status:
        assert wrong["response"]["body"]["error"]["message"] == wrong["error"]["message"]
    assert found["right"]["error"] is None
    before = (tmp_path / "out.jsonl").read_bytes()
    answered(requests, tmp_path, said, request("right", max_tokens=3))
    assert (tmp_path / "out.jsonl").read_bytes() == before, "it has its answer"


def test_a_line_that_is_too_long_is_one_too(
    requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MOST_LINE", 200)
    exact = json.dumps(request("fits", max_tokens=3)).encode()
    found = answered(
        requests, tmp_path, b"x" * 1000, b"", exact + b" " * (200 - len(exact)), request("b", max_tokens=3)
    )
    assert found[1]["error"]["code"] == "line_too_long"
    assert found["fits"]["error"] is found["b"]["error"] is None


def test_lines_are_read_as_there_is_room(requests: Requests, tmp_path: Path) -> None:
    """A million requests are not held at once: what was read and not yet answered fits into the room."""
    ahead, answers, room = [], Answers(tmp_path / "out.jsonl"), 3
    batch = Batch(requests, answers, room)

    def endless() -> Iterator[Line]:
        for number in range(1, 40):
            ahead.append(number - 1 - batch.answered - len(batch._ready))
            yield Line(number, f"{number}", CHAT, {"messages": SAID, "max_tokens": number % 4 + 1})

    assert batch.run(endless())
    assert batch.answered == 39 and max(ahead) <= room
    answers.close()


def test_a_rerun_answers_the_rest(requests: Requests, tmp_path: Path) -> None:
    names = ["a", "\ud800 half", "line 3", "\u2028"]
    said = [request(name, max_tokens=3 + i, seed=i) for i, name in enumerate(names)]
    whole = answered(requests, tmp_path, *said)
    out = tmp_path / "out.jsonl"
    kept = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(kept[:2]) + kept[2][: len(kept[2]) // 2])
    again = answered(requests, tmp_path, *said, b"{", request("new", max_tokens=3))
    assert out.read_bytes().startswith(b"".join(kept[:2]))
    assert set(again) == {*whole, "new", 5}
    assert all(text_of(again[name]) == text_of(whole[name]) for name in whole)


@pytest.mark.parametrize("torn", [b"", b"{", b'{"id":"batch_r'])
def test_a_file_with_no_whole_answer_begins_anew(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "out").write_bytes(torn)
    Answers(tmp_path / "out").close()
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize("held", [b"a diary", b"a diary\nof two lines\n", json.dumps(request("a")).encode() + b"\n"])
def test_another_file_is_not_touched(tmp_path: Path, held: bytes) -> None:
    (tmp_path / "out").write_bytes(held)
    with pytest.raises(UserError, match=r"output: .* nothing is overwritten"):
        Answers(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == held


def test_two_batches_do_not_write_one_file(tmp_path: Path) -> None:
    first = Answers(tmp_path / "out")
    with pytest.raises(UserError, match="another process writes it"):
        Answers(tmp_path / "out")
    first.close()
    Answers(tmp_path / "out").close()


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(tmp_path / "out")
    one = lines.answer_of(Line(1, "a"), None, None, ("code", "message"))
    answers.write([one])
    write = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        answers.write([one, one])
    assert read(tmp_path / "out") == [one]


def failing(monkeypatch: pytest.MonkeyPatch, engine: Engine, fails: Callable[[int], bool]) -> None:
    """Lets the engine fail for texts of so many tokens."""
    submit = engine.submit

    def failing_submit(prompt: Any, **settings: Any) -> Any:
        if fails(settings["max_new_tokens"]):
            raise NumericsError("logits are\nnot finite")
        return submit(prompt, **settings)

    monkeypatch.setattr(engine, "submit", failing_submit)


def test_a_failure_of_the_engine_is_a_line(requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, requests.engine, lambda tokens: tokens % 2 == 0)
    found = answered(requests, tmp_path, *(request(f"{i}", max_tokens=i) for i in range(1, 9)))
    for i in range(1, 9):
        answer = found[f"{i}"]
        assert answer["response"]["status_code"] == (200 if i % 2 else 500)
        assert i % 2 or answer["error"]["message"].endswith("NumericsError: logits are not finite")


def test_an_engine_that_fails_always_answers_nothing(
    requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a rerun tries these requests again."""
    failing(monkeypatch, requests.engine, lambda tokens: True)
    for count in (3, 1000):
        with pytest.raises(RuntimeError, match=r"in a row failed.*logits are not finite"):
            answered(requests, tmp_path, *(request(f"{i}", max_tokens=i) for i in range(1, count)))
    assert read(tmp_path / "out.jsonl") == []


# The command


def command(
    tiny_folder: Path, source: Path, out: Path, running: int = 3, context: int = CONTEXT, name: str = "tiny"
) -> list[str]:
    settings = ["--dtype", "fp32", "--threads", "1", "--context", f"{context}", "--running", f"{running}"]
    settings += ["--served-name", name]
    return ["batch", str(source), str(out), "--model", str(tiny_folder), *settings]


def test_what_cannot_be_is_told_in_one_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = put(tmp_path / "twice.jsonl", request("a"), b"", request("b"), request("a"))
    right, out = put(tmp_path / "right.jsonl", request("a", max_tokens=3)), tmp_path / "out.jsonl"
    for arguments, says in (
        (command(tiny_folder, twice, out), "custom_id: 'a' is not allowed; lines 1 and 4 both have it"),
        (command(tiny_folder, tmp_path / "none", out), "input: "),
        (command(tiny_folder, tmp_path, out), "input: "),
        (command(tiny_folder, right, right), "output: "),
        (command(tiny_folder, right, tmp_path), "output: "),
        (command(tiny_folder, right, tmp_path / "no" / "out"), "output: "),
        (command(tiny_folder, right, out, running=0), "running: "),
        ([*command(tiny_folder, right, out), "--seed", "-1"], "seed: -1"),
        (["batch", str(right)], "the following arguments are required"),
    ):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"tokenswift: {says}") and told.count("\n") == 1
        assert not out.exists()


def test_answers_of_another_model_are_not_gone_on_with(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = put(tmp_path / "in.jsonl", request("a", max_tokens=3)), tmp_path / "out.jsonl"
    assert main([*command(tiny_folder, source, out), "--seed", "4"]) == 0
    assert "1 requests answered, 0 of them with an error; 3 tokens" in capsys.readouterr().err
    before = out.read_bytes()
    put(source, request("a", max_tokens=3), request("b", max_tokens=3))
    assert main(command(tiny_folder, source, out, context=256)) == 2
    assert "tokenswift: context: 256 is not allowed; the answers in" in capsys.readouterr().err
    assert main(command(tiny_folder, source, out, name="other")) == 2
    assert "tokenswift: model: 'other'" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main(command(tiny_folder, source, out)) == 0
    assert [answer["custom_id"] for answer in read(out)] == ["a", "b"]


# A shell's background jobs begin with Ctrl-C ignored, and so do their children.
SLOWED = """
import signal, sys, time
from tokenswift_py.cli.main import main
from tokenswift_py.serving.scheduler import Scheduler

step = Scheduler.step

def slowly(scheduler):
    time.sleep(0.01)
    return step(scheduler)

Scheduler.step = slowly
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


def started(arguments: list[str], out: Path, more: int) -> subprocess.Popen[str]:
    """Starts the command, and waits until it has written so many answers more. It is slowed, so that it is not done by
    then, however fast the machine is."""
    before = len(read(out)) if out.exists() else 0
    run = [sys.executable, "-c", SLOWED, *arguments]
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env=surroundings())
    deadline = time.monotonic() + 120
    while not out.exists() or len(read(out)) < before + more:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    return process


@pytest.mark.slow
def test_ctrl_c_and_kill_lose_nothing_and_double_nothing(
    tiny_folder: Path, tiny_swift: TokenSwift, tmp_path: Path
) -> None:
    said = [
        request(f"{i}", COMPLETION, seed=i, max_tokens=120 + 11 * (i % 7), temperature=1.0, ignore_eos=True)
        for i in range(40)
    ]
    source, out = put(tmp_path / "in.jsonl", *said), tmp_path / "out.jsonl"
    process = started(command(tiny_folder, source, out), out, 1)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    first = len(read(out))
    left = 40 - first
    assert f"stopped with {left} requests left: the same command goes on from there" in told and left > 0
    process = started(command(tiny_folder, source, out), out, 1)
    process.kill()
    process.communicate()
    killed = len(read(out))
    assert first < killed < 40
    assert main(command(tiny_folder, source, out)) == 0
    answers = read(out)
    assert sorted(int(answer["custom_id"]) for answer in answers) == list(range(40)), "nothing lost, nothing twice"
    for answer in answers:
        i = int(answer["custom_id"])
        settings = {"seed": i, "max_new_tokens": 120 + 11 * (i % 7), "temperature": 1.0, "ignore_eos": True}
        assert text_of(answer) == tiny_swift.generate("the cat", raw=True, context=CONTEXT, **settings).text
