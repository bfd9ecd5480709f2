"""A server in a thread, as clients meet it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai

from tokenswift_py.serving.http.limits import Limits
from tokenswift_py.serving.http.run import DrainingServer, bound, configuration
from tokenswift_py.serving.http.server import Service


@dataclass
class Running:
    """A server, and how to reach it."""

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
    """settings: of `Service`, and of `Limits`. The engine is closed with the server."""
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


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    """Waits for it. Raises AssertionError."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
