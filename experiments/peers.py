"""How fast do others write the same model's text, with their own speculation and without, and is it the same text?

    python experiments/peers.py --lengths 1024,4096 --new 256

transformers writes with generate, with its prompt lookup and with its assisted generation (by the model itself, left
early; by a smaller one with --assistant). llama.cpp writes through llama-cpp-python, plainly and with its prompt
lookup. vLLM and SGLang write plainly and with their n-grams, LightLLM and FastLLM plainly, each in a process of its
own. Where one is not installed, needs a GPU that is not there, or writes nothing for --patience seconds, its row says
so.

All go on from the same tokens with the same weights and the same parameters, in alternating slices, and no text ends
before its length. (llama.cpp has 4-bit blocks, and the bf16 weights were converted from these.) Each one's speculation
is compared with its own plain text, token by token. When a peer samples, it draws from a generator of its own, with the
same seed. A rule that spends draws on drafts then writes another text, which has the same distribution if the rule is
right.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from peer_engines import ENGINES
from peer_processes import apart, installed
from peer_writers import Task, Writer, hugging_face, llama_cpp
from results import Results, Row, add_flags, start
from tokenswift_py import TokenSwift
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.decoding.statistics import memory_bandwidth
from tokenswift_py.errors import check, need_extra
from tokenswift_py.options import Options
from tokenswift_py.runs.assembly import decode_loop
from tokenswift_py.runs.plan import prepare
from workloads import continuation

PEERS = {"hf": hugging_face, "llamacpp": llama_cpp, **{name: partial(apart, name) for name in ENGINES}}
SAMPLINGS = {"greedy": {"temperature": 0.0, "min_p": 0.0}, "sampled": {"temperature": 0.8, "min_p": 0.05}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peers", default=",".join(PEERS), help="whom to ask; none of them with an empty text")
    parser.add_argument("--patience", type=float, default=600, help="seconds that a peer's process has for a step")
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
    check(args.patience > 0, "patience", args.patience, "above 0")
    if "llamacpp" in peers:
        need_extra("extra", "peers", "llama_cpp")
    found = [engine.package for name, engine in ENGINES.items() if name in peers and installed(engine)]
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
        peers=[*(["llama-cpp-python"] if "llamacpp" in peers else []), *found],
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
