"""The parameters of our own that a request may have, as further fields of its JSON. All are fields of `Options` and
have the same names there."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from tokenswift_py.options import described_options
from tokenswift_py.serving.http.refusals import Refusal

MOST_FIELDS = 200  # of one object in a request

# The parameters that a request may set. Those that OpenAI has its own words for (max_tokens, logprobs, response_format)
# are not among them.
REQUESTS = frozenset(
    (
        "min_new_tokens", "min_chapter_tokens", "ignore_eos", "stop", "stop_tokens", "keep_stop", "on_loop", "chapters",
        "template_args", "continue_final_message", "no_bos", "special", "grammar", "regex", "draft_tokens",
        "temperature", "top_k", "top_p", "min_p", "penalty", "penalty_window", "dry_multiplier", "dry_base",
        "dry_length", "dry_window", "dry_breakers", "ban", "ban_words", "logit_bias", "seed", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "top_n_sigma", "typical_p", "xtc_threshold",
        "xtc_probability",
    )
)  # fmt: skip
# The parameters that a request may not set. The server decides some of them for all texts. Others name a file on the
# server, or would run code (a chat template is a program). For the rest a request uses OpenAI's words.
SERVERS = frozenset(
    (
        "context", "positions", "positions_window", "positions_block", "drafter", "draft_policy", "draft_budget",
        "draft_weights", "draft_kv", "draft_vocabulary", "draft_model", "draft_heads", "trace", "kv_budget",
        "kv_policy", "kv_memory", "kv_gates", "system", "raw", "logits_processors", "chat_template", "max_new_tokens",
        "json_schema", "logprobs", "prompt_logprobs", "stream",
    )
)  # fmt: skip

TEXTS = {"type": "array", "items": {"type": "string"}}
SHAPES: dict[str, dict[str, Any]] = {  # by the name of an option's kind
    "Whole": {"type": "integer"}, "Number": {"type": "number"}, "Real": {"type": "number"},
    "Switch": {"type": "boolean"}, "Choice": {"type": "string"}, "Text": {"type": "string"},
    "Language": {"type": "string"}, "Texts": TEXTS, "Words": {"type": "array"}, "Arguments": {"type": "object"},
    "Biases": {"type": "object", "additionalProperties": {"type": "number"}},
    "Tokens": {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}},
}  # fmt: skip


def shape(kind: Any) -> dict[str, Any]:
    """Returns what the OpenAPI document says about an option's values. `Options` says whether a value is right."""
    said = SHAPES.get(type(kind).__name__, {})
    said = {"type": "integer"} if getattr(kind, "whole", False) else said
    ranges = {"minimum": getattr(kind, "least", None), "maximum": getattr(kind, "most", None)}
    names = {"enum": list(kind.names)} if getattr(kind, "names", ()) and not kind.package else {}
    some = {**said, **names, **{name: value for name, value in ranges.items() if value is not None}}
    return {"anyOf": [some, {"type": "null"}]} if some else {}


class Body(BaseModel):
    """The JSON of a request. No field is dropped silently, and no value is read as another type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def of_few_fields(cls, said: Any) -> Any:
        """Refuses more fields than there are before each is found to be unknown."""
        if isinstance(said, dict) and len(said) > MOST_FIELDS:
            raise Refusal(400, f"body: {len(said)} fields are not allowed; at most {MOST_FIELDS}")
        return said


def fields() -> dict[str, Any]:
    """Returns the fields that `REQUESTS` names, with what `Options` says about them."""
    found: dict[str, Any] = {}
    for name, described in described_options().items():
        if name in REQUESTS:
            extra = shape(described.kind)
            found[name] = (Any, Field(default=None, description=described.help, json_schema_extra=extra))
    one_or_more: dict[str, Any] = {"anyOf": [{"type": "string"}, TEXTS, {"type": "null"}]}
    told = "end before this text, or before any of these"
    return {**found, "stop": (Any, Field(default=None, description=told, json_schema_extra=one_or_more))}


OwnParameters: Any = create_model("OwnParameters", __base__=Body, **fields())


def given(request: Any) -> dict[str, Any]:
    """Returns the options that a request sets, by their names. null means that an option is not set."""
    said = {name: getattr(request, name, None) for name in REQUESTS}
    said["stop"] = [said["stop"]] if isinstance(said["stop"], str) else said["stop"]
    return {name: value for name, value in said.items() if value is not None}
