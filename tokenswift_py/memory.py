"""How much memory there is to take, asked before it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from tokenswift_py.errors import check

HEADROOM = 256 * 2**20  # activations, logits and the allocator's slack
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Refuse what cannot fit into the memory that is free now."""
    mib, free = f"{needed / 2**20:.0f} MiB", free_on(device)
    check(needed + HEADROOM <= free, "memory", mib, f"{what} must fit the {free / 2**20:.0f} MiB that are free")


def free_on(device: torch.device) -> int:
    """Bytes that may still be taken there. On a GPU the driver calls all of torch's allocator's memory taken, also what
    no tensor is in: without that, a second run would be refused for what the first one left behind."""
    if device.type != "cuda":
        return free_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def free_memory() -> int:
    """Bytes this process may still take: what the system has, and what each of its control groups allows."""
    return min([int(psutil.virtual_memory().available), *cgroup_room()])


def cgroup_room(root: Path = CGROUPS, own: Path = OWN_GROUPS) -> Iterator[int]:
    """Bytes left in every limited group from the process's own upwards, of cgroup versions 1 and 2."""
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
    """Limit less usage of a group and those above it; file cache that can be dropped is not in use."""
    group = top / path.lstrip("/")
    for folder in [group, *group.parents]:
        try:
            allowed = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield allowed - used + int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        except (OSError, ValueError):
            pass  # no such file here, or "max": no limit
        if folder == top:
            break
