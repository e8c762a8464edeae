"""The step by libfastclip_cuda, for parameters on one CUDA device: three launches for any number of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip.backends import cuda
from fastclip.backends.base import Declined, threshold_on
from fastclip.optim.gradients import Decided
from fastclip.optim.native.clipping import max_value_of
from fastclip.optim.native.on_device import Kernels, on_device, step_on_device
from fastclip.optim.outcome import Outcome, Tally
from fastclip.optim.settings import Amp, Settings


def unavailable_reason() -> str | None:
    """Return why no step can be taken by the library, or None."""
    return cuda.unavailable_reason()


def step(
    optimizer: Optimizer, settings: Settings, amp: Amp, tally: Tally, decided: Decided | None
) -> Outcome | Declined:
    """Clip, update and count on the device."""
    kernels = Kernels(
        adam=cuda._C.CudaAdamStep,
        sgd=cuda._C.CudaSgdStep,
        device_type=cuda.DLPACK_TYPE,
        device_reason=lambda found: cuda._unusable_device(found.device),
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
) -> Outcome | Declined:
    device = cuda._device(found)
    dtype = torch.float64 if found.has_float64 else torch.float32
    # As in the backend, from torch's allocator on the stream that the kernels run on.
    coefs = None
    if decided is None:
        total_norm, clip_coef = torch.empty(2, dtype=dtype, device=device).unbind()
        skipped = torch.empty((), dtype=torch.bool, device=device)
    else:
        coefs = decided.coefs.to(device, torch.float64)
        total_norm, clip_coef, skipped = on_device(device, decided.outcome)
    limit = threshold_on(device, settings.max_norm)  # type: ignore[arg-type]  # no strategy by now
    workspace = torch.empty(found.workspace_bytes, dtype=torch.uint8, device=device)
    grad_scale, found_inf = (_float32_on(device, value) for value in (amp.grad_scale, amp.found_inf))
    reason = found.run(
        settings.norm_type,
        *cuda.arguments_of(limit),
        _address(coefs),
        coefs is not None and coefs.numel() > 1,
        max_value_of(decided),
        settings.skips,
        settings.write_grads,
        _address(grad_scale),
        _address(found_inf),
        total_norm.dtype == torch.float64,
        total_norm.data_ptr(),
        clip_coef.data_ptr(),
        skipped.data_ptr(),
        tally.counts_on(device).data_ptr(),
        workspace.data_ptr(),
    )
    if reason:
        return Declined(reason)
    tally.last = Outcome(total_norm, clip_coef, skipped) if decided is None else decided.outcome
    return tally.last


def _float32_on(device: torch.device, value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(device, torch.float32, non_blocking=True)


def _address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()
