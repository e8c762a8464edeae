"""Route 1: fastclip's kernels, which read norm and clip the gradients on the way into the update.

For exactly torch.optim.Adam, AdamW and SGD. The state is torch's own, made as torch makes it (`state`), so
checkpoints go in and out of plain torch. Each module takes the step with one backend's kernels: `cpu` for
parameters on the CPU, `cuda` for those on one CUDA device, `triton` for those on one CUDA or ROCm device.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Protocol, cast

from torch.optim import SGD, Adam, AdamW, Optimizer

from fastclip import backends
from fastclip.backends.base import Declined
from fastclip.optim.gradients import Decided
from fastclip.optim.outcome import Outcome, Tally
from fastclip.optim.settings import Amp, Settings

_NAMES = ("cpu", "cuda", "triton")
"""Backends whose kernels step, each with a module of its name here, best first."""


class Kernels(Protocol):
    """What a backend's module offers."""

    def unavailable_reason(self) -> str | None:
        """Return why its kernels cannot run here, or None."""

    def step(
        self, optimizer: Optimizer, settings: Settings, amp: Amp, tally: Tally, decided: Decided | None
    ) -> Outcome | Declined:
        """Clip, update, and count in `tally` what happened; with `decided` nothing is measured."""


@functools.cache
def _load(name: str) -> Kernels:
    return cast(Kernels, importlib.import_module(f"fastclip.optim.native.{name}"))


def unsupported(optimizer: Optimizer, settings: Settings) -> str | None:
    """Return why this optimizer can never take this route, or None."""
    if reason := _no_kernel_for(optimizer, settings):
        return reason
    reasons = {name: _load(name).unavailable_reason() for name in _NAMES}
    return _listed(reasons) if all(reasons.values()) else None


def _no_kernel_for(optimizer: Optimizer, settings: Settings) -> str | None:
    if type(optimizer) not in (Adam, AdamW, SGD):
        return f"fastclip has kernels for torch.optim.Adam, AdamW and SGD, not for {type(optimizer).__name__}"
    if not settings.norm_type > 0:
        return f"there is no kernel for norm_type={settings.norm_type}"
    return None


def step(
    optimizer: Optimizer, settings: Settings, amp: Amp, tally: Tally, decided: Decided | None
) -> Outcome | Declined:
    """Clip and update in one call, and count what happened; of DTensors their memory on this rank.

    Moves what the update moves, and unless it is `decided` reads the gradients once more. `.grad` keeps its
    values unless `settings.write_grads`.
    """
    if reason := _no_kernel_for(optimizer, settings) or _declined_now(optimizer):
        return Declined(reason)
    chosen = backends.chosen()
    reasons: dict[str, str] = {}
    for name in _NAMES:
        kernels = _load(name)
        if chosen not in ("auto", name):
            reasons[name] = f"the backend {chosen!r} was chosen"
        elif reason := kernels.unavailable_reason():
            reasons[name] = reason
        else:
            outcome = kernels.step(optimizer, settings, amp, tally, decided)
            if not isinstance(outcome, Declined):
                # A scheduler that was given the wrapped optimizer looks here to warn of a step left out.
                optimizer._opt_called = True  # type: ignore[attr-defined]
                return outcome
            reasons[name] = outcome.reason
    return Declined(_listed(reasons))


def _listed(reasons: Mapping[str, str | None]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _declined_now(optimizer: Optimizer) -> str | None:
    if backends.is_tracing():
        return "torch traces or compiles this step"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the wrapped optimizer has step hooks of its own"
    own_step = vars(optimizer).get("step")
    if own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"):
        return "the wrapped optimizer's step was replaced"
    for number, group in enumerate(optimizer.param_groups):
        if group["differentiable"]:
            return f"group {number} is differentiable"
    return None
