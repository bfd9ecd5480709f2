"""Recorded tokens survive, a torn end is cut, and nothing else is ever taken for the run's tokens."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flags import with_flags
from journals import cut_short
from random_heads import random_heads
from scripted import write
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.checkpoints import cache
from tokenswift_py.cli.main import main
from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.eviction import Eviction
from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.step import ReplayError
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.drafters.base import create
from tokenswift_py.drafters.cascade import Cascade
from tokenswift_py.drafters.heads import Heads
from tokenswift_py.drafters.views import Views
from tokenswift_py.kvcache.policies.recent import POLICY as Recent
from tokenswift_py.runs import audit, journal, snapshot
from tokenswift_py.runs.journal import NAME, Journal, JournalError
from tokenswift_py.sampling.reference import Sampler

ROOT = Path(__file__).resolve().parent.parent
HEADER: dict[str, Any] = {"parameters": {"max_new_tokens": 100}, "prompt": [1, 2]}
BLOCKS: list[tuple[list[int], list[int]]] = [([5, 6, 7], []), ([9], [1, 2, 3]), ([11, 12, 13, 14, 15, 16, 17], [])]
TOKENS = [5, 6, 7, 1, 2, 3, 9, *range(11, 18)]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Returns a folder with a journal of three blocks."""
    record = Journal.create(tmp_path / "run", HEADER)
    for tokens, forced in BLOCKS:
        record.append(tokens, forced)
        record.sync()
    record.close()
    return tmp_path / "run"


def test_what_was_written_is_read(written: Path) -> None:
    record = journal.read(written)
    assert record.header == {"version": 1, **HEADER}
    assert record.tokens == TOKENS
    assert record.forced == [False] * 3 + [True] * 3 + [False] * 8
    assert (record.chosen, record.torn, record.max_new_tokens) == (11, 0, 100)


def test_a_file_cut_at_any_byte_of_the_last_block_loses_that_block_alone(written: Path) -> None:
    path = written / NAME
    data = path.read_bytes()
    end = data.rindex(journal.MARKER)
    for size in range(end, len(data)):
        path.write_bytes(data[:size])
        assert journal.read(written).tokens == TOKENS[:7]
        again = Journal.open(written)
        assert path.stat().st_size == end
        again.append(TOKENS[7:])
        again.close()
        assert path.read_bytes() == data


def test_a_file_cut_in_its_header_says_that_nothing_was_recorded(written: Path) -> None:
    path = written / NAME
    data = path.read_bytes()
    for size in range(len(journal.MAGIC) + journal.FRAME.size + 40):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="nothing was recorded"):
            journal.read(written)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_become_tokens(written: Path, data: st.DataObject) -> None:
    path = written / NAME
    whole = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4, unique=True)):
        whole[place] ^= data.draw(st.integers(1, 255))
    try:
        record = journal.parse(bytes(whole), path)
    except UserError:
        return
    assert record.header == {"version": 1, **HEADER}
    assert record.torn > 0
    assert record.tokens in ([], TOKENS[:3], TOKENS[:7])


