"""The peers of experiments/peers.py: what they are asked for, what their rows say, and that none can hang the rest."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import peer_writers
import peers
from peer_engines import ENGINES, VLLM, FastLLM, LightLLM, Request, SGLang
from peer_processes import Process, rope_as_before, weights, why_not
from peer_writers import Paused, Task, Writer
from toys import save_tiny

REQUEST = Request(
    peer="", drafts=False, folder="/weights", prompt=[5, 6, 7], new=20, slice=8, seed=3, threads=2,
    temperature=0.8, min_p=0.05, lookup=10, match=2,
)  # fmt: skip


def stepping(*steps: list[int] | Exception) -> Callable[[], list[int]]:
    left = list(steps)

    def step() -> list[int]:
        found = left.pop(0) if left else []
        if isinstance(found, Exception):
            raise found
        return found

    return step


def test_the_first_step_of_a_slice_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(peer_writers.time, "perf_counter", lambda: float(next(now)))
    writer = Writer("a", "b", 0.0, stepping([1], [2, 3], [4], [5, 6], [7]))
    writer.write(1)
    assert writer.ms_a_token is None
    writer.write(4)  # two tokens untimed, one timed, and each look at the clock is a second later
    writer.write(7)
    assert writer.tokens == [1, 2, 3, 4, 5, 6, 7] and writer.timed == 2
    assert writer.ms_a_token == 1000


def test_a_speculation_is_compared_with_its_own_plain_text() -> None:
    plain = Writer("a", "plain", 1e6, stepping([1], [2], [3], [4]))
    same = Writer("a", "same", 1e6, stepping([1, 2], [3, 4, 5]), plain)
    other = Writer("a", "other", 1e6, stepping([1], [2, 9], [4]), plain)
    for writer in (plain, same, other):
        writer.write(4)
    rows = [writer.row(1e9, 4, [1, 2, 3, 7]) for writer in (plain, same, other)]
    assert [row["same_as_own_plain"] for row in rows] == [None, True, False]
    assert [row["first_divergence"] for row in rows] == [None, None, 2]
    assert [row["like_ours_until"] for row in rows] == [3, 3, 2]
    assert rows[0]["share_of_memory_limit"] > 0 and rows[1]["share_of_memory_limit"] is None


def test_a_peer_that_fails_has_a_row_that_says_so() -> None:
    writer = Writer("a", "b", 1.0, stepping([1], ValueError("cannot\ndo this")))
    writer.write(5)
    writer.write(9)
    row = writer.row(1e9, 5, None)
    assert row["note"] == "ValueError: cannot do this" and row["ms_a_token"] is None
    assert Writer("a", "b", 1.0, note="none here").row(1e9, 5, None)["same_as_own_plain"] is None


class Generating:
    """Calls its streamer as transformers' generate does, and draws from torch's own generator."""

    def generate(self, ids: torch.Tensor, streamer: Any, fails: bool = False) -> None:
        streamer.put(ids)
        for _ in range(3):
            streamer.put(torch.randint(0, 1000, (2,)))
        if fails:
            raise RuntimeError("no more")
        streamer.end()


def test_generate_stands_still_between_steps_and_keeps_its_own_draws() -> None:
    task = Task(argparse.Namespace(seed=3, threads=1), [1, 2], {})
    alone = Paused(Generating(), task, {})
    texts = [alone.step() for _ in range(4)]
    assert [len(text) for text in texts] == [2, 2, 2, 0]
    pair = [Paused(Generating(), task, {}) for _ in range(2)]
    together = [[one.step() for one in pair] for _ in range(4)]
    assert together == [[text, text] for text in texts]
    failing = Paused(Generating(), task, {"fails": True})
    assert [failing.step() for _ in range(3)] == texts[:3]
    with pytest.raises(RuntimeError, match="no more"):
        failing.step()
    assert threading.active_count() < 20


class Recorded:
    """An object that keeps the arguments that it was called with, and gives `result`."""

    def __init__(self, result: Any = None):
        self.result, self.calls = result, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def __call__(self, *args: Any, **settings: Any) -> Any:
        self.calls.append((args, settings))
        return self.result(*args, **settings) if callable(self.result) else self.result


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def all_of(engine: Any) -> list[list[int]]:
    return list(iter(engine.step, []))


@pytest.mark.parametrize("drafts", [False, True])
def test_vllm_is_asked_for_the_same_text(drafts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine returns the whole text so far in every step, or nothing."""
    texts = [[], [[1]], [], [[1, 2, 3]], [[1, 2, 3, 4]]]
    outputs = [[SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in text] for text in texts]
    engine = SimpleNamespace(
        add_request=Recorded(), has_unfinished_requests=lambda: bool(outputs), step=lambda: outputs.pop(0)
    )
    model, sampling = Recorded(SimpleNamespace(llm_engine=engine)), Recorded("sampling")
    stand_in(monkeypatch, "vllm", LLM=model, SamplingParams=sampling)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    assert all_of(VLLM(replace(REQUEST, drafts=drafts))) == [[1], [2, 3], [4]]
    ((_, settings),) = model.calls
    ngram = {"method": "ngram", "num_speculative_tokens": 10, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    assert settings["speculative_config"] == (ngram if drafts else None)
    assert settings.items() >= {"model": "/weights", "dtype": "bfloat16", "max_model_len": 23, "seed": 3}.items()
    assert engine.add_request.calls == [(("text", {"prompt_token_ids": [5, 6, 7]}, "sampling"), {})]
    ((_, asked),) = sampling.calls
    assert asked.items() >= {"temperature": 0.8, "min_p": 0.05, "max_tokens": 20, "ignore_eos": True, "seed": 3}.items()


@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("drafts", [False, True])
def test_sglang_is_asked_slice_by_slice(drafts: bool, cumulative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of it differ in whether a chunk has all ids or the new ones."""

    def generate(input_ids: list[int], sampling_params: dict[str, Any], stream: bool) -> Iterator[dict[str, Any]]:
        wanted, done = sampling_params["max_new_tokens"], 0
        while done < wanted:
            first, done = done, min(wanted, done + 3)
            ids = range(100 + len(input_ids), 100 + len(input_ids) + done)
            yield {"output_ids": list(ids)[0 if cumulative else first :], "meta_info": {"completion_tokens": done}}

    asked = Recorded(generate)
    engine = Recorded(SimpleNamespace(generate=asked))
    stand_in(monkeypatch, "sglang", Engine=engine)
    steps = all_of(SGLang(replace(REQUEST, drafts=drafts)))
    assert [len(step) for step in steps] == [1, 3, 3, 1, 3, 3, 2, 3, 1]
    text = [token for step in steps for token in step]
    assert text == list(range(103, 123))
    ((_, settings),) = engine.calls
    assert settings.get("speculative_algorithm") == ("NGRAM" if drafts else None)
    assert settings.items() >= {"model_path": "/weights", "dtype": "bfloat16", "random_seed": 3}.items()
    lengths = [call["sampling_params"].pop("max_new_tokens") for _, call in asked.calls]
    assert lengths == [1, 7, 8, 4]
    sampling = {"temperature": 0.8, "min_p": 0.05, "top_p": 1.0, "top_k": -1, "ignore_eos": True}
    for (_, call), done in zip(asked.calls, (0, 1, 8, 16), strict=True):
        assert call == {"input_ids": [5, 6, 7, *text[:done]], "sampling_params": sampling, "stream": True}


def test_fastllm_is_asked_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[list[int]] = []

    def launch(model: int, length: int, tokens: Any, most: int, *others: Any) -> int:
        left.append([100 + length + n for n in range(most)])
        return len(left) - 1

    asked, load, threads, history = Recorded(launch), Recorded(), Recorded(), Recorded()
    library = SimpleNamespace(
        launch_response_llm_model=asked,
        fetch_response_llm_model=lambda model, handle: left[handle].pop(0) if left[handle] else -1,
    )
    load.result = SimpleNamespace(model=77, set_save_history=history, stop_token_ctypes=lambda ids: (0, None))
    llm = SimpleNamespace(fastllm_lib=library, model=load, set_cpu_threads=threads)
    stand_in(monkeypatch, "ftllm", llm=llm)
    assert all_of(FastLLM(REQUEST)) == [[103 + n] for n in range(20)]
    assert load.calls == [(("/weights",), {"dtype": "bfloat16"})]
    assert threads.calls == [((2,), {})] and history.calls == [((True,), {})]
    greedy = (0, False, 1.0, 1, 1.0, 1.0, False, 0, None)
    for (call, _), done, most in zip(asked.calls, (0, 1, 8, 16), (1, 7, 8, 4), strict=True):
        assert (call[0], call[1], list(call[2])) == (77, 3 + done, [5, 6, 7, *range(103, 103 + done)])
        assert call[3:] == (most, *greedy)


SERVER = """
import argparse, http.server, json, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readiness" else 404)
        self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(flags["--model_dir"] + "/asked.jsonl", "a") as log:
            log.write(json.dumps([self.path, asked, flags]) + "\\n")
        self.send_response(200)
        self.end_headers()
        for n in range(asked["parameters"]["max_new_tokens"]):
            token = {"id": 100 + len(asked["inputs"]) + n, "text": "?"}
            self.wfile.write(b"data:" + json.dumps({"token": token}).encode() + b"\\n\\n")
http.server.HTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()
"""


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, **modules: str) -> None:
    """Makes packages that a process finds, with a module each: name__module=source. Their version is 9.9."""
    for name, source in modules.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        package = folder / f"{name.partition('__')[0]}-9.9.dist-info"
        package.mkdir()
        (package / "METADATA").write_text(f"Name: {name.partition('__')[0]}\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    monkeypatch.syspath_prepend(folder)


def test_lightllm_is_a_server_that_is_asked_slice_by_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, lightllm__server__api_server=SERVER)
    engine = LightLLM(replace(REQUEST, folder=str(tmp_path)))
    try:
        assert all_of(engine) == [[103 + n] for n in range(20)]
    finally:
        engine._server.kill()
        engine._server.wait()
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    for (path, body, flags), done, most in zip(asked, (0, 1, 8, 16), (1, 7, 8, 4), strict=True):
        assert path == "/generate_stream" and flags["--host"] == "127.0.0.1"
        assert body["inputs"] == [5, 6, 7, *range(103, 103 + done)]
        assert body["parameters"] == {"max_new_tokens": most, "ignore_eos": True, "do_sample": False}
        assert flags.items() >= {"--data_type": "bf16", "--max_req_total_len": "23", "--tp": "1"}.items()


LIBRARY = """
import os, sys, time
class llm:
    class fastllm_lib:
        left = []
        def launch_response_llm_model(model, length, tokens, most, *others):
            llm.fastllm_lib.left = [length + n for n in range(most)]
            return 0
        def fetch_response_llm_model(model, handle):
            {step}
            return llm.fastllm_lib.left.pop(0) if llm.fastllm_lib.left else -1
    class model:
        model = 0
        def __init__(self, folder, dtype): print("loading")
        def set_save_history(self, on): pass
        def stop_token_ctypes(self, ids): return 0, None
    def set_cpu_threads(threads): pass
"""


def fastllm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str = "pass", limit: float = 60
) -> tuple[Process, Writer]:
    install(monkeypatch, folder, ftllm=LIBRARY.replace("{step}", step))
    process = Process(replace(REQUEST, peer="fastllm", folder=str(folder)), limit)
    return process, Writer("a", "b", 1.0, process.step)


def test_a_process_stands_still_between_steps_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, writer = fastllm(tmp_path, monkeypatch)
    writer.rest = process.stop
    writer.write(10)
    assert process._process is not None
    child = psutil.Process(process._process.pid)
    end = time.monotonic() + 20
    while child.status() != psutil.STATUS_STOPPED:  # a signal takes a moment
        assert time.monotonic() < end
        time.sleep(0.01)
    writer.write(20)
    assert writer.tokens == list(range(3, 23)) and writer.note is None and process.step() == []
    process.stop()
    process.close()
    process.close()
    assert not child.is_running()


@pytest.mark.parametrize(
    ("step", "note"),
    [
        ("time.sleep(1000)", "no token came within 1 seconds"),
        ("print('no kernel', file=sys.stderr); os._exit(7)", "its process ended with code 7: no kernel"),
        ("raise ValueError('too long')", "ValueError: too long"),
        ("exit(0)", "its process ended with code 0: loading"),
    ],
)
def test_a_peer_that_hangs_or_ends_has_a_row_that_says_so(
    step: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, writer = fastllm(tmp_path, monkeypatch, step, limit=1 if "sleep" in step else 60)
    began = time.monotonic()
    writer.write(20)
    assert writer.row(1e9, 20, None)["note"] == note and writer.tokens == []
    assert time.monotonic() - began < 60 and process._process is None


def test_notes_say_why_a_peer_does_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    greedy, sampled = (Task(argparse.Namespace(), [1], sampling) for sampling in peers.SAMPLINGS.values())
    assert why_not(VLLM, None, False, greedy) == "the package vllm is not installed here"
    assert why_not(VLLM, "0.11.0", False, greedy) == "it needs a GPU, and torch finds none"
    assert why_not(VLLM, "0.11.0+cpu", True, greedy) is None
    assert why_not(FastLLM, "1.9.0", False, greedy) is None
    assert why_not(FastLLM, "1.9.0", False, sampled) == "it has no min-p"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, engine in ENGINES.items():
        assert why_not(engine, "1", False, greedy) is None
        assert (why_not(engine, "1", True, greedy) is None) == (name in ("vllm", "sglang"))
        if engine.min_p[0]:
            assert why_not(engine, "1", True, sampled) == "its speculation has no min-p"


@pytest.mark.parametrize("tied", [True, False])
def test_peers_read_the_checkpoints_weights_in_bf16_without_an_end_of_text(tied: bool, tmp_path: Path) -> None:
    """A tied LM head is a tensor of its own there."""
    tiny_folder = tmp_path / "tiny"
    save_tiny(tiny_folder, tie_word_embeddings=tied)
    folder = weights(str(tiny_folder)).name
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(file.keys())
    config = json.loads((Path(folder) / "config.json").read_text())
    assert config.items() >= {"eos_token_id": -1, "torch_dtype": "bfloat16", "rope_theta": 10000.0}.items()
    assert not (Path(folder) / "generation_config.json").exists()
    given = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).state_dict()
    written = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert given.keys() == written.keys() and all(torch.equal(given[name], written[name]) for name in given)
    tokens = [AutoTokenizer.from_pretrained(path)("the cat sat").input_ids for path in (folder, tiny_folder)]
    assert tokens[0] == tokens[1] != []


def test_rope_by_the_names_before_transformers_5() -> None:
    assert rope_as_before({"rope_theta": 5e5, "rope_type": "default"}) == {"rope_theta": 5e5, "rope_scaling": None}
    yarn = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}
    assert rope_as_before(yarn) == {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert rope_as_before({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}) == {}


def test_rows_of_all_peers(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastLLM's stand-in writes, the others are not there."""
    install(monkeypatch, tmp_path, ftllm=LIBRARY.replace("{step}", "pass"))
    for package in ("vllm", "sglang", "lightllm"):
        monkeypatch.setitem(sys.modules, package, None)
    flags = ["--model", str(tiny_folder), "--peers", "vllm,sglang,lightllm,fastllm", "--ours", "bf16", "--threads", "1"]
    flags += ["--lengths", "40", "--new", "12", "--slice", "4", "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["peers.py", *flags])
    peers.main()
    record = json.loads((tmp_path / "results" / "peers.json").read_text())
    rows = record["rows"]
    assert record["versions"]["ftllm"] == "9.9" and len(rows) == 2 * (2 + 4 * 2)
    for row in rows:
        if row["engine"] in ("vLLM", "SGLang", "LightLLM"):
            assert row["note"] == f"the package {row['engine'].lower()} is not installed here"
    plain, drafted, *_ = (row for row in rows if row["engine"] == "FastLLM 9.9")
    assert plain["note"] is None and plain["tokens_per_s"] > 0 and plain["like_ours_until"] is not None
    assert "MTP" in drafted["note"] and drafted["tokens_per_s"] is None
    assert [row["note"] for row in rows if row["engine"] == "FastLLM 9.9"][2] == "it has no min-p"
