"""The processes (ranks) that hold one model between them, started by torchrun. One process alone is the usual case.

Ranks run the same program over the same text, so their collective calls meet. Values that would differ between
processes are rank 0's (measured times, a random seed, Ctrl-C), and values that must be alike are compared. Only numbers
and text travel, nothing pickled.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tokenswift_py.core import DraftTree
from tokenswift_py.errors import UserError, one_line
from tokenswift_py.parallel.processes import tensor_ranks

PATIENCE = timedelta(days=1)  # for which ranks wait for rank 0: a download, a prompt that is typed

Array = npt.NDArray[Any]
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the second is the name until torch 2.12


class RanksError(RuntimeError):
    """Ranks went different ways, so their common results would be wrong."""


class Ranks:
    """A process that holds the whole model alone, and the interface of those that share one."""

    rank, world = 0, 1

    @property
    def leads(self) -> bool:
        """True on rank 0, which reads, prints and writes files for all."""
        return self.rank == 0

    def place(self, device: torch.device) -> None:
        """Tells on which device the tensors will be: the CPU, or a GPU of each rank's own."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum of all ranks' tensors, added in an order that depends on their shape. May overwrite x."""
        return x

    def gather(self, x: torch.Tensor, width: int, size: int) -> torch.Tensor:
        """Returns all ranks' columns side by side, [R, size]. x: [R, width], or narrower on the last ranks."""
        return x

    def all(self, values: Array) -> Array:
        """Returns every rank's array, [world, ...]. All must have one shape and type."""
        return values[None]

    def first(self, values: Array) -> Array:
        """Returns rank 0's array. The others give one of the same shape and type."""
        return values

    def first_times(self, ms: Sequence[float]) -> list[float]:
        """Returns rank 0's milliseconds. The others measured as many."""
        times: list[float] = self.first(np.array(ms, np.float64)).tolist()
        return times

    def first_text(self, text: str) -> str:
        """Returns rank 0's text."""
        return text

    def agree(self, what: str, value: object) -> None:
        """Raises RanksError, on all ranks, unless all have the same value, compared by its `repr`."""

    def first_tree(self, tree: DraftTree, most: int) -> DraftTree:
        """Returns rank 0's tree of at most `most` nodes, a number that all ranks have in common."""
        return tree

    def go_on(self, wanted: bool = True) -> bool:
        """Returns whether rank 0 wants to go on. Raises RanksError on another rank that does not while rank 0 does."""
        return wanted

    @contextmanager
    def same_fate(self, *kinds: type[Exception]) -> Iterator[None]:
        """Raises a UserError of any rank on all ranks, so that none waits for one that left and rank 0 can report it.

        kinds: further kinds of errors, which are made from one line of text. All ranks must name the same.
        """
        yield


ALONE = Ranks()


