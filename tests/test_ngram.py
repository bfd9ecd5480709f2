"""The n-gram drafter knows every substring of the text and proposes how the longest repeats went on."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripted import write
from tokenswift_py.core import Acceptance, DraftTree, SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.loop import SEEN_ROWS
from tokenswift_py.decoding.passes import compute
from tokenswift_py.drafters.base import create
from tokenswift_py.drafters.ngram import TALLIED, NGram, SuffixAutomaton
from tokenswift_py.errors import UserError
from tokenswift_py.planning.planner import FixedPlanner
from tokenswift_py.sampling.reference import Sampler

NO_OUTPUT: Any = None  # this drafter reads the history only
SAMPLER = Sampler(SamplingParams(), 64)  # and asks for what a grammar forces

texts = st.one_of(
    st.lists(st.integers(0, 2), max_size=30),
    st.lists(st.integers(0, 9), max_size=30),
    st.builds(
        lambda a, b, n: (a + b) * n + a, st.lists(st.integers(0, 3), max_size=5), st.just([7]), st.integers(0, 4)
    ),
)


def automaton_of(text: list[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.extend(token)
    return automaton


def occurrences(text: list[int]) -> Counter[tuple[int, ...]]:
    """Counts every substring, overlapping ones included."""
    n = len(text)
    return Counter(tuple(text[i:j]) for i in range(n) for j in range(i + 1, n + 1))


def state_of(automaton: SuffixAutomaton, word: tuple[int, ...]) -> int | None:
    state: int | None = 0
    for token in word:
        state = None if state is None else automaton.next[state].get(token)
    return state


@given(texts)
def test_the_automaton_accepts_every_substring_and_only_those(text: list[int]) -> None:
    automaton, wanted = automaton_of(text), occurrences(text)
    accepted, stack = set(), [((), 0)]
    while stack:
        word, state = stack.pop()
        for token, target in automaton.next[state].items():
            accepted.add((*word, token))
            stack.append(((*word, token), target))
    assert accepted == set(wanted)
    assert len(automaton.longest) <= max(2, 2 * len(text)) and automaton.size == len(text)


@given(texts)
def test_its_last_link_is_the_longest_suffix_that_occurred_before(text: list[int]) -> None:
    automaton, counts = automaton_of(text), occurrences(text)
    lengths = [size for size in range(1, len(text)) if counts[tuple(text[-size:])] > 1]
    longest = automaton.longest[automaton.link[automaton.last]] if text else 0
    assert longest == max(lengths, default=0)


@given(texts)
def test_it_counts_where_each_substring_ends(text: list[int]) -> None:
    """A text of up to `TALLIED` tokens has no longer chain of suffixes, so all are counted."""
    text = text[:TALLIED]
    automaton = automaton_of(text)
    for word, count in occurrences(text).items():
        state = state_of(automaton, word)
        assert state is not None and automaton.count[state] == count


class CountedList(list[Any]):
    """A list that counts how often it is read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)


def test_a_hundred_thousand_tokens_of_one_kind_are_read_in_linear_time() -> None:
    automaton = SuffixAutomaton()
    link, following = CountedList(automaton.link), CountedList(automaton.next)
    automaton.link, automaton.next = link, following
    reads = []
    for _ in range(2):
        before = link.reads + following.reads
        for _ in range(50_000):
            automaton.extend(1)
        reads.append(link.reads + following.reads - before)
    assert reads[1] < 1.01 * reads[0] < 1.01 * 50_000 * (TALLIED + 8)
    assert len(automaton.longest) == 100_001


def propose(text: list[int], budget: int, drafter: NGram | None = None) -> DraftTree:
    context: Any = SimpleNamespace(history=History(text), plan=FixedPlanner().at(0), sampler=SAMPLER)
    return compute((drafter or NGram()).propose(context, budget))


def test_repeats_that_did_not_pay_are_tried_again_when_the_text_repeats() -> None:
    """A row costs nearly a third of a token. Pairs that went on otherwise each time are not worth one any more. Those
    after them, which go on alike, are found out though none was proposed."""
    plan: Any = SimpleNamespace(gain_ms=lambda chance, _: chance - 0.3, rows_paid=lambda chances, _: len(chances))
    drafter, text, proposed = NGram(), [], []

    def say(token: int) -> None:
        if len(text) > 1:
            context: Any = SimpleNamespace(history=History(text), plan=plan, sampler=SAMPLER)
            tree = compute(drafter.propose(context, 9))
            proposed.append(len(tree) > 1)
            drafter.observe(Acceptance((0,), (token,)), NO_OUTPUT)
        text.append(token)

    def pairs(first: int, alike: bool) -> list[bool]:
        proposed.clear()
        for pair in range(first, first + 120, 3):
            for last in (pair + 2, pair + 2 if alike else pair + 10_000):
                for token in (pair, pair + 1, last, 50_000 + len(text)):
                    say(token)
        return list(proposed)

    assert any(pairs(100, alike=False)[:40]) and not any(pairs(1000, alike=False)[40:])
    assert any(pairs(2000, alike=True)[-40:])


