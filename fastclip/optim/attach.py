"""`attach`: the same clipping through step hooks, for those who must keep the optimizer's class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from fastclip.distributed.marks import Ranks
from fastclip.errors import BackendUnavailableError
from fastclip.optim import checkpoints, plain, routes, torch_fused
from fastclip.optim.callers import is_checkpointing
from fastclip.optim.closures import is_evaluated_once
from fastclip.optim.deciding import decide, learn
from fastclip.optim.gradients import gradients, measure, parameters
from fastclip.optim.outcome import NO_GRADIENTS, Outcome, Stats, Tally
from fastclip.optim.settings import Amp, MaxNorm, Settings
from fastclip.optim.wrapper import ATTACHED, check_unclipped

_ABSENT = object()


def attach(
    optimizer: Optimizer,
    max_norm: MaxNorm,
    *,
    norm_type: float = 2.0,
    nonfinite: str = "skip",
    max_consecutive_skips: int | None = None,
    fused: bool | None = None,
    group: Ranks | None = None,
    mesh: DeviceMesh | None = None,
) -> AttachedClipping:
    """Make an optimizer clip in its own `step`, through hooks.

    The clip is folded into torch's fused step if the optimizer was made with fused=True; else the gradients
    are scaled before the step. fastclip's kernels need `ClippedOptimizer`, which replaces the step.

    Args:
        optimizer: Any torch optimizer but a clipped one.
        max_norm: As in `ClippedOptimizer`.
        norm_type: p of the p-norm.
        nonfinite: As in `ClippedOptimizer`. "skip" needs an optimizer that evaluates a closure once.
        max_consecutive_skips: As in `ClippedOptimizer`.
        fused: True demands torch's fused step, False forbids it, None takes the best there is.
        group: As in `fastclip.clip_grad_norm_`.
        mesh: As in `fastclip.clip_grad_norm_`.

    Returns:
        The handle: `remove()`, `last`, `stats()`, `optimizer`.

    Raises:
        TypeError: optimizer is no optimizer, or is clipped already.
        ValueError: Another argument makes no sense.
        BackendUnavailableError: fused=True and the optimizer is not fused.
    """
    check_unclipped("attach", optimizer)
    settings = Settings.checked(
        "attach",
        max_norm,
        norm_type,
        nonfinite,
        max_consecutive_skips,
        fused,
        write_grads=False,
        group=group,
        mesh=mesh,
    )
    if settings.skips and not is_evaluated_once(optimizer):
        raise ValueError(
            f"attach: nonfinite={nonfinite!r} with {type(optimizer).__name__}, which may evaluate its "
            f"closure several times, so that a hook cannot leave out its step; expected "
            f"nonfinite='propagate'. ClippedOptimizer can skip it."
        )
    if fused and (reason := torch_fused.unsupported(optimizer)):
        raise BackendUnavailableError(routes.unfolded("attach", "hooks cannot replace the step", reason))
    return AttachedClipping(optimizer, settings)


class AttachedClipping:
    """The hooks of `attach` on one optimizer, and what they have seen."""

    def __init__(self, optimizer: Optimizer, settings: Settings) -> None:
        """Put the hooks on."""
        self._optimizer = optimizer
        self._settings = settings
        self._tally = Tally()
        # What has to be put back after the step.
        self._hidden: list[tuple[Tensor, Tensor | None]] = []
        self._attributes: dict[str, Any] = {}
        self._go_on: Callable[[], None] = lambda: None
        setattr(optimizer, ATTACHED, settings)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._add_counters),
            optimizer.register_load_state_dict_pre_hook(self._take_counters),
            optimizer.register_load_state_dict_post_hook(self._end_loading),
        ]

    @property
    def optimizer(self) -> Optimizer:
        """Return the optimizer that has the hooks."""
        return self._optimizer

    @property
    def last(self) -> Outcome | None:
        """Return what happened in the latest step."""
        return self._tally.last

    def stats(self) -> Stats:
        """Return what happened in all steps; synchronizes with the device."""
        return self._tally.stats()

    def remove(self) -> None:
        """Take the hooks off again. Calling it again is harmless."""
        self._restore()
        while self._handles:
            self._handles.pop().remove()
            vars(self._optimizer).pop(ATTACHED, None)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._restore()  # what a step that raised has left behind
        positional = list(args)
        closure = kwargs.get("closure", positional[1] if len(positional) > 1 else None)
        if closure is None:
            if not is_checkpointing():
                self._clip()
            return None
        # The gradients exist only after the closure, so that is where they are clipped.
        clipping = self._clipping(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": clipping}
        positional[1] = clipping
        return tuple(positional), kwargs

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._restore()

    def _clipping(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def clipping() -> Any:
            self._restore()
            with torch.enable_grad():
                loss = closure()
            self._clip()
            return loss

        return clipping

    def _clip(self) -> None:
        """Clip what the step is about to read, or take it out of the step's sight."""
        optimizer = self._optimizer
        amp = Amp.take(optimizer)
        settings = self._settings.under(amp)
        grads = gradients(optimizer)
        now, decided = decide("attach", optimizer, settings, amp)
        if not grads and decided is None:
            self._tally.add(NO_GRADIENTS)
            return
        folded = settings.fused is not False and torch_fused.unsupported(optimizer) is None
        folded = folded and torch_fused.unshared(now, decided) is None and torch_fused.unfit(grads) is None
        if not folded:
            outcome = plain.clip(optimizer, now, amp, decided)
        else:
            outcome = measure(grads, now, amp) if decided is None else decided.outcome
        if decided is None:
            learn(settings, now, outcome)
        self._tally.add(outcome)
        amp.tell(outcome)
        on_host = not folded or torch_fused.decides_on_host(optimizer, outcome)
        if on_host and plain.may_skip(settings, amp, decided) and bool(outcome.skipped):
            routes.settle("attach", optimizer, settings, amp, self._tally)
            self._hide_gradients()
        elif folded:
            self._set("grad_scale", torch_fused.divisor(outcome, amp))
            if not on_host:
                self._set("found_inf", outcome.skipped.float())
        elif amp != Amp():  # unscaled by the clip
            self._set("grad_scale", None)
            self._set("found_inf", None)

    def _hide_gradients(self) -> None:
        """Leave the step without gradients: it then changes neither parameters nor state."""
        self._hidden = [(param, param.grad) for param in parameters(self._optimizer)]
        for param, _ in self._hidden:
            param.grad = None

    def _set(self, name: str, value: Any) -> None:
        self._attributes.setdefault(name, vars(self._optimizer).get(name, _ABSENT))
        setattr(self._optimizer, name, value)

    def _restore(self) -> None:
        for param, grad in self._hidden:
            param.grad = grad
        self._hidden = []
        for name, value in self._attributes.items():
            if value is _ABSENT:
                delattr(self._optimizer, name)
            else:
                setattr(self._optimizer, name, value)
        self._attributes = {}

    def _add_counters(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return checkpoints.with_counters(optimizer, state, self._tally, self._settings)

    def _take_counters(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state, counters = checkpoints.without_counters(state)
        self._go_on = checkpoints.loading(optimizer, counters, self._tally, self._settings)
        return state

    def _end_loading(self, optimizer: Optimizer) -> None:
        self._go_on()
