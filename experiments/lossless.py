"""Does drafting change the text? And does the published way to accept a tree of drafts?

    python experiments/lossless.py --models llama,mistral,qwen2,qwen3,smollm2-135m --engines native,torch

There are three parts. identity compares every drafter's tokens with plain decoding's. distribution compares the
transitions of a text over seven tokens with the exact probabilities. paths follows the rule of TokenSwift's published
code (arXiv 2502.18890) beside that of one choice a node. TokenSwift draws the target's tokens anew for each path of the
tree, and keeps the path that matches longest. To draw 27 times favours whatever was drafted. Both rules are followed on
the toy and on real trees of the default model: the three best guesses of each of three draft heads, in every
combination.

total_variation: half the sum of |q - p| over the vocabulary, for q of the rule and p of the target. At least that share
of the tokens is not what the target says, however the two are coupled. For real trees it is that of a pass's first
token. For the toy's text it is that of all its transitions. That of a sample is never quite 0.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from results import Results, Row, add_flags, start
from tokenswift_py import TokenSwift
from tokenswift_py.core import Acceptance, DraftTree, Output, SamplingParams, TreeBuilder
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.passes import without_passes
from tokenswift_py.drafters.base import Context, Drafter
from tokenswift_py.drafters.head_files import find_heads
from tokenswift_py.drafters.heads import Heads
from tokenswift_py.options import Options
from tokenswift_py.runs.assembly import decode_loop
from tokenswift_py.runs.plan import prepare
from tokenswift_py.runs.report import first_divergence
from tokenswift_py.sampling.reference import Sampler
from toys import FAMILIES, Doubles, MarkovModel, chi_square, pairs, save_tiny, transitions, write
from workloads import continuation

SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8, min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "temperature 1, top-k 50, top-p 0.9, penalty, DRY": {
        "temperature": 1.0, "top_k": 50, "top_p": 0.9, "penalty": 1.1, "penalty_window": 64, "dry_multiplier": 0.8,
    },
}  # fmt: skip
WITHOUT_PENALTIES = {name: settings for name, settings in SAMPLERS.items() if name.startswith("temperature 0.8")} | {
    "temperature 1": {"temperature": 1.0},
}
DRAFTERS: dict[str, dict[str, Any]] = {
    "ngram, 12 nodes": {"drafter": "ngram", "draft_tokens": 12},
    "partial": {"drafter": "partial", "draft_weights": "bf16"},
    "partial, int8 draft": {"drafter": "partial", "draft_weights": "int8"},
    "cascade, 8 nodes": {"drafter": "cascade", "draft_tokens": 8},
    "heads, 8 nodes": {"drafter": "heads", "draft_tokens": 8},
    "auto": {"drafter": "auto"},
}
RULES = ("plain decoding", "one choice a node (ours)", "a draw a path (published)")
WIDTH, DEPTH = 3, 3
NODES = sum(WIDTH**level for level in range(DEPTH + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join([*FAMILIES, "smollm2-135m"]), help="tiny ones by family, too")
    parser.add_argument("--engines", default="native,torch", help="native with bf16 weights, torch with fp32")
    parser.add_argument("--prefix", type=int, default=1024, help="tokens of real text before the new ones")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--samples", type=int, default=100_000, help="transitions of the toy's text, for each rule")
    parser.add_argument("--trees", type=int, default=200, help="real trees, for each sampler; 0 leaves them out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    add_flags(parser)
    args = parser.parse_args()
    results = Results(
        "lossless",
        "Does drafting change the text, and does the published way to accept a tree of drafts?",
        args,
        guarantees={
            "identity, engine native": "bitwise",
            "identity, engine torch": "measured: its products round differently with the number of rows",
            "distribution": "a sample, tested by chi-square",
            "paths, real trees": "exact expectations over the rule's own draws; one choice a node is 0 by construction",
        },
        axes=("models", "engines", "samples", "trees"),
    )
    identical = True
    for model, engine in product(args.models.split(","), args.engines.split(",")):
        for name in SAMPLERS:
            key = {"part": "identity", "model": model, "engine": engine, "sampler": name}
            rows = results.cell(key, lambda key=key: identity(args, **key))  # type: ignore[misc]
            identical &= all(row["identical"] for row in rows if row["guarantee"] == "bitwise")
    for name in WITHOUT_PENALTIES:
        for rule in RULES:
            key = {"part": "distribution", "model": "table of 7 tokens", "sampler": name, "rule": rule}
            results.cell({**key, "tokens": args.samples}, lambda key=key: toy(args, **key))  # type: ignore[misc]
        if args.trees:
            key = {"part": "paths", "model": "smollm2-135m", "sampler": name, "passes": args.trees}
            results.cell(key, lambda name=name: real(args, name))  # type: ignore[misc]
    results.save(plot)
    if not identical:
        raise SystemExit("A bitwise engine's text changed with the drafter.")


def identity(args: argparse.Namespace, model: str, engine: str, sampler: str, **_: Any) -> Iterator[Row]:
    """Compares each drafter's text with plain decoding's."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny = model in FAMILIES
        folder = Path(scratch) / model
        if tiny:
            save_tiny(folder, model)
        dtype = "bf16" if engine == "native" else "fp32"
        swift = TokenSwift.from_pretrained(
            str(folder) if tiny else model, dtype=dtype, engine=engine, threads=args.threads
        )
        prompt = continuation("docs", swift.tokenizer, 320 if tiny else args.prefix).tokens
        common = {
            "raw": True, "max_new_tokens": args.new, "seed": args.seed, "ignore_eos": True, "on_loop": "ignore",
            **SAMPLERS[sampler],
        }  # fmt: skip
        plain = swift.generate(prompt, drafter="none", **common)
        for name, settings in DRAFTERS.items():
            if (tiny and settings["drafter"] == "heads") or (engine == "torch" and name.endswith("int8 draft")):
                continue  # random models have no heads, and without Triton torch drafts with the target's weights
            view = {"draft_budget": 64 if tiny else 256} if settings["drafter"] in ("partial", "cascade") else {}
            found = swift.generate(prompt, **common, **settings, **view)
            stats = found.stats
            yield {
                "drafter": name,
                "guarantee": found.report["guarantee"],
                "tokens": len(found.tokens),
                "identical": found.tokens == plain.tokens,
                "first_divergence": first_divergence(found.tokens, plain.tokens),
                "tokens_a_pass": stats.step_tokens / stats.num_spec_steps,
            }


