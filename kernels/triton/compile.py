"""Compiles every kernel for GPUs that are not here, and says what it needs of them.

    python -m tokenswift_py.kernels.triton.compile [--targets sm_80,gfx942] [--kernels attend] [--dtypes bfloat16]

It fails if registers spill, or if a kernel wants more shared memory than a block of the device can have: such a kernel
would be slow, or would not start at all. For NVIDIA's GPUs it also fails if a product and a sum were fused, because
two kernels would then give different bits for one expression. It needs no GPU, and must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
import triton.backends.nvidia
from tokenswift_py.errors import UserError, check
from tokenswift_py.kernels.triton.runtime import Variant, launch_options
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that a block may use. For NVIDIA they are from the CUDA C++ Programming Guide, compute
# capabilities; for AMD they are the LDS of CDNA 3.
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}
# Shared memory of a multiprocessor, of which every block takes 1024 bytes more than its own (the same guide).
SHARED_OF_SM = {"sm_80": 167_936, "sm_90": 233_472, "sm_100": 233_472, "sm_120": 102_400}
REGISTERS_OF_SM, THREADS_OF_SM, WARP = 65_536, {"sm_120": 1536}, 32
MODULES = (
    "attention",
    "copies",
    "experts",
    "fused",
    "matmul",
    "merge",
    "nucleus",
    "packed",
    "projections",
    "sampling",
    "scores",
    "shapes",
)
# Kernels that are right but slow where they spill. fp32 is for checks.
MAY_SPILL: set[tuple[str, str, int | None]] = {
    *(
        (f"attend{kind}{more}", "float32", 256)
        for kind in ("", "+int8", "+copy")
        for more in ("", "+far", "+cap" if not kind else "+far+cap")
    ),
    ("attend+cap", "float32", 128),  # on gfx942
    *(("experts+gated", dtype, None) for dtype in ("bfloat16", "float16", "float32")),  # up to 24 bytes on sm_120
}

# These kernels take a logarithm, whose own steps are fused multiply-adds, or widen weights by exact products.
MAY_FUSE = ("mass", "merge", "int4", "int8")


@dataclass(frozen=True)
class Compiled:
    """The resources that a compiled kernel needs of its target.

    registers: registers of a thread.
    shared:    bytes of shared memory of a block.
    spills:    bytes of registers that a thread spills.
    fused:     fused multiply-adds in the PTX.
    doubles:   every fp64 constant in the PTX, as the 16 hexadecimal digits of its bits.
    warps:     warps of a block.
    """

    target: str
    name: str
    dtype: str
    head_dim: int | None
    registers: int
    shared: int
    spills: int
    fused: int
    seconds: float
    doubles: tuple[str, ...] = ()
    warps: int = 4

    @property
    def blocks(self) -> int | None:
        """Returns how many blocks a multiprocessor holds at a time. Returns None for AMD, whose rules are others."""
        if self.target not in SHARED_OF_SM:
            return None
        registers = -(-self.registers // 8) * 8 * WARP * self.warps  # a warp gets registers in units of 256
        threads = THREADS_OF_SM.get(self.target, 2048)
        by = (
            REGISTERS_OF_SM // registers,
            SHARED_OF_SM[self.target] // (self.shared + 1024),
            threads // WARP // self.warps,
        )
        return min(*by, 32)

    @property
    def faults(self) -> list[str]:
        limit = SHARED_LIMITS[self.target]
        may_spill = (self.name, self.dtype, self.head_dim) in MAY_SPILL
        found = [f"{self.spills} bytes spill"] if self.spills and not may_spill else []
        found += [f"{self.shared} bytes of shared memory, of {limit}"] if self.shared > limit else []
        return found + (
            [f"{self.fused} products fused with sums"] if self.fused and not self.name.startswith(MAY_FUSE) else []
        )

    def __str__(self) -> str:
        head = "" if self.head_dim is None else self.head_dim
        blocks = "" if self.blocks is None else self.blocks
        numbers = f"{self.registers:9} {self.shared:8} {blocks:>6} {self.spills:7} {self.seconds:7.1f}"
        return f"{self.target:8} {self.name:20} {self.dtype:9} {head:>8} {numbers}  {'; '.join(self.faults)}"


HEADER = (
    f"{'target':8} {'kernel':20} {'type':9} {'head_dim':>8} {'registers':>9} {'shared':>8} {'blocks':>6} {'spills':>7} "
    f"{'s':>7}"
)


def compile_variant(target: str, module: str, index: int) -> Compiled:
    """Compiles variant `index` of a module for one target."""
    variant = variants_of(module, target)[index]
    signature = variant.signature()
    names = list(signature)
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    # A launch finds aligned pointers: torch's memory is aligned, and so are the lists of a pass.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name][0] == "*" or name in variant.aligned
    }
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = launch_options(variant.warps, variant.stages)
    start = time.perf_counter()
    built = triton.compile(ASTSource(variant.kernel, signature, constants, aligned), target=gpu, options=options)
    seconds = time.perf_counter() - start
    registers, spills = usage_amd(built.asm["amdgcn"]) if amd else usage_nvidia(built.asm["cubin"])
    doubles = () if amd else tuple(sorted(set(re.findall(r"\b0[dD]([0-9A-Fa-f]{16})\b", built.asm["ptx"]))))
    # AMD's assembly divides by fused steps of its own. PTX has an instruction for it, so they are counted there only.
    fused = 0 if amd else len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f(?:32|64)\b", built.asm["ptx"]))
    dtype = str(variant.dtype).removeprefix("torch.")
    needs = (registers, built.metadata.shared, spills, fused, seconds, doubles, variant.warps)
    return Compiled(target, variant.name, dtype, variant.head_dim, *needs)


def usage_nvidia(cubin: bytes) -> tuple[int, int]:
    """Returns a thread's registers and its bytes of stack. Only spilled registers go to the stack here."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump did not say what the kernel uses: {said.stdout} {said.stderr}")
    return int(found[1]), int(found[2])


