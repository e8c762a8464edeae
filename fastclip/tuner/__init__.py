"""Choose learning rate, threshold and initialisation together, by cross-validation.

    from fastclip.tuner import Choice, Float, TunerCV

    tuner = TunerCV(
        model_init=lambda params: make_model(),
        space={
            "lr_x_max_norm": Float(1e-3, 1.0, log=True),
            "max_norm": Float(0.01, 10.0, log=True),
            "init": Choice(["default", "orthogonal"]),
        },
        n_trials=30,
        cv=3,
    ).fit(X, y)
    tuner.best_params_, tuner.best_score_, tuner.explosions_

Needs `fastclip[tune]`. Nothing in fastclip's core imports this package. Names are imported when they are
first asked for: a worker process that trains folds needs neither Optuna nor scikit-learn.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

for _name in ("optuna", "sklearn"):
    if find_spec(_name) is None:
        raise ImportError(
            f"fastclip.tuner: {_name} is not installed; expected the extra `tune`. pip install "
            "'fastclip[tune]'",
            name=_name,
        )

if TYPE_CHECKING:
    from fastclip.tuner.cross_validation import cross_validate, nested_cv
    from fastclip.tuner.errors import (
        AllTrialsExplodedError,
        AllTrialsFailedError,
        ConfigError,
        MainGuardError,
        NonfiniteDataError,
        RefitExplodedError,
        ResumeError,
        WarmupExplodedError,
    )
    from fastclip.tuner.estimators import TunerClassifier, TunerRegressor
    from fastclip.tuner.study.spaces import Choice, Float, Int, Space
    from fastclip.tuner.suggest import ClipRange, suggest_clip_range
    from fastclip.tuner.training.explosion import ExplosionRule, Verdict
    from fastclip.tuner.training.initialisation import INIT_NAMES, initialise
    from fastclip.tuner.training.roulette import RouletteWheelSplit
    from fastclip.tuner.training.splits import check_cv
    from fastclip.tuner.tuner_cv import TunerCV

_HOMES = {
    "cross_validation": "cross_validate nested_cv",
    "errors": "AllTrialsExplodedError AllTrialsFailedError ConfigError MainGuardError "
    "NonfiniteDataError RefitExplodedError ResumeError WarmupExplodedError",
    "estimators": "TunerClassifier TunerRegressor",
    "study.spaces": "Choice Float Int Space",
    "suggest": "ClipRange suggest_clip_range",
    "training.explosion": "ExplosionRule Verdict",
    "training.initialisation": "INIT_NAMES initialise",
    "training.roulette": "RouletteWheelSplit",
    "training.splits": "check_cv",
    "tuner_cv": "TunerCV",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "INIT_NAMES",
    "AllTrialsExplodedError",
    "AllTrialsFailedError",
    "Choice",
    "ClipRange",
    "ConfigError",
    "ExplosionRule",
    "Float",
    "Int",
    "MainGuardError",
    "NonfiniteDataError",
    "RefitExplodedError",
    "ResumeError",
    "RouletteWheelSplit",
    "Space",
    "TunerCV",
    "TunerClassifier",
    "TunerRegressor",
    "Verdict",
    "WarmupExplodedError",
    "check_cv",
    "cross_validate",
    "initialise",
    "nested_cv",
    "suggest_clip_range",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
