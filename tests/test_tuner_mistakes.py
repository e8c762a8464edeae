"""Models that are not new, studies of something else, searches that are stopped, scripts without a guard."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import tuner_cases as cases
from programs import run_python
from torch import nn
from tuner_cases import tuner

from fastclip.tuner import AllTrialsFailedError, ResumeError, TunerCV
from fastclip.tuner.study.fingerprints import callable_digest

optuna.logging.set_verbosity(optuna.logging.WARNING)


class TestSameModel:
    MODEL = cases.mlp({})

    @pytest.mark.parametrize(
        ("model_init", "message"),
        [
            (lambda p: TestSameModel.MODEL, "model_init returned the same Sequential twice"),
            (lambda p: nn.Sequential(TestSameModel.MODEL), r"share the parameter '0.0.weight'"),
        ],
        ids=["itself", "a part"],
    )
    def test_is_refused(self, model_init: Any, message: str) -> None:
        with pytest.raises(ValueError, match=f"{message}.* expected a new model at each call"):
            tuner(model_init).fit(cases.blobs())

    def test_copies_and_frozen_parts_are_taken(self) -> None:
        frozen = nn.Linear(4, 4).requires_grad_(False)
        for model_init in (
            lambda p: copy.deepcopy(self.MODEL),
            lambda p: nn.Sequential(frozen, nn.Linear(4, 3)),
        ):
            assert tuner(model_init, refit=False, n_trials=1).fit(cases.blobs()).best_score_ > 0


def narrow(params: dict[str, Any]) -> nn.Module:
    return nn.Linear(4, 3)


def sized(params: dict[str, Any], width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))


class TestResume:
    @pytest.mark.parametrize(
        ("changed", "name"),
        [
            ({"model": narrow}, "model"),
            ({"model": functools.partial(sized, width=5)}, "model"),
            ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss"),
            ({"data": cases.blobs(seed=1)}, "data"),
        ],
        ids=["model", "width", "loss", "data"],
    )
    def test_with_something_else_is_refused(self, changed: Any, name: str, tmp_path: Path) -> None:
        settings = {"model": functools.partial(sized, width=4), "data": cases.blobs()}
        settings |= {"loss": nn.CrossEntropyLoss()}

        def search(model: Any, data: Any, **options: Any) -> TunerCV:
            return tuner(model, n_trials=1, refit=False, output_dir=tmp_path, **options).fit(data)

        search(**settings)
        with pytest.raises(ResumeError, match=f"cannot resume, changed: {name}; expected the settings"):
            search(**{**settings, **changed}, resume=True)
        search(**settings, resume=True)

    def test_digest_sees_what_a_function_is_configured_with(self) -> None:
        def closing_over(width: int) -> Any:
            return lambda params: sized(params, width)

        digests = {
            callable_digest(function)
            for function in (
                *(closing_over(4), closing_over(5), functools.partial(sized, width=4)),
                *(functools.partial(sized, width=5), narrow, sized),
                *(nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=1)),
                nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])),
                *(lambda p: 1, lambda p: 2),
            )
        }
        assert len(digests) == 11

    def test_digest_is_the_same_for_the_same(self) -> None:
        def closing_over(width: int) -> Any:
            return lambda params: sized(params, width)

        assert callable_digest(closing_over(4)) == callable_digest(closing_over(4))
        assert callable_digest(nn.CrossEntropyLoss()) == callable_digest(nn.CrossEntropyLoss())

    def test_a_lambda_may_stand_in_a_call_that_changes(self, tmp_path: Path) -> None:
        for options in ({"n_trials": 1}, {"n_trials": 2, "resume": True}):
            search = tuner(lambda params: cases.mlp(params), output_dir=tmp_path, refit=False, **options)
            assert len(search.fit(cases.blobs()).records_) == options["n_trials"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "mse"}, "loss='mse'; expected a function of outputs and targets"),
        ({"explosion": 3}, "explosion=3; expected an ExplosionRule or None"),
        ({"n_jobs": "2"}, "n_jobs='2'; expected a whole number or None"),
        ({"callbacks": print}, "callbacks=.* expected a list of functions"),
        ({"epoch_callbacks": [1]}, r"epoch_callbacks=\[1\]; expected a list of functions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_argument_of_another_type_is_told_before_anything_is_written(
    wrong: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        tuner(output_dir=tmp_path / "run", **wrong).fit(cases.blobs())
    assert not (tmp_path / "run").exists()


def test_a_bar_that_cannot_be_shown_is_told_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fastclip.tuner.tuner_cv.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="rich is not installed; expected the extra `cli` for verbose=True"):
        tuner(output_dir=tmp_path / "run", verbose=True).fit(cases.blobs())
    assert not (tmp_path / "run").exists()


def test_a_single_sample_without_its_dimension_is_refused() -> None:
    X, y = cases.blobs()  # noqa: N806
    search = tuner(n_trials=1).fit(X, y)
    assert search.predict(X[:1]).shape == (1,)
    for ask in (search.predict, search.predict_proba, lambda row: search.score(row, y[:4])):
        with pytest.raises(
            ValueError, match=r"X has the shape \(4,\); expected .* \('n', 4\)\. .* X\[None\]"
        ):
            ask(X[0])


def test_a_negative_class_is_named() -> None:
    X, y = cases.blobs()  # noqa: N806
    with pytest.raises(AllTrialsFailedError, match="the smallest class is -1; expected 0 or above"):
        tuner(n_trials=1).fit(X, torch.where(y > 0, 1, -1))


class TestStopping:
    def test_stop_in_a_callback_ends_the_search(self) -> None:
        def stop(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            if trial.number == 1:
                study.stop()

        search = tuner(callbacks=[stop], n_trials=9).fit(cases.blobs())
        assert len(search.records_) == 2
        assert search.best_score_ > 0
        with pytest.raises(RuntimeError, match="supposed to be invoked inside"):
            search.study_.stop()

    @pytest.mark.parametrize("where", ["memory", "shared"])
    def test_max_trials_callback(self, where: str, tmp_path: Path) -> None:
        callback = optuna.study.MaxTrialsCallback(3)
        storage = None if where == "memory" else f"sqlite:///{tmp_path}/study.db"
        search = tuner(callbacks=[callback], n_trials=None, timeout=60, storage=storage, refit=False)
        assert len(search.fit(cases.blobs()).records_) == 3

    def test_a_stopped_search_goes_on(self, tmp_path: Path) -> None:
        options = {"n_trials": 4, "output_dir": tmp_path, "refit": False}
        tuner(callbacks=[optuna.study.MaxTrialsCallback(1)], **options).fit(cases.blobs())
        assert len(tuner(resume=True, **options).fit(cases.blobs()).records_) == 4


UNGUARDED = """
import tuner_cases as cases
from fastclip.tuner import TunerCV
TunerCV(cases.mlp, {"lr": 0.1}, n_trials=1, cv=2, max_epochs=1, n_jobs=2, output_dir="run").fit(cases.blobs())
"""

# As `python search.py` would: workers find the script, too.
RUN_SCRIPT = """
import multiprocessing, runpy, sys
multiprocessing.current_process()._config["daemon"] = False  # it may have workers
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_several_jobs_without_a_main_guard_are_told_in_one_sentence(tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(UNGUARDED)
    done = run_python(RUN_SCRIPT, str(script))
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "MainGuardError" in last
    assert "expected that call under `if __name__ == '__main__':`" in last
