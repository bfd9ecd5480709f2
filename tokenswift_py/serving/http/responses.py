"""The endpoint /v1/responses: the same texts in the shape of OpenAI's Responses API, whole or as its events. Nothing is
stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from tokenswift_py.runs.result import Piece
from tokenswift_py.serving.http.answers import dumped, proof, usage
from tokenswift_py.serving.http.asked import Asked
from tokenswift_py.serving.http.protocol import ResponseRequest
from tokenswift_py.serving.http.refusals import Refusal, of_failure
from tokenswift_py.serving.http.texts import Ended, Texts
from tokenswift_py.serving.http.tokens import TokenTexts

PLACE = {"output_index": 0, "content_index": 0}


class ResponseAnswer:
    """A response and its one message."""

    def __init__(self, model: str, request: ResponseRequest, asked: Asked, tokens: TokenTexts):
        self.asked, self.tokens = asked, tokens
        self.wants_logprobs = "logprobs" in asked.settings
        self.id, self.message_id = (f"{kind}_{secrets.token_hex(16)}" for kind in ("resp", "msg"))
        form = request.text.format if request.text else None
        self.body: dict[str, Any] = {
            "id": self.id, "object": "response", "created_at": int(time.time()), "model": model, "output": [],
            "status": "in_progress", "background": False, "error": None, "incomplete_details": None,
            "instructions": request.instructions, "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {}, "parallel_tool_calls": False, "previous_response_id": None,
            "reasoning": None, "store": False, "temperature": request.temperature, "top_p": request.top_p,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": "none", "tools": [], "top_logprobs": request.top_logprobs or 0, "truncation": "disabled",
            "usage": None, "user": request.user, "seed": asked.settings["seed"],
        }  # fmt: skip

    def complete(self, ends: Sequence[Ended]) -> dict[str, Any]:
        (end,) = ends
        result = end.result
        whole = end.finish_reason == "stop"
        counts = usage(ends, self.asked)
        shaped = {
            "input_tokens": counts["prompt_tokens"], "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": counts["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }  # fmt: skip
        sampling = result.report["parameters"]
        return {
            **self.body, **proof(result), "status": "completed" if whole else "incomplete", "ending": end.ending,
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "temperature": sampling["temperature"], "top_p": sampling["top_p"], "usage": shaped,
            "output": [self.message(self.part(result.text, end.pieces), "completed" if whole else "incomplete")],
        }  # fmt: skip

    def message(self, part: dict[str, Any] | None, status: str) -> dict[str, Any]:
        content = [] if part is None else [part]
        return {"id": self.message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def part(self, text: str, pieces: Sequence[Piece] = ()) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs(pieces)}

    def logprobs(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return self.tokens.content(self.tokens.told(pieces)) if self.wants_logprobs else []

    async def events(self, texts: Texts) -> AsyncIterator[dict[str, str]]:
        """Yields server-sent events. They have names and numbers."""
        number = -1

        def event(kind: str, **fields: Any) -> dict[str, str]:
            nonlocal number
            number += 1
            return {"event": kind, "data": dumped({"type": kind, "sequence_number": number, **fields})}

        item = {"item_id": self.message_id, **PLACE}
        try:
            yield event("response.created", response=self.body)
            yield event("response.in_progress", response=self.body)
            yield event("response.output_item.added", output_index=0, item=self.message(None, "in_progress"))
            yield event("response.content_part.added", part=self.part(""), **item)
            async for said in texts.events():
                if isinstance(said, Ended):
                    for closing in await run_in_threadpool(self.closing, said, event, item):
                        yield closing
                elif said.piece.text or (self.wants_logprobs and said.piece.tokens):
                    logprobs = self.logprobs([said.piece])
                    yield event("response.output_text.delta", delta=said.piece.text, logprobs=logprobs, **item)
        except Exception as error:
            refusal = error if isinstance(error, Refusal) else of_failure(error)
            told = {"code": refusal.code or "server_error", "message": refusal.message}
            yield event("error", **told, param=refusal.param)
            yield event("response.failed", response={**self.body, "status": "failed", "error": told})

    def closing(self, end: Ended, event: Any, item: dict[str, Any]) -> list[dict[str, str]]:
        """Returns the events after the last token."""
        whole = self.complete([end])
        message = whole["output"][0]
        part = message["content"][0]
        kind = "response.completed" if whole["status"] == "completed" else "response.incomplete"
        return [
            event("response.output_text.done", text=part["text"], logprobs=part["logprobs"], **item),
            event("response.content_part.done", part=part, **item),
            event("response.output_item.done", output_index=0, item=message),
            event(kind, response=whole),
        ]
