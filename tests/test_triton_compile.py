"""The Triton kernels compile for GPUs that are not here, and what would not run there is told."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from itertools import accumulate
from operator import truediv
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from tokenswift_py.kernels.triton.compile import MODULES, SHARED_LIMITS, Compiled, variants_of
from tokenswift_py.sampling import noise

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "tokenswift_py.kernels.triton.compile", *arguments, interpret=interpret)


def run_python(*arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT)} | ({} if interpret is None else {"TRITON_INTERPRET": interpret})
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_one_variant_of_each_kernel_compiles_for_hopper() -> None:
    done = run("--smoke", "--targets", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    names = {variant.name for module in MODULES for variant in variants_of(module, "sm_90")}
    assert len(lines) == len(names) + 2
    assert {name for name in names if any(line[9:29].strip() == name for line in lines)} == names
    assert lines[-1] == f"{len(names)} compiled, 0 that would not do"


def test_the_constants_of_the_noise_are_doubles_to_the_last_bit() -> None:
    """Every fp64 constant of every kernel, out of the PTX, against the specification's: Triton rounds a plain number
    that a double is compared with to fp32, which its interpreter does not."""
    code = (
        "import json\n"
        "from tokenswift_py.kernels.triton.compile import MODULES, compile_variant, variants_of\n"
        "found = {}\n"
        "for module in MODULES:\n"
        "    for i, variant in enumerate(variants_of(module, 'sm_90')):\n"
        "        if '*fp64' in variant.signature().values():\n"
        "            found[f'{variant.name} {variant.dtype}'] = compile_variant('sm_90', module, i).doubles\n"
        "print(json.dumps(found))\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    found = {name: {value(bits) for bits in doubles} for name, doubles in json.loads(done.stdout).items()}
    coefficients = {1.0 / (2 * k + 1) for k in range(11)}
    needed = {*coefficients, noise.LN2, noise.SQRT_HALF, 0.5, 2.0**-32}
    factors = set(accumulate(range(1, 14), truediv, initial=1.0))  # 1 / k!, divided one by one
    of_exp = {*factors, noise.LN2, 1.5 * 2.0**52}
    names = {"gumbel": needed, "nucleus mass": {*of_exp, 2.0**40}, "weights": {*of_exp, 700.0}}
    assert len(found) == 16
    for name, doubles in found.items():
        own = next((constants for start, constants in names.items() if name.startswith(start)), set())
        assert doubles <= {*own, *(-x for x in own), 0.0, math.inf, -math.inf}, name
        assert own <= doubles, name


def value(bits: str) -> float:
    """Returns the double that PTX names by sixteen digits."""
    return float(struct.unpack(">d", bytes.fromhex(bits))[0])


def test_two_blocks_of_attention_share_a_multiprocessor() -> None:
    """At heads of 128, on Ampere and on Hopper: one computes while the other waits for memory. Nothing spills."""
    arguments = ["--kernels", "attend", "--dtypes", "bfloat16", "--head-dims", "128"]
    done = run("--targets", "sm_80,sm_90", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    header, *lines = (line.split() for line in done.stdout.splitlines()[:3])
    for line in lines:
        numbers = dict(zip(header, line, strict=True))
        assert int(numbers["blocks"]) >= 2 and numbers["spills"] == "0", line


def test_how_many_blocks_a_multiprocessor_holds() -> None:
    """By the limits of NVIDIA's occupancy calculator, compute capability 9.0: 64 K registers, 228 KB, 64 warps."""
    made = {"target": "sm_90", "name": "", "dtype": "", "head_dim": 128, "spills": 0, "fused": 0, "seconds": 1.0}
    for registers, shared, warps, blocks in (
        (255, 0, 4, 2), (168, 0, 4, 3), (128, 0, 8, 2), (129, 0, 8, 1), (32, 114_688, 4, 2), (32, 115_712, 4, 2),
        (32, 115_713, 4, 1), (32, 0, 4, 16), (24, 0, 1, 32),
    ):  # fmt: skip
        assert Compiled(**made, registers=registers, shared=shared, warps=warps).blocks == blocks


def test_attention_compiles_for_amd() -> None:
    done = run("--targets", "gfx942", "--kernels", "attend", "--dtypes", "bfloat16", "--head-dims", "64")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 compiled, 0 that would not do" in done.stdout


def test_what_would_not_do_is_told() -> None:
    def compiled(**changes: int) -> Compiled:
        return Compiled(
            **{
                "target": "sm_120", "name": "attend", "dtype": "bfloat16", "head_dim": 64, "registers": 128,
                "shared": SHARED_LIMITS["sm_120"], "spills": 0, "fused": 0, "seconds": 1.0, **changes,
            }
        )  # fmt: skip

    assert not compiled().faults
    for changes in ({"spills": 8}, {"shared": SHARED_LIMITS["sm_120"] + 1}, {"fused": 1}):
        assert len(compiled(**changes).faults) == 1
        assert compiled(**changes).faults[0] in str(compiled(**changes))


@pytest.mark.parametrize(
    ("arguments", "interpret", "says"),
    [(["--targets", "sm_70"], None, "targets: 'sm_70' is not allowed"), ([], "1", "TRITON_INTERPRET")],
)
def test_wrong_input_is_told_in_a_line(arguments: list[str], interpret: str | None, says: str) -> None:
    done = run(*arguments, interpret=interpret)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr


def test_a_selection_of_nothing_is_no_success() -> None:
    assert run("--targets", "sm_90", "--kernels", "nothing").returncode == 1
