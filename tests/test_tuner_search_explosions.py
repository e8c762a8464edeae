"""What a search makes of trials that explode."""

import math

import numpy as np
import optuna
import pytest
import tuner_cases as cases
from optuna.trial import TrialState
from tuner_cases import tuner

from fastclip.tuner import AllTrialsExplodedError, Choice, ExplosionRule, Float
from fastclip.tuner.training.explosion import Verdict

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module")
def exploding():
    space = {"lr": Choice([0.1, 0.6, 0.7])}
    return tuner(cases.nan_above_half, space, sampler="grid", n_trials=None, cv=3).fit(cases.blobs())


def test_trial_is_told_as_the_worst_value_with_a_constraint(exploding):
    ok, exploded, _ = exploding.study_.trials
    assert ok.constraints == {"explosion": -1.0}
    assert (exploded.state, exploded.value) == (TrialState.COMPLETE, -math.inf)
    # The one fold that ran survived 3 of its 6 steps, out of 18 planned for three folds.
    assert exploded.constraints == {"explosion": pytest.approx(1 - 3 / 18)}
    assert exploded.user_attrs["steps_survived"] == 3
    assert exploding.study_.best_trial.number == 0


def test_later_folds_are_not_run(exploding):
    results = exploding.cv_results_
    assert [results[f"split{i}_status"][1] for i in range(3)] == ["exploded", "not run", "not run"]
    assert results["split0_test_score"].tolist()[1:] == [-math.inf] * 2
    assert np.isnan(results["split1_test_score"][1:]).all()
    assert results["mean_test_score"].tolist()[1:] == [-math.inf] * 2
    assert results["rank_test_score"].tolist() == [1, 2, 2]


def test_explosions_say_where_and_why(exploding):
    first = exploding.explosions_[0]
    assert (first["trial"], first["fold"], first["step"], first["params"]["lr"]) == (1, 0, 3, 0.6)
    assert first["reason"] == "the loss is nan"
    assert len(exploding.explosions_) == 2


def test_loss_is_told_as_plus_infinity():
    space = {"lr": Choice([0.1, 0.6])}
    search = tuner(cases.nan_above_half, space, sampler="grid", n_trials=None, scoring="loss").fit(
        cases.blobs()
    )
    assert search.study_.trials[1].value == math.inf
    assert search.best_params_["lr"] == 0.1


def test_all_exploded_is_an_error_with_advice():
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


def test_tpe_learns_from_explosions_what_it_does_not_learn_from_nan():
    # Half of the space explodes; a search that learns nothing from it would stay at one half.
    space = {"lr": Float(0.0, 1.0)}
    search = tuner(cases.nan_above_half, space, n_trials=40, cv=0.3, max_epochs=4, refit=False).fit(
        cases.blobs()
    )
    late = [record.status is Verdict.EXPLODED for record in search.records_[10:]]
    assert np.mean(late) <= 0.3


def test_out_of_memory_is_told_like_an_explosion():
    space = {"batch_size": Choice([16, 64])}
    search = tuner(cases.out_of_memory_above_32, space, sampler="grid", n_trials=None).fit(cases.blobs())
    assert search.records_[1].status is Verdict.OOM
    assert search.study_.trials[1].value == -math.inf
    assert search.study_.trials[1].constraints == {"explosion": 1.0}


def test_refit_that_explodes_falls_back_to_the_next_best():
    calls = []

    def model(params):
        calls.append(params["lr"])
        return cases.NanAfter(1) if len(calls) == 7 else cases.mlp(params)

    with pytest.warns(UserWarning, match="the refit exploded"):
        search = tuner(model, {"lr": Choice([0.1, 0.01])}, sampler="grid", n_trials=None).fit(cases.blobs())
    assert calls[6] != calls[7]  # after two calls that try the function, and four folds
    assert search.best_params_["lr"] == calls[7]
    assert search.best_score_ == search.cv_results_["mean_test_score"][search.best_index_]


def test_explosion_rule_reaches_the_folds():
    space = {"lr": Choice([20.0, 0.01]), "batch_size": 60}
    rule = ExplosionRule(loss_factor=1.5, loss_steps=1, norm_factor=None)
    search = tuner(space=space, sampler="grid", n_trials=None, explosion=rule, max_epochs=10)
    assert search.fit(cases.blobs()).explosions_[0]["reason"].startswith("the loss")
