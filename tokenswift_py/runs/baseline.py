"""Writes the same text by plain decoding, and says how much faster the run was."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tokenswift_py.decoding.statistics import memory_bandwidth
from tokenswift_py.errors import check
from tokenswift_py.memory import check_memory
from tokenswift_py.remembering.memories import memory_bytes
from tokenswift_py.runs import report
from tokenswift_py.runs.assembly import eviction_of
from tokenswift_py.runs.plan import kept_of_keys
from tokenswift_py.runs.stream import Result, Stream
from tokenswift_py.sampling.processors import is_pure, name_of

if TYPE_CHECKING:
    from tokenswift_py.loaded import LoadedModel


def baseline(loaded: LoadedModel, stream: Stream) -> Result:
    """Does the work of `TokenSwift.baseline`."""
    run, mine = stream.run, stream.result()
    recorded, allowed = mine.stats.recorded_tokens, "a stream that wrote all of its text itself"
    stateful = [name_of(processor) for processor in run.options.logits_processors if not is_pure(processor)]
    why = "not with processors that keep state, which stands at the text's end by now"
    check(not stateful, "baseline", stateful, why)
    check(recorded == 0, "baseline", f"a run resumed after {recorded} tokens", allowed)
    cache = stream.spare_cache(len(run.prompt) + len(mine.tokens))
    if cache is None:
        kept = min(run.context, run.options.kv_budget or run.context)
        of_keys = kept_of_keys(loaded.checkpoint.spec.head_dim, run.options.kv_policy)
        size = loaded.kv_bytes(kept, of_keys) // loaded.executor.ranks.world
        with loaded.executor.ranks.same_fate():
            check_memory(size, loaded.executor.device, f"a second KV cache of {kept} tokens, for plain decoding,")
    options = replace(run.options, drafter="none", trace=None, logprobs=None, prompt_logprobs=None)
    if options.on_loop == "warn":  # the stream has warned already
        options = replace(options, on_loop="ignore")
    with Stream(loaded, replace(run, options=options), cache) as plain:
        pieces = iter(plain)
        while mine.ending != "interrupted" or len(plain.tokens) < len(mine.tokens):
            if next(pieces, None) is None:
                break
        theirs = plain.result()
    first, eviction = len(run.prompt), eviction_of(run.options)
    positions = range(first, first + len(mine.tokens))
    mean_context = float(np.mean([eviction.tokens_held(p) if eviction else p for p in positions] or [first]))
    bandwidth = memory_bandwidth(device=loaded.executor.device, threads=loaded.executor.threads)
    reads = loaded.step_bytes(mean_context) + memory_bytes(run.options, loaded.checkpoint.spec)
    figures = report.baseline_figures(mine.stats, theirs.stats, mine.tokens, theirs.tokens, reads, bandwidth)
    if eviction:
        figures["baseline"]["what"] += ", evicting the same pages (lossy)"
    return replace(mine, report={**mine.report, **figures})
