"""The gradients of an optimizer: which there are, their norm, their scaling, and who is not finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip import backends
from fastclip.backends import Backend
from fastclip.backends.eager import clip_coefficient
from fastclip.distributed import Shards, shards
from fastclip.optim.outcome import Outcome
from fastclip.optim.settings import Amp, Settings
from fastclip.strategies import Strategy
from fastclip.strategies.within import Within


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that have a gradient, in the order of the groups."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients, in the order of the groups."""
    return [p.grad for p in parameters(optimizer) if p.grad is not None]


def dense_values(params: list[Tensor]) -> list[Tensor]:
    """Return the memory of each gradient; of a sparse one, which is coalesced for it, the values."""
    grads = [param.grad for param in params]
    if all(grad is not None and grad.layout is torch.strided for grad in grads):
        return grads  # type: ignore[return-value]
    values = []
    for param in params:
        grad = param.grad
        assert grad is not None  # `parameters` returns no others
        if grad.layout is torch.sparse_coo:
            param.grad = grad = grad.coalesce()
            grad = grad._values()
        values.append(grad)
    return values


@dataclass(frozen=True)
class Decided:
    """A step of which everything is known before it is taken.

    Attributes:
        outcome: The same on every rank that reduces.
        coefs: What to multiply the gradients by, a GradScaler's scale apart: one for all or, in the order of
            the groups, one for each that is there; 1-dim float64 (float32 where the device has none).
        may_skip: Whether anything can lead to a skip; only then is the host to ask.
        shards: What this rank holds, if others hold further parts.
        within: What is clipped within each gradient, after its coefficient and free of a GradScaler's scale.
    """

    outcome: Outcome
    coefs: Tensor
    may_skip: bool
    shards: Shards | None = None
    within: Within | None = None


def over_ranks(function: str, optimizer: Optimizer, settings: Settings) -> Shards | None:
    """Return the gradients as what this rank holds of them; None if they are whole here."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return over_ranks_of(function, params, settings)


def over_ranks_of(function: str, params: list[Tensor], settings: Settings) -> Shards | None:
    """Return the same of some of the parameters."""
    return shards(
        function,
        params,
        of_gradients=True,
        group=settings.group,
        mesh=settings.mesh,
        all_dims=True,
        norm_type=settings.norm_type,
    )


def measure(grads: list[Tensor], settings: Settings, amp: Amp) -> Outcome:
    """Return norm, coefficient and whether to skip, without touching a gradient or synchronizing."""
    norm = backends.run(Backend.total_norm, grads, settings.norm_type)
    if amp.grad_scale is not None:
        norm = norm / amp.grad_scale.to(norm.device)
    return outcome_of(norm, settings, amp)


def outcome_of(norm: Tensor, settings: Settings, amp: Amp) -> Outcome:
    """Return what follows from the norm of the unscaled gradients."""
    assert not isinstance(settings.max_norm, Strategy)  # which has been asked by now
    coef = clip_coefficient(settings.max_norm, norm)
    skipped = ~norm.isfinite() if settings.skips else torch.zeros_like(norm, dtype=torch.bool)
    if amp.found_inf is not None:
        skipped = skipped | amp.found_inf.to(norm.device).bool()
    return Outcome(norm, coef, skipped)


def scale(params: list[Tensor], coefs: Tensor, amp: Amp, shards: Shards | None = None) -> None:
    """Multiply each gradient in place by its coefficient, and divide it by the scale."""
    factors = coefs if amp.grad_scale is None else coefs / amp.grad_scale.to(coefs.device)
    if shards is not None:
        shards.multiply(factors)
    else:
        backends.run(Backend.scale_grads_, params, factors)


def first_nonfinite(optimizer: Optimizer, settings: Settings) -> str:
    """Return the name, group and contents of the first parameter whose gradient is not finite.

    With DTensors or a group it is that of the first rank that has one; all ranks have to ask.
    """
    spread = over_ranks("ClippedOptimizer.step", optimizer, settings)
    if spread is None:
        found = _nonfinite(optimizer, {})
        return found or "every element is finite, but the norm is beyond the range of its dtype"
    spread.total_norm(settings.norm_type)  # by which the ranks know who is to answer
    here = _nonfinite(optimizer, spread.local_of())
    for rank, what in spread.nonfinite([(here,)] if here else []):
        return f"on rank {rank}, {what}"
    return "every element is finite on all ranks, but the norm is beyond the range of its dtype"


def _nonfinite(optimizer: Optimizer, local_of: dict[Tensor, Tensor]) -> str | None:
    for number, group in enumerate(optimizer.param_groups):
        present = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
        counts = backends.run(Backend.count_nonfinite, [local_of.get(p, p.grad) for _, p in present])
        if counts:
            index, nan, inf = counts[0]
            position, param = present[index]
            name = f" ({group['param_names'][position]})" if "param_names" in group else ""
            return (
                f"parameter {position}{name} of group {number}, shape {tuple(param.shape)}, {param.dtype}, "
                f"has {nan} nan and {inf} inf in its gradient of {param.grad.numel()} elements"
            )
    return None
