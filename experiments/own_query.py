"""How much more true attention would a draft keep if each of its rows chose its pages by its own query?

    python experiments/own_query.py --workloads code,docs --lengths 16384,65536 --views 1024,2048,4096 --kept DIR

A draft's view is chosen by what earlier rows looked at, and kept for some rows. The last rows of a real text are
computed over the whole cache here and report their queries and the attention probability on every page, the true
mass. For each row the pages are chosen anew. `kept` is the share of its mass on these pages and after the full ones,
a mean over rows, layers and heads:

- `held` is what the product does: the decayed mean of earlier rows' mass, chosen once for PASS rows.
- The other choices estimate each page's attention from the row's own query q and a summary of the page's keys, which
  a native pass could do before it reads them. `mean` is the keys' mean m: log 64 + q.m. `spread` adds what the
  variance of q.k is worth, from the variance of each channel. `centroids 2` and `centroids 4` are the log of the sum
  of n exp(q.c) over clusters of the page's keys. `parts` and `parts, spread` sum over the page's four runs of 16
  tokens, each as `mean` or `spread` has it. `X + held` is the mean of an estimate's probabilities and of those of
  `held`.
- Bounds: `fresh` is `held` chosen for each row, and `last` the true mass of the row before alone. Both know the mass
  of rows that a draft has not verified yet. `true` chooses by the row's own mass. No choice keeps more.

The queries are those of the target over its whole cache. Those of a draft are a little off, so estimates are no
better in the product than here. `read_of_whole` is the share of the keys and values of all full pages that the choice
and its view read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from recall import PASS, asked, flags, kept, seen, verdicts
from results import Results, Row, start
from speedup import Text
from tokenswift_py import TokenSwift
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.drafters.base import committed
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE, Committed, FloatArray, IntArray, best
from tokenswift_py.kvcache.policies.clusters import k_means
from tokenswift_py.kvcache.policies.mass import Mass
from tokenswift_py.runs.report import rounded

PARTS = 4  # runs of tokens of a page that `parts` sums over
ROUND = 64  # pages whose keys are summarised together
KEPT = torch.bfloat16  # the type that summaries would have


def main() -> None:
    args = flags(__doc__, measured=128, seen=512).parse_args()
    names, lengths, views = asked(args)
    results = Results(
        "own_query",
        "How much more true attention would a draft keep if each row chose its pages by its own query?",
        args,
        guarantees={"mass, bytes": "exact, of so many rows of one text; no times"},
        axes=("workloads", "lengths", "kept"),
    )
    swift = TokenSwift.from_pretrained(args.model, dtype=args.dtype, threads=args.threads)
    check(
        swift.executor.name == "native", "executor", swift.executor.name, "this study reads the native engine's pages"
    )
    spec = swift.checkpoint.spec
    plain = not spec.attention_cap and all(layer.window is None for layer in spec.layer_specs)
    check(plain, "model", args.model, "estimates know neither windows nor caps of attention")
    for name, length in product(names, lengths):
        text = Text(swift, args, name, length, forks=0)
        results.cell(
            {"workload": name, "length": length},
            lambda text=text: rows(text, views),  # type: ignore[misc]
        )
    print(*verdicts(results.rows, "choice", "kept"), sep="\n")
    results.save(plot)


def spread(half: torch.Tensor, size: int) -> torch.Tensor:
    """Returns how far the log of a mean of exp(x) over `size` numbers lies above their mean.

    For numbers drawn from a normal distribution it is half their variance as long as that is below log size. Beyond,
    the largest one is all of it, and no longer as large as the variance says (Derrida 1981, the random energy model).

    half: half the variance.
    """
    most = math.log(size)
    return torch.where(half > most, 2 * (half * most).sqrt() - most, half)


class Summaries:
    """What is kept of the keys of full pages, [layers, kv_heads, pages, ...], as far as they have been read.

    means, variances: of runs of 16 keys, [..., PARTS, d]. Those of a page follow from them.
    clusters: centroids, and the logs of how many keys each has, by the number of clusters.
    """

    def __init__(self) -> None:
        self.means: torch.Tensor | None = None  # [layers, kv_heads, pages, PARTS, d]
        self.variances: torch.Tensor | None = None
        self.clusters: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def pages(self) -> int:
        return 0 if self.means is None else self.means.shape[2]

    def read(self, cache: Any) -> None:
        """Summarises the pages that have become full since."""
        while self.pages < cache.full_pages:
            places = cache.pages[self.pages : cache.full_pages][:ROUND].copy()
            keys = torch.stack([cache.pool.page_keys(layer, places).float() for layer in range(cache.pool.layers)])
            runs = keys.unflatten(3, (PARTS, -1))  # [layers, kv_heads, pages, PARTS, 16, d]
            self.means = joined(self.means, runs.mean(4))
            self.variances = joined(self.variances, runs.var(4, correction=0))
            for count in (2, 4):
                centroids, nearest = k_means(keys.flatten(0, 2).bfloat16().double(), count)
                sizes = torch.nn.functional.one_hot(nearest, count).sum(1).double().log()  # an empty one has -inf
                known = self.clusters.get(count, (None, None))
                shape = keys.shape[:3]
                self.clusters[count] = (
                    joined(known[0], centroids.float().unflatten(0, shape)),
                    joined(known[1], sizes.float().unflatten(0, shape)),
                )

    def logs(self, name: str, queries: torch.Tensor, pages: IntArray) -> torch.Tensor:
        """Returns the log of the attention weight of pages, [layers, kv_heads, group, n].

        queries: [layers, kv_heads, group, d], scaled, as these pages meet them.
        """
        if name.startswith("centroids"):
            centroids, sizes = (part[:, :, pages] for part in self.clusters[int(name.split()[1])])
            products = (queries @ centroids.flatten(2, 3).mT).unflatten(3, centroids.shape[2:4])
            return (products + sizes[:, :, None]).logsumexp(-1)
        assert self.means is not None and self.variances is not None
        means, variances = self.means[:, :, pages], self.variances[:, :, pages]
        if not name.startswith("parts"):  # the variance of a page is that of its runs' means and within these
            mean = means.mean(3, keepdim=True)
            variances = variances.mean(3, keepdim=True) + means.var(3, correction=0, keepdim=True)
            means = mean
        means, variances = (x.to(KEPT).float().flatten(2, 3) for x in (means, variances))
        runs, size = means.shape[2] // len(pages), PAGE_SIZE * len(pages) // means.shape[2]
        logs = queries @ means.mT
        if "spread" in name:
            logs = logs + spread(queries**2 @ variances.mT / 2, size)
        return logs.unflatten(3, (len(pages), runs)).logsumexp(-1) + math.log(size)

    def bytes(self, name: str) -> int:
        """Returns the bytes that an estimate reads of a page for a layer and KV head."""
        assert self.means is not None
        vector = KEPT.itemsize * self.means.shape[-1]
        if name.startswith("centroids"):
            return int(name.split()[1]) * (vector + 1)
        return vector * (2 if "spread" in name else 1) * (PARTS if name.startswith("parts") else 1)


def joined(before: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if before is None else torch.cat([before, more], 2)


ESTIMATES = ("mean", "spread", "centroids 2", "centroids 4", "parts", "parts, spread")
BLENDED = ("spread", "centroids 4", "parts, spread")
WITH_HELD = " + held"


def rows(text: Text, views: Sequence[int]) -> Iterator[Row]:
    """Yields a row for each choice and view."""
    args, source = text.args, text.source
    source.read(text.length - args.measured - args.seen)
    model, cache = source.model, source.cache
    decayed, summaries = Mass(), Summaries()
    before = seen(source, {"mass": decayed}, args.seen)[:, -1]
    found: dict[tuple[str, int], list[float]] = {}
    while cache.length < text.length:
        full = cache.full_pages
        summaries.read(cache)
        held = decayed.score(cache.page_stats())
        chunk = source.tokens[cache.length :][:PASS]
        output = model.forward([Segment(DraftTree.chain(chunk), cache, causal=True)], [], True, True)
        learnt = committed(output, range(len(chunk)), cache.length)
        assert learnt.mass is not None and learnt.queries is not None
        tail = tail_keys(cache)
        for row in range(len(chunk)):
            mass = learnt.mass[:, row : row + 1]
            fresh = decayed.score(cache.page_stats())
            choices = {"held": held, "fresh": fresh, "last": before[..., :full], "true": mass[:, 0, :, :full]}
            for name in ESTIMATES:
                choices[name] = own = shares(summaries, name, learnt, row, tail, full)
                if name in BLENDED:
                    choices[name + WITH_HELD] = own + held / held.sum(-1, keepdims=True) * own.sum(-1, keepdims=True)
            for (name, scores), view in product(choices.items(), views):
                chosen = best(np.asarray(scores, np.float64), min(full, view // PAGE_SIZE))
                found.setdefault((name, view), []).extend(kept(mass, chosen, full))
            before = mass[:, 0]
            decayed.observe(Committed(learnt.start + row, 1, mass))
        cache.commit(range(len(chunk)))
    page = cache.pool.page_bytes
    for (name, view), values in found.items():
        estimate = name.removesuffix(WITH_HELD)
        summary = summaries.bytes(estimate) if estimate in ESTIMATES else 0
        read = min(full, view // PAGE_SIZE) * page + summary * cache.pool.layers * cache.pool.kv_heads * full
        yield {
            "choice": name,
            "view": view,
            "kept": rounded(float(np.mean(values))),
            "read_of_whole": rounded(read / (full * page)),
        }


def tail_keys(cache: Any) -> torch.Tensor:
    """Returns the keys after the full pages, those of the pass included, [layers, kv_heads, PAGE_SIZE * n, d]. What
    lies in lanes after the last row is undefined."""
    places = cache.pages[cache.full_pages :].copy()
    return torch.stack([cache.pool.page_keys(layer, places).flatten(1, 2) for layer in range(cache.pool.layers)])


def shares(summaries: Summaries, name: str, learnt: Committed, row: int, tail: torch.Tensor, full: int) -> FloatArray:
    """Returns an estimate of the attention probability on each full page, summed over the query heads of a KV head's
    group, [layers, kv_heads, full]. The query is that of row `row`, which also meets the keys `tail` up to its own."""
    assert learnt.queries is not None
    position, pages = learnt.start + row, np.arange(full, dtype=np.int32)
    queries = torch.from_numpy(learnt.queries[row]) * learnt.queries.shape[-1] ** -0.5
    met = [(queries, pages)]
    if learnt.turns is not None:
        groups = learnt.turns.groups(position, pages)
        met = [(learnt.turns.turned(queries, position, at), some) for at, some in groups]
    heads = tail.shape[1]
    logs = torch.cat([summaries.logs(name, q.unflatten(1, (heads, -1)), some) for q, some in met], -1)
    near = queries.unflatten(1, (heads, -1)) @ tail[:, :, : position + 1 - full * PAGE_SIZE].mT
    logs = logs[..., np.argsort(np.concatenate([some for _, some in met]))]
    weights = torch.cat([logs, near.logsumexp(-1, keepdim=True)], -1).softmax(-1)
    return weights[..., :full].sum(2).numpy()


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws a panel for each text: the share of a row's mass that each choice keeps, a group of bars for each view."""
    texts = list(dict.fromkeys((row["workload"], row["length"]) for row in rows))
    panels = figure.subplots(1, len(texts), sharex=True, sharey=True, squeeze=False)[0]
    names, views = (list(dict.fromkeys(row[key] for row in rows)) for key in ("choice", "view"))
    for panel, (name, length) in zip(panels, texts, strict=True):
        for i, view in enumerate(views):
            here = {row["choice"]: row["kept"] for row in rows
                    if (row["workload"], row["length"], row["view"]) == (name, length, view)}  # fmt: skip
            places = np.arange(len(names)) + 0.8 * ((i + 0.5) / len(views) - 0.5)
            panel.barh(places, [here.get(choice, 0) for choice in names], 0.8 / len(views), label=f"view {view}")
        panel.set_yticks(np.arange(len(names)), names, fontsize=6)
        panel.set_xlim(max(0, 0.95 * min(row["kept"] for row in rows)), 1)
        panel.set_title(f"{name}, {length} tokens", fontsize=9)
        panel.set_xlabel("true mass kept")
    panels[0].legend(fontsize=6)


if __name__ == "__main__":
    start(main)
