"""The options of a group but for its learning rate, in the order in which `fastclip._C` takes them."""

from __future__ import annotations

from typing import Any


def options_of(group: dict[str, Any], is_sgd: bool) -> tuple[Any, ...]:
    """Return them as plain numbers; waits for those that are tensors on a device."""
    return _of_sgd(group) if is_sgd else _of_adam(group)


def _of_adam(group: dict[str, Any]) -> tuple[Any, ...]:
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


def _of_sgd(group: dict[str, Any]) -> tuple[Any, ...]:
    return (
        float(group["momentum"]),
        float(group["dampening"]),
        float(group["weight_decay"]),
        group["nesterov"],
        group["maximize"],
    )
