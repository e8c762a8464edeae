import json
import math

import numpy as np
import optuna
import pytest
import torch
import tuner_cases as cases
from optuna.trial import TrialState
from sklearn.base import clone

from fastclip.tuner import (
    AllTrialsExplodedError,
    AllTrialsFailedError,
    Choice,
    ExplosionRule,
    Float,
    Int,
    ResumeError,
    TunerCV,
)
from fastclip.tuner.explosion import Verdict
from fastclip.tuner.output import OutputDir

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = {"lr": Float(0.01, 1.0, log=True), "max_norm": Float(0.1, 10.0, log=True), "momentum": 0.5}


def tuner(model=cases.mlp, space=None, **options):
    settings = {"cv": 2, "max_epochs": 3, "n_trials": 4, **options}
    return TunerCV(model, SPACE if space is None else space, **settings)


@pytest.fixture(scope="module")
def fitted():
    return tuner(n_trials=6, cv=3).fit(cases.blobs())


@pytest.fixture(scope="module")
def exploding():
    space = {"lr": Choice([0.1, 0.6, 0.7])}
    return tuner(cases.nan_above_half, space, sampler="grid", n_trials=None, cv=3).fit(cases.blobs())


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
        outputs = fitted.predict(X)
        assert fitted.score(X, y) == (outputs.argmax(1) == y).double().mean().item() > 0.9
        assert not fitted.best_estimator_.training

    def test_estimator_can_be_cloned_and_shown(self):
        original = tuner(seed=3)
        copied = clone(original)
        assert copied.get_params()["seed"] == 3
        assert "n_trials=4" in repr(original)
        assert copied.set_params(seed=4).seed == 4
        assert original.seed == 3

    def test_refit_with_patience_keeps_the_best_epoch(self):
        search = tuner(
            space={"lr": 3.0, "momentum": 0.9}, n_trials=1, max_epochs=40, patience=3, scoring="loss"
        )
        search.set_params(explosion=ExplosionRule(loss_factor=None, norm_factor=None)).fit(cases.blobs())
        losses = [epoch["loss"] for epoch in search.refit_run_.history]
        assert search.score(*cases.blobs()) == min(losses) < losses[-1]

    def test_without_refit_there_is_no_model(self):
        search = tuner(refit=False).fit(cases.blobs())
        assert search.best_params_["momentum"] == 0.5
        with pytest.raises(Exception, match="not fitted"):
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
        space = {"lr": Choice([0.01, 0.1]), "depth": Int(1, 3), "momentum": 0.5}
        search = tuner(space=space, sampler="grid", n_trials=None, refit=False).fit(cases.blobs())
        points = [(params["lr"], params["depth"]) for params in search.cv_results_["params"]]
        assert points == [(lr, depth) for lr in (0.01, 0.1) for depth in (1, 2, 3)]

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


