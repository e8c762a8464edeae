"""Mistakes that would go unnoticed: they are refused before anything is trained, with what to do instead."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import torch.nn.functional as F
import tuner_cases as cases
from scipy import stats
from torch import nn
from tuner_cases import tuner

from fastclip.tuner import Choice, Float, Int, ResumeError, Space, TunerCV, cross_validate, suggest_clip_range
from fastclip.tuner.study.fingerprints import callable_digest
from fastclip.tuner.training.optimisers import make_optimizer
from fastclip.tuner.training.parameters import RecordingDict

optuna.logging.set_verbosity(optuna.logging.WARNING)
HERE = Path(__file__).parent


def refused(space: Any, model: Any = cases.mlp, **options: Any) -> str:
    """The message of a search that must not begin."""
    search = tuner(model, space, **options)
    with pytest.raises(ValueError, match="TunerCV: parameter") as error:
        search.fit(cases.blobs())
    assert not hasattr(search, "study_")
    return str(error.value)


class TestUnreadParameters:
    @pytest.mark.parametrize(
        ("name", "meant"),
        [("learning_rate", "lr"), ("max_nrom", "max_norm"), ("max_grad_norm", "max_norm"),
         ("bach_size", "batch_size"), ("labelsmoothing", "label_smoothing"), ("widht", "width")],
    )  # fmt: skip
    def test_nearest_name_is_proposed(self, name: str, meant: str) -> None:
        def model(params: dict[str, Any]) -> nn.Module:
            params.get("width", 8)
            return cases.mlp(params)

        message = refused({name: Float(0.01, 0.1)}, model)
        assert f"parameter {name!r} is read by nobody" in message
        assert message.endswith(f"Did you mean {meant}?")

    def test_name_that_the_model_misses_is_proposed_before_its_own(self) -> None:
        message = refused({"widht": Int(2, 4)}, lambda params: nn.Linear(4, params["width"]))
        assert message.endswith("Did you mean width?")

    @pytest.mark.parametrize(
        ("space", "message"),
        [
            ({"betas": (0.9, 0.99)}, "the optimizer 'sgd' does not take it"),
            ({"optimizer": ["adam", "adamw"], "nesterov": True}, r"('adam', 'adamw') does not take it"),
            ({"dropout": Float(0.1, 0.5)}, "the model has no dropout to set"),
            ({"init_gain": Float(0.5, 2.0)}, "init is 'default', which keeps the weights"),
            ({"init": "default", "init_gain": 2.0}, "init is 'default', which keeps the weights"),
        ],
    )
    def test_known_name_that_acts_nowhere_is_refused(self, space: Any, message: str) -> None:
        assert message in refused(space)

    @pytest.mark.parametrize("name", ["label_smoothing", "class_weight"])
    def test_what_belongs_to_the_default_loss_is_refused_with_another(self, name: str) -> None:
        assert "it belongs to cross-entropy" in refused({name: 0.1}, loss=F.cross_entropy)

    @pytest.mark.parametrize(
        "space",
        [
            {"optimizer": ["sgd", "adam"], "momentum": 0.9, "betas": (0.9, 0.99)},
            {"init": ["default", "orthogonal"], "init_gain": Float(0.5, 2.0)},
            {"momentum": 0.9, "nesterov": True, "label_smoothing": 0.1, "class_weight": "balanced"},
            {"max_norm": None, "dropout": None},
        ],
    )
    def test_what_acts_in_some_trial_is_taken(self, space: Any) -> None:
        assert tuner(space={"lr": 0.1, **space}, refit=False).fit(cases.blobs()).best_score_ > 0

    def test_what_one_architecture_reads_is_taken(self) -> None:
        def model(params: dict[str, Any]) -> nn.Module:
            if params["kind"] == "deep":
                return nn.Sequential(nn.Linear(4, params["width"]), nn.Linear(params["width"], 3))
            return cases.mlp(params)

        space = {"kind": ["flat", "wide", "deep"], "width": Int(4, 8)}
        tuner(model, space, refit=False, n_trials=1).fit(cases.blobs())
        with pytest.raises(ValueError, match="'width' is read by nobody"):
            tuner(model, {**space, "kind": ["flat", "wide"]}).fit(cases.blobs())

    def test_function_spaces_and_single_settings_are_looked_at(self) -> None:
        assert "Did you mean lr?" in refused(
            lambda trial: {"learning_rate": trial.suggest_float("l", 0.1, 1)}
        )
        with pytest.raises(
            ValueError, match=r"cross_validate: parameter 'momentun' .* Did you mean momentum"
        ):
            cross_validate(cases.mlp, {"momentun": 0.9}, cases.blobs())
        with pytest.raises(ValueError, match=r"suggest_clip_range: parameter 'momentun'"):
            suggest_clip_range(cases.mlp, cases.blobs(), params={"momentun": 0.9, "init_gain": 2.0})

    @pytest.mark.parametrize(
        ("use", "read"),
        [
            (lambda p: p["a"], {"a"}),
            (lambda p: p.get("a"), {"a"}),
            (lambda p: "a" in p, {"a"}),
            (lambda p: p.pop("a"), {"a"}),
            (lambda p: dict(p), {"a", "b"}),
            (lambda p: {**p}, {"a", "b"}),
            (lambda p: (lambda **k: k)(**p), {"a", "b"}),
            (lambda p: list(p.items()), {"a", "b"}),
            (lambda p: p.copy(), {"a", "b"}),
            (lambda p: p | {"c": 1}, {"a", "b"}),
            (lambda p: {"c": 1} | p, {"a", "b"}),
            (lambda p: copy.deepcopy(p), {"a", "b"}),
            (lambda p: repr(p), set()),
            (lambda p: p.get("c"), set()),
        ],
    )
    def test_a_recording_dict_notes_what_is_read(self, use: Any, read: set[str]) -> None:
        params = RecordingDict({"a": 1, "b": 2})
        use(params)
        assert params.read == read

    def test_a_model_that_keeps_its_parameters_may_read_them_later(self) -> None:
        class Scaled(nn.Module):
            def __init__(self, params: dict[str, Any]) -> None:
                super().__init__()
                self.config = {"all": params}
                self.layer = nn.Linear(4, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.layer(x) * self.config["all"]["scale"]

        space = {"lr": 0.1, "scale": [1.0, 2.0]}
        assert tuner(Scaled, space, refit=False, n_trials=2).fit(cases.blobs()).best_score_ > 0

    def test_the_callers_randomness_is_untouched(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        refused({"max_nrom": 1.0})
        assert torch.rand(1) == expected


class TestOptimizerArguments:
    def test_every_argument_reaches_its_optimizer(self) -> None:
        params = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "betas": (0.8, 0.99), "eps": 1e-6, "depth": 3}
        sgd = make_optimizer(nn.Linear(2, 1), params).defaults
        adam = make_optimizer(nn.Linear(2, 1), {**params, "optimizer": "adam", "amsgrad": True}).defaults
        assert (sgd["nesterov"], sgd["momentum"]) == (True, 0.9)
        assert (adam["betas"], adam["eps"], adam["amsgrad"]) == ((0.8, 0.99), 1e-6, True)

    def test_arguments_of_a_factory_are_its_own(self) -> None:
        def make(params: Any, lr: float, trust: float) -> torch.optim.Optimizer:
            return torch.optim.SGD(params, lr=lr * trust)

        optimizer = make_optimizer(nn.Linear(2, 1), {"optimizer": make, "lr": 0.1, "trust": 0.5, "width": 3})
        assert optimizer.defaults["lr"] == 0.05

        def make_any(params: Any, **settings: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(params, **settings)

        optimizer = make_optimizer(nn.Linear(2, 1), {"optimizer": make_any, "betas": (0.8, 0.9), "width": 3})
        assert optimizer.defaults["betas"] == (0.8, 0.9)


class TestSpaces:
    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            (optuna.distributions.FloatDistribution(0.1, 1.0, log=True), Float(0.1, 1.0, log=True)),
            (optuna.distributions.IntDistribution(2, 8, step=2), Int(2, 8, step=2)),
            (optuna.distributions.CategoricalDistribution(["a", "b"]), Choice(["a", "b"])),
            (stats.uniform(0.5, 1.5), Float(0.5, 2.0)),
            (stats.loguniform(0.01, 1.0), Float(0.01, 1.0, log=True)),
            (stats.randint(2, 9), Int(2, 8)),
            ([0.1, 0.2], Choice([0.1, 0.2])),
            (torch.linspace(1, 2, 2).numpy(), Choice([1.0, 2.0])),
            (range(2, 4), Choice([2, 3])),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_others_call_a_dimension_is_one(self, given: Any, meant: Any) -> None:
        assert Space({"lr": given}).entries == {"lr": meant}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (stats.norm(0, 1), "lr is scipy's norm; expected uniform, loguniform, randint, or Float"),
            ((1e-3, 1e-1), r"lr = \(0.001, 0.1\) is a tuple; expected one value, Float\(low, high\)"),
            ({"low": 0.1, "high": 1.0}, "is a dict; expected one value"),
            ({0.1, 0.2}, "is a set; expected one value"),
        ],
        ids=["norm", "tuple", "dict", "set"],
    )
    def test_what_only_looks_like_one_is_refused(self, given: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            Space({"lr": given})

    def test_a_function_that_returns_dimensions_is_refused(self) -> None:
        with pytest.raises(
            TypeError, match=r"returned lr = Float.* as trial.suggest_float\(name, low, high\)"
        ):
            tuner(space=lambda trial: {"lr": Float(0.1, 1.0)}).fit(cases.blobs())

    def test_several_values_are_no_single_setting(self) -> None:
        with pytest.raises(ValueError, match=r"cross_validate: lr = Choice.*; expected one value"):
            cross_validate(cases.mlp, {"lr": [0.1, 0.2]}, cases.blobs())


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


def test_several_jobs_without_a_main_guard_are_told_in_one_sentence(tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(UNGUARDED)
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "MainGuardError" in last
    assert "expected that call under `if __name__ == '__main__':`" in last
