"""Verdicts on whole training runs: healthy ones are no explosions, true ones are, guessing is a collapse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import tuner_cases as cases
from report_cases import MadeUpStudy, fold, scored
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from fastclip.tuner import AllTrialsFailedError, Choice, Float, Verdict, cross_validate
from fastclip.tuner.data import as_data
from fastclip.tuner.report.next_steps import next_steps
from fastclip.tuner.training.guessing import collapse, guess_loss
from fastclip.tuner.training.losses import default_loss


def noisy_regression(seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(120, 6)).astype("float32")
    return x, (np.sin(2 * x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + 0.3 * rng.normal(size=120)).astype("float32")


def regressor(params: dict[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))


def deep(params: dict[str, Any]) -> nn.Module:
    """The network of docs/tuning.md."""
    layers: list[nn.Module] = [nn.Linear(64, 128), nn.ReLU()]
    for _ in range(9):
        layers += [nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def digits() -> tuple[Any, Any]:
    pixels, labels = load_digits(return_X_y=True)
    return (pixels / 16).astype("float32"), labels


def log_likelihood(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of a normal variable of deviation 0.3: below zero once the model is good."""
    return (((outputs.reshape(targets.shape) - targets) / 0.3) ** 2 / 2 + math.log(0.3)).mean()


