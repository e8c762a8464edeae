"""Held-out outputs as fitted estimators, which is what scikit-learn's scorers want."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin


class HeldOutClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted classifier as scorers see it, whose predictions are already there."""

    def __init__(self, outputs: torch.Tensor, classes: npt.NDArray[Any]) -> None:
        self.outputs = outputs
        self.classes_ = classes

    def predict(self, X: Any = None) -> npt.NDArray[Any]:  # noqa: N803
        """Return the class with the largest score."""
        del X
        return self.outputs.argmax(dim=-1).numpy()

    def predict_proba(self, X: Any = None) -> npt.NDArray[Any]:  # noqa: N803
        """Return probabilities in float64: rows of float32 ones sum to 1 too roughly for some scorers."""
        del X
        return self._scores().softmax(dim=-1).numpy()

    def decision_function(self, X: Any = None) -> npt.NDArray[Any]:  # noqa: N803
        """Return the scores of the classes, of two of them the difference."""
        del X
        scores = self._scores().numpy()
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def _scores(self) -> torch.Tensor:
        """Return the scores of the classes that occur: a network may have more outputs."""
        return self.outputs[:, self.classes_].double()


class HeldOutLabels(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted classifier of several labels per sample, whose logits are already there."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.classes_ = [np.array([0, 1])] * logits.shape[1]

    def predict(self, X: Any = None) -> npt.NDArray[Any]:  # noqa: N803
        """Return whether each label is there."""
        del X
        return (self.logits > 0).long().numpy()

    def predict_proba(self, X: Any = None) -> npt.NDArray[Any]:  # noqa: N803
        """Return the probability of each label, in float64."""
        del X
        return self.logits.double().sigmoid().numpy()

    def decision_function(self, X: Any = None) -> npt.NDArray[Any]:  # noqa: N803
        """Return the logit of each label."""
        del X
        return self.logits.numpy()


class HeldOutRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted regressor as scorers see it, whose predictions are already there."""

    def __init__(self, outputs: torch.Tensor) -> None:
        self.outputs = outputs

    def predict(self, X: Any = None) -> npt.NDArray[Any]:  # noqa: N803
        """Return the outputs."""
        del X
        return self.outputs.numpy()


def as_estimator(kind: str, outputs: torch.Tensor, classes: npt.NDArray[Any]) -> BaseEstimator:
    """Return outputs as an estimator that is a "classifier", a "regressor" or knows several "labels"."""
    if kind == "classifier":
        return HeldOutClassifier(outputs, classes)
    return HeldOutLabels(outputs) if kind == "labels" else HeldOutRegressor(outputs)
