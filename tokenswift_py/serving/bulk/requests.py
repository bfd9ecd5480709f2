"""Requests of OpenAI's API without HTTP, for bulk files and Ray. Checks, settings and answers are the server's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tokenswift_py.errors import UserError
from tokenswift_py.runs.result import Piece
from tokenswift_py.serving.engine import Engine
from tokenswift_py.serving.http.answers import ChatAnswer, CompletionAnswer
from tokenswift_py.serving.http.asked import Asked, Server
from tokenswift_py.serving.http.protocol import ChatRequest, CompletionRequest, ResponseRequest
from tokenswift_py.serving.http.refusals import Refusal, of_user_error, of_validation
from tokenswift_py.serving.http.responses import ResponseAnswer
from tokenswift_py.serving.http.texts import Ended
from tokenswift_py.serving.http.tokens import TokenTexts
from tokenswift_py.serving.limits import Limits
from tokenswift_py.serving.texts import Text

SHAPES: dict[str, Any] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
}


class Answering:
    """A request whose texts are being written.

    answer: the object that makes the body of the answer.
    over:   a function that the engine's thread calls once, when the last text has ended.
    """

    def __init__(self, texts: Sequence[Text], answer: Any, over: Callable[[], None]):
        self.texts, self._answer, self._over = texts, answer, over
        self._pieces: list[list[Piece]] = [[] for _ in texts]
        self._left, self._lock = len(texts), threading.Lock()
        for text, pieces in zip(texts, self._pieces, strict=True):
            text.listen(partial(self._hear, pieces))

    def _hear(self, pieces: list[Piece], piece: Piece | None) -> None:
        if piece is not None:
            pieces.append(piece)
            return
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._over()

    def cancel(self) -> None:
        for text in self.texts:
            text.cancel()

    def body(self) -> dict[str, Any] | None:
        """Returns the answer, or None if a text was interrupted. If an error ended a text, raises it."""
        results = [text.result() for text in self.texts]
        if any(result.ending == "interrupted" for result in results):
            return None
        ends = [Ended(i, self._pieces[i], result, result.ending) for i, result in enumerate(results)]
        return dict(self._answer.complete(ends))


class Requests:
    """The requests to one engine.

    name:   the model's name in requests and answers.
    limits: the limits of one request.
    seed:   the seed of requests that have none. None draws one for each.
    """

    def __init__(self, engine: Engine, name: str, limits: Limits | None = None, seed: int | None = None):
        self.engine, self.name, self.seed = engine, name, seed
        self.server = Server(engine.loaded, engine.context, limits or Limits())
        self.tokens = TokenTexts(engine.loaded.tokenizer)

    def begin(self, url: str, body: Any, over: Callable[[], None]) -> Answering:
        """Hands the texts of a request to the engine: all or none. Raises Refusal and Busy.

        over: a function, see `Answering`.
        """
        request = validated(url, body)
        if request.model not in (None, self.name):
            said = f"model: {request.model!r} is not here; this is {self.name!r}"
            raise Refusal(404, said, "model", "model_not_found")
        if request.stream:
            raise Refusal(400, "stream: True is not allowed; an answer is a line here", "stream")
        if self.seed is not None and request.seed is None:
            request = request.model_copy(update={"seed": self.seed})
        names: dict[str, str] = {}
        texts: list[Text] = []
        try:
            asked, answer = self._meant(request)
            names = asked.names
            for prompt, sample in asked.choices:
                settings = {**asked.settings, "stream": sample}
                texts.append(self.engine.submit(asked.prompts[prompt], priority=asked.priority, **settings))
        except BaseException as error:
            for text in texts:
                text.cancel()
            if isinstance(error, UserError):
                raise of_user_error(error, names) from error
            raise
        return Answering(texts, answer, over)

    def _meant(self, request: Any) -> tuple[Asked, Any]:
        """Returns the settings of a request, and the object that makes its answer."""
        if isinstance(request, ChatRequest):
            asked = self.server.chat(request)
            return asked, ChatAnswer(self.name, asked, self.tokens)
        if isinstance(request, CompletionRequest):
            asked = self.server.completion(request)
            echoed = [self.server.detokenized(ids) for ids in asked.prompts] if request.echo else ()
            return asked, CompletionAnswer(self.name, asked, self.tokens, echoed)
        asked = self.server.response(request)
        return asked, ResponseAnswer(self.name, request, asked, self.tokens)


def validated(url: str, body: Any) -> Any:
    """Returns a body as the kind of request that it is. Raises Refusal."""
    from fastapi.exceptions import RequestValidationError
    from pydantic import ValidationError

    try:
        return SHAPES[url].model_validate(body)
    except ValidationError as error:
        raise of_validation(RequestValidationError(error.errors())) from error
