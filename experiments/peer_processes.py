"""The writers of peers that run in processes of their own (experiments/peer_engines.py).

A peer that hangs, crashes or ends its process costs a row and no more: each step has a time limit.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

import peer_engines
import toys
from peer_engines import ENGINES, Engine, Request
from peer_writers import LOOKUP, MATCH, PeerError, Task, Writer, bf16_bytes
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.extending.merging import write_model

GRACE = 10  # seconds that a peer has to end by itself
NO_END = -1  # the id of the end of a text in the config that peers read: none, since no text ends here


@contextmanager
def apart(name: str, task: Task, checkpoint: Checkpoint) -> Iterator[list[Writer]]:
    """Makes the writers of a peer: plain decoding and its own speculation. Where it cannot write a note says why."""
    peer, version = ENGINES[name], installed(ENGINES[name])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    title = " ".join(filter(None, (peer.title, version, gpu and f"on {gpu}")))
    reads = None if gpu else bf16_bytes(checkpoint, task)
    writers: list[Writer] = []
    with ExitStack() as stack:
        for how, drafts in (("plain", False), ("n-grams", True)):
            note = why_not(peer, version, drafts, task)
            writer = Writer(title, how, reads, plain=writers[0] if writers else None, note=note)
            if note is None:
                request = Request(
                    peer=name, drafts=drafts, folder=weights(task.args.model).name, prompt=task.prompt,
                    new=task.args.new, slice=task.args.slice, seed=task.args.seed, threads=task.args.threads,
                    lookup=LOOKUP, match=MATCH, **task.sampling,
                )  # fmt: skip
                process = Process(request, task.args.patience)
                stack.callback(process.close)
                writer.step = process.step
                writer.rest = None if gpu else process.stop  # the cores are the next writer's
            writers.append(writer)
        yield writers


def installed(peer: type[Engine]) -> str | None:
    """Returns the version of a peer's package, None where it is not installed."""
    try:
        return metadata.version(peer.package) if importlib.util.find_spec(peer.package) else None
    except metadata.PackageNotFoundError:  # another module of that name
        return None


def why_not(peer: type[Engine], version: str | None, drafts: bool, task: Task) -> str | None:
    """Returns the reason why a peer cannot write the text, None where it can."""
    if version is None:
        return f"the package {peer.package} is not installed here"
    if peer.needs_gpu(version) and not torch.cuda.is_available():
        return "it needs a GPU, and torch finds none"
    if drafts and peer.no_drafts:
        return peer.no_drafts
    if task.sampling["min_p"] and not peer.min_p[drafts]:
        return "its speculation has no min-p" if peer.min_p[0] else "it has no min-p"
    return None


@functools.cache
def weights(model: str) -> tempfile.TemporaryDirectory[str]:
    """Writes a model for all peers: bf16 weights as safetensors, its tokenizer, and a config that all of them read.

    FastLLM cannot be told to go on behind the end of a text, so no token is one. Nor does it know that an LM head may
    be the embedding, so that is written a second time. The folder lasts as long as the process.
    """
    checkpoint, folder = open_checkpoint(model, None, "bf16"), tempfile.TemporaryDirectory()
    written = toys.hugging_face(checkpoint, torch.bfloat16)
    if checkpoint.spec.tied:
        written.config.tie_word_embeddings = False
        written.lm_head.weight = torch.nn.Parameter(written.lm_head.weight.detach().clone())
    write_model(written, checkpoint, Path(folder.name), "bf16")
    config = Path(folder.name) / "config.json"
    told = json.loads(config.read_text(encoding="utf-8"))
    told |= {"eos_token_id": NO_END, "torch_dtype": "bfloat16", **rope_as_before(told.get("rope_parameters") or {})}
    config.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    (Path(folder.name) / "generation_config.json").unlink(missing_ok=True)  # it names ends of text, too
    return folder


def rope_as_before(rope: dict[str, Any]) -> dict[str, Any]:
    """Returns RoPE's parameters by the names that they had before transformers 5, which some peers know alone.

    rope: `rope_parameters`. Nothing is returned where each kind of layer has its own.
    """
    if "rope_theta" not in rope:
        return {}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    plain = rope.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}


class Process:
    """A peer in a process of its own, which stands still between two steps. It starts with the first one.

    limit: seconds that a step may take, loading and reading the prompt included.
    """

    def __init__(self, request: Request, limit: float):
        self._request, self._limit = request, limit
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1
        self._log: IO[bytes] | None = None
        self._rest = b""

    def step(self) -> list[int]:
        """Returns the new tokens, none at the text's end. Raises PeerError, and ends the process, if it fails."""
        answer: dict[str, Any] = {}
        try:
            if self._process is None:
                self._start()
            self._signal(signal.SIGCONT)
            self._tell("")
            answer = self._answer()
            return [int(token) for token in answer["tokens"]]
        except KeyError:
            raise PeerError(answer["error"]) from None
        finally:
            if "tokens" not in answer:
                self.close(grace=0)

    def stop(self) -> None:
        """Stops the process until the next step. The threads of FastLLM, for one, spin while they wait."""
        self._signal(signal.SIGSTOP)

    def _signal(self, kind: signal.Signals) -> None:
        """Sends a signal to the process and those that it started, if there is one."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, kind)

    def _start(self) -> None:
        self._answers, theirs = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  `close` closes it
        self._process = subprocess.Popen(
            [sys.executable, peer_engines.__file__, str(theirs)],
            stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, pass_fds=(theirs,), start_new_session=True,
            cwd=self._request.folder,  # not the checkout, whose folders would be packages there
            env={**os.environ, "OMP_NUM_THREADS": str(self._request.threads)},
        )  # fmt: skip
        os.close(theirs)
        self._tell(json.dumps(asdict(self._request)))

    def _tell(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # `_answer` says how it ended
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        end = time.monotonic() + self._limit
        while b"\n" not in self._rest:
            if not select.select([self._answers], [], [], max(0.0, end - time.monotonic()))[0]:
                raise PeerError(f"no token came within {self._limit:g} seconds")
            data = os.read(self._answers, 1 << 16)
            if not data:
                raise PeerError(self._how_it_ended())
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _how_it_ended(self) -> str:
        assert self._process is not None and self._log is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error:" in line.lower()]  # after which some say less
        last = (errors or lines or ["it said nothing"])[-1]
        return f"its process ended with code {self._process.returncode}: {last}"

    def close(self, grace: float = GRACE) -> None:
        """Ends the process and those that it started. It has `grace` seconds to do so itself."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None and self._log is not None
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        self._signal(signal.SIGKILL)
        process.wait()
        self._process = None
        os.close(self._answers)
        self._log.close()
