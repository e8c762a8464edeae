import copy
import math
import random

import numpy as np
import pytest
import torch
import tuner_cases as cases
from sklearn.metrics import accuracy_score, get_scorer, recall_score
from sklearn.model_selection import KFold
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fastclip.tuner import ExplosionRule, cross_validate, nested_cv
from fastclip.tuner.data import as_data
from fastclip.tuner.training.explosion import ExplosionWatch
from fastclip.tuner.training.losses import default_loss
from fastclip.tuner.training.metrics import measure
from fastclip.tuner.training.optimisers import SCHEDULERS, make_optimizer, make_scheduler
from fastclip.tuner.training.scoring import check_scoring


class TestWatch:
    def test_non_finite_loss_or_norm_is_an_explosion(self):
        assert ExplosionWatch(ExplosionRule()).look(math.nan, 1.0) == "the loss is nan"
        assert ExplosionWatch(ExplosionRule()).look(1.0, math.inf) == "the gradient norm is inf"

    def test_loss_must_be_above_its_reference_in_half_of_the_steps(self):
        watch = ExplosionWatch(ExplosionRule(loss_factor=3.0, loss_steps=6), reference=2.0)
        assert [watch.look(loss, 1.0) for loss in [2.0, 2.0, 6.1, 2.0, 6.1, *[2.0] * 6]] == [None] * 11
        assert [watch.look(6.1, 1.0) for _ in range(2)] == [None] * 2
        assert watch.look(6.1, 1.0) == "the loss 6.1 is above 6 for the 3. time in 6 steps; it began at 2"

    def test_loss_that_was_below_zero_means_nothing(self):
        watch = ExplosionWatch(ExplosionRule(), reference=0.1)
        assert [watch.look(loss, 1.0) for loss in [-0.1, *[50.0] * 20]] == [None] * 21
        assert watch.look_at_epoch(50.0, 50.0) is None

    def test_small_batches_widen_the_bound(self):
        noisy = [0.01, 1.0, 9.0] * 7
        watch = ExplosionWatch(ExplosionRule(), reference=1.0)
        assert [watch.look(loss, 1.0) for loss in [*noisy, *[9.0] * 10]] == [None] * 31
        assert [watch.look(30.0, 1.0) for _ in range(10)].count(None) < 10

    def test_epoch_is_judged_by_both_losses(self):
        watch = ExplosionWatch(ExplosionRule(), reference=1.0)
        assert watch.look_at_epoch(0.1, 50.0) is None  # overfitting
        assert watch.look_at_epoch(50.0, 0.1) is None  # a spike that is over
        assert "are above 4 x the 1 that it began at" in watch.look_at_epoch(5.0, 6.0)

    def test_norm_of_mostly_zero_gradients_is_no_measure(self):
        watch = ExplosionWatch(ExplosionRule())
        assert [watch.look(1.0, norm) for norm in [*[0.0] * 30, *[1.0] * 10]] == [None] * 40

    def test_norm_must_stay_high_for_the_given_steps(self):
        watch = ExplosionWatch(ExplosionRule(norm_factor=10.0, norm_steps=3))
        looks = [watch.look(1.0, norm) for norm in [*[1] * 21, 20, 20, 1, 20, 20]]
        assert looks == [None] * 26
        assert "above 10 x its running median 1 for 3 steps" in watch.look(1.0, 20.0)

    def test_median_runs_over_the_window_and_skips_spikes(self):
        rule = ExplosionRule(norm_factor=2.0, norm_steps=100, window=3)
        watch = ExplosionWatch(rule)
        for norm in [*[1.0] * 21, 1.5, 1.5, 50.0]:
            watch.look(1.0, norm)
        assert sorted(watch._recent) == [1.0, 1.5, 1.5]

    def test_switched_off_rules_leave_only_the_non_finite(self):
        watch = ExplosionWatch(ExplosionRule(norm_factor=None, loss_factor=None))
        assert [watch.look(loss, norm) for loss, norm in [(1, 1), (1e30, 1e30), (1e30, 1e30)]] == [None] * 3

    @pytest.mark.parametrize(
        "arguments",
        [{"norm_factor": 1.0}, {"loss_factor": 0.5}, {"norm_steps": 0}, {"every": 0}, {"window": 0}],
    )
    def test_wrong_rule_is_refused(self, arguments):
        with pytest.raises(ValueError, match=rf"ExplosionRule: {next(iter(arguments))}="):
            ExplosionRule(**arguments)


