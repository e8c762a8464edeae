"""What is measured on held-out samples: our own few metrics, and every scikit-learn scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

Scorer: TypeAlias = Callable[[Any, Any, Any], float]

OWN_METRICS = {True: ("loss", "accuracy", "recall_macro"), False: ("loss", "rmse")}
MINIMISED = ("loss", "rmse")


@dataclass(frozen=True)
class Scoring:
    """What is measured on held-out samples, and which measure the search follows.

    Attributes:
        scorers: Name -> scikit-learn scorer, or None for one of our own metrics.
        primary: Name of the measure that the search follows.
        direction: "maximize", or "minimize" for a loss.
    """

    scorers: Mapping[str, Scorer | None]
    primary: str
    direction: Literal["maximize", "minimize"]

    @property
    def worst(self) -> float:
        """The value told for an explosion."""
        return -np.inf if self.direction == "maximize" else np.inf

    def is_better(self, score: float, than: float) -> bool:
        """Compare two scores in the direction of the search."""
        return score > than if self.direction == "maximize" else score < than

    def key(self, name: str) -> str:
        """Return the name of a measure in scikit-learn's result keys: `score` for a single one."""
        return "score" if len(self.scorers) == 1 else name


def check_scoring(scoring: Any, *, is_classification: bool, refit: Any = True) -> Scoring:
    """Return what to measure.

    Args:
        scoring: None (accuracy; for a regression rmse), one of our own metrics (`loss`, `accuracy`,
            `recall_macro`, `rmse`), a scikit-learn scorer name, a callable (estimator, X, y) -> float,
            a list of names, or a dict of names to any of these. Callables get an estimator of the held-out
            predictions and, as X, the row numbers.
        is_classification: Whether the targets are classes.
        refit: With several measures, the name of the one that the search follows; otherwise the first.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name, a callable, a list nor a dict.
    """
    if scoring is None:
        scoring = "accuracy" if is_classification else "rmse"
    if isinstance(scoring, str):
        named: dict[str, Any] = {scoring: scoring}
    elif callable(scoring):
        named = {getattr(scoring, "__name__", "score"): scoring}
    elif isinstance(scoring, Mapping):
        named = dict(scoring)
    elif isinstance(scoring, (list, tuple, set)):
        named = {name: name for name in scoring}
    else:
        raise TypeError(
            f"check_scoring: scoring={scoring!r}; expected a scorer name, a callable, a list of names or a "
            "dict."
        )
    if not named:
        raise ValueError("check_scoring: scoring is empty; expected at least one measure.")
    primary = refit if isinstance(refit, str) else next(iter(named))
    if primary not in named:
        raise ValueError(
            f"check_scoring: refit={refit!r} is not among {', '.join(named)}; expected one of them."
        )
    own = OWN_METRICS[is_classification]
    scorers = {name: _as_scorer(value, own) for name, value in named.items()}
    minimise = scorers[primary] is None and named[primary] in MINIMISED
    if any(value is None and name != named[name] for name, value in scorers.items()):
        raise ValueError(
            "check_scoring: our own metrics keep their names; expected {'loss': 'loss'} and the like."
        )
    return Scoring(scorers, primary, "minimize" if minimise else "maximize")


def _as_scorer(value: Any, own: tuple[str, ...]) -> Scorer | None:
    if callable(value):
        return value  # type: ignore[no-any-return]
    if value in own:
        return None
    from sklearn.metrics import get_scorer, get_scorer_names  # slow to import, and no worker needs it

    if value not in get_scorer_names():
        raise ValueError(
            f"check_scoring: scoring={value!r} is unknown; expected {', '.join(own)}, a callable, or a name "
            "from sklearn.metrics.get_scorer_names()."
        )
    return get_scorer(value)  # type: ignore[no-any-return]
