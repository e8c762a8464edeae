"""DTensors as FSDP2 leaves them, in a group of one rank: what a call costs the host."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

import fastclip
from fastclip.bench.timing import Call, interleave
from gpu_suite.device import Device

NUM_TENSORS, DRY_NUM_TENSORS = 288, 12
SHAPE = (64, 64)
MIN_ROUNDS, MAX_ROUNDS = 7, 200
# Never reached, so that no call writes.
MAX_NORM = 1e9


def time_distributed(device: Device, *, budget_s: float) -> Iterator[dict[str, Any]]:
    """Time clips and steps of DTensors beside torch's.

    Yields one row of plain values: milliseconds on the host as quantiles, and why a peer failed, if one did:
    what a backend or a version of torch cannot do yet is a result, too.
    """
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.is_accelerator else "gloo"
        init_method = (Path(folder) / "init").as_uri()
        dist.init_process_group(backend, init_method=init_method, rank=0, world_size=1)
        try:
            yield _time(device, backend, budget_s)
        finally:
            dist.destroy_process_group()


def _time(device: Device, backend: str, budget_s: float) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    num_tensors = NUM_TENSORS if device.is_accelerator else DRY_NUM_TENSORS
    mesh = init_device_mesh(device.torch_device.type, (1,))
    parameters, local = [], []
    for _ in range(num_tensors):
        parameter = Parameter(distribute_tensor(torch.randn(SHAPE), mesh, [Shard(0)]))
        parameter.grad = distribute_tensor(torch.randn(SHAPE), mesh, [Shard(0)])
        assert isinstance(parameter.grad, DTensor)
        parameters.append(parameter)
        local.append(Parameter(parameter.detach().to_local().clone()))
        local[-1].grad = parameter.grad.to_local()
    fused, default = (torch.optim.AdamW(parameters, fused=True), torch.optim.AdamW(parameters))
    clipped = fastclip.ClippedOptimizer(torch.optim.AdamW(parameters), MAX_NORM)

    def torch_clip() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)

    calls: dict[str, Call] = {
        "torch": torch_clip,
        "fastclip": lambda: fastclip.clip_grad_norm_(parameters, MAX_NORM),
        "fastclip on local tensors": lambda: fastclip.clip_grad_norm_(local, MAX_NORM),
        "torch and AdamW, fused": lambda: (torch_clip(), fused.step()),
        "torch and AdamW, default": lambda: (torch_clip(), default.step()),
        "ClippedOptimizer": clipped.step,
    }
    failed = {}
    for name, call in list(calls.items()):
        try:
            call()
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            del calls[name]
    times = interleave(
        calls,
        budget_s=budget_s,
        min_rounds=MIN_ROUNDS,
        max_rounds=MAX_ROUNDS,
        stopwatch=device.host_seconds,
    )
    return {
        "workload": f"{num_tensors}-dtensors",
        "title": f"{num_tensors} DTensors, {backend}, one rank",
        "host_ms": {name: measured.quantiles_ms for name, measured in times.items()},
        "num_rounds": {name: measured.num_rounds for name, measured in times.items()},
        "route": clipped.route if "ClippedOptimizer" in calls else None,
        "failed": failed,
    }
