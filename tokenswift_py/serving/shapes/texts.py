"""Answers of the endpoints that write texts and tell tokens, in the form that OpenAI's and vLLM's clients expect."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, RootModel

from tokenswift_py.serving.shapes.document import Shape

Ending = Literal["eos", "stop", "loop", "length", "timeout", "interrupted"]
Finish = Literal["stop", "length"]


class Usage(Shape):
    """The numbers of tokens. A prompt counts once for all of its texts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Proven(Shape):
    """The fields that a client needs to write the text again and compare."""

    system_fingerprint: str = Field(description="numerics again")
    guarantee: str
    numerics: str
    context: int
    seed: int


class TokenText(Shape):
    """A token. `bytes` is null if the token is a part of a character."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TokenText):
    top_logprobs: list[TokenText]


# Chat completions


class ChatLogprobs(Shape):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(Shape):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Shape):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    ending: Ending


class ChatCompletion(Proven):
    id: str
    created: int
    model: str
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Shape):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    ending: Ending | None = None


class Chunk(Shape):
    """A part of a stream. The last chunk of each text has all fields of `Proven`, and so has the chunk with the
    usage."""

    id: str
    created: int
    model: str
    seed: int
    usage: Usage | None = None
    system_fingerprint: str | None = None
    guarantee: str | None = None
    numerics: str | None = None
    context: int | None = None


class ChatCompletionChunk(Chunk):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


# Completions


class CompletionLogprobs(Shape):
    """The log-probabilities of a completion. `text_offset` has the character at which each token begins. With `echo`
    the prompt's tokens come first, and its first token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish
    ending: Ending


class Completion(Proven):
    id: str
    created: int
    model: str
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    ending: Ending | None = None


class CompletionChunk(Chunk):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


# Responses


class OutputText(Shape):
    type: Literal["output_text"]
    text: str
    annotations: list[Any] = Field(max_length=0)
    logprobs: list[TokenLogprob]


class OutputMessage(Shape):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class CachedTokens(Shape):
    cached_tokens: int


class ReasoningTokens(Shape):
    reasoning_tokens: int


class ResponseUsage(Shape):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class Failure(Shape):
    code: str
    message: str


class Incomplete(Shape):
    reason: Literal["max_output_tokens"]


class TextShape(Shape):
    format: dict[str, Any]


class BegunResponse(Shape):
    """A response while it is written, or one that failed. The fields after `seed` are there when it is over."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    output: list[OutputMessage]
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: Failure | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: Literal[False]
    previous_response_id: None
    reasoning: None
    store: Literal[False]
    temperature: float | None
    top_p: float | None
    text: TextShape
    tool_choice: Literal["none"]
    tools: list[Any] = Field(max_length=0)
    top_logprobs: int
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    seed: int


class WholeResponse(BegunResponse, Proven):
    usage: ResponseUsage
    ending: Ending


class Numbered(Shape):
    """An event of a response's stream."""

    sequence_number: int


class Placed(Numbered):
    item_id: str
    output_index: Literal[0]
    content_index: Literal[0]


class ResponseBegan(Numbered):
    type: Literal["response.created", "response.in_progress", "response.failed"]
    response: BegunResponse


class ResponseOver(Numbered):
    type: Literal["response.completed", "response.incomplete"]
    response: WholeResponse


class ItemEvent(Numbered):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: Literal[0]
    item: OutputMessage


class PartEvent(Placed):
    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText


class TextDelta(Placed):
    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(Placed):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[TokenLogprob]


class ErrorEvent(Numbered):
    type: Literal["error"]
    code: str
    message: str
    param: str | None


Event = ResponseBegan | ResponseOver | ItemEvent | PartEvent | TextDelta | TextDone | ErrorEvent


class ResponseEvent(RootModel[Event]):
    """The data of an event of a response's stream."""


# Models and tokens


class ModelCard(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Shape):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Shape):
    prompt: str


class Health(Shape):
    status: Literal["ok", "stopping"]


ALL = (
    ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk, WholeResponse, ResponseEvent, ModelCard,
    ModelList, Tokenized, Detokenized, Health,
)  # fmt: skip
