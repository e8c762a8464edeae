"""The step by libfastclip_cuda, for parameters on one CUDA device.

Three launches for any number of parameters, and no host synchronization but one after a step that made state,
to take it back if the device skipped that step. A captured step follows a learning rate that is a tensor on
the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from fastclip.backends import cuda
from fastclip.backends.base import Declined
from fastclip.optim.native.groups import options_of
from fastclip.optim.native.state import discard_state, ready_on_device, settle_first_step
from fastclip.optim.outcome import NO_GRADIENTS, Outcome, Tally
from fastclip.optim.settings import Amp, Settings

Group = dict[str, Any]

DLPACK_CUDA = 2
"""DLPack's number for CUDA memory."""


def unavailable_reason() -> str | None:
    """Return why no step can be taken by the library, or None."""
    return cuda.unavailable_reason()


def step(optimizer: Optimizer, settings: Settings, amp: Amp, tally: Tally) -> Outcome | Declined:
    """Clip, update and count on the device."""
    if reason := _declined_now(optimizer):
        return Declined(reason)
    found = _collect(optimizer, settings, set())
    made: list[Tensor] = []
    if not isinstance(found, Declined) and (found.missing or found.counted_on_cpu):
        made = ready_on_device(optimizer, found.missing, found.counted_on_cpu)
        found = _collect(optimizer, settings, set(made))
    outcome: Outcome | Declined | None = None
    try:
        outcome = found if isinstance(found, Declined) else _run(found, settings, amp, tally)
    finally:
        if not isinstance(outcome, Outcome):
            discard_state(optimizer, made)
    if isinstance(outcome, Outcome) and (settings.skips or amp.found_inf is not None):
        settle_first_step(optimizer, made, outcome)
    return outcome


def _collect(optimizer: Optimizer, settings: Settings, fresh: set[Tensor]) -> Any:
    """Return a `_C.CudaAdamStep`, a `_C.CudaSgdStep` or Declined."""
    is_sgd = type(optimizer) is SGD
    groups = [
        (group["params"], *_learning_rate(group), *options_of(group, is_sgd))
        for group in optimizer.param_groups
    ]
    kind = cuda._C.CudaSgdStep if is_sgd else cuda._C.CudaAdamStep
    found = kind.collect(groups, optimizer.state, fresh, settings.write_grads, DLPACK_CUDA)
    if isinstance(found, str):
        return Declined(found)
    if found and (reason := cuda._unusable_device(found.device)):
        return Declined(reason)
    if math.isinf(settings.norm_type) and found.has_empty:
        return Declined("a gradient is empty, which has no inf-norm")
    for number, group in enumerate(optimizer.param_groups):
        if found and _is_on_device(group["lr"]) and group["lr"].device != cuda._device(found):
            return Declined(f"the lr of group {number} is on {group['lr'].device}")
    if fresh and (found.missing or found.counted_on_cpu):
        return Declined("a parameter's state is incomplete")
    return found


def _run(found: Any, settings: Settings, amp: Amp, tally: Tally) -> Outcome | Declined:
    if not found:
        tally.add(NO_GRADIENTS)
        return NO_GRADIENTS
    device = cuda._device(found)
    dtype = torch.float64 if found.has_float64 else torch.float32
    # As in the backend, from torch's allocator on the stream that the kernels run on.
    total_norm, clip_coef = torch.empty(2, dtype=dtype, device=device).unbind()
    skipped = torch.empty((), dtype=torch.bool, device=device)
    workspace = torch.empty(found.workspace_bytes, dtype=torch.uint8, device=device)
    grad_scale, found_inf = (_float32_on(device, value) for value in (amp.grad_scale, amp.found_inf))
    reason = found.run(
        settings.norm_type,
        settings.max_norm,
        settings.skips,
        settings.write_grads,
        _address(grad_scale),
        _address(found_inf),
        total_norm.data_ptr(),
        clip_coef.data_ptr(),
        skipped.data_ptr(),
        tally.counts_on(device).data_ptr(),
        workspace.data_ptr(),
    )
    if reason:
        return Declined(reason)
    tally.last = Outcome(total_norm, clip_coef, skipped)
    return tally.last


def _declined_now(optimizer: Optimizer) -> str | None:
    for number, group in enumerate(optimizer.param_groups):
        lr = group["lr"]
        if _is_on_device(lr) and (lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64)):
            return f"the lr of group {number} is not one float32 or float64"
        options = [*group.items(), *(("betas", beta) for beta in group.get("betas", ()))]
        for name, value in options:
            if name != "lr" and _is_on_device(value):
                return f"the {name} of group {number} is on {value.device}"
    return None


def _learning_rate(group: Group) -> tuple[float, int, bool]:
    """Return the number, or the address of the one on the device and whether that is a float64."""
    lr = group["lr"]
    if _is_on_device(lr):
        return 0.0, lr.data_ptr(), lr.dtype == torch.float64
    return float(lr), 0, False


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _float32_on(device: torch.device, value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(device, torch.float32, non_blocking=True)


def _address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()