class TestMetrics:
    outputs = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [2.0, 0, 0], [0, 0, 2.0], [2.0, 0, 0]])
    targets = torch.tensor([0, 1, 1, 2, 0])

    def measured(self, scoring):
        return measure(
            self.outputs,
            self.targets,
            default_loss,
            check_scoring(scoring, is_classification=True),
            np.arange(3),
        )

    def test_own_metrics_agree_with_scikit_learn(self):
        values = self.measured(None)
        predicted = self.outputs.argmax(1)
        assert values["accuracy"] == accuracy_score(self.targets, predicted)
        assert values["recall_macro"] == pytest.approx(recall_score(self.targets, predicted, average="macro"))
        per_class = recall_score(self.targets, predicted, average=None)
        assert [values[f"recall_{c}"] for c in range(3)] == pytest.approx(per_class.tolist())

    @pytest.mark.parametrize(
        "name",
        [
            "f1_macro",
            "balanced_accuracy",
            "neg_log_loss",
            "roc_auc_ovr",
            "top_k_accuracy",
            "matthews_corrcoef",
        ],
    )
    def test_scorer_by_name(self, name):
        class Fitted:
            pass

        value = self.measured(name)[name]
        probabilities = self.outputs.double().softmax(1).numpy()
        scorer = get_scorer(name)
        response = probabilities if scorer._response_method != "predict" else self.outputs.argmax(1)
        expected = scorer._sign * scorer._score_func(self.targets, response, **scorer._kwargs)
        assert value == pytest.approx(expected)

    def test_callable_scorer_gets_predictions(self):
        def hits(estimator, X, y):  # noqa: N803
            return int((estimator.predict(X) == y).sum())

        assert self.measured(hits)["hits"] == 4.0

    def test_several_measures_follow_refit(self):
        scoring = check_scoring(["accuracy", "loss"], is_classification=True, refit="loss")
        assert (scoring.primary, scoring.direction, scoring.worst) == ("loss", "minimize", math.inf)

    @pytest.mark.parametrize("scoring", ["acuracy", []])
    def test_unknown_scoring_is_refused(self, scoring):
        with pytest.raises(ValueError, match="check_scoring: "):
            check_scoring(scoring, is_classification=True)


class TestData:
    def test_every_form_gives_the_same_folds(self):
        X, y = cases.blobs()  # noqa: N806

        class Pairs(Dataset):
            def __len__(self):
                return len(y)

            def __getitem__(self, i):
                return X[i], int(y[i])

        forms = [((X, y),), (X.numpy().astype(np.float64), y.numpy()), (TensorDataset(X, y),), (Pairs(),)]
        scores = [
            cross_validate(cases.mlp, {"lr": 0.1}, *form, cv=2, max_epochs=2)["test_score"].tolist()
            for form in forms
        ]
        assert scores == [scores[0]] * 4

    def test_fingerprint_sees_inputs_targets_and_groups(self):
        X, y = cases.blobs(12)  # noqa: N806
        changed = X.clone()
        changed[3, 0] += 1e-3
        prints = {
            as_data(inputs, targets, groups, caller="test").fingerprint()
            for inputs, targets, groups in [
                (X, y, None),
                (changed, y, None),
                (X, y.flip(0), None),
                (X, y, range(12)),
            ]
        }
        assert len(prints) == 4

    @pytest.mark.parametrize(
        ("data", "error", "message"),
        [
            ((torch.zeros(3, 1), torch.zeros(2)), ValueError, "X has 3 samples; expected 2"),
            ((torch.zeros(0, 1), torch.zeros(0)), ValueError, "no samples"),
            (5, TypeError, "data is a int; expected a torch Dataset"),
            ((np.array([["a"], ["b"]]), np.zeros(2)), TypeError, "X has dtype <U1; expected numbers"),
            (
                (np.zeros((2, 1)), np.array([1, "b"], object)),
                TypeError,
                "y has 1 of type int; expected numbers",
            ),
        ],
    )
    def test_wrong_data_is_refused(self, data, error, message):
        with pytest.raises(error, match=message):
            as_data(data, caller="fit")


