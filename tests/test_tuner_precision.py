"""Folds in lower precision: where autocast acts, and what a scaler's overflows mean."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import tuner_cases as cases
from torch import nn

from fastclip.tuner import Choice, ExplosionRule, TunerRegressor, Verdict, cross_validate
from fastclip.tuner.training.batching import steps
from fastclip.tuner.training.losses import default_loss
from fastclip.tuner.training.reading import as_data
from fastclip.tuner.training.stepping import Stepper

CPU = torch.device("cpu")
PARAMS: dict[str, Any] = {"lr": 0.2, "max_norm": 0.5, "momentum": 0.9, "batch_size": 30}
CLIPPED = pytest.mark.parametrize("clipped", [False, True], ids=["two steps", "search_clipped"])
TYPES = {None: torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
seen: set[tuple[bool, torch.dtype]] = set()


class Noting(nn.Module):
    """Notes the type of its outputs, and whether it was training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, cases.NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(x)
        seen.add((self.training, outputs.dtype))
        return outputs


def noting(params: dict[str, Any]) -> nn.Module:
    return Noting()


@pytest.mark.parametrize("amp", TYPES)
@CLIPPED
def test_training_and_measuring_happen_in_the_same_precision(amp: str | None, clipped: bool) -> None:
    seen.clear()
    space = {**PARAMS, "amp": amp}
    search = cases.tuner(noting, space, n_trials=1, search_clipped=clipped).fit(cases.blobs())
    assert seen == {(True, TYPES[amp]), (False, TYPES[amp])}
    seen.clear()
    outputs = search.outputs(cases.blobs())
    assert search.score(cases.blobs()) > 0.9
    assert outputs.dtype == torch.float32
    assert seen == {(False, TYPES[amp])}
    assert all(p.dtype == torch.float32 for p in search.best_estimator_.parameters())


def test_precision_is_that_of_torch_by_hand() -> None:
    torch.manual_seed(0)
    model = cases.mlp({})
    inputs, targets = cases.blobs()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(inputs)
    loss = nn.functional.cross_entropy(outputs.float(), targets)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    stepper = make_stepper(model, {**PARAMS, "amp": "bfloat16"})
    stepper.step([(inputs, targets, 1.0)])
    assert stepper._losses == [pytest.approx(loss.item(), rel=1e-6)]
    assert stepper.norms == [pytest.approx(norm.item(), rel=1e-5)]


@CLIPPED
@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_results_are_near_those_of_float32(amp: str, clipped: bool) -> None:
    results = [
        cross_validate(
            cases.mlp, {**PARAMS, "amp": name}, cases.blobs(), cv=2, max_epochs=4, search_clipped=clipped
        )
        for name in (None, amp)
    ]
    losses = [[[epoch["loss"] for epoch in fold] for fold in result["history"]] for result in results]
    assert losses[0] != losses[1]
    assert np.array(losses[1]) == pytest.approx(np.array(losses[0]), rel=0.03)
    norms = [[[epoch["grad_norm_max"] for epoch in fold] for fold in result["history"]] for result in results]
    assert np.array(norms[1]) == pytest.approx(np.array(norms[0]), rel=0.05)  # unscaled before they are told


def make_stepper(model: nn.Module, params: dict[str, Any], *, clipped: bool = False) -> Stepper:
    return Stepper(
        model, params, default_loss, ExplosionRule(), 10, device=CPU, search_clipped=clipped
    )  # fmt: skip


class Steep(nn.Module):
    """A gradient of 4 in the first steps and small ones after; 4 x 65536 is too much for float16."""

    def __init__(self, steep_steps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1))
        self.left = steep_steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= self.training
        return (x @ self.weight) * (1.0 if self.left >= 0 else 1e-3)


def mean_of_outputs(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.mean()


@CLIPPED
def test_an_overflow_is_left_out_and_is_no_explosion(clipped: bool) -> None:
    model = Steep(2)
    stepper = Stepper(
        model.train(), {**PARAMS, "amp": "float16", "max_norm": 1.0}, mean_of_outputs, ExplosionRule(), 10,
        device=CPU, search_clipped=clipped,
    )  # fmt: skip
    before = model.weight.detach().clone()
    part = (torch.full((4, 4), 4.0), torch.zeros(4), 1.0)
    for _ in range(2):
        stepper.step([part])
    assert torch.equal(model.weight, before)
    assert (stepper.run.steps, stepper.norms, stepper.run.explosion) == (2, [], None)
    assert stepper.update.scaler is not None
    assert stepper.update.scaler.get_scale() == 2.0**16 / 4
    stepper.step([part])
    assert not torch.equal(model.weight, before)
    assert stepper.norms == [pytest.approx(4e-3 * 2, rel=1e-3)]
    record = stepper.end_epoch()
    assert (record["clip_fraction"], stepper.run.steps) == (0.0, 3)


@CLIPPED
def test_gradients_that_no_scale_cures_are_an_explosion(clipped: bool) -> None:
    model = Steep(math.inf)
    stepper = Stepper(
        model.train(), {**PARAMS, "amp": "float16"}, lambda outputs, _: (outputs - outputs).sqrt().mean(),
        ExplosionRule(), 10, device=CPU, search_clipped=clipped,
    )  # fmt: skip
    taken = 0
    while stepper.run.explosion is None and taken < 100:
        stepper.step([(torch.ones(4, 4), torch.zeros(4), 1.0)])
        taken += 1
    assert taken == 18  # the scale begins at 2^16 and is below 1 after 17 halvings
    assert stepper.run.explosion is not None
    assert stepper.run.explosion["reason"].startswith("the gradient norm is ")


def test_a_loss_that_is_not_finite_is_an_explosion_at_once() -> None:
    result = cross_validate(
        cases.always_nan, {**PARAMS, "amp": "float16"}, cases.blobs(), cv=2, max_epochs=4
    )  # fmt: skip
    assert result["status"].tolist() == ["exploded", "exploded"]
    assert result["message"] == ["the loss is nan"] * 2
    assert result["steps"].tolist() == [2, 2]


def test_a_search_may_choose_it_and_an_estimator_predicts_in_it() -> None:
    space = {"lr": 0.05, "amp": Choice([None, "bfloat16"])}
    found = cases.tuner(space=space, sampler="grid", n_trials=None).fit(cases.blobs())
    assert [record.status for record in found.records_] == [Verdict.OK, Verdict.OK]
    losses = [record.folds[0].metrics["loss"] for record in found.records_]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    X, y = cases.line()  # noqa: N806
    regressor = TunerRegressor(
        cases.linear_regressor, {"lr": 0.1, "amp": "bfloat16"}, n_trials=1, cv=2, max_epochs=5
    ).fit(X.numpy(), y.numpy())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = regressor.best_estimator_(X).float().reshape(-1)
    assert regressor.predict(X.numpy()).tolist() == expected.tolist()


def test_an_unknown_precision_is_named() -> None:
    data = as_data(cases.blobs(), caller="test")
    with pytest.raises(ValueError, match="amp='half'; expected None or one of bfloat16, float16"):
        make_stepper(cases.mlp({}), {"amp": "half"})
    assert len(list(steps(data, np.arange(90), {"batch_size": 30}, CPU))) == 3
