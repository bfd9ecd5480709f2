"""Paged tree attention that keeps law 1: a row's bits depend on its own past, not on the rows that travel with it.

Which pages are summed together is a matter of absolute pages and of the row's position alone (`items.py`). Within a
split the online softmax goes page by page, with each key in the page and lane of its absolute position. Full committed
pages are read in place, and the rows after them are gathered by position. Both go through the same steps (`meet`), so
a page gives the same bits either way. A second kernel merges the splits in fixed order.

A piece of rows reads each key once, and meets it tile by tile, in tiles of fixed height (`attend.py`). A pass that
reports page masses and one that does not run the same binary and the same instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch

import triton
from tokenswift_py.kernels.base import PAGE_SIZE, AttentionSegment, FarQueries, Room
from tokenswift_py.kernels.triton.attend import attend_kernel
from tokenswift_py.kernels.triton.configs import config
from tokenswift_py.kernels.triton.copies import Copies
from tokenswift_py.kernels.triton.items import EVERYTHING, FIELDS, LAST_LEVEL, NEAR, Heads, splits
from tokenswift_py.kernels.triton.matmul import processors
from tokenswift_py.kernels.triton.merge import MERGED_AT_ONCE, mass_kernel, merge_kernel
from tokenswift_py.kernels.triton.runtime import (
    DTYPES,
    HEAD_DIMS,
    POINTERS,
    PRECISION,
    Variant,
    check_device,
    launch_options,
    new_rows,
    padded,
    precision,
)
from tokenswift_py.kernels.triton.tables import MOST_STATES, FixedPlan, Plan

LOG2_E = 1.4426950408889634


class TritonAttention:
    name = "triton"
    reads_int8 = reads_copies = True
    moves_queries = views_there = True

    def prepare(self, segments: Sequence[AttentionSegment], device: torch.device) -> Plan:
        check_device(device)
        return Plan(segments, device)

    def prepare_fixed(self, room: Room, device: torch.device) -> FixedPlan | None:
        check_device(device)
        edges = splits(room.pages, min(LAST_LEVEL, room.block_pages or LAST_LEVEL))
        return FixedPlan(room, device) if room.rows * (len(edges) - 1 + NEAR) <= MOST_STATES else None

    def attend(
        self,
        plan: Plan | FixedPlan,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None = None,
        mass: torch.Tensor | None = None,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        far: FarQueries | None = None,
        cap: float = 0.0,
        copies: Copies | None = None,
    ) -> torch.Tensor:
        return self.attend_with_lse(plan, layer, q, keys, values, window, mass, scales, far, cap, copies)[0]

    def attend_with_lse(
        self,
        plan: Plan | FixedPlan,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None = None,
        mass: torch.Tensor | None = None,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        far: FarQueries | None = None,
        cap: float = 0.0,
        copies: Copies | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes `attend`, and the base-2 log-sum-exp of every row's scaled scores, [R, heads] fp32."""
        if q.dtype not in DTYPES:
            raise TypeError(f"Triton attention computes in {', '.join(map(str, DTYPES))}, not in {q.dtype}")
        kv_heads, pool_pages, _, head_dim = keys.shape
        group, depth = q.shape[1] // kv_heads, padded(head_dim)
        int8 = scales is not None or copies is not None
        chosen = config(q.dtype, head_dim, int8, more=far is not None or cap > 0)
        width = EVERYTHING if window is None else window
        block_pages = LAST_LEVEL if far is None else far.shifts.block // PAGE_SIZE
        row_bytes = 4 * kv_heads * group * depth
        heads = Heads(kv_heads, group, width, chosen.tile, row_bytes, min(LAST_LEVEL, block_pages), chosen.tiles)
        tables = plan.table(heads)
        q = (q if far is None else far.q).contiguous()
        out = new_rows(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        positions, ranges, lists = (tables.buffer[place:] for place in tables.places)
        read = copies or (keys, values, *(scales or (lse, lse)))
        turns = (lse, lse, positions) if far is None else (far.cos, far.sin, far.table)
        scale = head_dim**-0.5 * LOG2_E * (2 / cap if cap else 1)
        mass_pages = 0 if mass is None else mass.shape[-1]
        for number, launch in enumerate(tables.launches):
            rows, first = (launch.stop - launch.first) * group, launch.first * group
            shape = (kv_heads, launch.states, rows)
            state = torch.empty((*shape, depth), dtype=torch.float32, device=q.device)
            # Two tensors: Triton compiles a pointer that is no multiple of 16 bytes apart, as the second half may be.
            state_max, state_sum = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
            page_max = page_sum = lse
            if mass is not None:
                page_max, page_sum = plan.masses.of((kv_heads, rows, mass_pages), q.device)
            programs = min(launch.items * kv_heads, processors(q.device))
            attend_kernel[(programs,)](
                q, keys, values, *read, tables.buffer, positions, lists, state, state_max, state_sum, page_max,
                page_sum, *turns, scale, cap * LOG2_E, number, first, rows, launch.states, layer, width,
                pool_pages, kv_heads, group, mass_pages, block_pages, programs, HEAD_DIM=head_dim, D=depth,
                TILE=chosen.tile, TILES=chosen.tiles, PAGE=PAGE_SIZE, FIELDS=FIELDS, NEAR=NEAR,
                INT8=int8, COPIES=copies is not None, FAR=far is not None, CAPPED=cap > 0, PRECISION=PRECISION,
                **launch_options(chosen.warps, chosen.stages),
            )  # fmt: skip
            merge_kernel[(rows, kv_heads)](
                state, state_max, state_sum, ranges, out, lse, first, rows, launch.states, kv_heads, group,
                HEAD_DIM=head_dim, D=depth, AT_ONCE=MERGED_AT_ONCE, NEAR=NEAR, **launch_options(4, 2),
            )  # fmt: skip
            if mass is not None:
                grid = (launch.stop - launch.first, kv_heads, triton.cdiv(mass_pages, 128))
                mass_kernel[grid](
                    page_max, page_sum, lse, mass, first, rows, kv_heads, group, mass_pages, BLOCK=128,
                    **launch_options(4, 1),
                )  # fmt: skip
        return out, lse


def variants(target: str) -> Iterator[Variant]:
    """Yields the kernels for `compile.py`: every type and head size, as `attend_with_lse` launches them."""
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            depth = padded(head_dim)
            data, shape = POINTERS[dtype], {"HEAD_DIM": head_dim, "D": depth}
            for kind, far, capped in product(("", "+int8", "+copy"), (False, True), (False, True)):
                int8 = bool(kind)
                if capped and int8 != far:
                    continue  # what a cap needs is seen beside both and beside neither
                chosen = config(dtype, head_dim, int8, target, far or capped)
                constants = {
                    **shape, "TILE": chosen.tile, "TILES": chosen.tiles, "PAGE": PAGE_SIZE, "FIELDS": FIELDS,
                    "NEAR": NEAR, "INT8": int8, "COPIES": kind == "+copy", "FAR": far, "CAPPED": capped,
                    "PRECISION": precision(target),
                }  # fmt: skip
                pool = dict.fromkeys(("keys", "values"), "*i8" if kind == "+int8" else data)
                copies = dict.fromkeys(("key_copies", "value_copies"), "*i8" if int8 else data)
                kinds = {"q": data, **pool, **copies, "scale": "fp32", "cap": "fp32"}
                name = f"attend{kind}{'+far' * far}{'+cap' * capped}"
                yield Variant(name, attend_kernel, dtype, head_dim, kinds, constants, chosen.warps, chosen.stages)
