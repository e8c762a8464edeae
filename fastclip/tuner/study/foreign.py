"""Search dimensions of other libraries, and plain lists, as ours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from fastclip.tuner.study.dimensions import DIMENSIONS, Choice, Float, Int

SCALARS = frozenset(
    {"lr", "lr_x_max_norm", "max_norm", "norm_type", "l1", "l2", "init", "init_gain", "batch_size", "dropout"}
    | {"momentum", "weight_decay", "label_smoothing"}
)


def as_entry(name: str, value: Any) -> Any:
    """Return a dimension, or a fixed value as it is.

    Args:
        name: The parameter.
        value: A dimension of ours or of Optuna, a frozen uniform, loguniform or randint of scipy, a list or
            array of choices, or a fixed value.

    Raises:
        TypeError: a distribution that is none of these, or a collection where a number belongs.
    """
    if isinstance(value, DIMENSIONS):
        return value
    if isinstance(value, FloatDistribution):
        return Float(value.low, value.high, log=value.log, step=value.step)
    if isinstance(value, IntDistribution):
        return Int(value.low, value.high, log=value.log, step=value.step)
    if isinstance(value, CategoricalDistribution):
        return Choice(value.choices)
    if isinstance(value, (list, range)):
        return Choice(value)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return Choice(value.tolist())
    if hasattr(value, "rvs"):
        return _of_scipy(name, value)
    if name in SCALARS and isinstance(value, (tuple, set, dict, np.ndarray)):
        raise TypeError(
            f"Space: {name} = {value!r} is a {type(value).__name__}; expected one value, Float(low, high), "
            "Int(low, high) or a list of choices."
        )
    return value.item() if isinstance(value, np.generic) else value


def _of_scipy(name: str, value: Any) -> Float | Int:
    """Return a frozen distribution of scipy; its support is the range."""
    kind = getattr(getattr(value, "dist", None), "name", type(value).__name__)
    if kind not in ("uniform", "loguniform", "reciprocal", "randint"):
        raise TypeError(
            f"Space: {name} is scipy's {kind}; expected uniform, loguniform, randint, or Float, Int and "
            "Choice: samplers that learn need a range."
        )
    low, high = (float(bound) for bound in value.support())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise TypeError(f"Space: {name} is scipy's {kind} from {low} to {high}; expected a finite range.")
    return Int(int(low), int(high)) if kind == "randint" else Float(low, high, log=kind != "uniform")
