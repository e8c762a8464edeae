"""Try the values of a whole space before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import FixedTrial
from torch import nn

from fastclip.tuner.study.probing import CPU, points
from fastclip.tuner.study.spaces import Choice, Space
from fastclip.tuner.training.batching import accumulate_of
from fastclip.tuner.training.clipping import make_strategy
from fastclip.tuner.training.folds import FoldContext, build_model
from fastclip.tuner.training.optimisers import make_optimizer, make_scheduler
from fastclip.tuner.training.precision import check_amp
from fastclip.tuner.training.seeding import seeded

STEPS_OF_SCHEDULE = 10  # any number: the schedule is built and never stepped


@dataclass(frozen=True)
class Bound:
    """What a number must be."""

    low: float
    may_equal: bool

    def holds(self, value: float) -> bool:
        """Tell whether a value lies above the bound, or on it where it may."""
        return value > self.low or (self.may_equal and value == self.low)

    def __str__(self) -> str:
        """Return the words of a message."""
        return f"a number {'of at least' if self.may_equal else 'above'} {self.low:g}"


AT_LEAST_0, ABOVE_0 = Bound(0.0, True), Bound(0.0, False)
BOUNDS = {
    **dict.fromkeys(("lr", "lr_x_max_norm", "l1", "l2", "weight_decay", "momentum"), AT_LEAST_0),
    **dict.fromkeys(("max_norm", "norm_type", "init_gain"), ABOVE_0),
}


def check_values(context: FoldContext, space: Space) -> int:
    """Build model, optimizer, schedule and strategy at every end, choice and fixed value of a space.

    A space that is a function is tried at random points.

    Returns:
        How many points were tried.

    Raises:
        ValueError: something cannot be built; the message names the parameters.
    """
    count = 0
    for params in _ends(space, context.seed):
        _check_numbers(params)
        try:
            with seeded(context.seed, CPU):
                model = build_model(context.model_init, context.data, params, context.splits[0][0], CPU)
            _build(model, params)
        except Exception as error:  # the model is the user's, and torch raises many kinds
            raise ValueError(f"check_values: {params} cannot be trained: {error}") from error
        count += 1
    return count


def _ends(space: Space, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the upper ends, each with the lower ends of the rest, then what a model is probed with."""
    lowest = {name: dimension.first for name, dimension in space.dimensions()}
    for name, dimension in space.dimensions():
        if not isinstance(dimension, Choice):
            yield space.sample(FixedTrial({**lowest, name: dimension.high}))
    yield from points(space, seed)


def _check_numbers(params: Mapping[str, Any]) -> None:
    for name, bound in BOUNDS.items():
        value = params.get(name)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or math.isnan(value) or not bound.holds(value):
            raise ValueError(f"check_values: {name}={value!r}; expected {bound}.")


def _build(model: nn.Module, params: Mapping[str, Any]) -> None:
    make_strategy(params)
    check_amp(params.get("amp"))
    accumulate_of(params)
    make_scheduler(make_optimizer(model, params), params.get("scheduler"), STEPS_OF_SCHEDULE)
