"""How much attention falls on the pages that a policy chooses, by the bytes that choosing and reading them takes?

    python experiments/recall.py --workloads code,docs --lengths 16384 --views 1024,2048,4096 --kept DIR

The last rows of a real text are computed over the whole cache, PASS at a time, and report the attention probability on
every page: the true mass. Before each pass every policy, which has seen all rows up to there, chooses its pages. The
share of the rows' mass that lies on these pages and after the full ones is measured, as a mean over rows, layers and
heads. `own` is the share of the row that the policy saw last, whose queries choose its own pages in RetrievalAttention.
`next` is that of the row after it, and `later` that of the PASS rows after it, which a view is kept for. `alike` is the
same as `later`, except that all layers and heads keep the same pages, chosen as an eviction chooses them. `best` is no
policy: it chooses by the true mass of the row seen last, so no choice of pages has a higher `own`.

Bytes are counted for one row. `chosen_by_bytes` are those of the keys, or of what is kept of them, that a choice reads.
`view_bytes` are those of the keys and values of the chosen pages. `read_of_whole` sets both against the keys and values
of all full pages, which plain decoding reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from results import Results, Row, add_flags, start
from speedup import Text
from tokenswift_py import TokenSwift, registry
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.decoding.eviction import STATISTICS_ROWS, pooled
from tokenswift_py.drafters.base import committed
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE, Committed, FloatArray, IntArray, PageStats, best
from tokenswift_py.runs.report import rounded
from workloads import CONTINUATIONS

POLICIES = "tokenswift_py.kvcache.policies"
PASS = 8  # the rows of a pass, for which a view is kept


def main() -> None:
    parser = flags(__doc__, measured=256, seen=1024)
    parser.add_argument("--policies", default=",".join(registry.names(POLICIES)))
    args = parser.parse_args()
    names, lengths, views = asked(args)
    policies = args.policies.split(",")
    for name in policies:
        registry.module(POLICIES, "policies", name)
    results = Results(
        "recall",
        "How much true attention mass is on the pages that a policy chooses, by the bytes that this reads?",
        args,
        guarantees={"mass, bytes": "exact, of so many rows of one text; no times"},
        axes=("workloads", "lengths", "kept"),
    )
    swift = TokenSwift.from_pretrained(args.model, dtype=args.dtype, threads=args.threads)
    for name, length in product(names, lengths):
        text = Text(swift, args, name, length, forks=0)
        results.cell(
            {"workload": name, "length": length},
            lambda text=text: rows(text, policies, views),  # type: ignore[misc]
        )
    print(*verdicts(results.rows, "policy", "later"), sep="\n")
    results.save(plot)


def flags(about: str | None, measured: int, seen: int) -> argparse.ArgumentParser:
    """Returns the flags of an experiment that measures mass on pages. measured, seen: their defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--workloads", default="code,docs", help=", ".join(CONTINUATIONS))
    parser.add_argument("--lengths", default="16384", help="tokens of the text")
    parser.add_argument("--views", default="1024,2048,4096", help="tokens of a view")
    parser.add_argument(
        "--measured", type=int, default=measured, help="rows whose mass is measured, the last of the text"
    )
    parser.add_argument("--seen", type=int, default=seen, help="tokens before them that policies learn from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kept", type=Path, metavar="DIR", help="keep the KV of prefixes there, as speedup.py does")
    parser.set_defaults(cuts=1, new=256, seed=1)  # as in speedup.py, so that a kept prefix serves both
    add_flags(parser)
    return parser


def asked(args: argparse.Namespace) -> tuple[list[str], list[int], list[int]]:
    """Returns the workloads, lengths and views of these flags. Raises UserError for what cannot be measured."""
    names = args.workloads.split(",")
    lengths, views = ([int(n) for n in value.split(",")] for value in (args.lengths, args.views))
    for name in names:
        check(name in CONTINUATIONS, "workloads", name, f"known are {', '.join(CONTINUATIONS)}")
    check(args.measured >= PASS and args.measured % PASS == 0, "measured", args.measured, f"a multiple of {PASS}")
    check(args.seen >= 1, "seen", args.seen, "at least 1")
    room = min(lengths) - args.measured - args.seen - PAGE_SIZE
    check(max(views) <= room, "views", max(views), f"at most {room}, so that pages are left out")
    return names, lengths, views


class Reading:
    """A pool that counts the bytes that a policy reads of it to choose pages.

    Keys that are read once, when a page is full, to make something that is kept of it, do not count.
    """

    def __init__(self, pool: Any):
        self.pool, self.layers, self.bytes = pool, pool.layers, 0

    def key_bounds(self, pages: IntArray) -> Any:
        bounds = self.pool.key_bounds(pages)
        self.bytes += sum(bound.nbytes for bound in bounds)
        return bounds

    def key_scores(self, pages: IntArray, queries: Any) -> Any:
        self.bytes += len(pages) * self.pool.page_bytes // 2
        return self.pool.key_scores(pages, queries)

    def page_keys(self, layer: int, pages: IntArray) -> Any:
        return self.pool.page_keys(layer, pages)


