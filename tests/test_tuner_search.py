"""What a search finds, by every sampler, and what it remembers."""

import numpy as np
import optuna
import pytest
import torch
import tuner_cases as cases
from optuna.trial import TrialState
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from tuner_cases import tuner

from fastclip.tuner import Choice, Float, Int, ResumeError
from fastclip.tuner.study.storage import open_storage
from fastclip.tuner.training.explosion import Verdict

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module")
def fitted():
    return tuner(n_trials=6, cv=3).fit(cases.blobs())


class TestResults:
    def test_attributes_agree(self, fitted):
        results = fitted.cv_results_
        assert (
            fitted.best_score_
            == results["mean_test_score"].max()
            == results["mean_test_score"][fitted.best_index_]
        )
        assert results["rank_test_score"][fitted.best_index_] == 1
        assert results["params"][fitted.best_index_] == fitted.best_params_
        assert isinstance(fitted.study_, optuna.Study)
        assert fitted.study_.best_value == fitted.best_score_
        assert fitted.explosions_ == []

    def test_keys_are_scikit_learns_and_more(self, fitted):
        per_split = {
            f"split{i}_{what}" for i in range(3) for what in ("test_score", "status", "clip_fraction")
        }
        assert set(fitted.cv_results_) == per_split | {
            *("mean_fit_time", "std_fit_time", "mean_score_time", "std_score_time"),
            *("param_lr", "param_max_norm", "param_momentum", "params"),
            *("mean_test_score", "std_test_score", "rank_test_score"),
        }
        assert {len(column) for column in fitted.cv_results_.values()} == {6}

    def test_mean_is_the_plain_mean_of_the_folds(self, fitted):
        folds = np.stack([fitted.cv_results_[f"split{i}_test_score"] for i in range(3)])
        assert fitted.cv_results_["mean_test_score"].tolist() == folds.mean(axis=0).tolist()

    def test_refitted_model_predicts_new_data(self, fitted):
        X, y = cases.blobs(seed=1)  # noqa: N806
        assert fitted.score(X, y) == (fitted.predict(X) == y.numpy()).mean() > 0.9
        assert (fitted.outputs(X).argmax(1).numpy() == fitted.predict(X)).all()
        assert not fitted.best_estimator_.training

    def test_estimator_can_be_cloned_and_shown(self):
        original = tuner(seed=3)
        copied = clone(original)
        assert copied.get_params()["seed"] == 3
        assert "n_trials=4" in repr(original)
        assert copied.set_params(seed=4).seed == 4
        assert original.seed == 3

    def test_refit_takes_the_median_of_the_folds_best_epochs(self):
        search = tuner(
            space={"lr": 0.3, "momentum": 0.9}, n_trials=1, cv=3, max_epochs=40, patience=3, scoring="loss"
        )
        search.fit(cases.blobs())
        epochs = [fold.epochs for fold in search.records_[0].folds]
        assert len(search.refit_run_.history) == np.median(epochs) < 40

    def test_refit_on_a_holdout_goes_back_to_its_best_epoch(self):
        search = tuner(
            space={"lr": 0.3, "momentum": 0.9}, n_trials=1, max_epochs=40, patience=3, scoring="loss",
            refit_on="holdout",
        )  # fmt: skip
        search.fit(cases.blobs())
        losses = [epoch["loss"] for epoch in search.refit_run_.history]
        assert len(losses) == min(40, np.argmin(losses) + 1 + 3)
        assert search.score(*cases.blobs()) != losses[-1]

    def test_unknown_refit_is_refused(self):
        with pytest.raises(ValueError, match="check_refit_on: refit_on='some'; expected one of all, holdout"):
            tuner(refit_on="some").fit(cases.blobs())

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_refit_does_not_overfit_a_noisy_task(self, seed):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(800, 20)).astype("float32")
        y = (x[:, 0] + rng.normal(size=800)).astype("float32")

        def wide(params):
            return torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))

        losses = []
        for patience in (3, None):
            search = tuner(
                wide,
                {"lr": 0.01, "momentum": 0.9},
                n_trials=1,
                cv=5,
                max_epochs=60,
                patience=patience,
                scoring="loss",
                seed=seed,
            ).fit(x[:200], y[:200])
            losses.append(search.score(x[200:], y[200:]))
        assert losses[0] < 0.9 * losses[1]

    def test_without_refit_there_is_no_model(self):
        search = tuner(refit=False).fit(cases.blobs())
        assert search.best_params_["momentum"] == 0.5
        with pytest.raises(
            NotFittedError, match="no best_estimator_; expected one that ended with refit=True"
        ):
            search.score(*cases.blobs())

    def test_several_measures(self):
        search = tuner(scoring=["accuracy", "loss"], refit="loss").fit(cases.blobs())
        results = search.cv_results_
        assert search.best_index_ == results["mean_test_loss"].argmin()
        assert search.study_.direction == optuna.study.StudyDirection.MINIMIZE
        assert {"split0_test_accuracy", "mean_test_accuracy", "rank_test_loss"} <= set(results)

    def test_callbacks_see_each_finished_trial(self):
        seen = []
        tuner(callbacks=[lambda study, trial: seen.append((trial.number, trial.state))]).fit(cases.blobs())
        assert seen == [(i, TrialState.COMPLETE) for i in range(4)]


