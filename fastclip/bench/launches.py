"""How many kernels a call launches, and that it never waits for the device."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

import fastclip
from fastclip.bench.check import CheckError
from fastclip.bench.devices import Device
from fastclip.bench.models import Workload, gradients, tiny
from fastclip.bench.peers import Peer, within
from fastclip.bench.timing import Call

MAX_OF_A_CLIP, MAX_OF_A_STEP = 2, 3
COUNTS = (1, 40, 2000)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
WAITS = ("Synchronize", "cudaMemcpy", "hipMemcpy")


def check_launches(device: Device, peer: Peer) -> dict[str, dict[str, int]]:
    """Count kernels, copies and waits of steady-state calls on few and many tensors of all dtypes.

    Raises:
        CheckError: A call launches more than two kernels, copies, or waits.
    """
    calls: dict[str, Call] = {}
    for count in COUNTS:
        parameters = _parameters(count, device)
        for mode, call in _clips(peer, parameters).items():
            calls[f"{mode} of {count}"] = call
    return _counted(calls, MAX_OF_A_CLIP)


def check_step_launches(device: Device, backend: str) -> dict[str, dict[str, int]]:
    """Count the same of folded steps.

    Raises:
        CheckError: A step launches more than three kernels, copies, or waits.
    """
    calls = {}
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        for count in COUNTS:
            optimizer = fastclip.ClippedOptimizer(kind(_parameters(count, device), lr=1e-3), 1.0, fused=True)
            calls[f"{kind.__name__} of {count}"] = within(backend, optimizer.step)
    return _counted(calls, MAX_OF_A_STEP)


def _clips(peer: Peer, parameters: list[Parameter]) -> dict[str, Call]:
    return {
        "norm": lambda: peer.norm(gradients(parameters)),
        "inactive": lambda: peer.clip(parameters, 1e30),
        "active": lambda: peer.clip(parameters, 1e-3),
    }


def _parameters(count: int, device: Device) -> list[Parameter]:
    workload = Workload("", "", tuple(tiny(count, 100)))
    return workload.parameters(*DTYPES, device=device.torch_device, with_values=True)


def _counted(calls: dict[str, Call], max_kernels: int) -> dict[str, dict[str, int]]:
    result = {}
    for what, call in calls.items():
        call()
        counts = result[what] = counts_of(call)
        for kind, limit in (("kernels", max_kernels), ("copies", 0), ("waits", 0)):
            if counts[kind] > limit:
                raise CheckError(f"{what} tensors: {counts[kind]} {kind}; expected at most {limit}.")
    return result


def counts_of(call: Callable[[], object]) -> dict[str, int]:
    """Return the kernels, copies and waits of a call; raises where torch itself would wait."""
    torch.cuda.synchronize()
    # Raises where torch itself would wait; the profiler sees what anyone else calls.
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    # acc_events: else torch 2.10 warns of cycles, of which there is one.
    with forbidden_waits(), profile(activities=activities, acc_events=True) as profiler:
        call()
    return count_events(profiler.events() or ())


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
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            is_copy = event.name.startswith(("Memcpy", "Memset"))
            kinds["copies" if is_copy else "kernels"] += 1
    return {name: kinds[name] for name in ("kernels", "copies", "waits")}


@contextlib.contextmanager
def forbidden_waits() -> Iterator[None]:
    """Make torch raise where the host would wait for the device, inside the `with` block only."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_mode("error")
        yield
    finally:
        _set_mode(before)


def _set_mode(mode: int | str) -> None:
    # torch warns of every change that this is a prototype: after it has changed the mode, so where warnings
    # are errors the caller would not learn that it did.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)
