"""The gate before the server: bodies that come slowly, and requests that are given up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tokenswift_py.serving.http import gate
from tokenswift_py.serving.http.gate import Gate

SCOPE: Any = {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}


class Client:
    """Sends parts of a body when it is told to. sent: what it was answered."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        part: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.parts.put_nowait(part)
        return await part

    async def send(self, message: Any) -> None:
        self.sent.append(message)


async def nothing(*_: Any) -> None:
    raise AssertionError("the application was asked")


def test_a_request_that_is_given_up_as_a_part_of_its_body_comes_is_given_up() -> None:
    async def run() -> None:
        client = Client()
        task = asyncio.ensure_future(Gate(nothing, None, None, 1)(SCOPE, client.receive, client.send))
        part = await client.parts.get()
        part.set_result({"type": "http.request", "body": b"x", "more_body": True})
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
        assert done and task.cancelled()

    asyncio.run(run())


def test_a_body_that_does_not_come_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        client = Client()
        await asyncio.wait_for(Gate(nothing, None, None, 1)(SCOPE, client.receive, client.send), 30)
        assert client.sent[0]["status"] == 408 and b"did not come" in client.sent[1]["body"]

    monkeypatch.setattr(gate, "BODY_SECONDS", 0.01)
    asyncio.run(run())


@pytest.mark.parametrize("path", gate.OPEN)
def test_nothing_is_read_of_who_has_shown_no_key(path: str) -> None:
    bodies: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        bodies.append(await receive())

    async def run() -> None:
        await Gate(application, "key", None, 1)({**SCOPE, "path": path}, nothing, nothing)

    asyncio.run(run())
    assert bodies == [{"type": "http.request", "body": b"", "more_body": False}]
