"""Scores of training parts, confusion, class weights, and classes by name."""

from __future__ import annotations

import functools
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tuner_cases as cases
from sklearn.metrics import confusion_matrix
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from tuner_cases import tuner

from fastclip.tuner import cross_validate
from fastclip.tuner.data import as_data
from fastclip.tuner.report import StudyView, write_report
from fastclip.tuner.training.losses import default_loss, training_loss
from fastclip.tuner.training.metrics import _confusion_matrix

NAMES = np.array(["cat", "dog", "owl"])


def remembering(models: list[nn.Module]):
    """A model_init that keeps what it made."""

    def make(params):
        models.append(cases.mlp(params))
        return models[-1]

    return make


class TestTrainScores:
    def test_are_the_accuracy_and_loss_of_the_training_part(self):
        X, y = cases.blobs()  # noqa: N806
        models = []
        split = (np.arange(60), np.arange(60, 90))
        result = cross_validate(
            remembering(models), {"lr": 0.1}, X, y, cv=[split], max_epochs=3, scoring=["accuracy", "loss"],
            return_train_score=True,
        )  # fmt: skip
        for part, rows in zip(("train", "test"), split, strict=True):
            with torch.no_grad():
                outputs = models[-1](X[rows])
            accuracy = (outputs.argmax(1) == y[rows]).double().mean().item()
            assert result[f"{part}_accuracy"].tolist() == [accuracy]
            assert result[f"mean_{part}_loss"] == pytest.approx(F.cross_entropy(outputs, y[rows]).item())
            metrics = result["metrics" if part == "test" else "train_metrics"][0]
            assert metrics["accuracy"] == accuracy
        assert result["confusion"][0] == confusion_matrix(y[60:], outputs.argmax(1)).tolist()

    def test_are_left_out_unless_asked_for(self):
        assert "train_score" not in cross_validate(cases.mlp, {}, cases.blobs(), cv=2, max_epochs=1)
        search = tuner().fit(cases.blobs())
        assert not any("train" in key for key in search.cv_results_)

    def test_of_a_search_stand_in_its_results_and_tables(self, tmp_path):
        search = tuner(return_train_score=True, output_dir=tmp_path).fit(cases.blobs())
        results = search.cv_results_
        folds = np.stack([results[f"split{i}_train_score"] for i in range(2)])
        assert results["mean_train_score"].tolist() == folds.mean(axis=0).tolist()
        assert (results["mean_train_score"] > 0).all()
        header = (tmp_path / "folds.csv").read_text().partition("\n")[0].split(",")
        assert {"accuracy", "loss", "train_accuracy", "train_loss"} <= set(header)

    def test_of_the_refit(self):
        X, y = cases.blobs()  # noqa: N806
        search = tuner().fit(X, y)
        assert list(search.refit_scores_) == ["train"]
        assert search.refit_scores_["train"]["accuracy"] == search.score(X, y)
        held_out = tuner(refit_on="holdout", patience=2).fit(X, y)
        assert list(held_out.refit_scores_) == ["train", "test"]
        assert {"accuracy", "loss", "recall_0"} <= set(held_out.refit_scores_["test"])


def test_confusion_leaves_out_outputs_that_are_no_class():
    classes, labels = np.array([1, 4, 7]), np.array([1, 4, 7, 7, 1])
    predicted = np.array([1, 7, 7, 5, 0])
    found = _confusion_matrix(predicted, labels, classes)
    assert found == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert found == confusion_matrix(labels, predicted, labels=classes).tolist()


def test_confusion_is_that_of_the_best_epoch():
    result = cross_validate(
        cases.mlp, {"lr": 3.0, "momentum": 0.9}, cases.blobs(), cv=2, max_epochs=12, patience=3
    )
    for confusion, score in zip(result["confusion"], result["test_score"], strict=True):
        assert np.trace(confusion) / np.sum(confusion) == pytest.approx(score)


