"""Files that were cut, corrupted or made to mislead: one clear line, never a crash, a hang or a huge allocation."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import gguf_writer
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.checkpoints import gguf_folder
from tokenswift_py.checkpoints.gguf_file import open_gguf
from tokenswift_py.cli.main import main
from tokenswift_py.runs import audit, journal, snapshot

# A round damages 600 files: 120 GGUF, 80 safetensors, 240 beside them and 160 that a run left. The usual tests make one
# round, make soak sixteen others: 10 200 files together.
ROUNDS = [0, *(pytest.param(number, marks=pytest.mark.soak) for number in range(1, 17))]
LENGTHS = [2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**61 + 1, 2**63, 2**64 - 1]
SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 10**9, 10**18, 10**30, 0.0, -0.5, 1e308, float("nan"), float("inf"), "", "x",
    "é" * 500, "\ud800", [], [1], {}, {"a": 1}, [[]] * 3, "float16", "gelu", "{{", "{% for %}", "<|im_end|>",
]  # fmt: skip


@contextmanager
def bounded(seconds: int = 20, memory: int = 2**31) -> Iterator[None]:
    """A limit on time, and on the memory that is mapped beyond what is now."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    usual, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + memory, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)


def loaded(model: Path, **settings: Any) -> str:
    """Load a model and write two tokens; the one line that it was refused with, or nothing."""
    try:
        with bounded():
            TokenSwift.from_pretrained(str(model), **settings).generate("the cat", max_new_tokens=2, seed=1)
    except UserError as error:
        line = str(error)
    except RuntimeError as error:  # it ran, on weights that make no sense: the rule for values
        line = str(error)
        assert "finite" in line or "no token is left" in line, line
    else:
        return ""
    assert "\n" not in line and 10 < len(line) < 1000, line
    assert "MemoryError" not in line and "TimeoutError" not in line, line
    return line


def damaged(rng: random.Random, content: bytes, stop: int) -> bytes:
    """The content cut, or with bytes before `stop` changed, put in, left out or read as a length that is a lie."""
    data, at = bytearray(content), rng.randrange(stop)
    kind = rng.choice(["cut", "flip", "flip", "length", "length", "insert", "delete"])
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "flip":
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(stop)] ^= 1 << rng.randrange(8)
    elif kind == "length":
        data[at : at + 8] = rng.choice(LENGTHS).to_bytes(8, "little")
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randint(1, 64))
    else:
        del data[at : at + rng.randint(1, 64)]
    return bytes(data)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    config = gguf_writer.gguf_config("llama")
    return Path(
        gguf_writer.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", config, {"v_proj": "Q6_K"}, "Q4_1")
    )


def header_of(path: Path) -> int:
    from gguf import GGUFReader

    return min(int(tensor.data_offset) for tensor in GGUFReader(path).tensors)


@pytest.mark.parametrize("number", ROUNDS)
@pytest.mark.parametrize("dtype", ["gguf", "bf16"])
def test_a_damaged_gguf(tiny_gguf: Path, own_cache: Path, tmp_path: Path, dtype: str, number: int) -> None:
    rng, content, header = random.Random(f"{dtype} {number}"), tiny_gguf.read_bytes(), header_of(tiny_gguf)
    refused = 0
    for case in range(60):
        path = tmp_path / f"{case}.gguf"
        path.write_bytes(damaged(rng, content, header))
        refused += bool(loaded(path, dtype=dtype))
        path.unlink()
    assert refused > 20
    made = [path for path in own_cache.iterdir() if path.name != "configs"]
    assert all((path / gguf_folder.SUMS).is_file() for path in made)  # nothing is half made


def test_every_length_in_a_gguf_header_is_held_against_the_file(tiny_gguf: Path, tmp_path: Path) -> None:
    """A lie in any eight bytes of it is told at once, or is none of a length."""
    content, header = tiny_gguf.read_bytes(), header_of(tiny_gguf)
    open_gguf(tiny_gguf)
    path = tmp_path / "lie.gguf"
    rng, told = random.Random(1), 0
    for at in [8, 16, *rng.sample(range(24, header - 8), 300)]:
        data = bytearray(content)
        data[at : at + 8] = (2**60 + at).to_bytes(8, "little")
        path.write_bytes(data)
        try:
            with bounded(5, 2**28):
                open_gguf(path)
        except UserError:
            told += 1
    assert told > 30
    for size in [0, 3, 4, 23, *rng.sample(range(24, len(content)), 50)]:
        path.write_bytes(content[:size])
        with pytest.raises(UserError):
            open_gguf(path)


