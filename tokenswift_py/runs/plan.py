"""A run before it begins. Everything that can be checked without any work is checked here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenswift_py import registry
from tokenswift_py.core import SamplingParams
from tokenswift_py.drafters.base import VIEWS, kind_of
from tokenswift_py.errors import UserError, about, check
from tokenswift_py.memory import check_memory
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import (
    TRAINED,
    RopeTables,
    chosen_positions,
    covered,
    rope_bytes,
    rope_tables,
    standardized,
    trained_length,
)
from tokenswift_py.options import FILLED, POLICIES, Options
from tokenswift_py.remembering.memories import check_remembers, memory_bytes
from tokenswift_py.runs import contract
from tokenswift_py.runs.journal import Record
from tokenswift_py.sampling.grammar import Grammar, Vocabulary, schema_text
from tokenswift_py.sampling.processors import check_processors
from tokenswift_py.text import Prompt, prompt_tokens, turn_tokens

if TYPE_CHECKING:
    from tokenswift_py.loaded import LoadedModel

logger = logging.getLogger("tokenswift")


@dataclass(frozen=True)
class Run:
    """A run that passed every check and has not begun.

    second_model: arguments for a drafter that has a second model.
    stop_tokens: ids of the tokens that end the text as stop strings do.
    grammar: what each chapter of the text must be.
    """

    options: Options
    prompt: list[int]
    turns: list[list[int]]
    sampling: SamplingParams
    context: int
    rope: RopeTables
    second_model: Mapping[str, Any] = field(default_factory=dict)
    stop_tokens: tuple[int, ...] = ()
    grammar: Grammar | None = None
    eos: tuple[int, ...] | None = None

    def parameters(self) -> dict[str, Any]:
        """Returns the keyword arguments of `generate` that write this text again, defaults and seed filled in."""
        options = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        options |= {name: list(value) for name, value in options.items() if isinstance(value, tuple)}
        filled = {name: getattr(self.sampling, name) for name in FILLED}
        filled["ban"] = list(self.sampling.ban if self.options.ban is None else self.options.ban)
        words = self.sampling.ban_words if self.options.ban_words is None else self.options.ban_words
        filled["ban_words"] = [word if isinstance(word, str) else list(word) for word in words]
        processors = [type(processor).__name__ for processor in self.options.logits_processors]
        bias = {str(token): value for token, value in self.sampling.logit_bias.items()}
        positions = {
            "context": self.context,
            "positions": self.rope.positions.scheme,
            "positions_window": self.rope.positions.window,
            "positions_block": self.rope.positions.block,
        }
        return {**options, **filled, **positions, "logits_processors": processors, "logit_bias": bias}


def prepare(
    loaded: LoadedModel,
    prompt: Prompt,
    options: Options,
    recorded: bool = False,
    in_pool: bool = False,
    eos: tuple[int, ...] | None = None,
) -> Run:
    """Checks everything that can be checked before any work, and makes the run. Raises UserError.

    recorded: the prompt is the token ids that a journal has.
    in_pool: the text's pages come from a pool that is there already, so that no memory is asked for.
    eos: see `Run`.
    """
    tokenizer, checkpoint = loaded.tokenizer, loaded.checkpoint
    tokens = list(map(int, prompt)) if recorded else prompt_tokens(tokenizer, prompt, options.chat)  # type: ignore[arg-type]
    check(bool(tokens) and len(prompt) > 0, "prompt", prompt, "it must not be empty")
    ends = loaded.ends(options, eos)
    turns = [turn_tokens(tokenizer, request, ends, options.chat) for request in options.chapters]
    highest, vocab = max([*tokens, *(token for turn in turns for token in turn)]), checkpoint.spec.vocab_size
    check(highest < vocab, "prompt", highest, f"the model knows token ids 0 to {vocab - 1}")
    sampling, stops = options.sampling(checkpoint.defaults, tokenizer), options.stop_ids(tokenizer, vocab)
    grammar = None
    if options.language:
        words = loaded.vocabulary if eos is None else Vocabulary(tokenizer, vocab, eos)
        grammar = Grammar(*options.language, words)
    needed = len(tokens) + sum(len(turn) for turn in turns) + options.max_new_tokens
    context = options.context or needed
    if recorded:
        context = max(context, needed)  # of a run that was extended; `recorded_run` checks that it may have grown
    parts = f"prompt ({len(tokens)})" + (f" + turns ({needed - len(tokens) - options.max_new_tokens})" if turns else "")
    allowed = f"{parts} + max_new_tokens ({options.max_new_tokens}) need {needed}"
    check(needed <= context, "context", context, allowed)
    kept = min(context, options.kv_budget or context)
    draft = loaded.draft(options)
    draft_bytes = draft.kv_bytes(min(kept, options.draft_budget or kept)) if draft else 0
    tables = rope_bytes(checkpoint.config, context)
    what = f"a KV cache of {kept} tokens{' and that of the draft model' if draft else ''}"
    what += f" with RoPE tables of {context} positions"
    of_keys = kept_of_keys(checkpoint.spec.head_dim, options.draft_policy, options.kv_policy)
    own_bytes = loaded.kv_bytes(kept, of_keys) // loaded.executor.ranks.world + tables
    own_bytes += memory_bytes(options, checkpoint.spec)
    if kind_of(options.chosen_drafter).sees_views and loaded.executor.reads_copies(options.draft_kv):
        seen = min(kept, options.draft_budget or VIEWS[-1])
        copied = kept if loaded.executor.copies_all else seen + seen // 4
        draft_bytes = loaded.kv_bytes(copied, dtype=torch.int8)
    if not in_pool:
        owed = loaded.executor.draft_bytes(options.draft_weights)  # packed when the first text asks for them
        if owed and kind_of(options.chosen_drafter).runs_target:
            what += f", and drafts' weights ({owed / 2**20:.0f} MiB; none with --draft-weights bf16)"
            draft_bytes += owed
        check_memory(own_bytes + draft_bytes, loaded.executor.device, what)
    rope = loaded.rope(context, options.met_positions())
    loaded.executor.check_rope(rope)
    check_remembers(options, loaded.executor, rope, checkpoint)
    if rope.note and not in_pool:
        logger.warning(rope.note)
    drafting = as_draft(draft, context, vocab) if draft else {}
    return Run(options, tokens, turns, sampling, context, rope, drafting, stops, grammar, eos)


def recorded_run(loaded: LoadedModel, record: Record, extend: int = 0, in_pool: bool = False, **settings: Any) -> Run:
    """Makes the run that a journal records, `extend` tokens longer. Raises the UserErrors of `resume`."""
    check(extend >= 0, "extend", extend, "a number of tokens")
    recorded = {**record.header["parameters"], "max_new_tokens": record.max_new_tokens, "trace": None}
    if "positions" not in recorded:  # the run began before there was a choice
        recorded["positions"] = "trained" if "/rope-dynamic" in record.header["numerics"] else "yarn"
    if "special" not in recorded:  # begun before names of control tokens were text and these defaults were known
        earlier = {name: getattr(SamplingParams, name) for name in FILLED}
        recorded = {**earlier, "ban_words": [], "special": True, **recorded}
    settings |= resolved_positions(loaded, settings, recorded)
    if settings.get("json_schema") is not None:
        settings["json_schema"] = schema_text(settings["json_schema"])  # as it is recorded
    processors = settings.pop("logits_processors", ())
    check_processors(processors)
    names = [type(processor).__name__ for processor in processors]
    contract.check_parameter("logits_processors", names, recorded["logits_processors"])
    for name, value in settings.items():
        if name in recorded and name not in contract.SPEED_ONLY:
            contract.check_parameter(name, value, recorded[name])
    longer = {"max_new_tokens": record.max_new_tokens + extend, "logits_processors": processors}
    options = Options.of(**{**recorded, **settings, **longer})
    # A run that was begun when fewer end tokens of the checkpoint were known ends by those.
    eos = tuple(record.header.get("eos", loaded.checkpoint.eos))
    fewer = eos if set(eos) < set(loaded.checkpoint.eos) else None
    run = prepare(loaded, record.header["prompt"], options, recorded=True, in_pool=in_pool, eos=fewer)
    outside = [token for token in record.tokens if not 0 <= token < loaded.checkpoint.spec.vocab_size]
    check(not outside, "journal: token", outside[:1], "the model knows no such id")
    check_context(loaded, run, recorded["context"], extend)
    return run


def without_lost_heads(record: Record) -> dict[str, None]:
    """Returns the setting that leaves out recorded draft heads whose file is gone, else nothing."""
    heads = str(record.header["parameters"].get("draft_heads") or "auto")
    if heads == "auto" or Path(heads).expanduser().exists():
        return {}
    logger.warning("draft_heads: %s is gone; the text goes on without it, and is the same", heads)
    return {"draft_heads": None}


def check_context(loaded: LoadedModel, run: Run, recorded: int, extend: int) -> None:
    """Raises UserError where a run has outgrown its recorded context, and a larger one meets positions otherwise.

    A text within the trained positions may grow to their end, but for LongRoPE's, whose frequencies change before it.
    """
    if run.context <= recorded:
        return
    config = standardized(loaded.checkpoint.config)
    within = covered(config, recorded)
    same = loaded.rope(recorded, run.options.met_positions()).label == run.rope.label
    if not same or (within and not covered(config, run.context)):
        room = max(0, (trained_length(config) if within and same else recorded) - run.context + extend)
        depends = f"how positions are met depends on the recorded context of {recorded}"
        allowed = f"{depends}; there is room for {room} more at least"
        check(False, "extend", extend, allowed)


def resolved_positions(loaded: LoadedModel, settings: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Resolves the settings of positions that a resumed run is given, to compare them with the recorded ones.

    Returns an empty dict where none is given.
    """
    names = ("positions", "positions_window", "positions_block")
    if not any(name in settings for name in names):
        return {}
    asked = {name: settings.get(name, recorded.get(name)) for name in names}
    if "positions" not in settings and asked["positions"] == "trained":
        asked["positions"] = "auto"  # auto may have needed neither window nor block
    found = chosen_positions(loaded.checkpoint.config, recorded["context"], Positions(*asked.values()))
    return dict(zip(names, (found.scheme, found.window, found.block), strict=True))