class TestOptimisers:
    def test_setting_goes_only_where_it_is_known(self):
        params = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
        sgd = make_optimizer(nn.Linear(2, 1), {**params, "optimizer": "SGD"})
        adam = make_optimizer(nn.Linear(2, 1), {**params, "optimizer": "adamw"})
        assert (sgd.defaults["momentum"], adam.defaults["weight_decay"], adam.defaults["lr"]) == (
            0.9,
            0.01,
            0.1,
        )

    def test_factory_is_called(self):
        optimizer = make_optimizer(nn.Linear(2, 1), {"lr": 0.3, "optimizer": torch.optim.Rprop})
        assert isinstance(optimizer, torch.optim.Rprop)

    def test_unknown_names_are_refused(self):
        optimizer = make_optimizer(nn.Linear(2, 1), {})
        with pytest.raises(ValueError, match="optimizer='sdg' is unknown; expected a callable or one of"):
            make_optimizer(nn.Linear(2, 1), {"optimizer": "sdg"})
        with pytest.raises(ValueError, match="scheduler='cos' is unknown"):
            make_scheduler(optimizer, "cos", 10)

    @pytest.mark.parametrize("name", sorted(SCHEDULERS))
    def test_schedule_ends_low(self, name):
        optimizer = make_optimizer(nn.Linear(2, 1), {"lr": 1.0, "momentum": 0.9})
        scheduler = make_scheduler(optimizer, name, 20)
        for _ in range(20):
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] <= 0.0101


