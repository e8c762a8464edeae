"""The folded step of one backend: against float64, captured in a CUDA graph, and its launches counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import optim_cases
import torch
from optim_oracle import Oracle
from torch.nn import Parameter
from torch.optim import Optimizer

import fastclip
from gpu_suite.device import Device
from gpu_suite.launches import counts_of
from gpu_suite.subjects import captured, within

MAX_LAUNCHES = 3
NUM_STEPS = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
CAPTURED_OPTIONS = ("adamw_amsgrad", "sgd_nesterov")


def step_failures(device: Device, backend: str) -> Iterator[tuple[str, str | None]]:
    """Yield (check, what is wrong with it or None) of every optimizer, option and dtype."""
    for option in optim_cases.OPTIONS:
        for dtype in DTYPES:
            complaint = None
            try:
                with fastclip.use_backend(backend):
                    _check_option(device, option, dtype)
            except AssertionError as error:
                complaint = str(error).strip() or "assertion failed"
            yield f"step {option} {str(dtype).removeprefix('torch.')}", complaint


def _check_option(device: Device, option: str, dtype: torch.dtype) -> None:
    on_host = optim_cases.parameters(dtype)
    oracle = Oracle(optim_cases.make(option, on_host), optim_cases.MAX_NORM)
    params = [Parameter(p.detach().to(device.torch_device)) for p in on_host]
    optimizer = _clipped(_on_device(optim_cases.make(option, params), device))
    for grads in optim_cases.gradients(NUM_STEPS):
        optim_cases.give(params, [g.to(device.torch_device) for g in grads])
        oracle.step([p.grad for p in params])
        optimizer.step()
    assert optimizer.route == "native", f"the step went the {optimizer.route} route"
    _take_back(optimizer.optimizer, on_host, oracle.optimizer)
    oracle.assert_near(oracle.optimizer)
    before = [p.detach().clone() for p in params]
    params[0].grad.fill_(float("nan"))
    optimizer.step()
    assert bool(optimizer.last.skipped), "a step with nan was not skipped"
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)), "a skipped step wrote"


def _on_device(optimizer: Optimizer, device: Device) -> Optimizer:
    """Put learning rates that are tensors beside the parameters, where a kernel reads them."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"] = group["lr"].to(device.torch_device)
    return optimizer


def _take_back(source: Optimizer, params: list[Parameter], target: Optimizer) -> None:
    """Copy parameters and state to the host, where the oracle compares them."""
    with torch.no_grad():
        for param, other in zip(params, source.param_groups[0]["params"], strict=True):
            param.copy_(other)
            target.state[param] = {name: value.cpu() for name, value in source.state[other].items()}


def _clipped(optimizer: Optimizer) -> fastclip.ClippedOptimizer:
    return fastclip.ClippedOptimizer(optimizer, optim_cases.MAX_NORM, fused=True)


def check_step_capture(device: Device, backend: str) -> dict[str, int]:
    """Replay captured steps while the gradients change, beside the same steps taken one by one.

    Raises:
        AssertionError: A replay gave other bits than a step, or another count.
    """
    num_replays = 0
    for option in CAPTURED_OPTIONS:
        for dtype in DTYPES:
            replayed, eager = (_ready(device, backend, option, dtype) for _ in range(2))
            replay, _ = captured(within(backend, replayed.step), warm_up=False)
            for number, grads in enumerate(optim_cases.gradients(NUM_STEPS)):
                if number == 2:
                    grads[0].fill_(float("inf"))
                for optimizer in (replayed, eager):
                    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                        param.grad.copy_(grad)
                replay()
                within(backend, eager.step)()
                what = f"{option} {dtype}, replay {number}"
                assert _bits(replayed) == _bits(eager), f"{what}: parameters or state differ from a step's"
                assert replayed.stats() == eager.stats(), f"{what}: {replayed.stats()}, {eager.stats()}"
                num_replays += 1
    return {"replays": num_replays}


def _ready(device: Device, backend: str, option: str, dtype: torch.dtype) -> fastclip.ClippedOptimizer:
    """Return an optimizer that has taken one step, so that its state is there."""
    params = [Parameter(p.detach().to(device.torch_device)) for p in optim_cases.parameters(dtype)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = _clipped(optim_cases.make(option, params))
    within(backend, optimizer.step)()
    return optimizer


def _bits(optimizer: fastclip.ClippedOptimizer) -> list[list[Any]]:
    tensors = []
    for param, state in optimizer.state.items():
        tensors += [param.detach(), *state.values()]
    return [tensor.double().flatten().tolist() for tensor in tensors]


def check_step_launches(device: Device, backend: str) -> dict[str, dict[str, int]]:
    """Count kernels, copies and waits of steady steps of 1, 40 and 2000 tensors of all dtypes.

    Raises:
        AssertionError: A step launches more than three kernels, copies, or waits.
    """
    result = {}
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        for num_tensors in (1, 40, 2000):
            params = []
            for i in range(num_tensors):
                values = torch.ones(50 + i % 70, dtype=DTYPES[i % 4], device=device.torch_device)
                params.append(Parameter(values))
                params[-1].grad = torch.ones_like(values)
            optimizer = _clipped(kind(params, lr=1e-3))
            step = within(backend, optimizer.step)
            step()
            counts = counts_of(step)
            what = f"{kind.__name__} of {num_tensors}"
            assert counts["kernels"] <= MAX_LAUNCHES, f"{what} tensors: {counts['kernels']} kernels"
            assert counts["copies"] == 0, f"{what} tensors: {counts['copies']} copies"
            assert counts["waits"] == 0, f"{what} tensors: {counts['waits']} synchronizing calls"
            result[what] = counts
    return result
