"""The requests of clients: those of OpenAI, and vLLM's requests to /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tokenswift_py.serving.http.own import Body, OwnParameters
from tokenswift_py.serving.http.refusals import Refusal

Count = Annotated[int, Field(ge=1, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
ONE_ERROR = Field(fail_fast=True)  # only one is told, so no more are looked for in a long list
TokenIds = Annotated[list[TokenId], ONE_ERROR]


def neutral(*values: Any) -> Any:
    """Returns a field of OpenAI's that must ask for nothing: it is null, or one of these values."""
    said = "only where it asks for nothing"
    return Field(default=None, description=said, json_schema_extra={"enum": [None, *values]})


class Part(BaseModel):
    """A part of a message. Clients may send back the further fields that answers have."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(BaseModel):
    """A message of a conversation. An answer may be sent back as it came. Fields that are not text must be empty."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], ONE_ERROR]

    @model_validator(mode="after")
    def only_text(self) -> Message:
        left = ("id", "type", "status", "name", "phase")  # these say nothing to the model
        for name, value in (self.model_extra or {}).items():
            plain = value is None or isinstance(value, (str, int)) if name in left else value in (None, [], {}, "")
            if not plain:
                raise ValueError(f"{name}: messages are text here")
        return self

    def plain(self) -> dict[str, str]:
        """Returns the message in the form that chat templates take."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[Message], ONE_ERROR]


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Body):
    """The form that the text must have. json_object is any JSON object."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def wanted(self) -> dict[str, Any] | None:
        if self.type == "json_object":
            return {"type": "object"}
        return (self.json_schema.schema_ if self.json_schema else None) or {} if self.type == "json_schema" else None


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Request(OwnParameters):
    """The fields that all requests for texts may have.

    sample:   the number of the first text. `n` texts are samples `sample`, `sample` + 1, ... of one prompt and seed.
    priority: the urgency of the texts. Texts of higher priority are served sooner. Others that wait catch up.
    """

    model: str | None = Field(default=None, description="this server's model, or nothing")
    stream: bool | None = None
    user: str | None = None
    sample: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    priority: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def asks_for_nothing_else(self) -> Any:
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and "enum" in extra and getattr(self, name) not in extra["enum"]:
                raise Refusal(400, f"{name}: this server has nothing of the kind", name, "unsupported_parameter")
        return self


class ChatRequest(Request):
    messages: Messages = Field(min_length=1)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    tools: Any = neutral([])
    tool_choice: Any = neutral("none", "auto")
    functions: Any = neutral([])
    function_call: Any = neutral("none", "auto")
    modalities: Any = neutral(["text"])
    audio: Any = neutral()
    prediction: Any = neutral()
    reasoning_effort: Any = neutral("none")
    verbosity: Any = neutral()
    web_search_options: Any = neutral()
    service_tier: Any = neutral("auto", "default")
    store: Any = neutral(False)


class CompletionRequest(Request):
    prompt: str | Annotated[list[str], ONE_ERROR] | TokenIds | Annotated[list[TokenIds], ONE_ERROR]
    max_tokens: Count | None = None
    n: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    best_of: Any = neutral(1)
    suffix: Any = neutral("")

    def prompts(self) -> list[str | list[int]]:
        """Returns the prompts: texts and lists of token ids."""
        said: Any = self.prompt
        return [said] if isinstance(said, str) or (said and isinstance(said[0], int)) else list(said)


class TextFormat(Body):
    """The field `text.format` of a response. There, a schema stands beside its name."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    def wanted(self) -> dict[str, Any] | None:
        if self.type == "json_object":
            return {"type": "object"}
        return self.schema_ or {} if self.type == "json_schema" else None


class TextSettings(Body):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseRequest(Request):
    input: str | Messages = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextSettings | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], ONE_ERROR] | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    stream_options: StreamOptions | None = None
    background: Any = neutral(False)
    conversation: Any = neutral()
    max_tool_calls: Any = neutral()
    previous_response_id: Any = neutral()
    prompt: Any = neutral()
    reasoning: Any = neutral({})
    service_tier: Any = neutral("auto", "default")
    store: Any = neutral(False)
    tool_choice: Any = neutral("none", "auto")
    tools: Any = neutral([])
    truncation: Any = neutral("disabled")


class TokenizeRequest(Body):
    """A text, or messages in the form that the chat template takes."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: TokenIds
