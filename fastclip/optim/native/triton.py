"""The step by Triton kernels, for parameters on one CUDA or ROCm device: three launches for any number."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from fastclip.backends import triton
from fastclip.backends.base import Declined, threshold_on
from fastclip.kernels.step_table import build_step_table
from fastclip.kernels.table import Int64Array, TableCache, upload
from fastclip.optim.gradients import Decided
from fastclip.optim.native.clipping import max_value_of
from fastclip.optim.native.on_device import Groups, on_device, step_on_device
from fastclip.optim.outcome import Outcome, Tally
from fastclip.optim.settings import Amp, Settings

unavailable_reason = triton.unavailable_reason


def _upload_rules(rules: Int64Array, device: torch.device) -> Tensor:
    return upload(torch.from_numpy(rules).flatten(), device).view(torch.float64)


_tables = TableCache(build_step_table)
_rules = TableCache(_upload_rules)


def step(
    optimizer: Optimizer, settings: Settings, amp: Amp, tally: Tally, decided: Decided | None
) -> Outcome | Declined:
    """Clip, update and count on the device."""
    device_type = "cpu" if triton.is_interpreted() else "cuda"
    return step_on_device(
        optimizer, settings, amp, tally, decided, device_type=device_type, read=_read, launch=_launch
    )


def _read(
    optimizer: Optimizer,
    groups: Groups,
    fresh: set[Tensor],
    write_grads: bool,
    dtensor: type[Tensor] | None,
    instead: dict[Tensor, Tensor],
) -> Any:
    """Return a `_C.Step` or Declined."""
    read = triton._C.read_sgd_step if type(optimizer) is SGD else triton._C.read_adam_step
    found = read(groups, optimizer.state, fresh, write_grads, triton.dlpack_type(), dtensor, instead)
    if isinstance(found, str):
        return Declined(found)
    if found and (reason := triton.device_reason(triton.device_of(found))):
        return Declined(reason)
    return found


def _launch(
    optimizer: Optimizer,
    groups: Groups,
    found: Any,
    settings: Settings,
    amp: Amp,
    tally: Tally,
    decided: Decided | None,
) -> Outcome:
    device = triton.device_of(found)
    is_sgd = type(optimizer) is SGD
    launch = _kernels()
    given = None
    if decided is not None:
        given = decided.coefs.to(device, torch.float64), *on_device(device, decided.outcome)
    clip = launch.Clip(
        threshold_on(device, settings.max_norm),  # type: ignore[arg-type]  # no strategy by now
        settings.norm_type,
        settings.skips,
        settings.write_grads,
        _beside(amp.grad_scale, device),
        _beside(amp.found_inf, device),
        given,
        max_value_of(decided),
    )
    with triton.current_device(device):
        outcome = Outcome(
            *launch.step(
                "sgd" if is_sgd else "adam",
                _tables.get(found.rows(), device),
                _rules.get(_rules_of(groups, is_sgd), device),
                clip,
                torch.float64 if found.has_float64 else torch.float32,
                tally.counts_on(device),
            )
        )
    found.increment_versions(with_grads=settings.write_grads)
    tally.last = outcome if decided is None else decided.outcome
    return tally.last


def _rules_of(groups: Groups, is_sgd: bool) -> Int64Array:
    """Return the options of each group: one row of the float64 columns of coefficients.py, as their bits."""
    rows = []
    for _, *options, lr, address, is_wide, _ in groups:
        if is_sgd:
            momentum, dampening, decay, nesterov, maximize = options
            own = [momentum, dampening, nesterov, 0.0]
        else:
            _, beta1, beta2, eps, decay, is_decoupled, maximize = options
            own = [beta1, beta2, eps, is_decoupled]
        address_bits = np.int64(address).view(np.float64)
        rows.append([lr, address_bits, is_wide, -1.0 if maximize else 1.0, decay, *own])
    return np.array(rows, np.float64).view(np.int64)


def _beside(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


@functools.cache
def _kernels() -> Any:
    from fastclip.kernels import step_launch

    return step_launch
