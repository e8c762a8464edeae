"""How many kernels a call launches, and that it never waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastclip.bench.peers import Peer
from gpu_suite.device import Device
from gpu_suite.waiting import forbidden_waits
from gpu_suite.workloads import parameter_of

MAX_LAUNCHES = 2
WAITS = ("Synchronize", "cudaMemcpy", "hipMemcpy")


def check_launches(device: Device, peer: Peer) -> dict[str, dict[str, int]]:
    """Count kernels, copies and waits of steady-state calls on 1, 40 and 2000 tensors of all dtypes.

    Raises:
        AssertionError: A call launches more than two kernels, copies, or waits.
    """
    result = {}
    for num_tensors in (1, 40, 2000):
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
        grads = [
            torch.ones(50 + i % 70, dtype=dtypes[i % 4], device=device.torch_device)
            for i in range(num_tensors)
        ]
        parameters = [parameter_of(g) for g in grads]
        calls: dict[str, Callable[[], object]] = {
            "norm": lambda grads=grads: peer.norm(grads),
            "inactive": lambda parameters=parameters: peer.clip(parameters, 1e30),
            "active": lambda parameters=parameters: peer.clip(parameters, 1e-3),
        }
        for mode, call in calls.items():
            call()
            counts = counts_of(call)
            what = f"{peer.name} {mode} of {num_tensors} tensors"
            assert counts["kernels"] <= MAX_LAUNCHES, f"{what}: {counts['kernels']} kernels"
            assert counts["copies"] == 0, f"{what}: {counts['copies']} copies"
            assert counts["waits"] == 0, f"{what}: {counts['waits']} synchronizing calls"
            result[f"{mode} of {num_tensors}"] = counts
    return result


def counts_of(call: Callable[[], object]) -> dict[str, int]:
    """Return the kernels, copies and waits of a call; raises where torch itself would wait."""
    torch.cuda.synchronize()
    # Raises where torch itself would wait; the profiler sees what anyone else calls.
    with forbidden_waits(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
    return count_events(profiler.events())


def count_events(profiled: Iterable[Any]) -> dict[str, int]:
    """Return the kernels, copies and waits among the profiler's events.

    A region that torch annotates, as it does every optimizer's step, has an event on the device, too, and is
    no kernel.
    """
    # The profiler itself waits for the device when it stops; that comes after the last launch.
    kinds: Counter[str] = Counter()
    events = sorted(profiled, key=lambda e: e.time_range.start)
    runtime = [e.name for e in events if e.name.startswith(("cuda", "cu", "hip"))]
    launches = [i for i, name in enumerate(runtime) if "Launch" in name]
    last_launch = launches[-1] if launches else -1
    kinds["waits"] = sum(any(w in name for w in WAITS) for name in runtime[: last_launch + 1])
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            is_copy = event.name.startswith(("Memcpy", "Memset"))
            kinds["copies" if is_copy else "kernels"] += 1
    return {name: kinds[name] for name in ("kernels", "copies", "waits")}
