"""What a step by Triton kernels reads of an optimizer: parameters with their state, and the groups' rules."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from fastclip.kernels.operands import PLAIN_TYPES, device_reason, is_alike, tensor_reason
from fastclip.kernels.step_table import StepOperand
from fastclip.kernels.table import Int64Array

_NUMBER_DTYPES = (torch.float32, torch.float64)


class UnfitError(Exception):
    """Says what of an optimizer the kernels cannot take."""


@dataclass
class Found:
    """The parameters that have a gradient.

    Attributes:
        operands: Those that are ready for a step.
        missing: Those without state.
        on_cpu: Those that are on a device, but not their step counter.
    """

    operands: list[StepOperand] = field(default_factory=list)
    missing: list[Tensor] = field(default_factory=list)
    on_cpu: list[Tensor] = field(default_factory=list)


def read_parameters(optimizer: Optimizer, fresh: Collection[Tensor] = ()) -> Found:
    """Sort the parameters that have a gradient; about 5 us each.

    Args:
        optimizer: An Adam, AdamW or SGD.
        fresh: Parameters whose state was made for this step.

    Raises:
        UnfitError: There is one that the kernels cannot take.
    """
    found = Found()
    is_sgd = type(optimizer) is SGD
    first_buffers = set(fresh) if is_sgd else set()
    device = None
    for number, group in enumerate(optimizer.param_groups):
        names = _state_names(group, is_sgd)
        for position, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            if device is None:
                device = param.device
                if reason := device_reason(device):
                    raise UnfitError(reason)
            try:
                _check(param, param.grad, device)
                entries = optimizer.state.get(param, {})
                if names and entries.get(names[0]) is None:
                    found.missing.append(param)
                    continue
                state = [_state(entries, name, param) for name in names]
                counter = None if is_sgd else _counter(entries)
            except UnfitError as error:
                raise UnfitError(f"parameter {position} of group {number}: {error}") from None
            if counter is not None and counter.device != device:
                found.on_cpu.append(param)
            is_first = param in first_buffers
            found.operands.append(StepOperand(param, param.grad, state, counter, number, is_first))
    return found


def _state_names(group: dict[str, Any], is_sgd: bool) -> list[str]:
    if is_sgd:
        return ["momentum_buffer"] if group["momentum"] != 0 else []
    return ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]


def _check(param: Tensor, grad: Tensor, device: torch.device) -> None:
    if reason := tensor_reason(param, device):
        raise UnfitError(f"it {reason}")
    if not is_alike(grad, param):
        raise UnfitError("its gradient has another dtype, device, shape or layout")
    if param.is_neg() or grad.is_neg():
        raise UnfitError("it or its gradient is a lazily negated view")


def _state(entries: dict[str, Any], name: str, param: Tensor) -> Tensor:
    tensor = entries.get(name)
    if not isinstance(tensor, Tensor):
        raise UnfitError(f"its state has no {name}")
    if not is_alike(tensor, param):
        raise UnfitError(f"its {name} has another dtype, device, shape or layout")
    return tensor


def _counter(entries: dict[str, Any]) -> Tensor:
    counter = entries.get("step")
    if not _is_number(counter):
        raise UnfitError("its state holds no step of one float32 or float64")
    return counter


def _is_number(value: object) -> TypeGuard[Tensor]:
    """Whether a kernel can read this as one number."""
    return (
        isinstance(value, Tensor)
        and type(value) in PLAIN_TYPES
        and value.numel() == 1
        and value.dtype in _NUMBER_DTYPES
    )


def read_rules(optimizer: Optimizer, device: torch.device) -> Int64Array:
    """Return the options of each group: one row of the float64 columns of coefficients.py, as their bits.

    Raises:
        UnfitError: An option is a tensor that cannot be read without waiting.
    """
    rows = []
    for number, group in enumerate(optimizer.param_groups):
        try:
            rows.append([*_common(group, device), *_own(group, type(optimizer) is SGD)])
        except UnfitError as error:
            raise UnfitError(f"group {number}: {error}") from None
    return np.array(rows, np.float64).view(np.int64)


def _common(group: dict[str, Any], device: torch.device) -> list[float]:
    lr, address, is_wide = group["lr"], 0, False
    if isinstance(lr, Tensor) and lr.device == device:
        if not _is_number(lr):
            raise UnfitError("its lr is no tensor of one float32 or float64")
        # Read by the kernel, so that a graph sees what a schedule writes there.
        address, is_wide, lr = lr.data_ptr(), lr.dtype == torch.float64, 0.0
    address_bits = float(np.int64(address).view(np.float64))
    sign = -1.0 if group["maximize"] else 1.0
    return [_number(lr, "lr"), address_bits, float(is_wide), sign, _number(group["weight_decay"], "decay")]


def _own(group: dict[str, Any], is_sgd: bool) -> list[float]:
    if is_sgd:
        return [float(group[name]) for name in ("momentum", "dampening", "nesterov")] + [0.0]
    beta1, beta2 = (_number(beta, "beta") for beta in group["betas"])
    return [beta1, beta2, float(group["eps"]), float(group["decoupled_weight_decay"])]


def _number(value: float | Tensor, name: str) -> float:
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise UnfitError(f"its {name} is on {value.device}")
    return float(value)
