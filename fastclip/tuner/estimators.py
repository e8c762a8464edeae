"""The search as an estimator that scikit-learn's pipelines, scorers and checks take for their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data
from torch.utils.data import DataLoader, Dataset

from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.reading import as_data
from fastclip.tuner.tuner_cv import TunerCV

OWN_FORMS = (Dataset, DataLoader, TuningData)


class _Estimator(TunerCV):
    """`TunerCV` with the arguments and the checks of scikit-learn for X; Datasets are taken as they are."""

    def fit(
        self,
        X: Any,  # noqa: N803
        y: Any = None,
        groups: Any = None,
        *,
        eval_data: Any = None,
    ) -> Any:
        """Search, and retrain with the best parameters; see `TunerCV.fit`.

        Args:
            X: Rows, as arrays, tensors or lists; or a torch Dataset or DataLoader, which holds the targets.
            y: Targets of the rows.
            groups: Group labels for splitters that want them.
            eval_data: The same Dataset as it is measured, without augmentation.

        Returns:
            self.
        """
        return super().fit(X, y, groups, eval_data=eval_data)

    def _data(self, data: Any, y: Any, groups: Any, eval_data: Any) -> TuningData:
        if isinstance(data, OWN_FORMS):
            return super()._data(data, y, groups, eval_data)
        # What is not finite is found later, with its row and column.
        X, y = validate_data(  # noqa: N806
            self, data, y, allow_nd=True, multi_output=True, ensure_all_finite=False
        )
        return self._with_targets(X, y, groups)

    def _new_data(self, data: Any) -> TuningData:
        if isinstance(data, OWN_FORMS):
            return super()._new_data(data)
        X = validate_data(self, data, reset=False, allow_nd=True)  # noqa: N806
        return super()._new_data(X)

    def _new_pairs(self, data: Any, y: Any) -> TuningData:
        if isinstance(data, OWN_FORMS) or self._seen.label_names is None:
            return super()._new_pairs(data, y)
        X, y = validate_data(self, data, y, reset=False, allow_nd=True)  # noqa: N806
        return self._with_targets(X, y, None)

    def _with_targets(self, X: Any, y: Any, groups: Any) -> TuningData:  # noqa: N803
        raise NotImplementedError


class TunerClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """`TunerCV` as a classifier of scikit-learn.

    Classes may be numbers of any kind or names; the network needs at least as many outputs, and `predict`
    gives the classes back. `score` is the accuracy. Arguments and attributes are those of `TunerCV`.
    """

    def _with_targets(self, X: Any, y: Any, groups: Any) -> TuningData:  # noqa: N803
        check_classification_targets(y)
        if np.ndim(y) == 2 and np.shape(y)[1] > 1:  # labels that are there or not
            return as_data(X, np.asarray(y).astype(np.int64), groups, caller="TunerClassifier.fit")
        names, numbers = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        return replace(as_data(X, numbers, groups, caller="TunerClassifier.fit"), label_names=names)


class TunerRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """`TunerCV` as a regressor of scikit-learn.

    `score` is R². Arguments and attributes are those of `TunerCV`.
    """

    def _with_targets(self, X: Any, y: Any, groups: Any) -> TuningData:  # noqa: N803
        y = np.asarray(y, dtype=np.float64)
        y = column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y
        return as_data(X, y, groups, caller="TunerRegressor.fit")
