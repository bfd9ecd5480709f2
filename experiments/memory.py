"""How well does a model read behind a bounded cache, by what becomes of the pages that are evicted?

    python experiments/memory.py --texts code,docs,prose --lengths 8192,16384,32768,65536 --budgets 1024,2048,4096

Teacher forcing on real text: nats per token of the last SPAN tokens of so many. Kinds:
  full                     nothing is evicted: the whole text is in the cache, whatever the budget
  recent, mass, h2o, ...   pages are evicted by this policy and lost; `recent` keeps sinks and a window, as
                           StreamingLLM does, at their positions in the text
  linear, performer, infini, infini_linear   pages are evicted by `recent` and folded into this memory
  linear+mass, ...         a memory over the pages that another policy evicts
`held_bytes` are those of the budget's keys and values, `memory_bytes` those of the memory beside them. What a policy
keeps to choose by is not counted: 0.7 MB for the default model; SnapKV's grows with the text, to 12 MB at 64 K. A
memory that a scheme of positions does not allow is left out, and said so. Infini memories need gates: `tokenswift
train-memory`, or --gates.

    python experiments/memory.py --passkeys 4096,8192 --budgets 1024

Nine sentences that each give somebody's pass key, five digits, stand at depths of 10 to 90 % of a text of prose, nearly
all of them beyond the budget. Each is asked for at the end, on a fork of the cache: `found` of nine answered right,
greedily, and `nats` per token of the right answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch.nn.functional as F

from positions import PEOPLE, SPAN, WHOLE, hidden_passkeys
from results import Results, Row, add_flags, start
from tokenswift_py import TokenSwift, registry
from tokenswift_py.errors import UserError, check
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.models.positions import SCHEMES, Positions
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.options import GATED, MEMORIES, POLICIES, Options
from tokenswift_py.remembering.gates import find_gates
from tokenswift_py.remembering.memories import check_remembers, memory_of
from tokenswift_py.remembering.reading import nats, read_on
from tokenswift_py.runs.assembly import eviction_of
from tokenswift_py.runs.report import rounded
from workloads import CONTINUATIONS, continuation

KINDS = "full,recent,mass,h2o,snapkv,linear,performer,infini"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16", help="of weights and cache")
    parser.add_argument("--engine", default="auto", help="auto, native or torch")
    parser.add_argument("--texts", default=",".join(CONTINUATIONS))
    parser.add_argument("--lengths", default="8192,16384,32768,65536", help="tokens of the text")
    parser.add_argument("--budgets", default="1024,2048,4096", help="tokens that the cache keeps")
    parser.add_argument("--kinds", default=KINDS)
    parser.add_argument("--positions", default="auto", help=f"{', '.join(SCHEMES)}: several with commas between them")
    parser.add_argument("--gates", help="a file of gates (default: those that were trained for the model)")
    parser.add_argument("--passkeys", default="", help="lengths of texts that hide pass keys, instead of reading")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="memory", help="of the files in results/")
    add_flags(parser)
    args = parser.parse_args()
    texts, kinds, schemes = args.texts.split(","), args.kinds.split(","), args.positions.split(",")
    lengths, budgets = ([int(n) for n in value.split(",")] for value in (args.passkeys or args.lengths, args.budgets))
    for text in texts:
        check(text in CONTINUATIONS, "texts", text, f"known are {', '.join(CONTINUATIONS)}")
    for kind in kinds:
        options_of(args, kind, budgets[0], schemes[0])
    check(max(budgets) + SPAN <= min(lengths), "budgets", max(budgets), f"at most {min(lengths) - SPAN}")
    results = Results(
        args.name,
        "How well does the model read behind a bounded cache, by what becomes of the pages that are evicted?",
        args,
        guarantees={
            "nats": f"exact, of {SPAN} tokens of one text each",
            "found": "exact, of nine pass keys in one text",
        },
        axes=("texts", "lengths", "budgets", "kinds", "positions", "passkeys"),
    )
    swift = TokenSwift.from_pretrained(args.model, dtype=args.dtype, engine=args.engine, threads=args.threads)
    for text, length, scheme in product(["passkeys"] if args.passkeys else texts, lengths, schemes):
        for kind in kinds:
            for budget in budgets if kind != "full" else [0]:
                options = options_of(args, kind, budget, scheme)
                if (reason := refusal(swift, options, length)) is not None:
                    print(f"left out: {kind} of {length} tokens: {reason}", flush=True)
                    continue
                key = {"text": text, "length": length, "positions": scheme, "kind": kind, "budget": budget}
                if options.kv_memory in GATED:
                    key["gates"] = find_gates(swift.checkpoint, options.kv_memory, options.kv_gates).label
                measured = passkeys if args.passkeys else read
                results.cell(
                    key,
                    lambda m=measured, t=text, n=length, o=options: m(Reader(swift, o, n), t),  # type: ignore[misc]
                )
    results.save(None if args.passkeys else plot)


def options_of(args: argparse.Namespace, kind: str, budget: int, scheme: str) -> Options:
    """Makes the options of a run that reads so. Raises UserError for a kind that there is none of."""
    if kind == "full":
        return Options(positions=scheme)
    name, plus, policy = kind.partition("+")
    memories, policies = registry.names(MEMORIES), registry.names(POLICIES)
    known = name in memories or (name in policies and not plus)
    check(known, "kinds", kind, f"full, or one of {', '.join(memories + policies)}")
    if name in policies:
        return Options(positions=scheme, kv_budget=budget, kv_policy=name)
    gates = args.gates if name in GATED else None
    return Options(positions=scheme, kv_budget=budget, kv_policy=policy or "recent", kv_memory=name, kv_gates=gates)


def refusal(swift: TokenSwift, options: Options, length: int) -> str | None:
    """Returns why a run of so many tokens cannot have these options, None where it can."""
    try:
        check_remembers(options, swift.executor, tables(swift, options, length), swift.checkpoint)
    except UserError as error:
        return str(error)
    return None


def tables(swift: TokenSwift, options: Options, length: int) -> Any:
    """Makes the tables for so many tokens, rounded up so that close lengths share theirs."""
    context = -(-length // WHOLE) * WHOLE
    return rope_tables(swift.checkpoint.config, context, Positions(options.positions))


class Reader:
    """A model, a cache with room for a text and a fork, and what is evicted of it."""

    def __init__(self, swift: TokenSwift, options: Options, length: int):
        self.tokenizer, self.length = swift.tokenizer, length
        self.model: Any = swift.executor.model(tables(swift, options, length))
        memory = memory_of(options, self.model, swift.checkpoint)
        self.eviction = eviction_of(options, memory=memory)
        self.label = self.model.numerics + (f"/{self.eviction.label}" if self.eviction else "")
        kept = self.eviction.budget if self.eviction else self.model.context
        pool = self.model.new_pool(pages_for(kept) + pages_for(PAGE_SIZE))
        self.cache = KVCache(pool, self.model.context)
        self.page_bytes = pool.page_bytes
        if self.eviction:
            self.eviction.new_cache(self.model, self.cache)

    def figures(self) -> Row:
        held = (self.eviction.budget if self.eviction else self.length) // PAGE_SIZE * self.page_bytes
        memory = self.cache.memory
        return {"held_bytes": held, "memory_bytes": memory.held_bytes if memory else 0, "label": self.label}


def read(reader: Reader, text: str) -> Row:
    tokens = continuation(text, reader.tokenizer, reader.length).tokens
    loss = nats(reader.model, reader.cache, reader.eviction, tokens, SPAN)
    return {"nats": rounded(loss), **reader.figures()}


def passkeys(reader: Reader, text: str) -> Row:
    tokens, asked, answers = hidden_passkeys(reader.tokenizer, reader.length)
    for _ in read_on(reader.model, reader.cache, reader.eviction, [*tokens, 0], 1):
        pass
    places, total, count = "", 0.0, 0
    for person in PEOPLE:
        loss, right = answer(reader, [*tokens, *asked[person], *answers[person]], len(answers[person]))
        places += "x" if right else "."
        total, count = total + loss, count + len(answers[person])
    return {"found": places.count("x"), "by_depth": places, "nats": rounded(total / count), **reader.figures()}


def answer(reader: Reader, tokens: Sequence[int], scored: int) -> tuple[float, bool]:
    """Returns the nats of an answer behind a question, and whether each of its tokens is the likeliest in its place.

    Nothing is evicted while it is read: a question and its answer are shorter than a page.
    """
    fork, total, right = reader.cache.fork(), 0.0, True
    fork.limit = fork.context
    for logits, after in read_on(reader.model, fork, None, tokens, scored):
        total += float(F.cross_entropy(logits.double(), after, reduction="sum"))
        right &= bool((logits.argmax(-1) == after).all())
    fork.release()
    return total, right


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws a panel for each text and length: nats against all bytes that are kept, the full cache as a line across."""
    panels_of = list(dict.fromkeys((row["text"], row["length"]) for row in rows))
    if not rows:
        return
    panels = figure.subplots(1, len(panels_of), squeeze=False)[0]
    for panel, (text, length) in zip(panels, panels_of, strict=True):
        here = [row for row in rows if (row["text"], row["length"]) == (text, length)]
        for kind, scheme in dict.fromkeys((row["kind"], row["positions"]) for row in here):
            of_kind = [row for row in here if (row["kind"], row["positions"]) == (kind, scheme)]
            if kind == "full":
                panel.axhline(of_kind[0]["nats"], color="k", linestyle="--", linewidth=1, label=f"full {scheme}")
                continue
            at = [(row["held_bytes"] + row["memory_bytes"]) / 1e6 for row in of_kind]
            loss = [row["nats"] for row in of_kind]
            panel.plot(at, loss, "o-", linewidth=1, markersize=3, label=f"{kind} {scheme}")
        panel.set_xscale("log", base=2)
        panel.set_title(f"{text}, {length} tokens", fontsize=9)
        panel.set_xlabel("MB kept")
    panels[0].set_ylabel("nats a token")
    panels[-1].legend(fontsize=6)


if __name__ == "__main__":
    start(main)