def test_text_that_repeats_is_proposed_as_far_as_the_budget_goes() -> None:
    block = list(range(20))
    text = block * 12 + block[:6]
    tree = propose(text, 9)
    assert tree.is_chain and tree.tokens.tolist() == block[5:14]


def test_text_seen_once_before_is_proposed_as_deep_as_the_budget_goes() -> None:
    """The longer the match, the more a single sight is worth."""
    block = list(range(20))
    tree = propose([*block, 90, 91, *block[:6]], 14)
    assert tree.is_chain
    assert tree.tokens.tolist() == block[5:19]


def test_a_short_match_seen_once_is_trusted_for_a_few_tokens_only() -> None:
    tree = propose([1, 2, *range(10, 60), 1, 2], 40)
    assert 3 < len(tree) < 20
    assert tree.tokens.tolist() == [2, *range(10, 9 + len(tree))]


def test_a_long_text_that_is_new_at_once_is_taken_in_over_some_rounds() -> None:
    """The prompt of a text in company, whose pages another one had computed. The others do not wait for it."""
    text, drafter = list(range(300)) * 40, NGram()
    sizes = [len(propose(text, 9, drafter)) for _ in range(4)]
    assert sizes[:2] == [1, 1] and sizes[2:] == [9, 9]
    assert drafter.automaton.size == len(text)


def test_the_longest_match_comes_first_and_shorter_ones_fill_what_is_left() -> None:
    text = [1, 2, 3, 50, 9, 2, 3, 60, 9, 2, 3, 60, 9, 1, 2, 3]
    assert propose(text, 2).tokens.tolist() == [3, 50]
    tree = propose(text, 16)
    assert list(tree.children[0]) == [50, 60]
    assert tree.tokens[1] == 50


def test_of_two_continuations_the_commoner_comes_first() -> None:
    text = [1, 2, 70, 1, 2, 80, 1, 2, 80, 1, 2, 80, 1, 2]
    assert list(propose(text, 12).children[0])[:2] == [80, 70]
    assert propose(text, 2).tokens.tolist() == [2, 80]


def test_a_suffix_shorter_than_wanted_proposes_nothing() -> None:
    text = [5, 1, 6, 7, 1]
    assert len(propose(text, 8)) == 1
    assert propose(text, 8, NGram(shortest=1)).tokens.tolist()[:2] == [1, 6]
    with pytest.raises(UserError, match=r"^shortest: 0 is not allowed"):
        NGram(shortest=0)


@given(st.lists(texts, min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 3))
def test_whatever_the_text_the_tree_hangs_from_its_end_and_continues_what_was_seen(
    parts: list[list[int]], budget: int, shortest: int
) -> None:
    """The history may grow by any number of tokens between proposals, as it does by a forced turn."""
    drafter, history = NGram(shortest), History([4])
    context: Any = SimpleNamespace(history=history, plan=FixedPlanner().at(0), sampler=SAMPLER)
    compute(drafter.prefill(context, NO_OUTPUT))
    for part in parts:
        history.extend(part)
        tree = compute(drafter.propose(context, budget))
        text = history.tokens.tolist()
        assert 1 <= len(tree) <= budget and tree.tokens[0] == text[-1]
        counts = occurrences(text)
        for node in range(1, len(tree)):
            continuation = tuple(tree.tokens[step] for step in tree.path(node)[1:])
            assert counts[(*text[-shortest:], *continuation)]
        assert propose(text, budget, NGram(shortest)).tokens.tolist() == tree.tokens.tolist()


def test_a_forced_turn_is_read_too() -> None:
    drafter, history = NGram(), History([1, 2, 3])
    context: Any = SimpleNamespace(history=history, plan=FixedPlanner().at(0), sampler=SAMPLER)
    compute(drafter.prefill(context, NO_OUTPUT))
    history.extend([10, 11, 12, 13, 20, 10, 11])
    assert compute(drafter.propose(context, 3)).tokens.tolist() == [11, 12, 13]


@pytest.mark.parametrize("name", ["ngram", "cascade"])
def test_a_long_prompt_is_read_beside_its_passes(tiny_decoder: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Other texts would wait for a drafter that reads all of it at its end."""
    prompt, drafter = [token % 50 for token in range(300)], create(name)
    extend, read = SuffixAutomaton.extend, [0]

    def counted(automaton: SuffixAutomaton, token: int) -> None:
        read[-1] += 1
        extend(automaton, token)

    def compute_pass(*given: Any, **wanted: Any) -> Any:
        read.append(0)
        return forward(*given, **wanted)

    forward = tiny_decoder.forward
    monkeypatch.setattr(SuffixAutomaton, "extend", counted)
    monkeypatch.setattr(tiny_decoder, "forward", compute_pass)
    write(tiny_decoder, prompt, 5, drafter=drafter, prefill_chunk=24)
    assert 300 <= sum(read) <= 305 and max(read) <= SEEN_ROWS + 1
