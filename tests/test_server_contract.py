"""The server keeps what its OpenAPI document says, whatever it is sent (schemathesis)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from servers import Running, running
from tokenswift_py import TokenSwift
from tokenswift_py.serving.engine import Engine

HEADERS = {"Authorization": "Bearer right"}
CHECKS = [
    not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance,
]  # fmt: skip
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Running]:
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", threads=1)
    with running(Engine(swift, 256), key="right", default_tokens=4, max_tokens=16, choices=3) as found:
        yield found


@pytest.fixture(scope="module")
def schema(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=HEADERS)


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


@pytest.mark.soak
@pytest.mark.parametrize("path", POSTS)
def test_every_answer_is_as_described_at_length(schema: Any, server: Running, path: str) -> None:
    hold(schema, server, path, 1000)
    assert server.engine.figures()["finished"].get("error", 0) == 0