class TestClassWeights:
    data = as_data(cases.blobs()[0], np.repeat([0, 1, 2], [60, 20, 10]), caller="test")

    def test_balanced_weights_are_scikit_learns(self):
        rows = np.arange(90)
        loss = training_loss(default_loss, {"class_weight": "balanced"}, self.data, rows)
        outputs = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
        weight = compute_class_weight("balanced", classes=np.arange(3), y=self.data.labels)
        expected = F.cross_entropy(outputs, self.data.targets, weight=torch.tensor(weight).float())
        assert loss(outputs, self.data.targets).item() == pytest.approx(expected.item())

    def test_balanced_weights_of_one_logit(self):
        data = as_data(np.zeros((40, 1)), np.repeat([0, 1], [30, 10]), caller="test")
        loss = training_loss(default_loss, {"class_weight": "balanced"}, data, np.arange(40))
        logits = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
        expected = F.cross_entropy(
            torch.cat((torch.zeros(40, 1), logits), 1), data.targets, weight=torch.tensor([2 / 3, 2.0])
        )
        assert loss(logits, data.targets).item() == pytest.approx(expected.item())

    def test_weights_by_name(self):
        data = as_data(np.zeros((4, 1)), ["cat", "dog", "dog", "cat"], caller="test")
        loss = training_loss(default_loss, {"class_weight": {"dog": 3.0}}, data, np.arange(4))
        outputs = torch.tensor([[0.0, 0], [1, 0], [0, 0], [0, 2]])
        expected = F.cross_entropy(outputs, data.targets, weight=torch.tensor([1.0, 3.0]))
        assert loss(outputs, data.targets).item() == pytest.approx(expected.item())

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"class_weight": "even"}, "class_weight='even'; expected None, 'balanced' or a mapping"),
            ({"class_weight": {5: 1.0}}, "class_weight names 5; expected classes of the targets: 0, 1, 2"),
            ({"label_smoothing": 1.0}, r"label_smoothing=1.0; expected a value in \[0, 1\)"),
        ],
    )
    def test_wrong_values_are_refused(self, params, message):
        with pytest.raises(ValueError, match=message):
            training_loss(default_loss, params, self.data, np.arange(90))

    def test_balanced_training_finds_the_rare_class(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(200, 4)).astype("float32")
        y = (x[:, 0] + 0.5 * rng.normal(size=200) > 1.5).astype(int)
        plain, balanced = (
            cross_validate(
                lambda p: nn.Linear(4, 2), {"lr": 0.5, "class_weight": weight}, x, y, cv=2, max_epochs=20,
                scoring="recall_macro",
            )["mean_test_score"]
            for weight in (None, "balanced")
        )  # fmt: skip
        assert balanced > plain + 0.1

    def test_label_smoothing_is_torchs(self):
        X, y = cases.blobs()  # noqa: N806
        loss = training_loss(
            default_loss, {"label_smoothing": 0.2}, as_data(X, y, caller="test"), np.arange(90)
        )
        outputs = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
        expected = F.cross_entropy(outputs, y, label_smoothing=0.2)
        assert loss(outputs, y).item() == pytest.approx(expected.item())

    def test_held_out_loss_is_not_smoothed(self):
        result = cross_validate(
            cases.mlp, {"lr": 0.5, "label_smoothing": 0.5}, cases.blobs(), cv=2, max_epochs=20, scoring="loss"
        )
        trained = [history[-1]["train_loss"] for history in result["history"]]
        assert (result["test_score"] < np.array(trained) - 0.1).all()


class TestNames:
    def test_come_back_from_predict(self):
        X, y = cases.blobs()  # noqa: N806
        search = tuner().fit(X, NAMES[y])
        assert search.classes_.tolist() == NAMES.tolist()
        assert search.predict(X).dtype.kind == "U"
        assert search.score(X, NAMES[y]) == (search.predict(X) == NAMES[y]).mean() > 0.9
        assert "recall_owl" in search.refit_scores_["train"]
        numbered = tuner().fit(X, y)
        assert numbered.best_score_ == search.best_score_

    def test_are_matched_where_new_data_has_fewer(self):
        X, y = cases.blobs()  # noqa: N806
        search = tuner().fit(X, NAMES[y])
        rows = y.numpy() > 0
        assert search.score(X[rows], NAMES[y][rows]) == (search.predict(X[rows]) == NAMES[y][rows]).mean()
        with pytest.raises(ValueError, match="y has the class 'yak'; expected one of cat, dog, owl"):
            search.score(X[:2], ["cat", "yak"])
        with pytest.raises(ValueError, match="y holds numbers; expected names of classes, as in training"):
            search.score(X, y)

    def test_targets_of_several_kinds_are_refused(self):
        with pytest.raises(TypeError, match="y has None of type NoneType; expected numbers, or one name"):
            as_data(np.zeros((2, 1)), np.array(["a", None]), caller="fit")


