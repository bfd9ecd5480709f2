"""The loop: draft, verify, accept, commit, learn. Plain decoding is the same loop over trees of one node.

The loop is a coroutine (see `passes`): it yields the passes that it wants, and between rounds the steps of the text.
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
from tokenswift_py.sampling.reference import Sampler, likeliest, log_probability


class DecodeLoop:
    """One sequence being written.

    turns: token ids forced into the text, one list each time a chapter ends with an EOS (a follow-up question).
    draft_tokens: draft so many in every tree; None lets the planner decide.
    prefill_chunk: rows per prefill pass.
    draft_model: the model with the draft's weights; None is the model itself.
    trace: called with a record of every round: tree, what was accepted, milliseconds, estimates.
    eviction: the lossy mode, in which the target's cache is bounded too; None keeps every row.
    cache: one that holds rows of the prompt's first tokens already, written by the same model; at least one token of
        the prompt must be missing. Of rows it holds the drafter sees nothing.
    want_logprobs, top_logprobs: of the chosen tokens, and of how many others there.
    prompt_logprobs: of the prompt's tokens, and of how many others there; None is none. They are in `known`, by
        position, and so are, behind `catch_up`, those of a replayed text.
    ranks: the processes that hold the model. Each runs this loop; rank 0's clock plans for all, its trees are the ones
           that are verified, and all must choose the same tokens.
    timer: the time of whoever drives this loop; None is that of a loop alone.
    target_cost: what passes of the model cost, where that is known; see `Planner`.
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
        draft_model: Model | None = None,
        trace: Callable[[dict[str, Any]], None] | None = None,
        eviction: Eviction | None = None,
        cache: KVCache | None = None,
        ranks: Ranks = ALONE,
        timer: Timer | None = None,
        top_logprobs: int = 0,
        prompt_logprobs: int | None = None,
        target_cost: PassCost | None = None,
    ):
        self.model, self.drafter, self.sampler, self.stops = model, drafter, sampler, stops
        self.turns = list(turns)
        shapes, self.ranks = model.row_shapes, ranks
        most, planner = (64, Planner) if draft_tokens is None else (draft_tokens, FixedPlanner)
        self.planner = planner(most, shapes, target_cost)
        self.prefill_chunk = prefill_chunk
        self.want_logprobs, self.top_logprobs, self.prompt_logprobs = want_logprobs, top_logprobs, prompt_logprobs
        self.known: dict[int, tuple[float, Likeliest]] = {}
        # Positions whose log-probabilities the next passes tell, and of how many others there.
        self.unknown: dict[int, int] = {}
        self.history = History()
        self.eviction = eviction
        self.cache = cache or (eviction.new_cache(model) if eviction else model.new_cache())
        self.timer = timer or Timer()
        self._context = Context(
            self.history,
            self.cache,
            model,
            sampler.guessing(),
            draft_model or model,
            timer=self.timer,
            agreed=lambda ms: ranks.first_times([ms])[0],
        )
        self.trace = trace
        self.stats = GenerationStats()
        self.keep: Callable[[], None] | None = None  # called before the cache gives its pages back
        self._untold: set[int] = set()  # positions of replayed choices that processors were not called for yet
        self._told = History()  # up to the latest of those they were called for

    def run(self, prompt: Sequence[int], after: Step | None = None) -> Iterator[Step]:
        """Writes the text alone, as `text` does."""
        return steps(self.text(prompt, after))

    def text(self, prompt: Sequence[int], after: Step | None = None) -> Generator[Pass | Step, Output | None, None]:
        """Writes until something ends the text: yields passes, to be sent their outputs, and steps, whose tokens are
        final when they are yielded. A step ends a round: between rounds nothing is provisional but the pending token.

        after: the last step of a replay, after which the text goes on.
        """
        step = after
        try:
            if step is None:
                step = yield from self.force(prompt)
                yield step
            elif step.ending is None:
                yield from self.catch_up()
            while self.unfinished(step) and self.ranks.go_on():
                step = yield from (self.round() if step.ending is None else self.force(self.turns.pop(0)))
                yield step
        except GeneratorExit:
            if step is None or self.unfinished(step):
                self.ranks.go_on(False)
            raise
        finally:
            try:
                if self.keep is not None:
                    self.keep()
            finally:
                self.cache.release()

    def replay(self, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[Step]:
        """Bring history, stops and turns to where they stood when `tokens` had been written behind the prompt, without
        a pass of the model; the steps that wrote them, one a chosen token. What is forced is told by the chapter rule.

        Raises ReplayError, the history grown up to there, for tokens behind the end of the text, and for forced ones
        that are not the turn's.
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
                raise ReplayError(place, f"behind the end of the text ({ending})")
            forced = tuple(self.turns.pop(0))
            for token in forced:
                if place == len(tokens) or tokens[place] != token:
                    raise ReplayError(place, f"the turn forced there has {token}")
                self.history.append(token)
                place += 1
            self.stats.forced_tokens += len(forced)
            if place == len(tokens):
                raise ReplayError(place, "a turn without a token behind it")

    def catch_up(self, progress: Callable[[int], None] | None = None) -> Passes[None]:
        """After a replay: compute the KV of everything but the pending token, and show the drafter the text. Processors
        that keep state are called for each token that was chosen, in order, with the logits that chose it.

        progress: called with the number of rows of each pass.
        """
        if len(self.history) - 1 > self.cache.length:
            with self.phase("prefill"):
                output = yield from self.prefill(len(self.history) - 1, progress)
                yield from self.drafter.prefill(self.context, output)

    def recompute(self) -> Passes[None]:
        """Computes the rows of all but the pending token again, after the cache has lost some. They are what they were:
        nobody is told of them, or learns from them."""
        while (missing := len(self.history) - 1 - self.cache.length) > 0:
            count = min(self.prefill_chunk, missing)
            yield Pass(self.model, self.chunk(count), [])
            self.cache.commit(range(count))

    @property
    def needs_all_rows(self) -> bool:
        """Whether passes over the text's rows tell more than keys and values, so that none of them can be left out."""
        return self.prompt_logprobs is not None or bool(self.unknown) or bool(self._untold)

    @property
    def rows_ahead(self) -> int:
        """How many rows the next round may commit beside those of its tree: those of a turn."""
        return len(self.turns[0]) if self.turns else 0

    def unfinished(self, step: Step) -> bool:
        return step.ending is None or (step.ending == "eos" and self.goes_on)

    @property
    def goes_on(self) -> bool:
        """Whether an EOS ends a chapter only: there is a turn left to force, and a token left to write after it."""
        return bool(self.turns) and self.stops.tokens_left > 0

    @property
    def context(self) -> Context:
        """What the drafter may look at now, with the plan of a round that begins here."""
        return replace(self._context, plan=self.planner.at(self.cache.length))

    def round(self) -> Passes[Step]:
        """One tree: the accepted tokens and one more."""
        context = self.context
        with self.phase("draft"):
            budget = self.budget(context.plan)
            proposed = yield from self.drafter.propose(context, budget)
            tree = self.ranks.first_tree(proposed, budget)
        with self.phase("verify"):
            lap = self.timer.start(self.model)
            self.cache.drop_tail()
            output = yield self.ask(Segment(tree, self.cache))
            lap.stop()
        with self.phase("accept"):
            taken = self.walk(tree, output)
        with self.phase("commit"):
            self.commit(taken.path, output)
        with self.phase("learn"):
            self.drafter.observe(taken, output)
        self.stats.record(tree, taken)
        self.stats.settle("verify", "accept", lap.ms)
        self.teach(context.plan, tree, taken, {**self.stats.latest_ms, "verify": lap.ms})
        if self.trace is not None:
            position = len(self.history) - len(taken.tokens) - 1
            self.trace(traced(self.stats, position, tree, taken, context.plan, self.drafter))
        return Step(taken.tokens, ending=taken.ending, logprobs=taken.logprobs, top_logprobs=taken.top_logprobs)

    def force(self, tokens: Sequence[int]) -> Passes[Step]:
        """Put tokens into the text (the prompt, or a turn behind the pending token) and choose the next."""
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
        """The history is the prompt: its log-probabilities are known behind the prefill, if they are wanted."""
        if self.prompt_logprobs is not None:
            self.unknown.update(dict.fromkeys(range(1, len(self.history)), self.prompt_logprobs))

    def begin_chapter(self, forced: int) -> None:
        """The latest tokens of the history were forced: the model's own text begins behind them."""
        self.stops.begin_chapter()
        self.sampler.begin_chapter(len(self.history), forced)

    def walk(self, tree: DraftTree, output: Output) -> Acceptance:
        wanted = (self.want_logprobs, self.top_logprobs)
        taken = walk(tree, output.logits, self.sampler, self.history, self.stops, *wanted)
        at = len(self.history) - len(taken.tokens)
        self.ranks.agree(f"the tokens from position {at} on", (taken.tokens, taken.path, taken.ending))
        return taken

    def prefill(self, stop: int, progress: Callable[[int], None] | None = None) -> Passes[Output]:
        """Commit what the cache lacks of the history up to position `stop`; the output of the last rows, logits of the
        last."""
        progress = progress or (lambda rows: None)
        told = not self._untold and not self.unknown
        chunk = self.prefill_chunk if told else min(self.prefill_chunk, SEEN_ROWS)  # of these all logits
        while (missing := stop - self.cache.length) > min(SEEN_ROWS, self.room):
            count = min(chunk, self.room, missing - SEEN_ROWS if missing > SEEN_ROWS else missing)
            yield from self.read(count, [], seen=False)
            self.drafter.read_ahead(self.history.tokens[: self.cache.length])
            progress(count)
        output = yield from self.read(missing, [missing - 1])
        progress(missing)
        return output

    def read(self, count: int, logit_rows: Sequence[int], seen: bool = True) -> Passes[Output]:
        """Commit the next `count` rows; their output, with the logits of `logit_rows`."""
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
        """The next tokens of the history that the cache lacks."""
        return Segment(DraftTree.chain(self.history.tokens[self.cache.length :][:count]), self.cache, causal=True)

    def commit_chunk(self, count: int, output: Output) -> None:
        self.commit(range(count), output)
        self.stats.prefill_tokens += count

    def commit(self, rows: Sequence[int], output: Output) -> None:
        self.cache.commit(rows)
        if self.eviction:
            self.eviction.committed(self.cache, rows, output)

    def ask(self, segment: Segment, logit_rows: Sequence[int] | None = None, seen: bool = True) -> Pass:
        """A pass of the target. seen: by the drafter, which may need more than logits of it."""
        needs = (self.drafter.needs if seen else frozenset()) | (self.eviction.needs if self.eviction else frozenset())
        return Pass(self.model, segment, logit_rows, "mass" in needs, "queries" in needs)

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
        """Rows that can be committed before the context ends or pages are evicted."""
        return self.cache.limit - self.cache.length

    def budget(self, plan: Plan) -> int:
        """Returns the nodes worth having in the next tree: no more than are still wanted, or can be committed."""
        left = min(self.stops.tokens_left, self.room)
        return max(1, min(plan.rows_at_most, left))

    def teach(self, plan: Plan, tree: DraftTree, taken: Acceptance, phase_ms: Mapping[str, float]) -> None:
        """Tells the planner what a round brought and took; all ranks go by rank 0's clock, so that they plan alike."""
        agreed = self.ranks.first_times([phase_ms[phase] for phase in PHASES])
        self.planner.observe(plan.context, len(tree), len(taken.tokens), dict(zip(PHASES, agreed, strict=True)))


SEEN_ROWS = 32  # of a prompt or a turn: the last, of which a drafter sees the output
PENDING = DraftTree.chain([0])  # the walk of a single row, whose token does not matter
