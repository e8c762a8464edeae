"""Closures: evaluated before the step where that is the same, else passed on with a clip inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from fastclip.optim import plain
from fastclip.optim.deciding import decide, learn
from fastclip.optim.outcome import Outcome
from fastclip.optim.settings import Amp, Settings

Closure = Callable[[], Any]


def is_evaluated_once(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step evaluates a closure once, before anything else.

    Known of torch's own but LBFGS; any other may evaluate it several times, as its line search needs.
    """
    package = type(optimizer).__module__.split(".")[:2]  # of Adafactor and Muon there is no more than that
    return package == ["torch", "optim"] and not isinstance(optimizer, LBFGS)


class SkipStepError(Exception):
    """Leaves an optimizer's step from inside its closure; never reaches the caller of a step."""


class ClippingClosure:
    """A closure that clips what it has evaluated; `outcome` is that of the latest evaluation."""

    def __init__(self, closure: Closure, optimizer: Optimizer, settings: Settings, amp: Amp) -> None:
        """Take the caller's closure and how to clip."""
        self.outcome: Outcome | None = None
        self._closure, self._optimizer, self._settings, self._amp = closure, optimizer, settings, amp

    def __call__(self) -> Any:
        """Evaluate, clip and return the loss.

        Raises:
            SkipStepError: The step is to be skipped.
        """
        with torch.enable_grad():
            loss = self._closure()
        now, decided = decide("ClippedOptimizer.step", self._optimizer, self._settings, self._amp)
        self.outcome = plain.clip(self._optimizer, now, self._amp, decided)
        if decided is None:
            learn(self._settings, now, self.outcome)
        if plain.may_skip(now, self._amp, decided) and bool(self.outcome.skipped):
            raise SkipStepError
        return loss


def step_through(
    optimizer: Optimizer, closure: Closure, settings: Settings, amp: Amp
) -> tuple[Any, Outcome | None]:
    """Call the optimizer's step with a closure that clips after every evaluation.

    A step that is skipped, or whose closure raises, in the middle of a line search leaves parameters and
    state as they were before it: both are copied first, which an optimizer of this kind can afford.

    Returns:
        What the step returned, None if it was skipped, and the outcome of the last evaluation.
    """
    before = Snapshot(optimizer)
    clipping = ClippingClosure(closure, optimizer, settings, amp)
    try:
        return optimizer.step(clipping), clipping.outcome
    except SkipStepError:
        before.restore()
        return None, clipping.outcome
    except BaseException:
        before.restore()
        raise


class Snapshot:
    """A copy of an optimizer's parameters and state."""

    def __init__(self, optimizer: Optimizer) -> None:
        """Copy both."""
        self._optimizer = optimizer
        self._params: list[tuple[Tensor, Tensor]] = [
            (p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]
        ]
        self._state = {key: copy.deepcopy(value) for key, value in optimizer.state.items()}

    def restore(self) -> None:
        """Put both back."""
        with torch.no_grad():
            for param, value in self._params:
                param.copy_(value)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
