"""Does a text hold up over its length? Distinct-4, compression and loops, window by window.

    python experiments/quality.py runs/story ...

Each folder is one that `generate.py --out` wrote. Human texts stand beside them: documentation of Python and of this
project.
"""

from __future__ import annotations

import argparse
import json
import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenswift_py.stats import distinct_n, find_loop

WINDOW = 2000


@dataclass(frozen=True)
class WindowQuality:
    """distinct_4:  different 4-grams over all 4-grams, per window; low where a text repeats itself.
    compression: UTF-8 bytes over their zlib (level 9) size, per window; high where a text repeats itself in any way,
                 low in word salad.
    looping:     the windows in which one block is said over and over (`stats.find_loop`).
    """

    distinct_4: tuple[float, ...]
    compression: tuple[float, ...]
    looping: tuple[int, ...]

    def summary(self) -> dict[str, float | int]:
        """Median and worst of the windows, which is the lowest distinct-4 and the highest compression."""
        return {
            "windows": len(self.distinct_4),
            "distinct_4_median": statistics.median(self.distinct_4),
            "distinct_4_worst": min(self.distinct_4),
            "compression_median": statistics.median(self.compression),
            "compression_worst": max(self.compression),
            "looping_windows": len(self.looping),
        }


def window_quality(
    tokens: Sequence[int], decode: Callable[[Sequence[int]], str], window: int = WINDOW
) -> WindowQuality:
    """Of windows of so many tokens, one behind the other; a rest is left out, but a shorter text is one window.

    tokens: those that the model chose, without forced ones. Raises ValueError for fewer than four.
    """
    if len(tokens) < 4:
        raise ValueError(f"tokens: {len(tokens)} is not allowed; at least 4")
    starts = range(0, max(1, len(tokens) - window + 1), window)
    windows = [tokens[start : start + window] for start in starts]
    texts = [decode(part).encode() for part in windows]
    return WindowQuality(
        tuple(distinct_n(part, 4) or 0.0 for part in windows),
        tuple(len(text) / len(zlib.compress(text, 9)) for text in texts),
        tuple(number for number, part in enumerate(windows) if find_loop(part)),
    )


def chosen_tokens(folder: Path) -> list[int]:
    """What the model wrote of a run: every token behind the prompt but the forced ones."""
    tokens = np.load(folder / "tokens.npy", allow_pickle=False)
    kept = np.ones(len(tokens), np.bool_)
    for start, stop in json.loads((folder / "report.json").read_text(encoding="utf-8"))["forced"]:
        kept[start:stop] = False
    return [int(token) for token in tokens[kept]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer it was")
    parser.add_argument("--window", type=int, default=WINDOW)
    args = parser.parse_args()

    from tokenswift_py.loading import open_checkpoint
    from workloads import continuation

    tokenizer = open_checkpoint(args.model, None, "bf16").tokenizer()
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    texts = {str(run): chosen_tokens(run) for run in args.runs}
    texts["README.md"] = list(tokenizer(readme, add_special_tokens=False).input_ids)
    texts |= {name: continuation(name, tokenizer, 20_000).tokens for name in ("docs", "code")}
    for name, tokens in texts.items():
        quality = window_quality(tokens, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), args.window)
        print(json.dumps({"text": name, **{key: round(value, 3) for key, value in quality.summary().items()}}))


if __name__ == "__main__":
    main()
