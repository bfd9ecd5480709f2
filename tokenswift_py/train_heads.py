"""`tokenswift train-heads`: the model writes, heads learn to guess what it writes next, a file and its figures remain."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tokenswift_py import __version__
from tokenswift_py.errors import UserError, check

WRITING = 0.6  # of the time that --minutes allows
HELD_OUT = 1_000_000  # number of the first held-out text: noise of its own


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="tokenswift train-heads",
        description="Train draft heads for a model on text that it writes itself. The model stays as it is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    root.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder, a .gguf file or a hub id")
    root.add_argument("--revision", help="of a hub id")
    root.add_argument("--dtype", default="bf16", help="bf16 or fp32, of the model's weights")
    root.add_argument("--engine", default="auto", help="auto, native (C++, CPU) or torch")
    root.add_argument("--device", default="auto", help="auto, cpu, cuda, ...: where the model writes")
    root.add_argument("--threads", type=int, help="CPU threads")
    root.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, at least two (default: built in)")
    root.add_argument("--form", default="medusa", help="medusa or tokenswift")
    root.add_argument("--heads", type=int, default=3, help="how many tokens ahead")
    root.add_argument("--tokens", type=int, default=60_000, help="tokens the model writes to learn from")
    root.add_argument("--held-out", type=int, default=6_000, help="tokens it writes to other prompts, for the figures")
    root.add_argument("--length", type=int, default=768, help="tokens of a text at the most")
    root.add_argument("--temperature", type=float, default=0.8, help="of the writing")
    root.add_argument("--min-p", type=float, default=0.05, help="of the writing")
    root.add_argument("--epochs", type=float, default=4, help="how often the heads see each token")
    root.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    root.add_argument("--minutes", type=float, help="stop by then, with what there is; such a run is not repeatable")
    root.add_argument("--seed", type=int, default=0, help="of the noise and of the training")
    root.add_argument("--out", type=Path, metavar="FILE", help="a .safetensors file (default: the cache, found there)")
    root.add_argument("--quiet", action="store_true", help="no bars, no figures")
    return root


def main(arguments: Sequence[str]) -> int:
    args = parser().parse_args(arguments)
    check_arguments(args)
    began = time.monotonic()
    limit = math.inf if args.minutes is None else 60 * args.minutes

    # Here, because torch and transformers take seconds to import.
    from tokenswift_py.api import TokenSwift
    from tokenswift_py.core import SamplingParams
    from tokenswift_py.drafters import heads, training
    from tokenswift_py.loading import cache_folder
    from tokenswift_py.rope import rope_tables
    from tokenswift_py.sampling import Sampler

    swift = TokenSwift.from_pretrained(
        args.model, revision=args.revision, dtype=args.dtype, engine=args.engine, device=args.device,
        threads=args.threads,
    )  # fmt: skip
    checkpoint, executor, spec = swift.checkpoint, swift.executor, swift.checkpoint.spec
    train_prompts, held_prompts = (prompts(swift.tokenizer, part) for part in read_prompts(args.prompts))

    def sampler_of(first: int) -> Callable[[int], Sampler]:
        def make(number: int) -> Sampler:
            params = SamplingParams(
                temperature=args.temperature, min_p=args.min_p, seed=args.seed, stream=first + number
            )
            return executor.sampler(params, spec.vocab_size, checkpoint.eos)

        return make

    longest = max(len(prompt) for prompt in all_prompts)
    model = executor.model(rope_tables(checkpoint.config, longest + args.length))
    ...
    return 0
