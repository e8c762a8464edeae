"""Route 3: clip the gradients, then call the optimizer's own step; takes everything."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip import backends
from fastclip.optim.gradients import (
    OverRanks,
    dense_values,
    measure,
    outcome_of,
    parameters,
    scale,
)
from fastclip.optim.outcome import NO_GRADIENTS, Outcome
from fastclip.optim.settings import Amp, Settings


def step(optimizer: Optimizer, settings: Settings, amp: Amp, spread: OverRanks | None) -> Outcome:
    """Clip, then step unless the step is to be skipped, which has to be known on the host."""
    outcome = clip(optimizer, settings, amp, spread)
    if not may_skip(settings, amp) or not bool(outcome.skipped):
        optimizer.step()
    return outcome


def may_skip(settings: Settings, amp: Amp) -> bool:
    """Whether anything can lead to a skip; only then is the host to ask."""
    return settings.skips or amp.found_inf is not None


def clip(optimizer: Optimizer, settings: Settings, amp: Amp, spread: OverRanks | None) -> Outcome:
    """Clip and unscale the gradients in place; in a step that is to be skipped, leave them as they are."""
    if spread is not None:
        if not (may_skip(settings, amp) and bool(spread.outcome.skipped)):
            if amp.grad_scale is None:
                spread.shards.scale(settings.max_norm, spread.norm)
            else:
                scale(spread.shards.present(), spread.outcome, amp)
        return spread.outcome
    params = parameters(optimizer)
    if not params:
        return NO_GRADIENTS
    if amp == Amp() and all(p.grad is not None and p.grad.layout is torch.strided for p in params):
        norm: Tensor = backends.run(
            "clip_grad_norm_", params, settings.max_norm, settings.norm_type, settings.skips
        )
        return outcome_of(norm, settings, amp)
    grads = dense_values(params)
    outcome = measure(grads, settings, amp)
    if not (may_skip(settings, amp) and bool(outcome.skipped)):
        scale(grads, outcome, amp)
    return outcome
