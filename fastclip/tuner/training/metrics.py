"""Metrics of held-out samples: our own few, and every scikit-learn scorer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import get_scorer, get_scorer_names

Scorer: TypeAlias = Callable[[Any, Any, Any], float]
LossFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

OWN_METRICS = {True: ("loss", "accuracy", "recall_macro"), False: ("loss", "rmse")}
MINIMISED = ("loss", "rmse")


def default_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy over the last dimension for integer targets, mean squared error otherwise."""
    if targets.is_floating_point():
        return F.mse_loss(outputs.reshape(targets.shape), targets)
    return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1))


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
    if value not in get_scorer_names():
        raise ValueError(
            f"check_scoring: scoring={value!r} is unknown; expected {', '.join(own)}, a callable, or a name "
            "from sklearn.metrics.get_scorer_names()."
        )
    return get_scorer(value)  # type: ignore[no-any-return]


def measure(
    outputs: torch.Tensor,
    targets: torch.Tensor,
    loss: LossFunction,
    scoring: Scoring,
    classes: npt.NDArray[Any],
) -> dict[str, float]:
    """Return every metric of held-out outputs.

    Args:
        outputs: Model outputs of n samples, on the CPU; for classes as `class_scores` takes them.
        targets: Their n targets.
        loss: Loss function of (outputs, targets).
        scoring: The measures asked for; `loss`, `accuracy`, `recall_macro` and `recall_<class>` (`loss` and
            `rmse` for a regression) are there in any case.
        classes: The classes in ascending order; empty for a regression.

    Raises:
        ValueError: The outputs do not fit the targets; the message names both shapes.
    """
    values = {"loss": loss(outputs, targets).item()}
    labels = targets.numpy().reshape(-1)
    if len(classes):
        scores = class_scores(outputs, targets, classes, last=loss is default_loss)
        estimator: Any = _HeldOutClassifier(scores, classes)
        values |= _classification(estimator.predict(), labels, classes)
    else:
        if outputs.squeeze().shape != targets.squeeze().shape:
            raise ValueError(
                f"measure: outputs of shape {tuple(outputs.shape)} for targets of shape "
                f"{tuple(targets.shape)}; expected the same, up to dimensions of size 1."
            )
        estimator = _HeldOutRegressor(outputs.reshape(targets.shape))
        values["rmse"] = float(np.sqrt(np.mean(np.square(estimator.predict().reshape(-1) - labels))))
    rows = np.arange(len(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)  # a class that is never predicted scores 0
        for name, scorer in scoring.scorers.items():
            if scorer is not None:
                values[name] = float(scorer(estimator, rows, labels if len(classes) else targets.numpy()))
    return values


def class_scores(
    outputs: torch.Tensor, targets: torch.Tensor, classes: npt.NDArray[Any], *, last: bool
) -> torch.Tensor:
    """Return one row of class scores for each target, in the order of the flattened targets.

    Args:
        outputs: Targets' shape with a dimension of class scores more: behind the batch as torch's
            cross-entropy has it, (n, classes, ...), or at the end, (n, ..., classes). Or one logit for each
            target, with or without a dimension of size 1, for the classes 0 and 1.
        targets: Classes, of shape (n, ...).
        classes: Those that occur.
        last: Whether the scores are at the end where both would fit, as `default_loss` has it.

    Raises:
        ValueError: Neither fits, or there are fewer scores than classes; the message names the shapes.
    """
    shape = targets.shape
    if outputs.shape == shape or (outputs.numel() == targets.numel() and 1 in outputs.shape[1:]):
        if set(classes.tolist()) <= {0, 1}:
            logits = outputs.reshape(-1)
            return torch.stack((torch.zeros_like(logits), logits), dim=-1)
        raise ValueError(
            f"class_scores: outputs of shape {tuple(outputs.shape)} hold one number for each target, and the "
            f"classes are {classes.tolist()}; expected 0 and 1, or a score for each class."
        )
    fits_last = outputs.shape[:-1] == shape
    fits_second = outputs.dim() > 1 and outputs.shape[:1] + outputs.shape[2:] == shape
    if not (fits_last or fits_second):
        raise ValueError(
            f"class_scores: outputs of shape {tuple(outputs.shape)} for targets of shape {tuple(shape)}; "
            f"expected {(*shape[:1], 'classes', *shape[1:])} or {(*shape, 'classes')}."
        )
    scores = outputs if fits_last and (last or not fits_second) else outputs.movedim(1, -1)
    if scores.shape[-1] <= max(classes.tolist()):
        raise ValueError(
            f"class_scores: outputs of shape {tuple(outputs.shape)} hold {scores.shape[-1]} scores for each "
            f"target, and the largest class is {max(classes.tolist())}; expected more scores than that."
        )
    return scores.reshape(-1, scores.shape[-1])


def _classification(
    predicted: npt.NDArray[Any], labels: npt.NDArray[Any], classes: npt.NDArray[Any]
) -> dict[str, float]:
    """Return accuracy and recall; macro recall is the mean over the classes that occur in the labels."""
    hit = predicted == labels
    recalls = {
        f"recall_{label}": float(hit[labels == label].mean())
        for label in classes.tolist()
        if (labels == label).any()
    }
    return {"accuracy": float(hit.mean()), "recall_macro": float(np.mean(list(recalls.values()))), **recalls}


class _HeldOutClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted classifier as scorers see it, whose predictions are already there."""

    def __init__(self, outputs: torch.Tensor, classes: npt.NDArray[Any]) -> None:
        self.outputs = outputs
        self.classes_ = classes

    def predict(self, X: Any = None) -> npt.NDArray[Any]:  # noqa: N803
        del X
        return self.outputs.argmax(dim=-1).numpy()

    def predict_proba(self, X: Any = None) -> npt.NDArray[Any]:  # noqa: N803
        """Return probabilities in float64: rows of float32 ones sum to 1 too roughly for some scorers."""
        del X
        return self.outputs.double().softmax(dim=-1).numpy()[:, self.classes_]

    def decision_function(self, X: Any = None) -> npt.NDArray[Any]:  # noqa: N803
        del X
        scores = self.outputs[:, self.classes_].numpy()
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores


class _HeldOutRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted regressor as scorers see it, whose predictions are already there."""

    def __init__(self, outputs: torch.Tensor) -> None:
        self.outputs = outputs

    def predict(self, X: Any = None) -> npt.NDArray[Any]:  # noqa: N803
        del X
        return self.outputs.numpy()
