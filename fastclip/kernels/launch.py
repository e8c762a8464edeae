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
        rows: 16-byte vectors in a tile; rows / threads loads of a thread are in flight at once.
        threads: Threads of a program.
        programs_per_unit: Programs of a persistent grid per multiprocessor (compute unit).
        registers: What ptxas may use per thread; None leaves that to it.
    """

    rows: int
    threads: int
    programs_per_unit: int
    registers: int | None = None

    def options(self, is_hip: bool = torch.version.hip is not None) -> dict[str, int]:
        """Return Triton's options for a launch: warps of 32 threads, or wavefronts of 64."""
        options = {"num_warps": self.threads // (64 if is_hip else 32)}
        if self.registers is not None and not is_hip:
            options["maxnreg"] = self.registers
        return options


# 4 loads of 16 bytes in flight per thread, and as many threads as the 65536 registers of a multiprocessor
# allow. The norms need 96 per thread, which is said to ptxas because, left alone, it spills a few to save
# more: so 640 threads, and 40 KiB on the way, twice bandwidth times latency of an H100 (3.35 TB/s * 0.8 us /
# 132 = 20 KiB). The powers of p = any are bound by arithmetic.
_NORM = Blocks(rows=512, threads=128, programs_per_unit=5, registers=96)
_POWERS = Blocks(rows=128, threads=128, programs_per_unit=4, registers=128)
_BLOCKS = {
    "total_norm": _NORM,
    "chunk_norms": _NORM,
    "scale": Blocks(rows=512, threads=128, programs_per_unit=8),
    "clamp": Blocks(rows=512, threads=128, programs_per_unit=8),
    "nonfinite": Blocks(rows=512, threads=128, programs_per_unit=8),
    # One vector of each of three to five memories in flight per thread.
    "adam": Blocks(rows=128, threads=128, programs_per_unit=5, registers=96),
    "sgd": Blocks(rows=128, threads=128, programs_per_unit=8),
}
# Small enough that short tensors already fill several tiles and programs of the interpreter.
_INTERPRETER = Blocks(rows=32, threads=32, programs_per_unit=3)
# Programs that read no gradients: one per tensor, and one in all.
OF_TENSOR = Blocks(rows=0, threads=128, programs_per_unit=1)
OF_LIST = Blocks(rows=0, threads=64, programs_per_unit=1)

# Accumulators added up at a time: by the last program of a launch, by one program per tensor.
PARTIALS_OF_LIST = 1024
PARTIALS_OF_TENSOR = 128


def blocks(kernel: str, device: torch.device, kind: int | None = None) -> Blocks:
    """Return the layout of a kernel that reads gradients; `kind` is that of a norm."""
    if device.type == "cpu":
        return _INTERPRETER
    return _POWERS if kind == accumulate.ANY.value else _BLOCKS[kernel]


def kind_of(norm_type: float) -> int:
    """Return which kernel computes the norm of order norm_type > 0."""
    kinds = {1.0: accumulate.ONE, 2.0: accumulate.TWO, math.inf: accumulate.INF}
    return int(kinds.get(norm_type, accumulate.ANY).value)


def total_norm(
    table: Table,
    norm_type: float,
    dtype: torch.dtype,
    max_norm: float | Tensor = math.inf,
    keep_nonfinite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the norm, 0-dim of `dtype`, and the clipping coefficient, 0-dim float64; one launch.

    A `max_norm` that is a tensor is float64 and on the device.
    """
    kind = kind_of(norm_type)
    layout = blocks("total_norm", table.device, kind)
    norm = torch.empty((), dtype=dtype, device=table.device)
    coefficient = torch.empty((), dtype=torch.float64, device=table.device)
    total_norm_kernel[grid(table, layout)](
        table.chunks,
        table.num_chunks,
        table.ticket,
        table.partials,
        norm,
        coefficient,
        norm_type,
        *threshold(max_norm),
        int(keep_nonfinite),
        KIND=kind,
        ROWS=layout.rows,
        PARTIALS=PARTIALS_OF_LIST,
        **layout.options(),
    )
    return norm, coefficient


def threshold(max_norm: float | Tensor) -> tuple[float, Tensor | None]:
    """Return the number and the tensor that kernels take for a threshold; a tensor counts if there is one."""
    return (math.inf, max_norm) if isinstance(max_norm, Tensor) else (max_norm, None)


def clip_coefficient(total_norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """Return min(1, max_norm / (total_norm + 1e-6)), 0-dim float64; one launch."""
    coefficient = torch.empty((), dtype=torch.float64, device=total_norm.device)
    coefficient_kernel[(1,)](total_norm, coefficient, *threshold(max_norm), **OF_LIST.options())
    return coefficient


def scale(table: Table, coefficients: Tensor, per_tensor: bool = False) -> None:
    """Multiply every tensor in place by a coefficient, or by its own, unless it is 1; one launch."""
    _run("scale", scale_kernel, table, coefficients, PER_TENSOR=per_tensor)


def clamp(table: Table, lo: float, hi: float) -> None:
    """Clamp every tensor in place to [lo, hi]; one launch."""
    _run("clamp", clamp_kernel, table, lo, hi)


def tensor_norms(table: Table, norm_type: float, dtype: torch.dtype) -> Tensor:
    """Return the norm of each tensor, 1-dim of `dtype`; two launches."""
    kind = kind_of(norm_type)
    layout = blocks("chunk_norms", table.device, kind)
    norms = torch.empty(table.num_tensors, dtype=dtype, device=table.device)
    chunk_norms_kernel[grid(table, layout)](
        table.chunks,
        table.num_chunks,
        table.partials,
        norm_type,
        KIND=kind,
        ROWS=layout.rows,
        **layout.options(),
    )
    tensor_norms_kernel[(table.num_tensors,)](
        table.partials,
        table.first_chunks,
        norms,
        norm_type,
        KIND=kind,
        PARTIALS=PARTIALS_OF_TENSOR,
        **OF_TENSOR.options(),
    )
    return norms


def count_nonfinite(table: Table) -> Tensor:
    """Return the numbers of nan and of inf in each tensor, (n, 2) int64; one launch and a memset."""
    counts = torch.zeros(table.num_tensors, 2, dtype=torch.int64, device=table.device)
    _run("nonfinite", count_nonfinite_kernel, table, counts)
    return counts


def _run(name: str, kernel: Any, table: Table, *args: Any, **constants: Any) -> None:
    layout = blocks(name, table.device)
    kernel[grid(table, layout)](
        table.chunks, table.num_chunks, *args, ROWS=layout.rows, **constants, **layout.options()
    )


def grid(table: Table, layout: Blocks) -> tuple[int]:
    """Return as many programs as run at once, at most one per chunk, at least one to finalize."""
    return (max(1, min(table.num_chunks, _num_units(table.device) * layout.programs_per_unit)),)


@functools.cache
def _num_units(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
