"""The server keeps what its OpenAPI document says, whatever it is sent (schemathesis)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from servers import Running, ask, running, until
from tokenswift_py import TokenSwift
from tokenswift_py.serving.engine import Engine
from tokenswift_py.serving.http.answers import dumped
from tokenswift_py.serving.jobs.jobs import Jobs
from tokenswift_py.serving.shapes import texts as shapes

HEADERS = {"Authorization": "Bearer right"}
CHECKS = [
    not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance,
]  # fmt: skip
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    engine = Engine(TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", threads=1), 256)
    jobs = Jobs(engine, tmp_path_factory.mktemp("contract") / "data")
    with running(engine, key="right", default_tokens=4, max_tokens=16, choices=3, jobs=jobs) as found:
        yield found


@pytest.fixture(scope="module")
def schema(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=HEADERS)


@pytest.fixture(scope="module")
def document(server: Running) -> dict[str, Any]:
    return dict(ask(f"{server.url}/openapi.json", **HEADERS).json())


def check(document: dict[str, Any], schema: Any, value: Any) -> None:
    """Holds a value against a schema of the document. Raises ValidationError."""
    within = {**schema, "components": document["components"]}
    jsonschema.Draft202012Validator(within).validate(value)


def answered(document: dict[str, Any], path: str, status: int, kind: str, method: str = "post") -> Any:
    """Returns what the document says of an answer."""
    return document["paths"][path][method]["responses"][str(status)]["content"][kind]["schema"]


def events(text: str) -> Iterator[Any]:
    """The JSON of each event of a stream."""
    for line in text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def hold(schema: Any, server: Running, path: str, examples: int, same: bool = False) -> set[int]:
    """Sends so many requests to a path, right ones and wrong ones; the statuses of the answers. same: every time."""
    operation = schema[path]["POST"]
    statuses: set[int] = set()

    @given(case=operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    @settings(
        max_examples=examples, database=None, derandomize=same, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def send(case: Any) -> None:
        response = case.call(base_url=server.url, headers=HEADERS)
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    send()
    return statuses


@pytest.mark.parametrize("path", POSTS)
def test_every_answer_is_as_described(schema: Any, server: Running, path: str) -> None:
    assert 400 in hold(schema, server, path, 10, same=True)
    assert server.engine.figures()["finished"].get("error", 0) == 0


def test_every_answer_of_the_document_names_its_fields(document: dict[str, Any]) -> None:
    """No answer in JSON is any object: each is a shape of the document, and so is what its events hold."""
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                for kind, content in response.get("content", {}).items():
                    where = f"{path} {status} {kind}"
                    if kind == "text/event-stream":
                        assert "$ref" in content["schema"]["properties"]["data"]["contentSchema"], where
                    elif kind == "application/json" and "/files/" not in path:
                        assert "$ref" in content["schema"], where
            assert any(status.startswith("2") for status in operation["responses"]), path


SAID = [{"role": "user", "content": "the cat"}]
ASKED: list[tuple[str, dict[str, Any], Any]] = [
    ("/v1/chat/completions", {"messages": SAID}, shapes.ChatCompletion),
    ("/v1/chat/completions", {"messages": SAID, "logprobs": True, "top_logprobs": 2, "n": 2}, shapes.ChatCompletion),
    ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 2}, shapes.Completion),
    ("/v1/completions", {"prompt": "a", "logprobs": 0}, shapes.Completion),
    ("/v1/responses", {"input": "the cat", "top_logprobs": 1, "user": "me"}, shapes.WholeResponse),
    ("/v1/responses", {"input": "the cat", "text": {"format": {"type": "text"}}}, shapes.WholeResponse),
]


@pytest.mark.parametrize(("path", "body", "shape"), ASKED)
def test_a_shape_holds_all_of_an_answer(
    document: dict[str, Any], server: Running, path: str, body: dict[str, Any], shape: Any
) -> None:
    """Read into its shape and written again, an answer is what it was: no field is missing or another."""
    reply = ask(f"{server.url}{path}", body, **HEADERS)
    assert reply.status == 200
    check(document, answered(document, path, 200, "application/json"), reply.json())
    again = shape.model_validate_json(reply.text).model_dump(exclude_unset=True)
    assert again == reply.json()
    assert dumped(reply.json()) == reply.text  # the bytes are the answer's own: no shape has made them


def test_the_logprobs_of_an_echo_are_as_described(document: dict[str, Any], server: Running) -> None:
    """The first token of a prompt has none."""
    reply = ask(f"{server.url}/v1/completions", {"prompt": ["a", "b"], "echo": True, "logprobs": 2}, **HEADERS)
    check(document, answered(document, "/v1/completions", 200, "application/json"), reply.json())


@pytest.mark.parametrize(("path", "body", "shape"), ASKED)
def test_every_event_is_as_described(
    document: dict[str, Any], server: Running, path: str, body: dict[str, Any], shape: Any
) -> None:
    described = answered(document, path, 200, "text/event-stream")["properties"]["data"]["contentSchema"]
    usage = {} if "responses" in path else {"stream_options": {"include_usage": True}}
    found = list(events(ask(f"{server.url}{path}", {**body, **usage, "stream": True}, **HEADERS).text))
    assert len(found) > 3
    for event in found:
        check(document, described, event)


def test_models_tokens_and_health_are_as_described(document: dict[str, Any], server: Running) -> None:
    for path, body in (("/v1/models", None), ("/health", None), ("/tokenize", {"prompt": "the cat"}),
                       ("/detokenize", {"tokens": [3, 4]})):  # fmt: skip
        method = "get" if body is None else "post"
        said = ask(f"{server.url}{path}", body, **HEADERS)
        check(document, answered(document, path, said.status, "application/json", method), said.json())
    one = ask(f"{server.url}/v1/models/tiny", **HEADERS)
    check(document, answered(document, "/v1/models/{model}", 200, "application/json", "get"), one.json())


def test_jobs_are_as_described(document: dict[str, Any], server: Running) -> None:
    def told(
        path: str, body: Any = None, status: int = 200, method: str = "get", kind: str = "application/json"
    ) -> Any:
        url = server.url + path.replace("{job}", name)
        reply = ask(url, body, **HEADERS)
        assert reply.status == status, reply.text
        found = answered(document, path, status, kind, method)
        if kind == "text/event-stream":
            for event in events(reply.text):
                check(document, found["properties"]["data"]["contentSchema"], event)
            return None
        check(document, found, reply.json())
        return reply.json()

    name = ""
    name = told("/v1/jobs", {"prompt": "the cat", "max_tokens": 16, "ignore_eos": True}, 201, "post")["id"]
    assert server.service.jobs is not None
    job = server.service.jobs.get(name)
    until(lambda: job.over)
    for what in ("audit", "quality"):
        told(f"/v1/jobs/{{job}}/{what}", b"", 202, "post")
        until(lambda: not job.examined)
    assert told("/v1/jobs/{job}")["quality"]["windows"] == 1
    told("/v1/jobs")
    told("/v1/jobs/{job}/text")
    told("/v1/jobs/{job}/events", kind="text/event-stream")
    told("/v1/jobs/{job}/cancel", b"", 200, "post")
    told("/v1/jobs/{job}/resume", b"", 409, "post")
    job.kept.quality = {"passed": None, "conclusion": "it broke off", "at": 1.0}
    told("/v1/jobs/{job}")


@pytest.mark.soak
@pytest.mark.parametrize("path", POSTS)
def test_every_answer_is_as_described_at_length(schema: Any, server: Running, path: str) -> None:
    hold(schema, server, path, 1000)
    assert server.engine.figures()["finished"].get("error", 0) == 0
