"""How often is a guess drafted under a view right, by the policy that chose its pages and by how many there are?

    python experiments/acceptance.py --workloads code,docs --lengths 16384,65536 --views 1024,2048,4096 --kept DIR

After a real prefix, chains of CHAIN guesses without runners-up are drafted under a view and walked over the whole
cache. A guess is put to the test if all before it in its chain were right. `acceptance` is the share of those that were
right. Every setting drafts the same text, plain decoding's (`text` is a hash of it). A view is chosen anew after a
wrong guess, after a full page and after 8 tokens. `fresh` counts guesses under a view that was chosen in their own
round.

Policies learn from attention. In a long run they see the attention of every row written. Of a prompt they are shown
only the last SEEN_ROWS rows, which tell h2o, a mean over a page's life, next to nothing. So all of them are shown the
last `--seen` tokens of the prefix before they draft, as if those had been written. recent needs none, and quest and
importance look at the last row alone.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from ablations import Varied
from results import Results, Row, add_flags, start
from speedup import Text
from tokenswift_py import TokenSwift, registry
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.decoding.eviction import STATISTICS_ROWS
from tokenswift_py.decoding.loop import SEEN_ROWS
from tokenswift_py.decoding.statistics import distinct_n, find_loop
from tokenswift_py.drafters.base import committed
from tokenswift_py.drafters.partial import Partial
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE, EvictionPolicy
from tokenswift_py.options import Options
from tokenswift_py.runs.report import rounded
from workloads import CONTINUATIONS

POLICIES = "tokenswift_py.kvcache.policies"
CHAIN = 4  # the number of guesses of a round
WANTED = 0.92  # the acceptance that the best policy should reach with the largest view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--workloads", default="code,docs", help=", ".join(CONTINUATIONS))
    parser.add_argument("--lengths", default="16384,65536", help="tokens before those that are drafted")
    parser.add_argument("--policies", default=",".join(registry.names(POLICIES)))
    parser.add_argument("--views", default="1024,2048,4096", help="tokens of a view")
    parser.add_argument("--weights", default="int8,bf16", help="of drafts: int8, int4, bf16 (the model's own)")
    parser.add_argument("--new", type=int, default=128, help="tokens written; guesses tested are nearly as many")
    parser.add_argument("--seen", type=int, default=1024, help="tokens of the prefix that policies learn from")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--min-p", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kept", type=Path, metavar="DIR", help="keep the KV of prefixes there, as speedup.py does")
    parser.set_defaults(cuts=1)
    add_flags(parser)
    args = parser.parse_args()
    names, policies, weights = (value.split(",") for value in (args.workloads, args.policies, args.weights))
    lengths, views = ([int(n) for n in value.split(",")] for value in (args.lengths, args.views))
    for name in names:
        check(name in CONTINUATIONS, "workloads", name, f"known are {', '.join(CONTINUATIONS)}")
    check(args.seen >= SEEN_ROWS, "seen", args.seen, f"at least {SEEN_ROWS}, which every drafter is shown")
    check(max(views) + PAGE_SIZE <= min(lengths), "views", max(views), "a page less than the lengths, to leave one out")
    settings = [*product(policies, views, weights)]
    for setting in settings:
        Options.of(**drafting(*setting))
    results = Results(
        "acceptance",
        "How often is a guess drafted under a view right, by page policy and view budget?",
        args,
        guarantees={
            "text": "bitwise on the native engine, measured on torch: the same for all settings",
            "acceptance, depths": "exact, of so many guesses tested, in one text a workload and length",
        },
        axes=("workloads", "lengths", "policies", "views", "weights", "kept"),
    )
    swift = TokenSwift.from_pretrained(args.model, dtype=args.dtype, threads=args.threads)
    for name, length in product(names, lengths):
        prefix = Taught(swift, args, name, length, forks=1)
        for policy, view, kind in settings:
            results.cell(
                {"workload": name, "length": length, "policy": policy, "view": view, "weights": kind},
                lambda prefix=prefix, setting=(policy, view, kind): accepted(prefix, *setting),  # type: ignore[misc]
            )
    print(*verdicts(results.rows), sep="\n")
    results.save(plot)


def drafting(policy: str, view: int, weights: str) -> dict[str, Any]:
    """Returns the fields of Options that make a setting."""
    fixed = {"drafter": "partial", "draft_tokens": CHAIN}
    return {**fixed, "draft_policy": policy, "draft_budget": view, "draft_weights": weights}


class Taught(Text):
    """A workload, with policies that have seen the rows of its end."""

    @cached_property
    def policies(self) -> dict[str, EvictionPolicy]:
        """Returns the policies in their state SEEN_ROWS before the end of the prefix, which is read up to there."""
        source = self.source
        source.read(max(0, self.length - self.args.seen))
        made: dict[str, EvictionPolicy] = {
            name: registry.create(POLICIES, "POLICY", "policies", name) for name in self.args.policies.split(",")
        }
        needs = {need for policy in made.values() for need in policy.needs}
        model, cache = source.model, source.cache
        while (missing := self.length - SEEN_ROWS - cache.length) > 0:
            rows = range(min(STATISTICS_ROWS, missing))
            chunk = DraftTree.chain(source.tokens[cache.length :][: len(rows)])
            segment = Segment(chunk, cache, causal=True)
            output = model.forward([segment], [], want_mass="mass" in needs, want_queries="queries" in needs)
            for policy in made.values():
                policy.observe(committed(output, rows, cache.length))
            cache.commit(rows)
        return made

    def drafter(self, policy: str, view: int) -> Partial:
        drafter = Partial(policy=policy, view_tokens=view, width=1)
        drafter.views.policy = copy.deepcopy(self.policies[policy])
        return drafter


def accepted(prefix: Taught, policy: str, view: int, weights: str) -> Row:
    swift, new = prefix.swift, prefix.args.new
    drafter = prefix.drafter(policy, view)
    rounds: list[dict[str, Any]] = []
    writer = Varied(policy, drafting(policy, view, weights), make=lambda: drafter)
    writer.start(swift, prefix.run(prefix.length), prefix.source.cache.fork(), None)
    assert writer.loop is not None
    writer.loop.trace = rounds.append
    writer.write(new)
    writer.loop.cache.release()
    text = writer.tokens[:new]
    return {
        **figures(rounds),
        "text": hashlib.sha256(str(text).encode()).hexdigest()[:8],
        "distinct_4": rounded(distinct_n(text, 4)),
        "looping": find_loop(text) is not None,
    }


def figures(rounds: Iterable[Mapping[str, Any]]) -> Row:
    """Counts the right guesses of those tested, in chains that were walked.

    rounds: records of the engine's trace. Figures are for all guesses, by their place in the chain, and by whether the
    view was chosen in that round.
    """
    tested, right = ({(d, fresh): 0 for d in range(CHAIN) for fresh in (True, False)} for _ in range(2))
    for record in rounds:
        guesses, good = len(record["tree"]["tokens"]) - 1, len(record["path"]) - 1
        fresh = record["drafter"]["view_age"] == 0
        for depth in range(min(guesses, good + 1)):
            tested[depth, fresh] += 1
            right[depth, fresh] += depth < good

    def share(keys: Iterable[tuple[int, bool]]) -> float | None:
        keys = list(keys)
        count = sum(tested[key] for key in keys)
        return rounded(sum(right[key] for key in keys) / count) if count else None

    return {
        "acceptance": share(tested),
        "right": sum(right.values()),
        "tested": sum(tested.values()),
        **{f"depth_{d + 1}": share([(d, True), (d, False)]) for d in range(CHAIN)},
        "fresh": share(key for key in tested if key[1]),
        "old": share(key for key in tested if not key[1]),
    }


def pooled(rows: Iterable[Row]) -> float | None:
    """Returns the acceptance of all guesses of these rows together."""
    found = list(rows)
    tested = sum(row["tested"] for row in found)
    return sum(row["right"] for row in found) / tested if tested else None


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each question, length and kind of weights, over all workloads together.

    The questions are which acceptance the best policy reaches with the smallest and with the largest view. The best is
    picked by the same guesses that it is judged by, which favours it.
    """
    lines = []
    for length, weights in dict.fromkeys((row["length"], row["weights"]) for row in rows):
        here = [row for row in rows if (row["length"], row["weights"]) == (length, weights)]
        behind, views = f"after {length} tokens, {weights}", [row["view"] for row in here]
        (few, best_few), (many, best_many) = (best(here, size(views)) for size in (min, max))
        recent = pooled(row for row in here if (row["policy"], row["view"]) == ("recent", max(views)))
        if recent is not None:
            beats = "beats" if best_few > recent else "does not beat"
            lines.append(
                f"{behind}: {few} with {min(views)} ({best_few:.3f}) {beats} recent with {max(views)} ({recent:.3f})"
            )
        reaches = "reaches" if best_many >= WANTED else "does not reach"
        lines.append(f"{behind}: {many} with {max(views)} ({best_many:.3f}) {reaches} {WANTED}")
    for name, length in dict.fromkeys((row["workload"], row["length"]) for row in rows):
        texts = {row["text"] for row in rows if (row["workload"], row["length"]) == (name, length)}
        if len(texts) > 1:
            lines.append(f"{name} after {length} tokens: THE SETTINGS WROTE DIFFERENT TEXTS")
    return lines