class ProcessGroup(Ranks):
    """One process of torch.distributed's default group, which it joins unless that was done before.

    Numbers go over gloo, and so do tensors until `place` says that they are on GPUs.
    members: the processes of the group, this one among them; None is all.
    """

    def __init__(self, members: Sequence[int] | None = None) -> None:
        begin()
        self._members = list(range(dist.get_world_size()) if members is None else members)
        self.rank, self.world = self._members.index(dist.get_rank()), len(self._members)
        self._control = self._data = self._group("gloo")
        if not self.leads:
            logging.getLogger("tokenswift").setLevel(logging.CRITICAL)

    def _group(self, backend: str) -> Any:
        alone = self.world < dist.get_world_size()
        timeout = PATIENCE if backend == "gloo" else None
        return dist.new_group(self._members, timeout, backend, use_local_synchronization=alone)

    def place(self, device: torch.device) -> None:
        self.agree("the kind of device", device.type)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self._data = self._group("nccl")

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=self._data)
        return x

    def gather(self, x: torch.Tensor, width: int, size: int) -> torch.Tensor:
        padded = F.pad(x, (0, width - x.shape[1])).contiguous()
        parts = padded.new_empty(self.world * len(padded), padded.shape[1])
        all_gather(parts, padded, group=self._data)
        whole: torch.Tensor = parts.unflatten(0, (self.world, -1)).transpose(0, 1).flatten(1)[:, :size].contiguous()
        return whole

    def all(self, values: Array) -> Array:
        mine = torch.from_numpy(np.frombuffer(values.tobytes(), np.uint8).copy())
        parts = mine.new_empty(self.world * len(mine))
        all_gather(parts, mine, group=self._control)
        return parts.numpy().view(values.dtype).reshape(self.world, *values.shape)

    def first(self, values: Array) -> Array:
        data = torch.from_numpy(np.frombuffer(values.tobytes(), np.uint8).copy())
        dist.broadcast(data, src=self._members[0], group=self._control)
        return data.numpy().view(values.dtype).reshape(values.shape)

    def first_text(self, text: str) -> str:
        data = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8)  # a file name need not be UTF-8
        size = int(self.first(np.array([len(data)]))[0])
        said = self.first(np.resize(data, size) if self.leads else np.zeros(size, np.uint8)).tobytes()
        return said.decode(errors="surrogatepass")

    def agree(self, what: str, value: object) -> None:
        prints = self.all(np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8))
        others = np.flatnonzero((prints != prints[0]).any(1)).tolist()
        if others:
            mine = f"rank {self.rank} has {repr(value)[:200]}"
            raise RanksError(f"ranks disagree on {what}: {others} differ from rank 0; {mine}")

    def first_tree(self, tree: DraftTree, most: int) -> DraftTree:
        nodes = np.full((2, most), UNUSED, np.int32)
        nodes[:, : len(tree)] = tree.tokens, tree.parents
        tokens, parents = self.first(nodes)
        used = parents != UNUSED
        return DraftTree(tokens[used], parents[used])

    def go_on(self, wanted: bool = True) -> bool:
        goes = bool(self.first(np.array([wanted]))[0])
        if goes and not wanted:
            raise RanksError(f"rank {self.rank} stopped while rank 0 goes on; all must run the same program")
        return goes

    @contextmanager
    def same_fate(self, *kinds: type[Exception]) -> Iterator[None]:
        carried: tuple[type[Exception], ...] = (UserError, *kinds)
        mine = None
        told = np.zeros(1 + LONGEST_ERROR, np.uint8)  # 1 + number of its kind (0 is no error), then its line
        try:
            yield
        except carried as error:
            mine = error
            line = str(error).encode(errors="backslashreplace")[:LONGEST_ERROR]
            told[0] = 1 + next(i for i, kind in enumerate(carried) if isinstance(error, kind))
            told[1 : 1 + len(line)] = np.frombuffer(line, np.uint8)
        for rank, (kind, *rest) in enumerate(self.all(told).tolist()):
            if kind:
                text = bytes(rest).rstrip(b"\0").decode(errors="replace")
                raise carried[kind - 1](text if rank == 0 else f"{text} (rank {rank})") from mine


UNUSED = -2  # marks a place of the array without a node; the root's parent is -1
LONGEST_ERROR = 2000  # how many bytes of an error's line travel


def begin() -> None:
    """Joins the processes that torchrun started, unless that was done before."""
    if not dist.is_initialized():
        with one_line("WORLD_SIZE: the processes did not find one another; start them with torchrun"):
            dist.init_process_group("gloo")
        atexit.register(leave)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def join(stages: int = 1) -> Ranks:
    """Returns the ranks that torchrun started, with this process among them. With a pipeline of several stages they are
    those that share this process's stage."""
    ranks = tensor_ranks(stages)
    if stages > 1:
        begin()
    if ranks == 1:
        return ALONE
    first = dist.get_rank() // ranks * ranks if stages > 1 else 0
    return ProcessGroup(range(first, first + ranks) if stages > 1 else None)
