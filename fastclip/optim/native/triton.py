"""The step by the Triton kernels, for parameters on one CUDA or ROCm device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import SGD, Optimizer

from fastclip.backends import triton
from fastclip.backends.base import Declined
from fastclip.kernels.operands import norm_reason
from fastclip.kernels.step_table import StepOperand, build_step_table, read_operands
from fastclip.kernels.table import Int64Array, TableCache, upload
from fastclip.optim.native.reading import UnfitError, read_parameters, read_rules
from fastclip.optim.native.state import discard_state, ready_on_device, settle_first_step
from fastclip.optim.outcome import NO_GRADIENTS, Outcome, Tally
from fastclip.optim.settings import Amp, Settings

unavailable_reason = triton.unavailable_reason


def _upload_rules(rules: Int64Array, device: torch.device) -> Tensor:
    return upload(torch.from_numpy(rules).flatten(), device).view(torch.float64)


_tables = TableCache(build_step_table)
_rules = TableCache(_upload_rules)


def step(optimizer: Optimizer, settings: Settings, amp: Amp, tally: Tally) -> Outcome | Declined:
    """Clip, update and count in three launches; asks the device only in a step that makes state."""
    made: list[Tensor] = []
    outcome = None
    try:
        found = read_parameters(optimizer)
        if found.missing or found.on_cpu:
            made = ready_on_device(optimizer, found.missing, found.on_cpu)
            found = read_parameters(optimizer, made)
        outcome = _step(optimizer, found.operands, settings, amp, tally)
    except UnfitError as error:
        return Declined(str(error))
    finally:
        if outcome is None:
            discard_state(optimizer, made)
    if settings.skips or amp.found_inf is not None:
        settle_first_step(optimizer, made, outcome)
    tally.last = outcome
    return outcome


def _step(
    optimizer: Optimizer, operands: list[StepOperand], settings: Settings, amp: Amp, tally: Tally
) -> Outcome:
    if not operands:
        tally.add(NO_GRADIENTS)
        return NO_GRADIENTS
    params, grads = [o.param for o in operands], [o.grad for o in operands]
    device = params[0].device
    try:
        rows = read_operands(operands)
    except RuntimeError as error:
        # torch gives no address of what only stands for memory: functorch, functional and meta tensors.
        raise UnfitError(f"a tensor has no plain memory ({error})") from None
    if reason := norm_reason(settings.norm_type, any(grad.numel() == 0 for grad in grads)):
        raise UnfitError(reason)
    rules = read_rules(optimizer, device)
    launch = _launch()
    clip = launch.Clip(
        settings.max_norm,
        settings.norm_type,
        settings.skips,
        settings.write_grads,
        _beside(amp.grad_scale, device),
        _beside(amp.found_inf, device),
    )
    any_float64 = any(grad.dtype == torch.float64 for grad in grads)
    with triton.current_device(device):
        table = _tables.get(rows, device)
        if reason := table.shared(with_grads=settings.write_grads):
            raise UnfitError(reason)
        outcome = Outcome(
            *launch.step(
                "sgd" if type(optimizer) is SGD else "adam",
                table,
                _rules.get(rules, device),
                clip,
                torch.float64 if any_float64 else torch.float32,
                tally.counts_on(device),
            )
        )
        increment_version(params)
        if settings.write_grads:
            increment_version(grads)
    return outcome


def _beside(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


@functools.cache
def _launch() -> Any:
    from fastclip.kernels import step_launch

    return step_launch