class TestExplosions:
    def test_trial_is_told_as_the_worst_value_with_a_constraint(self, exploding):
        ok, exploded, _ = exploding.study_.trials
        assert ok.constraints == {"explosion": -1.0}
        assert (exploded.state, exploded.value) == (TrialState.COMPLETE, -math.inf)
        # The one fold that ran survived 3 of its 6 steps, out of 18 planned for three folds.
        assert exploded.constraints == {"explosion": pytest.approx(1 - 3 / 18)}
        assert exploded.user_attrs["steps_survived"] == 3
        assert exploding.study_.best_trial.number == 0

    def test_later_folds_are_not_run(self, exploding):
        results = exploding.cv_results_
        assert [results[f"split{i}_status"][1] for i in range(3)] == ["exploded", "not run", "not run"]
        assert results["split0_test_score"].tolist()[1:] == [-math.inf] * 2
        assert np.isnan(results["split1_test_score"][1:]).all()
        assert results["mean_test_score"].tolist()[1:] == [-math.inf] * 2
        assert results["rank_test_score"].tolist() == [1, 2, 2]

    def test_explosions_say_where_and_why(self, exploding):
        first = exploding.explosions_[0]
        assert (first["trial"], first["fold"], first["step"], first["params"]["lr"]) == (1, 0, 3, 0.6)
        assert first["reason"] == "the loss is nan"
        assert len(exploding.explosions_) == 2

    def test_loss_is_told_as_plus_infinity(self):
        space = {"lr": Choice([0.1, 0.6])}
        search = tuner(cases.nan_above_half, space, sampler="grid", n_trials=None, scoring="loss").fit(
            cases.blobs()
        )
        assert search.study_.trials[1].value == math.inf
        assert search.best_params_["lr"] == 0.1

    def test_all_exploded_is_an_error_with_advice(self):
        space = {"lr": Choice([0.2, 0.4]), "max_norm": Choice([None])}
        search = tuner(cases.always_nan, space, sampler="grid", n_trials=None)
        with pytest.raises(AllTrialsExplodedError) as caught:
            search.fit(cases.blobs())
        message = str(caught.value)
        assert "all 2 trials exploded" in message
        assert "survived 2 to 2 steps" in message
        assert "lr went from 0.2 to 0.4: search below 0.02" in message
        assert "2 of them did not clip: set max_norm" in message
        assert len(caught.value.explosions) == 2
        assert "best_params_" not in vars(search)

    def test_tpe_learns_from_explosions_what_it_does_not_learn_from_nan(self):
        # Half of the space explodes; a search that learns nothing from it would stay at one half.
        space = {"lr": Float(0.0, 1.0)}
        search = tuner(cases.nan_above_half, space, n_trials=40, cv=0.3, max_epochs=4, refit=False).fit(
            cases.blobs()
        )
        late = [record.status is Verdict.EXPLODED for record in search.records_[10:]]
        assert np.mean(late) <= 0.3

    def test_out_of_memory_is_told_like_an_explosion(self):
        space = {"batch_size": Choice([16, 64])}
        search = tuner(cases.out_of_memory_above_32, space, sampler="grid", n_trials=None).fit(cases.blobs())
        assert search.records_[1].status is Verdict.OOM
        assert search.study_.trials[1].value == -math.inf
        assert search.study_.trials[1].constraints == {"explosion": 1.0}

    def test_refit_that_explodes_falls_back_to_the_next_best(self):
        calls = []

        def model(params):
            calls.append(params["lr"])
            return cases.NanAfter(1) if len(calls) == 5 else cases.mlp(params)

        with pytest.warns(UserWarning, match="the refit exploded"):
            search = tuner(model, {"lr": Choice([0.1, 0.01])}, sampler="grid", n_trials=None).fit(
                cases.blobs()
            )
        assert calls[4] != calls[5]
        assert search.best_params_["lr"] == calls[5]
        assert search.best_score_ == search.cv_results_["mean_test_score"][search.best_index_]


class TestFailures:
    def test_first_fold_that_fails_ends_the_search_with_its_message(self):
        with pytest.raises(AllTrialsFailedError, match="no such layer"):
            tuner(cases.broken).fit(cases.blobs())

    def test_later_failure_costs_its_trial(self):
        def model(params):
            return cases.mlp(params) if params["lr"] == 0.1 else cases.broken(params)

        search = tuner(model, {"lr": Choice([0.1, 0.2])}, sampler="grid", n_trials=None).fit(cases.blobs())
        assert search.study_.trials[1].state == TrialState.FAIL
        assert search.cv_results_["rank_test_score"].tolist() == [1, 2]
        assert np.isnan(search.cv_results_["mean_test_score"][1])

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"n_trials": 0}, ValueError, "n_trials=0; expected at least 1"),
            ({"n_trials": None}, ValueError, "neither n_trials nor timeout"),
            ({"timeout": 0}, ValueError, "timeout=0"),
            ({"sampler": "bayes"}, ValueError, "sampler='bayes' is unknown; expected grid, random, tpe, gp"),
            ({"sampler": 3}, TypeError, "sampler=3"),
            ({"sampler": "grid"}, ValueError, "dimension 'lr' is continuous"),
            ({"pruner": "mean"}, ValueError, "pruner='mean' is unknown"),
            ({"pruner": 3}, TypeError, "pruner=3"),
            ({"max_epochs": 0}, ValueError, "max_epochs=0"),
            ({"patience": 0}, ValueError, "patience=0"),
            ({"n_jobs": 0}, ValueError, "n_jobs=0"),
            ({"executor": "threads"}, ValueError, "executor='threads' is unknown"),
            ({"threads": 0}, ValueError, "threads=0"),
            ({"seed": -1}, ValueError, "seed=-1"),
            ({"scoring": "acuracy"}, ValueError, "scoring='acuracy' is unknown"),
            ({"devices": []}, ValueError, "devices is empty"),
        ],
    )
    def test_wrong_arguments_are_refused_before_anything_starts(self, options, error, message, tmp_path):
        calls = []

        def model(params):
            calls.append(params)
            return cases.mlp(params)

        with pytest.raises(error, match=message):
            tuner(model, **options).fit(cases.blobs())
        assert calls == []

    def test_model_must_be_a_function_that_returns_a_module(self):
        with pytest.raises(TypeError, match="model_init is a module; expected a function"):
            tuner(torch.nn.Linear(4, 3)).fit(cases.blobs())
        with pytest.raises(TypeError, match="model_init is a int"):
            tuner(5).fit(cases.blobs())
        with pytest.raises(AllTrialsFailedError, match="model_init returned a str; expected"):
            tuner(lambda params: "model").fit(cases.blobs())

    def test_timeout_starts_no_new_trial(self):
        search = tuner(cases.slow, n_trials=None, timeout=0.2, refit=False).fit(cases.blobs())
        assert len(search.records_) == 1