class TestSamplers:
    @pytest.mark.parametrize(
        "sampler", ["random", "tpe", "gp", optuna.samplers.NSGAIISampler(seed=0)], ids=str
    )
    def test_search_finds_a_rate_that_learns(self, sampler):
        search = tuner(sampler=sampler, n_trials=12, max_epochs=2, refit=False).fit(cases.blobs())
        assert len(search.cv_results_["params"]) == 12
        assert search.best_score_ > 0.9

    def test_gp_survives_explosions(self):
        space = {"lr": Float(0.01, 1.0)}
        search = tuner(cases.nan_above_half, space, sampler="gp", n_trials=14, max_epochs=4, refit=False)
        statuses = [record.status for record in search.fit(cases.blobs()).records_]
        assert {Verdict.OK, Verdict.EXPLODED} == set(statuses)
        assert statuses[10:].count(Verdict.EXPLODED) <= 1

    def test_grid_without_n_trials_runs_whole(self):
        space = {"lr": Choice([0.01, 0.1]), "batch_size": Int(10, 12), "momentum": 0.5}
        search = tuner(space=space, sampler="grid", n_trials=None, refit=False).fit(cases.blobs())
        points = [(params["lr"], params["batch_size"]) for params in search.cv_results_["params"]]
        assert points == [(lr, size) for lr in (0.01, 0.1) for size in (10, 11, 12)]

    def test_study_of_ones_own_is_used(self):
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))
        assert tuner(sampler=study).fit(cases.blobs()).study_ is study
        assert len(study.trials) == 4
        with pytest.raises(ValueError, match=r"directions are \['minimize'\]; expected maximize"):
            tuner(sampler=optuna.create_study()).fit(cases.blobs())

    def test_space_may_be_a_function(self):
        def space(trial):
            clipped = trial.suggest_categorical("clip", [True, False])
            max_norm = trial.suggest_float("max_norm", 0.1, 10, log=True) if clipped else None
            return {"lr": trial.suggest_float("lr", 0.01, 1.0, log=True), "max_norm": max_norm}

        search = tuner(space=space, n_trials=8).fit(cases.blobs())
        assert {params["max_norm"] is None for params in search.cv_results_["params"]} == {True, False}
        assert set(search.best_params_) == {"lr", "max_norm"}

    def test_rate_and_threshold_searched_as_product(self):
        space = {"lr_x_max_norm": Float(1e-2, 1.0, log=True), "max_norm": Float(0.1, 10.0, log=True)}
        for params in tuner(space=space).fit(cases.blobs()).cv_results_["params"]:
            assert params["lr"] == params["lr_x_max_norm"] / params["max_norm"]

    def test_pruner_ends_trials_early(self):
        space = {"lr": Choice([0.1, 1e-7])}
        pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=1)
        search = tuner(space=space, sampler="grid", n_trials=None, pruner=pruner, max_epochs=5).fit(
            cases.blobs()
        )
        first, second = search.records_
        assert (first.status, second.status) == (Verdict.OK, Verdict.PRUNED)
        assert [fold.status for fold in second.folds] == [Verdict.PRUNED, Verdict.NOT_RUN]
        assert second.folds[0].epochs < 5
        assert search.study_.trials[1].state == TrialState.PRUNED


def test_trial_that_another_process_took_over_is_dropped(tmp_path):
    # What a process sees that was suspended for longer than stale_after: its trial was failed meanwhile.
    url = f"sqlite:///{tmp_path}/shared.db"

    def model(params):
        if params["lr"] == 0.2:
            study = optuna.load_study(study_name="fastclip", storage=open_storage(url))
            trial_id = study.trials[1]._trial_id
            if study.trials[1].state == TrialState.RUNNING:
                study._storage.set_trial_state_values(trial_id, TrialState.FAIL)
        return cases.mlp(params)

    space = {"lr": Choice([0.1, 0.2, 0.3])}
    search = tuner(model, space, sampler="grid", n_trials=None, storage=url, refit=False).fit(cases.blobs())
    assert [record.number for record in search.records_] == [0, 2]


def test_shared_storage_goes_on_only_when_told_to(tmp_path):
    options = {"storage": f"sqlite:///{tmp_path}/shared.db", "study_name": "mine", "refit": False}
    tuner(n_trials=2, **options).fit(cases.blobs())
    with pytest.raises(ResumeError, match="holds a study 'mine'; expected a new name"):
        tuner(n_trials=4, **options).fit(cases.blobs())
    with pytest.raises(ResumeError, match=r"changed: max_epochs; expected .* max_epochs: was 3, is 4"):
        tuner(n_trials=4, max_epochs=4, resume=True, **options).fit(cases.blobs())
    resumed = tuner(n_trials=4, resume=True, **options).fit(cases.blobs())
    assert [record.number for record in resumed.records_] == [0, 1, 2, 3]


def test_folds_are_paired_across_trials():
    # Two trials that differ in nothing that training reads: same model, same batches, same scores.
    def named(params):
        return cases.mlp({"name": params["name"]})

    space = {"lr": 0.1, "name": Choice(["a", "b"])}
    search = tuner(named, space, sampler="grid", n_trials=None, scoring="loss", refit=False).fit(
        cases.blobs()
    )
    first, second = (record.folds for record in search.records_)
    assert [fold.score for fold in first] == [fold.score for fold in second]
    assert first[0].metrics == second[0].metrics
    assert first[0].score != first[1].score
