"""Proposes how repeats of the text went on, by a suffix automaton over prompt and output.

The automaton (Blumer et al. 1985) holds every substring of the text in at most 2n states and grows by one token in
amortised constant time. Using one for drafting is SuffixDecoding's idea (arXiv 2411.04975).
"""

from __future__ import annotations

import heapq
from bisect import bisect
from collections.abc import Callable
from functools import partial

from tokenswift_py.core import Acceptance, DraftTree, IntArray, Output
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.passes import without_passes
from tokenswift_py.drafters.base import Candidates, Context, Draft, Drafter
from tokenswift_py.errors import check
from tokenswift_py.planning.odds import Odds
from tokenswift_py.planning.planner import Gain


class SuffixAutomaton:
    """A suffix automaton. States are sets of substrings that end at the same places. State 0 is the empty string.

    longest[s]: length of the longest substring of state s.
    link[s]:    the state of its longest suffix that ends in more places; -1 for state 0.
    next[s]:    token -> state.
    count[s]:   number of places where the substrings end, as far as they were counted (see `_tally`).
    """

    def __init__(self) -> None:
        self.longest = [0]
        self.link = [-1]
        self.next: list[dict[int, int]] = [{}]
        self.count = [0]
        self.last = 0
        self.size = 0

    def extend(self, token: int) -> None:
        """Appends one token to the text."""
        state = self._add(self.longest[self.last] + 1, 0, {}, 0)
        suffix = self.last
        while suffix >= 0 and token not in self.next[suffix]:
            self.next[suffix][token] = state
            suffix = self.link[suffix]
        if suffix >= 0:
            target = self.next[suffix][token]
            if self.longest[suffix] + 1 != self.longest[target]:
                target = self._split(suffix, token, target)
            self.link[state] = target
        self.last = state
        self.size += 1
        self._tally(state)

    def _split(self, suffix: int, token: int, target: int) -> int:
        """Returns a new state for the shorter substrings of `target`, which now end in one suffix more than the longer
        ones."""
        clone = self._add(self.longest[suffix] + 1, self.link[target], dict(self.next[target]), self.count[target])
        self.link[target] = clone
        while suffix >= 0 and self.next[suffix].get(token) == target:
            self.next[suffix][token] = clone
            suffix = self.link[suffix]
        return clone

    def _tally(self, state: int) -> None:
        """Counts one more end of suffixes, but only of the longest TALLIED ones, so that a loop costs no more."""
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
AT_ONCE = 4096  # tokens that are taken in at a time, which takes some 15 ms

Match = tuple[int, int]  # a state, and how many of the latest tokens it matches


class NGram(Drafter):
    """Follows the longest suffixes of the text that occurred before, the likeliest continuations first.

    A continuation's chance is learned by the length of the match before it and its share of all continuations seen.

    shortest: tokens a suffix must have for its continuations to be proposed.
    """

    name = "ngram"

    def __init__(self, shortest: int = 2):
        check(shortest >= 1, "shortest", shortest, "at least 1")
        self.shortest = shortest
        self.automaton = SuffixAutomaton()
        self._odds = [[Odds(trust * share) for share in PRIORS] for trust in TRUST]
        self._draft: Draft | None = None
        self._passed_over: dict[int, Odds] = {}  # what may follow the pending token, by its best odds

    @without_passes
    def prefill(self, context: Context, output: Output) -> None:
        self.read(context.history)

    @without_passes
    def propose(self, context: Context, budget: int) -> DraftTree:
        draft, match = Draft(context.history[-1], budget), self.read(context.history)
        with context.history.guesses():
            forced = draft.force(context, 0)
            for node in forced:
                match = self.step(match, draft.tokens[node])
        end = forced[-1] if forced else 0
        candidates = Candidates(draft)
        follow = self.push(candidates, end, match)
        self._passed_over = {} if forced else candidates.waiting()
        draft.fill(context.plan, lambda gain: candidates.take(gain, follow))
        draft.force_last(context)
        self._draft = draft
        return draft.build()

    def observe(self, taken: Acceptance, output: Output) -> None:
        """Learns from what was proposed, and from what could have followed the pending token and was not: a kind of
        repeats that is not worth a row now would never be tried again, however often the text repeats later."""
        if self._draft is None:
            return
        self._draft.learn(taken)
        proposed = self._draft.children_of_root
        for token, odds in self._passed_over.items():
            if token not in proposed:
                odds.learn(token == taken.tokens[0])

    def read_ahead(self, tokens: IntArray) -> None:
        for token in tokens[self.automaton.size :][:AT_ONCE].tolist():
            self.automaton.extend(token)

    def read(self, history: History) -> Match:
        """Takes in the new part of the text, and returns where its end occurred before.

        Where much of the text is new at once, as a long prompt whose pages another text had computed already, it is
        taken in over some rounds, for which other texts need not wait. No match is known until then.
        """
        self.read_ahead(history.tokens)
        if self.automaton.size < len(history):
            return 0, 0
        state = max(0, self.automaton.link[self.automaton.last])
        return state, self.automaton.longest[state]

    def step(self, match: Match, token: int) -> Match:
        """Returns the match after one more token, which need not become part of the text."""
        automaton, (state, matched) = self.automaton, match
        while state > 0 and token not in automaton.next[state]:
            state = automaton.link[state]
            matched = automaton.longest[state]
        target = automaton.next[state].get(token)
        return (target, matched + 1) if target is not None else (0, 0)

    def extend(self, draft: Draft, match: Match, gain: Gain, end: int = 0) -> None:
        """Hangs repeats of what followed `match` from a node of a draft, the likeliest first, as long as they gain."""
        candidates = Candidates(draft)
        candidates.take(gain, self.push(candidates, end, match))

    def push(self, candidates: Candidates, node: int, match: Match) -> Callable[[int, Match], None]:
        """Makes candidates of the continuations of the suffixes that end at `match`, the longest SUFFIXES of them.
        Returns the function that `Candidates.take` has to call with each node, for the continuations of the match that
        led there."""
        state, matched = match
        for _ in range(SUFFIXES):
            if state <= 0 or matched < self.shortest:
                break
            self._push_followers(candidates, node, (state, matched))
            state = self.automaton.link[state]
            matched = self.automaton.longest[state]
        return partial(self._push_followers, candidates)

    def _push_followers(self, candidates: Candidates, node: int, match: Match) -> None:
        automaton, (state, matched) = self.automaton, match
        if matched < self.shortest:
            return
        followers, count = list(automaton.next[state].items()), automaton.count
        total = sum(count[target] for _, target in followers) + DOUBT / matched
        if len(followers) > BRANCHES:
            followers = heapq.nlargest(BRANCHES, followers, key=lambda item: count[item[1]])
        by_share = self._odds[bisect(LENGTHS, matched)]
        for token, target in followers:
            share = count[target] / total
            if share >= UNLIKELY:
                candidates.push(node, token, by_share[bisect(SHARES, share)], (target, matched + 1))


UNLIKELY = 0.02  # continuations with a smaller share of those seen are not proposed
DOUBT = 2.0  # how often continuations that were never seen count as seen, after a match of one token
SUFFIXES = 8  # how many shorter matches fill up the tree
BRANCHES = 8  # the most continuations of one match
LENGTHS = (3, 4, 6, 9, 17)  # bounds of the ranges of a match's length: 2, 3, 4-5, 6-8, 9-16, more
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
PRIORS = (0.05, 0.15, 0.35, 0.6, 0.8, 0.95)  # the chance for each range of shares
TRUST = (0.6, 0.75, 0.85, 0.9, 0.95, 0.95)  # the trust for each range of lengths

DRAFTER = NGram
