"""Reuse of what was written before: a suffix automaton over prompt and output proposes how its repeats went on.

The automaton (Blumer et al. 1985) holds every substring of the text in at most 2n states and grows by one token in
amortised constant time. Using one for drafting is SuffixDecoding's idea (arXiv 2411.04975).
"""

from __future__ import annotations

import heapq

from tokenswift_py.core import Acceptance, DraftTree, IntArray, Output, TreeBuilder
from tokenswift_py.drafters.base import Context
from tokenswift_py.errors import check


class SuffixAutomaton:
    """States are sets of substrings that end at the same places. State 0 is the empty string.

    longest[s]: length of the longest substring of state s.
    link[s]:    the state of its longest suffix that ends in more places; -1 for state 0.
    next[s]:    token -> state.
    count[s]:   in how many places the substrings end, as far as they were counted (see `extend`).
    """

    def __init__(self) -> None:
        self.longest = [0]
        self.link = [-1]
        self.next: list[dict[int, int]] = [{}]
        self.count = [0]
        self.last = 0
        self.size = 0

    def extend(self, token: int) -> None:
        """Append one token to the text."""
        state = self._add(self.longest[self.last] + 1, 0, {}, 0)
        place = self.last
        while place >= 0 and token not in self.next[place]:
            self.next[place][token] = state
            place = self.link[place]
        if place >= 0:
            target = self.next[place][token]
            if self.longest[place] + 1 != self.longest[target]:
                target = self._split(place, token, target)
            self.link[state] = target
        self.last = state
        self.size += 1
        self._tally(state)

    def _split(self, place: int, token: int, target: int) -> int:
        """A state for the shorter substrings of `target`, which now end in one place more than the longer ones."""
        clone = self._add(self.longest[place] + 1, self.link[target], dict(self.next[target]), self.count[target])
        self.link[target] = clone
        while place >= 0 and self.next[place].get(token) == target:
            self.next[place][token] = clone
            place = self.link[place]
        return clone

    def _tally(self, state: int) -> None:
        """One more end for all suffixes; only the longest TALLIED are counted, so that a loop costs no more."""
        for _ in range(TALLIED):
            if state <= 0:
                return
            self.count[state] += 1
            state = self.link[state]

    def _add(self, longest: int, link: int, following: dict[int, int], count: int) -> int:
        self.longest.append(longest)
        self.link.append(link)
        self.next.append(following)
        self.count.append(count)
        return len(self.longest) - 1


TALLIED = 32


class NGram:
    """Follows the longest suffixes of the text that occurred before, the likeliest continuations first.

    shortest: tokens a suffix must have for its continuations to be proposed.
    """

    name = "ngram"
    needs: frozenset[str] = frozenset()

    def __init__(self, shortest: int = 2):
        check(shortest >= 1, "shortest", shortest, "at least 1")
        self.shortest = shortest
        self.automaton = SuffixAutomaton()

    def prefill(self, context: Context, output: Output) -> None:
        self._read(context.history.tokens)

    def propose(self, context: Context, budget: int) -> DraftTree:
        self._read(context.history.tokens)
        builder = TreeBuilder(context.history[-1], budget)
        state = self.automaton.link[self.automaton.last]
        for _ in range(SUFFIXES):
            if len(builder) >= budget or state <= 0 or self.automaton.longest[state] < self.shortest:
                break
            self._follow(builder, state)
            state = self.automaton.link[state]
        return builder.build()

    def observe(self, taken: Acceptance, output: Output) -> None:
        pass

    def _read(self, tokens: IntArray) -> None:
        for token in tokens[self.automaton.size :].tolist():
            self.automaton.extend(token)

    def _follow(self, builder: TreeBuilder, state: int) -> None:
        """Add continuations of a state, the most probable path first, until the tree is full or they end.

        A token's share of the continuations counts the less, the shorter the match behind it is.
        """
        automaton = self.automaton
        order = 0  # of equals, the one found first
        queue = [(-1.0, order, 0, state, automaton.longest[state])]
        while queue:
            probability, _, node, state, matched = heapq.heappop(queue)
            following = automaton.next[state]
            total = sum(automaton.count[target] for target in following.values()) + DOUBT / matched
            for token, target in following.items():
                share = -probability * automaton.count[target] / total
                if share < UNLIKELY:
                    continue
                child = builder.add(node, token)
                if child is None:
                    return
                order += 1
                heapq.heappush(queue, (-share, order, child, target, matched + 1))


UNLIKELY = 0.02  # paths below this are not proposed
DOUBT = 2.0  # continuations never seen, as if seen so often behind a match of one token
SUFFIXES = 8  # how many shorter matches fill up the tree

DRAFTER = NGram
