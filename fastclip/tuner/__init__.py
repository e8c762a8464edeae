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

Needs `fastclip[tune]`. Nothing in fastclip's core imports this package.
"""

try:
    import optuna as _optuna  # noqa: F401
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastclip.tuner: {error.name} is not installed; expected the extra `tune`. pip install "
        "'fastclip[tune]'"
    ) from error

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
