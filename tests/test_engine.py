"""The engine's thread writes many texts for programs that wait for them: each is what `generate` writes alone."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from random_heads import random_heads
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.drafters.head_files import write_heads
from tokenswift_py.runs import journal, snapshot
from tokenswift_py.runs.audit import audit
from tokenswift_py.runs.journal import JournalError
from tokenswift_py.runs.result import Piece
from tokenswift_py.runs.stream import Stream
from tokenswift_py.serving import engine as engines
from tokenswift_py.serving.engine import Busy, Engine

CONTEXT = 300
PROMPTS = ["the cat", "a dog and the cat", "the sun", "one two three"]


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine="torch")


@pytest.fixture
def engine(swift: TokenSwift) -> Iterator[Engine]:
    engine = Engine(swift, CONTEXT, most_running=3, most_waiting=5)
    yield engine
    engine.close()


def settings(seed: int, count: int = 40) -> dict[str, Any]:
    return {"max_new_tokens": count, "seed": seed, "temperature": 1.0, "ignore_eos": True}


def test_texts_in_company_are_what_generate_writes(swift: TokenSwift, engine: Engine) -> None:
    texts = [engine.submit(PROMPTS[i % 4], priority=i % 2, **settings(i)) for i in range(8)]
    for i, text in enumerate(texts):
        alone = swift.generate(PROMPTS[i % 4], context=CONTEXT, **settings(i))
        found = text.result(60)
        assert (found.tokens, found.text, found.ending) == (alone.tokens, alone.text, alone.ending)
        assert "".join(piece.text for piece in text) == alone.text, "who listens late hears all"
        assert found.report["numerics"] == alone.report["numerics"]
    figures = engine.figures()
    assert figures["finished"] == {"length": 8} and figures["generated_tokens"] == 320
    assert (figures["running"], figures["waiting"]) == (0, 0)
    assert figures["prompt_tokens"] == sum(len(text.prompt) for text in texts)


def test_chapters_and_stop_strings_in_company(swift: TokenSwift, engine: Engine) -> None:
    asked = {"chapters": ["go on", "and on"], "max_new_tokens": 60, "temperature": 1.0}
    texts = [engine.submit("the cat", **asked, seed=seed) for seed in range(3)]
    for seed, text in enumerate(texts):
        alone = swift.generate("the cat", context=CONTEXT, **asked, seed=seed)
        assert (text.result(60).tokens, text.result().forced) == (alone.tokens, alone.forced)


def test_a_listener_hears_every_piece_and_the_end(engine: Engine) -> None:
    heard: list[Piece | None] = []
    over = threading.Event()

    def listen(piece: Piece | None) -> None:
        heard.append(piece)
        if piece is None:
            over.set()

    text = engine.submit("the cat", **settings(1))
    text.listen(listen)
    assert over.wait(60) and heard[-1] is None and None not in heard[:-1]
    assert [token for piece in heard[:-1] if piece for token in piece.tokens] == text.result().tokens


def test_what_was_held_back_comes_behind_the_last_pass(swift: TokenSwift, engine: Engine) -> None:
    """Texts that end within a character have a piece without a pass: alone, nobody else wakes the engine for it."""
    late = 0
    for seed in range(8):
        text = engine.submit("the cat", **settings(seed, 5))
        late += text.result(20) is not None and not list(text)[-1].tokens
        assert "".join(piece.text for piece in text) == text.result().text
    assert late > 0


def test_what_cannot_be_is_refused_and_too_many_wait(swift: TokenSwift, engine: Engine) -> None:
    for wrong, told in (
        ({"max_new_tokens": 10_000}, "context"),
        ({"temperature": -1.0}, "temperature"),
        ({"kv_budget": 256}, "kv_budget"),
        ({"drafter": "none"}, "drafter"),
        ({"nonsense": 1}, "nonsense"),
    ):
        with pytest.raises(UserError, match=told):
            engine.submit("the cat", **{**settings(0), **wrong})
    slow = [engine.submit("the cat", **settings(i, 250)) for i in range(8)]
    with pytest.raises(Busy):
        engine.submit("the cat", **settings(9))
    for text in slow:
        text.cancel()
    assert [text.result(60).ending for text in slow].count("interrupted") >= 7
    assert engine.submit("the cat", **settings(9)).result(60).ending == "length"


def test_a_cancelled_text_keeps_what_it_has_and_its_pages_come_back(swift: TokenSwift, engine: Engine) -> None:
    text = engine.submit("the cat", **settings(4, 250))
    first = next(iter(text))
    text.cancel()
    found = text.result(60)
    alone = swift.generate("the cat", context=CONTEXT, **settings(4, 250))
    assert found.ending == "interrupted" and first.tokens[0] == found.tokens[0]
    assert found.tokens == alone.tokens[: len(found.tokens)]
    deadline = time.monotonic() + 30
    while engine.figures()["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.figures()["kv_usage"] == 0.0


def test_a_prompt_that_was_never_read_is_not_counted(swift: TokenSwift) -> None:
    engine = Engine(swift, CONTEXT, most_running=1)
    first, second = engine.submit("the cat", **settings(1, 250)), engine.submit("a dog", **settings(2))
    next(iter(first))
    second.cancel()
    assert second.result(60).tokens == [] and engine.figures()["prompt_tokens"] == len(first.prompt)
    first.cancel()
    first.result(60)
    assert engine.figures()["prompt_tokens"] == len(first.prompt)
    engine.close()


def test_what_only_a_text_alone_can_have_is_not_resumed_in_company(
    swift: TokenSwift, engine: Engine, tmp_path: Path
) -> None:
    """Nobody may share the pages of a text that evicts. Its drafter changes no text: the company has its own."""
    asked = {**settings(3, 200), "context": CONTEXT, "raw": True}
    begun = {
        "lossy": {"kv_budget": 256, "kv_memory": "performer"},
        "drafted": {"draft_model": str(swift.origin["model"])},
    }
    for name, own in begun.items():
        with swift.stream("the cat", out=tmp_path / name, **asked, **own) as stream:
            next(iter(stream))
    with pytest.raises(UserError, match="kv_budget: 256 is not allowed; not among many texts"):
        engine.resume(tmp_path / "lossy")
    assert engine.resume(tmp_path / "drafted").result(60).tokens == swift.generate("the cat", **asked).tokens


def test_a_journal_written_in_company_is_proven_and_resumed(swift: TokenSwift, engine: Engine, tmp_path: Path) -> None:
    others = [engine.submit(prompt, **settings(7, 200)) for prompt in PROMPTS[1:3]]
    text = engine.submit("the cat", out=tmp_path / "run", **settings(3, 200))
    pieces = iter(text)
    for _ in range(5):
        next(pieces)
    text.cancel()
    written = text.result(60).tokens
    assert 5 <= len(written) < 200
    again = engine.resume(tmp_path / "run").result(60)
    alone = swift.generate("the cat", context=CONTEXT, **settings(3, 200))
    assert again.tokens == alone.tokens and again.ending == "length"
    assert audit(swift, tmp_path / "run").passed
    for other in others:
        other.cancel()
    with pytest.raises(UserError):
        engine.resume(tmp_path / "nothing")


class Held:
    """Something that lets nobody through who comes for the marked text, until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.opened.wait(60)


