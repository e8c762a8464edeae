"""A step that is decided and counted on a device, by the kernels of `cuda` or of `triton`.

No host synchronization but one after a step that made state, to take it back if the device skipped that step.
A captured step follows a learning rate that is a tensor on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from fastclip.backends.base import Declined
from fastclip.optim.native.groups import groups_on_device
from fastclip.optim.native.state import discard_state, ready_on_device, settle_first_step
from fastclip.optim.outcome import NO_GRADIENTS, Outcome, Tally
from fastclip.optim.settings import Amp, Settings

Groups: TypeAlias = list[tuple[Any, ...]]

Read: TypeAlias = Callable[[Optimizer, Groups, set[Tensor], bool], Any]
"""(optimizer, groups, parameters whose state was made for this step, write_grads) -> `_C.Step` or Declined.

The step holds every tensor whose address it has read; so they are there until the kernels are launched.
"""

Launch: TypeAlias = Callable[[Optimizer, Groups, Any, Settings, Amp, Tally], Outcome | Declined]
"""Clips, updates and counts what `Read` returned, which is whole and not empty."""


def step_on_device(
    optimizer: Optimizer,
    settings: Settings,
    amp: Amp,
    tally: Tally,
    *,
    device_type: str,
    read: Read,
    launch: Launch,
) -> Outcome | Declined:
    """Clip, update and count on the device; `device_type` is torch's name for what it is."""
    groups = groups_on_device(optimizer, device_type)
    if isinstance(groups, Declined):
        return groups
    found = read(optimizer, groups, set(), settings.write_grads)
    made: list[Tensor] = []
    outcome: Outcome | Declined | None = None
    try:
        if not isinstance(found, Declined) and (found.missing or found.counted_on_cpu):
            made = ready_on_device(optimizer, found.missing, found.counted_on_cpu)
            found = read(optimizer, groups, set(made), settings.write_grads)
        if isinstance(found, Declined):
            outcome = found
        elif reason := _reason_against(found, groups, settings):
            outcome = Declined(reason)
        elif found:
            outcome = launch(optimizer, groups, found, settings, amp, tally)
        else:
            outcome = NO_GRADIENTS
            tally.add(outcome)
    finally:
        if not isinstance(outcome, Outcome):
            discard_state(optimizer, made)
    if isinstance(outcome, Outcome) and (settings.skips or amp.found_inf is not None):
        settle_first_step(optimizer, made, outcome)
    return outcome


def _reason_against(found: Any, groups: Groups, settings: Settings) -> str | None:
    if found.missing or found.counted_on_cpu:
        return "a parameter's state is incomplete"
    if math.isinf(settings.norm_type) and found.has_empty:
        return "a gradient is empty, which has no inf-norm"
    for number, (*_, lr) in enumerate(groups if found else ()):
        if isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.device.index != found.device:
            return f"the lr of group {number} is on {lr.device}, where the parameters are not"
    return None