class Best:
    """Scores pages by the true mass of the row seen last."""

    name, needs = "best", frozenset({"mass"})

    def observe(self, rows: Committed) -> None:
        assert rows.mass is not None
        self.mass = rows.mass[:, -1].copy()

    def score(self, stats: PageStats) -> FloatArray:
        return self.mass[..., : stats.pages]


def rows(text: Text, names: Sequence[str], views: Sequence[int]) -> Iterator[Row]:
    """Yields a row for each policy and view."""
    args, source = text.args, text.source
    source.read(text.length - args.measured - args.seen)
    policies: dict[str, Any] = {name: registry.create(POLICIES, "POLICY", "policies", name) for name in names}
    policies[Best.name] = Best()
    found: dict[tuple[str, int], dict[str, list[float]]] = {
        key: {figure: [] for figure in ("own", "next", "later", "alike")} for key in product(policies, views)
    }
    read = dict.fromkeys(policies, 0)
    cache, before = source.cache, seen(source, policies, args.seen)
    while cache.length < text.length:
        full, scores = cache.full_pages, {}
        for name, policy in policies.items():
            pool = Reading(cache.pool)
            scores[name] = np.asarray(policy.score(replace(cache.page_stats(), pool=pool)))
            read[name] = pool.bytes + getattr(policy, "nbytes", 0)
        mass = seen(source, policies, PASS)
        for (name, view), shares in found.items():
            chosen, together = pages_of(scores[name], view // PAGE_SIZE)
            later = kept(mass, chosen, full)
            shares["own"].append(kept(before[:, -1:], chosen, full)[0])
            shares["next"].append(later[0])
            shares["later"].extend(later)
            shares["alike"].extend(kept(mass, together, full))
        before = mass
    whole = full * cache.pool.page_bytes
    for (name, view), shares in found.items():
        of_view = min(full, view // PAGE_SIZE) * cache.pool.page_bytes
        yield {
            "policy": name,
            "view": view,
            **{figure: rounded(float(np.mean(values))) for figure, values in shares.items()},
            "chosen_by_bytes": read[name],
            "view_bytes": of_view,
            "read_of_whole": rounded((read[name] + of_view) / whole),
        }


def seen(source: Any, policies: Mapping[str, Any], count: int) -> FloatArray:
    """Computes and commits the next `count` rows of a text, shows them to the policies, and returns the mass of those
    of the last pass, [layers, rows, kv_heads, pages]."""
    needs = {need for policy in policies.values() for need in policy.needs}
    model, cache = source.model, source.cache
    while count:
        chunk = source.tokens[cache.length :][: min(count, STATISTICS_ROWS)]
        segment = Segment(DraftTree.chain(chunk), cache, causal=True)
        output = model.forward([segment], [], want_mass=True, want_queries="queries" in needs)
        learnt = committed(output, range(len(chunk)), cache.length)
        for policy in policies.values():
            policy.observe(learnt)
        assert learnt.mass is not None
        mass = learnt.mass.copy()
        cache.commit(range(len(chunk)))
        count -= len(chunk)
    return mass


def pages_of(scores: FloatArray, count: int) -> tuple[IntArray, IntArray]:
    """Returns the pages that a view holds and those that an eviction would leave, both [layers, kv_heads, count]."""
    count = min(count, scores.shape[-1])
    together = best(pooled(scores.astype(np.float64), count), count)
    return best(scores, count), np.broadcast_to(together, (*scores.shape[:2], count))


def kept(mass: FloatArray, chosen: IntArray, full: int) -> list[float]:
    """Returns the share of each row's mass on the chosen pages and after the full ones, over layers and heads.

    mass: [layers, rows, kv_heads, pages]. chosen: [layers, kv_heads, n]. full: full pages when they were chosen.
    """
    here = np.take_along_axis(mass[..., :full], chosen[:, None], -1).sum(-1) + mass[..., full:].sum(-1)
    return [float(share) for share in (here / mass.sum(-1)).mean((0, 2))]


def verdicts(rows: Sequence[Row], name: str, share: str) -> list[str]:
    """Returns a line for each text and view: what chose the pages, by the share of the mass that it keeps.

    name, share: the columns of both.
    """
    lines = []
    for key in dict.fromkeys((row["workload"], row["length"], row["view"]) for row in rows):
        here = [row for row in rows if (row["workload"], row["length"], row["view"]) == key]
        ranked = sorted(here, key=lambda row: -row[share])
        shares = ", ".join(f"{row[name]} {row[share]:.3f}" for row in ranked)
        lines.append("{} of {} tokens, view of {}: ".format(*key) + shares)
    return lines


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws a panel for each text: the share of later rows' mass against the bytes read, a line for each policy."""
    texts = list(dict.fromkeys((row["workload"], row["length"]) for row in rows))
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for panel, (name, length) in zip(panels, texts, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            here = [row for row in rows if (row["workload"], row["length"], row["policy"]) == (name, length, policy)]
            style = "k:" if policy == Best.name else "o-"
            panel.plot([r["read_of_whole"] for r in here], [r["later"] for r in here], style, label=policy)
        panel.set_title(f"{name}, {length} tokens", fontsize=9)
        panel.set_xlabel("bytes read, of the whole cache's")
    panels[0].set_ylabel("true mass kept")
    panels[-1].legend(fontsize=6)


if __name__ == "__main__":
    start(main)
