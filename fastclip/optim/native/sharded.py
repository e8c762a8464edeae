"""What of a step is spread over ranks, as `fastclip._C` takes it."""

from __future__ import annotations

from torch import Tensor

from fastclip.backends.base import Declined
from fastclip.optim.gradients import Decided
from fastclip.optim.settings import Settings


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
