"""Trees, segments and sampling parameters: what they are, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import device, float32

from tokenswift_py.core import DraftTree, SamplingParams, Segment, TreeBuilder
from tokenswift_py.errors import UserError
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import TorchPagePool


@st.composite
def trees(draw: Any, root: int = 0, most: int = 14) -> DraftTree:
    """Few tokens, so that two trees often share paths."""
    builder = TreeBuilder(root)
    for _ in range(draw(st.integers(0, most - 1))):
        builder.add(draw(st.integers(0, len(builder) - 1)), draw(st.integers(0, 3)))
    return builder.build()


def words(tree: DraftTree) -> list[tuple[int, ...]]:
    """The path of tokens that names each node, climbed link by link."""
    named = []
    for node in range(len(tree)):
        word: tuple[int, ...] = ()
        while node != -1:
            word = (int(tree.tokens[node]), *word)
            node = int(tree.parents[node])
        named.append(word)
    return named


@given(trees())
def test_depth_mask_children_and_paths_say_the_same_as_the_parents(tree: DraftTree) -> None:
    named = words(tree)
    assert tree.depth.tolist() == [len(word) - 1 for word in named]
    for i, word in enumerate(named):
        path = tree.path(i)
        assert tuple(int(tree.tokens[node]) for node in path) == word
        assert [j for j in range(len(tree)) if tree.mask[i, j]] == sorted(path)
        assert tree.children[i] == {w[-1]: j for j, w in enumerate(named) if w[:-1] == word and j}
    assert tree.is_chain == all(tree.parents[node] == node - 1 for node in range(len(tree)))


def test_a_chain_hangs_each_token_from_the_one_before() -> None:
    chain = DraftTree.chain([5, 6, 5])
    assert chain.is_chain and len(chain) == 3
    assert chain.parents.tolist() == [-1, 0, 1] and chain.depth.tolist() == [0, 1, 2]
    assert (chain.mask == np.tril(np.ones((3, 3), bool))).all()
    assert not DraftTree([5, 6, 7], [-1, 0, 0]).is_chain


@pytest.mark.parametrize(
    ("tokens", "parents", "words"),
    [
        ([], [], "at least one"),
        ([1, 2], [-1], "as many parents as tokens"),
        ([[1]], [[-1]], "as many parents as tokens"),
        ([1, 2], [0, 0], "parents must be -1 for node 0"),
        ([1, 2], [-1, -1], "parents must be -1 for node 0"),
        ([1, 2], [-1, 1], "an earlier node"),
        ([1, 2, 3], [-1, 2, 0], "an earlier node"),
        ([1, 2, 2], [-1, 0, 0], "siblings must carry different tokens"),
    ],
)
def test_what_is_no_tree_is_refused(tokens: Any, parents: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DraftTree(tokens, parents)


def test_a_tree_cannot_be_changed_through_the_arrays_it_was_made_of() -> None:
    tokens, parents = np.array([1, 2], np.int32), np.array([-1, 0], np.int32)
    tree = DraftTree(tokens, parents)
    tokens[:] = 9
    assert tree.tokens.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        tree.tokens[0] = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        tree.tokens = tokens  # type: ignore[misc]


@given(trees(), trees(), st.integers(1, 20) | st.none())
def test_merging_gives_the_trie_of_both_cut_at_the_budget(a: DraftTree, b: DraftTree, budget: int | None) -> None:
    wanted = list(dict.fromkeys(words(a) + words(b)))[:budget]
    assert words(a.merge(b, budget)) == wanted


def test_trees_on_different_tokens_do_not_merge() -> None:
    with pytest.raises(ValueError, match="1 and 2"):
        DraftTree.chain([1, 5]).merge(DraftTree.chain([2, 5]))


def test_a_builder_finds_what_is_there_even_when_full() -> None:
    builder = TreeBuilder(7, budget=2)
    child = builder.add(0, 8)
    assert child == 1 and builder.add(0, 9) is None and builder.add(0, 8) == 1
    assert builder.build().tokens.tolist() == [7, 8]


def test_only_a_chain_can_be_causal() -> None:
    cache = KVCache(TorchPagePool(1, 1, 2, 2, float32, device("cpu")), 64)
    assert Segment(DraftTree.chain([1, 2, 3]), cache, causal=True).tail == ()
    with pytest.raises(ValueError, match="chain"):
        Segment(DraftTree([1, 2, 3], [-1, 0, 0]), cache, causal=True)


WRONG = [
    ("temperature", -0.1, "between 0 and 100"),
    ("temperature", 101, "between 0 and 100"),
    ("temperature", math.nan, "a finite number"),
    ("temperature", "warm", "a finite number"),
    ("top_k", -1, "at least 0"),
    ("top_k", 1.5, "a whole number"),
    ("top_p", 0, "above 0, at most 1"),
    ("top_p", 1.01, "above 0, at most 1"),
    ("top_p", None, "a finite number"),
    ("min_p", -0.1, "between 0"),
    ("min_p", 1.1, "between 0"),
    ("penalty", 0.9, "between 1"),
    ("penalty", math.inf, "a finite number"),
    ("penalty_window", 0, "at least 1"),
    ("penalty_window", 2.0, "a whole number"),
    ("dry_multiplier", -1, "between 0"),
    ("dry_multiplier", 1001, "between 0"),
    ("dry_base", 0.5, "between 1 and 16"),
    ("dry_base", 17, "between 1 and 16"),
    ("dry_length", 0, "between 1 and 64"),
    ("dry_length", 65, "between 1 and 64"),
    ("dry_window", -1, "at least 0"),
    ("seed", -1, "between 0 and 2^64 - 1"),
    ("seed", 2**64, "between 0 and 2^64 - 1"),
    ("seed", 1.0, "a whole number"),
    ("stream", 2**32, "between 0 and 2^32 - 1"),
    ("logit_bias", {3: math.inf}, "finite numbers"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), WRONG)
def test_a_wrong_parameter_is_told_in_one_line_with_field_value_and_what_is_allowed(
    field: str, value: Any, allowed: str
) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**{field: value})
    message = str(error.value)
    assert message.startswith(f"{field}: {value!r} is not allowed; ") and allowed in message and "\n" not in message


def test_the_edges_of_every_parameter_are_allowed_and_recorded_as_plain_values() -> None:
    low = SamplingParams(top_p=1e-9, penalty_window=1, dry_base=1, dry_length=1)
    high = SamplingParams(
        100, 10**6, 1, 1, 100, 10**9, 1000, 16, 64, 2**40, (1,), 2**64 - 1, 2**32 - 1, ban=(2, 3), logit_bias={4: -1.5}
    )
    assert low.to_dict()["top_p"] == 1e-9
    assert high.to_dict()["ban"] == [2, 3] and high.to_dict()["logit_bias"] == {"4": -1.5}
    assert high.to_dict()["dry_breakers"] == [1] and high.to_dict()["seed"] == 2**64 - 1
