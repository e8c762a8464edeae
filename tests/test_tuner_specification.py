"""The one frozen specification that every search and cross-validation is made from."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest
import tuner_cases as cases

from fastclip.tuner import TunerCV, cross_validate
from fastclip.tuner.config import STUDY_KEYS
from fastclip.tuner.study.specification import StudySpec

OF_THE_CALL = {"callbacks", "epoch_callbacks", "verbose"}
DEFAULTS = {field.name: field.default for field in fields(StudySpec)}


def parameters_of(function):
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "self"}


def test_it_holds_every_argument_of_a_search_with_its_default():
    arguments = parameters_of(TunerCV)
    assert set(DEFAULTS) == set(arguments) - OF_THE_CALL | {"caller"}
    optional = [name for name in DEFAULTS if name not in ("model_init", "space", "caller")]
    assert {name: DEFAULTS[name] for name in optional} == {name: arguments[name] for name in optional}


def test_cross_validation_has_the_defaults_of_a_search():
    shared = {name: default for name, default in parameters_of(cross_validate).items() if name in DEFAULTS}
    shared.pop("model_init")
    assert {"cv", "seed", "threads", "hang_timeout"} <= set(shared)
    assert shared == {name: DEFAULTS[name] for name in shared}


def test_it_is_what_the_estimator_was_given_and_frozen():
    tuner = cases.tuner(seed=7, cv=3, n_jobs=2)
    spec = StudySpec.of(tuner, "test")
    assert (spec.seed, spec.cv, spec.jobs, spec.caller) == (7, 3, 2, "test")
    assert list(spec.parameters.entries) == ["lr", "max_norm", "momentum"]
    with pytest.raises(FrozenInstanceError):
        spec.seed = 1


def test_a_study_file_may_set_what_has_no_section_of_its_own():
    assert {"name", "n_trials", "max_epochs", "sampler", "devices", "seed"} <= set(STUDY_KEYS)
    assert not {"cv", "space", "explosion", "model_init", "output_dir", "resume", "caller"} & set(STUDY_KEYS)
    assert len(STUDY_KEYS) == 21