def toy(args: argparse.Namespace, sampler: str, rule: str, **_: Any) -> Row:
    """Counts transitions of one long text over the table's tokens, and compares them with the exact distribution."""
    params = SamplingParams(**WITHOUT_PENALTIES[sampler], seed=args.seed)
    model = MarkovModel(context=args.samples + 100)
    vocab = len(model.table)
    p = transitions(params, model.table.numpy())
    trees = toy_trees(model.table.numpy())
    if rule == RULES[2]:
        text, passes = write_by_paths(trees, p, args.samples, np.random.default_rng(args.seed))
    else:
        drafter = ToyTrees(trees) if rule == RULES[1] else None
        tokens, engine, _ = write(model, [0], args.samples, params, drafter, vocab, draft_tokens=NODES - 1)
        text, passes = [0, *tokens], engine.stats.num_spec_steps
    seen = pairs(text, vocab)
    far = 0.5 * np.abs(seen / np.maximum(1, seen.sum(1, keepdims=True)) - p).sum(1)
    return {
        "tokens_a_pass": (len(text) - 1) / passes,
        "total_variation": float(far @ seen.sum(1) / seen.sum()),
        "chi_square_p": chi_square(seen, p),
    }


def toy_trees(table: Doubles) -> list[DraftTree]:
    """Makes a full tree after each token, of the likeliest tokens by a draft that is somewhat off."""
    best = np.argsort(-(table + np.random.default_rng(1).normal(0, 1, table.shape)))[:, :WIDTH]
    return [full_tree(token, lambda path: best[path[-1]].tolist()) for token in range(len(table))]


def full_tree(pending: int, children: Callable[[tuple[int, ...]], Sequence[int]]) -> DraftTree:
    """Makes a tree of WIDTH ** DEPTH paths. children: function from a path, `pending` first, to the next tokens."""
    builder, level = TreeBuilder(pending), [((pending,), 0)]
    for _ in range(DEPTH):
        below = []
        for path, node in level:
            for token in children(path):
                child = builder.add(node, token)
                assert child is not None
                below.append(((*path, token), child))
        level = below
    return builder.build()


