"""Optimizers and learning-rate schedules by name or factory."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}
ALL_ARGUMENTS = frozenset(
    name for kind in OPTIMIZERS.values() for name in inspect.signature(kind).parameters if name != "params"
)

DEFAULT_LR = 0.01
FINAL_LR_SHARE = 0.01


def make_optimizer(model: nn.Module, params: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Build the optimizer that `params` names.

    Reads `optimizer` (a name in torch.optim in any case, default "sgd", or a callable
    (parameters, **settings) -> Optimizer), `lr`, every other argument of the optimizer, and what
    `parameter_groups` reads. A setting goes only to an optimizer that has it, so that a search may choose
    between SGD and Adam.

    Raises:
        ValueError: the name is unknown, or the parameter groups do not hold each parameter once.
    """
    wanted = _find(params.get("optimizer", "sgd"))
    accepted = optimizer_arguments(wanted)
    settings = {"lr": params.get("lr", DEFAULT_LR), **params}
    settings = {name: value for name, value in settings.items() if name in accepted and value is not None}
    optimizer: torch.optim.Optimizer = wanted(
        parameter_groups(model, params, decays="weight_decay" in accepted), **settings
    )
    return optimizer


def parameter_groups(model: nn.Module, params: Mapping[str, Any], *, decays: bool) -> list[Any]:
    """Return what an optimizer is to train: the parameters, or groups of them with settings of their own.

    Args:
        model: Whose parameters that require gradients are meant.
        params: `param_groups` is a function of the model and the parameters of the trial that returns groups
            as torch's optimizers take them. With `no_decay`, biases and the scales of normalisation layers,
            which are the parameters of fewer than two dimensions, have no weight decay.
        decays: Whether the optimizer takes a weight_decay.

    Raises:
        TypeError: param_groups is no function, or returns no list of groups.
        ValueError: a parameter is in no group or in several, or both are asked for.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted, no_decay = params.get("param_groups"), bool(params.get("no_decay"))
    if wanted is not None:
        if no_decay:
            raise ValueError(
                "parameter_groups: both param_groups and no_decay are given; expected one of them."
            )
        return _checked_groups(wanted, model, params, named)
    if not (no_decay and decays):
        return list(named.values())
    weights = [p for p in named.values() if p.ndim >= 2]
    rest = [p for p in named.values() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _checked_groups(
    wanted: Any, model: nn.Module, params: Mapping[str, Any], named: Mapping[str, torch.Tensor]
) -> list[dict[str, Any]]:
    if not callable(wanted):
        raise TypeError(
            f"parameter_groups: param_groups={wanted!r}; expected a function of the model and the parameters."
        )
    groups: list[dict[str, Any]] = []
    for i, group in enumerate(wanted(model, dict(params))):
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(
                f"parameter_groups: group {i} is a {type(group).__name__} without params; expected dicts "
                "such as {'params': [...], 'lr': 0.1}."
            )
        members = group["params"]
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        groups.append({**group, "params": members})
    counts = Counter(id(p) for group in groups for p in group["params"])
    for name, p in named.items():
        if counts[id(p)] != 1:
            raise ValueError(
                f"parameter_groups: {name} is in {counts[id(p)]} groups; expected one for each parameter "
                "that is trained. requires_grad_(False) in model_init freezes it."
            )
    return groups


def optimizer_arguments(optimizer: Any) -> frozenset[str]:
    """Return the names of the settings that an optimizer, by name or as a callable, takes.

    One that takes any keyword gets those that some optimizer of torch has.

    Raises:
        ValueError: the name is unknown.
    """
    found = inspect.signature(_find(optimizer)).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found):
        return ALL_ARGUMENTS | {parameter.name for parameter in found}
    return frozenset(parameter.name for parameter in found) - {"params"}


def _find(optimizer: Any) -> Callable[..., torch.optim.Optimizer]:
    if not isinstance(optimizer, str):
        return optimizer  # type: ignore[no-any-return]
    if optimizer.lower() not in OPTIMIZERS:
        raise ValueError(
            f"make_optimizer: optimizer={optimizer!r} is unknown; expected a callable or one of "
            f"{', '.join(sorted(OPTIMIZERS))}."
        )
    return OPTIMIZERS[optimizer.lower()]


def _one_cycle(optimizer: torch.optim.Optimizer, total_steps: int) -> lr_scheduler.LRScheduler:
    max_lr = [group["lr"] for group in optimizer.param_groups]
    has_momentum = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
    return lr_scheduler.OneCycleLR(
        optimizer, max_lr, total_steps=total_steps + 1, cycle_momentum=has_momentum
    )


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]] = {
    "cosine": lambda optimizer, total_steps: lr_scheduler.CosineAnnealingLR(optimizer, total_steps),
    "linear": lambda optimizer, total_steps: lr_scheduler.LinearLR(
        optimizer, 1.0, FINAL_LR_SHARE, total_steps
    ),
    "exponential": lambda optimizer, total_steps: lr_scheduler.ExponentialLR(
        optimizer, FINAL_LR_SHARE ** (1 / total_steps)
    ),
    "one_cycle": _one_cycle,
}


def make_scheduler(
    optimizer: torch.optim.Optimizer, scheduler: Any, total_steps: int
) -> lr_scheduler.LRScheduler | None:
    """Build a schedule that is stepped after every mini-batch.

    Args:
        optimizer: Whose rate it sets.
        scheduler: None or "constant", "cosine" (to 0), "linear" or "exponential" (to 1 % of the rate),
            "one_cycle", or a callable (optimizer, total_steps) -> LRScheduler.
        total_steps: Mini-batches in `max_epochs`.

    Raises:
        ValueError: the name is unknown.
    """
    if scheduler is None or scheduler == "constant":
        return None
    if callable(scheduler):
        return scheduler(optimizer, total_steps)  # type: ignore[no-any-return]
    if scheduler not in SCHEDULERS:
        raise ValueError(
            f"make_scheduler: scheduler={scheduler!r} is unknown; expected a callable, constant or one of "
            f"{', '.join(sorted(SCHEDULERS))}."
        )
    return SCHEDULERS[scheduler](optimizer, total_steps)
