"""Parameters and spaces: every value acts as it is meant, or is refused before anything is trained."""

from __future__ import annotations

import copy
from typing import Any

import optuna
import pytest
import torch
import torch.nn.functional as F
import tuner_cases as cases
from scipy import stats
from torch import nn
from tuner_cases import tuner

from fastclip.tuner import Choice, Float, Int, Space, cross_validate, suggest_clip_range
from fastclip.tuner.training.optimisers import make_optimizer
from fastclip.tuner.training.parameters import RecordingDict

optuna.logging.set_verbosity(optuna.logging.WARNING)


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
