"""What the memory of this machine allows, measured in the same run with the same threads.

Which plain operation streams best differs between machines and builds of torch (a sum in one dtype may
be bound by arithmetic where the same sum in another is bound by memory), so several are tried and the
fastest one is the yardstick.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastclip.bench.cases import Traffic
from fastclip.bench.devices import Cuda
from fastclip.bench.timing import Call, interleave

# 512 MiB of float32: far beyond the last-level cache of common machines.
BUFFER_NUMEL = 128 * 1024**2


@dataclass(frozen=True)
class Bandwidth:
    """The fastest streams over buffers that no cache holds.

    Attributes:
        read_gbps: 10^9 bytes read per second.
        read_by: The operation that reached it.
        update_gbps: 10^9 bytes per second, read and written together.
        update_by: The operation that reached it.
        candidates_gbps: Every operation that was tried.
    """

    read_gbps: float
    read_by: str
    update_gbps: float
    update_by: str
    candidates_gbps: dict[str, float]

    @property
    def fastest(self) -> tuple[str, str]:
        """Return the names of the reader and the updater, to measure them again."""
        return self.read_by, self.update_by

    def floor_ms(self, traffic: Traffic) -> float:
        """Return the time below which this memory cannot move these bytes."""
        return (traffic.read_nbytes / self.read_gbps + traffic.update_nbytes / self.update_gbps) / 1e6


def of_copies(device: Cuda) -> Bandwidth:
    """Return that of a copy from the device's memory to itself, which is what a GPU is measured by."""
    gbps = device.copy_gbps()
    return Bandwidth(gbps, "copy_", gbps, "copy_", {"copy_": gbps})


class Memory:
    """Two large buffers and the operations that stream over them."""

    def __init__(self, numel: int = BUFFER_NUMEL) -> None:
        """Make the buffers: two of `numel` float32 elements."""
        x, y = torch.ones(numel), torch.ones(numel)
        x_int = x.view(torch.int64)
        # Operation -> (what to time, bytes that it moves).
        self.reads: dict[str, tuple[Call, int]] = {
            "dot of two float32 buffers": (lambda: torch.dot(x, y), 2 * x.nbytes),
            "dot of one float32 buffer": (lambda: torch.dot(x, x), x.nbytes),
            "sum of float32": (lambda: x.sum(), x.nbytes),
            "sum of int64": (lambda: x_int.sum(), x.nbytes),
            "amax of float32": (lambda: x.amax(), x.nbytes),
        }
        self.updates: dict[str, tuple[Call, int]] = {
            "mul_ of float32": (lambda: x.mul_(1.0), 2 * x.nbytes),
            "add_ of int64": (lambda: x_int.add_(0), 2 * x.nbytes),
            "copy_ of float32": (lambda: y.copy_(x), 2 * x.nbytes),
        }

    def measure(self, *, budget_s: float, only: Iterable[str] = ()) -> Bandwidth:
        """Time operations in alternation and keep the fastest reader and the fastest updater.

        Args:
            budget_s: Seconds to spend.
            only: Names of a reader and an updater, to measure again what was fastest before; default: all.
        """
        everything = {**self.reads, **self.updates}
        chosen = {name: everything[name] for name in only} or everything
        measured = interleave({name: call for name, (call, _) in chosen.items()}, budget_s=budget_s)
        gbps = {name: nbytes / measured[name].median_ms / 1e6 for name, (_, nbytes) in chosen.items()}
        read_by = max(self.reads.keys() & gbps, key=gbps.__getitem__)
        update_by = max(self.updates.keys() & gbps, key=gbps.__getitem__)
        return Bandwidth(gbps[read_by], read_by, gbps[update_by], update_by, gbps)
