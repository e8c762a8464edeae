"""How kernels are laid out on a device. What a kernel's own numbers are, its file says."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastclip.kernels.table import Table
from fastclip.kernels.unit_table import UnitTable


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
        options = {"num_warps": max(1, self.threads // (64 if is_hip else 32))}
        if self.registers is not None and not is_hip:
            options["maxnreg"] = self.registers
        return options

    def on(self, device: torch.device) -> Blocks:
        """Return this layout, or on the CPU that of the interpreter, for a kernel that reads gradients."""
        return INTERPRETER if device.type == "cpu" else self

    def grid(self, table: Table | UnitTable) -> tuple[int]:
        """Return as many programs as run at once, at most one per chunk, at least one to finalize."""
        return (max(1, min(table.num_chunks, _num_units(table.device) * self.programs_per_unit)),)


# Small enough that short tensors already fill several tiles and programs of the interpreter.
INTERPRETER = Blocks(rows=32, threads=32, programs_per_unit=3)

# 4 loads of 16 bytes in flight per thread, and as many threads as run at once.
ELEMENTWISE = Blocks(rows=512, threads=128, programs_per_unit=8)


@functools.cache
def _num_units(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
