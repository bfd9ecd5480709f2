"""The published path rule, as the experiment follows it: its bias is what the exact expectations say."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from lossless import (
    DEPTH,
    NODES,
    WIDTH,
    ToyTrees,
    distribution,
    first_token,
    full_tree,
    pass_by_paths,
    path_nodes,
    toy_trees,
    write_by_paths,
)
from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.sampling.reference import Sampler
from toys import MarkovModel, chi_square, pairs, transitions, write


def test_a_full_tree_has_every_path() -> None:
    tree = full_tree(9, lambda path: [0, 1, 2])
    nodes = path_nodes(tree)
    assert len(tree) == NODES and nodes.shape == (WIDTH**DEPTH, DEPTH + 1)
    assert {tuple(tree.tokens[path]) for path in nodes} == {(9, *path) for path in product(range(3), repeat=3)}
    assert (tree.parents[nodes[:, 1:]] == nodes[:, :-1]).all()


def test_a_token_of_probability_5_percent_is_emitted_three_times_of_four_with_27_paths() -> None:
    """All 27 paths begin with the same unlikely token, and nothing after it can match."""
    p = np.zeros(40)
    p[[0, 39]] = 0.05, 0.95
    never = np.zeros(40)
    never[38] = 1
    tree = full_tree(39, lambda path: [0] if len(path) == 1 else range(3))
    nodes = path_nodes(tree)
    assert len(nodes) == 9  # of one first token; TokenSwift's [1, 3, 3, 3] has 9 paths for each of three
    q, longest, by_node = first_token(tree, lambda node: p if node == 0 else never)
    assert q[0] == pytest.approx(1 - 0.95**9) and q.sum() == pytest.approx(1)
    assert longest == pytest.approx(1 - 0.95**9) and by_node == pytest.approx(0.05)


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 5, "min_p": 0.05}])
def test_what_is_expected_of_the_rule_is_what_it_does(settings: dict[str, Any]) -> None:
    table = MarkovModel().table.numpy()
    p, tree = transitions(SamplingParams(**settings), table), toy_trees(table)[3]
    q, longest, by_node = first_token(tree, lambda node: p[tree.tokens[node]])
    assert q.sum() == pytest.approx(1) and longest > by_node
    tokens, rng, passes = tree.tokens[path_nodes(tree)], np.random.default_rng(5), 20_000
    texts = [pass_by_paths(tokens, p.cumsum(1), rng) for _ in range(passes)]
    counts = np.bincount([text[0] for text in texts], minlength=7).astype(float)
    assert chi_square(counts[None], q[None]) > 0.001
    assert chi_square(counts[None], p[3][None]) < 1e-9  # it is not the target's
    assert np.mean([len(text) - 1 for text in texts]) == pytest.approx(longest, abs=0.05)


def test_one_choice_a_node_over_the_same_trees_is_exact_and_accepts_as_expected() -> None:
    model, params = MarkovModel(), SamplingParams(temperature=1.0, seed=4)
    trees, p = toy_trees(model.table.numpy()), transitions(params, model.table.numpy())
    tokens, engine, _ = write(model, [0], 20_000, params, ToyTrees(trees), vocab=7, draft_tokens=NODES - 1)
    assert chi_square(pairs([0, *tokens], 7), p) > 0.001
    biased, passes = write_by_paths(trees, p, 20_000, np.random.default_rng(4))
    assert chi_square(pairs(biased, 7), p) < 1e-9
    assert passes < engine.stats.num_spec_steps


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}])
def test_the_distribution_of_a_row_is_what_the_sampler_draws_from(settings: dict[str, Any]) -> None:
    params, table = SamplingParams(**settings), MarkovModel().table
    found = distribution(Sampler(params, 7), table[2], History([2]))
    assert found == pytest.approx(transitions(params, table.numpy())[2])
