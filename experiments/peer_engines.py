"""vLLM, SGLang, LightLLM and FastLLM, each in a process of its own that writes a text step by step.

    python experiments/peer_engines.py FD

is what `peer_processes` starts. It reads a `Request` from its standard input, in one line of JSON, then a line for each
step, and answers to the file descriptor FD with a line of JSON each. At the end of its input it ends. This file imports
little, since a peer brings its own torch, threads and processes, some of which import it again.

vLLM computes when it is asked to. The others write ahead by themselves, so there each slice of the text is a request of
its own (`Ahead`). The sources of the calls are named where they are made.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

GPU_SHARE = 0.15  # of a GPU's memory for one engine: six of them may lie there at once


@dataclass(frozen=True)
class Request:
    """The text that a peer is to write.

    drafts:        whether with its own n-gram speculation.
    folder:        config.json, bf16 weights as *.safetensors, and a tokenizer. The config names no end of text.
    slice:         tokens that a peer writes before another one does.
    lookup, match: tokens that a speculation by n-grams proposes, and the longest n-gram that it looks for.
    """

    peer: str
    drafts: bool
    folder: str
    prompt: list[int]
    new: int
    slice: int
    seed: int
    threads: int
    temperature: float
    min_p: float
    lookup: int
    match: int

    @property
    def room(self) -> int:
        return len(self.prompt) + self.new

    def wanted(self, done: int) -> int:
        """Returns how many tokens the slice at hand lacks, after `done` of them. The first token is one by itself."""
        return min(self.new, (done // self.slice + 1) * self.slice if done else 1) - done


class Engine(Protocol):
    """A peer. It loads when it is made.

    title, package:   its name, and the package whose presence says that it is installed.
    min_p:            whether it has min-p: in plain decoding, and in its speculation.
    no_drafts:        the reason why it has no speculation for any model, else empty.
    """

    title: str
    package: str
    min_p: tuple[bool, bool]
    no_drafts: str

    def __init__(self, request: Request): ...

    @staticmethod
    def needs_gpu(version: str) -> bool:
        """Tells whether this version of the package runs on a GPU only."""

    def step(self) -> list[int]:
        """Goes on. Returns the new tokens, none at the end."""


class VLLM:
    """vLLM's offline engine (vllm/entrypoints/llm.py, vllm/v1/engine/llm_engine.py), in this process.

    With an engine core in another process it would write ahead. min-p with speculation is refused by vLLM itself
    (vllm/sampling_params.py).
    """

    title, package, min_p, no_drafts = "vLLM", "vllm", (True, False), ""

    def __init__(self, request: Request):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import vllm

        drafting: dict[str, Any] = {
            "method": "ngram", "num_speculative_tokens": request.lookup,
            "prompt_lookup_max": request.match, "prompt_lookup_min": 1,
        }  # fmt: skip
        self._engine: Any = vllm.LLM(
            model=request.folder, dtype="bfloat16", max_model_len=request.room, seed=request.seed,
            gpu_memory_utilization=GPU_SHARE, max_num_seqs=1, skip_tokenizer_init=True, generation_config="vllm",
            speculative_config=drafting if request.drafts else None,
        ).llm_engine  # fmt: skip
        sampling = vllm.SamplingParams(
            temperature=request.temperature, min_p=request.min_p, top_p=1.0, top_k=-1, seed=request.seed,
            max_tokens=request.new, ignore_eos=True, detokenize=False,
        )  # fmt: skip
        self._engine.add_request("text", {"prompt_token_ids": request.prompt}, sampling)
        self._seen = 0

    @staticmethod
    def needs_gpu(version: str) -> bool:
        return "cpu" not in version  # by which vLLM itself knows its build for CPUs (vllm/platforms/__init__.py)

    def step(self) -> list[int]:
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                tokens = list(output.outputs[0].token_ids)  # of the whole text
                new, self._seen = tokens[self._seen :], len(tokens)
                if new:
                    return new
        return []


class Ahead:
    """A peer that writes on while nobody asks. Each slice is a request, which ends where the other writers' turn comes.

    A request has the text so far as its prompt, of which the peer still has the keys and values. What is not cached is
    read again in the first step of a slice, which is never timed.
    """

    def __init__(self, request: Request):
        self.request = request
        self._tokens: list[int] = []
        self._steps: Iterator[list[int]] = iter(())

    def ask(self, tokens: list[int], count: int) -> Iterator[list[int]]:
        """Asks for `count` tokens after `tokens`. Yields them as they come."""
        raise NotImplementedError

    def step(self) -> list[int]:
        new = next(self._steps, [])
        count = self.request.wanted(len(self._tokens))
        if not new and count:
            self._steps = self.ask(self.request.prompt + self._tokens, count)
            new = next(self._steps, [])
        self._tokens += new
        return new


class SGLang(Ahead):
    """SGLang's offline engine (python/sglang/srt/entrypoints/engine.py) for token ids.

    The rule that accepts its n-grams knows no min-p (python/sglang/srt/speculative/ngram_info.py), so sampled texts
    would be of another distribution. How many tokens it proposes is its own default.
    """

    title, package, min_p, no_drafts = "SGLang", "sglang", (True, False), ""

    def __init__(self, request: Request):
        super().__init__(request)
        import sglang

        self._engine: Any = sglang.Engine(
            model_path=request.folder, dtype="bfloat16", random_seed=request.seed,
            mem_fraction_static=GPU_SHARE, max_running_requests=1, skip_tokenizer_init=True,
            **({"speculative_algorithm": "NGRAM"} if request.drafts else {}),
        )  # fmt: skip

    @staticmethod
    def needs_gpu(version: str) -> bool:
        return True

    def ask(self, tokens: list[int], count: int) -> Iterator[list[int]]:
        sampling = {
            "temperature": self.request.temperature, "min_p": self.request.min_p, "top_p": 1.0, "top_k": -1,
            "max_new_tokens": count, "ignore_eos": True,
        }  # fmt: skip
        seen = 0
        for chunk in self._engine.generate(input_ids=tokens, sampling_params=sampling, stream=True):
            done = chunk["meta_info"]["completion_tokens"]
            if done > seen:  # the ids are all so far in some versions, and only the new ones in others
                yield list(chunk["output_ids"])[seen - done :]
            seen = done


class LightLLM(Ahead):
    """LightLLM's server on the loopback address, and its HTTP API (lightllm/server/api_cli.py, api_lightllm.py)."""

    title, package, min_p = "LightLLM", "lightllm", (False, False)
    no_drafts = "its speculation needs a model with layers of its own for it (MTP)"

    def __init__(self, request: Request):
        super().__init__(request)
        port, other = free_ports()
        self._address = f"http://127.0.0.1:{port}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy
        flags = {
            "model_dir": request.folder, "host": "127.0.0.1", "port": port, "nccl_port": other, "tp": 1,
            "data_type": "bf16", "max_req_total_len": request.room, "chunked_prefill_size": request.room,
            "batch_max_tokens": request.room, "max_total_token_num": 2 * request.room,
            "running_max_req_size": 8, "graph_max_batch_size": 8,
        }  # fmt: skip
        command = [sys.executable, "-m", "lightllm.server.api_server"]
        command += [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # it ends with this process's group
        while not self._answers():
            if self._server.poll() is not None:
                raise RuntimeError(f"its server ended with code {self._server.returncode}")
            time.sleep(0.5)

    @staticmethod
    def needs_gpu(version: str) -> bool:
        return True

    def _answers(self) -> bool:
        """Tells whether the server is there. It listens once its model is loaded."""
        try:
            with self._opener.open(f"{self._address}/readiness", timeout=5):
                return True
        except OSError:
            return False

    def ask(self, tokens: list[int], count: int) -> Iterator[list[int]]:
        sampling: dict[str, Any] = {"max_new_tokens": count, "ignore_eos": True, "do_sample": False}
        data = json.dumps({"inputs": tokens, "parameters": sampling}).encode()
        asked = urllib.request.Request(
            f"{self._address}/generate_stream", data, {"Content-Type": "application/json"}, method="POST"
        )
        with self._opener.open(asked) as lines:
            for line in lines:
                if line.startswith(b"data:"):
                    yield [int(json.loads(line[5:])["token"]["id"])]


class FastLLM(Ahead):
    """FastLLM's Python module (tools/fastllm_pytools/llm.py), whose own generators yield text, not tokens."""

    title, package, min_p = "FastLLM", "ftllm", (False, False)
    no_drafts = "its speculation needs a model with layers of its own for it (MTP) or a trained draft"

    def __init__(self, request: Request):
        super().__init__(request)
        from ftllm import llm

        llm.set_cpu_threads(request.threads)
        self._library: Any = llm.fastllm_lib
        self._model: Any = llm.model(request.folder, dtype="bfloat16")
        self._model.set_save_history(True)  # the keys and values of a request serve the next one

    @staticmethod
    def needs_gpu(version: str) -> bool:
        return False

    def ask(self, tokens: list[int], count: int) -> Iterator[list[int]]:
        model, stops = self._model.model, self._model.stop_token_ctypes(None)
        handle = self._library.launch_response_llm_model(
            model, len(tokens), (ctypes.c_int * len(tokens))(*tokens),
            count, 0,  # at most, at least
            False, 1.0, 1, 1.0, 1.0,  # sampling or not, top-p, top-k, temperature, repetition penalty
            False, *stops,
        )  # fmt: skip
        while (token := self._library.fetch_response_llm_model(model, handle)) >= 0:
            yield [int(token)]


ENGINES: dict[str, type[Engine]] = {"vllm": VLLM, "sglang": SGLang, "lightllm": LightLLM, "fastllm": FastLLM}


def free_ports() -> tuple[int, int]:
    """Returns two ports of the loopback address that nobody listens at."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent, even while stopped
    descriptor, steps = int(sys.argv[1]), os.dup(0)
    os.set_inheritable(descriptor, False)  # a peer's own processes must not keep it open
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # FastLLM waits for a key before it ends by an error
    with os.fdopen(descriptor, "w", encoding="utf-8") as answers, os.fdopen(steps, encoding="utf-8") as lines:
        try:
            request = Request(**json.loads(lines.readline()))
            engine: Engine | None = None
            for _ in lines:
                engine = engine or ENGINES[request.peer](request)
                print(json.dumps({"tokens": engine.step()}), file=answers, flush=True)
        except Exception as error:  # its row says so
            if isinstance(error, urllib.error.HTTPError):
                error = RuntimeError(f"{error}: {error.read().decode(errors='replace')}")
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose files are no modules of a peer
    main()