class TestCrossValidate:
    def test_keys_and_shapes_are_scikit_learns(self):
        result = cross_validate(cases.mlp, {"lr": 0.1, "max_norm": 1.0}, cases.blobs(), cv=3, max_epochs=4)
        assert {
            key for key, value in result.items() if isinstance(value, np.ndarray) and value.shape == (3,)
        } == {
            "fit_time",
            "score_time",
            "test_score",
            "clip_fraction",
            "steps",
            "epochs",
            "status",
        }
        assert result["mean_test_score"] == np.mean(result["test_score"]) > 0.9
        assert result["status"].tolist() == ["ok"] * 3
        assert result["epochs"].tolist() == [4] * 3
        # 60 training samples in batches of 32: two steps an epoch.
        assert result["steps"].tolist() == [8] * 3
        assert [len(history) for history in result["history"]] == [4] * 3

    def test_several_measures_have_their_names(self):
        result = cross_validate(
            cases.mlp, {}, cases.blobs(), cv=2, max_epochs=1, scoring=["accuracy", "f1_macro"]
        )
        assert {"test_accuracy", "test_f1_macro", "mean_test_f1_macro", "std_test_accuracy"} <= set(result)
        assert "test_score" not in result

    def test_regression_is_told_by_its_targets(self):
        result = cross_validate(cases.linear_regressor, {"lr": 0.1}, cases.line(), cv=3, max_epochs=30)
        assert result["mean_test_score"] < 0.05
        r2 = cross_validate(
            cases.linear_regressor, {"lr": 0.1}, cases.line(), cv=3, max_epochs=30, scoring="r2"
        )
        assert r2["mean_test_score"] > 0.99

    def test_same_seed_same_bits_and_the_callers_randomness_is_untouched(self):
        def draw():
            return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

        def reset():
            torch.manual_seed(1)
            np.random.seed(1)  # noqa: NPY002
            random.seed(1)

        reset()
        expected = draw()
        reset()
        runs = [
            cross_validate(
                cases.mlp, {"lr": 0.1}, cases.blobs(), cv=2, max_epochs=2, scoring="loss", seed=seed
            )
            for seed in (0, 0, 1)
        ]
        assert draw() == expected
        assert (
            runs[0]["test_score"].tolist() == runs[1]["test_score"].tolist() != runs[2]["test_score"].tolist()
        )

    def test_clip_fraction_counts_the_steps_above_the_threshold(self):
        for max_norm, share in [(1e-6, 1.0), (1e6, 0.0), (None, 0.0)]:
            result = cross_validate(cases.mlp, {"max_norm": max_norm}, cases.blobs(), cv=2, max_epochs=1)
            assert result["clip_fraction"].tolist() == [share] * 2

    def test_clipping_bounds_the_update(self):
        X, y = cases.blobs()  # noqa: N806
        distances = []
        for norm_type in (2.0, math.inf):
            start = cases.mlp({})
            trained = []

            def copied(_, start=start, trained=trained):
                trained.append(copy.deepcopy(start))
                return trained[-1]

            params = {"lr": 1.0, "max_norm": 1e-3, "norm_type": norm_type, "batch_size": 60}
            cross_validate(copied, params, X, y, cv=[(range(60), range(60, 90))], max_epochs=1)
            ends = (trained[-1].parameters(), start.parameters())
            end, begin = (torch.cat([p.detach().flatten() for p in parameters]) for parameters in ends)
            distances.append(torch.linalg.vector_norm(end - begin, norm_type).item())
        assert distances == pytest.approx([1e-3, 1e-3], rel=1e-2)

    def test_exploded_fold_stops_at_once_and_shows_in_the_plain_mean(self):
        result = cross_validate(
            cases.nan_above_half, {"lr": 0.6, "batch_size": 20}, cases.blobs(), cv=KFold(3), max_epochs=50
        )
        assert result["status"].tolist() == ["exploded"] * 3
        assert result["steps"].tolist() == [3] * 3
        assert result["mean_test_score"] == -math.inf

    def test_one_exploded_fold_beats_no_mean(self):
        # A mean that leaves out what is not finite would make one good fold out of three look like a winner.
        calls = []

        def explodes_in_the_second_fold(params):
            calls.append(1)  # two calls try the function before the first fold
            return cases.NanAfter(3 if len(calls) == 4 else 10**9)

        result = cross_validate(explodes_in_the_second_fold, {"lr": 0.1}, cases.blobs(), cv=3, max_epochs=5)
        assert result["status"].tolist() == ["ok", "exploded", "ok"]
        assert result["mean_test_score"] == -math.inf

    def test_degenerate_fold_is_not_trained(self):
        X, y = cases.blobs()  # noqa: N806
        lacking = np.flatnonzero(y.numpy() != 2)
        splits = [(lacking, np.flatnonzero(y.numpy() == 2)), (np.arange(60), np.arange(60, 90))]
        result = cross_validate(cases.mlp, {"lr": 0.1}, X, y, cv=splits, max_epochs=5)
        assert result["status"].tolist() == ["degenerate", "ok"]
        assert "classes [2]" in result["message"][0]
        assert result["mean_test_score"] == result["test_score"][1]

    def test_all_folds_degenerate_is_refused(self):
        X, y = cases.blobs()  # noqa: N806
        order = torch.argsort(y)
        with pytest.raises(ValueError, match="every fold lacks classes"):
            cross_validate(cases.mlp, {}, X[order], y[order], cv=KFold(3))

    @pytest.mark.parametrize(
        ("params", "status", "message"),
        [
            ({"batch_size": 64}, "oom", "out of memory"),
            ({"batch_size": 0}, "error", "batch_size=0; expected a whole number"),
            ({"batch_size": 32, "init": "glorot"}, "error", "init='glorot' is unknown"),
        ],
    )
    def test_verdict_on_what_went_wrong(self, params, status, message):
        result = cross_validate(cases.out_of_memory_above_32, params, cases.blobs(), cv=2, max_epochs=1)
        assert result["status"].tolist() == [status] * 2
        assert message in result["message"][0]

    def test_nan_score_is_an_error_and_no_score(self):
        result = cross_validate(
            cases.mlp, {}, cases.blobs(), cv=2, max_epochs=1, scoring=lambda estimator, rows, y: math.nan
        )
        assert result["status"].tolist() == ["error"] * 2
        assert "expected a finite score" in result["message"][0]

    def test_patience_goes_back_to_the_best_epoch(self):
        result = cross_validate(
            cases.mlp, {"lr": 3.0, "momentum": 0.9}, cases.blobs(), cv=2, max_epochs=40, patience=3,
            explosion=ExplosionRule(loss_factor=None, norm_factor=None),
        )  # fmt: skip
        for fold in range(2):
            accuracies = [epoch["accuracy"] for epoch in result["history"][fold]]
            assert result["test_score"][fold] == max(accuracies)
            assert result["epochs"][fold] == np.argmax(accuracies) + 1
            assert len(accuracies) == min(40, result["epochs"][fold] + 3)

    def test_target_ends_training(self):
        result = cross_validate(cases.mlp, {"lr": 0.1}, cases.blobs(), cv=2, max_epochs=100, target=0.9)
        assert (result["test_score"] >= 0.9).all()
        assert (result["epochs"] < 100).all()

    def test_last_batch_of_one_sample_joins_the_one_before(self):
        def normalised(params):
            return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

        result = cross_validate(
            normalised, {"batch_size": 20}, cases.blobs(), cv=[(range(41), range(41, 90))], max_epochs=1
        )
        assert (result["status"][0], result["steps"][0]) == ("ok", 2)

    def test_looking_every_few_steps_gives_the_same_weights(self):
        runs = [
            cross_validate(
                cases.mlp, {"lr": 0.1, "batch_size": 8}, cases.blobs(), cv=2, max_epochs=3, scoring="loss",
                explosion=ExplosionRule(every=every),
            )["test_score"].tolist()
            for every in (1, 5)
        ]  # fmt: skip
        assert runs[0] == runs[1]

    def test_lsuv_l1_l2_dropout_and_schedules_run_together(self):
        params = {"init": "lsuv", "l1": 1e-4, "l2": 1e-4, "dropout": 0.1, "scheduler": "one_cycle"}
        params |= {"optimizer": "adam", "lr": 0.05, "weight_decay": 1e-3}
        result = cross_validate(cases.dropping_out, params, cases.blobs(), cv=2, max_epochs=10)
        assert result["mean_test_score"] > 0.9

    def test_sequences_score_every_position(self):
        tokens = torch.arange(40).reshape(10, 4) % 5

        def tagger(params):
            return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))

        result = cross_validate(tagger, {"lr": 1.0}, tokens, tokens, cv=KFold(2), max_epochs=30)
        assert result["mean_test_score"] == 1.0


def test_nested_cv_scores_what_the_search_never_saw():
    from fastclip.tuner import Choice

    result = nested_cv(
        cases.mlp, {"lr": Choice([1e-6, 0.1])}, cases.blobs(), outer_cv=3, sampler="grid", cv=2, max_epochs=5
    )
    assert [params["lr"] for params in result["best_params"]] == [0.1] * 3
    assert result["mean_test_score"] == np.mean(result["test_score"]) > 0.9
    with pytest.raises(ValueError, match="output_dir='x'; expected it left out"):
        nested_cv(cases.mlp, {}, cases.blobs(), output_dir="x")