def policy_gradient(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Heavy-tailed advantages of either sign."""
    advantages = torch.distributions.StudentT(torch.tensor(3.0)).sample(targets.shape)
    return (F.cross_entropy(outputs, targets, reduction="none") * advantages).mean()


class TestHealthy:
    @pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
    def test_small_batches_do_not_explode(self, batch_size: int) -> None:
        params = {"lr": 0.01, "momentum": 0.5, "batch_size": batch_size}
        for seed in range(2):
            result = cross_validate(regressor, params, *noisy_regression(seed), max_epochs=5, seed=seed)
            assert "exploded" not in result["status"]

    def test_fine_tuning_does_not_explode(self) -> None:
        x, y = noisy_regression(0)
        torch.manual_seed(0)
        good = regressor({})
        optimizer = torch.optim.Adam(good.parameters(), 0.01)
        for _ in range(500):
            optimizer.zero_grad()
            F.mse_loss(good(torch.from_numpy(x))[:, 0], torch.from_numpy(y)).backward()
            optimizer.step()
        weights = good.state_dict()

        def tuned(params: dict[str, Any]) -> nn.Module:
            model = regressor(params)
            model.load_state_dict(weights)
            return model

        result = cross_validate(tuned, {"lr": 0.02, "momentum": 0.5, "batch_size": 4}, x, y, max_epochs=5)
        assert list(result["status"]) == ["ok"] * 5

    @pytest.mark.parametrize("batch_size", [1, 16])
    def test_loss_below_zero_does_not_explode(self, batch_size: int) -> None:
        params = {"lr": 0.003, "batch_size": batch_size}
        result = cross_validate(regressor, params, *noisy_regression(0), max_epochs=8, loss=log_likelihood)
        assert "exploded" not in result["status"]

    @pytest.mark.parametrize("batch_size", [1, 8])
    def test_noisy_policy_gradient_does_not_explode(self, batch_size: int) -> None:
        params = {"lr": 0.02, "batch_size": batch_size}
        result = cross_validate(cases.mlp, params, cases.blobs(), max_epochs=8, loss=policy_gradient)
        assert "exploded" not in result["status"]


class TestTrueExplosions:
    def test_network_of_the_guide_is_caught_soon(self) -> None:
        params = {"lr": 1.0, "momentum": 0.9, "init": "kaiming_normal"}
        result = cross_validate(deep, params, *digits(), cv=2, max_epochs=1)
        assert list(result["status"]) == ["exploded"] * 2
        assert max(result["steps"]) <= 20

    @pytest.mark.parametrize("batch_size", [1, 32])
    def test_regression_is_caught(self, batch_size: int) -> None:
        params = {"lr": 3.0, "batch_size": batch_size}
        result = cross_validate(regressor, params, *noisy_regression(0), cv=2, max_epochs=2)
        assert list(result["status"]) == ["exploded"] * 2
        assert max(result["steps"]) <= 20


class TestCollapse:
    def test_dead_network_has_collapsed_and_keeps_its_score(self) -> None:
        def dead(params: dict[str, Any]) -> nn.Module:
            model = cases.mlp(params)
            for parameter in model.parameters():
                nn.init.zeros_(parameter)
            return model.requires_grad_(True)

        result = cross_validate(dead, {"lr": 1e-6}, cases.blobs(), cv=3, max_epochs=1)
        assert list(result["status"]) == ["collapsed"] * 3
        assert result["mean_test_score"] == pytest.approx(1 / 3)
        assert "no better than that of guessing, 1.099" in result["message"][0]

    def test_guess_is_that_of_scikit_learns_dummies(self) -> None:
        x, y = noisy_regression(0)
        data, half = as_data(x, y, caller="test"), np.arange(60)
        guessed = guess_loss(torch.Size([1]), data, half, half + 60, default_loss)
        assert guessed is not None
        assert guessed <= np.mean((y[60:] - y[:60].mean()) ** 2) * (1 + 1e-5)
        labels = as_data(x, np.arange(120) % 3, caller="test")
        assert guess_loss(torch.Size([3]), labels, half, half + 60, default_loss) == pytest.approx(
            math.log(3)
        )

    def test_good_accuracy_at_a_high_loss_is_overfitting(self) -> None:
        labels = np.arange(90) % 3
        record = {"loss": 9.0, "accuracy": 0.6, "recall_macro": 0.6}
        assert collapse(record, 1.1, labels) is None
        assert collapse({**record, "accuracy": 0.35, "recall_macro": 0.35}, 1.1, labels) is not None
        assert collapse({"loss": 0.5}, 1.0, labels) is None
        assert collapse({"loss": 0.5}, -1.0, labels) is None  # a loss that crosses zero

    def test_rare_class_found_is_no_guess(self) -> None:
        labels = np.array([0] * 95 + [1] * 5)
        assert collapse({"loss": 0.3, "accuracy": 0.95, "recall_macro": 0.8}, 0.2, labels) is None

    def test_search_goes_on_through_a_collapse_and_ranks_it(self) -> None:
        space = {"lr": Choice([1e-9, 0.1]), "init": "orthogonal"}
        search = cases.tuner(space=space, sampler="grid", n_trials=None, cv=3, max_epochs=4)
        search.fit(cases.blobs())
        assert search.records_[1].status is Verdict.OK
        assert search.best_index_ == 1

    def test_advice_names_the_rates_that_collapsed(self) -> None:
        study = MadeUpStudy().add(scored(0.9, 0.91, 0.92), lr=0.05, max_norm=0.5)
        study.add([fold(0.1, Verdict.COLLAPSED)] * 3, lr=0.9, max_norm=0.5)
        text = "\n".join(next_steps(study.view))
        assert "1 of 2 trials collapsed: they end at guessing. Rates up to 0.9 did" in text
        worst = MadeUpStudy().add([fold(0.1, Verdict.COLLAPSED)] * 3, lr=0.9, max_norm=0.5)
        assert "The best trial ends at guessing" in "\n".join(next_steps(worst.view))


class TestTimeBudget:
    def test_trial_under_way_ends(self) -> None:
        search = cases.tuner(
            cases.slow, {"lr": Float(0.01, 0.1)}, n_trials=None, timeout=0.8, max_epochs=1000, refit=False
        )
        with pytest.raises(AllTrialsFailedError, match=r"1 out of time.* raise timeout"):
            search.fit(cases.blobs())
        assert search.records_[0].folds[0].message.startswith("the time budget ended after")