class TestHint:
    def test_floats_that_look_like_classes_are_told(self):
        x = np.zeros((50, 4), "float32")
        with pytest.warns(UserWarning, match=r"y is torch.float32 and holds only 0, 1, 2; expected integers"):
            cross_validate(
                cases.linear_regressor, {}, x, (np.arange(50) % 3).astype(float), cv=2, max_epochs=1
            )

    @pytest.mark.parametrize("y", [np.arange(50.0), np.arange(50) % 3 + 0.5], ids=["many", "halves"])
    def test_a_regression_is_left_alone(self, y):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cross_validate(cases.linear_regressor, {"lr": 1e-4}, np.zeros((50, 4)), y, cv=2, max_epochs=1)


def test_report_shows_recall_and_confusion_of_the_best_trial(tmp_path):
    X, y = cases.blobs()  # noqa: N806
    search = tuner(output_dir=tmp_path / "run", return_train_score=True).fit(X, NAMES[y])
    view = StudyView.open(tmp_path / "run")
    page = write_report(view, tmp_path / "report.html").read_text()
    total = np.sum([fold.confusion for fold in search.records_[search.best_index_].folds], axis=0)
    section = page[page.index('id="classes"') :]
    section = section[: section.index("</section>")]
    cells = [int(cell) for cell in re.findall(r'<td class="count[^"]*">(\d+)</td>', section)]
    assert cells == total.reshape(-1).tolist()
    assert all(name in section for name in NAMES)
    recalls = [float(cell) for cell in re.findall(r'<td class="recall">([\d.]+)', section)]
    assert recalls == pytest.approx((np.diag(total) / total.sum(axis=1)).tolist(), abs=1e-3)
    mean = search.cv_results_["mean_train_score"][search.best_index_]
    assert math.isfinite(mean)
    assert f"on the training parts {mean:.4g}" in page


class TestSharesOfClasses:
    X, labels = cases.blobs()
    y = 0.9 * F.one_hot(labels, cases.NUM_CLASSES) + 0.1 / cases.NUM_CLASSES

    @pytest.mark.parametrize("scoring", [None, "rmse", "r2", ["loss", "rmse"]])
    @pytest.mark.parametrize(
        "loss",
        [torch.nn.CrossEntropyLoss(), F.cross_entropy,
         functools.partial(F.cross_entropy, label_smoothing=0.1)],
        ids=["module", "function", "partial"],
    )  # fmt: skip
    def test_are_not_scored_as_a_regression(self, loss, scoring):
        with pytest.raises(ValueError, match=r"shares of the classes; expected scoring='loss' or a callable"):
            cases.tuner(loss=loss, scoring=scoring).fit(self.X, self.y)

    def test_are_trained_and_scored_by_their_loss(self):
        found = cases.tuner(loss=torch.nn.CrossEntropyLoss(), scoring="loss", n_trials=2).fit(self.X, self.y)
        outputs = found.outputs(self.X)
        expected = F.cross_entropy(outputs, self.y).item()
        assert found.score(self.X, self.y) == pytest.approx(expected, rel=1e-5)
        assert (outputs.argmax(1) == self.labels).double().mean() > 0.9
        assert "rmse" not in found.measures(self.X, self.y)

    def test_of_a_regression_are_scored_as_before(self):
        X, y = cases.line()  # noqa: N806
        found = cases.tuner(cases.linear_regressor, {"lr": 0.1}, n_trials=1).fit(X, y)
        assert set(found.measures(X, y)) == {"loss", "rmse"}
