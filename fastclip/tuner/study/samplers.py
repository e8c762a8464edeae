"""Samplers and pruners by name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from fastclip.tuner.study.spaces import MAX_GRID_VALUES, Space
from fastclip.tuner.training.seeding import derive_seed

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    # A grid's points wait in the storage as trials, so the sampler behind them is never asked.
    "grid": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
}

PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "median": optuna.pruners.MedianPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    "patient_median": lambda: optuna.pruners.PatientPruner(optuna.pruners.MedianPruner(), patience=2),
}


def check_sampler(sampler: Any) -> None:
    """Raise ValueError for an unknown name and TypeError for anything but a name, a sampler or a study."""
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise ValueError(
                f"check_sampler: sampler={sampler!r} is unknown; expected {', '.join(SAMPLERS)}, an Optuna "
                "sampler or an Optuna study."
            )
    elif not isinstance(sampler, (BaseSampler, optuna.Study)):
        raise TypeError(
            f"check_sampler: sampler={sampler!r}; expected {', '.join(SAMPLERS)}, an Optuna sampler or an "
            "Optuna study."
        )


def sampler_for_trial(name: str, *entropy: int) -> BaseSampler:
    """Return a fresh sampler for one trial.

    A sampler per trial, seeded by the study's seed and the trial's number, has no state to lose: a resumed
    study draws what the uninterrupted one would have drawn.
    """
    return SAMPLERS[name](derive_seed(*entropy))


def make_pruner(pruner: Any) -> BasePruner | None:
    """Return a pruner, or None for none.

    Raises:
        ValueError: the name is unknown.
        TypeError: neither a name nor a pruner.
    """
    if pruner is None or isinstance(pruner, BasePruner):
        return pruner
    if not isinstance(pruner, str):
        raise TypeError(
            f"make_pruner: pruner={pruner!r}; expected {', '.join(PRUNERS)}, an Optuna pruner or None."
        )
    if pruner not in PRUNERS:
        raise ValueError(
            f"make_pruner: pruner={pruner!r} is unknown; expected {', '.join(PRUNERS)}, an Optuna pruner or "
            "None."
        )
    return PRUNERS[pruner]()


def grid_points(space: Space) -> list[dict[str, Any]]:
    """Return every point of a grid, the last dimension varying fastest.

    Raises:
        ValueError: a dimension is continuous, or there are too many points.
    """
    values = space.grid()
    count = math.prod(len(options) for options in values.values())
    if count > MAX_GRID_VALUES:
        raise ValueError(f"grid_points: the grid has {count} points; expected at most {MAX_GRID_VALUES}.")
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
