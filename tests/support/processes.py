"""Processes that torchrun would start, kept for several tests and asked to run functions at the same time."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

LOCAL = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false"}
Group = Callable[..., list[Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def begin(rank: int, world: int, port: int, then: Callable[[], None] | None) -> None:
    own = {"MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {**LOCAL, **{name: str(value) for name, value in own.items()}}
    torch.set_num_threads(1)
    if then is not None:
        then()


def processes(world: int, then: Callable[[], None] | None = None) -> Iterator[Group]:
    """Yields a function that runs another in all processes. It returns what each of them returned, or raises the first
    one's exception.

    then: what every process does first.
    """
    port, context = free_port(), get_context("forkserver")
    context.set_forkserver_preload(["tokenswift_py.api"])  # imported once for all processes, which are forks of one
    pools = [ProcessPoolExecutor(1, context, begin, (rank, world, port, then)) for rank in range(world)]

    def run(function: Callable[..., Any], *arguments: Any, **settings: Any) -> list[Any]:
        waiting = [pool.submit(function, *arguments, **settings) for pool in pools]
        failed = [f.exception(timeout=120) for f in waiting]
        if any(failed):
            raise next(error for error in failed if error)
        return [f.result() for f in waiting]

    yield run
    for pool in pools:
        pool.shutdown()
