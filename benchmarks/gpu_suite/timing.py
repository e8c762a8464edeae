"""Every peer on every workload, clipping inactive and active: device time and host time apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from fastclip import reference
from fastclip.bench.cases import Traffic
from fastclip.bench.models import gradients
from fastclip.bench.peers import Peer
from fastclip.bench.timing import Call, Measurement, interleave
from gpu_suite.device import Device
from gpu_suite.subjects import (
    captured_clip,
    compiled_peer,
    fastclip_peer,
    multi_tensor_peers,
    torch_peers,
)
from gpu_suite.workloads import DeviceWorkload

MODES = ("norm", "inactive", "active")
MIN_ROUNDS = 7
MAX_ROUNDS = 200

# A loop over tensors makes a graph of thousands of nodes; the others ask the device for a number.
NOT_CAPTURED = ("torch_loop", "torch_compile", "apex", "transformer_engine")

# Copies of the gradients that calls take turns over, where the caches could hold more than one.
NUM_SETS = 4
MAX_NBYTES_IN_TURNS = 512 * 2**20


@dataclass
class Row:
    """One workload in one mode.

    Attributes:
        device: Peer -> times between the first and the last kernel, with cold caches.
        host: Peer -> times until the call returned, on an idle device.
        relative_errors: Peer -> error of its norm against float64.
        left_out: Peer -> why it was not timed.
    """

    workload: str
    title: str
    mode: str
    num_tensors: int
    nbytes: int
    traffic: Traffic
    device: dict[str, Measurement]
    host: dict[str, Measurement]
    relative_errors: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain values, with the bandwidth that each peer reached."""
        return {
            **{name: getattr(self, name) for name in ("workload", "title", "mode", "num_tensors", "nbytes")},
            "necessary_nbytes": self.traffic.nbytes,
            "device_ms": {name: m.quantiles_ms for name, m in self.device.items()},
            "host_ms": {name: m.quantiles_ms for name, m in self.host.items()},
            "num_rounds": {name: m.num_rounds for name, m in self.device.items()},
            "gbps": {name: self.traffic.nbytes / m.median_ms / 1e6 for name, m in self.device.items()},
            "relative_errors": self.relative_errors,
            "left_out": self.left_out,
        }


class Sets:
    """Several copies of one list of gradients; each call takes the next."""

    def __init__(self, workload: DeviceWorkload, device: Device) -> None:
        """Make as many copies as it takes for the caches to hold none of them."""
        count = NUM_SETS if workload.nbytes <= MAX_NBYTES_IN_TURNS else 1
        self.lists = [workload.parameters(device.torch_device) for _ in range(count)]
        self.current = 0
        self.total_norm = float64_norm(self.lists[0])

    def advance(self) -> None:
        """Turn to the next copy."""
        self.current = (self.current + 1) % len(self.lists)


def time_workload(
    device: Device,
    workload: DeviceWorkload,
    names: list[str],
    *,
    budget_s: float,
    with_compiled: bool = False,
    unproven: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Row]:
    """Time one workload in all modes; active comes last because it changes the gradients.

    Args:
        device: Where.
        workload: What is clipped.
        names: Backends of fastclip.
        budget_s: Seconds for each mode's times on the device.
        with_compiled: Beside torch.compile's clip, which takes a minute to compile, in place of the others'.
        unproven: Peer, a backend or its `_graph`, -> why it is not timed.
    """
    sets = Sets(workload, device)
    peers = [*(fastclip_peer(name) for name in names if name not in unproven), *torch_peers()]
    left_out = dict(unproven)
    if with_compiled:
        peers.append(compiled_peer())
    else:
        others, absent = multi_tensor_peers(device)
        peers += others
        left_out |= absent
    errors = {
        peer.name: abs(float(peer.norm(gradients(sets.lists[0]))) - sets.total_norm) / sets.total_norm
        for peer in peers
    }
    nbytes = workload.nbytes
    for mode in MODES:
        calls, before = _calls(device, sets, peers, mode, left_out)
        options: dict[str, Any] = {"min_rounds": MIN_ROUNDS, "max_rounds": MAX_ROUNDS, "before": before}
        host = interleave(calls, budget_s=budget_s / 3, stopwatch=device.host_seconds, **options)
        device.delay_ms = 1.5 * max(m.median_ms for m in host.values()) + 0.5
        times = interleave(calls, budget_s=budget_s, stopwatch=device.device_seconds, **options)
        traffic = Traffic(nbytes, 2 * nbytes if mode == "active" else 0)
        yield Row(
            workload.workload.name,
            workload.workload.title,
            mode,
            workload.workload.num_tensors,
            nbytes,
            traffic,
            times,
            host,
            errors,
            left_out,
        )


def _calls(
    device: Device, sets: Sets, peers: list[Peer], mode: str, left_out: Mapping[str, str]
) -> tuple[dict[str, Call], Call]:
    """Return each peer's call, and what restores the gradients before one."""
    if mode == "norm":
        lists = [gradients(parameters) for parameters in sets.lists]
        return {peer.name: _turns(sets, [_norm_call(peer, g) for g in lists]) for peer in peers}, sets.advance

    # An active clip leaves the norm at the threshold. Doubled, which is exact, it is above again: every
    # call of every peer, captured or not, halves the gradients.
    max_norm = sets.total_norm / 2 if mode == "active" else 1e3 * sets.total_norm
    clipped = [False] * len(sets.lists)

    def before() -> None:
        sets.advance()
        if mode == "active" and clipped[sets.current]:
            torch._foreach_mul_(gradients(sets.lists[sets.current]), 2.0)
        clipped[sets.current] = True

    calls = {
        peer.name: _turns(sets, [_clip_call(peer, parameters, max_norm) for parameters in sets.lists])
        for peer in peers
    }
    if device.is_accelerator:
        for peer in peers:
            if peer.name in NOT_CAPTURED or f"{peer.name}_graph" in left_out:
                continue
            replays = []
            for index, parameters in enumerate(sets.lists):
                sets.current = index - 1
                before()
                replays.append(captured_clip(peer, parameters, max_norm)[0])
            calls[f"{peer.name}_graph"] = _turns(sets, replays)
    return calls, before


def _turns(sets: Sets, calls: list[Call]) -> Call:
    return lambda: calls[sets.current]()


def _norm_call(peer: Peer, grads: list[torch.Tensor]) -> Call:
    return lambda: peer.norm(grads)


def _clip_call(peer: Peer, parameters: list[torch.nn.Parameter], max_norm: float) -> Call:
    return lambda: peer.clip(parameters, max_norm)


def float64_norm(parameters: list[torch.nn.Parameter]) -> float:
    """Return the norm in float64, on the device: the oracle would copy gigabytes to the host."""
    if parameters[0].device.type == "cpu":
        return reference.total_norm(gradients(parameters))
    blocks = (block for g in gradients(parameters) for block in g.flatten().split(1 << 26))
    return float(torch.stack([block.double().square().sum() for block in blocks]).sum().sqrt())


class Deadline:
    """A point in time by which a run has to end."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start counting."""
        self._clock = clock
        self._end = clock() + seconds

    def left_s(self) -> float:
        """Return the seconds that are left; negative after the end."""
        return self._end - self._clock()
