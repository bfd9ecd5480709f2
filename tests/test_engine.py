"""The engine's thread writes many texts for programs that wait for them: each is what `generate` writes alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenswift_py import TokenSwift, UserError
from tokenswift_py.runs.audit import audit
from tokenswift_py.runs.result import Piece
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
