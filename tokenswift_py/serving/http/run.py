"""Serves until a signal comes. From then on there are no new texts. The texts in work get some time, then the server
ends."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn

from tokenswift_py.errors import files
from tokenswift_py.serving.http.server import Service

logger = logging.getLogger("tokenswift")

GRACE = 10.0  # seconds for the last bytes to reach clients, after the time for the texts
BACKLOG = 256  # the number of connections that may wait to be taken


class DrainingServer(uvicorn.Server):
    """A server that stops at the first SIGTERM or SIGINT. Texts then have `drain` seconds, and end as interrupted. At
    the second signal they end at once."""

    def __init__(self, service: Service, config: uvicorn.Config, drain: float):
        super().__init__(config)
        self.service, self.drain = service, drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.service.draining = True
        figures = self.service.engine.figures()
        if texts := int(figures["running"] + figures["waiting"]):
            logger.warning("stopping: %d texts have %g s; a second signal ends them at once", texts, self.drain)
        draining = loop.run_in_executor(None, self.service.close, self.drain)
        await super().shutdown(sockets)
        while not draining.done() and not self.force_exit:
            await asyncio.sleep(0.05)
        await loop.run_in_executor(None, self.service.close, 0.0)
        await draining


def bound(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at this host and port. Raises UserError.

    port: the number of the port. 0 takes any port that is free.
    """
    with files("port", f"{host}:{port}", "an address of this machine that is free"):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
    return made


def configuration(service: Service, drain: float) -> uvicorn.Config:
    """Returns the configuration of a server whose errors and warnings go to the log of this process."""
    return uvicorn.Config(
        service.app, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none",
        timeout_keep_alive=30, timeout_graceful_shutdown=int(drain + GRACE),
    )  # fmt: skip


def serve(service: Service, listening: socket.socket, drain: float) -> None:
    """Answers until a signal says to stop."""
    DrainingServer(service, configuration(service, drain), drain).run(sockets=[listening])