def usage_amd(assembly: str) -> tuple[int, int]:
    """Returns a thread's vector registers and bytes of scratch. Scalar registers spill to vector registers."""
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    return numbers["vgpr_count"], numbers["private_segment_fixed_size"]


def variants_of(module: str, target: str) -> list[Variant]:
    """Returns the kernels of a module as they would be launched on a target."""
    return list(importlib.import_module(f"tokenswift_py.kernels.triton.{module}").variants(target))


def selected(kernels: list[str], dtypes: list[str], head_dims: list[int], target: str) -> Iterator[tuple[str, int]]:
    """Yields module and index of the variants that are asked for. An empty list asks for all."""
    for module in MODULES:
        for index, variant in enumerate(variants_of(module, target)):
            dtype = str(variant.dtype).removeprefix("torch.")
            named = (not kernels or variant.name in kernels) and (not dtypes or dtype in dtypes)
            if named and (not head_dims or variant.head_dim in (None, *head_dims)):
                yield module, index


def smoke(target: str) -> Iterator[tuple[str, int]]:
    """Yields the first variant of each kernel with heads of 128, which take about a minute."""
    seen = set()
    for module, index in selected([], [], [128], target):
        name = variants_of(module, target)[index].name
        if name not in seen:
            seen.add(name)
            yield module, index


def compile_all(jobs: list[tuple[str, str, int]]) -> Iterator[Compiled]:
    """Compiles jobs (target, module, index of a variant) side by side, and yields them in order."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as workers:
        yield from workers.map(compile_variant, *zip(*jobs, strict=True)) if jobs else ()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(SHARED_LIMITS))
    parser.add_argument("--kernels", default="", help="names, as the table has them (default: all)")
    parser.add_argument("--dtypes", default="", help="bfloat16, float16, float32 (default: all)")
    parser.add_argument("--head-dims", default="", help="of those that have one (default: all)")
    parser.add_argument("--smoke", action="store_true", help="one variant of each kernel")
    args = parser.parse_args()
    targets = args.targets.split(",")
    try:
        for target in targets:
            check(target in SHARED_LIMITS, "targets", target, f"known are {', '.join(SHARED_LIMITS)}")
        interpreted = os.environ.get("TRITON_INTERPRET", "0")
        check(interpreted == "0", "TRITON_INTERPRET", interpreted, "an interpreted kernel cannot be compiled")
    except UserError as error:
        print(f"compile: {error}", file=sys.stderr)
        return 2
    names = [[part for part in text.split(",") if part] for text in (args.kernels, args.dtypes, args.head_dims)]
    count = faulty = 0
    jobs = [
        (target, *job)
        for target in targets
        for job in (
            smoke(target) if args.smoke else selected(names[0], names[1], [int(part) for part in names[2]], target)
        )
    ]
    print(HEADER)
    for compiled in compile_all(jobs):
        print(compiled, flush=True)
        count, faulty = count + 1, faulty + bool(compiled.faults)
    print(f"{count} compiled, {faulty} that would not do")
    return 1 if faulty or not count else 0


if __name__ == "__main__":
    sys.exit(main())