def path_nodes(tree: DraftTree) -> np.ndarray:
    """Returns the nodes from the root to each leaf of a full tree, [paths, DEPTH + 1]."""
    paths, node = [], np.flatnonzero(tree.depth == DEPTH)
    for _ in range(DEPTH + 1):
        paths.append(node)
        node = tree.parents[node]
    return np.stack(paths[::-1], axis=1)


class ToyTrees(Drafter):
    """A drafter that always proposes the same tree after a token."""

    name = "toy"

    def __init__(self, trees: list[DraftTree]):
        self.trees = trees

    @without_passes
    def propose(self, context: Context, budget: int) -> DraftTree:
        pending = context.history[-1]
        return self.trees[pending] if budget >= NODES else DraftTree.chain([pending])


def write_by_paths(trees: list[DraftTree], p: Doubles, count: int, rng: np.random.Generator) -> tuple[list[int], int]:
    """Writes a text of `count` tokens after token 0 by the published rule. Returns it and the number of passes.

    p: [vocab, vocab] transition probabilities.
    """
    text, passes = [0], 0
    nodes = [path_nodes(tree) for tree in trees]
    while len(text) <= count:
        text += pass_by_paths(trees[text[-1]].tokens[nodes[text[-1]]], p.cumsum(1), rng)
        passes += 1
    return text[: count + 1], passes


def pass_by_paths(tokens: np.ndarray, below: Doubles, rng: np.random.Generator) -> list[int]:
    """Returns the tokens of one pass by the published rule.

    tokens: [paths, DEPTH + 1]. below: [vocab, vocab] cumulative transition probabilities.
    """
    uniform = rng.random(tokens.shape)[..., None] * below[tokens][..., -1:]
    drawn = (uniform >= below[tokens]).sum(-1)
    lengths = np.cumprod(drawn[:, :-1] == tokens[:, 1:], axis=1).sum(1)
    best = int(lengths.argmax())
    return [int(token) for token in drawn[best, : lengths[best] + 1]]


def first_token(tree: DraftTree, p: Callable[[int], Doubles]) -> tuple[Doubles, float, float]:
    """Computes the exact distribution [vocab] of the first token that the published rule emits.

    The two other results are the drafts of a full tree that this rule, and one choice a node, accept on average.
    p: function from a node to the target's distribution [vocab] after it.
    """
    nodes, root = path_nodes(tree), p(0)
    right = np.ones(len(tree))
    for node in range(len(tree) - 1, 0, -1):
        right[node] = p(int(tree.parents[node]))[tree.tokens[node]]
    reach = np.cumprod(right[nodes], axis=1)  # [paths, DEPTH + 1] the chance that a path's draws match so far
    beyond = np.concatenate([reach[:, 1:], np.zeros((len(nodes), 1))], axis=1)
    q = np.zeros_like(root)
    for length in range(DEPTH + 1):
        under, up_to = 1 - reach[:, length], 1 - beyond[:, length]  # chances of a shorter match, and of no longer one
        for path in range(len(nodes)):  # a path wins with this length if no earlier one has it and no later one more
            wins = (reach - beyond)[path, length] * under[:path].prod() * up_to[path + 1 :].prod()
            if length:
                q[tree.tokens[nodes[path, 1]]] += wins
            elif path == 0:  # if no path matches anything, the first one wins, with its own draw
                other = root.copy()
                other[tree.tokens[nodes[0, 1]]] = 0
                q += wins * other / max(other.sum(), 1e-300)
    longest = sum(1 - float((1 - reach[:, length]).prod()) for length in range(1, DEPTH + 1))
    node_reach = np.ones(len(tree))
    for node in range(1, len(tree)):
        node_reach[node] = node_reach[tree.parents[node]] * right[node]
    return q, longest, float(node_reach[1:].sum())


