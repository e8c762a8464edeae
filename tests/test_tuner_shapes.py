"""Outputs and targets of every shape: the right accuracy, recall and loss, or an error that names both."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, recall_score, roc_auc_score
from torch import nn

from fastclip.tuner import TunerCV, cross_validate
from fastclip.tuner.training.losses import default_loss, ignore_index_of, prepare_loss
from fastclip.tuner.training.metrics import measure, measure_batches
from fastclip.tuner.training.scoring import check_scoring

ACCURACY = check_scoring("accuracy", is_classification=True)
LOSS = check_scoring("loss", is_classification=False)


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def separable(n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 4)).astype("float32")
    return x, (x[:, 0] > 0).astype(int)


class TestOneLogit:
    @pytest.mark.parametrize("shape", [(50,), (50, 1)], ids=str)
    @pytest.mark.parametrize(
        "loss", [None, nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits], ids=["own", "module", "F"]
    )
    def test_loss_and_accuracy_are_those_of_the_logit(self, shape: tuple[int, ...], loss: Any) -> None:
        logits, targets = seeded(50), torch.arange(50) % 2
        values = measure(logits.reshape(shape), targets, prepare_loss(loss), ACCURACY, np.arange(2))
        expected = F.binary_cross_entropy_with_logits(logits, targets.float())
        assert values["loss"] == pytest.approx(expected.item())
        assert values["accuracy"] == accuracy_score(targets, logits > 0)

    @pytest.mark.parametrize("loss", [nn.BCELoss(), F.binary_cross_entropy], ids=["module", "F"])
    def test_probabilities_are_read_at_a_half(self, loss: Any) -> None:
        logits, targets = seeded(50), torch.arange(50) % 2
        values = measure(logits.sigmoid(), targets, prepare_loss(loss), ACCURACY, np.arange(2))
        assert values["accuracy"] == accuracy_score(targets, logits > 0)

    @pytest.mark.parametrize("loss", [None, nn.BCEWithLogitsLoss()], ids=["own", "module"])
    def test_network_with_one_logit_is_searched_and_predicts(self, loss: Any) -> None:
        x, y = separable()
        search = TunerCV(lambda p: nn.Linear(4, 1), {"lr": 0.5}, n_trials=1, cv=2, max_epochs=20, loss=loss)
        search.fit(x, y)
        assert search.best_score_ > 0.9
        assert search.score(x, y) == accuracy_score(y, search.predict(x))
        assert search.predict_proba(x).shape == (60, 2)
        assert ((search.predict_proba(x)[:, 1] > 0.5) == search.predict(x)).all()
        assert ((search.decision_function(x) > 0) == search.predict(x)).all()

    @pytest.mark.parametrize("width", [1, 3])
    def test_floats_are_classes_for_a_binary_loss(self, width: int) -> None:
        x, _ = separable()
        y = (x[:, :width] > 0).astype("float32")
        search = TunerCV(
            lambda p: nn.Linear(4, width), {"lr": 1.0}, n_trials=1, cv=2, max_epochs=30,
            loss=nn.BCEWithLogitsLoss(),
        ).fit(x, y)  # fmt: skip
        assert search.scoring_.primary == "accuracy"
        assert search.best_score_ > 0.6
        assert search.score(x, y) == accuracy_score(y, search.predict(x))

    def test_rows_and_columns_are_never_exchanged(self) -> None:
        with pytest.raises(ValueError, match=r"outputs of shape \(4, 6, 1\) for targets of shape \(6, 4\)"):
            default_loss(torch.zeros(4, 6, 1), torch.zeros(6, 4, dtype=torch.long))


class TestPositions:
    @pytest.mark.parametrize("extra", [(5,), (5, 6)], ids=str)
    def test_default_loss_takes_scores_behind_the_batch(self, extra: tuple[int, ...]) -> None:
        scores, targets = seeded(8, 3, *extra), torch.arange(8 * int(np.prod(extra))).reshape(8, *extra) % 3
        assert default_loss(scores, targets).item() == pytest.approx(F.cross_entropy(scores, targets).item())

    @pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss()], ids=["own", "module"])
    def test_segmentation_cross_validates(self, loss: Any) -> None:
        images = seeded(24, 1, 4, 4)
        masks = (images[:, 0] > 0).long()
        result = cross_validate(
            lambda p: nn.Conv2d(1, 2, 1), {"lr": 1.0, "batch_size": 4}, images, masks, cv=2, max_epochs=8,
            loss=loss,
        )  # fmt: skip
        assert result["mean_test_score"] > 0.9
        assert np.sum(result["confusion"]) == masks.numel()

    def test_scores_that_fit_nowhere_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"outputs of shape \(8, 3, 7\) for targets of shape \(8, 5\)"):
            default_loss(torch.zeros(8, 3, 7), torch.zeros(8, 5, dtype=torch.long))


class TestIgnoreIndex:
    @pytest.mark.parametrize(
        ("loss", "ignored"),
        [
            (default_loss, -100),
            (nn.CrossEntropyLoss(ignore_index=255), 255),
            (functools.partial(F.cross_entropy, ignore_index=7), 7),
        ],
        ids=["own", "module", "partial"],
    )
    def test_what_is_ignored_counts_nowhere(self, loss: Any, ignored: int) -> None:
        scores, targets = seeded(8, 3, 5), torch.arange(40).reshape(8, 5) % 3
        targets[:, 3:] = ignored
        assert ignore_index_of(loss) == ignored
        values, confusion = measure_batches([(scores, targets)], loss, ACCURACY, np.arange(3), None, ignored)
        counted = targets != ignored
        predicted = scores.argmax(1)
        assert values["accuracy"] == accuracy_score(targets[counted], predicted[counted])
        expected = F.cross_entropy(scores, targets, ignore_index=ignored).item()
        assert values["loss"] == pytest.approx(expected)
        assert np.sum(confusion) == 24

    def test_tagger_of_padded_sequences_cross_validates(self) -> None:
        tokens = torch.arange(80).reshape(20, 4) % 5
        tags = tokens.clone()
        tags[:, 3] = -100
        result = cross_validate(
            lambda p: nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5)), {"lr": 1.0}, tokens, tags, cv=2,
            max_epochs=30,
        )  # fmt: skip
        assert result["mean_test_score"] == 1.0
        assert result["status"].tolist() == ["ok"] * 2

    def test_one_logit_for_each_position_leaves_it_out(self) -> None:
        logits, targets = seeded(8, 5), torch.arange(40).reshape(8, 5) % 2
        targets[:, 3:] = -100
        values = measure(logits, targets, default_loss, ACCURACY, np.arange(2))
        counted = targets != -100
        expected = F.binary_cross_entropy_with_logits(logits[counted], targets[counted].float())
        assert values["loss"] == pytest.approx(expected.item())
        assert values["accuracy"] == accuracy_score(targets[counted], logits[counted] > 0)
        with pytest.raises(
            ValueError, match="y holds -100, and BCEWithLogitsLoss would take it for a target"
        ):
            cross_validate(lambda p: nn.Linear(5, 5), {}, logits, targets, loss=nn.BCEWithLogitsLoss())

    def test_class_without_a_score_is_found_before_training(self) -> None:
        images, masks = seeded(12, 1, 2, 2), torch.arange(48).reshape(12, 2, 2) % 2
        masks[:, 0, 0] = 255
        result = cross_validate(lambda p: nn.Conv2d(1, 2, 1), {}, images, masks, cv=2)
        assert "hold 2 scores for each target, and the largest class is 255" in result["message"][0]
        assert result["steps"].tolist() == [0, 0]

    def test_large_class_that_is_meant_to_be_ignored_is_told_how(self) -> None:
        targets = torch.tensor([0, 1, 255, 1])
        with pytest.raises(ValueError, match=r"largest class is 255; .* ignore_index of torch.nn.Cross"):
            measure(torch.zeros(4, 2), targets, lambda o, t: o.sum(), ACCURACY, np.array([0, 1, 255]))


class TestMultiLabel:
    logits = seeded(40, 3)
    targets = (seeded(40, 3).flip(0) > 0.3).long()

    def test_metrics_are_scikit_learns(self) -> None:
        scoring = check_scoring(["accuracy", "f1_macro", "roc_auc"], is_classification=True)
        loss = prepare_loss(nn.BCEWithLogitsLoss())
        values = measure(self.logits, self.targets, loss, scoring, np.arange(2))
        predicted = (self.logits > 0).long()
        assert values["accuracy"] == accuracy_score(self.targets, predicted)
        assert values["label_accuracy"] == (predicted == self.targets).double().mean().item()
        recalls = recall_score(self.targets, predicted, average=None)
        assert [values[f"recall_{label}"] for label in range(3)] == pytest.approx(recalls.tolist())
        assert values["recall_macro"] == pytest.approx(recalls.mean())
        assert values["f1_macro"] == pytest.approx(f1_score(self.targets, predicted, average="macro"))
        assert values["roc_auc"] == pytest.approx(roc_auc_score(self.targets, self.logits))
        expected = F.binary_cross_entropy_with_logits(self.logits, self.targets.float())
        assert values["loss"] == pytest.approx(expected.item())

    @pytest.mark.parametrize("loss", [None, nn.BCEWithLogitsLoss()], ids=["own", "module"])
    def test_search_learns_every_label(self, loss: Any) -> None:
        x = seeded(60, 4)
        y = (x[:, :3] > 0).long()
        search = TunerCV(lambda p: nn.Linear(4, 3), {"lr": 2.0}, n_trials=1, cv=2, max_epochs=30, loss=loss)
        search.fit(x, y)
        assert [fold.status for fold in search.records_[0].folds] == ["ok", "ok"]
        assert search.best_score_ > 0.7
        assert search.predict(x).shape == search.predict_proba(x).shape == (60, 3)
        assert search.score(x, y) == accuracy_score(y, search.predict(x))

    def test_guess_of_every_label_is_a_collapse(self) -> None:
        x, y = seeded(60, 4), (seeded(60, 3) > 0.8).long()
        result = cross_validate(lambda p: nn.Linear(4, 3), {"lr": 1e-8}, x, y, cv=2, max_epochs=1)
        assert result["status"].tolist() == ["collapsed"] * 2


class TestRegression:
    def test_several_outputs_have_the_error_of_all(self) -> None:
        outputs, targets = seeded(30, 2), seeded(30, 2).flip(0)
        values = measure(outputs, targets, default_loss, LOSS, np.empty(0))
        assert values["loss"] == pytest.approx((outputs - targets).square().mean().item())
        assert values["rmse"] == pytest.approx((outputs - targets).square().mean().sqrt().item())

    def test_several_outputs_cross_validate(self) -> None:
        x = seeded(60, 4)
        y = x @ torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]])
        result = cross_validate(
            lambda p: nn.Linear(4, 2), {"lr": 0.2}, x, y, cv=2, max_epochs=30, scoring="r2"
        )
        assert result["mean_test_score"] > 0.99

    def test_transposed_outputs_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"outputs of shape \(2, 6\) for targets of shape \(6, 2\)"):
            default_loss(torch.zeros(2, 6), torch.zeros(6, 2))

    @pytest.mark.parametrize("loss", [F.mse_loss, nn.L1Loss(), nn.HuberLoss()], ids=["mse", "L1", "Huber"])
    def test_torchs_losses_do_not_broadcast(self, loss: Any) -> None:
        outputs, targets = seeded(30, 1), seeded(30).flip(0)
        assert prepare_loss(loss)(outputs, targets) == loss(outputs[:, 0], targets)

    def test_a_loss_that_broadcasts_is_refused(self) -> None:
        x = seeded(40, 4)
        result = cross_validate(
            lambda p: nn.Linear(4, 1), {}, x, x[:, 0].clone(), cv=2, loss=lambda o, t: (o - t).square().mean()
        )
        assert result["status"].tolist() == ["error"] * 2
        assert "shape (20, 1) for targets of shape (20,)" in result["message"][0]
        assert "it broadcasts one against the other" in result["message"][0]

    @pytest.mark.parametrize(
        "loss", [lambda o, t: (o[:, 0] - t).square().mean(), lambda o, t: F.mse_loss(o.squeeze(-1), t)]
    )
    def test_a_loss_that_shapes_its_outputs_is_taken(self, loss: Any) -> None:
        x = seeded(40, 4)
        result = cross_validate(lambda p: nn.Linear(4, 1), {"lr": 0.1}, x, x[:, 0].clone(), cv=2, loss=loss)
        assert result["status"].tolist() == ["ok"] * 2

    def test_predictions_have_the_shape_of_targets(self) -> None:
        x = seeded(40, 4)
        search = TunerCV(lambda p: nn.Linear(4, 1), {"lr": 0.1}, n_trials=1, cv=2, max_epochs=2)
        assert search.fit(x, x[:, 0].clone()).predict(x).shape == (40,)
        with pytest.raises(ValueError, match=r"predict_proba: the targets of training are torch\.float32"):
            search.predict_proba(x)
