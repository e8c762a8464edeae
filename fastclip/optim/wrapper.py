"""`ClippedOptimizer`: an optimizer that clips on its way into the update."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from fastclip.backends.base import Declined
from fastclip.distributed.marks import Ranks
from fastclip.optim import checkpoints, native, routes
from fastclip.optim.callers import is_checkpointing, stepping_scaler
from fastclip.optim.closures import is_evaluated_once, step_through
from fastclip.optim.deciding import decide, learn
from fastclip.optim.native.state import as_torch_keeps_it
from fastclip.optim.outcome import NO_GRADIENTS, Outcome, Stats, Tally
from fastclip.optim.settings import Amp, MaxNorm, Settings, checked_max_norm

ATTACHED = "_fastclip_attached"
"""Attribute of an optimizer that `attach` has put its hooks on: its settings."""

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class ClippedOptimizer(Optimizer):
    """An optimizer whose `step` clips the total norm of the gradients and survives what is not finite.

    Wrap an optimizer and delete the clipping line. The coefficient goes into the update itself, so that the
    clipped gradients need not be written: a clip costs one read of the gradients on top of the update.
    Everything but `step` is the wrapped optimizer's: `state`, `param_groups`, `defaults`, checkpoints.

    The clip is folded into the step by fastclip's kernels for torch.optim.AdamW, Adam and SGD on the CPU and
    on one CUDA or ROCm device, else by torch's fused step for optimizers made with fused=True; else it comes
    before the step. By the kernels for devices, only a step that makes state waits for the device, and once
    there is state a CUDA graph can hold the whole step.

    Of DTensors (FSDP2, tensor and expert parallelism) the norm is that of the whole. It is reduced over all
    dimensions of their mesh, so that all ranks step or all skip, whoever has the nan: docs/distributed.md.

    Args:
        optimizer: Any torch optimizer but a clipped one.
        max_norm: The largest total norm to leave; inf measures only. Or a 0-dim tensor on the gradients'
            device, which is read there in each step; or a strategy of `fastclip.strategies`, which sets it. A
            parameter group with a "max_norm" of its own is clipped by itself.
        norm_type: p of the p-norm.
        nonfinite: What a norm that is nan or inf leads to: "skip" leaves parameters and state as they are,
            without a host synchronization where the step is folded; "raise" does the same and raises,
            naming the first offending parameter; "propagate" does what torch does.
        max_consecutive_skips: Raise when that many steps in a row were skipped; asks the device each step.
        fused: True demands a folded step, False forbids it, None takes the best there is.
        write_grads: Leave the clipped gradients in `.grad`; otherwise they may stay as the backward pass,
            and a GradScaler, left them.
        group: As in `fastclip.clip_grad_norm_`; with FullyShardedDataParallel, WORLD.
        mesh: As in `fastclip.clip_grad_norm_`.

    Attributes:
        optimizer: The wrapped one.
        last: The outcome of the latest step, tensors; None before the first.

    Raises:
        TypeError: optimizer is no optimizer, or is clipped already.
        ValueError: Another argument makes no sense.
        BackendUnavailableError: fused=True and the step cannot be folded; `step` may raise it, too.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_norm: MaxNorm,
        *,
        norm_type: float = 2.0,
        nonfinite: str = "skip",
        max_consecutive_skips: int | None = None,
        fused: bool | None = None,
        write_grads: bool = False,
        group: Ranks | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        check_unclipped("ClippedOptimizer", optimizer)
        settings = Settings.checked(
            "ClippedOptimizer",
            max_norm,
            norm_type,
            nonfinite,
            max_consecutive_skips,
            fused,
            write_grads,
            group,
            mesh,
        )
        if fused:
            routes.require_folded("ClippedOptimizer", optimizer, settings)
        self.__setstate__({"optimizer": optimizer, "_settings": settings, "_tally": Tally()})

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; hooks stay behind, as in torch."""
        return {"optimizer": self.optimizer, "_settings": self._settings, "_tally": self._tally}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` returned, with no hooks yet."""
        self.optimizer: Optimizer = state["optimizer"]
        # In a list, which a trainer's proxy shares when something is set through it.
        self._held_settings: list[Settings] = [state["_settings"]]
        self._tally: Tally = state["_tally"]
        self._route: str | None = None
        for name in _HOOKS:
            setattr(self, name, OrderedDict())
        self._patch_step_function()

    def __getattr__(self, name: str) -> Any:
        """Look for everything else at the wrapped optimizer."""
        if name == "optimizer":  # asked for by copy and pickle before there is one
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The wrapped optimizer's state; can be set, as in torch."""
        if is_checkpointing():
            return checkpoints.StateWithCounters(self.optimizer.state)
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups; can be set, as in torch."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults; can be set, as in torch."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Let a GradScaler leave unscaling and the skip to `step`, through `grad_scale` and `found_inf`."""
        scaler = stepping_scaler()
        if scaler is not None:
            self._take_over_unscaling(scaler)
        return True

    def _take_over_unscaling(self, scaler: torch.amp.GradScaler) -> None:
        """Tell a scaler, in its `step`, what it did to these gradients through the wrapped optimizer."""
        states = scaler._per_optimizer_states
        own, of_wrapped = states[id(self)], states.get(id(self.optimizer))
        if of_wrapped is None or of_wrapped is own or of_wrapped["stage"] is OptState.READY:
            return
        if own["stage"] is OptState.UNSCALED or of_wrapped["stage"] is OptState.STEPPED:
            raise RuntimeError(
                "ClippedOptimizer.step: a GradScaler unscaled these gradients already by way of the wrapped "
                f"{type(self.optimizer).__name__}; expected the ClippedOptimizer alone. Give it, and not the "
                "wrapped optimizer, to unscale_ and step."
            )
        own.update(of_wrapped)  # in place: `GradScaler.step` holds it

    @property
    def _settings(self) -> Settings:
        return self._held_settings[0]

    @property
    def max_norm(self) -> MaxNorm:
        """The threshold of the next step, or what sets it; can be set, as a schedule does."""
        return self._settings.max_norm

    @max_norm.setter
    def max_norm(self, max_norm: MaxNorm) -> None:
        checked = checked_max_norm("ClippedOptimizer", max_norm)
        self._held_settings[0] = replace(self._settings, max_norm=checked)

    @property
    def route(self) -> str | None:
        """Return how the latest step went: native, torch_fused or plain; None before the first."""
        return self._route

    @property
    def last(self) -> Outcome | None:
        """Return what happened in the latest step."""
        return self._tally.last

    def stats(self) -> Stats:
        """Return what happened in all steps; synchronizes with the device."""
        return self._tally.stats()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip, update, and return the closure's loss, if there is one.

        Args:
            closure: Evaluates the model and returns the loss. What it raises leaves parameters and state as
                they were.

        Raises:
            RuntimeError: As `nonfinite` and `max_consecutive_skips` ask for.
            BackendUnavailableError: fused=True and this step cannot be folded.
        """
        if closure is None and is_checkpointing():
            checkpoints.make_state(self.optimizer)
            return None
        amp = Amp.take(self)
        settings = self._settings.under(amp)
        loss = None
        if closure is not None and not is_evaluated_once(self.optimizer):
            loss, outcome = step_through(self.optimizer, closure, settings, amp)
            self._route = "plain"
            self._tally.add(outcome or NO_GRADIENTS)
        else:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            now, decided = decide("ClippedOptimizer.step", self.optimizer, settings, amp)
            where = self.optimizer, now, amp, self._tally, decided
            first = routes.before_native(settings, amp, decided) or native.step(*where)
            self._route = routes.step_by_torch(*where, first) if isinstance(first, Declined) else "native"
            if decided is None and self._tally.last is not None:
                learn(settings, now, self._tally.last)
        amp.tell(self._tally.last or NO_GRADIENTS)
        routes.settle("ClippedOptimizer.step", self.optimizer, settings, amp, self._tally)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's, with fastclip's counters and strategies under a key of their own.

        Plain torch loads it, and leaves that key alone; step counters are where torch keeps them.
        torch.distributed.checkpoint finds fastclip's counters with the state of a parameter.
        Synchronizes with the device.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        own = as_torch_keeps_it(self.optimizer, self.optimizer.state_dict())
        state = checkpoints.with_counters(self.optimizer, own, self._tally, self._settings)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state = post_hook(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of a clipped optimizer, or of the wrapped one's class."""
        state = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state = pre_hook(self, state) or state
        state, counters = checkpoints.without_counters(state)
        go_on = checkpoints.loading(self.optimizer, counters, self._tally, self._settings)
        self.optimizer.load_state_dict(state)
        go_on()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __repr__(self) -> str:
        """Return the settings and the wrapped optimizer."""
        settings = self._settings
        return (
            f"ClippedOptimizer(max_norm={settings.max_norm}, norm_type={settings.norm_type}, "
            f"nonfinite={settings.nonfinite!r}, {self.optimizer!r})"
        )


def settings_of(optimizer: Optimizer) -> Settings | None:
    """Return how an optimizer clips, or None if nothing of fastclip does it."""
    if isinstance(optimizer, ClippedOptimizer):
        return optimizer._settings
    settings: Settings | None = vars(optimizer).get(ATTACHED)
    return settings


def check_unclipped(function: str, optimizer: object) -> None:
    """Raise TypeError unless this is an optimizer that nothing of fastclip clips yet."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{function}: expected a torch.optim.Optimizer, not {type(optimizer).__name__}.")
    if settings_of(optimizer) is not None:
        raise TypeError(
            f"{function}: this {type(optimizer).__name__} is clipped already; expected one that is not. "
            f"Clipping twice would count and scale every step twice."
        )
