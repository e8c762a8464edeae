"""The search as scikit-learn's own: its checks, pipelines, scorers and habits."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import tuner_cases as cases
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import nn
from torch.utils.data import TensorDataset

from fastclip.tuner import TunerClassifier, TunerCV, TunerRegressor
from fastclip.tuner.executors.choosing import count_jobs

optuna.logging.set_verbosity(optuna.logging.WARNING)
SHORT: dict[str, Any] = {"sampler": "random", "n_trials": 1, "cv": 0.3, "max_epochs": 8}
EXPECTED_FAILURES = {
    "check_estimators_nan_inf": "fit names the row and the column of a value that is not finite, in other "
    "words than scikit-learn's",
}


class AsFloat(nn.Module):
    """Integers stay integers on their way to a network, where they may be tokens; a table is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def five_scores(params: dict[str, Any]) -> nn.Module:
    return nn.Sequential(AsFloat(), nn.LazyLinear(5))


def one_number(params: dict[str, Any]) -> nn.Module:
    return nn.Sequential(AsFloat(), nn.LazyLinear(1))


def classifier(**options: Any) -> TunerClassifier:
    return TunerClassifier(five_scores, {"lr": 0.5, "max_norm": 1.0}, **{**SHORT, **options})


def regressor(**options: Any) -> TunerRegressor:
    return TunerRegressor(one_number, {"lr": 0.02, "optimizer": "adam"}, **{**SHORT, **options})


@pytest.mark.parametrize("make", [classifier, regressor])
def test_passes_scikit_learns_checks(make: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of data that the checks make up: constant scores, columns as y
        results = check_estimator(make(), expected_failed_checks=EXPECTED_FAILURES, on_skip=None)
    failed = {result["check_name"] for result in results if result["status"] == "xfail"}
    assert failed == set(EXPECTED_FAILURES)


class TestClassifier:
    @pytest.mark.parametrize(
        "names",
        [np.array(["cat", "dog", "owl"]), np.array([7, 9, 11]), np.array([1.0, 2.0, 4.0]), np.arange(3)],
        ids=["text", "integers", "floats", "numbered"],
    )
    def test_classes_come_back(self, names: np.ndarray) -> None:
        X, y = cases.blobs()  # noqa: N806
        search = classifier().fit(X=X, y=names[y])
        assert search.classes_.tolist() == names.tolist()
        assert search.predict(X).dtype == names.dtype
        assert search.score(X, names[y]) == accuracy_score(names[y], search.predict(X)) > 0.9
        assert search.measures(X, names[y])["accuracy"] == search.score(X, names[y])
        probabilities = search.predict_proba(X)
        assert probabilities.shape == search.decision_function(X).shape == (90, 3)
        assert (names[probabilities.argmax(axis=1)] == search.predict(X)).all()

    def test_goes_into_pipelines_and_scorers(self) -> None:
        X, y = (values.numpy() for values in cases.blobs())  # noqa: N806
        pipeline = make_pipeline(StandardScaler(), classifier())
        assert cross_val_score(pipeline, X, y, cv=2, scoring="roc_auc_ovr").mean() > 0.9
        assert cross_val_score(pipeline, X, y, cv=2).mean() > 0.9
        binary = cross_val_score(classifier(), X, y > 0, cv=2, scoring="neg_log_loss")
        assert np.isfinite(binary).all()
        assert set(cross_val_predict(classifier(), X, y, cv=2)) == {0, 1, 2}

    def test_rows_may_be_lists_and_datasets_are_taken(self) -> None:
        X, y = cases.blobs()  # noqa: N806
        from_lists = classifier().fit(X.tolist(), y.tolist())
        assert (from_lists.predict(X[:2].tolist()) == from_lists.predict(X[:2])).all()
        from_dataset = classifier().fit(TensorDataset(X, y))
        assert from_dataset.best_score_ == from_lists.best_score_

    def test_tags_clone_and_pickle(self) -> None:
        search = classifier()
        assert is_classifier(search)
        assert is_regressor(regressor())
        assert clone(search).get_params()["space"] == search.space
        X, y = cases.blobs()  # noqa: N806
        search.fit(X, y)
        assert (pickle.loads(pickle.dumps(search)).predict(X) == search.predict(X)).all()


def test_regressor_scores_by_r2() -> None:
    X, y = cases.line()  # noqa: N806
    search = regressor(max_epochs=200).fit(X, y)
    assert search.score(X, y) == pytest.approx(r2_score(y, search.predict(X)))
    assert search.score(X, y) > 0.9
    assert not hasattr(search, "predict_proba")


def test_unfitted_search_says_so() -> None:
    with pytest.raises(NotFittedError):
        classifier().predict(np.zeros((2, 4)))


@pytest.mark.parametrize(("n_jobs", "cores"), [(None, 1), (1, 1), (3, 3), (-1, 8), (-2, 7), (-20, 1)])
def test_jobs_are_counted_as_joblib_does(
    n_jobs: int | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    assert count_jobs(n_jobs) == cores


def test_verbose_shows_every_trial(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    options = {"n_trials": 2, "cv": 2, "max_epochs": 1, "refit": False}
    TunerCV(
        cases.mlp, {"lr": [0.1, 0.2]}, verbose=True, callbacks=[lambda s, t: seen.append(t.number)], **options
    ).fit(cases.blobs())
    printed = capsys.readouterr().out
    assert seen == [0, 1]
    assert [line.split(":")[0] for line in printed.splitlines()] == ["trial 0", "trial 1"]
    TunerCV(cases.mlp, {"lr": 0.1}, **options).fit(cases.blobs())
    assert capsys.readouterr().out == ""
