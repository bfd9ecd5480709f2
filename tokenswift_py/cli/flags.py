"""The flags of `tokenswift` and `tokenswift resume`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any

from tokenswift_py.cli.arguments import Parser, named_path, number, whole, whole_or_name
from tokenswift_py.options import Description, Options, described_options
from tokenswift_py.sampling.grammar import Language
from tokenswift_py.sampling.kinds import Choice, Named, Real, Switch, Text, Whole, WholeOr
from tokenswift_py.version import __version__

GROUPS = ("model", "text", "sampling", "drafting", "lossy", "output")
TYPED = (Whole, WholeOr, Real, Choice, Named, Text, Language)  # kinds whose value is one word; other flags stand below
MODEL = ("model", "revision", "dtype", "kv_dtype", "engine", "attention", "deterministic", "device", "threads",
         "pipeline_parallel_size")  # fmt: skip
SINGLE = tuple(
    name
    for name, described in described_options().items()
    if isinstance(described.kind, (*TYPED, Switch)) and described.group != "python"
)


def parser(resumes: bool = False) -> argparse.ArgumentParser:
    """Makes the parser with every flag. The flags of `Options` take their defaults from it.

    resumes: whether it is the parser of `tokenswift resume DIR`.
    """
    root = Parser(
        prog="tokenswift resume" if resumes else "tokenswift",
        description="Go on with the run that was written to DIR. What the text depends on is as recorded."
        if resumes
        else "Long text from a language model, losslessly faster: the text goes to standard output. "
        "For example: tokenswift --prompt 'Write a story about a lighthouse.' --max-new-tokens 2000 --out runs/story",
        epilog="`tokenswift resume DIR`: as --resume DIR. `tokenswift audit --help`: prove that a recorded text is "
        "what plain decoding writes. `tokenswift quality --help`: how a recorded text reads, window by window. "
        "`tokenswift train-heads --help`: train draft heads on text that the model writes. "
        "`tokenswift train-memory --help`: train the gates of a memory of evicted tokens. "
        "`tokenswift extend-context --help`: train a model for a longer context. `tokenswift serve --help`: OpenAI's "
        "API. `tokenswift batch --help`: files of requests.",
    )
    root.stray = "--help lists the flags" if resumes else "the prompt goes after --prompt, and --help lists the flags"
    root.add_argument("--version", action="version", version=f"tokenswift {__version__}")
    groups = {name: root.add_argument_group(name) for name in GROUPS}
    options = described_options()
    text, output = groups["text"], groups["output"]
    model_flags(groups["model"])
    source = text.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the prompt itself (default: standard input)")
    source.add_argument("--prompt-file", type=named_path, help="a UTF-8 file that holds the prompt")
    source.add_argument(
        "--messages", type=named_path, metavar="FILE", help="a JSON file that holds a chat: a list of {role, content}"
    )
    text.add_argument(
        "--template-arg", dest="template_args", action="append", default=[], metavar="NAME=VALUE",
        help=f"{options['template_args'].help} (repeatable; the value is JSON, else a text)",
    )  # fmt: skip
    text.add_argument(
        "-e", "--escape", action="store_true",
        help=r"read \n, \t, \r, \\, \" and \xHH as escapes in --prompt, --system, --stop, --stop-token, --ban, "
        "--ban-words and --dry-breakers",
    )  # fmt: skip
    text.add_argument(
        "--chapters", metavar="FILE|N", help=f"{options['chapters'].help}: a line each, or N generic ones"
    )
    text.add_argument("--stop", action="append", default=[], metavar="TEXT", help=options["stop"].help)
    text.add_argument(
        "--stop-token", dest="stop_tokens", action="append", default=[], metavar="TOKEN",
        help=options["stop_tokens"].help,
    )  # fmt: skip
    defaults = {f.name: f.default for f in fields(Options)}
    for name in SINGLE:
        described, flag = options[name], f"--{name.replace('_', '-')}"
        if isinstance(described.kind, Switch):
            groups[described.group].add_argument(flag, action="store_true", help=described.help)
        else:
            told = described.help + told_default(name)
            groups[described.group].add_argument(flag, type=typed(described), default=defaults[name], help=told)
    sampling = groups["sampling"]
    sampling.add_argument(
        "--dry-breakers", nargs="*", action="extend", metavar="TEXT", help=options["dry_breakers"].help
    )
    sampling.add_argument(
        "--ban",
        nargs="*",
        action="extend",
        metavar="TOKEN",
        help=options["ban"].help + told_default("ban"),
    )
    sampling.add_argument(
        "--ban-words", nargs="*", action="extend", metavar="TEXT",
        help=options["ban_words"].help.partition(";")[0] + told_default("ban_words"),
    )  # fmt: skip
    sampling.add_argument("--n", type=whole, default=1, help="samples of the prompt; with --out in DIR/1, DIR/2 ...")
    sampling.add_argument(
        "--logit-bias", nargs="*", action="extend", default=[], metavar="ID=BIAS", help=options["logit_bias"].help
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


def model_flags(model: Any) -> None:
    """Adds the flags that choose a model and its engine. They are the arguments of `TokenSwift.from_pretrained`, whose
    names are in `MODEL`.

    model: the parser, or a group of its flags.
    """
    told = "smollm2-135m, a folder, a .gguf file or a hub id (owner/name, owner/name:Q4_K_M)"
    model.add_argument("--model", default="smollm2-135m", help=told)
    model.add_argument("--revision", help="of a hub id")
    model.add_argument(
        "--dtype", default="bf16", help="of the weights: bf16, fp32, int8 or gguf (the blocks of a .gguf file)"
    )
    model.add_argument(
        "--kv-dtype", help="of the KV cache: bf16, fp32 or int8 (default: as the weights, bf16 beside int8 and gguf)"
    )
    model.add_argument("--engine", default="auto", help="auto, native (C++, CPU) or torch")
    model.add_argument("--attention", default="auto", help="auto, or a backend of kernels/ (torch engine)")
    model.add_argument(
        "--deterministic", default="auto",
        help="a row's bits are its own: on, blocks (cuBLAS, 64 rows at a time, tested), off (cuBLAS) or auto",
    )  # fmt: skip
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    model.add_argument("--threads", type=whole, help="CPU threads")
    model.add_argument(
        "--pipeline-parallel-size", type=whole, default=1, metavar="N",
        help="stages over which torchrun's processes spread the layers; those of a stage share its heads (default: 1)",
    )  # fmt: skip


def given_options(root: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the options that the command line itself gives, without defaults."""
    nothing = argparse.Namespace(**{action.dest: None for action in root._actions})
    given = vars(root.parse_args(arguments, nothing))
    return {name: value for name, value in given.items() if value is not None}


