"""`tokenswift train-heads` lets the model write, and trains heads to guess the tokens that it writes next."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenswift_py.cli.arguments import Parser, lines_of, named_path, number, whole
from tokenswift_py.errors import check, check_kept, check_new, files
from tokenswift_py.parallel.processes import world_size
from tokenswift_py.version import __version__

if TYPE_CHECKING:
    from tokenswift_py.sampling.reference import Sampler

FORMS = ("recurrent", "tokenswift", "medusa", "eagle")
WRITING = 0.6  # the part of --minutes that writing takes
HELD_OUT = 1_000_000  # the number of the first held-out text, which gives it noise of its own


def parser() -> argparse.ArgumentParser:
    root = Parser(
        prog="tokenswift train-heads",
        description="Train draft heads for a model on text that it writes itself. The model stays as it is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    root.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder, a .gguf file or a hub id")
    root.add_argument("--revision", help="of a hub id")
    root.add_argument("--dtype", default="bf16", help="bf16, fp32 or int8 (native), of the model's weights")
    root.add_argument("--engine", default="auto", help="auto, native (C++, CPU) or torch")
    root.add_argument("--device", default="auto", help="auto, cpu, cuda, ...: where the model writes")
    root.add_argument("--threads", type=whole, help="CPU threads")
    root.add_argument("--prompts", type=named_path, metavar="FILE", help="a prompt a line (default: built in)")
    root.add_argument("--form", default="recurrent", help=" or ".join((", ".join(FORMS[:-1]), FORMS[-1])))
    root.add_argument("--heads", type=whole, default=3, help="how many tokens ahead")
    root.add_argument("--tokens", type=whole, default=60_000, help="tokens the model writes to learn from")
    root.add_argument("--held-out", type=whole, default=6_000, help="tokens it writes to others, for the figures")
    root.add_argument("--length", type=whole, default=768, help="tokens of a text at the most")
    root.add_argument("--temperature", type=number, default=0.8, help="of the writing")
    root.add_argument("--min-p", type=number, default=0.05, help="of the writing")
    root.add_argument("--epochs", type=number, default=2.0, help="how often the heads see each token")
    root.add_argument("--rate", type=number, default=2e-3, help="peak learning rate")
    root.add_argument("--draft-vocab", type=whole, default=8192, help="of eagle: the tokens that it can guess")
    root.add_argument("--minutes", type=number, help="stop by then, with what there is; such a run is not repeatable")
    root.add_argument("--seed", type=whole, default=0, help="of the noise and of the training")
    root.add_argument(
        "--out", type=named_path, metavar="FILE", help="a .safetensors file, of eagle a folder (default: in the cache)"
    )
    root.add_argument("--quiet", action="store_true", help="no bars, no figures")
    return root


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Raises UserError for wrong input."""
    args = parser().parse_args(arguments)
    check(world_size() == 1, "WORLD_SIZE", world_size(), "train-heads runs in one process")
    check_arguments(args)
    training_lines, held_lines = read_prompts(args.prompts)
    began = time.monotonic()
    limit = 60 * args.minutes if args.minutes else math.inf

    # Imported here, because torch and transformers take seconds.
    import torch

    from tokenswift_py.api import TokenSwift
    from tokenswift_py.core import SamplingParams
    from tokenswift_py.drafters import eagle_training, training
    from tokenswift_py.models.rope import rope_tables

    params = SamplingParams(temperature=args.temperature, min_p=args.min_p, seed=args.seed)
    swift = TokenSwift.from_pretrained(
        args.model, revision=args.revision, dtype=args.dtype, engine=args.engine, device=args.device,
        threads=args.threads,
    )  # fmt: skip
    checkpoint, executor, spec = swift.checkpoint, swift.executor, swift.checkpoint.spec
    eagle = args.form == "eagle"
    usual = eagle_training.own_folder(checkpoint) if eagle else training.own_file(checkpoint)
    check_kept("out", args.out or usual)
    stored = checkpoint.tensors(dtype=torch.bfloat16)
    embedding = stored["model.embed_tokens.weight"]
    lm_head = embedding if spec.tied else stored["lm_head.weight"]
    fresh: Any = eagle_training.Nothing()
    if not eagle:
        final_norm = spec.folded("model.norm.weight", stored["model.norm.weight"])
        fresh = training.new_heads(args.form, args.heads, final_norm, spec.norm_eps)
    longest = max(len(prompt) for lines in (training_lines, held_lines) for prompt in encode(swift, lines))
    model = executor.model(rope_tables(checkpoint.config, longest + args.length))

    def sampler_of(first: int) -> Callable[[int], Sampler]:
        return lambda number: executor.sampler(replace(params, stream=first + number), spec.vocab_size, checkpoint.eos)

    def write(lines: list[tuple[str, bool]], first: int, wanted: int, deadline: float) -> Any:
        return training.write(
            model, fresh, endless(encode(swift, lines), args.seed), sampler_of(first), wanted, args.length,
            longest + args.length, checkpoint.eos, least=args.heads + 1, deadline=deadline, quiet=args.quiet,
        )  # fmt: skip

    ready = time.monotonic()
    left = max(0.0, began + limit - ready)  # what loading has left of the minutes
    held, held_texts = write(held_lines, HELD_OUT, args.held_out, ready + 0.2 * WRITING * left)
    if not eagle:
        training.usable_rows(held, fresh)
    rows, texts = write(training_lines, 0, args.tokens, ready + WRITING * left)
    told = {
        "command": shlex.join(["tokenswift", "train-heads", *arguments]),
        "version": __version__,
        "model": checkpoint.name,
        "numerics": model.numerics,
        "seed": args.seed,
        "tokens": len(rows),
        "held_out_tokens": len(held),
    }

    def provenance(losses: Sequence[float], figures: Mapping[str, Any]) -> dict[str, Any]:
        return {**told, "steps": len(losses), "minutes": round((time.monotonic() - began) / 60, 1), **figures}

    late = began + 0.95 * limit
    if eagle:
        layer, losses, figures = eagle_training.learn(
            model, checkpoint, stored, (rows, texts), (held, held_texts), args.heads, args.draft_vocab, args.epochs,
            args.seed, args.rate, late, args.quiet,
        )  # fmt: skip
        check(bool(losses), "minutes", args.minutes, f"time for a step; loading alone took {ready - began:.0f} s")
        record, shown = provenance(losses, figures), table(figures)
        target = eagle_training.keep(layer, checkpoint, record, args.out)
    else:
        heads, losses = training.train(
            training.regressed(fresh, rows, embedding), rows, lm_head, embedding, args.epochs, args.seed, args.rate,
            deadline=late, quiet=args.quiet, cap=spec.logit_cap,
        )  # fmt: skip
        learned = bool(losses) or args.form != "medusa"  # others were fitted in closed form before
        took = f"time for a step; what came before took {time.monotonic() - began:.0f} s"
        check(learned, "minutes", args.minutes, took)
        heads = replace(heads, tensors={name: tensor.to(torch.bfloat16) for name, tensor in heads.tensors.items()})
        used = heads.to(torch.device("cpu"))  # fp32, rounded as they are kept
        figures = training.accuracy(used, held, lm_head, embedding)
        record = provenance(losses, figures)
        accepted = training.acceptance(
            used, held, held_texts, sampler_of(HELD_OUT), lm_head, embedding, cap=spec.logit_cap
        )
        target = training.keep(replace(heads, acceptance=accepted, provenance=record), checkpoint, args.out)
        shown = table(figures, accepted)
    if not args.quiet:
        print(f"{target}\n{json.dumps(record, indent=1)}\n{shown}")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Checks the arguments that need no model. Raises UserError."""
    for name, least in (("heads", 1), ("tokens", 1), ("held_out", 1), ("length", 2)):
        check(getattr(args, name) >= least, name, getattr(args, name), f"at least {least}")
    check(args.form in FORMS, "form", args.form, f"one of {', '.join(FORMS)}")
    check(args.heads <= 16, "heads", args.heads, "at most 16")
    check(args.length > args.heads + 1, "length", args.length, f"more than heads + 1 ({args.heads + 1})")
    check(0 < args.epochs < math.inf, "epochs", args.epochs, "above 0")
    check(0 < args.rate < 1, "rate", args.rate, "between 0 and 1")
    check(args.draft_vocab >= 64, "draft_vocab", args.draft_vocab, "at least 64")
    check(args.minutes is None or args.minutes > 0, "minutes", args.minutes, "above 0")
    check(0 <= args.seed < 2**63, "seed", args.seed, "between 0 and 2^63 - 1")
    if args.out is not None:
        kind = "a new folder, for form eagle" if args.form == "eagle" else "a new file that ends in .safetensors"
        check((args.out.suffix == ".safetensors") == (args.form != "eagle"), "out", str(args.out), kind)
        check_new("out", args.out)
        if args.form != "eagle":
            check_new("out", args.out.with_suffix(".json"))  # where the figures of heads go


def read_prompts(path: Path | None) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Returns prompts to learn from and prompts held out for the figures, each with whether it is raw text.

    Of the built-in list whole subjects are held out, of a file the last tenth of its lines.
    """
    if path is None:
        from tokenswift_py.drafters.training import PROMPTS

        listed = json.loads(PROMPTS.read_text(encoding="utf-8"))
        forms = [(form, False) for form in listed["chat"]] + [(form, True) for form in listed["raw"]]
        held = listed["held_out"]
        return tuple(  # type: ignore[return-value]
            [(form.format(subject), raw) for subject in subjects for form, raw in forms]
            for subjects in (listed["subjects"][:-held], listed["subjects"][-held:])
        )
    with files("prompts", path, "a readable UTF-8 file is"):
        text = path.read_text(encoding="utf-8-sig")
    lines = [(line.strip(), False) for line in lines_of(text) if line.strip()]
    check(len(lines) >= 2, "prompts", str(path), "a file with at least two lines")
    held = max(1, len(lines) // 10)
    return lines[:-held], lines[-held:]


def encode(swift: Any, lines: list[tuple[str, bool]]) -> list[list[int]]:
    from tokenswift_py.text import Chat, prompt_tokens

    return [prompt_tokens(swift.tokenizer, text, Chat(raw)) for text, raw in lines]


def endless(prompts: list[list[int]], seed: int) -> Iterator[list[int]]:
    """Yields all of them in a random order, again and again."""
    rng = np.random.default_rng(seed)
    while True:
        for i in rng.permutation(len(prompts)):
            yield prompts[i]


def table(figures: Mapping[str, Any], accepted: Any = None) -> str:
    """Returns the figures of each head, or of each token ahead. accepted: [heads, ranks] how often each was written."""
    lines = ["head   top-1   top-3" + ("" if accepted is None else "   accepted as best, as one of the best three")]
    for i, (top1, top3) in enumerate(zip(figures["top1"], figures["top3"], strict=True)):
        line = f"{i + 1:4}   {top1:5.3f}   {top3:5.3f}"
        lines.append(line if accepted is None else f"{line}   {accepted[i][0]:5.3f}   {sum(accepted[i][:3]):5.3f}")
    return "\n".join(lines)
