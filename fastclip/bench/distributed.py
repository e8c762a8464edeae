"""Clip and step over DTensors on one rank: what each call costs the host beside torch's.

No data moves between ranks, so that the times are those of reading layouts, of the collective's call and of
the kernels; shards are small for the same reason. Each call is timed right after one like it, so that caches
hold what they hold in a loop, and not what the other peers have left.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.optim import AdamW

import fastclip
from fastclip.bench.environment import Environment, environment
from fastclip.bench.runner import torch_threads
from fastclip.bench.timing import Call, Measurement, interleave, wall_clock

SIDE = 64
"""Each tensor is SIDE x SIDE float32."""

COUNTS = (300, 1000)
NUM_FIRST = 2000
"""Tensors of the first call, in which layouts are looked at for the first time."""

LIMIT = 1e9
"""Nothing is clipped: what is left is what every step costs."""


@dataclass(frozen=True)
class DistributedRow:
    """One case.

    Attributes:
        what: "clip" or "clip + AdamW".
        num_tensors: DTensors of SIDE x SIDE.
        measurements: Peer -> times, fastclip first.
    """

    what: str
    num_tensors: int
    measurements: dict[str, Measurement]

    def ratio(self, peer: str) -> float:
        """Return how many times longer a peer takes, median by median."""
        return self.measurements[peer].median_ms / self.measurements["fastclip"].median_ms


@dataclass(frozen=True)
class DistributedResults:
    """A whole run.

    Attributes:
        first_call_ms: Of fastclip, over NUM_FIRST tensors that it has not seen.
    """

    environment: Environment
    threads: int
    first_call_ms: float
    rows: list[DistributedRow]

    def content(self) -> dict[str, Any]:
        """Return what a results file holds."""
        content = asdict(self)
        for row, entry in zip(self.rows, content["rows"], strict=True):
            peers = [name for name in row.measurements if name != "fastclip"]
            entry["derived"] = {"ratios": {peer: row.ratio(peer) for peer in peers}}
        return content


def run_distributed(*, threads: int = 1, time_budget_s: float = 2.5) -> DistributedResults:
    """Time all cases on a gloo group of this process alone, on one thread as ranks that share a host have.

    Raises:
        RuntimeError: This process is in a group already.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "run_distributed: this process is in a process group; expected one that is in none."
        )
    with torch_threads(threads), _group_of_one():
        first = _first_call_ms()
        rows = [_clip(count, time_budget_s) for count in COUNTS]
        rows.append(_step(COUNTS[0], time_budget_s))
    return DistributedResults(environment(), threads, first, rows)


def _first_call_ms() -> float:
    fastclip.clip_grad_norm_(_parameters(1), LIMIT)  # what a process pays once
    parameters = _parameters(NUM_FIRST)
    start = time.perf_counter()
    fastclip.clip_grad_norm_(parameters, LIMIT)
    return (time.perf_counter() - start) * 1e3


def _warm(call: Call) -> float:
    call()
    return wall_clock(call)


def _clip(count: int, budget_s: float) -> DistributedRow:
    parameters = _parameters(count)
    calls: dict[str, Call] = {
        "fastclip": lambda: fastclip.clip_grad_norm_(parameters, LIMIT),
        "torch": lambda: torch.nn.utils.clip_grad_norm_(parameters, LIMIT),
    }
    return DistributedRow("clip", count, interleave(calls, budget_s=budget_s, stopwatch=_warm))


def _step(count: int, budget_s: float) -> DistributedRow:
    folded = fastclip.ClippedOptimizer(AdamW(_parameters(count)), LIMIT)
    calls: dict[str, Call] = {"fastclip": folded.step}
    for name, fused in (("torch_fused", True), ("torch_default", None)):
        calls[name] = _clip_then_step(AdamW(_parameters(count), fused=fused))
    return DistributedRow("clip + AdamW", count, interleave(calls, budget_s=budget_s, stopwatch=_warm))


def _clip_then_step(optimizer: AdamW) -> Call:
    parameters = optimizer.param_groups[0]["params"]

    def call() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, LIMIT)
        optimizer.step()

    return call


def _parameters(count: int) -> list[Parameter]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (1,))
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for _ in range(count):
        value, grad = torch.randn(2, SIDE, SIDE, generator=generator).unbind()
        parameter = Parameter(DTensor.from_local(value.clone(), mesh, [Shard(0)]))
        parameter.grad = DTensor.from_local(grad.clone(), mesh, [Shard(0)])
        parameters.append(parameter)
    return parameters


@contextmanager
def _group_of_one() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