def typed(described: Description) -> Callable[[str], Any]:
    """Returns the function that makes a value of the word on the command line."""
    if isinstance(described.kind, Whole):
        return whole
    if isinstance(described.kind, WholeOr):
        return whole_or_name
    return number if isinstance(described.kind, Real) else str


def told_default(name: str) -> str:
    """Returns the help's words about an option that is not given."""
    default = getattr(Options, name, None)
    told = described_options()[name].unset if default is None else default
    return f" (default: {told})" if told != "" else ""


def reference() -> str:
    """Returns docs/options.md, which `python -m tokenswift_py.cli.flags` prints."""
    lines = [
        "# Every option of a run\n",
        "Made of `tokenswift_py/options.py` by `python -m tokenswift_py.cli.flags > docs/options.md`.\n",
        "These are the arguments of `TokenSwift.generate` and `.stream`. As flags they have `-` for `_`, but for",
        "`--stop-token` and `--template-arg`, which are given once for each; those of group `python` have no flag.\n",
        "| option | group | default | what it does | changes the text |",
        "|---|---|---|---|---|",
    ]
    groups = ["text", "model", *GROUPS, "python"]
    for f in sorted(fields(Options), key=lambda f: groups.index(f.metadata["option"].group)):
        described: Any = f.metadata["option"]
        given = "none" if f.default in ((), MISSING) else f"`{f.default!r}`"
        default = described.unset if f.default is None else given
        told, default = (text.replace("|", "\\|") for text in (described.help, default))
        lines.append(
            f"| `{f.name}` | {described.group} | {default} | {told} | {'yes' if described.changes_text else 'no'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
