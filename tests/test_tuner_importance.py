"""Importances of parameters that some trials do not choose."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
import tuner_cases as cases
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import create_trial
from report_cases import MadeUpStudy, scored

from fastclip.tuner.report import StudyView, search_plots
from fastclip.tuner.report.importance import ABSENT, _with_place, importances_of

optuna.logging.set_verbosity(optuna.logging.WARNING)


def trials_of(distributions, *columns):
    """Trials whose parameters are the columns; None is not chosen."""
    names = list(distributions)
    for row in zip(*columns, strict=True):
        chosen = {name: value for name, value in zip(names, row, strict=True) if value is not None}
        yield create_trial(
            params=chosen, distributions={name: distributions[name] for name in chosen}, value=0.0
        )


RNG = np.random.default_rng(0)
RATES = np.exp(RNG.uniform(np.log(1e-3), 0.0, 60)).tolist()
THRESHOLDS = [None if i % 3 == 0 else value for i, value in enumerate(RNG.uniform(0.01, 1.0, 60).tolist())]
FLOATS = {"lr": FloatDistribution(1e-3, 1.0, log=True), "max_norm": FloatDistribution(0.01, 1.0)}


def test_a_threshold_that_may_be_none_counts_where_the_score_hangs_on_it():
    trials = list(trials_of(FLOATS, RATES, THRESHOLDS))
    hangs_on_clipping = importances_of(trials, [float(value is None) for value in THRESHOLDS])
    assert hangs_on_clipping["max_norm"] > 0.9
    hangs_on_rate = importances_of(trials, np.log(RATES).tolist())
    assert hangs_on_rate["lr"] > 0.9
    assert sum(hangs_on_rate.values()) == pytest.approx(1.0)


def test_half_of_the_variance_of_a_threshold_that_half_of_the_trials_have():
    # The score is 1 unclipped, and clipped 1 or 0 by the rate: Var = 3/16; the mean given lr is 1 or 1/2
    # (variance 1/16), given the threshold 1 or 1/2 (1/16), and the rest is their interaction.
    rates = RNG.uniform(0.0, 1.0, 400).tolist()
    thresholds = [None if i % 2 else value for i, value in enumerate(RNG.uniform(0.0, 1.0, 400).tolist())]
    trials = trials_of(
        {"lr": FloatDistribution(0.0, 1.0), "max_norm": FloatDistribution(0.0, 1.0)}, rates, thresholds
    )
    values = [1.0 if limit is None or lr > 0.5 else 0.0 for lr, limit in zip(rates, thresholds, strict=True)]
    assert importances_of(list(trials), values) == pytest.approx({"lr": 0.5, "max_norm": 0.5}, abs=0.05)


@pytest.mark.parametrize("log", [False, True])
def test_the_place_of_those_without_takes_their_share_of_the_range(log):
    wider, place = _with_place(FloatDistribution(0.1, 10.0, log=log), 0.25)
    ends = [wider.low, 10.0, place, wider.high]
    low, high, place, end = np.log(ends) if log else ends
    assert (end - high) / (end - low) == pytest.approx(0.25)
    assert place - high == pytest.approx(0.01 * (end - high))


def test_whole_numbers_and_choices_have_a_place_too():
    wider, place = _with_place(IntDistribution(1, 5), 0.5)
    assert (wider.low, wider.high, place) == (1.0, 9.0, 5.04)
    wider, absent = _with_place(CategoricalDistribution(("a", None)), 0.5)
    assert (wider.choices, absent) == (("a", None, ABSENT), ABSENT)


def test_a_parameter_whose_range_changes_is_left_out():
    first = {**FLOATS, "depth": IntDistribution(1, 3)}
    trials = [*trials_of(first, RATES[:9], THRESHOLDS[:9], [1, 2, 3] * 3)]
    trials += trials_of({**first, "depth": IntDistribution(1, 4)}, RATES[9:12], THRESHOLDS[9:12], [1, 2, 4])
    assert set(importances_of(trials, RATES[:12])) == {"lr", "max_norm"}


def test_the_report_of_a_search_that_may_not_clip_has_the_picture():
    def space(trial):
        limit = trial.suggest_float("max_norm", 0.1, 1.0) if trial.number % 2 else None
        return {"lr": trial.suggest_float("lr", 1e-3, 2.0, log=True), "max_norm": limit}

    found = cases.tuner(space=space, sampler="random", n_trials=8, refit=False, max_epochs=1).fit(
        cases.blobs()
    )
    axes = search_plots.importances(StudyView(found.study_, None)).axes[0]
    assert {label.get_text() for label in axes.get_yticklabels()} == {"lr", "max_norm"}


def test_made_up_study_without_thresholds_has_none():
    study = MadeUpStudy()
    for i in range(8):
        study.add(scored(0.1 * i), lr=0.01 * (i + 1), max_norm=None)
    assert importances_of(study.study.trials, [0.1 * i for i in range(8)]) == {}
