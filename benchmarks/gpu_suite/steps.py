"""Clip and optimizer step together: fastclip's folded one beside torch's clip and torch's step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import fastclip
from fastclip.bench.cases import Traffic
from fastclip.bench.models import gpt2, gradients
from fastclip.bench.steps import DEFAULT, FUSED, STEP_KINDS, STEP_MODES, StepKind
from fastclip.bench.timing import Call, interleave
from gpu_suite.device import Device
from gpu_suite.subjects import captured, within
from gpu_suite.timing import MAX_ROUNDS, MIN_ROUNDS, Row, float64_norm
from gpu_suite.workloads import DeviceWorkload, llama3_8b, workload

LLAMA_DEPTH = 32
COPIES = 6
"""Times as many bytes as the parameters have: gradients, two moments, and two temporaries of torch's step."""


def step_workloads(device: Device) -> Iterator[DeviceWorkload]:
    """Yield what is stepped, the most telling first; of Llama 3 8B as many layers as the memory holds."""
    if not device.is_accelerator:
        yield workload("dry-many", "200 tiny tensors", [(16,)] * 200, torch.float32)
        yield workload("dry-bf16", "bfloat16", [(300, 70), (65,), (9, 9)], torch.bfloat16)
        return
    if depth := fitting_depth(device.free_nbytes()):
        layers = "" if depth == LLAMA_DEPTH else f", {depth} of {LLAMA_DEPTH} layers"
        yield workload("llama3-8b", f"Llama-3-8B{layers}, bfloat16", llama3_8b(depth), torch.bfloat16)
    yield workload("gpt2", "GPT-2 124M, float32", gpt2(), torch.float32)
    yield workload("2000-tiny", "2000 tensors of 16, float32", [(16,)] * 2000, torch.float32)


def fitting_depth(free_nbytes: int) -> int:
    """Return how many layers of Llama 3 8B can be stepped in so much memory; 0 if none can."""
    sizes = {depth: needed_nbytes(_llama(depth)) for depth in range(1, LLAMA_DEPTH + 1)}
    return max((depth for depth, nbytes in sizes.items() if nbytes <= free_nbytes), default=0)


def _llama(depth: int) -> DeviceWorkload:
    return workload("llama3-8b", "Llama-3-8B", llama3_8b(depth), torch.bfloat16)


def needed_nbytes(of: DeviceWorkload) -> int:
    """Return the memory that the steps of a workload need, with a margin for a fragmented heap."""
    return COPIES * of.nbytes + 2**30


@dataclass
class Stepped:
    """One list of parameters with the threshold that all peers clip it by."""

    parameters: list[Parameter]
    total_norm: float
    clipped: dict[str, fastclip.ClippedOptimizer] = field(default_factory=dict)
    written: bool = False  # whether torch has scaled the gradients since they were restored
    max_norm: float = 0.0

    def set_mode(self, mode: str) -> None:
        """Set the threshold of every peer, half of the norm or far above it."""
        self.restore()
        self.max_norm = self.total_norm / 2 if mode == "active" else 1e3 * self.total_norm
        for optimizer in self.clipped.values():
            optimizer.max_norm = self.max_norm

    def restore(self) -> None:
        """Undo torch's clip, which halved the gradients: doubling is exact. Not to be timed."""
        if self.written and self.max_norm < self.total_norm:
            torch._foreach_mul_(gradients(self.parameters), 2.0)
        self.written = False

    def torch_call(self, optimizer: Optimizer) -> Call:
        """Return torch's clip and an optimizer's step."""

        def call() -> None:
            self.written = True
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
            optimizer.step()

        return call

    def norm_error(self, name: str) -> float:
        """Return how far the norm of fastclip's latest step was from float64's."""
        last = self.clipped[name].last
        assert last is not None  # it has stepped
        return abs(float(last.total_norm) - self.total_norm) / self.total_norm


def peers_of(stepped: Stepped, kind: StepKind, names: Sequence[str], device: Device) -> dict[str, Call]:
    """Return the steps of fastclip with each backend, and torch's two.

    Every peer has an optimizer of its own, and all of them one state between them: the memory is that of one
    training run. Counters of steps are their own, each where its step keeps them.
    """
    fused, default = kind.make(stepped.parameters, True), kind.make(stepped.parameters, None)
    fused.step()  # makes the state
    share_state(fused, default, counters=torch.device("cpu"))
    peers = {}
    for name in names:
        inner = kind.make(stepped.parameters, None)
        share_state(fused, inner, counters=device.torch_device)
        optimizer = stepped.clipped[name] = fastclip.ClippedOptimizer(inner, 1.0, fused=True)
        peers[name] = within(name, optimizer.step)
    return {**peers, FUSED: stepped.torch_call(fused), DEFAULT: stepped.torch_call(default)}


def real_parameters(workload: DeviceWorkload, device: Device) -> list[Parameter]:
    """Return parameters with memory of their own, values and gradients standard normal."""
    parameters = []
    for placeholder in workload.parameters(device.torch_device):
        parameter = Parameter(torch.empty_like(placeholder.grad).normal_())
        parameter.grad = placeholder.grad
        parameters.append(parameter)
    return parameters


def share_state(source: Optimizer, target: Optimizer, *, counters: torch.device) -> None:
    """Give an optimizer the state of another of the same parameters, with step counters of its own."""
    for parameter, state in source.state.items():
        target.state[parameter] = {
            name: tensor.to(counters, copy=True) if name == "step" else tensor
            for name, tensor in state.items()
        }


def time_steps(
    device: Device,
    workload: DeviceWorkload,
    names: Sequence[str],
    *,
    budget_s: float,
    unproven: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Row]:
    """Time every optimizer on one workload, clipping inactive and active; arguments as `time_workload`'s."""
    proven = [name for name in names if name not in unproven]
    for kind in STEP_KINDS.values():
        yield from _time_kind(device, workload, kind, proven, budget_s, unproven)


def _time_kind(
    device: Device,
    workload: DeviceWorkload,
    kind: StepKind,
    names: Sequence[str],
    budget_s: float,
    unproven: Mapping[str, str],
) -> Iterator[Row]:
    parameters = real_parameters(workload, device)
    stepped = Stepped(parameters, float64_norm(parameters))
    peers = peers_of(stepped, kind, names, device)
    traffic = Traffic(workload.nbytes, kind.passes * workload.nbytes)
    for mode in STEP_MODES:
        stepped.set_mode(mode)
        calls, errors = dict(peers), {}
        for name in names:
            peers[name]()
            errors[name] = stepped.norm_error(name)
            if device.is_accelerator and f"{name}_graph" not in unproven:
                calls[f"{name}_graph"] = captured(peers[name])[0]
        options: dict[str, Any] = {
            "min_rounds": MIN_ROUNDS,
            "max_rounds": MAX_ROUNDS,
            "before": stepped.restore,
        }
        host = interleave(calls, budget_s=budget_s / 3, stopwatch=device.host_seconds, **options)
        device.delay_ms = 1.5 * max(m.median_ms for m in host.values()) + 0.5
        times = interleave(calls, budget_s=budget_s, stopwatch=device.device_seconds, **options)
        yield Row(
            workload.workload.name,
            workload.workload.title,
            f"{kind.name} {mode}",
            workload.workload.num_tensors,
            workload.nbytes,
            traffic,
            times,
            host,
            errors,
            dict(unproven),
        )