@pytest.fixture
def slow_to_build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Streams with seed 99 take long to make."""
    held = Held()

    def stream(loaded: Any, run: Any, *rest: Any) -> Stream:
        if run.sampling.seed == 99:
            held.wait()
        return Stream(loaded, run, *rest)

    monkeypatch.setattr(engines, "Stream", stream)
    yield held
    held.opened.set()


def test_a_text_that_takes_long_to_begin_holds_nobody_up(
    swift: TokenSwift, engine: Engine, slow_to_build: Held
) -> None:
    writing = engine.submit("the cat", **settings(1, 250))
    slow: list[Any] = []
    thread = threading.Thread(target=lambda: slow.append(engine.submit("the cat", **settings(99))), daemon=True)
    thread.start()
    assert slow_to_build.reached.wait(60)
    asked = threading.Thread(target=lambda: slow.append(engine.submit("a dog", **settings(2)).result(60)), daemon=True)
    asked.start()
    asked.join(20)
    assert not asked.is_alive() and slow[0].ending == "length", "another is taken and written meanwhile"
    assert writing.result(60).ending == "length" and engine.figures()["finished"] == {"length": 2}
    slow_to_build.opened.set()
    thread.join(60)
    assert slow[1].result(60).tokens == swift.generate("the cat", context=CONTEXT, **settings(99)).tokens


def test_a_text_that_is_being_made_has_its_place_in_line(swift: TokenSwift, slow_to_build: Held) -> None:
    engine = Engine(swift, CONTEXT, most_running=1, most_waiting=0)
    engine.submit("the cat", **settings(1, 5)).result(60)  # the first of its kind, whose models others wait for
    texts: list[Any] = []
    thread = threading.Thread(target=lambda: texts.append(engine.submit("the cat", **settings(99))), daemon=True)
    thread.start()
    assert slow_to_build.reached.wait(60)
    with pytest.raises(Busy, match="1 texts"):
        engine.submit("the cat", **settings(2))
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    while not engine._closing:
        time.sleep(0.01)
    with pytest.raises(Busy, match="closing"):
        engine.submit("the cat", **settings(2))
    slow_to_build.opened.set()
    thread.join(60)
    closing.join(60)
    assert not closing.is_alive() and texts[0].result(1).ending in ("interrupted", "length")


def test_closing_waits_no_longer_than_it_says_for_a_text_that_is_being_made(
    swift: TokenSwift, slow_to_build: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "BUILD_SECONDS", 0.05)
    engine, told = Engine(swift, CONTEXT), list[BaseException]()

    def submit() -> None:
        try:
            engine.submit("the cat", **settings(99))
        except Busy as busy:
            told.append(busy)

    thread = threading.Thread(target=submit, daemon=True)
    thread.start()
    assert slow_to_build.reached.wait(60)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    slow_to_build.opened.set()
    thread.join(60)
    assert str(told[0]) == "the engine is closed"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Held]:
    """A disk that takes the beginning of a journal, and nothing more until it is opened."""
    held, fsync, begun = Held(), os.fsync, set[tuple[int, int]]()

    def slow(file: int) -> None:
        about = os.fstat(file)
        which = about.st_dev, about.st_ino
        if which in begun:
            held.wait()
        begun.add(which)
        fsync(file)

    monkeypatch.setattr(journal.os, "fsync", slow)
    monkeypatch.setattr(journal, "SYNC_TOKENS", 8)
    yield held
    held.opened.set()


def test_a_slow_disk_stops_no_text_and_an_end_is_told_when_it_is_durable(
    swift: TokenSwift, engine: Engine, tmp_path: Path, disk: Held
) -> None:
    recorded = engine.submit("the cat", out=tmp_path / "run", **settings(3, 100))
    assert disk.reached.wait(60)
    heard: list[int] = []
    recorded.listen(lambda piece: heard.extend(piece.tokens if piece else [-1]))
    other = engine.submit("a dog", out=None, **settings(4, 100)).result(30)
    assert other.ending == "length"
    deadline = time.monotonic() + 30
    while len(heard) < 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(heard) == 100 and not recorded.done, "it is written on, and not over before it is on the disk"
    disk.opened.set()
    whole = recorded.result(60).tokens
    assert journal.read(tmp_path / "run").tokens == whole == heard[:100] and heard[100:] == [-1]
    assert whole == swift.generate("the cat", context=CONTEXT, **settings(3, 100)).tokens


def test_a_text_that_makes_room_is_on_the_disk_before_it_goes_on(
    swift: TokenSwift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SYNC_TOKENS", 10**6)
    monkeypatch.setattr(journal, "SYNC_SECONDS", 1e9)
    engine = Engine(swift, CONTEXT, most_running=1)
    patient = engine.submit("the cat", out=tmp_path / "run", **settings(1, 250))
    next(iter(patient))
    urgent = engine.submit("a dog", priority=1, **settings(2, 200))
    deadline = time.monotonic() + 60
    while not (known := journal.read(tmp_path / "run").tokens) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert 0 < len(known) < 250, "not by its end, which puts everything on the disk"
    assert urgent.result(60).ending == "length" and patient.result(60).tokens[: len(known)] == known
    engine.close()


def test_tokens_of_another_time_are_not_counted(swift: TokenSwift, tmp_path: Path) -> None:
    """A counter of Prometheus's never falls; and a file of the heads that is gone keeps nobody from going on."""
    head = tmp_path / "heads.safetensors"
    write_heads(random_heads("medusa"), head)
    engine = Engine(swift, CONTEXT)
    text = engine.submit("the cat", out=tmp_path / "run", **{**settings(1, 250), "draft_heads": str(head)})
    next(iter(text))
    text.cancel()
    text.result(60)
    engine.close()
    head.unlink()
    before = journal.read(tmp_path / "run").chosen
    engine, told = Engine(swift, CONTEXT), [0]
    text = engine.resume(tmp_path / "run")
    for _ in text:
        told.append(engine.figures()["generated_tokens"])
    text.result(60)
    engine.close()
    told.append(engine.figures()["generated_tokens"])
    assert told == sorted(told) and told[-1] == 250 - before


