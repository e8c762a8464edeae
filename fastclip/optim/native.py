"""Route 1: fastclip's kernels, which read norm and clip the gradients on the way into the update.

For exactly torch.optim.Adam, AdamW and SGD with their parameters on the CPU. The state is torch's own, made
as torch makes it, so checkpoints go in and out of plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastclip import backends
from fastclip.backends import cpu
from fastclip.backends.base import Declined
from fastclip.optim.outcome import NO_GRADIENTS, Outcome
from fastclip.optim.settings import Amp, Settings

Group = dict[str, Any]


def unsupported(optimizer: Optimizer, settings: Settings) -> str | None:
    """Return why this optimizer can never take this route, or None."""
    if type(optimizer) not in (Adam, AdamW, SGD):
        return f"fastclip has kernels for torch.optim.Adam, AdamW and SGD, not for {type(optimizer).__name__}"
    if reason := cpu.unavailable_reason():
        return reason
    if not settings.norm_type > 0:
        return f"there is no kernel for norm_type={settings.norm_type}"
    return None


def step(optimizer: Optimizer, settings: Settings, amp: Amp) -> Outcome | Declined:
    """Clip and update in one call.

    Moves what the update moves, and reads the gradients once more. `.grad` keeps its values unless
    `settings.write_grads`.
    """
    if reason := unsupported(optimizer, settings) or _declined_now(optimizer):
        return Declined(reason)
    is_sgd = type(optimizer) is SGD
    read = _sgd_group if is_sgd else _adam_group
    groups = [read(group) for group in optimizer.param_groups]
    result = _call(optimizer, groups, settings, amp, set())
    if isinstance(result, list):  # parameters without state: torch makes it in the first step
        fresh = _make_state(optimizer, result)
        stepped = False
        try:
            result = _call(optimizer, groups, settings, amp, set(fresh))
            stepped = isinstance(result, tuple) and not result[2]
        finally:
            if not stepped:
                _discard_state(optimizer, fresh)
    if isinstance(result, str):
        return Declined(result)
    if isinstance(result, list):
        return Declined("a parameter's state is incomplete")
    if result is None:
        return NO_GRADIENTS
    # A scheduler that was given the wrapped optimizer looks here to warn of a step that was left out.
    optimizer._opt_called = True  # type: ignore[attr-defined]
    norm, coef, skipped, any_float64 = result
    return Outcome.on_cpu(norm, coef, skipped, torch.float64 if any_float64 else torch.float32)


def _call(
    optimizer: Optimizer, groups: list[tuple[Any, ...]], settings: Settings, amp: Amp, fresh: set[Tensor]
) -> Any:
    kernel = cpu._C.sgd_step if type(optimizer) is SGD else cpu._C.adam_step
    return kernel(
        groups,
        optimizer.state,
        fresh,
        settings.max_norm,
        settings.norm_type,
        1.0 if amp.grad_scale is None else float(amp.grad_scale),
        settings.skips,
        settings.write_grads,
        torch.get_num_threads(),
    )


def _declined_now(optimizer: Optimizer) -> str | None:
    if backends.chosen() not in ("auto", "cpu"):
        return f"the backend {backends.chosen()!r} was chosen"
    if backends.is_tracing():
        return "torch traces or compiles this step"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the wrapped optimizer has step hooks of its own"
    own_step = vars(optimizer).get("step")
    if own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"):
        return "the wrapped optimizer's step was replaced"
    for number, group in enumerate(optimizer.param_groups):
        if group["differentiable"] or group.get("capturable"):
            return f"group {number} is differentiable or capturable"
        if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
            return f"the lr of group {number} is on {group['lr'].device}"
    return None


def _adam_group(group: Group) -> tuple[Any, ...]:
    beta1, beta2 = group["betas"]
    return (
        group["params"],
        group["amsgrad"],
        float(group["lr"]),
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        group["decoupled_weight_decay"],
        group["maximize"],
    )


def _sgd_group(group: Group) -> tuple[Any, ...]:
    return (
        group["params"],
        float(group["lr"]),
        float(group["momentum"]),
        float(group["dampening"]),
        float(group["weight_decay"]),
        group["nesterov"],
        group["maximize"],
    )


def _make_state(optimizer: Optimizer, params: list[Tensor]) -> list[Tensor]:
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


def _first_adam_state(group: Group, param: Tensor) -> dict[str, Tensor]:
    double = torch.get_default_dtype() == torch.float64 and not group["fused"]
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
    return {
        "step": torch.zeros((), dtype=torch.float64 if double else torch.float32, device="cpu"),
        **{name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in names},
    }


def _discard_state(optimizer: Optimizer, params: list[Tensor]) -> None:
    for param in params:
        state = optimizer.state[param]
        for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"):
            state.pop(name, None)
        if not state:
            del optimizer.state[param]
