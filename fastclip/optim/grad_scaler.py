"""`GradScaler`: torch's, without a pass over the gradients of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from fastclip.optim.gradients import gradients
from fastclip.optim.settings import VERDICTS
from fastclip.optim.wrapper import ClippedOptimizer, settings_of


class GradScaler(torch.amp.GradScaler):
    """A `torch.amp.GradScaler` that leaves the search for inf and nan to a clipped optimizer.

    In `step`, torch reads and writes every gradient to look for overflows before the optimizer reads them
    again. A `ClippedOptimizer` finds them while it measures the norm, and so does an optimizer with `attach`
    that was made with fused=True: here their step itself tells `update` whether it overflowed, on the device
    and without a host synchronization. That saves reading and writing all gradients once per step.

    Everything else is torch's: arguments, growth and backoff, checkpoints, `unscale_`, other optimizers. As
    with torch's, a step that overflows is left out whatever `nonfinite` says. A norm beyond the range of
    float32 counts as an overflow, too. A `ClippedOptimizer` and the optimizer in it are one to `unscale_`.
    """

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale; as `torch.amp.GradScaler.unscale_`."""
        self._see_as_one(optimizer)
        super().unscale_(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step unless a gradient is inf or nan; as `torch.amp.GradScaler.step`."""
        self._see_as_one(optimizer)
        try:
            return super().step(optimizer, *args, **kwargs)
        except BaseException:
            # torch leaves these behind, and would multiply the scale of the next step by them.
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)
            raise

    def _see_as_one(self, optimizer: Optimizer) -> None:
        """Keep one record of a clipped optimizer and of all in it, which have the same gradients.

        A trainer's proxy of a clipped optimizer counts as one, and has that in it.
        """
        if not self._enabled:
            return
        layers = [optimizer]
        while isinstance(layers[-1], ClippedOptimizer):
            layers.append(layers[-1].optimizer)
        record = self._per_optimizer_states[id(layers[-1])]
        for layer in layers:
            self._per_optimizer_states[id(layer)] = record

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[Any, Any]:
        settings = settings_of(optimizer)
        # A norm of another order can be finite though an element is not.
        if settings is None or not settings.norm_type > 0:
            return super()._check_inf_per_device(optimizer)
        self._check_scale_growth_tracker("_check_inf_per_device")
        devices = dict.fromkeys(grad.device for grad in gradients(optimizer))
        found_inf = {device: torch.zeros((), dtype=torch.float32, device=device) for device in devices}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found_inf
        setattr(optimizer, VERDICTS, tuple(found_inf.values()))
        return found_inf
