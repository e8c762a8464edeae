"""The step by Triton kernels, for parameters on one CUDA or ROCm device: three launches for any number."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from fastclip.backends import triton
from fastclip.backends.base import Declined, threshold_on
from fastclip.kernels.step_table import build_step_table
from fastclip.kernels.table import Int64Array, TableCache, upload
from fastclip.optim.gradients import Decided
from fastclip.optim.native.clipping import max_value_of
from fastclip.optim.native.on_device import Kernels, on_device, step_on_device
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
    kernels = Kernels(
        adam=triton._C.AdamStep,
        sgd=triton._C.SgdStep,
        device_type=triton.dlpack_type(),
        device_reason=lambda found: triton.device_reason(triton.device_of(found)),
        launch=_launch,
    )
    return step_on_device(optimizer, settings, amp, tally, decided, kernels)


def _launch(
    optimizer: Optimizer,
    found: Any,
    settings: Settings,
    amp: Amp,
    tally: Tally,
    decided: Decided | None,
) -> Outcome:
    device = triton.device_of(found)
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
                "sgd" if type(optimizer) is SGD else "adam",
                _tables.get(found.rows(), device),
                _rules.get(found.rules(), device),
                clip,
                torch.float64 if found.has_float64 else torch.float32,
                tally.counts_on(device),
            )
        )
    found.increment_versions(with_grads=settings.write_grads)
    tally.last = outcome if decided is None else decided.outcome
    return tally.last


def _beside(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


@functools.cache
def _kernels() -> Any:
    from fastclip.kernels import step_launch

    return step_launch
