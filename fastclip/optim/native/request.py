"""A step as it is asked of a backend."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import SGD, Optimizer

from fastclip.backends.base import Declined
from fastclip.backends.step import Given, Step
from fastclip.optim.gradients import Decided, parameters
from fastclip.optim.outcome import Tally
from fastclip.optim.settings import Amp, Settings
from fastclip.strategies.within import Elements, Units, Within


def request(
    optimizer: Optimizer, settings: Settings, amp: Amp, tally: Tally, decided: Decided | None
) -> Step | Declined:
    """Return what a backend has to know of a step."""
    given, dtensor, within = None, None, settings.within
    instead: dict[Tensor, Tensor] = {}
    if decided is not None:
        outcome, within = decided.outcome, decided.within
        given = Given(decided.coefs, outcome.total_norm, outcome.clip_coef, outcome.skipped)
        if decided.shards is not None:
            dtensor, instead = decided.shards.dtensor, decided.shards.for_update()
    if instead and settings.write_grads:
        return Declined(
            "clipped gradients are to be written, and some are not laid out like their parameters"
        )
    return Step(
        is_sgd=type(optimizer) is SGD,
        param_groups=optimizer.param_groups,
        state=optimizer.state,
        max_norm=settings.max_norm,  # type: ignore[arg-type]  # no strategy by now
        norm_type=settings.norm_type,
        skips=settings.skips,
        write_grads=settings.write_grads,
        grad_scale=amp.grad_scale,
        found_inf=amp.found_inf,
        counts_on=tally.counts_on,
        given=given,
        max_value=math.inf if within is None else _max_value(within),
        units=None if within is None else _units(within, optimizer),
        dtensor=dtensor,
        instead=instead,
        fresh=set(),
    )


def _max_value(within: Within) -> float:
    return within.max_value if isinstance(within, Elements) else math.inf


def _units(within: Within, optimizer: Optimizer) -> tuple[float, float, list[int]] | None:
    if not isinstance(within, Units):
        return None
    return within.ratio, within.eps, within.numels(parameters(optimizer))
