"""A step that is decided and counted on a device, by the kernels of `cuda` or of `triton`.

No host synchronization but one after a step that made state, to take it back if the device skipped that step.
A captured step follows a learning rate that is a tensor on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.dlpack import DLDeviceType

from fastclip.backends.base import Declined
from fastclip.optim.gradients import Decided
from fastclip.optim.native.clipping import dtensor_of, updated_with
from fastclip.optim.native.state import discard_state, ready_on_device, settle_first_step
from fastclip.optim.outcome import NO_GRADIENTS, Outcome, Tally
from fastclip.optim.settings import Amp, Settings
from fastclip.strategies.within import Units


@dataclass(frozen=True)
class Kernels:
    """What steps on a device.

    Attributes:
        adam: A class of `_C`, such as `AdamStep`: holds the tensors whose addresses it reads, so that they
            are there until the kernels are launched.
        sgd: The same, such as `SgdStep`.
        device_type: Of the devices that the kernels run on.
        device_reason: Says why they cannot run on the device of what was read, or None.
        launch: Clips, updates and counts what was read, which is whole and not empty.
    """

    adam: Any
    sgd: Any
    device_type: DLDeviceType
    device_reason: Callable[[Any], str | None]
    launch: Callable[[Optimizer, Any, Settings, Amp, Tally, Decided | None], Outcome | Declined]


def step_on_device(
    optimizer: Optimizer,
    settings: Settings,
    amp: Amp,
    tally: Tally,
    decided: Decided | None,
    kernels: Kernels,
) -> Outcome | Declined:
    """Clip, update and count on the device."""
    if decided is not None and isinstance(decided.within, Units):
        return Declined("only the CPU's kernels clip units on the way")
    instead = updated_with(decided, settings)
    if isinstance(instead, Declined):
        return instead
    where = settings.write_grads, dtensor_of(decided), instead
    found = _read(kernels, optimizer, set(), *where)
    made: list[Tensor] = []
    outcome: Outcome | Declined | None = None
    try:
        if not isinstance(found, Declined) and (found.missing or found.counted_on_cpu):
            made = ready_on_device(optimizer, found.missing, found.counted_on_cpu)
            found = _read(kernels, optimizer, set(made), *where)
        if isinstance(found, Declined):
            outcome = found
        elif reason := _reason_against(found, settings, decided):
            outcome = Declined(reason)
        elif found:
            outcome = kernels.launch(optimizer, found, settings, amp, tally, decided)
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


def _read(
    kernels: Kernels,
    optimizer: Optimizer,
    fresh: set[Tensor],
    write_grads: bool,
    dtensor: type[Tensor] | None,
    instead: dict[Tensor, Tensor],
) -> Any:
    """Return a step of `_C` or Declined.

    Args:
        kernels: What it is read for.
        optimizer: Whose groups and state are read.
        fresh: Parameters whose state was made for this step.
        write_grads: Whether gradients are written.
        dtensor: The class of which the memory on this rank is meant, or None.
        instead: What to update parameters with in the place of their gradients.
    """
    kind = kernels.sgd if type(optimizer) is SGD else kernels.adam
    found = kind.collect(
        optimizer.param_groups, optimizer.state, fresh, write_grads, kernels.device_type, dtensor, instead
    )
    if isinstance(found, str):
        return Declined(found)
    if found and (reason := kernels.device_reason(found)):
        return Declined(reason)
    return found


def _reason_against(found: Any, settings: Settings, decided: Decided | None) -> str | None:
    if found.missing or found.counted_on_cpu:
        return "a parameter's state is incomplete"
    if decided is None and math.isinf(settings.norm_type) and found.has_empty:
        return "a gradient is empty, which has no inf-norm"
    if decided is not None and found and decided.coefs.numel() not in (1, len(found)):
        return "the number of coefficients is not that of the gradients"
    return None
