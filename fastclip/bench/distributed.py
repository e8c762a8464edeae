"""Clip and step over DTensors on one rank: what each call costs the host beside torch's.

No data moves between ranks, so that the times are those of reading layouts, of the collective's call and of
the kernels; shards are small for the same reason. Each call is timed right after one like it, so that caches
hold what they hold in a loop, and not what the other peers have left.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.optim import AdamW

import fastclip
from fastclip.bench.devices import CPU, Cuda, Device
from fastclip.bench.environment import environment
from fastclip.bench.runner import torch_threads
from fastclip.bench.steps import clip_and
from fastclip.bench.timing import Call, Measurement, interleave, wall_clock

SIDE = 64
"""Each tensor is SIDE x SIDE float32."""

COUNTS = (300, 1000)
NUM_FIRST = 2000
"""Tensors of the first call, in which layouts are looked at for the first time."""
NUM_ON_A_GPU, NUM_DRY = 288, 12

LIMIT = 1e9
"""Nothing is clipped: what is left is what every step costs."""


def run_distributed(*, threads: int = 1, time_budget_s: float = 2.5) -> dict[str, Any]:
    """Time all cases on a gloo group of this process alone, on one thread as ranks that share a host have.

    Returns:
        What a results file holds: the environment, milliseconds of the first call over NUM_FIRST tensors that
        fastclip has not seen, and rows with fastclip's times and those of each peer.

    Raises:
        RuntimeError: This process is in a group already.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "run_distributed: this process is in a process group; expected one that is in none."
        )
    time = partial(interleave, budget_s=time_budget_s, stopwatch=_warm)
    with torch_threads(threads), _group_of_one():
        first = _first_call_ms()
        rows = [_row("clip", count, time(_clips(_parameters(count)))) for count in COUNTS]
        rows.append(_row("clip + AdamW", COUNTS[0], time(_steps(COUNTS[0]))))
    made_on = asdict(environment())
    return {"environment": made_on, "threads": threads, "first_call_ms": first, "rows": rows}


def _row(what: str, num_tensors: int, times: dict[str, Measurement]) -> dict[str, Any]:
    ours = times["fastclip"].median_ms
    ratios = {peer: found.median_ms / ours for peer, found in times.items() if peer != "fastclip"}
    measurements = {peer: asdict(found) for peer, found in times.items()}
    return {
        **{"what": what, "num_tensors": num_tensors, "measurements": measurements},
        "derived": {"ratios": ratios},
    }


def rows_of_device(device: Cuda, *, budget_s: float) -> Iterator[dict[str, Any]]:
    """Time the same on a device, on a group of one rank there, and clips of the local tensors.

    Yields one row of plain values: milliseconds on the host as quantiles, and why a peer failed, if one did:
    what a backend or a version of torch cannot do yet is a result, too.
    """
    count = NUM_ON_A_GPU if device.is_accelerator else NUM_DRY
    with _group_of_one(device) as group:
        parameters, stepped = _parameters(count, device), _steps(count, device)
        local = [_local(parameter) for parameter in parameters]
        calls = {
            **_clips(parameters),
            "fastclip on local tensors": lambda: fastclip.clip_grad_norm_(local, LIMIT),
            "torch and AdamW, fused": stepped["torch_fused"],
            "torch and AdamW, default": stepped["torch_default"],
            "ClippedOptimizer": stepped["fastclip"],
        }
        failed = {}
        for name, call in list(calls.items()):
            try:
                call()
            except (RuntimeError, AssertionError, TypeError, ValueError) as error:
                failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                del calls[name]
        times = device.interleave(calls, device.host_seconds, budget_s)
        yield {
            "workload": f"{count}-dtensors",
            "title": f"{count} DTensors, {group}, one rank",
            "host_ms": {name: measured.quantiles_ms for name, measured in times.items()},
            "num_rounds": {name: measured.num_rounds for name, measured in times.items()},
            "failed": failed,
        }


def _first_call_ms() -> float:
    fastclip.clip_grad_norm_(_parameters(1), LIMIT)  # what a process pays once
    parameters = _parameters(NUM_FIRST)
    return wall_clock(lambda: fastclip.clip_grad_norm_(parameters, LIMIT)) * 1e3


def _warm(call: Call) -> float:
    call()
    return wall_clock(call)


def _clips(parameters: list[Parameter]) -> dict[str, Call]:
    return {
        "fastclip": lambda: fastclip.clip_grad_norm_(parameters, LIMIT),
        "torch": lambda: torch.nn.utils.clip_grad_norm_(parameters, LIMIT),
    }


def _steps(count: int, device: Device = CPU) -> dict[str, Call]:
    calls: dict[str, Call] = {
        "fastclip": fastclip.ClippedOptimizer(AdamW(_parameters(count, device)), LIMIT).step
    }
    for name, fused in (("torch_fused", True), ("torch_default", None)):
        parameters = _parameters(count, device)
        calls[name] = partial(clip_and(AdamW(parameters, fused=fused)), parameters, LIMIT)
    return calls


def _parameters(count: int, device: Device = CPU) -> list[Parameter]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh(device.torch_device.type, (1,))
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for _ in range(count):
        both = torch.randn(2, SIDE, SIDE, generator=generator).to(device.torch_device)
        value, grad = (DTensor.from_local(part.clone(), mesh, [Shard(0)]) for part in both)
        parameters.append(Parameter(value))
        parameters[-1].grad = grad
    return parameters


def _local(parameter: Any) -> Parameter:
    local = Parameter(parameter.detach().to_local())
    local.grad = parameter.grad.to_local()
    return local


@contextmanager
def _group_of_one(device: Device = CPU) -> Iterator[str]:
    backend = "gloo" if device.torch_device.type == "cpu" else "nccl"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        try:
            yield backend
        finally:
            dist.destroy_process_group()
