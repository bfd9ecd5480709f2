"""Chat completions and completions: the answers to one request, whole or in chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.types import Receive, Scope, Send

from tokenswift_py.runs.result import Piece, Result
from tokenswift_py.serving.http.asked import Asked
from tokenswift_py.serving.http.refusals import Refusal, of_failure
from tokenswift_py.serving.http.texts import Ended, Said, Texts
from tokenswift_py.serving.http.tokens import Offsets, TokenTexts

DONE = "[DONE]"


def usage(ends: Sequence[Ended], asked: Asked) -> dict[str, Any]:
    """Returns the number of tokens of all texts of a request. A prompt counts once for all of its texts. Turns that
    were forced into a text count as input, too."""
    read = sum(map(len, asked.prompts)) + sum(end.result.stats.forced_tokens for end in ends)
    written = sum(end.result.stats.new_tokens for end in ends)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def proof(result: Result) -> dict[str, Any]:
    """Returns what a client needs to write the text again and compare. `TokenSwift.generate` with the same prompt,
    parameters, seed and context writes the same bytes under the same numerics, if the guarantee is bitwise."""
    report = result.report
    return {
        "system_fingerprint": report["numerics"],
        "guarantee": report["guarantee"],
        "numerics": report["numerics"],
        "context": report["parameters"]["context"],
        "seed": report["seed"],
    }


class Answer:
    """The parts that chat completions and completions have in common."""

    prefix, whole, chunk = "", "", ""

    def __init__(self, model: str, asked: Asked, tokens: TokenTexts, echoed: Sequence[str] = ()):
        self.asked, self.tokens, self.echoed = asked, tokens, echoed
        self.wants_logprobs = "logprobs" in asked.settings
        self.wants_likeliest = asked.settings.get("logprobs", 0) > 0
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def choice(self, index: int, text: str, logprobs: Any, end: Ended | None) -> dict[str, Any]:
        """Returns a text of a whole answer.

        logprobs: the log-probabilities in the form of this kind of answer.
        """
        raise NotImplementedError

    def delta(self, index: int, text: str | None, logprobs: Any, end: Ended | None) -> dict[str, Any]:
        """Returns a part of a text for a chunk.

        text: the characters of the part. None means the chunk before the first part.
        """
        raise NotImplementedError

    def logprobs(self, index: int, pieces: Sequence[Piece], special: bool = False) -> Any:
        raise NotImplementedError

    def complete(self, ends: Sequence[Ended]) -> dict[str, Any]:
        choices = []
        for end in ends:
            whole = end.result.prompt_logprobs is not None  # then clients count all tokens
            logprobs: Any = self.logprobs(end.index, end.pieces, whole) if self.wants_logprobs else None
            if end.result.prompt_logprobs is not None:
                prompt = self.asked.prompts[self.asked.choices[end.index][0]]
                before = self.tokens.of_prompt(prompt, end.result.prompt_logprobs, self.wants_likeliest)
                logprobs = {name: joined(before[name], logprobs[name]) for name in before}
            choices.append(self.choice(end.index, self.before(end.index) + end.result.text, logprobs, end))
        return {**self.head, "object": self.whole, "choices": choices, "usage": usage(ends, self.asked),
                **proof(ends[0].result)}  # fmt: skip

    def before(self, index: int) -> str:
        """Returns the part of an answer that comes before a text: its prompt, if that is wanted."""
        return self.echoed[self.asked.choices[index][0]] if self.echoed else ""

    async def chunks(self, texts: Texts, include_usage: bool) -> AsyncIterator[str]:
        """Yields the data of server-sent events. An error in the middle is sent as an event and ends the stream."""
        ends: list[Ended] = []
        common = {**self.head, "object": self.chunk, "seed": self.asked.settings["seed"]}
        if include_usage:
            common["usage"] = None
        try:
            for index in range(len(texts.texts)):
                for opening in self.opening(index):
                    yield dumped({**common, "choices": [opening]})
            async for event in texts.events():
                if isinstance(event, Ended):
                    ends.append(event)
                    closing = {**common, "choices": [self.delta(event.index, "", None, event)]}
                    yield dumped({**closing, **proof(event.result)})
                elif choice := self.part(event):
                    yield dumped({**common, "choices": [choice]})
            if include_usage:
                yield dumped({**common, "choices": [], "usage": usage(ends, self.asked), **proof(ends[0].result)})
        except Exception as error:
            yield dumped((error if isinstance(error, Refusal) else of_failure(error)).body())
        yield DONE

    def opening(self, index: int) -> Iterator[dict[str, Any]]:
        """Yields the chunks before the first token of a text."""
        if text := self.before(index):
            yield self.delta(index, text, None, None)

    def part(self, said: Said) -> dict[str, Any] | None:
        """Returns a chunk for a piece, if there is anything to tell."""
        text, logprobs = said.piece.text, None
        if self.wants_logprobs and said.piece.tokens:
            logprobs = self.logprobs(said.index, [said.piece])
        return self.delta(said.index, text, logprobs, None) if text or logprobs else None


class ChatAnswer(Answer):
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, logprobs: Any, end: Ended | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, **ended(end)}

    def delta(self, index: int, text: str | None, logprobs: Any, end: Ended | None) -> dict[str, Any]:
        said = {} if end else {"content": text or ""} if text is not None else {"role": "assistant", "content": ""}
        return {"index": index, "delta": said, "logprobs": logprobs, **ended(end)}

    def opening(self, index: int) -> Iterator[dict[str, Any]]:
        yield self.delta(index, None, None, None)

    def logprobs(self, index: int, pieces: Sequence[Piece], special: bool = False) -> Any:
        return {"content": self.tokens.content(self.tokens.told(pieces)), "refusal": None}


class CompletionAnswer(Answer):
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._offsets: dict[int, Offsets] = {}

    def choice(self, index: int, text: str, logprobs: Any, end: Ended | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, **ended(end)}

    def delta(self, index: int, text: str | None, logprobs: Any, end: Ended | None) -> dict[str, Any]:
        return self.choice(index, text or "", logprobs, end)

    def logprobs(self, index: int, pieces: Sequence[Piece], special: bool = False) -> Any:
        if index not in self._offsets:
            prompt = self.asked.prompts[self.asked.choices[index][0]]
            self._offsets[index] = self.tokens.offsets(prompt, len(self.before(index)))
        offsets = [offset for piece in pieces for offset in self._offsets[index].of(piece, special)]
        return self.tokens.columns(self.tokens.told(pieces, special), offsets, self.wants_likeliest)


def joined(before: list[Any] | None, after: list[Any] | None) -> list[Any] | None:
    return None if before is None or after is None else [*before, *after]


def ended(end: Ended | None) -> dict[str, Any]:
    """Returns the end of a text. `ending` is our own word: eos, stop, loop, length, timeout or interrupted."""
    return {"finish_reason": end.finish_reason, "ending": end.ending} if end else {"finish_reason": None}


class Events(EventSourceResponse):
    """Server-sent events. A client that does not read for `stall` seconds is taken for gone (0: never)."""

    def __init__(self, events: Any, stall: float, headers: Mapping[str, str] | None = None):
        super().__init__(events, sep="\n", send_timeout=stall or None, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(SendTimeoutError):
            await super().__call__(scope, receive, send)


def dumped(value: Any) -> str:
    """Returns JSON that UTF-8 can hold. Text from a client may come back with halves of surrogate pairs in it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace").decode()
