"""A server in a thread, in the way that clients meet it."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from typing import Any

import openai
import pytest

from tokenswift_py.serving.http.run import DrainingServer, bound, configuration
from tokenswift_py.serving.http.server import Service
from tokenswift_py.serving.jobs.job import Job
from tokenswift_py.serving.limits import Limits


@dataclass
class Running:
    """A server and its address."""

    engine: Any
    service: Service
    server: DrainingServer
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def running(engine: Any, drain: float = 0.0, **settings: Any) -> Iterator[Running]:
    """Runs a server, and closes it and its engine at the end. settings: settings of `Service` and of `Limits`."""
    limits = {name: settings.pop(name) for name in Limits.__dataclass_fields__ if name in settings}
    service = Service(engine, "tiny", Limits(**limits), **settings)
    with bound("127.0.0.1", 0) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a client that does not read is soon noticed
        server = DrainingServer(service, configuration(service, drain), drain)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        until(lambda: server.started)
        try:
            yield Running(engine, service, server, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


def braked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slows jobs of many tokens, so that none is over before a test has seen it, however fast the machine is."""
    hear = Job.hear

    def slowly(job: Job, piece: Any) -> None:
        hear(job, piece)
        if job.wanted >= 6000:
            time.sleep(0.02)

    monkeypatch.setattr(Job, "hear", slowly)


@dataclass
class Reply:
    status: int
    headers: Message
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


def ask(url: str, body: Any = None, **headers: str) -> Reply:
    """Sends a plain request. body: JSON, bytes, or parts of them, whose length is not told; None is a GET."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    named = {name.replace("_", "-"): value for name, value in {"Content_Type": "application/json", **headers}.items()}
    request = urllib.request.Request(url, data, named, method="GET" if data is None else "POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return Reply(reply.status, reply.headers, reply.read().decode())
    except urllib.error.HTTPError as error:
        return Reply(error.code, error.headers, error.read().decode())


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    """Waits for a condition. Raises AssertionError."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
