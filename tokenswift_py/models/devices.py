"""Devices, cores, types of numbers and kernels, under the names that users give them."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from tokenswift_py import registry
from tokenswift_py.errors import UserError, check
from tokenswift_py.models.captured import recorder_for
from tokenswift_py.models.ops import MatrixShape, Ops, TorchOps
from tokenswift_py.models.spec import ModelSpec, caps
from tokenswift_py.options import DRAFT_KV, DRAFT_WEIGHTS
from tokenswift_py.sampling.reference import Sampler
from tokenswift_py.sampling.triton import TritonSampler

logger = logging.getLogger("tokenswift")

Made = TypeVar("Made")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KV_DTYPES = {**DTYPES, "int8": torch.int8}
DETERMINISTIC = ("auto", "on", "blocks", "off")
ASKED = ("cuda",)  # devices whose library `auto` asks; on a CPU, Triton's interpreter is there to check its kernels
# Attention `auto` on a GPU is the first that is installed. The one that keeps law 1 comes before the measured ones.
GPU_ATTENTION = (("triton", "triton"), ("flash", "flash_attn"), ("xformers", "xformers"))
EXTENSION = "tokenswift_py.kernels.cpu._native"
WEIGHT_FORMATS = (*DTYPES, "int8", "gguf")  # int8 and gguf are blocks of integers with scales


def fast_bf16(device: torch.device) -> bool:
    """Returns whether torch multiplies matrices of bf16 faster there than of fp32: on a CPU only with AMX."""
    return device.type != "cpu" or bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


SAME_BITS = ("-emulated", "-vnni")  # end the names of ISA variants that compute what another does, bit for bit


def isa_contract(isa: str) -> str:
    """Returns what the numerics contract calls an ISA variant: the name of the one whose bits it has."""
    for ending in SAME_BITS:
        isa = isa.removesuffix(ending)
    return isa


def made(kind: Callable[..., Made], *arguments: Any, **named: Any) -> Made:
    """Makes an object of the native engine. What it refuses (TOKENSWIFT_ISA, threads that the system does not give) is
    a UserError."""
    try:
        return kind(*arguments, **named)
    except ValueError as error:
        raise UserError(str(error)) from error


@cache
def tell_of_refused_tiles() -> None:
    """Says in a line that a system keeps AMX from its programs. Then another variant computes, under its own label."""
    from tokenswift_py.kernels.cpu import _native

    if why := _native.refused_tiles():
        logger.warning("the processor has AMX, which would be faster, but %s; %s is used", why, _native.chosen_isa())


def compute_as(numerics: str) -> None:
    """Lets the native engine compute with the ISA variant that a numerics contract names, or the best that has its
    bits, where this machine runs one, unless TOKENSWIFT_ISA names one. Models that are loaded from now on do."""
    found = re.match(r"native-[^/]+/([^/]+)/", numerics)
    if not found or "TOKENSWIFT_ISA" in os.environ or importlib.util.find_spec(EXTENSION) is None:
        return
    native = importlib.import_module(EXTENSION)
    runnable = [name for emulated in (False, True) for name in native.runnable_isas(emulated).split(", ")]
    if same := [name for name in runnable if isa_contract(name) == found[1]]:
        os.environ["TOKENSWIFT_ISA"] = same[0]


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


def check_all_logits(vocabulary: str | int, who: str) -> None:
    """Raises UserError for a vocabulary of drafts where each draft pass computes all logits."""
    allowed = f"{who} computes all logits of a draft; engine native in one process chooses"
    check(vocabulary in ("auto", "all"), "draft_vocabulary", vocabulary, allowed)


def check_torch_draft_weights(weights: str, few_bits: bool, attention: str) -> None:
    """Raises UserError for weights that engine torch has not. few_bits: whether it has int8 and int4, with this
    attention."""
    check_draft_weights(weights)
    allowed = f"with engine torch and attention {attention} only bf16; attention triton and engine native have all"
    check(few_bits or weights in ("auto", "bf16"), "draft_weights", weights, allowed)


def choose_attention(device: torch.device, spec: ModelSpec) -> str:
    """Returns the backend that `auto` means: on a GPU the first of GPU_ATTENTION that is installed and caps scores
    where this model does, else PyTorch's own."""
    if device.type == "cuda":
        for backend, package in GPU_ATTENTION:
            if caps(spec, backend) and importlib.util.find_spec(package) is not None:
                return backend
    return "sdpa"


def check_attention(attention: str, device: torch.device) -> None:
    """Raises UserError for a backend whose file says that it needs a GPU, on another device."""
    needs_gpu = registry.says("tokenswift_py.kernels", "attention", attention, "NEEDS_GPU", False)
    check(device.type == "cuda" or not needs_gpu, "attention", attention, f"its kernels need a GPU, not {device.type}")


def choose_ops(
    attention: str,
    device: torch.device,
    deterministic: str,
    matrices: Sequence[MatrixShape] | None = (),
    dtype: torch.dtype = torch.bfloat16,
) -> Ops:
    """Makes the operations that go with an attention backend: its own, else torch's.

    matrices: those that the model multiplies by, in `dtype`. None where several ranks hold parts of them.
    """
    if attention in OWN_KERNELS:
        return OWN_KERNELS[attention].ops(device, deterministic, matrices, dtype)
    allowed = f"only with attention {' or '.join(OWN_KERNELS)}; {attention} rounds by the number of rows"
    check(deterministic not in ("on", "blocks"), "deterministic", deterministic, allowed)
    return TorchOps()


def triton_ops(
    device: torch.device, deterministic: str, matrices: Sequence[MatrixShape] | None, dtype: torch.dtype
) -> Ops:
    """Makes Triton's operations, with the products that `deterministic` asks for.

    `auto` is blocks where the row test holds, and else tiles, which keep law 1 on any device. Parts of matrices that
    ranks share are tiles too: at the edges of tiles, they have the bits of the whole.
    """
    from tokenswift_py.kernels.triton.ops import TritonOps
    from tokenswift_py.kernels.triton.products import LIBRARY, blocks_on
    from tokenswift_py.kernels.triton.row_test import Matrix
    from tokenswift_py.kernels.triton.runtime import check_device

    check_device(device)
    allowed = "one process, or stages of one process each; ranks that share matrices take on"
    check(matrices is not None or deterministic != "blocks", "deterministic", deterministic, allowed)
    if deterministic == "off":
        return TritonOps(LIBRARY)
    if matrices is None or not (deterministic == "blocks" or (deterministic == "auto" and device.type in ASKED)):
        return TritonOps()
    blocks = blocks_on(tuple(Matrix(*matrix) for matrix in matrices), dtype, device, recorder_for=recorder_for)
    if blocks.verdict.faults:
        told = "the text is measured" if deterministic == "blocks" else "Triton's tiles do, and are taken"
        logger.warning("the GPU's library does not keep a row's bits (%s); %s", blocks.verdict.faults[0], told)
        if deterministic == "auto":
            return TritonOps()
    return TritonOps(blocks)


@dataclass(frozen=True)
class OwnKernels:
    """The kernels that a backend's folder has beside attention.

    ops:     makes a layer's operations for a device, the option `deterministic`, matrices and their type.
    sampler: chooses tokens where the logits lie.
    """

    ops: Callable[[torch.device, str, Sequence[MatrixShape] | None, torch.dtype], Ops]
    sampler: type[Sampler]


OWN_KERNELS = {"triton": OwnKernels(triton_ops, TritonSampler)}  # keys: the attention they go with
