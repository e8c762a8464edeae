"""Route 2: torch's fused optimizers, which divide by `grad_scale` and leave out a step on `found_inf`."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Optimizer

from fastclip.backends.base import Declined
from fastclip.optim.gradients import Decided, gradients, measure
from fastclip.optim.outcome import NO_GRADIENTS, Outcome
from fastclip.optim.settings import Amp, Settings

_ABSENT = object()


def unsupported(optimizer: Optimizer) -> str | None:
    """Return why this optimizer can never take this route, or None."""
    own = inspect.unwrap(type(optimizer).step)
    if own not in [inspect.unwrap(known.step) for known in (Adam, SGD, Adagrad)]:
        return f"torch has no fused step for {type(optimizer).__name__}"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return f"the {type(optimizer).__name__} was not made with fused=True"
    return None


def step(optimizer: Optimizer, settings: Settings, amp: Amp, decided: Decided | None) -> Outcome | Declined:
    """Measure the norm, then let torch's fused step divide by scale / coefficient and check for a skip.

    No host synchronization, except in a first step on a device. torch writes the clipped gradients back.
    """
    if reason := unsupported(optimizer) or unshared(settings, decided):
        return Declined(reason)
    grads = gradients(optimizer)
    if not grads:
        optimizer.step()
        return NO_GRADIENTS
    if reason := unfit(grads):
        return Declined(reason)
    outcome = measure(grads, settings, amp) if decided is None else decided.outcome
    on_host = decides_on_host(optimizer, outcome)
    if on_host and bool(outcome.skipped):
        return outcome
    if on_host and amp.grad_scale is None and float(outcome.clip_coef) == 1.0:
        optimizer.step()
    else:
        step_with(optimizer, divisor(outcome, amp), outcome.skipped.float())
    return outcome


def unshared(settings: Settings, decided: Decided | None) -> str | None:
    """Return why a step cannot go through `grad_scale`, which is one number for all, or None."""
    if (settings if decided is None else decided).within is not None:
        return "there is more to clip within each gradient"
    if decided is None:
        return None
    if decided.shards is not None:
        return "it does not know the norm of other ranks"
    return "gradients have coefficients of their own" if decided.coefs.numel() > 1 else None


def unfit(grads: list[Tensor]) -> str | None:
    """Return why these gradients must not go through `grad_scale`, or None."""
    if any(type(grad) not in (Tensor, torch.nn.Parameter) for grad in grads):
        return (
            "a gradient is of a subclass of torch.Tensor, which torch's fused step does not mix with others"
        )
    if any(grad.layout is not torch.strided for grad in grads):
        return "a gradient is sparse"
    is_dense = torch.ops.aten.is_non_overlapping_and_dense
    if not all(grad.is_contiguous() or is_dense(grad) for grad in grads):
        return "a gradient is not dense in memory, which torch's fused step writes as if it were"
    if len({id(grad) for grad in grads}) < len(grads):
        return "two parameters have one gradient, which torch's fused step would divide after each"
    if any(grad.dtype == torch.float64 for grad in grads):
        return "torch keeps grad_scale in float32, too coarse for float64 gradients"
    return None


def decides_on_host(optimizer: Optimizer, outcome: Outcome) -> bool:
    """Whether the host asks if the step is to be skipped.

    It does on the CPU, where that is free, and in a step that makes state: torch's SGD would keep an
    uninitialized buffer if the device left that step out.
    """
    return outcome.total_norm.device.type == "cpu" or any(
        param.grad is not None and not optimizer.state.get(param)
        for group in optimizer.param_groups
        for param in group["params"]
    )


def divisor(outcome: Outcome, amp: Amp) -> Tensor:
    """Return what torch's fused step is to divide the gradients by: scale / coefficient."""
    scale = torch.ones_like(outcome.clip_coef) if amp.grad_scale is None else amp.grad_scale
    return (scale / outcome.clip_coef).float()


def step_with(optimizer: Optimizer, grad_scale: Tensor, found_inf: Tensor) -> None:
    """Run a fused step with these attributes, and put back what was there."""
    before = {name: vars(optimizer).get(name, _ABSENT) for name in ("grad_scale", "found_inf")}
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        # Other paths of torch insist that they are absent.
        for name, value in before.items():
            delattr(optimizer, name) if value is _ABSENT else setattr(optimizer, name, value)
