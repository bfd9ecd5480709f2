"""What do penalties do to the text? Distinct n-grams, self-BLEU, compression and loops, with and without them.

    python experiments/diversity.py --workloads story,manual,records --new 1024 --seeds 2

Each workload is written with its own settings, without its contextual penalty, without DRY, without both, and greedily.
Figures are means over the seeds. Real texts of the same length (Python's documentation and sources) stand beside them.
window_perplexity, bits_per_byte: the median over windows of 1 000 tokens. The model reads each window on its own.
self_bleu: BLEU-4 of each window against all others of the same text (Zhu et al. 2018, Texygen), 0 to 100, by sacrebleu.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from results import Results, Row, add_flags, start
from tokenswift_py import TokenSwift
from tokenswift_py.errors import check, need_extra
from tokenswift_py.quality import decoder, window_quality
from tokenswift_py.runs.report import text_figures
from workloads import WORKLOADS, FreeRun, continuation, free_run

NO_PENALTY, NO_DRY = {"penalty": 1.0}, {"dry_multiplier": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "as given": {},
    "no penalty": NO_PENALTY,
    "no DRY": NO_DRY,
    "neither": NO_PENALTY | NO_DRY,
    "greedy": NO_PENALTY | NO_DRY | {"temperature": 0.0},
}
MOST_WINDOWS = 40  # windows of a text that BLEU compares with one another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--new", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--window", type=int, default=128, help="tokens of a window of self-BLEU")
    parser.add_argument("--threads", type=int, default=2)
    add_flags(parser)
    args = parser.parse_args()
    need_extra("extra", "experiments", "sacrebleu")
    results = Results(
        "diversity",
        "What do penalties do to the diversity of a long text?",
        args,
        guarantees={
            "texts": "those of plain decoding, by law of the engine; drafted, and a function of settings and seed",
            "figures": "exact, of so many texts; one model's, and of no wider meaning",
        },
        axes=("workloads", "variants"),
        peers=("sacrebleu",),
    )
    swift = TokenSwift.from_pretrained(args.model, dtype=args.dtype, threads=args.threads)
    for name, variant in product(args.workloads.split(","), args.variants.split(",")):
        check(variant in VARIANTS, "variants", variant, f"known are {', '.join(VARIANTS)}")
        workload = free_run(name)
        settings = {**workload.settings, **VARIANTS[variant]}
        if variant == "no penalty" and workload.settings.get("penalty", 1.0) == 1.0:
            continue  # this is the variant "as given"
        results.cell(
            {"text": name, "variant": variant},
            lambda workload=workload, settings=settings: written(swift, args, workload, settings),  # type: ignore[misc]
        )
    for name in ("docs", "code"):
        results.cell({"text": name, "variant": "human"}, lambda name=name: human(swift, args, name))  # type: ignore[misc]
    results.save(plot)


def written(swift: TokenSwift, args: argparse.Namespace, workload: FreeRun, settings: dict[str, Any]) -> Row:
    answers = args.new // settings["min_chapter_tokens"] + 1  # no more answers fit, and unused requests cost context
    figures = []
    for seed in range(1, args.seeds + 1):
        result = swift.generate(
            workload.prompt, chapters=workload.chapters[:answers], max_new_tokens=args.new, seed=seed,
            on_loop="ignore", **settings,
        )  # fmt: skip
        figures.append(judged(result.chosen, swift, args.window) | {"loops": len(result.report["loops"])})
    return means(figures)


def human(swift: TokenSwift, args: argparse.Namespace, name: str) -> Row:
    texts = [continuation(name, swift.tokenizer, args.new, start).tokens for start in range(args.seeds)]
    return means([judged(text, swift, args.window) | {"loops": 0} for text in texts])


def judged(tokens: Sequence[int], swift: TokenSwift, window: int) -> Row:
    figures, decode = text_figures(tokens), decoder(swift.tokenizer)
    read = swift.window_perplexity(tokens).summary()
    return {
        "tokens": len(tokens),
        **{f"distinct_{n}": figures[f"distinct_{n}"] for n in (1, 2, 3, 4)},
        "self_bleu": self_bleu(tokens, decode, window),
        "compression": window_quality(tokens, decode, len(tokens)).compression[0],
        "looping": float(figures["looping"]),
        "window_perplexity": read["median"],
        "bits_per_byte": read["bits_per_byte_median"],
    }


def self_bleu(tokens: Sequence[int], decode: Callable[[Sequence[int]], str], window: int) -> float | None:
    """Returns the mean BLEU-4 of each window against the others, None for a text of fewer than two windows."""
    from sacrebleu import sentence_bleu

    texts = [decode(tokens[start : start + window]) for start in range(0, len(tokens) - window + 1, window)]
    texts = texts[:: -(-len(texts) // MOST_WINDOWS)] if texts else texts
    if len(texts) < 2:
        return None
    return statistics.mean(
        sentence_bleu(text, [*texts[:place], *texts[place + 1 :]]).score for place, text in enumerate(texts)
    )


def means(figures: Sequence[Row]) -> Row:
    """Returns the mean of each figure over the texts, None where a text has none. looping: share of texts that loop."""
    columns = {name: [row[name] for row in figures] for name in figures[0]}
    return {name: None if None in values else statistics.mean(values) for name, values in columns.items()}


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws distinct-4 beside self-BLEU, with a group of bars for each text."""
    texts, variants = (list(dict.fromkeys(row[name] for row in rows)) for name in ("text", "variant"))
    for axes, column in zip(figure.subplots(1, 2), ("distinct_4", "self_bleu"), strict=True):
        for place, variant in enumerate(variants):
            bars = [row for row in rows if row["variant"] == variant and row[column] is not None]
            x = [texts.index(row["text"]) + 0.14 * (place - (len(variants) - 1) / 2) for row in bars]
            axes.bar(x, [row[column] for row in bars], 0.13, label=variant)
        axes.set_xticks(range(len(texts)), texts)
        axes.set_title({"distinct_4": "distinct-4", "self_bleu": "self-BLEU"}[column])
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(variants), fontsize=8)


if __name__ == "__main__":
    start(main)