class TestFiles:
    def test_same_seed_gives_identical_tables(self, tmp_path):
        tables = []
        for name in ("a", "b"):
            space = {"lr": Float(0.01, 1.0, log=True), "max_norm": Float(0.1, 10.0, log=True)}
            tuner(cases.nan_above_half, space, n_trials=14, output_dir=tmp_path / name).fit(cases.blobs())
            tables.append((tmp_path / name / "trials.csv").read_bytes())
        assert tables[0] == tables[1]
        assert tables[0].count(b"\n") == 15
        assert b"exploded,-inf" in tables[0]

    def test_directory_holds_everything(self, tmp_path):
        search = tuner(output_dir=tmp_path / "run").fit(cases.blobs())
        out = OutputDir(tmp_path / "run")
        names = {path.name for path in out.path.iterdir()}
        assert names == {
            "config.json",
            "study.db",
            "splits.npz",
            "trials.csv",
            "folds.csv",
            "history",
            "best_model.pt",
        }
        for (train, test), (train_read, test_read) in zip(search.splits_, out.read_splits(), strict=True):
            assert (train == train_read).all()
            assert (test == test_read).all()
        assert out.read_config()["settings"]["space"]["lr"] == {
            "type": "Float", "low": 0.01, "high": 1.0, "log": True, "step": None,
        }  # fmt: skip
        history = out.read_history(0, 1)
        assert len(history["history"]) == 3
        assert sum(history["norm_counts"].values()) == search.records_[0].folds[1].steps
        best = torch.load(out.path / "best_model.pt")
        assert best["score"] == search.best_score_
        model = cases.mlp(best["params"])
        model.load_state_dict(best["state_dict"])
        X, _ = cases.blobs()  # noqa: N806
        assert torch.equal(model(X), search.predict(X))

    def test_study_can_be_read_by_optuna_alone(self, tmp_path):
        search = tuner(output_dir=tmp_path).fit(cases.blobs())
        study = optuna.load_study(study_name="fastclip", storage=f"sqlite:///{tmp_path}/study.db")
        assert study.best_value == search.best_score_

    def test_nan_weights_are_never_written_as_the_best(self, tmp_path):
        model = cases.mlp({})
        with torch.no_grad():
            model[0].weight[0, 0] = math.nan
        with pytest.raises(ValueError, match=r"0\.weight has non-finite values"):
            OutputDir(tmp_path).write_best(model, {}, 1.0)
        assert list(tmp_path.iterdir()) == []

    def test_interrupted_write_leaves_the_old_file(self, tmp_path):
        from fastclip.tuner.files import atomic

        path = tmp_path / "table.csv"
        path.write_text("old")
        with pytest.raises(RuntimeError), atomic(path) as file:  # noqa: PT012
            file.write(b"half of the n")
            raise RuntimeError
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]
        with atomic(path) as file:
            file.write(b"new")
        (tmp_path / "ordinary").touch()
        assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode

    def test_json_is_standard_also_for_infinities(self, tmp_path):
        from fastclip.tuner.files import write_json

        write_json(tmp_path / "x.json", {"a": math.inf, "b": [np.float64("nan")], "c": np.int64(3)})
        assert json.loads((tmp_path / "x.json").read_text()) == {"a": "inf", "b": ["nan"], "c": 3}


def test_explosion_rule_reaches_the_folds():
    space = {"lr": Choice([1.0, 0.01]), "momentum": 0.9}
    rule = ExplosionRule(loss_factor=1.0001, norm_factor=None)
    search = tuner(space=space, sampler="grid", n_trials=None, explosion=rule, max_epochs=10)
    assert search.fit(cases.blobs()).explosions_[0]["reason"].startswith("the loss")


def test_trial_that_another_process_took_over_is_dropped(tmp_path):
    # What a process sees that was suspended for longer than stale_after: its trial was failed meanwhile.
    url = f"sqlite:///{tmp_path}/shared.db"

    def model(params):
        if params["lr"] == 0.2:
            study = optuna.load_study(study_name="fastclip", storage=url)
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
    space = {"lr": 0.1, "name": Choice(["a", "b"])}
    search = tuner(space=space, sampler="grid", n_trials=None, scoring="loss", refit=False).fit(cases.blobs())
    first, second = (record.folds for record in search.records_)
    assert [fold.score for fold in first] == [fold.score for fold in second]
    assert first[0].metrics == second[0].metrics
    assert first[0].score != first[1].score
