"""The options of an optimizer's groups, in the order in which `fastclip._C` takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from fastclip.backends.base import Declined

Group = dict[str, Any]

_READ_BY_HOST = ("weight_decay", "eps", "momentum", "dampening")


def groups_on_host(optimizer: Optimizer) -> list[tuple[Any, ...]]:
    """Return (parameters, *options, learning rate) of each group; waits for numbers that are on a device."""
    is_sgd = type(optimizer) is SGD
    return [
        (group["params"], *_options(group, is_sgd), float(group["lr"])) for group in optimizer.param_groups
    ]


def groups_on_device(optimizer: Optimizer, device_type: str) -> list[tuple[Any, ...]] | Declined:
    """Return (parameters, *options, number, address, whether that is a float64, learning rate) of each group.

    A learning rate that is a tensor on a device of this type is read by the kernels, so that a graph sees
    what a schedule writes there: it has an address and no number. Any other has a number, and 0 for an
    address. It comes along so that it is there as long as its address is. Declines other numbers on a device,
    for which the host would wait.
    """
    is_sgd = type(optimizer) is SGD
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        lr = group["lr"]
        is_read_by_kernels = isinstance(lr, Tensor) and lr.device.type == device_type
        if is_read_by_kernels and not _is_readable(lr):
            return Declined(f"the lr of group {number} is not one float32 or float64")
        if astray := _on_a_device(group, with_lr=not is_read_by_kernels):
            name, device = astray
            return Declined(f"the {name} of group {number} is on {device}")
        if is_read_by_kernels:
            rate = (0.0, lr.data_ptr(), lr.dtype == torch.float64, lr)
        else:
            rate = (float(lr), 0, False, lr)
        groups.append((group["params"], *_options(group, is_sgd), *rate))
    return groups


def _is_readable(lr: Tensor) -> bool:
    is_plain = type(lr) in (Tensor, torch.nn.Parameter)
    return is_plain and lr.numel() == 1 and lr.dtype in (torch.float32, torch.float64)


def _on_a_device(group: Group, *, with_lr: bool) -> tuple[str, torch.device] | None:
    """Return the name and the device of a number that the host would have to wait for."""
    numbers = [(name, group[name]) for name in _READ_BY_HOST if name in group]
    numbers += [("betas", beta) for beta in group.get("betas", ())]
    numbers += [("lr", group["lr"])] * with_lr
    for name, value in numbers:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return name, value.device
    return None


def _options(group: Group, is_sgd: bool) -> tuple[Any, ...]:
    return _of_sgd(group) if is_sgd else _of_adam(group)


def _of_adam(group: Group) -> tuple[Any, ...]:
    beta1, beta2 = group["betas"]
    return (
        group["amsgrad"],
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        group["decoupled_weight_decay"],
        group["maximize"],
    )


def _of_sgd(group: Group) -> tuple[Any, ...]:
    return (
        float(group["momentum"]),
        float(group["dampening"]),
        float(group["weight_decay"]),
        group["nesterov"],
        group["maximize"],
    )
