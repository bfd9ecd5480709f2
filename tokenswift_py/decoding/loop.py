"""The decode loop. Plain decoding is the same loop over trees of one node.

`DecodeLoop.text` is the loop, and `DecodeLoop.round` is one turn of it: draft, verify, accept, commit, learn. Both are
coroutines (see `passes`). They yield the passes that they want, and `text` also yields the steps of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tokenswift_py.core import Acceptance, DraftTree, Likeliest, Model, Output, Segment
from tokenswift_py.decoding.eviction import Eviction
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.passes import Pass, Passes, Timer, steps
from tokenswift_py.decoding.statistics import GenerationStats
from tokenswift_py.decoding.step import ReplayError, Step
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.decoding.traced import traced
from tokenswift_py.decoding.verify import walk
from tokenswift_py.drafters.base import Context, Drafter
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.parallel.ranks import ALONE, Ranks
from tokenswift_py.planning.costs import PassCost
from tokenswift_py.planning.planner import PHASES, FixedPlanner, Plan, Planner
from tokenswift_py.planning.rounds import Probes
from tokenswift_py.sampling.reference import Sampler, likeliest, log_probability


class DecodeLoop:
    """One sequence being written.

    turns: token ids that are forced into the text, one list each time a chapter ends with an EOS.
    draft_tokens: number of tokens to draft in every tree; None lets the planner decide.
    prefill_chunk: rows of a prefill pass.
    want_logprobs, top_logprobs: whether the chosen tokens' log-probabilities are wanted, and those of how many others.
    self_draft: the model with the draft's weights; None is the model itself.
    trace: function that is called with a record of every round: tree, what was accepted, milliseconds, estimates.
    eviction: the lossy mode, in which the target's cache is bounded too; None keeps every row.
    cache: a cache that holds rows of the prompt's first tokens already, written by the same model, but not of all. The
           drafter sees nothing of the rows it holds.
    ranks: the processes that hold the model. Each runs this loop. Rank 0's clock plans for all, its trees are the ones
           that are verified, and all must choose the same tokens.
    timer: the time of whoever drives this loop; None is that of a loop alone.
    prompt_logprobs: number of other tokens whose log-probabilities are wanted beside the prompt's own; None wants none.
                     They are in `known`, by position, and so are those of a replayed text after `catch_up`.
    target_cost, probes: what others know of the model's passes; see `Planner`.
    """

    def __init__(
        self,
        model: Model,
        drafter: Drafter,
        sampler: Sampler,
        stops: Stops,
        turns: Sequence[Sequence[int]] = (),
        draft_tokens: int | None = None,
        prefill_chunk: int = 512,
        want_logprobs: bool = False,
        self_draft: Model | None = None,
        trace: Callable[[dict[str, Any]], None] | None = None,
        eviction: Eviction | None = None,
        cache: KVCache | None = None,
        ranks: Ranks = ALONE,
        timer: Timer | None = None,
        top_logprobs: int = 0,
        prompt_logprobs: int | None = None,
        target_cost: PassCost | None = None,
        probes: Probes | None = None,
    ):
        self.model, self.drafter, self.sampler, self.stops = model, drafter, sampler, stops
        self.turns, self.ranks, self.prefill_chunk = list(turns), ranks, prefill_chunk
        costs = model.row_shapes, target_cost
        self.planner = Planner(64, *costs, probes) if draft_tokens is None else FixedPlanner(draft_tokens, *costs)
        self.want_logprobs, self.top_logprobs, self.prompt_logprobs = want_logprobs, top_logprobs, prompt_logprobs
        self.known: dict[int, tuple[float, Likeliest]] = {}
        # The positions whose log-probabilities the next passes tell, and how many other tokens are wanted there.
        self.unknown: dict[int, int] = {}
        self.history, self.eviction, self.over = History(), eviction, False  # over: the latest step was the last
        self.cache = eviction.new_cache(model, cache) if eviction else cache or model.new_cache()
        self.timer = timer or Timer()
        self._context = Context(
            self.history, self.cache, model, sampler.guessing(), self_draft or model, timer=self.timer,
            agreed=lambda ms: ranks.first_times([ms])[0],
        )  # fmt: skip
        self.trace, self.stats = trace, GenerationStats()
        self.keep: Callable[[], None] | None = None  # called before the cache gives its pages back
        self._untold: set[int] = set()  # positions of replayed choices that processors were not called for yet
        self._told = History()  # the text up to the latest token that they were called for

    def run(self, prompt: Sequence[int], after: Step | None = None) -> Iterator[Step]:
        """Writes the text alone, like `text`."""
        return steps(self.text(prompt, after))

    def text(self, prompt: Sequence[int], after: Step | None = None) -> Generator[Pass | Step, Output | None, None]:
        """Writes until something ends the text. Yields passes, to be sent their outputs, and steps, whose tokens are
        final. A step ends a round. Between rounds nothing is provisional but the pending token.

        after: the last step of a replay, after which the text goes on.
        """
        step = after
        try:
            if step is None:
                step = yield from self.force(prompt)
                self.over = not self.unfinished(step)
                yield step
            elif step.ending is None:
                yield from self.catch_up()
            while self.unfinished(step) and self.ranks.go_on():
                step = yield from (self.round() if step.ending is None else self.force(self.turns.pop(0)))
                self.over = not self.unfinished(step)
                yield step
        except GeneratorExit:
            if step is None or self.unfinished(step):
                self.ranks.go_on(False)
            raise
        finally:
            self.planner.leave()
            try:
                if self.keep is not None:
                    self.keep()
            finally:
                self.cache.release()

    def replay(self, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[Step]:
        """Brings history, stops and turns to where they stood when `tokens` had been written after the prompt, without
        a pass. Yields the steps that wrote them, one for each chosen token. The chapter rule tells which were forced.

        Raises ReplayError for tokens after the end of the text, and for forced ones that are not the turn's. The
        history has grown up to there.
        """
        forced, place = tuple(prompt), 0
        if tokens:
            self.history.extend(prompt)
            self.ask_of_prompt()
        while place < len(tokens):
            self.begin_chapter(len(forced))
            ending = None
            while ending is None and place < len(tokens):
                self.history.append(tokens[place])
                place += 1
                self.stats.recorded_tokens += 1
                if self.sampler.grammar is not None and not self.sampler.grammar.holds(self.history):
                    raise ReplayError(place - 1, "the grammar has no place for it")
                ending = self.stops(self.history)
                if self.sampler.stateful:
                    self._untold.add(len(self.history) - 1)
                if self.want_logprobs:
                    self.unknown[len(self.history) - 1] = self.top_logprobs
                yield Step((tokens[place - 1],), forced, ending)
                forced = ()
            if place == len(tokens):
                return
            if ending != "eos" or not self.goes_on:
                raise ReplayError(place, f"after the end of the text ({ending})")
            forced = tuple(self.turns.pop(0))
            for token in forced:
                if place == len(tokens) or tokens[place] != token:
                    raise ReplayError(place, f"the turn forced there has {token}")
                self.history.append(token)
                place += 1
            self.stats.forced_tokens += len(forced)
            if place == len(tokens):
                raise ReplayError(place, "a turn without a token after it")

    def catch_up(self, progress: Callable[[int], Any] = int) -> Passes[None]:
        """Computes the KV of everything but the pending token after a replay, and shows the drafter the text.
        Processors that keep state are called for each token that was chosen, in order, with the logits that chose it.

        progress: function that is called with the number of rows of each pass.
        """
        if len(self.history) - 1 > self.cache.length:
            with self.phase("prefill"):
                output = yield from self.prefill(len(self.history) - 1, progress)
                yield from self.drafter.prefill(self.context, output)

    def recompute(self) -> Passes[None]:
        """Computes the rows of all but the pending token again, after the cache has lost some. They have the bits that
        they had, so nobody is told of them or learns from them."""
        while (missing := len(self.history) - 1 - self.cache.length) > 0:
            count = min(self.prefill_chunk, missing)
            yield Pass(self.model, self.chunk(count), [])
            self.cache.commit(range(count))

    @property
    def needs_all_rows(self) -> bool:
        """Returns whether passes over the text's rows tell more than keys and values, so that none can be left out."""
        return self.prompt_logprobs is not None or bool(self.unknown) or bool(self._untold)

    @property
    def rows_ahead(self) -> int:
        """Returns how many rows the next round may commit beside those of its tree: those of a turn."""
        return len(self.turns[0]) if self.turns else 0

    def unfinished(self, step: Step) -> bool:
        return step.ending is None or (step.ending == "eos" and self.goes_on)

    @property
    def goes_on(self) -> bool:
        """Returns whether an EOS ends a chapter only: a turn is left to force, and a token to write after it."""
        return bool(self.turns) and self.stops.tokens_left > 0

    @property
    def context(self) -> Context:
        """Returns all that the drafter may look at between rounds."""
        return replace(self._context, plan=self.planner.between(self.cache.length))

    def round(self) -> Passes[Step]:
        """Drafts, verifies and commits one tree. Returns the accepted tokens and one more."""
        with self.phase("draft"):
            context = replace(self._context, plan=self.planner.at(self.cache.length))
            proposed = yield from self.drafter.propose(context, self.budget(context.plan))
            # Where rank 0 alone drafts, its plan is its own. So the message has room for any tree.
            tree = self.ranks.first_tree(proposed, self.planner.most + 1)
        with self.phase("verify"):
            lap = self.timer.start(self.model)
            self.cache.drop_tail()
            output = yield self.ask(Segment(tree, self.cache))
            lap.stop()
            tree = tree.first(len(output.hidden))  # in company there may have been no time for all of it
        with self.phase("accept"):
            taken = self.walk(tree, output)
        with self.phase("commit"):
            self.commit(taken.path, output)
        with self.phase("learn"):
            began = self.timer.now()
            self.drafter.observe(taken, output)
            self.stats.record(tree, taken)
            self.stats.settle("verify", "accept", lap.ms)
            learn_ms = 1e3 * (self.timer.now() - began)
            self.teach(context.plan, tree, taken, {**self.stats.latest_ms, "verify": lap.ms, "learn": learn_ms})
        if self.trace is not None:
            self.trace(traced(self.stats, context.history, tree, taken, context.plan, self.drafter))
        return Step(taken.tokens, ending=taken.ending, logprobs=taken.logprobs, top_logprobs=taken.top_logprobs)

    def force(self, tokens: Sequence[int]) -> Passes[Step]:
        """Puts tokens into the text (the prompt, or a turn after the pending token) and chooses the next."""
        with self.phase("prefill"):
            self.stats.forced_tokens += len(tokens) if len(self.history) else 0
            first = not len(self.history)
            self.history.extend(tokens)
            if first:
                self.ask_of_prompt()
            self.begin_chapter(len(tokens))
            output = yield from self.prefill(len(self.history))
            taken = self.walk(PENDING, output)
            yield from self.drafter.prefill(self.context, output)
        self.stats.first_tokens += 1
        return Step(taken.tokens, tuple(tokens), taken.ending, taken.logprobs, taken.top_logprobs)

    def ask_of_prompt(self) -> None:
        """Notes that the prefill has to give the log-probabilities of the prompt, if they are wanted."""
        if self.prompt_logprobs is not None:
            self.unknown.update(dict.fromkeys(range(1, len(self.history)), self.prompt_logprobs))

    def begin_chapter(self, forced: int) -> None:
        """Begins a chapter after the latest tokens of the history, which were forced."""
        self.stops.begin_chapter()
        self.sampler.begin_chapter(len(self.history), forced)

    def walk(self, tree: DraftTree, output: Output) -> Acceptance:
        wanted = (self.want_logprobs, self.top_logprobs)
        taken = walk(tree, output.logits, self.sampler, self.history, self.stops, *wanted)
        at = len(self.history) - len(taken.tokens)
        self.ranks.agree(f"the tokens from position {at} on", (taken.tokens, taken.path, taken.ending))
        return taken

    def prefill(self, stop: int, progress: Callable[[int], Any] = int) -> Passes[Output]:
        """Commits all rows of the history up to position `stop` that the cache lacks. Returns the output of the last
        rows, with the logits of the last one."""
        told = not self._untold and not self.unknown
        chunk = self.prefill_chunk if told else min(self.prefill_chunk, SEEN_ROWS)  # told: all logits are needed
        while (missing := stop - self.cache.length) > min(SEEN_ROWS, self.room):
            count = min(chunk, self.room, missing - SEEN_ROWS if missing > SEEN_ROWS else missing)
            known, near = self.cache.length, missing - count < self.drafter.window
            output = yield from self.read(count, [], seen=near)
            if near:
                self.drafter.read_rows(output, known, self.history.tokens[known + 1 :][:count])
            self.drafter.read_ahead(self.history.tokens[: self.cache.length])
            progress(count)
        output = yield from self.read(missing, [missing - 1])
        progress(missing)
        return output

    def read(self, count: int, logit_rows: Sequence[int], seen: bool = True) -> Passes[Output]:
        """Commits the next `count` rows. Returns their output, with the logits of `logit_rows`."""
        at = self.cache.length
        untold = [row for row in range(count) if at + row + 1 in self._untold] if self._untold else []
        unknown = [row for row in range(count) if at + row + 1 in self.unknown] if self.unknown else []
        rows = sorted({*untold, *unknown, *logit_rows})
        output = yield self.ask(self.chunk(count), rows, seen)
        for row, logits in zip(rows, output.logits, strict=True):
            if row in untold:
                self._told.extend(self.history.tokens[len(self._told) : at + row + 1].tolist())
                self.sampler.process(logits, self._told)
            if row in unknown:
                token, others = self.history[at + row + 1], self.unknown.pop(at + row + 1)
                self.known[at + row + 1] = log_probability(logits, token), likeliest(logits, others)
        self._untold -= {at + row + 1 for row in untold}
        self.commit_chunk(count, output)
        return replace(output, logits=output.logits[[rows.index(row) for row in logit_rows]])

    def chunk(self, count: int) -> Segment:
        """Returns the next tokens of the history that the cache lacks."""
        return Segment(DraftTree.chain(self.history.tokens[self.cache.length :][:count]), self.cache, causal=True)

    def commit_chunk(self, count: int, output: Output) -> None:
        self.commit(range(count), output)
        self.stats.prefill_tokens += count

    def commit(self, rows: Sequence[int], output: Output) -> None:
        self.cache.commit(rows)
        if self.eviction:
            self.eviction.committed(self.cache, rows, output)

    def ask(self, segment: Segment, logit_rows: Sequence[int] | None = None, seen: bool = True) -> Pass:
        """Makes a pass of the target. seen: whether the drafter sees its output, and may need more than logits."""
        needs = (self.drafter.needs if seen else frozenset()) | (self.eviction.needs if self.eviction else frozenset())
        taps = self.drafter.taps if seen else ()
        asked = Pass(self.model, segment, logit_rows, "mass" in needs, "queries" in needs, taps=taps)
        return asked if isinstance(self.planner, FixedPlanner) else replace(asked, chances=segment.tree.chances)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of what is done inside of this context."""
        began = self.timer.now()
        try:
            yield
        finally:
            self.stats.spent(name, 1e3 * (self.timer.now() - began))

    @property
    def room(self) -> int:
        """Returns how many rows can be committed before the context ends or pages are evicted."""
        return self.cache.limit - self.cache.length

    def budget(self, plan: Plan) -> int:
        """Returns the nodes worth having in the next tree: no more than are still wanted, or can be committed."""
        return max(1, min(plan.rows_at_most, self.stops.tokens_left, self.room))

    def teach(self, plan: Plan, tree: DraftTree, taken: Acceptance, phase_ms: Mapping[str, float]) -> None:
        """Tells the planner what a round brought and took. All ranks go by rank 0's clock, so that they plan alike."""
        agreed = self.ranks.first_times([phase_ms[phase] for phase in PHASES])
        self.planner.observe(plan.context, len(tree), len(taken.tokens), dict(zip(PHASES, agreed, strict=True)))


SEEN_ROWS = 32  # the last rows of a prompt or a turn, whose output a drafter sees
PENDING = DraftTree.chain([0])  # the walk of a single row, whose token does not matter
