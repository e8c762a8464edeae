"""The gradients of an optimizer: which there are, their norm, their scaling, and who is not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip import backends
from fastclip.optim.outcome import Outcome
from fastclip.optim.settings import Amp, Settings
from fastclip.reference import NORM_EPSILON


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that have a gradient, in the order of the groups."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients, in the order of the groups."""
    return [p.grad for p in parameters(optimizer) if p.grad is not None]


def dense_values(params: list[Tensor]) -> list[Tensor]:
    """Return the memory of each gradient; of a sparse one, which is coalesced for it, the values."""
    values = []
    for param in params:
        grad = param.grad
        assert grad is not None  # `parameters` returns no others
        if grad.layout is torch.sparse_coo:
            param.grad = grad = grad.coalesce()
            grad = grad._values()
        values.append(grad)
    return values


def measure(grads: list[Tensor], settings: Settings, amp: Amp) -> Outcome:
    """Return norm, coefficient and whether to skip, without touching a gradient or synchronizing."""
    norm: Tensor = backends.run("total_norm", grads, settings.norm_type)
    if amp.grad_scale is not None:
        norm = norm / amp.grad_scale.to(norm.device)
    return outcome_of(norm, settings, amp)


def outcome_of(norm: Tensor, settings: Settings, amp: Amp) -> Outcome:
    """Return what follows from the norm of the unscaled gradients."""
    if settings.max_norm == math.inf:
        coef = torch.ones_like(norm)
    else:
        coef = torch.clamp(settings.max_norm / (norm + NORM_EPSILON), max=1.0)
    skipped = ~norm.isfinite() if settings.skips else torch.zeros_like(norm, dtype=torch.bool)
    if amp.found_inf is not None:
        skipped = skipped | amp.found_inf.to(norm.device).bool()
    return Outcome(norm, coef, skipped)


def scale(grads: list[Tensor], outcome: Outcome, amp: Amp) -> None:
    """Multiply each gradient in place by the coefficient, and divide it by the scale."""
    factor = outcome.clip_coef
    if amp.grad_scale is not None:
        factor = factor / amp.grad_scale.to(factor.device)
    with torch.no_grad():
        for grad in grads:
            grad.mul_(factor.to(grad.device))


def first_nonfinite(optimizer: Optimizer) -> str:
    """Return the name, group and contents of the first parameter whose gradient is not finite."""
    for number, group in enumerate(optimizer.param_groups):
        present = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
        counts = backends.run("count_nonfinite", [p.grad for _, p in present])
        if counts:
            index, nan, inf = counts[0]
            position, param = present[index]
            name = f" ({group['param_names'][position]})" if "param_names" in group else ""
            return (
                f"parameter {position}{name} of group {number}, shape {tuple(param.shape)}, {param.dtype}, "
                f"has {nan} nan and {inf} inf in its gradient of {param.grad.numel()} elements"
            )
    return "every element is finite, but the norm is beyond the range of its dtype"