def test_damage_before_the_last_block_is_no_torn_end(written: Path) -> None:
    path = written / NAME
    data = bytearray(path.read_bytes())
    data[data.index(journal.COUNTS.pack(3, 4)) + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged at byte \d+, after 3 tokens, and whole blocks follow") as told:
        Journal.open(written)
    size = int(str(told.value).partition("truncate -s ")[2].split("`")[0])
    path.write_bytes(data[:size])
    assert journal.read(written).tokens == TOKENS[:3]


def test_blocks_of_another_run_do_not_belong(written: Path, tmp_path: Path) -> None:
    other = Journal.create(tmp_path / "other", {**HEADER, "prompt": [1, 3]})
    other.append(TOKENS[:7])
    other.close()
    theirs = (tmp_path / "other" / NAME).read_bytes()
    mine = (written / NAME).read_bytes()
    size = len(theirs) - theirs.rindex(journal.MARKER)
    (written / NAME).write_bytes(mine[: mine.index(journal.MARKER, 40)] + theirs[-size:])
    assert journal.read(written).tokens == []


@pytest.mark.parametrize(
    ("header", "says"),
    [({"version": 2}, "journal version: 2"), ({"prompt": []}, "journal version: None")],
)
def test_a_journal_of_another_version(written: Path, header: dict[str, Any], says: str) -> None:
    frame = journal.frame_bytes(journal.HEADER, json.dumps(header).encode(), 0)
    (written / NAME).write_bytes(journal.MAGIC + frame)
    with pytest.raises(UserError, match=says):
        journal.read(written)
    (written / NAME).write_bytes(b"%PDF-1.7")
    with pytest.raises(UserError, match="does not begin as one"):
        journal.read(written)


def test_one_writer_at_a_time(written: Path) -> None:
    first = Journal.open(written)
    with pytest.raises(UserError, match="another process writes it"):
        Journal.open(written)
    assert journal.read(written).tokens == TOKENS  # reading needs no lock
    first.close()
    Journal.open(written).close()
    with pytest.raises(UserError, match="a new or empty folder"):
        Journal.create(written, HEADER)


def test_tokens_reach_the_disk_every_second_or_256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, synced = [0.0], []
    record = Journal.create(tmp_path, HEADER)
    record._clock, record._synced = (lambda: now[0]), 0.0
    fsync = os.fsync
    monkeypatch.setattr(journal.os, "fsync", lambda file: (fsync(file), synced.append(now[0])))
    for count in range(255):
        record.append([count])
    assert journal.read(tmp_path).tokens == synced == []
    record.append([255])
    assert journal.read(tmp_path).tokens == list(range(256)) and len(synced) == 1
    now[0] = 0.9
    record.append([256])
    assert len(journal.read(tmp_path).tokens) == 256
    now[0] = 1.1
    record.append([257])
    assert journal.read(tmp_path).tokens == list(range(258)) and len(synced) == 2


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_keeps_what_was_safe(written: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    data = (written / NAME).read_bytes()
    record = Journal.open(written)
    fill_disk(monkeypatch, call)
    record.append([1, 2, 3])
    with pytest.raises(JournalError, match=r"No space left on device: 14 tokens are safe in .*tokenswift resume"):
        record.sync()
    record.close()
    assert (written / NAME).read_bytes() == data


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_where_nothing_can_be_recorded_no_journal_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with monkeypatch.context() as patch:
        fill_disk(patch, call)
        with pytest.raises(JournalError, match=r"^out: No space left on device: nothing could be recorded in .*run$"):
            Journal.create(tmp_path / "run", HEADER)
    assert list((tmp_path / "run").iterdir()) == []
    Journal.create(tmp_path / "run", HEADER).close()
    assert journal.read(tmp_path / "run").tokens == []


def fill_disk(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Half of a write still fits, or all of it does and the disk is full afterwards."""
    pwrite, called = os.pwrite, []

    def refuse(file: int, *rest: Any) -> int:
        called.append(1)
        if call == "pwrite" and len(called) == 1:
            return pwrite(file, rest[0][: len(rest[0]) // 2], rest[1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal.os, call, refuse)


# Resuming


PROMPT = list(range(3, 40))


@pytest.mark.parametrize("drafter", ["none", "ngram", "partial", "cascade", "heads", "cascade with heads"])
def test_a_text_resumed_at_any_point_is_the_uninterrupted_one(tiny_decoder: Any, drafter: str) -> None:
    """A run resumes at every token, also in forced turns and at a chapter's end, with penalties over what it wrote."""
    params = SamplingParams(temperature=0.9, seed=4, min_p=0.02, penalty=1.2, dry_multiplier=0.5)
    plain, _, _ = write(tiny_decoder, PROMPT, 40, params)
    eos, turns = [plain[9]], [[5, 6, 7], [8]]
    whole, engine, steps = write(tiny_decoder, PROMPT, 40, params, eos=eos, turns=turns)
    assert engine.stats.forced_tokens >= 3
    forced = [bool(step.forced) for step in steps]
    assert sum(forced) >= 2
    begins = turn_places(whole, steps)
    for cut in (cut for cut in range(1, len(whole) + 1) if cut not in begins):
        sampler = Sampler(params, 61, eos)
        heads = Heads(random_heads("recurrent"), tiny_decoder.weights["model.embed_tokens.weight"])
        made = {"heads": heads, "cascade with heads": Cascade(heads=heads)}.get(drafter) or create(drafter)
        again = DecodeLoop(tiny_decoder, made, sampler, Stops(40, eos), turns, draft_tokens=6, prefill_chunk=16)
        replayed = list(again.replay(PROMPT, whole[:cut]))
        rest = list(again.run(PROMPT, replayed[-1]))
        tokens = [token for step in [*replayed, *rest] for token in (*step.forced, *step.tokens)]
        assert tokens[len(PROMPT) :] == whole
        assert rest[-1].ending == steps[-1].ending if rest else cut == len(whole)
        assert again.stats.forced_tokens == engine.stats.forced_tokens
        assert again.stats.new_tokens == engine.stats.new_tokens


def turn_places(whole: list[int], steps: list[Any]) -> set[int]:
    """Returns lengths at which a text would end in a forced turn. No journal does, because blocks hold whole steps."""
    places, at = set(), 0
    for number, step in enumerate(steps):
        if number and step.forced:
            places |= set(range(at + 1, at + len(step.forced) + 1))
            at += len(step.forced)
        at += len(step.tokens)
    assert at == len(whole)
    return places


def test_evictions_are_replayed(tiny_decoder: Any) -> None:
    def run(tokens: list[int] | None = None) -> tuple[list[int], Any]:
        eviction = Eviction(Recent(), 256)
        loop = DecodeLoop(tiny_decoder, create("ngram"), Sampler(SamplingParams(temperature=1.0, seed=2), 61),
                        Stops(330), eviction=eviction, draft_tokens=5)  # fmt: skip
        replayed = list(loop.replay(PROMPT, tokens or []))
        rest = loop.run(PROMPT, replayed[-1] if replayed else None)
        written = [token for step in rest for token in step.tokens]
        return (tokens or []) + written, eviction.evictions

    whole = run()
    assert whole[1] >= 2
    for cut in (1, 219, 220, 283, 284, 300):
        assert run(whole[0][:cut]) == whole


@pytest.mark.parametrize(
    ("change", "position", "says"),
    [
        (lambda text, end: [*text, 5], -1, "after the end of the text"),
        (lambda text, end: [*text[:end], 9, *text[end + 1 :]], 0, "the turn forced there has 5"),
        (lambda text, end: text[: end + 1], 1, "the turn forced there has 6"),
        (lambda text, end: text[: end + 2], 2, "a turn without a token after it"),
    ],
)
def test_a_record_that_is_no_text_of_its_parameters(
    tiny_decoder: Any, change: Callable[..., list[int]], position: int, says: str
) -> None:
    plain, _, _ = write(tiny_decoder, PROMPT, 30)
    eos = [plain[9]]
    end = plain.index(plain[9]) + 1
    whole, _, _ = write(tiny_decoder, PROMPT, 30, eos=eos, turns=[[5, 6]])
    loop = DecodeLoop(tiny_decoder, create("none"), Sampler(SamplingParams(), 61, eos), Stops(30, eos), [[5, 6]])
    with pytest.raises(ReplayError, match=says) as told:
        list(loop.replay(PROMPT, change(whole, end)))
    assert told.value.position == (len(whole) if position < 0 else end + position)


@pytest.fixture(scope="module", params=["native", "torch"])
def swift(tiny_folder: Path, request: pytest.FixtureRequest) -> TokenSwift:
    if request.param == "native":
        pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine=request.param)


SETTINGS: dict[str, Any] = {
    "max_new_tokens": 120, "seed": 2, "chapters": ["and then", "the rain"], "logit_bias": {2: 5.0}, "penalty": 1.1,
    "dry_multiplier": 0.4, "context": 600,
}  # fmt: skip


@pytest.fixture
def run(swift: TokenSwift, tmp_path: Path) -> tuple[Path, Any]:
    """A recorded run and its result."""
    with swift.stream("the cat", out=tmp_path / "run", **SETTINGS) as stream:
        for _ in stream:
            pass
    return tmp_path / "run", stream.result()


def test_a_file_system_without_locks_has_journals_too(
    swift: TokenSwift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor need it have folders that can be synced: some network folders have neither."""
    fsync = os.fsync

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def of_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr("os.fsync", of_files)
    with swift.stream("the cat", out=tmp_path / "run", **SETTINGS) as stream:
        next(iter(stream))
    assert "cannot be locked (No locks available)" in caplog.text
    with swift.resume(tmp_path / "run") as stream:
        list(stream)
    assert stream.result().tokens == swift.generate("the cat", **SETTINGS).tokens


def test_a_run_stays_in_its_folder_wherever_the_program_goes(
    swift: TokenSwift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(snapshot, "SHARD", 1)
    monkeypatch.setattr(snapshot, "ROWS", 64)
    with swift.stream("the cat", out="run", kv_snapshot=True, **SETTINGS) as stream:
        next(pieces := iter(stream))
        monkeypatch.chdir(tmp_path / "elsewhere")
        list(pieces)
    assert (tmp_path / "run" / "kv").is_dir() and not list((tmp_path / "elsewhere").iterdir())


def test_a_recorded_run_goes_on_where_it_was_cut(swift: TokenSwift, run: tuple[Path, Any]) -> None:
    folder, whole = run
    record = journal.read(folder)
    assert record.tokens == whole.tokens and record.chosen == whole.report["new_tokens"]
    assert whole.forced, "the run has a second chapter"
    for count in (0, 1, whole.forced[0][0], whole.forced[0][1] + 1, len(whole.tokens) - 1, len(whole.tokens)):
        cut_short(folder, count)
        with swift.resume(folder, drafter="partial") as stream:
            pieces = list(stream)
        again = stream.result()
        assert (again.text, again.tokens, again.forced) == (whole.text, whole.tokens, whole.forced)
        assert again.ending == whole.ending and again.report["resumed_behind"] == (count or None)
        assert again.report["new_tokens"] == whole.report["new_tokens"]
        assert sum(len(piece.tokens) + len(piece.forced) for piece in pieces) == len(whole.tokens) - count
        assert journal.read(folder).tokens == whole.tokens


@pytest.mark.parametrize("drafter", ["partial", "cascade"])
def test_a_run_goes_on_with_drafts_that_see_a_few_pages(
    swift: TokenSwift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    view, seen = Views.pages, set()

    def watched(self: Views, cache: Any) -> Any:
        found = view(self, cache)
        seen.add(found and found.pages.shape[-1])
        return found

    monkeypatch.setattr(Views, "pages", watched)
    folder = tmp_path / "run"
    settings: dict[str, Any] = {**SETTINGS, "max_new_tokens": 90, "chapters": [], "ignore_eos": True, "context": 900}
    prompt = 32 * "the cat and the dog and the bird sat on the mat, and then the rain began. "
    plain = swift.generate(prompt, drafter="none", **settings)
    assert plain.report["prompt_tokens"] > 448, "seven pages"
    with swift.stream(prompt, out=folder, drafter=drafter, draft_budget=192, draft_tokens=5, **settings) as stream:
        list(stream)
    assert stream.tokens == plain.tokens
    for count in (1, 37, 64, 75):
        cut_short(folder, count)
        seen.clear()
        with swift.resume(folder) as stream:
            list(stream)
        report = stream.result().report
        assert stream.tokens == plain.tokens and report["resumed_behind"] == count
        assert 0 < report["num_accepted_draft_tokens"] < report["num_draft_tokens"]
        assert seen == {3}


def test_an_interrupt_at_any_line_leaves_a_journal_that_can_be_read(tmp_path: Path) -> None:
    """Ctrl-C may come between any two lines while tokens are put on the disk. What is closed then is whole."""
    steps = [[number, number + 1] for number in range(0, 12, 2)]  # 0 to 11

    def interrupted(folder: Path, line: int) -> bool:
        """Whether the interrupt came: at this line, counted from the first sync on."""
        kept, count = Journal.create(folder, {}), 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal count
            if frame.f_code.co_filename == journal.__file__ and event == "line":
                count += 1
                if count == line:
                    raise KeyboardInterrupt
            return trace

        came, before = False, sys.gettrace()
        sys.settrace(trace)
        try:
            for step in steps:
                kept.append(step)
                kept.sync()
        except KeyboardInterrupt:
            came = True
        finally:
            sys.settrace(before)
        kept.close()
        tokens = journal.read(folder).tokens
        assert tokens == list(range(len(tokens))) and (came or len(tokens) == 12)
        return came

    line = 1
    while interrupted(tmp_path / str(line), line):
        line += 1
    assert line > 50


def test_extending_writes_what_a_longer_run_writes(swift: TokenSwift, tmp_path: Path) -> None:
    plain = {**SETTINGS, "chapters": [], "ignore_eos": True}
    with swift.stream("the cat", out=tmp_path / "run", **plain) as stream:
        list(stream)
    for target in (150, 200, 590):
        known = {"max_new_tokens": len(stream.tokens)} if target < 200 else {}  # as it was
        with swift.resume(tmp_path / "run", extend=target - len(stream.tokens), **known) as stream:
            list(stream)
        longer = swift.generate("the cat", **{**plain, "max_new_tokens": target, "context": max(600, target + 20)})
        assert stream.result().tokens == longer.tokens and stream.result().text == longer.text
        assert journal.read(tmp_path / "run").max_new_tokens == target
    assert audit.audit(swift, tmp_path / "run").passed
    with pytest.raises(UserError, match=r"extend: 500 is not allowed; .* recorded context of 600; there is room for 4"):
        swift.resume(tmp_path / "run", extend=500)
    cut_short(tmp_path / "run", 100)
    with pytest.raises(UserError, match=r"extend: 5 is not allowed; the run is not finished \(100 of 120 tokens\)"):
        swift.resume(tmp_path / "run", extend=5)
    Journal.open(tmp_path / "run").close()  # the refusal gave the lock back


def test_a_context_that_positions_depend_on_does_not_grow(swift: TokenSwift, tmp_path: Path) -> None:
    """Beyond the trained positions a scheme is made for one length, or for all of one factor."""
    settings = {"max_new_tokens": 20, "seed": 2, "ignore_eos": True}
    for scheme, context in (("auto", 1500), ("yarn", 1500), ("linear", 1500)):
        with swift.stream("the cat", out=tmp_path / scheme, context=context, positions=scheme, **settings) as stream:
            list(stream)
        room = context - stream.result().report["prompt_tokens"] - 20
        with pytest.raises(UserError, match=f"recorded context of 1500; there is room for {room} more at least"):
            swift.resume(tmp_path / scheme, extend=3000)
        with swift.resume(tmp_path / scheme, extend=5) as stream:
            list(stream)
        assert len(stream.tokens) == 25


def test_a_text_that_ended_by_itself_is_not_extended(swift: TokenSwift, tmp_path: Path) -> None:
    with swift.stream("a", out=tmp_path, max_new_tokens=200, logit_bias={2: 9.0}, context=500) as stream:
        list(stream)
    assert stream.result().ending == "eos"
    with pytest.raises(UserError, match=r"extend: 5 is not allowed; the text has ended \(eos\)"):
        swift.resume(tmp_path, extend=5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda header: header["model"].update({"model-00002-of-00004.safetensors": "0" * 64}), "model: model-00002"),
        (lambda header: header["model"].update(config="0"), "model: config"),
        (lambda header: header.update(tokenizer="0"), "tokenizer: '"),
        (lambda header: header.update(eos=[1]), r"eos: \[2, 0\] is not allowed; the run was written with \[1\]"),
        (lambda header: header.update(numerics="native-9"), "numerics: .* the run was written with 'native-9'"),
        (lambda header: header["parameters"].update(novelty=1), "novelty: no such parameter"),
        (lambda header: header["parameters"].update(temperature="warm"), "temperature: 'warm'"),
    ],
)
def test_what_changed_is_named(
    swift: TokenSwift, run: tuple[Path, Any], change: Callable[[dict[str, Any]], None], says: str
) -> None:
    folder, _ = run
    header = journal.read(folder).header
    change(header)
    shutil.rmtree(folder)
    Journal.create(folder, header).close()
    with pytest.raises(UserError, match=says):
        swift.resume(folder)


def test_parameters_given_again_must_be_the_recorded_ones(swift: TokenSwift, run: tuple[Path, Any]) -> None:
    folder, whole = run
    same = {"temperature": 0.7, "seed": 2, "logit_bias": {2: 5.0}, "chapters": ("and then", "the rain")}
    assert swift.resume(folder, **same).result().tokens == whole.tokens
    with pytest.raises(UserError, match=r"seed: 3 is not allowed; the run was written with 2"):
        swift.resume(folder, seed=3)
    with swift.resume(folder, draft_model="another/one", draft_weights="bf16", drafter="ngram") as free:
        assert free.result().tokens == whole.tokens  # the drafter is free to change
    with pytest.raises(UserError, match="logits_processors: "):
        swift.resume(folder, logits_processors=[print])
    with pytest.raises(UserError, match="kv_snapshot: True is not allowed; not with kv_budget"):
        swift.stream("x", out=folder.parent / "other", kv_snapshot=True, kv_budget=256)
    assert not (folder.parent / "other").exists()


def test_a_weights_file_is_hashed_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LARGE", 2)
    file, hashed = tmp_path / "weights", []
    sha256 = cache.sha256
    monkeypatch.setattr(cache, "sha256", lambda path: hashed.append(path) or sha256(path))
    file.write_bytes(b"one")
    first = cache.kept_sha256(file)
    assert cache.kept_sha256(file) == first == sha256(file) and len(hashed) == 1
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert cache.kept_sha256(file) == sha256(file) != first and len(hashed) == 2


# Snapshots of the KV cache


@pytest.fixture
def kept(swift: TokenSwift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """Returns a run of more than two shards, closed before its end, and its uninterrupted result."""
    monkeypatch.setattr(snapshot, "SHARD", 2)
    monkeypatch.setattr(snapshot, "ROWS", 128)
    settings = {"max_new_tokens": 350, "seed": 3, "ignore_eos": True, "draft_tokens": 4}
    with swift.stream("the cat", out=tmp_path, kv_snapshot=True, **settings) as stream:
        for _ in stream:
            if len(stream.tokens) > 300:
                break
    return tmp_path, swift.generate("the cat", **settings)


def test_a_snapshot_spares_the_prefill_and_is_checked(
    swift: TokenSwift, kept: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder, whole = kept
    shards = sorted((folder / "kv").iterdir())
    assert [path.name for path in shards] == ["000000.safetensors", "000001.safetensors"]
    data = [path.read_bytes() for path in shards]
    length = len(journal.read(folder).tokens)

    (folder / "run").mkdir()
    shutil.move(folder / NAME, folder / "run" / NAME)
    every = resumed(swift, folder / "run", whole)
    for damaged, spared in ((None, 2), (1, 1), (0, 0)):
        cut_short(folder / "run", length)
        (folder / "run" / "kv").mkdir(exist_ok=True)
        for number, path in enumerate(shards):
            broken = bytearray(data[number])
            if number == damaged:
                broken[-100] ^= 4
            (folder / "run" / "kv" / path.name).write_bytes(broken)
        caplog.clear()
        assert resumed(swift, folder / "run", whole) == every - 128 * spared
        assert ("damaged" in caplog.text) == (damaged is not None)
        assert len(list((folder / "run" / "kv").iterdir())) == spared


def resumed(swift: TokenSwift, folder: Path, whole: Any) -> int:
    """Returns how many rows had to be computed to go on."""
    with swift.resume(folder) as stream:
        list(stream)
    assert stream.result().tokens == whole.tokens and stream.result().text == whole.text
    return int(stream.stats.prefill_tokens)


# The command line


@pytest.fixture
def cli(tiny_folder: Path) -> list[str]:
    return ["--model", str(tiny_folder), "--dtype", "fp32", "--seed", "3", "--ignore-eos", "--quiet"]


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    cli: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*cli, "--prompt", "the cat", "--max-new-tokens", "600", "--out"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    pwrite, room = os.pwrite, [3]

    def limited(file: int, data: bytes, at: int) -> int:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "pwrite", limited)
        assert main([*arguments, str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("tokenswift: out: No space left on device: ") and told.count("\n") == 1
    safe = journal.read(tmp_path / "run")
    assert f"{len(safe.tokens)} tokens are safe" in told and len(safe.tokens) >= 256
    assert not (tmp_path / "run" / "tokens.npy").exists(), "it would have more than the journal"
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert_same_files(tmp_path / "whole", tmp_path / "run")


def test_files_of_an_earlier_session_stay_until_the_text_goes_on(
    cli: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert main([*cli, "--prompt", "the cat", "--max-new-tokens", "20", "--context", "200", "--out", str(run)]) == 0
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "journal.bin"}

    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tokenswift_py.runs.stream.Stream.catch_up", pressed)
        assert main(["resume", str(run), "--extend", "10", "--quiet"]) == 130
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name != "journal.bin"} == before
    assert main(["resume", str(run), "--quiet"]) == 0
    assert len(np.load(run / "tokens.npy")) == 30


def assert_same_files(one: Path, other: Path) -> None:
    assert (one / "text.txt").read_bytes() == (other / "text.txt").read_bytes()
    assert (one / "tokens.npy").read_bytes() == (other / "tokens.npy").read_bytes()
    assert journal.read(one).tokens == journal.read(other).tokens


def test_resume_from_the_command_line(cli: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run")]
    longer = ["--max-new-tokens", "70", "--context", "400", "--prompt", "the cat"]
    assert main([*cli, *longer, "--out", str(tmp_path / "whole")]) == 0
    shown = capsys.readouterr().out
    assert main([*cli, *with_flags(longer, "--max-new-tokens", "38"), *out]) == 0
    first = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert main(["resume", str(tmp_path / "run")]) == 0  # finished: nothing to do
    assert "the run is finished, ended by: length" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    files = {name: (tmp_path / "run" / name).read_bytes() for name in ("text.txt", "tokens.npy")}
    assert main(["resume", "--quiet", str(tmp_path / "run")]) == 0
    assert capsys.readouterr() == ("", "")
    for deleted in (["text.txt"], ["tokens.npy"], ["text.txt", "tokens.npy"]):
        for name in deleted:
            (tmp_path / "run" / name).unlink()
        assert main(["resume", str(tmp_path / "run")]) == 0
        assert f"written again: {', '.join(deleted)}\n" in capsys.readouterr().err
        assert files == {name: (tmp_path / "run" / name).read_bytes() for name in files}
    for arguments, says in (
        (["--resume", str(tmp_path / "run"), "--temperature", "0.1"], "temperature: 0.1"),
        (["--resume", str(tmp_path / "run"), "--dtype", "bf16"], "numerics: "),
        (["--resume", str(tmp_path / "run"), "--prompt", "x"], "prompt: 'x'"),
        (["--resume", str(tmp_path / "none")], "journal: "),
        (["resume"], "the following arguments are required: DIR"),
        (["resume", str(tmp_path / "run"), "--out", "x"], "out: "),
        (["--prompt", "x", "--extend", "3"], "extend: 3"),
    ):
        assert main([*arguments, "--quiet"]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"tokenswift: {says}") and told.count("\n") == 1
    assert main(["--resume", str(tmp_path / "run"), "--extend", "32", "--drafter", "none"]) == 0
    printed = capsys.readouterr()
    assert first.rstrip("\n") + printed.out == shown
    assert "resumed after 38 recorded tokens" in printed.err
    assert_same_files(tmp_path / "whole", tmp_path / "run")


FORKS = """
import json, os, signal, sys, time
import tokenswift_py.api
from tokenswift_py.cli.main import main
for line in sys.stdin:
    arguments, kill_after = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(arguments))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)  # one that has ended is not waited for yet, so the number is still its own
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def forks() -> Iterator[Callable[[list[str], float | None], int]]:
    """Runs a command line in a new process and kills it after so many seconds. Returns its exit code."""
    server = subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, stdin=-1, stdout=-1, text=True)
    assert server.stdin is not None and server.stdout is not None

    def start(arguments: list[str], kill_after: float | None) -> int:
        server.stdin.write(json.dumps([arguments, kill_after]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield start
    server.stdin.close()
    server.wait(timeout=60)


@pytest.mark.parametrize(("kills", "tokens"), [(4, 800), pytest.param(50, 3000, marks=pytest.mark.soak, id="50 kills")])
def test_killed_at_random_moments(
    cli: list[str], tmp_path: Path, forks: Callable[[list[str], float | None], int], kills: int, tokens: int
) -> None:
    """No synced token is lost, and every resumed text is the uninterrupted one."""
    rng = random.Random(kills)
    arguments = [*cli, "--prompt", "the cat", "--max-new-tokens", str(tokens), "--context", "8000", "--out"]
    began = time.monotonic()
    assert forks([*arguments, str(tmp_path / "whole")], None) == 0
    seconds = time.monotonic() - began
    left, number = kills, 0
    while left:
        number += 1
        folder, safe, code = tmp_path / f"run{number}", 0, -9
        command = [*arguments, str(folder)]
        while code:
            moment = rng.uniform(0, 0.7 * seconds) if left else None
            code = forks(command, moment)
            assert code in (-9, 0)
            left -= code == -9
            if not (folder / NAME).is_file() or not begun(folder):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            record = journal.read(folder)
            assert len(record.tokens) >= safe
            safe, command = len(record.tokens), ["resume", str(folder), "--quiet"]
        assert_same_files(tmp_path / "whole", folder)
        assert len(np.load(folder / "tokens.npy")) == tokens


def begun(folder: Path) -> bool:
    """Returns whether the process lived long enough to record its parameters."""
    try:
        journal.read(folder)
    except UserError:
        return False
    return True
