"""What a fitted search does with new data, in scikit-learn's manner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import RegressorMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastclip.tuner.executors.base import device_slots
from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.folds import FoldContext
from fastclip.tuner.training.held_out import HeldOutClassifier
from fastclip.tuner.training.loop import evaluate, predict
from fastclip.tuner.training.losses import default_loss, with_meaning_of
from fastclip.tuner.training.metrics import as_logits
from fastclip.tuner.training.reading import as_data
from fastclip.tuner.training.shapes import (
    class_dim,
    class_scores,
    equal_but_for_ones,
    is_multi_label,
)


@dataclass(frozen=True)
class _Seen:
    """What the data of a search was like."""

    is_classification: bool
    target_type: torch.dtype
    target_shape: torch.Size
    label_names: npt.NDArray[Any] | None
    classes: npt.NDArray[Any]
    input_shape: torch.Size | None

    def check(self, view: TuningData, caller: str) -> TuningData:
        """Return new samples whose inputs have the dimensions of those that were seen; refuse others."""
        if view.inputs is None or self.input_shape is None or view.inputs.dim() == 1 + len(self.input_shape):
            return view
        raise ValueError(
            f"{caller}: X has the shape {tuple(view.inputs.shape)}; expected that of training, "
            f"{('n', *self.input_shape)}. Give a single sample as X[None]."
        )


def _is_no_regressor(predictor: Any) -> bool:
    return not isinstance(predictor, RegressorMixin)


class Predictor:
    """Predictions of `best_estimator_`, for a class that has fitted one.

    Attributes:
        best_estimator_: The module, in evaluation mode.
        best_params_: What it was trained with; it is called in the precision of `amp`.
        classes_: What the classes are called; there for classes alone.
        n_features_in_: Size of the second dimension of X, where there was one.
    """

    best_estimator_: nn.Module
    best_params_: dict[str, Any]
    classes_: npt.NDArray[Any]
    n_features_in_: int
    devices: Any

    def outputs(self, X: Any) -> torch.Tensor:  # noqa: N803
        """Return what `best_estimator_` puts out for a Dataset, (X, y) or the inputs X alone."""
        model, view = self._fitted_model(), self._new_data(X)
        return predict(model, view, np.arange(len(view)), self._device(), self.best_params_.get("amp"))

    def predict(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803
        """Return a class, by the name that it was given with, or a number for each target."""
        outputs = self.outputs(X)
        shape = self._target_shape(outputs)
        if not self._seen.is_classification:
            matches = equal_but_for_ones(outputs.shape, shape)
            return (outputs.reshape(shape) if matches else outputs).numpy()
        logits, names = as_logits(outputs, self._objective.loss), self._seen.label_names
        if equal_but_for_ones(outputs.shape, shape):
            numbers = (logits.reshape(shape) > 0).long()
        else:
            is_last = self._objective.loss is default_loss
            dim = class_dim(outputs.shape, shape, last=is_last)
            dim = dim if dim is not None else -1 if is_last else 1
            # Outputs beyond the named classes have no name.
            known = logits if names is None else logits.narrow(dim, 0, len(names))
            numbers = known.argmax(dim=dim)
        return numbers.numpy() if names is None else names[numbers.numpy()]

    @available_if(_is_no_regressor)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803
        """Return the probabilities of the classes in the order of `classes_`, or of each of several labels.

        Raises:
            ValueError: targets are numbers, or a sample has more than one class.
        """
        outputs = self.outputs(X)
        if is_multi_label(outputs.shape, self._target_shape(outputs)):
            logits = as_logits(outputs, self._objective.loss)
            return logits.double().sigmoid().numpy()
        return self._classifier(outputs, "predict_proba").predict_proba()

    @available_if(_is_no_regressor)  # type: ignore[untyped-decorator]
    def decision_function(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803
        """Return the scores of the classes; of two classes the difference, as scikit-learn has it.

        Raises:
            ValueError: targets are numbers, or a sample has more than one class.
        """
        return self._classifier(self.outputs(X), "decision_function").decision_function()

    def score(self, data: Any, y: Any = None) -> float:
        """Return the primary measure of `best_estimator_` on new data."""
        return self.measures(data, y)[self._objective.scoring.primary]

    def measures(self, data: Any, y: Any = None) -> dict[str, float]:
        """Return every measure of `best_estimator_` on new data: accuracy, loss, the recall of each class."""
        model = self._fitted_model()
        view = self._new_pairs(data, y).renamed(self._seen.label_names, "TunerCV.score")
        view = with_meaning_of(self._objective.loss, view)
        rows, amp = np.arange(len(view)), self.best_params_.get("amp")
        return evaluate(model, view, rows, self._objective, self._device(), amp)[0]

    def _remember(self, context: FoldContext) -> None:
        """Keep what predictions need of a search, and not its data."""
        data = context.data
        self._objective = context.objective
        self._seen = _Seen(
            *(data.is_classification, data.targets.dtype, data.targets.shape[1:], data.label_names),
            *(data.classes, None if data.inputs is None else data.inputs.shape[1:]),
        )
        for name in ("classes_", "n_features_in_"):
            vars(self).pop(name, None)
        if data.is_classification:
            self.classes_ = np.asarray(data.class_names)
        if data.inputs is not None and data.inputs.dim() >= 2:
            self.n_features_in_ = data.inputs.shape[1]

    def _new_data(self, data: Any) -> TuningData:
        """Return a view of new samples, with targets or without."""
        if not isinstance(data, (Dataset, DataLoader, TuningData, tuple)):
            data = (data, np.zeros(len(data), dtype=np.int64))
        return self._seen.check(as_data(data, caller="TunerCV.predict"), "TunerCV.predict")

    def _new_pairs(self, data: Any, y: Any) -> TuningData:
        """Return a view of new samples with targets."""
        return self._seen.check(as_data(data, y, caller="TunerCV.score"), "TunerCV.score")

    def _classifier(self, outputs: torch.Tensor, name: str) -> HeldOutClassifier:
        if not self._seen.is_classification or self._seen.target_shape:
            raise ValueError(
                f"TunerCV.{name}: the targets of training are {self._seen.target_type} of shape "
                f"{('n', *self._seen.target_shape)}; expected one class for each sample."
            )
        loss = self._objective.loss
        fake, classes = torch.zeros(len(outputs), dtype=torch.int64), self._seen.classes
        scores = class_scores(as_logits(outputs, loss), fake, classes, last=loss is default_loss)
        return HeldOutClassifier(scores, classes)

    def _target_shape(self, outputs: torch.Tensor) -> torch.Size:
        return torch.Size((len(outputs), *self._seen.target_shape))

    def _fitted_model(self) -> nn.Module:
        if hasattr(self, "study_") and not hasattr(self, "best_estimator_"):
            raise NotFittedError(
                f"{type(self).__name__}: the search has left no best_estimator_; expected one that "
                "ended with refit=True. Train best_params_ yourself, or search with refit=True."
            )
        check_is_fitted(self, "best_estimator_")
        return self.best_estimator_

    def _device(self) -> torch.device:
        return device_slots(self.devices, 1)[0]
