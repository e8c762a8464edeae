"""`search_clipped`: folds trained with ClippedOptimizer have the verdicts and results of two steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import tuner_cases as cases
from torch import nn

import fastclip
from fastclip import strategies
from fastclip.tuner import ExplosionRule, TunerCV, Verdict, cross_validate
from fastclip.tuner.errors import ResumeError
from fastclip.tuner.training.batching import steps
from fastclip.tuner.training.losses import default_loss
from fastclip.tuner.training.reading import as_data
from fastclip.tuner.training.stepping import Stepper

CPU = torch.device("cpu")
PARAMS: dict[str, Any] = {"lr": 0.2, "max_norm": 0.5, "momentum": 0.9, "weight_decay": 0.01, "batch_size": 16}
NUMBERS = ("train_loss", "loss", "accuracy", "lr", "grad_norm_median", "grad_norm_max", "clip_fraction")
ROUNDING = 1e-4  # of float32 after some dozens of steps that each round otherwise


def both(params: dict[str, Any], model: Any = cases.mlp, **options: Any) -> list[dict[str, Any]]:
    """The same cross-validation in two steps and in one."""
    settings = {"cv": 2, "max_epochs": 4, **options}
    return [
        cross_validate(model, params, cases.blobs(), search_clipped=clipped, **settings)
        for clipped in (False, True)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw", "lr": 0.01, "momentum": None},
        {"optimizer": "rmsprop", "lr": 0.001},
        {"max_norm": None},
        {"norm_type": float("inf"), "max_norm": 0.05},
        {"scheduler": "one_cycle"},
        {"strategy": "MedianMAD", "max_norm": None},
        {"strategy": strategies.Skip(strategies.MedianMAD()), "max_norm": None},
        {"strategy": "AGC", "max_norm": None},
        {"l2": 0.01, "accumulate": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes)) or "sgd",
)
def test_results_are_those_of_two_steps(changes: dict[str, Any]) -> None:
    two, one = both({**PARAMS, **changes})
    assert one["status"].tolist() == two["status"].tolist() == ["ok", "ok"]
    assert one["steps"].tolist() == two["steps"].tolist()
    assert one["clip_fraction"].tolist() == two["clip_fraction"].tolist()
    if changes.get("max_norm", 1) is not None:
        assert one["clip_fraction"].max() > 0
    for first, second in zip(two["history"], one["history"], strict=True):
        for name in NUMBERS:
            found, expected = ([epoch[name] for epoch in history] for history in (second, first))
            assert found == pytest.approx(expected, rel=ROUNDING), name


@pytest.mark.parametrize(
    ("model", "changes"),
    [(cases.always_nan, {}), (cases.mlp, {"lr": 1e4, "max_norm": None}), (cases.nan_above_half, {"lr": 0.6})],
    ids=["nan", "rate", "later"],
)
def test_verdicts_and_steps_survived_are_those_of_two_steps(model: Any, changes: dict[str, Any]) -> None:
    rule = ExplosionRule(loss_steps=2)
    two, one = both({**PARAMS, **changes}, model, explosion=rule)
    assert one["status"].tolist() == two["status"].tolist() == ["exploded", "exploded"]
    assert one["steps"].tolist() == two["steps"].tolist()
    assert [text[:30] for text in one["message"]] == [text[:30] for text in two["message"]]


def stepper_of(model: nn.Module, params: dict[str, Any]) -> Stepper:
    return Stepper(model, params, default_loss, ExplosionRule(), 10, device=CPU, search_clipped=True)


def test_the_step_is_that_of_the_wrapper_and_its_outcome_is_what_is_told() -> None:
    torch.manual_seed(0)
    model, data = cases.mlp({}), as_data(cases.blobs(), caller="test")
    stepper = stepper_of(model, PARAMS)
    wrapper = stepper.update.optimizer
    assert isinstance(wrapper, fastclip.ClippedOptimizer)
    norms = []
    for parts in steps(data, np.arange(90), PARAMS, CPU):
        stepper.step(parts)
        assert wrapper.last is not None
        norms.append(float(wrapper.last.total_norm))
    assert stepper.norms == norms
    assert stepper.run.clipped_steps == wrapper.stats().clipped == sum(norm > 0.5 for norm in norms) > 0
    assert wrapper.stats().steps == stepper.run.steps == 6


def test_what_is_not_finite_leaves_the_weights_as_they_were() -> None:
    model = cases.NanAfter(0)
    before = [p.detach().clone() for p in model.parameters()]
    stepper = stepper_of(model.train(), PARAMS)
    stepper.step([(torch.ones(4, 4), torch.tensor([0, 1, 2, 0]), 1.0)])
    assert stepper.run.explosion is not None
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_search_trains_and_refits_with_it_and_a_resume_without_is_refused(tmp_path) -> None:
    options = {"search_clipped": True, "output_dir": tmp_path / "run", "n_trials": 2}
    found = cases.tuner(**options).fit(cases.blobs())
    assert [record.status for record in found.records_] == [Verdict.OK, Verdict.OK]
    assert found.score(cases.blobs()) > 0.9
    with pytest.raises(ResumeError, match="search_clipped: was True, is False"):
        TunerCV(**{**found.get_params(), "search_clipped": False, "resume": True}).fit(cases.blobs())
