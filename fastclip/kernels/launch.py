"""One function per operation on a table: picks block sizes, launches the kernels, allocates the results.

Nothing here synchronizes with the device. A clip is two launches, whatever the number of tensors.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastclip.kernels import accumulate
from fastclip.kernels.clamp import clamp_kernel
from fastclip.kernels.nonfinite import count_nonfinite_kernel
from fastclip.kernels.norm import (
    chunk_norms_kernel,
    coefficient_kernel,
    tensor_norms_kernel,
    total_norm_kernel,
)
from fastclip.kernels.scale import scale_kernel
from fastclip.kernels.table import Table


@dataclass(frozen=True)
class Blocks:
    """How a kernel is laid out on a device.

    Attributes:
        rows: 16-byte vectors in a tile.
        num_warps: Warps of a program. rows / (warps * warp size) loads of a thread are in flight at once.
        programs_per_unit: Programs of a persistent grid per multiprocessor (compute unit).
    """

    rows: int
    num_warps: int
    programs_per_unit: int


# Threads of 4 warps with 4 loads of 16 bytes each in flight keep 8 KiB per program on the way. The norm needs
# up to 80 registers, of which a multiprocessor has 65536: 6 programs, 48 KiB on the way, about twice what
# bandwidth times latency asks for on an H100 (3.35 TB/s * 0.8 us / 132 = 20 KiB). The powers of p = any need
# twice the registers and are bound by arithmetic. Compute units run wavefronts of 64 lanes.
_STREAM = Blocks(rows=512, num_warps=4, programs_per_unit=6)
_POWER = Blocks(rows=128, num_warps=4, programs_per_unit=4)
# Small enough that short tensors already fill several tiles and programs of the interpreter.
_INTERPRETER = Blocks(rows=16, num_warps=1, programs_per_unit=3)

# Accumulators added up at a time: by the last program of a launch, by one program per tensor.
PARTIALS_OF_LIST = 1024
PARTIALS_OF_TENSOR = 128


def blocks(device: torch.device, kind: int | None = None) -> Blocks:
    """Return the block sizes of a kernel on a device; `kind` for those that form powers."""
    if device.type == "cpu":
        return _INTERPRETER
    return _POWER if kind == accumulate.ANY.value else _STREAM


def kind_of(norm_type: float) -> int:
    """Return which kernel computes the norm of order norm_type > 0."""
    kinds = {1.0: accumulate.ONE, 2.0: accumulate.TWO, math.inf: accumulate.INF}
    return int(kinds.get(norm_type, accumulate.ANY).value)


def total_norm(
    table: Table,
    norm_type: float,
    dtype: torch.dtype,
    max_norm: float = math.inf,
    keep_nonfinite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the norm, 0-dim of `dtype`, and the clipping coefficient, 0-dim float64; one launch."""
    kind = kind_of(norm_type)
    layout = blocks(table.device, kind)
    norm = torch.empty((), dtype=dtype, device=table.device)
    coefficient = torch.empty((), dtype=torch.float64, device=table.device)
    total_norm_kernel[_grid(table, layout)](
        table.chunks,
        table.num_chunks,
        table.ticket,
        table.partials,
        norm,
        coefficient,
        norm_type,
        max_norm,
        int(keep_nonfinite),
        KIND=kind,
        ROWS=layout.rows,
        PARTIALS=PARTIALS_OF_LIST,
        num_warps=layout.num_warps,
    )
    return norm, coefficient


def clip_coefficient(total_norm: Tensor, max_norm: float) -> Tensor:
    """Return min(1, max_norm / (total_norm + 1e-6)), 0-dim float64; one launch."""
    coefficient = torch.empty((), dtype=torch.float64, device=total_norm.device)
    coefficient_kernel[(1,)](total_norm, coefficient, max_norm, num_warps=1)
    return coefficient


def scale(table: Table, coefficient: Tensor) -> None:
    """Multiply every tensor in place by a coefficient, unless it is 1; one launch."""
    _run(scale_kernel, table, coefficient)


def clamp(table: Table, lo: float, hi: float) -> None:
    """Clamp every tensor in place to [lo, hi]; one launch."""
    _run(clamp_kernel, table, lo, hi)


def tensor_norms(table: Table, norm_type: float, dtype: torch.dtype) -> Tensor:
    """Return the norm of each tensor, 1-dim of `dtype`; two launches."""
    kind = kind_of(norm_type)
    layout = blocks(table.device, kind)
    norms = torch.empty(table.num_tensors, dtype=dtype, device=table.device)
    chunk_norms_kernel[_grid(table, layout)](
        table.chunks,
        table.num_chunks,
        table.partials,
        norm_type,
        KIND=kind,
        ROWS=layout.rows,
        num_warps=layout.num_warps,
    )
    tensor_norms_kernel[(table.num_tensors,)](
        table.partials,
        table.first_chunks,
        norms,
        norm_type,
        KIND=kind,
        PARTIALS=PARTIALS_OF_TENSOR,
        num_warps=layout.num_warps,
    )
    return norms


def count_nonfinite(table: Table) -> Tensor:
    """Return the numbers of nan and of inf in each tensor, (n, 2) int64; one launch and a memset."""
    counts = torch.zeros(table.num_tensors, 2, dtype=torch.int64, device=table.device)
    _run(count_nonfinite_kernel, table, counts)
    return counts


def _run(kernel: Any, table: Table, *args: Any) -> None:
    layout = blocks(table.device)
    kernel[_grid(table, layout)](
        table.chunks, table.num_chunks, *args, ROWS=layout.rows, num_warps=layout.num_warps
    )


def _grid(table: Table, layout: Blocks) -> tuple[int]:
    """Return as many programs as run at once, at most one per chunk, at least one to finalize."""
    return (max(1, min(table.num_chunks, _num_units(table.device) * layout.programs_per_unit)),)


@functools.cache
def _num_units(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
