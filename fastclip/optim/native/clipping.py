"""What is decided of a step, as `fastclip._C` and the kernels take it."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer

from fastclip.backends.base import Declined
from fastclip.optim.gradients import Decided, parameters
from fastclip.optim.settings import Settings
from fastclip.strategies.within import Elements, Units


def dtensor_of(decided: Decided | None) -> type[Tensor] | None:
    """Return the class of which the memory on this rank is meant, or None."""
    return None if decided is None or decided.shards is None else decided.shards.dtensor


def updated_with(decided: Decided | None, settings: Settings) -> dict[Tensor, Tensor] | Declined:
    """Return, by parameter, what to update it with in the place of its gradient's memory."""
    if decided is None or decided.shards is None:
        return {}
    instead = decided.shards.for_update()
    if instead and settings.write_grads:
        return Declined(
            "clipped gradients are to be written, and some are not laid out like their parameters"
        )
    return instead


def max_value_of(decided: Decided | None) -> float:
    """Return the bound of each element's magnitude, inf for none."""
    within = None if decided is None else decided.within
    return within.max_value if isinstance(within, Elements) else math.inf


def units_of(decided: Decided | None, optimizer: Optimizer) -> tuple[float, float, list[int]]:
    """Return how units are clipped: ratio, eps, and the elements of a unit of each parameter; [] for not."""
    within = None if decided is None else decided.within
    if not isinstance(within, Units):
        return 0.0, 0.0, []
    return within.ratio, within.eps, within.numels(parameters(optimizer))
