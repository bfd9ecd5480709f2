"""Puts the parts of a decode loop together for a run: model, drafter, sampler, stops, eviction."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tokenswift_py import registry
from tokenswift_py.decoding.eviction import STATISTICS_ROWS, Eviction
from tokenswift_py.decoding.loop import SEEN_ROWS, DecodeLoop
from tokenswift_py.decoding.passes import Timer, compute
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.drafters.base import Resources, create, for_run, kind_of
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.memories.base import Memory
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.options import POLICIES, Options
from tokenswift_py.parallel.ranks import ALONE, Ranks
from tokenswift_py.remembering.memories import memory_of
from tokenswift_py.runs.plan import Run
from tokenswift_py.runs.report import Trace
from tokenswift_py.sampling.grammar import Follower
from tokenswift_py.text import special_ids

if TYPE_CHECKING:
    from tokenswift_py.loaded import LoadedModel


def decode_loop(
    loaded: LoadedModel,
    run: Run,
    trace: Trace | None = None,
    cache: KVCache | None = None,
    timer: Timer | None = None,
) -> DecodeLoop:
    options = run.options
    with loaded.executor.ranks.same_fate():
        if kind_of(options.chosen_drafter).has_second_model and not loaded.executor.ranks.leads:
            chosen = create("none")  # all ranks verify rank 0's trees
        else:
            draft_cost = loaded.pass_cost(*options.draft_kind)
            chosen = for_run(options, Resources(loaded.checkpoint, run.second_model, draft_cost, loaded.kept))
    if loaded.executor.ranks.world > 1:
        loaded.executor.ranks.agree("the draft heads", chosen.alike())
    eos = loaded.ends(options, run.eos)
    first_end = len(run.prompt) + options.min_new_tokens
    vocab, special = loaded.checkpoint.spec.vocab_size, special_ids(loaded.tokenizer)
    model = loaded.executor.model(run.rope)
    eviction = eviction_of(options, loaded.executor.ranks, memory_of(options, model, loaded.checkpoint))
    chunk = STATISTICS_ROWS if eviction and eviction.needs else loaded.prefill_chunk
    ends = () if options.ignore_eos else eos
    decode = partial(loaded.tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
    late, processors = (*eos, *run.stop_tokens), options.logits_processors
    sampler = loaded.executor.sampler(run.sampling, vocab, late, first_end, processors, options.min_chapter_tokens)
    sampler.grammar = Follower(run.grammar) if run.grammar else None
    return DecodeLoop(
        model,
        chosen,
        sampler,
        Stops(
            options.max_new_tokens,
            ends,
            options.stop,
            decode,
            special,
            options.on_loop,
            run.stop_tokens,
            sampler.may_end_from,
            loaded.goes_on(options),
        ),
        run.turns,
        options.draft_tokens,
        want_logprobs=options.logprobs is not None,
        top_logprobs=options.logprobs or 0,
        prompt_logprobs=options.prompt_logprobs,
        self_draft=loaded.executor.self_draft(
            run.rope, options.draft_weights, options.draft_kv, options.draft_vocabulary
        )
        if chosen.runs_target
        else None,
        trace=trace,
        eviction=eviction,
        cache=cache,
        ranks=loaded.executor.ranks,
        timer=timer,
        target_cost=loaded.pass_cost("target"),
        probes=loaded.probes(),
        prefill_chunk=chunk,
    )


def prompt_rows(loaded: LoadedModel, run: Run) -> KVCache | None:
    """A cache with the rows of the prompt but the last, which a drafter sees, and room for one fork of it that goes on;
    None where there is little to share."""
    shared, options = len(run.prompt) - SEEN_ROWS, run.options
    alone = loaded.executor.ranks.world > 1 or options.kv_budget is not None or options.prompt_logprobs is not None
    if shared < PAGE_SIZE or alone:
        return None
    pool = loaded.executor.model(run.rope).new_pool(pages_for(shared) + pages_for(run.context))
    plain = replace(run, options=replace(options, drafter="none", draft_heads=None))
    loop = decode_loop(loaded, plain, cache=KVCache(pool, run.context))
    loop.history.extend(run.prompt)
    while loop.cache.length < shared:
        compute(loop.read(min(loop.prefill_chunk, shared - loop.cache.length), [], seen=False))
    return loop.cache


def eviction_of(options: Options, ranks: Ranks = ALONE, memory: Memory | None = None) -> Eviction | None:
    """Makes the eviction of the lossy mode, or returns None where that was not asked for. memory: what it folds
    into."""
    if options.kv_budget is None:
        return None
    name = options.kv_policy or "recent"
    policy = registry.create(POLICIES, "POLICY", "kv_policy", name)
    return Eviction(policy, options.kv_budget, ranks=ranks, memory=memory)
