"""The parameters of a run: those of `TokenSwift.generate`, which are also the flags of the command line.

The module is one table: every option with its checks and its help, and nowhere else. The options of sampling are
described in sampling/params.py and derived from there.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import PurePath
from typing import Any

from tokenswift_py import registry
from tokenswift_py.core import SamplingParams
from tokenswift_py.errors import UserError, check
from tokenswift_py.models.positions import SCHEMES, Positions
from tokenswift_py.sampling.grammar import Language, schema_text
from tokenswift_py.sampling.kinds import Arguments, Choice, Named, Switch, Text, Texts, Tokens, Whole, WholeOr
from tokenswift_py.sampling.params import Parameter, described_parameters
from tokenswift_py.sampling.processors import check_processors
from tokenswift_py.text import Chat, token_of, tokens_containing, word_ids

MOST_LOGPROBS = 1000  # the most log-probabilities for one token
AUTO_DRAFTER = "cascade"  # under the planner, which leaves out what does not pay
AUTO_WITH_MODEL = "draft_model"  # if a second model is named
DRAFT_WEIGHTS = ("auto", "bf16", "int8", "int4")
LANGUAGES = ("json_schema", "grammar", "regex")  # only one of them may be set
DRAFT_KV = ("auto", "own", "int8")
PARAMETERS = described_parameters()
PLAIN_SAMPLING = tuple(
    name for name, described in PARAMETERS.items() if described.asked is None
)  # no tokenizer is needed
FILLED = tuple(name for name in PLAIN_SAMPLING if PARAMETERS[name].unset)  # these are None until a run is prepared


@dataclass(frozen=True)
class Processors:
    """Hugging Face's LogitsProcessors."""

    def check(self, name: str, value: Any) -> None:
        check_processors(value)


@dataclass(frozen=True)
class Description:
    """All that is said of an option. Checks, flags, help, journals and the reference page follow it.

    group: heading of the help. kind: the values that it takes. help: its effect, without its default.
    unset: meaning of the default where that is None.
    changes_text: whether the text depends on it. An option that changes no text may be changed when a run is resumed.
    """

    group: str
    kind: Any
    help: str
    unset: str = ""
    changes_text: bool = True


def option(default: Any, group: str, kind: Any, help: str, unset: str = "", changes_text: bool = True) -> Any:
    """Makes a field of `Options` with its description."""
    described = {"option": Description(group, kind, help, unset, changes_text)}
    made = {"default_factory": default} if callable(default) else {"default": default}
    return field(**made, metadata=described)


def drafting(default: Any, kind: Any, help: str, unset: str = "") -> Any:
    """Makes an option of drafting, on which no text depends."""
    return option(default, "drafting", kind, help, unset, changes_text=False)


def sampling_option(name: str, described: Parameter) -> tuple[str, Any, Any]:
    """Makes the option by which a sampling parameter is asked for. Without a form of its own it is checked like the
    parameter."""
    own = getattr(SamplingParams, name, dict) if described.asked_default is None else described.asked_default
    default = None if described.unset else own
    kind = described.asked or described.kind
    return name, Any, option(default, described.group, kind, described.help, described.unset)


Asked: Any = make_dataclass(
    "Asked", [sampling_option(name, described) for name, described in PARAMETERS.items()], frozen=True
)

DRAFTERS, POLICIES = "tokenswift_py.drafters", "tokenswift_py.kvcache.policies"
MEMORIES, GATED = "tokenswift_py.kvcache.memories", ("infini", "infini_linear")
A_MODEL = "a folder, a .gguf file or a hub id of a smaller model"


