"""The writers of experiments/peers.py, and those of transformers and llama.cpp, which run in this process."""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import toys
from results import Row
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.runs.report import first_divergence, text_figures

LOOKUP = 10  # how many tokens prompt lookup proposes after a match of up to 2 tokens (llama-cpp-python's defaults)
MATCH = 2
NO_ASSISTANT = "no smaller model with this tokenizer is at hand; name one with --assistant"


class PeerError(Exception):
    """The reason why a peer cannot write, as its row tells it."""


@dataclass
class Writer:
    """One way of writing the text.

    step:  function that goes on and returns the new tokens, none at the text's end. The first call reads the prompt.
    rest:  function that is called when another writer's turn comes.
    plain: writer whose text this one's speculation should write. None for plain decoding itself.
    reads: bytes that plain decoding must read for a token, on average. None for a peer on a GPU, whose memory is not
           that of the others.
    note:  reason why this writer cannot write.
    """

    engine: str
    how: str
    reads: float | None
    step: Callable[[], list[int]] | None = None
    plain: Writer | None = None
    note: str | None = None
    rest: Callable[[], None] | None = None
    tokens: list[int] = field(default_factory=list)
    timed: int = 0  # number of tokens that were timed
    ms: float = 0.0

    def write(self, count: int) -> None:
        """Goes on until there are `count` tokens.

        The first step is not timed, because the writer before has left its threads spinning and its data in the caches.
        """
        first = True
        while len(self.tokens) < count and self.note is None:
            assert self.step is not None
            clock = time.perf_counter()
            try:
                new = self.step()
            except Exception as error:  # a peer that fails gets a row that says so
                kind = "" if isinstance(error, PeerError) else f"{type(error).__name__}: "
                self.note = " ".join(f"{kind}{error}".split())[:160]
                return
            if not new:
                return
            if not first:
                self.ms += 1e3 * (time.perf_counter() - clock)
                self.timed += len(new)
            self.tokens += new
            first = False
        if self.rest is not None:
            self.rest()

    @property
    def ms_a_token(self) -> float | None:
        return self.ms / self.timed if self.timed else None

    def row(self, bandwidth: float, count: int, ours: list[int] | None) -> Row:
        """Returns the writer's figures. ours: our plain text, if the writer's should equal it except for rounding."""
        ms, plain, tokens = self.ms_a_token, self.plain, self.tokens[:count]
        compared = plain is not None and bool(tokens)
        divergence = first_divergence(tokens, plain.tokens[: len(tokens)]) if plain and compared else None
        figures = text_figures(tokens)
        return {
            "engine": self.engine,
            "how": self.how,
            "tokens_per_s": 1e3 / ms if ms else None,
            "ms_a_token": ms,
            "times_own_plain": plain.ms_a_token / ms if ms and plain and plain.ms_a_token else None,
            "same_as_own_plain": divergence is None if compared else None,
            "first_divergence": divergence,
            "like_ours_until": first_divergence(tokens, ours[: len(tokens)]) if ours and tokens else None,
            "distinct_4": figures["distinct_4"],
            "looping": figures["looping"] if tokens else None,
            "share_of_memory_limit": 1e3 * self.reads / bandwidth / ms if ms and self.reads and plain is None else None,
            "note": self.note,
        }


@dataclass(frozen=True)
class Task:
    """The text that every writer writes. sampling: temperature and min_p."""

    args: argparse.Namespace
    prompt: list[int]
    sampling: dict[str, float]

    @property
    def room(self) -> int:
        return len(self.prompt) + self.args.new

    @property
    def middle(self) -> float:
        """The number of tokens before a new one, on average."""
        return len(self.prompt) + self.args.new / 2


def bf16_bytes(checkpoint: Checkpoint, task: Task) -> float:
    """Returns the bytes that plain decoding reads for a token where weights, keys and values are bf16."""
    return 2 * checkpoint.spec.multiplied + checkpoint.spec.kv_bytes_read(task.middle, torch.bfloat16)