class Published(Heads):
    """Drafts TokenSwift's static tree from the heads' best guesses, and computes its rule's result without using it."""

    def __init__(self, swift: TokenSwift, sampler: Sampler, history: History):
        checkpoint = swift.checkpoint
        embedding = checkpoint.tensors()["model.embed_tokens.weight"]
        super().__init__(find_heads(checkpoint).to(torch.device("cpu")), embedding)
        self.sampler, self.history = sampler, history
        self.found: list[Row] = []
        self._tree = DraftTree.chain([0])

    def tree(self, row: torch.Tensor, context: Context, budget: int) -> DraftTree:
        pending = token = context.history[-1]
        x, levels = row.float()[None], []  # type: torch.Tensor, list[list[int]]
        for head in range(DEPTH):
            x, state = self.weights.step(head, x, self.embedding[token][None].float())
            levels.append(self.weights.project(state, [head], context.self_draft)[0].topk(WIDTH).indices.tolist())
            token = levels[-1][0]
        full = budget >= NODES
        self._tree = full_tree(pending, lambda path: levels[len(path) - 1]) if full else DraftTree.chain([pending])
        return self._tree

    def observe(self, taken: Acceptance, output: Output) -> None:
        super().observe(taken, output)
        if len(self._tree) < NODES:
            return
        known: dict[int, Doubles] = {}

        def p(node: int) -> Doubles:
            if node not in known:
                known[node] = distribution(self.sampler, output.logits[node], self.history)
            return known[node]

        q, by_path, by_node = first_token(self._tree, p)
        self.found.append({"far": 0.5 * float(np.abs(q - p(0)).sum()), "by_path": by_path, "by_node": by_node})


def distribution(sampler: Sampler, logits: torch.Tensor, history: History) -> Doubles:
    """Returns the distribution [vocab] that a sampler draws from."""
    scores = sampler.process(logits, history) / sampler.params.temperature
    scores[scores < sampler.floor(scores)] = -np.inf
    p = np.exp(scores - scores.max())
    return np.asarray(p / p.sum())


def real(args: argparse.Namespace, name: str) -> Iterator[Row]:
    """Computes both rules over the trees of a real text. The text itself is written losslessly."""
    swift = TokenSwift.from_pretrained(threads=args.threads)
    prompt = continuation("docs", swift.tokenizer, args.prefix).tokens
    options = Options(
        raw=True, max_new_tokens=(DEPTH + 1) * args.trees + NODES, seed=args.seed, drafter="heads",
        draft_tokens=NODES - 1, ignore_eos=True, on_loop="ignore", **WITHOUT_PENALTIES[name],
    )  # fmt: skip
    loop = decode_loop(swift, prepare(swift, prompt, options))
    loop.drafter = drafter = Published(swift, loop.sampler, loop.history)
    for _ in loop.run(prompt):
        if len(drafter.found) >= args.trees:
            break
    mean = {of: float(np.mean([row[of] for row in drafter.found])) for of in ("far", "by_path", "by_node")}
    common = {"tokens": loop.stats.new_tokens}
    yield {**common, "rule": RULES[1], "tokens_a_pass": 1 + mean["by_node"], "total_variation": 0.0}
    yield {**common, "rule": RULES[2], "tokens_a_pass": 1 + mean["by_path"], "total_variation": mean["far"]}


def plot(figure: Any, rows: list[Row]) -> None:
    rows = [row for row in rows if row["part"] != "identity"]
    axes = figure.subplots()

    def group(row: Row) -> tuple[str, str]:
        return row["model"] + (": a pass's first token" if row["part"] == "paths" else ""), row["sampler"]

    groups = list(dict.fromkeys(map(group, rows)))
    for place, rule in enumerate(RULES):
        bars = [row for row in rows if row["rule"] == rule]
        x = [groups.index(group(row)) + 0.27 * (place - 1) for row in bars]
        drawn = axes.bar(x, [1000 * row["total_variation"] for row in bars], 0.25, label=rule)
        axes.bar_label(drawn, fmt="%.0f")
    axes.set_xticks(range(len(groups)), ["\n".join(label) for label in groups], fontsize=7)
    axes.set_ylabel("of 1000 tokens, not the target's (at least)")
    axes.set_title("Total variation from the target's distribution")
    axes.legend()


if __name__ == "__main__":
    start(main)
