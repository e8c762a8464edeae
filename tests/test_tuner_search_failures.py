"""What a search makes of trials that fail, and of wrong arguments."""

import numpy as np
import optuna
import pytest
import torch
import tuner_cases as cases
from optuna.trial import TrialState
from tuner_cases import tuner

from fastclip.tuner import AllTrialsFailedError, Choice

optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_first_fold_that_fails_ends_the_search_with_its_message():
    with pytest.raises(AllTrialsFailedError, match="no such layer"):
        tuner(cases.broken).fit(cases.blobs())


def test_later_failure_costs_its_trial():
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
        ({"n_trials": 2.5}, TypeError, "n_trials=2.5; expected a whole number"),
        ({"resume": True}, ValueError, "no study to go on with"),
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
def test_wrong_arguments_are_refused_before_anything_starts(options, error, message, tmp_path):
    calls = []

    def model(params):
        calls.append(params)
        return cases.mlp(params)

    with pytest.raises(error, match=message):
        tuner(model, **options).fit(cases.blobs())
    assert calls == []


def test_model_must_be_a_function_that_returns_a_module():
    with pytest.raises(TypeError, match="model_init is a module; expected a function"):
        tuner(torch.nn.Linear(4, 3)).fit(cases.blobs())
    with pytest.raises(TypeError, match="model_init is a int"):
        tuner(5).fit(cases.blobs())
    with pytest.raises(AllTrialsFailedError, match="model_init returned a str; expected"):
        tuner(lambda params: "model").fit(cases.blobs())


def test_timeout_starts_no_new_trial():
    search = tuner(cases.slow, n_trials=None, timeout=0.2, refit=False)
    with pytest.raises(AllTrialsFailedError, match="1 out of time"):
        search.fit(cases.blobs())
    assert len(search.study_.trials) == 1
