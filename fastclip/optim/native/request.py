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
from fastclip.strategies import Strategy
from fastclip.strategies.within import Elements, Units


def request(
    optimizer: Optimizer, settings: Settings, amp: Amp, tally: Tally, decided: Decided | None
) -> Step | Declined:
    """Return what a backend has to know of a step."""
    assert not isinstance(settings.max_norm, Strategy)  # which has been asked by now
    given, dtensor, within = None, None, None
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
        max_norm=settings.max_norm,
        norm_type=settings.norm_type,
        skips=settings.skips,
        write_grads=settings.write_grads,
        grad_scale=amp.grad_scale,
        found_inf=amp.found_inf,
        counts_on=tally.counts_on,
        given=given,
        max_value=within.max_value if isinstance(within, Elements) else math.inf,
        units=_units(within, optimizer) if isinstance(within, Units) else None,
        dtensor=dtensor,
        instead=instead,
        fresh=set(),
    )


def _units(within: Units, optimizer: Optimizer) -> tuple[float, float, list[int]]:
    return within.ratio, within.eps, within.numels(parameters(optimizer))
