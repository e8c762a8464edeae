"""How much of the variance of a value over trials each parameter explains, also where some trials lack it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, create_trial

from fastclip.tuner.study.storage import quiet_logging

MIN_TRIALS = 4
TREE_DEPTH = 8  # deeper trees fit the noise, and take seconds for a thousand trials
ABSENT, BEGIN = "not chosen", 0.01


def importances_of(trials: Sequence[FrozenTrial], values: Sequence[float]) -> dict[str, float]:
    """Return the share of the variance that each parameter explains, by functional analysis of variance.

    A parameter that some trials do not choose, as a threshold where training may be unclipped, has one more
    place in its range for them, as wide as their share of the trials.

    Args:
        trials: n trials with their parameters and distributions.
        values: n finite numbers.

    Returns:
        Shares that add up to 1; nothing for fewer than `MIN_TRIALS` trials, fewer than two parameters that
        differ, or values that are equal but for rounding.

    Source:
        Hutter, Hoos and Leyton-Brown, An efficient approach for assessing hyperparameter importance, 2014.
    """
    known = np.asarray(values)
    if len(trials) < MIN_TRIALS or np.allclose(known, known[0], atol=0.0):
        return {}
    columns = {name: _column(trials, name) for name in sorted({name for t in trials for name in t.params})}
    varied = {
        name: column for name, column in columns.items() if column and len(set(map(str, column[1]))) > 1
    }
    if len(varied) < 2:
        return {}
    # Trees take differences below the rounding of 1 for noise, so values are brought to that scale.
    scaled = (known - known.mean()) / known.std()
    with quiet_logging():
        study = optuna.create_study()
    distributions = {name: distribution for name, (distribution, _) in varied.items()}
    for i, value in enumerate(scaled.tolist()):
        params = {name: places[i] for name, (_, places) in varied.items()}
        study.add_trial(create_trial(params=params, distributions=distributions, value=value))
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(max_depth=TREE_DEPTH, seed=0))


def _column(trials: Sequence[FrozenTrial], name: str) -> tuple[BaseDistribution, list[Any]] | None:
    """Return the range of a parameter and its place in each trial; None where ranges differ."""
    told = [trial.distributions[name] for trial in trials if name in trial.params]
    if any(distribution != told[0] for distribution in told):
        return None
    if len(told) == len(trials):
        return told[0], [trial.params[name] for trial in trials]
    wider, absent = _with_place(told[0], 1.0 - len(told) / len(trials))
    return wider, [trial.params.get(name, absent) for trial in trials]


def _with_place(distribution: BaseDistribution, share: float) -> tuple[BaseDistribution, Any]:
    """Return a range with a place at its upper end that takes this share of it, and a value in the place.

    The value lies where the place begins: trees split half-way between two values.
    """
    if isinstance(distribution, CategoricalDistribution):
        return CategoricalDistribution((*distribution.choices, ABSENT)), ABSENT
    if not isinstance(distribution, (FloatDistribution, IntDistribution)):
        raise RuntimeError(f"fastclip bug: {distribution} is no distribution of Optuna.")
    low, high = float(distribution.low), float(distribution.high)
    if distribution.log:
        length = (math.log(high / low) or 1.0) * share / (1.0 - share)
        end, place = high * math.exp(length), high * math.exp(length * BEGIN)
    else:
        length = ((high - low) or 1.0) * share / (1.0 - share)
        end, place = high + length, high + length * BEGIN
    return FloatDistribution(low, end, log=distribution.log), place
