"""A step that is decided and counted on a device, by the kernels of `cuda` or of `triton`.

No host synchronization but one after a step that made state, to take it back if the device skipped that step.
A captured step follows a learning rate that is a tensor on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip.backends.base import Declined
from fastclip.optim.gradients import Decided
from fastclip.optim.native.clipping import dtensor_of, updated_with
from fastclip.optim.native.groups import groups_on_device
from fastclip.optim.native.state import discard_state, ready_on_device, settle_first_step
from fastclip.optim.outcome import NO_GRADIENTS, Outcome, Tally
from fastclip.optim.settings import Amp, Settings
from fastclip.strategies.within import Units

Groups: TypeAlias = list[tuple[Any, ...]]

Read: TypeAlias = Callable[
    [Optimizer, Groups, set[Tensor], bool, type[Tensor] | None, dict[Tensor, Tensor]], Any
]
"""(optimizer, groups, parameters whose state was made for this step, write_grads, the class DTensor if there
are any, what to update parameters with in the place of their gradients) -> `_C.Step` or Declined.

The step holds every tensor whose address it has read; so they are there until the kernels are launched.
"""

Launch: TypeAlias = Callable[
    [Optimizer, Groups, Any, Settings, Amp, Tally, Decided | None], Outcome | Declined
]
"""Clips, updates and counts what `Read` returned, which is whole and not empty."""


def step_on_device(
    optimizer: Optimizer,
    settings: Settings,
    amp: Amp,
    tally: Tally,
    decided: Decided | None,
    *,
    device_type: str,
    read: Read,
    launch: Launch,
) -> Outcome | Declined:
    """Clip, update and count on the device; `device_type` is torch's name for what it is."""
    groups = groups_on_device(optimizer, device_type)
    if isinstance(groups, Declined):
        return groups
    if decided is not None and isinstance(decided.within, Units):
        return Declined("only the CPU's kernels clip units on the way")
    instead = updated_with(decided, settings)
    if isinstance(instead, Declined):
        return instead
    where = settings.write_grads, dtensor_of(decided), instead
    found = read(optimizer, groups, set(), *where)
    made: list[Tensor] = []
    outcome: Outcome | Declined | None = None
    try:
        if not isinstance(found, Declined) and (found.missing or found.counted_on_cpu):
            made = ready_on_device(optimizer, found.missing, found.counted_on_cpu)
            found = read(optimizer, groups, set(made), *where)
        if isinstance(found, Declined):
            outcome = found
        elif reason := _reason_against(found, groups, settings, decided):
            outcome = Declined(reason)
        elif found:
            outcome = launch(optimizer, groups, found, settings, amp, tally, decided)
        else:
            outcome = NO_GRADIENTS if decided is None else decided.outcome
            tally.add(outcome)
    finally:
        if not isinstance(outcome, Outcome):
            discard_state(optimizer, made)
    may_skip = settings.skips or amp.found_inf is not None if decided is None else decided.may_skip
    if isinstance(outcome, Outcome) and may_skip:
        settle_first_step(optimizer, made, outcome)
    return outcome


def on_device(device: torch.device, outcome: Outcome) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is decided as the kernels read it: norm, coefficient and verdict on their device."""
    values = outcome.total_norm, outcome.clip_coef, outcome.skipped
    norm, coef, skipped = (value.to(device, non_blocking=True) for value in values)
    return norm, coef, skipped


def _reason_against(found: Any, groups: Groups, settings: Settings, decided: Decided | None) -> str | None:
    if found.missing or found.counted_on_cpu:
        return "a parameter's state is incomplete"
    if decided is None and math.isinf(settings.norm_type) and found.has_empty:
        return "a gradient is empty, which has no inf-norm"
    if decided is not None and found and decided.coefs.numel() not in (1, len(found)):
        return "the number of coefficients is not that of the gradients"
    for number, (*_, lr) in enumerate(groups if found else ()):
        if isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.device.index != found.device:
            return f"the lr of group {number} is on {lr.device}, where the parameters are not"
    return None
