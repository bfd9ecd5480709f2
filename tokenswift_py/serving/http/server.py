"""The application: OpenAI's endpoints, and vLLM's endpoints for tokens and metrics. One engine writes all texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from sse_starlette.sse import AppStatus
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tokenswift_py.errors import shown
from tokenswift_py.serving.engine import Engine
from tokenswift_py.serving.http import protocol, refusals
from tokenswift_py.serving.http.answers import ChatAnswer, CompletionAnswer, Events, dumped
from tokenswift_py.serving.http.asked import Asked, Server
from tokenswift_py.serving.http.gate import Gate
from tokenswift_py.serving.http.metrics import Metrics
from tokenswift_py.serving.http.refusals import DESCRIBED, RETRY_AFTER, ErrorBody, Refusal
from tokenswift_py.serving.http.responses import ResponseAnswer
from tokenswift_py.serving.http.texts import Texts, finished
from tokenswift_py.serving.http.tokens import TokenTexts
from tokenswift_py.serving.jobs.jobs import Jobs
from tokenswift_py.serving.jobs.routes import job_routes
from tokenswift_py.serving.limits import Limits
from tokenswift_py.serving.shapes import jobs as job_shapes
from tokenswift_py.serving.shapes import texts as shapes
from tokenswift_py.serving.shapes.document import described, install
from tokenswift_py.version import __version__

LEFT = 499  # the status of an answer that nobody waits for, as nginx logs it
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return dumped(content).encode()


class TextEvents(Events):
    """The events of texts, which are given up if the client leaves, or does not read for too long."""

    def __init__(self, events: Any, texts: Texts, stall: float):
        super().__init__(events, stall)
        self._texts = texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also when not a single event was asked for
            self._texts.cancel()


class Service:
    """An engine that is reached over HTTP. `app` is the ASGI application.

    name:  the model's name in requests and answers.
    key:   the key that clients must send, see `Gate`.
    hosts: the names of the server, see `Gate`.
    cors:  the origins whose pages may ask. The default is none.
    jobs:  the long texts that outlive the server. The page at `/` shows them. None leaves out both.
    """

    def __init__(
        self, engine: Engine, name: str, limits: Limits | None = None, key: str | None = None,
        hosts: Collection[str] | None = None, cors: Sequence[str] = (), jobs: Jobs | None = None,
    ):  # fmt: skip
        self.engine, self.name, self.limits = engine, name, limits or Limits()
        self.jobs = jobs
        self.draining = False  # True from when no new texts are taken
        self.started = int(time.time())
        self.server = Server(engine.loaded, engine.context, self.limits)
        self.tokens = TokenTexts(engine.loaded.tokenizer)
        self.metrics = Metrics(name, engine.figures)
        AppStatus.disable_automatic_graceful_drain()  # the engine ends the texts, and with them the streams
        self.app = FastAPI(title="tokenswift", version=__version__, docs_url=None, redoc_url=None)
        self.app.add_middleware(Gate, key=key, hosts=hosts, body_mib=self.limits.body_mib, origins=cors)
        if cors:
            # OpenAI's client for JavaScript sends headers of its own (x-stainless-os and more), so any header may come.
            self.app.add_middleware(
                CORSMiddleware, allow_origins=list(cors), allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"],
                expose_headers=["Retry-After"],
            )  # fmt: skip
        refusals.install(self.app)
        self._routes()
        if jobs is not None:
            self.app.include_router(job_routes(jobs, self.limits, self.check_model))
        install(self.app, *shapes.ALL, *(job_shapes.ALL if jobs is not None else ()))

    async def begin(self, model: str | None, body: Any, make: Callable[[Any], Asked]) -> tuple[Asked, Texts]:
        """Checks a request and hands its texts to the engine."""
        began = time.monotonic()
        self.check_model(model)
        if self.draining:
            raise Refusal(503, "the server is stopping", None, "stopping", RETRY_AFTER)
        asked = await run_in_threadpool(make, body)
        return asked, await Texts.submit(self.engine, asked, self.limits.timeout, self.metrics, began)

    def check_model(self, model: str | None) -> None:
        if model not in (None, self.name):
            told = f"model: {shown(model)} is not here; this server has {self.name!r}"
            raise Refusal(404, told, "model", "model_not_found")

    def close(self, drain: float) -> None:
        """Stops the jobs, which go on when the server starts again. Then gives the texts this time, and stops the
        engine."""
        if self.jobs is not None:
            self.jobs.close()
        self.engine.close(drain)

    def model(self) -> Mapping[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "tokenswift",
                "max_model_len": self.engine.context}  # fmt: skip

    async def answer(self, answer: Any, texts: Texts, request: Request) -> Response:
        """Returns a whole answer."""
        ends = await finished(texts, request.receive)
        if ends is None:
            return Response(status_code=LEFT)
        return await run_in_threadpool(lambda: Json(answer.complete(ends)))  # log-probabilities take a while

    def _routes(self) -> None:
        app, errors = self.app, {**DESCRIBED, "default": {"model": ErrorBody}}
        chat_of = described(shapes.ChatCompletion, shapes.ChatCompletionChunk)
        text_of = described(shapes.Completion, shapes.CompletionChunk)
        response_of = described(shapes.WholeResponse, shapes.ResponseEvent)

        @app.post("/v1/chat/completions", responses={**errors, 200: chat_of}, response_class=Json)
        async def chat(body: protocol.ChatRequest, request: Request) -> Response:
            """Answers a conversation, whole or as a stream."""
            asked, texts = await self.begin(body.model, body, self.server.chat)
            answer = ChatAnswer(self.name, asked, self.tokens)
            if body.stream:
                return TextEvents(answer.chunks(texts, wants_usage(body)), texts, self.limits.stall)
            return await self.answer(answer, texts, request)

        @app.post("/v1/completions", responses={**errors, 200: text_of}, response_class=Json)
        async def completions(body: protocol.CompletionRequest, request: Request) -> Response:
            """Goes on with a text, whole or as a stream. No chat template is used."""
            asked, texts = await self.begin(body.model, body, self.server.completion)
            told: Sequence[str] = ()
            if body.echo:
                told = await run_in_threadpool(lambda: [self.server.detokenized(ids) for ids in asked.prompts])
            answer = CompletionAnswer(self.name, asked, self.tokens, told)
            if body.stream:
                return TextEvents(answer.chunks(texts, wants_usage(body)), texts, self.limits.stall)
            return await self.answer(answer, texts, request)

        @app.post("/v1/responses", responses={**errors, 200: response_of}, response_class=Json)
        async def responses(body: protocol.ResponseRequest, request: Request) -> Response:
            """Answers in the shape of the Responses API. Nothing is stored."""
            asked, texts = await self.begin(body.model, body, self.server.response)
            try:
                answer = ResponseAnswer(self.name, body, asked, self.tokens)
            except BaseException:
                texts.cancel()
                raise
            if body.stream:
                return TextEvents(answer.events(texts), texts, self.limits.stall)
            return await self.answer(answer, texts, request)

        @app.get("/v1/models", responses={**errors, 200: described(shapes.ModelList)}, response_class=Json)
        async def models() -> Response:
            """Lists the model that this server has."""
            return Json({"object": "list", "data": [self.model()]})

        @app.get("/v1/models/{model:path}", responses={**errors, 200: described(shapes.ModelCard)}, response_class=Json)
        async def model(model: str) -> Response:
            self.check_model(model)
            return Json(self.model())

        @app.post("/tokenize", responses={**errors, 200: described(shapes.Tokenized)}, response_class=Json)
        async def tokenize(body: protocol.TokenizeRequest) -> Response:
            """Returns the token ids of a text, or of messages in the form that the chat template gives them."""
            self.check_model(body.model)
            found = await run_in_threadpool(self.server.tokenized, body.prompt, body.messages, body.add_special_tokens)
            return Json({"tokens": found, "count": len(found), "max_model_len": self.engine.context})

        @app.post("/detokenize", responses={**errors, 200: described(shapes.Detokenized)}, response_class=Json)
        async def detokenize(body: protocol.DetokenizeRequest) -> Response:
            """Returns the text of token ids, special tokens included."""
            self.check_model(body.model)
            return Json({"prompt": await run_in_threadpool(self.server.detokenized, body.tokens)})

        well, stopping = described(shapes.Health), described(shapes.Health, told="the server is stopping")

        @app.get("/health", responses={200: well, 503: stopping}, response_class=Json)
        async def health() -> Response:
            """Answers 200 while new texts are taken. It needs no key."""
            return Json({"status": "stopping" if self.draining else "ok"}, 503 if self.draining else 200)

        app.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)  # monitors ask so

        @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
        async def metrics() -> Response:
            """Returns the metrics for Prometheus, under vLLM's names."""
            return Response(self.metrics.text(), media_type=PROMETHEUS)


def wants_usage(body: Any) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)
