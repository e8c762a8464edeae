"""The step by the C++ kernels, for parameters on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from fastclip.backends import cpu
from fastclip.backends.base import Declined
from fastclip.optim.gradients import Decided
from fastclip.optim.native.clipping import dtensor_of, max_value_of, units_of, updated_with
from fastclip.optim.native.state import discard_state, make_state
from fastclip.optim.outcome import NO_GRADIENTS, Outcome, Tally
from fastclip.optim.settings import Amp, Settings

unavailable_reason = cpu.unavailable_reason


def step(
    optimizer: Optimizer,
    settings: Settings,
    amp: Amp,
    tally: Tally,
    decided: Decided | None,
) -> Outcome | Declined:
    """Clip and update in one parallel region; with `decided` nothing is measured."""
    first = next((param for group in optimizer.param_groups for param in group["params"]), None)
    if first is not None and first.device.type != "cpu":
        # Before anything is asked of a device: a scaler's scale is there, too.
        return Declined(f"the parameters are on {first.device}")
    if decided is not None and bool(decided.outcome.skipped):
        tally.add(decided.outcome)
        return decided.outcome
    instead = updated_with(decided, settings)
    if isinstance(instead, Declined):
        return instead
    result = _call(optimizer, settings, amp, set(), decided, instead)
    if isinstance(result, list):  # parameters without state: torch makes it in the first step
        fresh = make_state(optimizer, result)
        stepped = False
        try:
            result = _call(optimizer, settings, amp, set(fresh), decided, instead)
            stepped = isinstance(result, tuple) and not result[2]
        finally:
            if not stepped:
                discard_state(optimizer, fresh)
    if isinstance(result, str):
        return Declined(result)
    if isinstance(result, list):
        return Declined("a parameter's state is incomplete")
    if decided is not None:
        outcome = decided.outcome
    elif result is None:
        outcome = NO_GRADIENTS
    else:
        norm, coef, skipped, any_float64 = result
        outcome = Outcome.of_numbers(norm, coef, skipped, torch.float64 if any_float64 else torch.float32)
    tally.add(outcome)
    return outcome


def _call(
    optimizer: Optimizer,
    settings: Settings,
    amp: Amp,
    fresh: set[Tensor],
    decided: Decided | None,
    instead: dict[Tensor, Tensor],
) -> Any:
    kernel = cpu._C.sgd_step if type(optimizer) is SGD else cpu._C.adam_step
    return kernel(
        optimizer.param_groups,
        optimizer.state,
        fresh,
        float(settings.max_norm),  # type: ignore[arg-type]  # which is no strategy by now
        settings.norm_type,
        1.0 if amp.grad_scale is None else float(amp.grad_scale),
        settings.skips,
        settings.write_grads,
        torch.get_num_threads(),
        [] if decided is None else decided.coefs.tolist(),
        max_value_of(decided),
        units_of(decided, optimizer),
        dtensor_of(decided),
        instead,
    )
