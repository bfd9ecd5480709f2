"""The row test: does a matrix product keep a row's bits, wherever the row stands and whatever stands beside it?

Law 1 asks this of every product. Of our own tiles it is known by construction. Of a library's kernel it can only be
found out, for each shape of matrix, on the device and with the version of the library that will compute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch

from tokenswift_py.kernels.triton.runtime import BLOCK_ROWS

DRAWN = 128  # different rows of a matrix; more repeat them, because a row's bits do not depend on other columns
FEW = (1, 2, 7, 16, 17, 33, 63)  # numbers of rows of a pass that does not fill a block
KEPT = (0, 5, 31, 32, 63)  # rows that stay while their neighbours change
AHEAD = (36, 64, 100)  # rows of a pass that come before those of interest

# A function of x [R, depth], weight [columns, depth] and bias [columns] or None.
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
# Runs a function; returns its result and what runs it again in the same memory, or None where that cannot be.
Recorder = Callable[[Callable[[], torch.Tensor]], tuple[torch.Tensor, Callable[[], None]] | None]


class Matrix(NamedTuple):
    """The shape of a matrix, and whether a bias is added to its product."""

    columns: int
    depth: int
    bias: bool = False


@dataclass(frozen=True)
class Verdict:
    """The outcome of a row test.

    faults: names of the trials in which a row's bits have changed.
    bits:   eight hexadecimal digits of a hash of the results. Inputs are the same on every machine, so another kernel
            has other digits.
    """

    faults: tuple[str, ...]
    bits: str


def verdict_on(
    product: Product,
    matrices: Sequence[Matrix],
    dtype: torch.dtype,
    device: torch.device,
    recorder_for: Callable[[torch.device], Recorder] | None = None,
) -> Verdict:
    """Returns the verdict on a product over several matrices.

    recorder_for: function that makes what captures a graph on the device. None tests no capture.
    """
    found = [(matrix, row_test(product, matrix, dtype, device, recorder_for)) for matrix in matrices]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the weights that are read next come in other sizes
    faults = (f"{m.columns} x {m.depth}: {', '.join(verdict.faults)}" for m, verdict in found if verdict.faults)
    bits = repr([(tuple(matrix), verdict.bits) for matrix, verdict in found])
    return Verdict(tuple(faults), hashlib.sha256(bits.encode()).hexdigest()[:8])


@torch.inference_mode()
def row_test(
    product: Product,
    matrix: Matrix,
    dtype: torch.dtype,
    device: torch.device,
    recorder_for: Callable[[torch.device], Recorder] | None = None,
) -> Verdict:
    """Tests a product over one matrix. product: takes any number of rows."""
    base = drawn(min(matrix.columns, DRAWN), matrix.depth, dtype, 1).to(device)
    weight = base.repeat(-(-matrix.columns // len(base)), 1)[: matrix.columns]
    bias = drawn(1, matrix.columns, dtype, 2)[0].to(device) if matrix.bias else None
    x, other = (drawn(BLOCK_ROWS, matrix.depth, dtype, seed).to(device) for seed in (3, 4))

    def run(rows: torch.Tensor) -> torch.Tensor:
        return product(rows, weight, bias)

    with torch.cuda.device_of(x):
        together = run(x)
        compared = trials(run, x, other, together)
        if recorder_for is not None:
            compared = chain(compared, captures(run, x, other, recorder_for(device)))
        faults = {name for name, got, expected in compared if not torch.equal(got, expected)}
    if not together.isfinite().all():
        faults.add("not finite")
    digest = hashlib.sha256(together.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return Verdict(tuple(sorted(faults)), digest.hexdigest()[:8])


Trial = tuple[str, torch.Tensor, torch.Tensor]  # name, rows of a result, and what they must be


def trials(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, other: torch.Tensor, together: torch.Tensor
) -> Iterator[Trial]:
    """Computes rows at other places and in other company. x, other: [64, depth]. together: result of x."""
    for places in range(1, len(x)):
        yield "place", run(x.roll(places, 0)), together.roll(places, 0)
    largest = torch.finfo(x.dtype).max
    beside = [other, *(torch.full_like(x, value) for value in (0.0, largest, torch.inf, torch.nan))]
    for kept in (list(KEPT), [row for row in range(len(x)) if row not in KEPT]):
        for neighbours in beside:
            mixed = neighbours.clone()
            mixed[kept] = x[kept]
            yield "neighbours", run(mixed)[kept], together[kept]
    for count in FEW:
        yield "number", run(x[:count].clone()), together[:count]
    for row in KEPT:
        yield "alone", run(x[row : row + 1].clone()), together[row : row + 1]
    for ahead in AHEAD:
        chunk = torch.cat([other, other, x])[-ahead - len(x) :]
        yield "chunk", run(chunk)[ahead:], together


def captures(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, other: torch.Tensor, recorder: Recorder
) -> Iterator[Trial]:
    """Computes rows by a graph that was captured, where the device can capture one."""
    for count in (1, len(x)):
        read = x[:count].clone()
        recorded = recorder(partial(run, read))
        if recorded is None:
            return
        result, replay = recorded
        for rows in (other, x):
            read.copy_(rows[:count])
            replay()
            yield "capture", result, run(rows[:count].clone())


def drawn(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Draws the same numbers on every machine: between -1 and 1, of many magnitudes, and exact in 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-255, 256, (rows, width), generator=generator)
    shift = torch.randint(8, 19, (rows, width), generator=generator)
    return (whole.float() / (1 << shift)).to(dtype)
