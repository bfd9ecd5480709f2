"""Checks how much memory is free, before any is taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from tokenswift_py.errors import check

HEADROOM = 256 * 2**20  # the bytes left for activations, logits and the allocator's slack
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Raises UserError where `needed` bytes do not fit into the memory that is free now. what: what needs them."""
    mib, free = f"{needed / 2**20:.0f} MiB", free_on(device)
    check(needed + HEADROOM <= free, "memory", mib, f"{what} must fit the {free / 2**20:.0f} MiB that are free")


def free_on(device: torch.device) -> int:
    """Returns the bytes that may still be taken on a device.

    On a GPU the driver counts all memory of torch's allocator as taken, also where no tensor is in it. That part is
    added, or a second run would be refused for the memory that the first one left behind.
    """
    if device.type != "cuda":
        return free_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def free_memory() -> int:
    """Returns the bytes this process may still take: those the system has, within the limits of its control groups."""
    return min([int(psutil.virtual_memory().available), *cgroup_room()])


def cgroup_room(root: Path = CGROUPS, own: Path = OWN_GROUPS) -> Iterator[int]:
    """Yields the bytes left in every limited control group from the process's own upwards, of versions 1 and 2."""
    try:
        entries = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in entries:
        if controllers == "memory":
            yield from rooms(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
        elif controllers == "":
            yield from rooms(root, path, "memory.max", "memory.current")


def rooms(top: Path, path: str, limit: str, usage: str) -> Iterator[int]:
    """Yields limit less usage of a group and those above it. File cache that can be dropped does not count as usage."""
    group = top / path.lstrip("/")
    for folder in [group, *group.parents]:
        try:
            allowed = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield allowed - used + int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        except (OSError, ValueError):
            pass  # the file does not exist here, or says "max", which is no limit
        if folder == top:
            break
