"""How fast do others write the same model's text, with their own speculation and without, and is it the same text?

    python experiments/peers.py --lengths 1024,4096 --new 256

The peers are transformers and llama.cpp. transformers writes with generate, with its prompt lookup and with its
assisted generation (by the model itself, left early; by a smaller one with --assistant). llama.cpp writes through
llama-cpp-python, plainly and with its prompt lookup. All go on from the same tokens with the same weights and the same
parameters, in alternating slices. (llama.cpp has 4-bit blocks, and the bf16 weights were converted from these.) Each
one's speculation is compared with its own plain text, token by token. When a peer samples, it draws from a generator
of its own, with the same seed. A rule that spends draws on drafts then writes another text, which has the same
distribution if the rule is right.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

import toys
from results import Results, Row, add_flags, start
from tokenswift_py import TokenSwift
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.decoding.statistics import memory_bandwidth
from tokenswift_py.errors import check, need_extra
from tokenswift_py.options import Options
from tokenswift_py.runs.assembly import decode_loop
from tokenswift_py.runs.plan import prepare
from tokenswift_py.runs.report import first_divergence, text_figures
from workloads import continuation

SAMPLINGS = {"greedy": {"temperature": 0.0, "min_p": 0.0}, "sampled": {"temperature": 0.8, "min_p": 0.05}}
LOOKUP = 10  # how many tokens prompt lookup proposes after a match of up to 2 tokens (llama-cpp-python's defaults)
NO_ASSISTANT = "no smaller model with this tokenizer is at hand; name one with --assistant"


@dataclass
class Writer:
    """One way of writing the text.

    step:  function that goes on and returns the new tokens, none at the text's end. The first call reads the prompt.
    plain: writer whose text this one's speculation should write. None for plain decoding itself.
    reads: bytes that plain decoding must read for a token, on average.
    note:  reason why this writer cannot write.
    """

    engine: str
    how: str
    reads: float
    step: Callable[[], list[int]] | None = None
    plain: Writer | None = None
    note: str | None = None
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
                self.note = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                return
            if not new:
                return
            if not first:
                self.ms += 1e3 * (time.perf_counter() - clock)
                self.timed += len(new)
            self.tokens += new
            first = False

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
            "share_of_memory_limit": 1e3 * self.reads / bandwidth / ms if ms and plain is None else None,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peers", default="hf,llamacpp")
    parser.add_argument("--ours", default="bf16,gguf", help="types of weights of our native engine")
    parser.add_argument("--assistant", help="a smaller model with the same tokenizer, for transformers")
    parser.add_argument("--early-exit", type=int, default=10, help="layers of transformers' self-assist")
    parser.add_argument("--texts", default="docs")
    parser.add_argument("--lengths", default="1024,4096")
    parser.add_argument("--samplings", default=",".join(SAMPLINGS))
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--slice", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    add_flags(parser)
    args = parser.parse_args()
    peers = [name for name in args.peers.split(",") if name]
    for name in peers:
        check(name in PEERS, "peers", name, f"known are {', '.join(PEERS)}")
    if "llamacpp" in peers:
        need_extra("extra", "peers", "llama_cpp")
    results = Results(
        "peers",
        "How fast do others write the same text, and does their speculation change it?",
        args,
        guarantees={
            "ours, native": "bitwise: the text of plain decoding",
            "peers' texts": "measured, against their own plain decoding with the same seed",
            "tokens per second": "measured in alternating slices, the pass over the prompt left out",
        },
        axes=("texts", "lengths", "samplings"),
        peers=("llama-cpp-python",) if "llamacpp" in peers else (),
    )
    checkpoint = open_checkpoint(args.model, None, "bf16")
    trained = checkpoint.config.max_position_embeddings
    for text, length, sampling in product(
        args.texts.split(","), map(int, args.lengths.split(",")), args.samplings.split(",")
    ):
        check(length + args.new <= trained, "lengths", length, f"with --new at most {trained}: beyond it RoPE differs")
        check(sampling in SAMPLINGS, "samplings", sampling, f"known are {', '.join(SAMPLINGS)}")
        key = {"text": text, "length": length, "sampling": sampling}
        results.cell(key, lambda key=key: compare(args, checkpoint, **key))  # type: ignore[misc]
    results.save(plot)


def compare(args: argparse.Namespace, checkpoint: Checkpoint, text: str, length: int, sampling: str) -> Iterator[Row]:
    """Yields a row for each writer."""
    torch.set_num_threads(args.threads)
    task = Task(args, continuation(text, checkpoint.tokenizer(), length).tokens, SAMPLINGS[sampling])
    with ExitStack() as stack:
        writers = list(ours(task))
        for name in filter(None, args.peers.split(",")):
            writers += stack.enter_context(PEERS[name](task, checkpoint))
        for writer in writers:
            writer.write(1)  # this reads the prompt
        bandwidth = memory_bandwidth(threads=args.threads)
        for end in range(args.slice, args.new + args.slice, args.slice):
            for writer in writers:
                writer.write(min(end, args.new))
        # Only greedy texts are comparable, because sampling draws from a generator of the engine's own. A greedy text
        # that differs from its first token on was not asked for the same.
        like = writers[0].tokens if sampling == "greedy" and args.ours else None
        yield from (writer.row(bandwidth, args.new, like) for writer in writers)


def ours(task: Task) -> Iterator[Writer]:
    args = task.args
    options = Options.of(
        raw=True, max_new_tokens=args.new, context=task.room, seed=args.seed, on_loop="ignore", ignore_eos=True,
        **task.sampling,
    )  # fmt: skip
    for dtype in filter(None, args.ours.split(",")):
        swift = TokenSwift.from_pretrained(args.model, dtype=dtype, engine="native", threads=args.threads)
        run, plain = prepare(swift, task.prompt, options), None
        for drafter, how in (("none", "plain"), ("auto", "auto")):
            steps = decode_loop(swift, replace(run, options=replace(options, drafter=drafter))).run(run.prompt)

            def step(steps: Iterator[Any] = steps) -> list[int]:
                return [token for step in [next(steps, None)] if step for token in step.tokens]

            writer = Writer(f"ours, {dtype}", how, swift.step_bytes(task.middle), step, plain)
            plain = plain or writer
            yield writer


@contextmanager
def hugging_face(task: Task, checkpoint: Checkpoint) -> Iterator[list[Writer]]:
    """Makes writers of transformers, in bf16 with SDPA and its dynamic cache."""
    from transformers import GenerationConfig, __version__

    def load(checkpoint: Checkpoint) -> Any:
        model = toys.hugging_face(checkpoint, torch.bfloat16)
        model.generation_config = GenerationConfig(pad_token_id=0)  # neither EOS nor the checkpoint's defaults
        return model

    args, spec, model = task.args, checkpoint.spec, load(checkpoint)
    name, reads = f"transformers {__version__}", 2 * spec.multiplied + spec.kv_bytes(1, torch.bfloat16) * task.middle
    sampled = task.sampling["temperature"] > 0
    common = {
        "max_new_tokens": args.new, "do_sample": sampled, "use_cache": True,
        **({**task.sampling, "top_k": 0, "top_p": 1.0} if sampled else {}),
    }  # fmt: skip
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "prompt lookup": {"prompt_lookup_num_tokens": LOOKUP, "max_matching_ngram_size": 2},
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
    reads = path.stat().st_size + checkpoint.spec.kv_bytes(1, torch.float16) * task.middle
    with ExitStack() as stack:
        writers: list[Writer] = []
        for how, draft in (("plain", None), ("prompt lookup", LlamaPromptLookupDecoding(2, LOOKUP))):
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


PEERS = {"hf": hugging_face, "llamacpp": llama_cpp}


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws tokens per second: a panel for each length and sampling, a bar for each writer."""
    rows = [row for row in rows if row["tokens_per_s"]]
    panels = list(dict.fromkeys((row["length"], row["sampling"]) for row in rows))
    names = list(dict.fromkeys(f"{row['engine']}: {row['how']}" for row in rows))[::-1]
    figure.set_size_inches(5 + 3 * len(panels), 1.2 + 0.4 * len(names))
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False).flat, panels, strict=True):
        here = [row for row in rows if (row["length"], row["sampling"]) == panel]
        places = [names.index(f"{row['engine']}: {row['how']}") for row in here]
        colours = ["tab:red" if row["same_as_own_plain"] is False else "tab:blue" for row in here]
        axes.bar_label(axes.barh(places, [row["tokens_per_s"] for row in here], color=colours), fmt="%.0f")
        axes.set_yticks(range(len(names)), names)
        axes.margins(x=0.15)
        axes.set_title(f"{panel[1]}, after {panel[0]} tokens", fontsize=9)
        axes.set_xlabel("tokens/s (red: not its own plain text)")


if __name__ == "__main__":
    start(main)