def test_a_damaged_description_of_a_gguf_is_made_again(
    tiny_gguf: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever byte of whichever file it was; one from before there were checksums is taken as it is."""

    def described() -> Path:
        return gguf_folder.describe_gguf(open_gguf(tiny_gguf))

    folder = described()
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(whole) >= 4 and described() == folder and "made again" not in caplog.text
    rng = random.Random(3)
    for name in whole:
        data = bytearray(whole[name])
        data[rng.randrange(len(data))] ^= 16
        (folder / name).write_bytes(data)
        caplog.clear()
        assert described() == folder
        assert "is damaged: made again" in caplog.text
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    (folder / "config.json").unlink()
    assert described() == folder and (folder / "config.json").is_file()
    assert [path.name for path in own_cache.iterdir()] == [folder.name]
    (folder / gguf_folder.SUMS).unlink()
    caplog.clear()
    assert described() == folder and not caplog.text


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.mark.parametrize("number", ROUNDS)
def test_a_damaged_safetensors_file(copy: Path, number: int) -> None:
    rng, refused = random.Random(number), 0
    for _ in range(80):
        shard = rng.choice(sorted(copy.glob("*.safetensors")))
        content = shard.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        shard.write_bytes(damaged(rng, content, rng.choice([8, header, header])))
        refused += bool(loaded(copy, dtype="fp32"))
        shard.write_bytes(content)
    assert refused > 50
    assert loaded(copy, dtype="fp32") == ""


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "model.safetensors.index.json")  # fmt: skip


@pytest.mark.parametrize("number", ROUNDS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_side_file(copy: Path, name: str, number: int) -> None:
    """Bytes, and of JSON a value put in the place of another."""
    rng, path = random.Random(f"{name} {number}"), copy / name
    content = path.read_bytes()
    for case in range(40):
        if case % 2 or not name.endswith(".json"):
            path.write_bytes(damaged(rng, content, len(content)))
        else:
            path.write_text(json.dumps(exchanged(rng, json.loads(content))))
        loaded(copy, dtype="fp32")
    path.write_bytes(content)
    assert loaded(copy, dtype="fp32") == ""


def exchanged(rng: random.Random, tree: Any) -> Any:
    """A JSON value with one of the values in it exchanged."""
    if isinstance(tree, (dict, list)) and tree and rng.random() < 0.9:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        tree[key] = exchanged(rng, tree[key])
        return tree
    return rng.choice(SCALARS)


def test_a_config_that_asks_for_terabytes(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    for name in (
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "intermediate_size",
        "num_attention_heads",
        "head_dim",
    ):
        for value in (10**7, 10**12, 10**30):
            (copy / "config.json").write_text(json.dumps({**config, name: value}))
            assert loaded(copy, dtype="fp32"), (name, value)


# What a run leaves


@pytest.fixture(scope="module")
def recorded(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenSwift, Path, Any]:
    """A finished run of many blocks with a KV snapshot of several shards, and its result."""
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    swift, folder = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32"), tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        small_parts(patch)
        arguments = ["--model", str(tiny_folder), "--dtype", "fp32", "--prompt", "the cat", "--max-new-tokens", "250"]
        arguments += ["--seed", "3", "--logit-bias", "2=4", "--chapters", "9", "--context", "900", "--quiet"]
        assert main([*arguments, "--kv-snapshot", "--out", str(folder)]) == 0
    found = swift.resume(folder).result()
    assert len(found.forced) >= 2 and len(list((folder / "kv").iterdir())) >= 3
    return swift, folder, found


def small_parts(patch: pytest.MonkeyPatch) -> None:
    for module, name, value in ((journal, "SYNC_TOKENS", 8), (snapshot, "SHARD", 1), (snapshot, "ROWS", 64)):
        patch.setattr(module, name, value)


def attempted(what: Callable[[], Any]) -> tuple[Any, str]:
    """Returns the result, and the line that it was refused with."""
    try:
        with bounded():
            return what(), ""
    except UserError as error:
        return None, str(error)


def written_on(swift: TokenSwift, run: Path) -> Any:
    with swift.resume(run) as stream:
        list(stream)
    return stream.result()


@pytest.mark.parametrize("number", ROUNDS)
@pytest.mark.parametrize("name", ["journal.bin", "tokens.npy", "text.txt", "kv", "report.json"])
def test_what_is_damaged_is_never_proven_nor_goes_on_as_another_text(
    recorded: tuple[TokenSwift, Path, Any], tmp_path: Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    swift, folder, whole = recorded
    small_parts(monkeypatch)
    rng, outcomes = random.Random(f"{name} {number}"), []
    for case in range(60 if name == "journal.bin" else 25):
        run = Path(shutil.copytree(folder, tmp_path / str(case)))
        path = run / name if name != "kv" else rng.choice(sorted((run / "kv").iterdir()))
        content = path.read_bytes()
        path.write_bytes(damaged(rng, content, len(content) if rng.random() < 0.7 else min(300, len(content))))
        changed = path.read_bytes() != content
        found, refusal = attempted(lambda run=run: audit.audit(swift, run))
        outcomes.append((refusal and "refused") or ("proven" if found.passed else "failed"))
        assert found is None or found.passed or changed
        if outcomes[-1] == "proven":
            assert not (changed and name == "text.txt")
            read = np.load(run / name).tolist() if name == "tokens.npy" else journal.read(run).tokens
            assert read == whole.tokens
        assert not refusal or (name == "journal.bin" and re.search(r"byte \d+|header|begin", refusal)), refusal
        again, refused = attempted(lambda run=run: written_on(swift, run))
        assert bool(refused) == bool(refusal), (refused, refusal)
        assert refused or (again.tokens, again.text) == (whole.tokens, whole.text)
        shutil.rmtree(run)
    expected = {"journal.bin": {"failed", "refused"}, "tokens.npy": {"failed"}, "text.txt": {"failed"}}
    assert set(outcomes) >= expected.get(name, {"proven"}), outcomes
    assert name in expected or set(outcomes) == {"proven"}  # no claim rests on these


# A .npy file that claims 10^13 tokens and has none.
HUGE = (
    b"\x93NUMPY\1\0\x76\0"
    + b"{'descr': '<i4', 'fortran_order': False, 'shape': (10000000000000,), }".ljust(117)
    + b"\n"
)


def test_a_forged_tokens_file_is_a_fault(recorded: tuple[TokenSwift, Path, Any], tmp_path: Path) -> None:
    """Whatever its header claims, and of an interrupted run too."""
    swift, folder, whole = recorded
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    tokens = np.array(whole.tokens, np.int32)
    for forged in (
        tokens[:, None],
        tokens.astype(np.float32),
        np.int32(7),
        tokens[:0],
        np.append(tokens, 7),
        tokens[:-1],
    ):
        np.save(run / "tokens.npy", forged)
        assert audit.audit(swift, run).faults
    (run / "tokens.npy").write_bytes(HUGE)
    with bounded():
        assert "tokens.npy cannot be read" in audit.audit(swift, run).faults[0]
    np.save(run / "tokens.npy", tokens)
    assert audit.audit(swift, run).passed
    data = (run / journal.NAME).read_bytes()
    (run / journal.NAME).write_bytes(data[: data.rindex(journal.MARKER)])  # interrupted: the files have more
    found = audit.audit(swift, run)
    assert [fault.split()[0] for fault in found.faults] == ["tokens.npy", "text.txt"]
    assert found.ending == "interrupted" and found.mismatch is None
    (run / "tokens.npy").unlink()
    assert [fault.split()[0] for fault in audit.audit(swift, run).faults] == ["text.txt"]
    (run / "text.txt").unlink()
    assert audit.audit(swift, run).passed
    (run / journal.NAME).write_bytes(data)
    assert audit.audit(swift, run).passed
    (run / "text.txt").mkdir()
    assert "text.txt cannot be read" in audit.audit(swift, run).faults[0]


def test_an_unreadable_file_is_one_line(copy: Path) -> None:
    for name in (*FILES[:3], sorted(copy.glob("*.safetensors"))[0].name):
        content = (copy / name).read_bytes()
        (copy / name).unlink()
        os.mkdir(copy / name)
        line = loaded(copy, dtype="fp32")
        assert line or name == "generation_config.json"  # without one there are no defaults
        os.rmdir(copy / name)
        (copy / name).write_bytes(content)