def kept_of_keys(head_dim: int, *policies: str | None) -> int:
    """Returns the bytes that policies keep of a page's keys for each layer and KV head: bounds, which they share, and
    indexes, which are their own."""
    kinds = [registry.module(POLICIES, "policy", name).POLICY for name in policies if name is not None]
    bounds = 2 * head_dim * torch.float32.itemsize if any("bounds" in kind.needs for kind in kinds) else 0
    return bounds + sum(int(kind.index_bytes(head_dim)) for kind in kinds if "index" in kind.needs)


def check_snapshot(wanted: bool, options: Options) -> None:
    lossy = wanted and options.kv_budget is not None
    check(not lossy, "kv_snapshot", wanted, "not with kv_budget: what its policy learnt is not kept")


def as_draft(loaded: LoadedModel, context: int, target_vocab: int) -> Mapping[str, Any]:
    """Returns the arguments of drafter draft_model for this model, for a target's run over `context` positions."""
    with about(f"draft_model {loaded.checkpoint.name}"):
        try:
            rope = rope_tables(loaded.checkpoint.config, context)
            loaded.executor.check_rope(rope)
        except UserError:  # a draft may be wrong, but must not stop the text
            rope = rope_tables(loaded.checkpoint.config, context, TRAINED)
        model = loaded.executor.model(rope)
    if rope.note:
        logger.warning("draft model: %s", rope.note)
    sizes = loaded.checkpoint.spec.vocab_size, target_vocab
    return {"model": model, "vocab_sizes": sizes if sizes[0] != sizes[1] else None}
