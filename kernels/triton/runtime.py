"""What all kernels share: how they are launched, and what Triton's interpreter needs to be right."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tokenswift_py.errors import check

# Read when the kernels are decorated, as Triton itself does.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

AMD = torch.version.hip is not None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
HEAD_DIMS = (64, 80, 96, 128, 256)  # compiled ahead of time; others run too


@dataclass(frozen=True)
class Variant:
    """A kernel as some launch would compile it.

    kinds: Triton's types of its parameters; int32 tables, fp32 pointers and int32 scalars go without saying.
    aligned: integers that 16 divides, which is compiled in. Pointers are aligned always.
    """

    name: str
    kernel: Any
    dtype: torch.dtype
    head_dim: int | None
    kinds: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    aligned: tuple[str, ...] = ()

    def signature(self) -> dict[str, str]:
        """Type of every parameter, in order."""
        return {p.name: self._kind(p.name) for p in self.kernel.params}

    def _kind(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        return self.kinds.get(name) or ("*i32" if name in TABLES else "*fp32" if name in FLOATS else "i32")


TABLES = {"items", "positions", "numbers", "bounds", "pages", "tails", "ranges", "shifts"}
FLOATS = {"state", "state_max", "state_sum", "page_max", "page_sum", "lse", "cos", "sin", "key_scales", "value_scales"}


def check_device(device: torch.device) -> None:
    """Raise UserError where the kernels cannot run."""
    allowed = "Triton needs a GPU; TRITON_INTERPRET=1 runs its interpreter on the CPU, slowly, to check"
    check(device.type != "cpu" or INTERPRET, "device", str(device), allowed)


def launch_options(warps: int, stages: int) -> dict[str, Any]:
    """Products and sums stay apart: fused ones would depend on what a compiler finds to fuse in each kernel."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}


def padded(size: int) -> int:
    """A block holds a power of two, at least 16 for the matrix units."""
    return max(16, 1 << (size - 1).bit_length())


def precision(amd: bool) -> str:
    """How fp32 is multiplied: three TF32 products on NVIDIA, whose matrix units know no other fp32, with some 2^-22 of
    relative error; as it is on AMD."""
    return "ieee" if amd else "tf32x3"


PRECISION = "interpret" if INTERPRET else precision(AMD)
