"""The state of a first step: torch's own, made as torch makes it, taken back if the step did not happen.

One thing differs on a device: Adam's step counters are beside their parameters, where a kernel counts them up
only if the step is not skipped. torch keeps them on the CPU unless a group is `fused` or `capturable`, and so
do checkpoints.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastclip.backends.step import Unready


def make_state(optimizer: Optimizer, params: list[Tensor]) -> list[Tensor]:
    """Make the state of parameters that have none, as torch's first step does; return whose it made.

    Args:
        optimizer: An Adam, AdamW or SGD.
        params: Parameters with a gradient.
    """
    made = []
    wanted = set(params)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param not in wanted:
                continue
            state = optimizer.state[param]
            if type(optimizer) is SGD:
                # Zeros, of which nothing is kept: the first buffer is the gradient itself.
                like = (
                    param.grad if type(param.grad) is Tensor else param
                )  # a DTensor's may be terms of a sum
                state["momentum_buffer"] = torch.zeros_like(like, requires_grad=False)
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
        "step": torch.zeros((), dtype=torch.float64 if double else torch.float32, device=param.device),
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


def make_ready(optimizer: Optimizer, answer: Unready) -> list[Tensor]:
    """Give parameters the state that a step by kernels needs; return whose was made.

    Args:
        optimizer: An Adam, AdamW or SGD.
        answer: What the step lacks: state, or counters beside the parameters, which torch has on the CPU.

    Raises:
        RuntimeError: The stream is being captured: the graph would make or copy the state in every replay.
    """
    missing, on_cpu = answer.missing, answer.counted_on_cpu
    waiting = [*missing, *on_cpu]
    if waiting and waiting[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"ClippedOptimizer.step: {len(missing)} parameters have no state on their device yet and "
            f"{len(on_cpu)} have their step counter on the CPU while a graph is being captured; expected "
            f"state that outlives the capture. Take one step before it."
        )
    move_counters(optimizer, on_cpu)
    return make_state(optimizer, missing)


def move_counters(optimizer: Optimizer, params: list[Tensor]) -> None:
    """Put the step counters of these parameters, which are on the CPU, on the parameters' devices.

    One copy for all of one device and dtype, for which nothing waits.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for param in params:
        alike[param.device, optimizer.state[param]["step"].dtype].append(param)
    for (device, _), together in alike.items():
        counters = torch.stack([optimizer.state[param]["step"] for param in together])
        moved = counters.to(device, non_blocking=True).unbind()
        for param, counter in zip(together, moved, strict=True):
            optimizer.state[param]["step"] = counter


def as_torch_keeps_it(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a `state_dict` with every step counter where torch would have it.

    torch's default Adam steps on from counters on a device, too, but waits for each of them.
    """
    if type(optimizer) not in (Adam, AdamW):
        return state_dict
    entries = dict(state_dict["state"])
    astray = [
        index
        for group in state_dict["param_groups"]
        if not (group["fused"] or group["capturable"])
        for index in group["params"]
        if index in entries and entries[index]["step"].device.type != "cpu"
    ]
    for index in astray:
        entries[index] = {**entries[index], "step": entries[index]["step"].cpu()}
    return {**state_dict, "state": entries}