def test_an_interrupted_text_whose_journal_fails_says_so_in_the_log(
    swift: TokenSwift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(swift, CONTEXT)
    text = engine.submit("the cat", out=tmp_path / "run", **settings(1, 250))
    next(iter(text))

    def full(self: Any, frame: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal.Journal, "_put", full)
    text.cancel()
    assert text.result(60).ending == "interrupted"
    assert "No space left" in caplog.text
    engine.close()


@pytest.mark.parametrize("tokens", [8, 10**6])
def test_a_disk_that_fails_ends_the_text_it_belongs_to(
    swift: TokenSwift, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """While it is written, or with its last tokens."""
    monkeypatch.setattr(journal, "SYNC_TOKENS", tokens)
    monkeypatch.setattr(journal, "SYNC_SECONDS", 1e9)
    put = journal.Journal._put

    def full(self: Any, frame: bytes) -> None:
        if self.record.path.parent.name == "bad" and not frame.startswith(journal.MAGIC):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, frame)

    monkeypatch.setattr(journal.Journal, "_put", full)
    text, other = (engine.submit("the cat", out=tmp_path / name, **settings(5, 60)) for name in ("bad", "good"))
    assert other.result(60).ending == "length"
    with pytest.raises(JournalError, match="No space left"):
        text.result(60)
    monkeypatch.setattr(journal.Journal, "_put", put)
    assert engine.resume(tmp_path / "bad").result(60).tokens == other.result().tokens
    assert journal.read(tmp_path / "good").tokens == other.result().tokens


def test_closing_drains_or_interrupts(swift: TokenSwift) -> None:
    engine = Engine(swift, CONTEXT, most_running=2)
    short, long = engine.submit("the cat", **settings(1, 5)), engine.submit("the cat", **settings(2, 250))
    short.result(60)
    engine.close(drain_s=0.0)
    assert long.result(1).ending in ("interrupted", "length")
    with pytest.raises(Busy):
        engine.submit("the cat", **settings(1))
    engine = Engine(swift, CONTEXT)
    text = engine.submit("the cat", **settings(2, 50))
    engine.close(drain_s=60.0)
    assert text.result(1).ending == "length"


def test_a_fault_of_the_engine_ends_the_texts_and_not_the_engine(
    swift: TokenSwift, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "_choose", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit("the cat", **settings(1)).result(60)
    assert engine.submit("the cat", **settings(1)).result(60).ending == "length"


def test_an_order_that_fails_takes_no_other_with_it(swift: TokenSwift, engine: Engine) -> None:
    with engine._changed:  # so that the thread takes both at once
        engine._order(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        done = threading.Event()
        engine._order(done.set)
    assert done.wait(30)


def test_a_listener_that_fails_ends_nothing(swift: TokenSwift, engine: Engine) -> None:
    heard: list[Piece | None] = []
    bad, good = engine.submit("the cat", **settings(1)), engine.submit("a dog", **settings(2))

    def fails(piece: Piece | None) -> None:
        if threading.current_thread() is not threading.main_thread():  # where it would hurt others
            raise ZeroDivisionError

    for text in (bad, good):
        text.listen(fails)
        text.listen(heard.append)
    assert bad.result(60).tokens == swift.generate("the cat", context=CONTEXT, **settings(1)).tokens
    assert good.result(60).ending == "length" and heard.count(None) == 2
    assert engine.submit("the cat", **settings(3)).result(60).ending == "length"


def test_a_long_prompt_gets_on_beside_texts_that_are_being_written(swift: TokenSwift) -> None:
    engine = Engine(swift, 900, most_running=3)
    engine._scheduler.most_rows = 4
    others = [engine.submit("the cat", **settings(i, 600)) for i in range(2)]
    for other in others:
        next(iter(other))
    long = engine.submit(150 * "the cat ", **settings(9, 5))
    assert long.result(60).ending == "length" and len(long.prompt) > 300
    assert not any(other.done for other in others)
    engine.close()


@pytest.mark.parametrize("warm", [False, True])
def test_a_run_with_a_snapshot_goes_on_in_company(swift: TokenSwift, tmp_path: Path, warm: bool) -> None:
    """Also where pages of its prompt are known already: a snapshot begins at the first page."""
    prompt, asked = 40 * "the cat and a dog ", {**settings(5, 80), "context": 900}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "SHARD", 1)
        patch.setattr(snapshot, "ROWS", 64)
        with swift.stream(prompt, out=tmp_path / "run", kv_snapshot=True, **asked) as stream:
            pieces = iter(stream)
            for _ in range(4):
                next(pieces)
        assert list((tmp_path / "run" / "kv").iterdir())
        engine = Engine(swift, 900)
        if warm:
            engine.submit(prompt, **settings(6, 5)).result(60)
        resumed = engine.resume(tmp_path / "run").result(60)
        later = engine.submit(prompt, **settings(7, 30)).result(60)
        engine.close()
    assert resumed.tokens == swift.generate(prompt, **asked).tokens
    assert later.tokens == swift.generate(prompt, **{**settings(7, 30), "context": 900}).tokens


def test_log_probabilities_of_a_prompt_whose_pages_are_known(swift: TokenSwift, engine: Engine) -> None:
    prompt = 12 * "the cat and "
    first, again = (engine.submit(prompt, prompt_logprobs=0, **settings(1, 3)).result(60) for _ in range(2))
    assert first.prompt_logprobs == again.prompt_logprobs and first.prompt_logprobs is not None


def test_texts_in_a_pool_that_holds_hardly_two(swift: TokenSwift) -> None:
    engine = Engine(swift, CONTEXT, most_running=4, kv_tokens=20 * 64)
    texts = [engine.submit(PROMPTS[i % 4], **settings(i, 200)) for i in range(5)]
    for i, text in enumerate(texts):
        assert text.result(120).tokens == swift.generate(PROMPTS[i % 4], context=CONTEXT, **settings(i, 200)).tokens
    assert engine.figures()["preemptions"] > 0
    engine.close()


def test_a_process_that_leaves_its_engine_open_ends_quietly(tiny_folder: Path) -> None:
    script = (
        "from tokenswift_py import TokenSwift\nfrom tokenswift_py.serving.engine import Engine\n"
        f"engine = Engine(TokenSwift.from_pretrained({str(tiny_folder)!r}), 300)\n"
        "text = engine.submit('the cat', max_new_tokens=250, ignore_eos=True)\nprint(len(next(iter(text)).tokens))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