@dataclass(frozen=True)
class Options(Asked):
    """Parameters of one run; the arguments of `TokenSwift.generate`. Every wrong value is a `UserError`.

    Each field is described where it stands; docs/options.md has them as a table. The sampling options are the fields of
    `SamplingParams`, where None means the checkpoint's own default.
    """

    max_new_tokens: int = option(512, "text", Whole(1), "tokens to write at the most, forced turns not counted")
    min_new_tokens: int = option(
        0, "text", Whole(), "nothing but a loop ends the text, or its first chapter, before so many tokens"
    )
    min_chapter_tokens: int = option(0, "text", Whole(0), "nor a chapter before it has so many")
    ignore_eos: bool = option(
        False, "text", Switch(), "an end-of-sequence token is one like any other, and ends nothing"
    )
    json_schema: Mapping[str, Any] | str | None = option(
        None, "text", Language(json=True),
        "a JSON schema, in a file or as it is: the text, or each chapter's, is JSON of it", "none",
    )  # fmt: skip
    grammar: str | None = option(
        None, "text", Language(),
        "a Lark grammar in llguidance's dialect, in a file or as it is: the text, or each chapter's, is of it", "none",
    )  # fmt: skip
    regex: str | None = option(None, "text", Language(), "a regular expression that it matches as a whole", "none")
    stop: Sequence[str] = option(
        (), "text", Texts(), "end before this text (repeatable); a special token is found by its id"
    )
    stop_tokens: Sequence[int | str] = option(
        (), "text", Tokens(), "end before this token: its id, or its text (repeatable)"
    )
    keep_stop: bool = option(
        False, "text", Switch(), "what stopped the text (a stop string, a stop token) stays at its end"
    )
    on_loop: str = option(
        "warn", "text", Choice(("warn", "stop", "ignore")),
        "warn, stop or ignore, where the text says one block of tokens over and over",
    )  # fmt: skip
    chapters: Sequence[str] = option(
        (), "text", Texts(), "follow-up requests: put to the model when it ends its answer, one after the other"
    )
    raw: bool = option(False, "text", Switch(), "no chat template: the prompt is the beginning of the text")
    system: str | None = option(None, "text", Text(), "a system message before the prompt", "none")
    chat_template: str | None = option(
        None, "text", Text(), "a chat template (Jinja) instead of the model's own", "the model's"
    )
    template_args: Mapping[str, Any] = option(
        dict, "text", Arguments(), "what the chat template is told besides, as enable_thinking"
    )
    continue_final_message: bool = option(
        False, "text", Switch(), "the prompt's last message is the assistant's, and the text goes on from it"
    )
    no_bos: bool = option(
        False, "text", Switch(), "no token that begins a sequence before the prompt, nor others around a raw one"
    )
    special: bool = option(
        False, "text", Switch(), "the name of a control token in the prompt, as <|im_end|>, is that token and not text"
    )
    context: int | None = option(
        None, "model", Whole(2, optional=True), "positions the run is made for", "what it needs"
    )
    positions: str = option(
        "auto", "model", Choice(SCHEMES),
        "auto, trained, linear, ntk, yarn, self-extend or log-extend: how positions beyond the trained ones are met",
    )  # fmt: skip
    positions_window: int | None = option(
        None, "model", Whole(optional=True), "of an extension: nearer than this, distances stay true",
        "a quarter of the trained length",
    )  # fmt: skip
    positions_block: int | None = option(
        None, "model", Whole(optional=True), "of an extension: positions that are moved together, 64 to 1024",
        "an eighth of it, at most 1024",
    )  # fmt: skip
    drafter: str = drafting(
        "auto", Choice(("auto",), DRAFTERS),
        "auto (cascade), none, ngram, partial, heads, eagle, dflash, cascade or draft_model",
    )  # fmt: skip
    draft_tokens: int | None = drafting(None, Whole(1, 511, optional=True), "draft so many in every tree", "what pays")
    draft_policy: str = drafting(
        "mass", Choice(package=POLICIES),
        "whose pages a partial cache has: block, clusters, h2o, importance, local, mass, quest, recent, snapkv",
    )  # fmt: skip
    draft_budget: int | None = drafting(
        None, Whole(64, optional=True, unit=" tokens, one page"),
        "tokens of the cache that a partial cache, a draft model, eagle or dflash sees",
        "what pays; of a draft model: all; of eagle and dflash: 1024",
    )  # fmt: skip
    draft_weights: str = drafting(
        "auto", Choice(DRAFT_WEIGHTS),
        "bf16, int8 or int4, of a partial cache's or a draft model's; auto is int8 on native",
    )  # fmt: skip
    draft_kv: str = drafting(
        "auto", Choice(DRAFT_KV),
        "own or int8, of the keys and values in a partial cache; auto is int8 on native",
    )  # fmt: skip
    draft_vocabulary: str | int = drafting(
        "all", WholeOr(("auto", "all"), 1),
        "what a partial cache guesses among: so many first tokens and the text's own, all, or auto: what pays",
    )  # fmt: skip
    draft_model: str | None = drafting(
        None, Named(A_MODEL), "a smaller model with the same vocabulary, which then drafts under auto too", "none"
    )
    draft_heads: str | None = drafting(
        None, Named("an existing file or folder, or auto", exists=True),
        "a file or folder of draft heads, a folder of an EAGLE-3 or DFlash draft, or auto: those made for the model",
        "auto for drafters heads and eagle, else none",
    )  # fmt: skip
    trace: str | None = option(
        None, "output", Named("a file"), "a file that gets a JSON line for every round", "none", changes_text=False
    )
    kv_budget: int | None = option(
        None, "lossy", Whole(256, optional=True, unit=" tokens, 4 pages"),
        "tokens the target keeps of its cache; the text is no longer the full cache's", "all",
    )  # fmt: skip
    kv_policy: str | None = option(
        None, "lossy", Choice(package=POLICIES, optional=True),
        "by whose scores pages are evicted from it, as draft_policy", "recent",
    )  # fmt: skip
    kv_memory: str = option(
        "none", "lossy", Choice(("none",), MEMORIES),
        "none, linear, performer, infini or infini_linear: what evicted pages are folded into, to be read further on",
    )  # fmt: skip
    kv_gates: str | None = option(
        None, "lossy", Named("an existing file, or auto", exists=True),
        "of an infini memory: a file of gates that `tokenswift train-memory` made, or auto", "auto: those of the model",
    )  # fmt: skip
    logprobs: int | bool | None = option(
        None, "output", Whole(0, MOST_LOGPROBS, optional=True),
        "the model's own log-probability of each new token, and of so many likeliest ones; 0 (or True) is its alone",
        "none", changes_text=False,
    )  # fmt: skip
    prompt_logprobs: int | bool | None = option(
        None, "output", Whole(0, MOST_LOGPROBS, optional=True), "the same of the prompt's tokens", "none",
        changes_text=False,
    )  # fmt: skip
    logits_processors: Sequence[Any] = option(
        (), "python", Processors(),
        "Hugging Face's LogitsProcessors, applied after the penalties, each called once for every token that is "
        "written, in order; drafters guess without them, but for those that keep no state and say so (`pure = True`)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(getattr(self, name), bool):
                object.__setattr__(self, name, 0 if getattr(self, name) else None)
        for name, described in described_options().items():
            if name not in PLAIN_SAMPLING:
                described.kind.check(name, getattr(self, name))
        wanted = f"between 0 and max_new_tokens ({self.max_new_tokens})"
        check(0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", self.min_new_tokens, wanted)
        check(self.kv_policy is None or bool(self.kv_budget), "kv_policy", self.kv_policy, "only with kv_budget")
        check(self.kv_memory == "none" or bool(self.kv_budget), "kv_memory", self.kv_memory, "only with kv_budget")
        gated = f"only with kv_memory {' or '.join(GATED)}"
        check(self.kv_gates is None or self.kv_memory in GATED, "kv_gates", self.kv_gates, gated)
        named = f"name {A_MODEL}"
        drafter = registry.module(DRAFTERS, "drafter", self.chosen_drafter).DRAFTER
        check(not drafter.has_second_model or self.draft_model is not None, "draft_model", self.draft_model, named)
        check(not (self.chapters and self.ignore_eos), "chapters", len(self.chapters), "not with ignore_eos")
        if self.language:
            self._check_language(self.language[0])
        SamplingParams(**self._plain_sampling())
        self.met_positions()

    @property
    def language(self) -> tuple[str, str] | None:
        """Returns the option that says what the text must be, and its value. None where no option does."""
        said = ((name, getattr(self, name)) for name in LANGUAGES)
        return next(((name, value) for name, value in said if value is not None), None)

    def _check_language(self, name: str) -> None:
        given = [other for other in LANGUAGES if getattr(self, other) is not None]
        check(len(given) == 1, name, getattr(self, name), f"only one of {', '.join(LANGUAGES)}")
        for other in ("min_new_tokens", "min_chapter_tokens", "ignore_eos"):
            allowed = f"not with {name}, which says where the text may end, and where it must"
            check(not getattr(self, other), other, getattr(self, other), allowed)
        if self.json_schema is not None:  # journals have this form
            object.__setattr__(self, "json_schema", schema_text(self.json_schema))

    def met_positions(self) -> Positions:
        """Raises UserError for a window or a block that the scheme does not have."""
        return Positions(self.positions, self.positions_window, self.positions_block)

    @classmethod
    def of(cls, **settings: Any) -> Options:
        """Makes options. An unknown name is a `UserError`, too."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise UserError(f"{name}: no such parameter; known are {', '.join(known)}")
        plain: dict[str, Any] = {name: str(x) if isinstance(x, PurePath) else x for name, x in settings.items()}
        return cls(**plain)

    def sampling(self, defaults: Mapping[str, Any], tokenizer: Any) -> SamplingParams:
        """Returns the sampling parameters: those asked for, else the checkpoint's defaults, else plain greedy."""
        breakers = sorted(tokens_containing(tokenizer, self.dry_breakers)) if self.dry_multiplier > 0 else []
        own: dict[str, Any] = {"seed": secrets.randbits(63), "dry_breakers": tuple(breakers)}
        if self.ban is not None:
            own["ban"] = tuple(token_of(tokenizer, item, "ban") for item in self.ban)
        if self.ban_words is not None:
            own["ban_words"] = tuple(dict.fromkeys(ids for item in self.ban_words for ids in word_ids(tokenizer, item)))
        if self.penalty is not None:  # two penalties of repetition would be one too many
            own["repetition_penalty"] = SamplingParams.repetition_penalty
        return SamplingParams(**{**defaults, **own, **self._plain_sampling()})

    @property
    def chat(self) -> Chat:
        """Returns the rules by which a prompt becomes tokens."""
        return Chat(
            self.raw, self.system, self.chat_template, self.template_args, self.continue_final_message, self.no_bos,
            self.special,
        )  # fmt: skip

    def stop_ids(self, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
        """Returns the tokens that end the text: `stop_tokens`, and stop strings that are a special token, which
        decodes to nothing. Raises UserError for ids the model does not have, and for strings that hold such a token
        and more."""
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
        """Returns the parameters that were asked for and need no tokenizer."""
        values = {name: getattr(self, name) for name in PLAIN_SAMPLING}
        if isinstance(self.logit_bias, Mapping):  # JSON has text keys
            values["logit_bias"] = {whole(token): bias for token, bias in self.logit_bias.items()}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def draft_kind(self) -> tuple[str, str, str, str | int]:
        """Returns what draft passes are made with. Those of texts with the same share models, and cost alike."""
        return self.chosen_drafter, self.draft_weights, self.draft_kv, self.draft_vocabulary

    @property
    def chosen_drafter(self) -> str:
        """Returns the drafter that auto means, else the one that was asked for."""
        if self.drafter != "auto":
            return self.drafter
        return AUTO_WITH_MODEL if self.draft_model is not None else AUTO_DRAFTER


def described_options() -> dict[str, Description]:
    """Returns every option by its name, in the order of the fields."""
    return {f.name: f.metadata["option"] for f in fields(Options)}


def whole(token: Any) -> Any:
    try:
        return int(token) if isinstance(token, str) else token
    except ValueError:
        return token
