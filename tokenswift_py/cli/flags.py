"""The flags of `tokenswift` and `tokenswift resume`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any

from tokenswift_py.cli.arguments import Parser, named_path, number, whole
from tokenswift_py.options import Options
from tokenswift_py.version import __version__

OPTION_HELP: dict[str, tuple[str, Callable[[str], Any] | None, str]] = {
    "max_new_tokens": ("text", whole, "tokens to write at the most"),
    "min_new_tokens": ("text", whole, "nothing ends the text before so many"),
    "min_chapter_tokens": ("text", whole, "nor a chapter before it has so many"),
    "ignore_eos": ("text", None, "an end-of-sequence token does not end the text"),
    "on_loop": ("text", str, "warn, stop or ignore, where the text says one block of tokens over and over"),
    "raw": ("text", None, "no chat template: the prompt is the beginning of the text"),
    "context": ("model", whole, "positions the run is made for (default: what it needs)"),
    "positions": (
        "model",
        str,
        "auto, trained, linear, ntk, yarn, self-extend or log-extend: how positions beyond the trained ones are met",
    ),
    "positions_window": (
        "model",
        whole,
        "of an extension: nearer than this, distances stay true (default: a quarter of the trained length)",
    ),
    "positions_block": (
        "model",
        whole,
        "of an extension: positions that are moved together, 64 to 1024 (default: an eighth of it, at most 1024)",
    ),
    "temperature": ("sampling", number, "0 is greedy (default: the checkpoint's, else 0)"),
    "top_k": ("sampling", whole, "keep the k best tokens; 0 is off (default: the checkpoint's)"),
    "top_p": ("sampling", number, "keep the best tokens of this much mass; 1 is off (default: the checkpoint's)"),
    "min_p": ("sampling", number, "keep tokens this probable beside the best; 0 is off (default: the checkpoint's)"),
    "penalty": ("sampling", number, "contextual penalty; 1 is off (default: the checkpoint's)"),
    "penalty_window": ("sampling", whole, "of the latest tokens (default: 1024; with the checkpoint's penalty: all)"),
    "dry_multiplier": ("sampling", number, "DRY repetition penalty; 0 is off"),
    "dry_base": ("sampling", number, "its growth per repeated token"),
    "dry_length": ("sampling", whole, "longest repeat that goes unpunished"),
    "seed": ("sampling", whole, "of the noise (default: random, and recorded)"),
    "drafter": ("drafting", str, "auto (cascade), none, ngram, partial, heads, cascade or draft_model"),
    "draft_tokens": ("drafting", whole, "draft so many in every tree (default: what pays)"),
    "draft_policy": ("drafting", str, "whose pages a partial cache has: h2o, importance, mass, quest, recent, snapkv"),
    "draft_budget": ("drafting", whole, "tokens of the cache that it sees (default: what pays; of a draft model: all)"),
    "draft_weights": ("drafting", str, "bf16 or int8, of a partial cache's or a draft model's; auto is int8 on native"),
    "draft_kv": ("drafting", str, "own or int8, of the keys and values in a partial cache; auto is int8 on native"),
    "draft_model": ("drafting", str, "a smaller model with the same vocabulary, which then drafts under auto too"),
    "draft_heads": (
        "drafting",
        str,
        "a file or folder of draft heads, or auto: those made for the model (default for drafter heads)",
    ),
    "trace": ("output", str, "a file that gets a JSON line for every round"),
    "kv_budget": ("lossy", whole, "tokens the target keeps of its cache; the text is no longer the full cache's"),
    "kv_policy": ("lossy", str, "by whose scores pages are evicted from it, as --draft-policy (default: recent)"),
}


def parser(resumes: bool = False) -> argparse.ArgumentParser:
    """Every flag. Those of `Options` take their defaults from it. resumes: of `tokenswift resume DIR`."""
    root = Parser(
        prog="tokenswift resume" if resumes else "tokenswift",
        description="Go on with the run that was written to DIR. What the text depends on is as recorded."
        if resumes
        else "Long text from a language model, losslessly faster: the text goes to standard output. "
        "For example: tokenswift --prompt 'Write a story about a lighthouse.' --max-new-tokens 2000 --out runs/story",
        epilog="`tokenswift resume DIR`: as --resume DIR. `tokenswift audit --help`: prove that a recorded text is "
        "what plain decoding writes. `tokenswift quality --help`: how a recorded text reads, window by window. "
        "`tokenswift train-heads --help`: train draft heads on text that the model writes.",
    )
    root.stray = "--help lists the flags" if resumes else "the prompt goes behind --prompt, and --help lists the flags"
    root.add_argument("--version", action="version", version=f"tokenswift {__version__}")
    groups = {
        name: root.add_argument_group(name) for name in ("model", "text", "sampling", "drafting", "lossy", "output")
    }
    model, text, output = groups["model"], groups["text"], groups["output"]
    model.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder, a .gguf file or a hub id")
    model.add_argument("--revision", help="of a hub id")
    model.add_argument(
        "--dtype", default="bf16", help="of the weights: bf16, fp32, int8 or gguf (the blocks of a .gguf file)"
    )
    model.add_argument(
        "--kv-dtype", help="of the KV cache: bf16, fp32 or int8 (default: as the weights, bf16 beside int8 and gguf)"
    )
    model.add_argument("--engine", default="auto", help="auto, native (C++, CPU) or torch")
    model.add_argument("--attention", default="auto", help="auto, or a backend of kernels/ (torch engine)")
    model.add_argument("--deterministic", default="auto", help="on, off (cuBLAS) or auto: a row's bits are its own")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    model.add_argument("--threads", type=whole, help="CPU threads")
    source = text.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the prompt itself (default: standard input)")
    source.add_argument("--prompt-file", type=named_path, help="a UTF-8 file that holds the prompt")
    text.add_argument(
        "-e", "--escape", action="store_true",
        help=r"read \n, \t, \r, \\, \" and \xHH in --prompt, --stop, --stop-token, --ban and --dry-breakers as escapes",
    )  # fmt: skip
    text.add_argument("--chapters", metavar="FILE|N", help="follow-up requests: a line each, or N generic ones")
    text.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    text.add_argument(
        "--stop-token", dest="stop_tokens", action="append", default=[], metavar="TOKEN",
        help="end before this token: its id, or its text (repeatable)",
    )  # fmt: skip
    defaults = {f.name: f.default for f in fields(Options) if f.default is not MISSING}
    for name, (group, kind, explained) in OPTION_HELP.items():
        flag = f"--{name.replace('_', '-')}"
        default = defaults[name]
        if kind is None:
            groups[group].add_argument(flag, action="store_true", help=explained)
        else:
            shown = "" if default is None else f" (default: {default})"
            groups[group].add_argument(flag, type=kind, default=default, help=explained + shown)
    sampling = groups["sampling"]
    sampling.add_argument(
        "--dry-breakers", nargs="*", action="extend", metavar="TEXT", help="no repeat is counted across these"
    )
    sampling.add_argument(
        "--ban",
        nargs="*",
        action="extend",
        metavar="TOKEN",
        help="token ids or one-token texts (default: the checkpoint's)",
    )
    sampling.add_argument(
        "--logit-bias", nargs="*", action="extend", default=[], metavar="ID=BIAS", help="added to a token's logit"
    )
    output.add_argument("--out", type=named_path, metavar="DIR", help="journal, text and report go there; new or empty")
    output.add_argument(
        "resume" if resumes else "--resume", type=named_path, metavar="DIR", help="go on with the run in this folder"
    )
    output.add_argument("--extend", type=whole, default=0, metavar="N", help="with --resume: N tokens more")
    output.add_argument("--kv-snapshot", action="store_true", help="keep the KV cache in DIR too, for a quick resume")
    output.add_argument("--baseline", action="store_true", help="decode again without drafts and compare")
    output.add_argument("--quality", action="store_true", help="let the model read windows of the text: perplexity")
    output.add_argument("--quiet", action="store_true", help="no bar, no summary")
    return root


def given_options(root: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """What the command line says itself, without defaults."""
    nothing = argparse.Namespace(**{action.dest: None for action in root._actions})
    given = vars(root.parse_args(arguments, nothing))
    return {name: value for name, value in given.items() if value is not None}
