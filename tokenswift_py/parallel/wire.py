"""Messages between the stages of a pipeline: commands, activations, statistics and answers.

All go over gloo, through the memory of the host. Only numbers and text travel, nothing pickled. What is sent is kept
until it has arrived, so no process waits for one that is at work.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from tokenswift_py.parallel.ranks import RanksError, begin

IDLE = timedelta(days=3650)  # for which a stage waits for the next command
Array = npt.NDArray[Any]
Words = dict[str, Any]
COMMAND, STREAM, STATISTICS, ANSWER = range(4)  # tags: messages of one tag keep their order
MOST_UNDERWAY = 256  # sent messages that may not have arrived


class Incoming:
    """Bytes that are to arrive. data: [n] uint8, filled after `wait`. source: the process that sends them."""

    def __init__(self, work: Any, data: torch.Tensor, source: int, expected: set[Incoming]):
        self._work, self.data, self._source, self._expected = work, data, source, expected
        expected.add(self)

    def wait(self) -> torch.Tensor:
        """Waits for the bytes. Raises RanksError where the process has ended."""
        if self._work is not None:
            with there(self._source):
                self._work.wait()
            self._work = None
            self._expected.discard(self)
        return self.data


@contextmanager
def there(process: int) -> Iterator[None]:
    """Raises RanksError, in one line, where the connection to a process is broken."""
    try:
        yield
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise RanksError(f"process {process} of the pipeline does not answer any more ({why})") from error


class Wire:
    """This process's end of all connections. Processes are named by torchrun's RANK."""

    def __init__(self) -> None:
        begin()
        self._group = dist.new_group(backend="gloo", timeout=IDLE)
        self.underway: deque[tuple[Any, torch.Tensor, int]] = deque()  # with the processes that they go to
        # Bytes for which nobody waits any more, after Ctrl-C, need a place too: without one no later bytes arrive.
        self._expected: set[Incoming] = set()

    def send(self, to: int, tag: int, data: torch.Tensor) -> None:
        """Sends bytes, [n] uint8, which must not change any more."""
        while len(self.underway) >= MOST_UNDERWAY:
            self._arrive()
        with there(to):
            self.underway.append((dist.isend(data, to, group=self._group, tag=tag), data, to))

    def receive(self, source: int, tag: int, size: int) -> Incoming:
        """Begins to receive so many bytes, and does not wait for them."""
        data = torch.empty(size, dtype=torch.uint8)
        with there(source):
            return Incoming(dist.irecv(data, source, group=self._group, tag=tag), data, source, self._expected)

    def tell(self, to: int, tag: int, words: Words, arrays: Sequence[Array] = ()) -> None:
        """Sends a message: words, as JSON, and arrays."""
        kept = [np.ascontiguousarray(array) for array in arrays]
        told = json.dumps([words, [(array.dtype.str, array.shape) for array in kept]]).encode()
        parts = [np.frombuffer(told, np.uint8), *(array.reshape(-1).view(np.uint8) for array in kept)]
        body = np.concatenate(parts)
        sizes = np.array([len(told), len(body)], np.int64).view(np.uint8)
        for part in (sizes, body):
            self.send(to, tag, torch.from_numpy(part.copy()))

    def hear(self, source: int, tag: int) -> tuple[Words, list[Array]]:
        """Waits for a message, and returns its words and arrays."""
        sizes = self.receive(source, tag, 16).wait().numpy().view(np.int64)
        body = self.receive(source, tag, int(sizes[1])).wait().numpy()
        words, kinds = json.loads(body[: sizes[0]].tobytes())
        arrays, start = [], int(sizes[0])
        for kind, shape in kinds:
            count = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
            arrays.append(body[start : start + count].copy().view(kind).reshape(shape))
            start += count
        return words, arrays

    def flush(self) -> None:
        """Waits until all that was sent has arrived."""
        while self.underway:
            self._arrive()

    def _arrive(self) -> None:
        """Waits until the oldest message has arrived."""
        work, _, to = self.underway.popleft()
        with there(to):
            work.wait()


@cache
def wire() -> Wire:
    """Returns this process's wire. All processes make theirs before the first message."""
    return Wire()


def packed(tensor: torch.Tensor, status: int) -> torch.Tensor:
    """Returns the bytes of activations with a status behind them, [n] uint8. Status 0 says that all went well."""
    body = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return torch.cat([body, torch.tensor([status], dtype=torch.int64).view(torch.uint8)])


def unpacked(data: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Returns activations of this shape and their status."""
    status = int(data[-STATUS_BYTES:].clone().view(torch.int64)[0])
    return data[:-STATUS_BYTES].view(dtype).view(*shape), status


STATUS_BYTES = 8
