"""What a run can be asked for: the parameters of `TokenSwift.generate`, which are the flags of the command line."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenswift_py import registry
from tokenswift_py.core import SamplingParams, is_whole
from tokenswift_py.errors import UserError, check, check_text, files
from tokenswift_py.models.positions import Positions
from tokenswift_py.sampling.processors import check_processors
from tokenswift_py.text import token_ids

if TYPE_CHECKING:
    from tokenswift_py.checkpoints.checkpoint import Checkpoint

AUTO_DRAFTER = "cascade"  # under the planner, which leaves out what does not pay
DRAFT_WEIGHTS = ("auto", "bf16", "int8")
DRAFT_KV = ("auto", "own", "int8")
SELF_DRAFTERS = ("partial", "cascade")  # those that run the model over a view of its cache
ON_LOOP = ("warn", "stop", "ignore")
CHECKPOINT_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "penalty", "penalty_window")  # a checkpoint has a say
PLAIN_SAMPLING = tuple(f.name for f in fields(SamplingParams) if f.name not in ("ban", "dry_breakers"))


@dataclass(frozen=True)
class Options:
    """Parameters of one run. None means the checkpoint's own default; every wrong value is a `UserError`.

    max_new_tokens, min_new_tokens: tokens the model chooses, forced turns not counted. Before the least there is no EOS
                   and no stop token, and a stop string ends nothing.
    min_chapter_tokens: the same for each chapter; a small model in a long talk answers in ever fewer words.
    ignore_eos:    an EOS is a token like any other; with chapters, no chapter ever ends.
    stop:          strings that end the text; they are not part of it. One that is a special token is found by its id.
    stop_tokens:   token ids, or texts that are one token, which end the text so too.
    on_loop:       warn, stop or ignore, where the text begins to say one block of tokens over and over.
    chapters:      requests put to the model when it ends its answer, one after the other.
    raw:           the prompt is the beginning of the text itself, not a user message.
    context:       N, the positions the run is made for; None is what it needs.
    positions:     how positions beyond the trained length are met; see `positions.Positions`, also for positions_window
                   and positions_block.
    drafter:       auto, or a file name of drafters/.
    draft_tokens:  draft so many in every tree; None lets the planner decide.
    draft_policy, draft_budget: which pages, and how many tokens of them, a partial-cache draft sees; a budget of None
                   lets the planner decide.
    draft_weights: auto, bf16 (the model's own) or int8, of partial-cache drafts and of a draft model; auto is int8
                   where the engine has it: blocks of 8 bits, or of 4 where a partial-cache draft's are no finer.
    draft_kv:      auto, own or int8: as what a partial-cache draft reads keys and values; auto is int8 where the engine
                   has it and the cache is bf16.
    draft_model:   a smaller model with the same vocabulary, named as `TokenSwift.from_pretrained` takes it; auto drafts
                   with it where there is one. Of its own cache it keeps the latest `draft_budget` tokens (None: all).
    draft_heads:   a file or folder of draft heads, or auto: those that this model has in the cache or the package. None
                   is auto for drafter heads, and none at all for cascade.
    trace:         a file that gets a JSON line for every round.
    kv_budget, kv_policy: the lossy mode: tokens that the target's own cache keeps at most, and by whose scores pages
                   are evicted (None is recent). None keeps every token.
    logprobs:      return the model's own log-probability of each new token.
    logits_processors: Hugging Face LogitsProcessors, applied after the penalties, each called once for every token that
                   is written, in order. Drafters guess without them, but for transformers' own that keep no state and
                   those with an attribute `pure = True`.
    seed:          None draws one, which the report records.
    penalty_window: None is 1024, and the whole text where the penalty is the checkpoint's: repetition_penalty.
    The others are those of `SamplingParams`; dry_breakers are strings here, `ban` token ids or strings.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    min_chapter_tokens: int = 0
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int | str] = ()
    on_loop: str = "warn"
    chapters: Sequence[str] = ()
    raw: bool = False
    context: int | None = None
    positions: str = "auto"
    positions_window: int | None = None
    positions_block: int | None = None
    drafter: str = "auto"
    draft_tokens: int | None = None
    draft_policy: str = "mass"
    draft_budget: int | None = None
    draft_weights: str = "auto"
    draft_kv: str = "auto"
    draft_model: str | None = None
    draft_heads: str | None = None
    trace: str | None = None
    kv_budget: int | None = None
    kv_policy: str | None = None
    logprobs: bool = False
    logits_processors: Sequence[Any] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    penalty: float | None = None
    penalty_window: int | None = None
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_length: int = 2
    dry_breakers: Sequence[str] = ("\n", ":", '"', "*")
    ban: Sequence[int | str] | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stream: int = 0

    def __post_init__(self) -> None:
        whole_numbers = ("max_new_tokens", "min_new_tokens", "min_chapter_tokens", "draft_tokens", "draft_budget")
        extent = ("context", "positions_window", "positions_block")
        for name in (*whole_numbers, *extent, "kv_budget"):
            value = getattr(self, name)
            optional = name in ("draft_tokens", "draft_budget", *extent, "kv_budget") and value is None
            check(optional or (is_whole(value) and abs(value) < 2**63), name, value, "a whole number below 2^63")
        for name in ("ignore_eos", "raw", "logprobs"):
            check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        wanted = f"between 0 and max_new_tokens ({self.max_new_tokens})"
        check(0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", self.min_new_tokens, wanted)
        check(self.min_chapter_tokens >= 0, "min_chapter_tokens", self.min_chapter_tokens, "at least 0")
        check(self.context is None or self.context >= 2, "context", self.context, "at least 2")
        fine = self.draft_tokens is None or 1 <= self.draft_tokens <= 511
        check(fine, "draft_tokens", self.draft_tokens, "between 1 and 511")
        fine = self.draft_budget is None or self.draft_budget >= 64
        check(fine, "draft_budget", self.draft_budget, "at least 64 tokens, one page")
        check(
            self.draft_weights in DRAFT_WEIGHTS,
            "draft_weights",
            self.draft_weights,
            f"one of {', '.join(DRAFT_WEIGHTS)}",
        )
        check(self.draft_kv in DRAFT_KV, "draft_kv", self.draft_kv, f"one of {', '.join(DRAFT_KV)}")
        policies = registry.names("tokenswift_py.kvcache.policies")
        check(
            self.kv_budget is None or self.kv_budget >= 256, "kv_budget", self.kv_budget, "at least 256 tokens, 4 pages"
        )
        check(self.kv_policy in (None, *policies), "kv_policy", self.kv_policy, f"one of {', '.join(policies)}")
        check_processors(self.logits_processors)
        check(self.kv_policy is None or bool(self.kv_budget), "kv_policy", self.kv_policy, "only with kv_budget")
        check(self.draft_policy in policies, "draft_policy", self.draft_policy, f"one of {', '.join(policies)}")
        heads, wanted = self.draft_heads, "an existing file or folder, or auto"
        with files("draft_heads", heads, wanted):
            there = heads in (None, "auto") or (isinstance(heads, str) and Path(heads).expanduser().exists())
        check(there, "draft_heads", heads, wanted)
        model = self.draft_model
        wanted = "a folder, a .gguf file or a hub id of a smaller model"
        check(model is None or (isinstance(model, str) and model != ""), "draft_model", model, wanted)
        check(self.trace is None or (isinstance(self.trace, str) and self.trace != ""), "trace", self.trace, "a file")
        check(self.drafter != "draft_model" or model is not None, "draft_model", model, f"name {wanted}")
        check(self.on_loop in ON_LOOP, "on_loop", self.on_loop, f"one of {', '.join(ON_LOOP)}")
        for name in ("stop", "chapters", "dry_breakers"):
            strings = getattr(self, name)
            fine = isinstance(strings, (list, tuple)) and all(isinstance(s, str) and s for s in strings)
            check(fine, name, strings, "a list of texts, none of them empty")
            for string in strings:
                check_text(name, string)
        check_tokens("stop_tokens", self.stop_tokens)
        check_tokens("ban", () if self.ban is None else self.ban)
        check(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, "token id -> number")
        drafters = ["auto", *registry.names("tokenswift_py.drafters")]
        check(self.drafter in drafters, "drafter", self.drafter, f"one of {', '.join(drafters)}")
        check(not (self.chapters and self.ignore_eos), "chapters", len(self.chapters), "not with ignore_eos")
        SamplingParams(**self._plain_sampling())
        self.met_positions()

    def met_positions(self) -> Positions:
        """Raises UserError for a window or a block that the scheme does not have."""
        return Positions(self.positions, self.positions_window, self.positions_block)

    @classmethod
    def of(cls, **settings: Any) -> Options:
        """As the constructor, but an unknown name is a `UserError` too."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise UserError(f"{name}: no such parameter; known are {', '.join(known)}")
        return cls(**settings)

    def sampling(self, defaults: Mapping[str, Any], tokenizer: Any) -> SamplingParams:
        """Sampling parameters: what was asked for, else the checkpoint's defaults, else plain greedy."""
        breakers = sorted(tokens_containing(tokenizer, self.dry_breakers)) if self.dry_multiplier > 0 else []
        own: dict[str, Any] = {"seed": secrets.randbits(63), "dry_breakers": tuple(breakers)}
        if self.ban is not None:
            own["ban"] = tuple(token_of(tokenizer, item, "ban") for item in self.ban)
        if self.penalty is not None:  # with a window of its own
            own["penalty_window"] = SamplingParams.penalty_window
        return SamplingParams(**{**defaults, **own, **self._plain_sampling()})

    def stop_ids(self, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
        """The tokens that end the text: `stop_tokens`, and stop strings that are a special token, which decodes to
        nothing. Raises UserError for ids the model does not have, and for strings that hold such a token and more."""
        ids = [token_of(tokenizer, item, "stop_tokens") for item in self.stop_tokens]
        special = {added.content: token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        for string in self.stop:
            inside = next((text for text in special if text and text in string), None)
            allowed = f"the special token {inside!r} in it is no text: give it alone"
            check(inside is None or string in special, "stop", string, allowed)
            ids += [special[string]] if string in special else []
        for token in ids:
            check(0 <= token < vocab_size, "stop_tokens", token, f"token ids are 0 to {vocab_size - 1}")
        return tuple(ids)

    def _plain_sampling(self) -> dict[str, Any]:
        """What was asked for of the parameters that need no tokenizer."""
        values = {name: getattr(self, name) for name in PLAIN_SAMPLING}
        values["logit_bias"] = {whole(token): bias for token, bias in self.logit_bias.items()}  # JSON has text keys
        return {name: value for name, value in values.items() if value is not None}

    @property
    def chosen_drafter(self) -> str:
        """What auto stands for, else what was asked for."""
        if self.drafter != "auto":
            return self.drafter
        return "draft_model" if self.draft_model is not None else AUTO_DRAFTER

    def drafter_settings(self, checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
        """The drafter's name and what its constructor takes, but for the model of a draft model."""
        name = self.chosen_drafter
        width = {} if self.draft_tokens is None else {"width": 1}
        if name == "draft_model":
            return name, {"keep_tokens": self.draft_budget or self.kv_budget, **width}
        heads = {"checkpoint": checkpoint, "path": self.draft_heads} if name in ("cascade", "heads") else {}
        if name in SELF_DRAFTERS:
            return name, {"policy": self.draft_policy, "view_tokens": self.draft_budget, **width, **heads}
        if name == "heads":
            return name, heads
        return name, {}


def world_size() -> int:
    """How many processes torchrun started to hold the model together (WORLD_SIZE): 1 without it."""
    world = os.environ.get("WORLD_SIZE", "1")
    check(world.isdecimal() and int(world) >= 1, "WORLD_SIZE", world, "a whole number, as torchrun sets it")
    return int(world)


def whole(token: Any) -> Any:
    try:
        return int(token) if isinstance(token, str) else token
    except ValueError:
        return token


def tokens_containing(tokenizer: Any, strings: Sequence[str]) -> set[int]:
    """Every token whose text holds one of the strings; special tokens too, which no repetition should cross."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    found = {token for token, text in enumerate(texts) if any(string in text for string in strings)}
    return found | set(tokenizer.all_special_ids)


def check_tokens(field: str, items: Any) -> None:
    """Raise UserError for what is no list of token ids and texts."""
    fine = isinstance(items, (list, tuple)) and all(is_whole(item) or isinstance(item, str) for item in items)
    check(fine, field, items, "a list of token ids and one-token texts")
    for item in items:
        check_text(field, str(item))


def token_of(tokenizer: Any, item: int | str, field: str) -> int:
    """A token id as it is; a string must be one token."""
    if isinstance(item, int):
        return item
    tokens = token_ids(tokenizer, item)
    check(len(tokens) == 1, field, item, f"token ids, or texts that are one token (this is {len(tokens)})")
    return tokens[0]