@contextmanager
def hugging_face(task: Task, checkpoint: Checkpoint) -> Iterator[list[Writer]]:
    """Makes writers of transformers, in bf16 with SDPA and its dynamic cache."""
    from transformers import GenerationConfig, __version__

    def load(checkpoint: Checkpoint) -> Any:
        model = toys.hugging_face(checkpoint, torch.bfloat16)
        model.generation_config = GenerationConfig(pad_token_id=0)  # neither EOS nor the checkpoint's defaults
        return model

    args, model = task.args, load(checkpoint)
    name, reads = f"transformers {__version__}", bf16_bytes(checkpoint, task)
    sampled = task.sampling["temperature"] > 0
    common = {
        "max_new_tokens": args.new, "do_sample": sampled, "use_cache": True,
        **({**task.sampling, "top_k": 0, "top_p": 1.0} if sampled else {}),
    }  # fmt: skip
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "prompt lookup": {"prompt_lookup_num_tokens": LOOKUP, "max_matching_ngram_size": MATCH},
        f"assisted by its own first {args.early_exit} layers": {"assistant_early_exit": args.early_exit},
    }
    if args.assistant:
        smaller = load(open_checkpoint(args.assistant, None, "bf16"))
        ways["assisted by a smaller model"] = {"assistant_model": smaller}
    writers: list[Writer] = []
    for how, way in ways.items():
        paused = Paused(model, task, {**common, **way})
        writers.append(Writer(name, how, reads, paused.step, writers[0] if writers else None))
    if not args.assistant:
        writers.append(Writer(name, "assisted by a smaller model", reads, note=NO_ASSISTANT))
    yield writers


class Paused:
    """Runs transformers' generate in a thread of its own, which stands still between two calls of `step`."""

    def __init__(self, model: Any, task: Task, settings: dict[str, Any]):
        self._model, self._task, self._settings = model, task, settings
        self._found: queue.Queue[list[int] | Exception] = queue.Queue()
        self._go = threading.Semaphore(0)
        self._state = torch.Generator().manual_seed(task.args.seed).get_state()
        self._thread = threading.Thread(target=self._run, daemon=True)  # a daemon thread ends with the process
        self._begun = False

    def step(self) -> list[int]:
        torch.set_rng_state(self._state)  # takes up its own state again, whichever writer drew in between
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        found = self._found.get()
        self._state = torch.get_rng_state()
        if isinstance(found, Exception):
            raise found
        return found

    def _run(self) -> None:
        self._go.acquire()
        torch.set_num_threads(self._task.args.threads)
        try:
            self._model.generate(torch.tensor([self._task.prompt]), streamer=self, **self._settings)
        except Exception as error:  # `step` raises it again
            self._found.put(error)
        else:
            self._found.put([])

    def put(self, tokens: torch.Tensor) -> None:
        """Takes the prompt, then the new tokens, from generate. Returns at the next `step`."""
        if not self._begun:
            self._begun = True
            return
        self._found.put(tokens.flatten().tolist())
        self._go.acquire()

    def end(self) -> None:
        """Does nothing. generate calls it at the end."""


@contextmanager
def llama_cpp(task: Task, checkpoint: Checkpoint) -> Iterator[list[Writer]]:
    """Makes writers of llama.cpp, on the GGUF that the weights come from, with f16 KV and flash attention."""
    import llama_cpp as library
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    args, name = task.args, f"llama.cpp ({library.__version__})"
    path, *_ = open_checkpoint(args.model, None, "gguf").weight_files
    reads = path.stat().st_size + checkpoint.spec.kv_bytes_read(task.middle, torch.float16)
    with ExitStack() as stack:
        writers: list[Writer] = []
        for how, draft in (("plain", None), ("prompt lookup", LlamaPromptLookupDecoding(MATCH, LOOKUP))):
            model = library.Llama(
                str(path), n_ctx=task.room + LOOKUP + 1, n_threads=args.threads, n_threads_batch=args.threads,
                n_batch=512, flash_attn=True, verbose=False, seed=args.seed, draft_model=draft,
                logits_all=draft is not None, rope_scaling_type=library.LLAMA_ROPE_SCALING_TYPE_NONE,
            )  # fmt: skip
            stack.callback(model.close)
            steps = model.generate(
                task.prompt, temp=task.sampling["temperature"], min_p=task.sampling["min_p"], top_k=0, top_p=1.0
            )
            writers.append(
                Writer(name, how, reads, lambda steps=steps: [next(steps)], writers[0] if writers else None)  # type: ignore[misc]
            )
        yield writers
