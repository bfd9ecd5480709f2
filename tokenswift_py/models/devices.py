"""Devices, cores and types of numbers, under the names that users give them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tokenswift_py.errors import check
from tokenswift_py.options import DRAFT_KV, DRAFT_WEIGHTS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KV_DTYPES = {**DTYPES, "int8": torch.int8}
WEIGHT_FORMATS = (*DTYPES, "int8", "gguf")  # int8 and gguf are blocks of integers with scales


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name that --dtype and --kv-dtype use."""
    return next(name for name, known in KV_DTYPES.items() if known == dtype)


def check_dtype(field: str, dtype: torch.dtype) -> None:
    """Raises UserError for a type that has no name here."""
    check(dtype in KV_DTYPES.values(), field, dtype, ", ".join(map(str, KV_DTYPES.values())))


def find_device(name: str, processes: int = 1) -> torch.device:
    """Finds the device. Several processes have a GPU each, by torchrun's LOCAL_RANK. Raises UserError for a missing
    one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if processes > 1:
        check(":" not in name, "device", name, f"each of {processes} ranks has one of its own: cuda or cpu")
        name = f"cuda:{os.environ.get('LOCAL_RANK', os.environ.get('RANK', '0'))}" if name == "cuda" else name
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = (str(error).splitlines() or [""])[0][:200]  # some errors have a page of text
        check(False, "device", name, f"auto, cpu, cuda or another device that torch finds here ({why})")
    return device


def available_threads(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the number of cores in the affinity mask, or fewer where a cgroup v2 quota (cpu.max) on the way up says
    so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rsplit("::", 1)[-1].lstrip("/")
    except OSError:
        return cores
    group = cgroups / own
    for folder in [group, *group.parents]:
        limit = folder / "cpu.max"
        if limit.is_file():
            quota, period = limit.read_text().split()
            if quota != "max":
                cores = min(cores, -(-int(quota) // int(period)))
        if folder == cgroups:
            break
    return max(1, cores)


def check_draft_weights(weights: str) -> None:
    check(weights in DRAFT_WEIGHTS, "draft_weights", weights, f"one of {', '.join(DRAFT_WEIGHTS)}")


def check_draft_kv(kv: str) -> None:
    check(kv in DRAFT_KV, "draft_kv", kv, f"one of {', '.join(DRAFT_KV)}")


def check_torch_draft_weights(weights: str, int4: bool, attention: str) -> None:
    """Raises UserError for weights that engine torch has not. int4: whether it has those, with this attention."""
    check_draft_weights(weights)
    allowed = "bf16 or int4" if int4 else f"bf16 alone with attention {attention}, and int4 with triton"
    fine = weights in ("auto", "bf16") or (int4 and weights == "int4")
    check(fine, "draft_weights", weights, f"engine torch has {allowed}; engine native has int8")
