"""A strategy as a parameter of a search: by name with settings, as an object, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tuner_cases as cases
from torch import nn
from tuner_cases import tuner

from fastclip import strategies
from fastclip.strategies import Decision, Gradients, Strategy
from fastclip.tuner import Choice, Float, cross_validate
from fastclip.tuner.training.clipping import Clipper, find_strategy, make_strategy


class Counting(Strategy):
    """Halves every gradient, and leaves out every third step; notes how often it was asked."""

    asked = 0

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def decide(self, gradients: Gradients) -> Decision:
        Counting.asked += 1
        self.steps += 1
        return Decision(torch.full((1,), 0.5, dtype=torch.float64), None, torch.tensor(self.steps % 3 == 0))


def test_names_of_any_case_and_their_settings() -> None:
    for name in ("MedianMAD", "median_mad", "medianmad", "MEDIAN_MAD"):
        assert find_strategy(name) is strategies.MedianMAD
    made = make_strategy({"strategy": "ema", "strategy__ratio": 2.0, "strategy__decay": None, "lr": 1.0})
    assert repr(made) == repr(strategies.Ema(ratio=2.0))
    assert make_strategy({"strategy": None}) is None
    assert make_strategy({}) is None
    given = strategies.Skip(strategies.MedianMAD())
    assert repr(make_strategy({"strategy": given})) == repr(given)
    assert make_strategy({"strategy": given}) is not given


def test_what_is_no_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy='MedianMed' is unknown.*Did you mean 'MedianMAD'\?"):
        find_strategy("MedianMed")
    with pytest.raises(TypeError, match=r"strategy=1\.0; expected a name"):
        make_strategy({"strategy": 1.0})
    with pytest.raises(ValueError, match="MedianMAD: k=-1"):
        make_strategy({"strategy": "MedianMAD", "strategy__k": -1})


def test_each_clipper_has_a_strategy_of_its_own_and_says_what_it_did() -> None:
    param = nn.Parameter(torch.zeros(4))
    told = []
    for _ in range(2):
        clipper = Clipper({"strategy": Counting()}, [param])
        for _ in range(3):
            param.grad = torch.full((4,), 2.0)
            norm, clipped, is_outlier = clipper.clip()
            told.append((float(norm), bool(clipped), is_outlier, float(param.grad[0])))
    assert told[:3] == [(4.0, True, False, 1.0), (4.0, True, False, 1.0), (4.0, True, True, 2.0)]
    assert told[3:] == told[:3]
    fixed = Clipper({"max_norm": 1.0}, [param])
    param.grad = torch.full((4,), 2.0)
    assert [bool(fixed.clip()[1]) for _ in range(2)] == [True, False]


def test_a_search_among_strategies_and_none() -> None:
    space: dict[str, Any] = {
        "lr": 0.1,
        "max_norm": 0.5,
        "strategy": Choice(["MedianMAD", "PerTensor", None]),
        "strategy__k": Float(1.0, 4.0),
    }
    found = tuner(space=space, sampler="random", n_trials=6, refit=False).fit(cases.blobs())
    chosen = [record.params["strategy"] for record in found.records_]
    assert {"MedianMAD", "PerTensor", None} >= set(chosen)
    assert len(set(chosen)) > 1
    assert all(record.has_score for record in found.records_)


def test_an_object_is_asked_in_every_step_and_its_outliers_are_left_out() -> None:
    Counting.asked = 0
    params = {"strategy": Counting(), "lr": 0.1, "batch_size": 20}
    result = cross_validate(cases.mlp, params, cases.blobs(), cv=2, max_epochs=2)
    assert Counting.asked == sum(result["steps"])
    assert all(share == 1.0 for share in result["clip_fraction"])


def test_a_setting_of_another_strategy_is_refused() -> None:
    search = tuner(space={"strategy": "PerTensor", "strategy__k": Float(1, 2)})
    with pytest.raises(ValueError, match="strategy__k"):
        search.fit(cases.blobs())
