"""Searches for the tuner's tests, and the models and data of `tuner_models`."""

from __future__ import annotations

from typing import Any

from tuner_models import (
    DEADLY,
    HANGING,
    NUM_CLASSES,
    NanAfter,
    Slow,
    always_nan,
    blobs,
    broken,
    dangerous,
    dropping_out,
    line,
    linear_regressor,
    mlp,
    nan_above_half,
    noting_process,
    noting_surroundings,
    one_group,
    out_of_memory_above_32,
    pid_model,
    slow,
)

from fastclip.tuner import Float, TunerCV

__all__ = [
    "DEADLY",
    "HANGING",
    "NUM_CLASSES",
    "SPACE",
    "NanAfter",
    "Slow",
    "always_nan",
    "blobs",
    "broken",
    "dangerous",
    "dropping_out",
    "line",
    "linear_regressor",
    "mlp",
    "nan_above_half",
    "noting_process",
    "noting_surroundings",
    "one_group",
    "out_of_memory_above_32",
    "pid_model",
    "slow",
    "tuner",
]

SPACE = {"lr": Float(0.01, 1.0, log=True), "max_norm": Float(0.1, 10.0, log=True), "momentum": 0.5}


def tuner(model: Any = mlp, space: Any = None, **options: Any) -> TunerCV:
    """A short search."""
    settings = {"cv": 2, "max_epochs": 3, "n_trials": 4, **options}
    return TunerCV(model, SPACE if space is None else space, **settings)
