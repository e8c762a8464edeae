"""The state of a first step: torch's own, made as torch makes it, taken back if the step did not happen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


def make_state(optimizer: Optimizer, params: list[Tensor]) -> list[Tensor]:
    """Make the state of parameters that have none, as torch's first step does; return whose it made."""
    made = []
    wanted = set(params)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param not in wanted:
                continue
            state = optimizer.state[param]
            if type(optimizer) is SGD:
                # Zeros, of which nothing is kept: the first buffer is the gradient itself.
                state["momentum_buffer"] = torch.zeros_like(param.grad, requires_grad=False)
            elif state:
                continue
            else:
                state.update(_first_adam_state(group, param))
            made.append(param)
    return made


def _first_adam_state(group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
    double = torch.get_default_dtype() == torch.float64 and not group["fused"]
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
    return {
        "step": torch.zeros((), dtype=torch.float64 if double else torch.float32, device="cpu"),
        **{name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in names},
    }


def discard_state(optimizer: Optimizer, params: list[Tensor]) -> None:
    """Take back what `make_state` made for these parameters."""
    for param in params:
        state = optimizer.state[param]
        for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"):
            state.pop(name, None)
        if not state:
            del optimizer.state[param]
