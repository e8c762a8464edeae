"""Route 3: clip the gradients, then call the optimizer's own step; takes everything."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from fastclip import backends
from fastclip.backends import Backend
from fastclip.optim.gradients import (
    Decided,
    dense_values,
    measure,
    outcome_of,
    parameters,
    scale,
)
from fastclip.optim.outcome import NO_GRADIENTS, Outcome
from fastclip.optim.settings import Amp, Settings
from fastclip.strategies import Strategy


def step(optimizer: Optimizer, settings: Settings, amp: Amp, decided: Decided | None) -> Outcome:
    """Clip, then step unless the step is to be skipped, which has to be known on the host."""
    outcome = clip(optimizer, settings, amp, decided)
    if not may_skip(settings, amp, decided) or not bool(outcome.skipped):
        optimizer.step()
    return outcome


def may_skip(settings: Settings, amp: Amp, decided: Decided | None) -> bool:
    """Whether anything can lead to a skip; only then is the host to ask."""
    if decided is not None:
        return decided.may_skip
    return settings.skips or amp.found_inf is not None


def clip(optimizer: Optimizer, settings: Settings, amp: Amp, decided: Decided | None) -> Outcome:
    """Clip and unscale the gradients in place; in a step that is to be skipped, leave them as they are."""
    params = parameters(optimizer)
    if decided is not None:
        if not (decided.may_skip and bool(decided.outcome.skipped)):
            scale(params, decided.coefs, amp, decided.shards)
            if decided.within is not None:
                decided.within.clip_(params, None, decided.shards)
        return decided.outcome
    if not params:
        return NO_GRADIENTS
    assert not isinstance(settings.max_norm, Strategy)  # which has been asked by now
    is_one_call = amp == Amp() and all(p.grad is not None and p.grad.layout is torch.strided for p in params)
    if is_one_call:
        norm = backends.run(
            Backend.clip_grad_norm_, params, settings.max_norm, settings.norm_type, settings.skips
        )
        outcome = outcome_of(norm, settings, amp)
    else:
        outcome = measure(dense_values(params), settings, amp)
    # Asked once: it waits for a device.
    if (is_one_call and settings.within is None) or (may_skip(settings, amp, None) and bool(outcome.skipped)):
        return outcome
    if not is_one_call:
        scale(params, outcome.clip_coef.reshape(1), amp)
    if settings.within is not None:
        settings.within.clip_(params)
    return outcome
