"""Settings that all kernels share: how they are launched, and how Triton's interpreter gives right results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tokenswift_py.errors import check

# Triton reads the variable when a kernel is decorated, so it is read here once, too.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

AMD = torch.version.hip is not None

BLOCK_ROWS = 64  # rows of each product that the GPU's library computes; see products.py

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
HEAD_DIMS = (64, 80, 96, 128, 256)  # head sizes that are compiled ahead of time; others run too


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of a launch, which decide how it is compiled.

    kinds:   Triton's types of its parameters. Those in `TABLES` are int32 pointers, those in `FLOATS` fp32 pointers,
             and the rest int32, unless it says otherwise.
    aligned: integer parameters that 16 divides, which is compiled in. Pointers are always aligned.
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
        """Returns the type of every parameter, in order."""
        return {p.name: self._kind(p.name) for p in self.kernel.params}

    def _kind(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        return self.kinds.get(name) or ("*i32" if name in TABLES else "*fp32" if name in FLOATS else "i32")


TABLES = {"counts", "positions", "lists", "ranges", "shifts"}
FLOATS = {"state", "state_max", "state_sum", "page_max", "page_sum", "lse", "cos", "sin", "key_scales", "value_scales"}


def check_device(device: torch.device) -> None:
    """Raises UserError where the kernels cannot run."""
    allowed = "Triton needs a GPU; TRITON_INTERPRET=1 runs its interpreter on the CPU, slowly, to check"
    check(device.type != "cpu" or INTERPRET, "device", str(device), allowed)


def launch_options(warps: int, stages: int) -> dict[str, Any]:
    """Returns the options of a launch. They forbid to fuse a product with a sum, which would differ between kernels."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}


def blocked(rows: int) -> int:
    """Returns the least number of rows, whole blocks of BLOCK_ROWS, that holds `rows`."""
    return -(-rows // BLOCK_ROWS) * BLOCK_ROWS


def new_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns empty rows of x's shape, [R, ...]. Memory goes on behind them to the end of a block, so that a product in
    blocks need not copy them."""
    return x.new_empty(blocked(len(x)), *x.shape[1:])[: len(x)]


def padded(size: int) -> int:
    """Returns the power of two, at least 16, that holds `size`. Blocks and the matrix units need that."""
    return max(16, 1 << (size - 1).bit_length())


def precision(target: str) -> str:
    """Returns how fp32 is multiplied.

    NVIDIA's matrix units have TF32 but no fp32. Three TF32 products together have a relative error of about 2^-22.
    AMD's matrix units multiply fp32 itself.
    """
    return "ieee" if target.startswith("gfx") else "tf32x3"


PRECISION = "interpret" if INTERPRET else precision("gfx" if AMD else "sm")