def best(rows: Iterable[Row], view: int) -> tuple[str, float]:
    """Returns the policy with the highest acceptance under views of this size, and its acceptance."""
    found = [row for row in rows if row["view"] == view]
    shares = {row["policy"]: pooled(r for r in found if r["policy"] == row["policy"]) or 0.0 for row in found}
    return max(shares.items(), key=lambda item: item[1])


def plot(figure: Any, rows: list[Row]) -> None:
    """Draws a panel for each length: acceptance against the view, all workloads together. int8 drafts are dashed."""
    lengths, policies = (list(dict.fromkeys(row[name] for row in rows)) for name in ("length", "policy"))
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for panel, length in zip(panels, lengths, strict=True):
        for weights, (place, policy) in product(dict.fromkeys(row["weights"] for row in rows), enumerate(policies)):
            here = [row for row in rows if (row["length"], row["policy"], row["weights"]) == (length, policy, weights)]
            views = sorted({row["view"] for row in here})
            shares = [pooled(row for row in here if row["view"] == view) for view in views]
            style = "s--" if weights == "int8" else "o-"
            panel.plot(views, shares, style, color=f"C{place}", linewidth=0.8, label=f"{policy}, {weights}")
        panel.axhline(WANTED, color="gray", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes := sorted({row["view"] for row in rows}), [str(size) for size in sizes])
        panel.set_title(f"after {length} tokens", fontsize=9)
        panel.set_xlabel("tokens of the view")
    panels[0].set_ylabel("guesses right, of those tested")
    panels[-1].legend(fontsize=6)


if __name__ == "__main__":
    start(main)
