"""Parameter groups of a trial: weight decay of weights alone, or whatever a function makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tuner_cases as cases
from torch import nn

from fastclip.tuner import Choice, Float, Verdict, cross_validate
from fastclip.tuner.errors import ResumeError
from fastclip.tuner.training.optimisers import make_optimizer


def normed(params: dict[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, cases.NUM_CLASSES))


def layerwise(model: nn.Module, params: dict[str, Any]) -> list[dict[str, Any]]:
    """The first layer learns at a share of the rate."""
    first, *rest = model.children()
    return [
        {"params": first.parameters(), "lr": params["lr"] * params["lr_share"]},
        {"params": [p for module in rest for p in module.parameters()]},
    ]


def forgetful(model: nn.Module, params: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": next(model.parameters())}]


def doubled(model: nn.Module, params: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": model.parameters()}, {"params": [next(model.parameters())]}]


def limited(model: nn.Module, params: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": model.parameters(), "max_norm": 0.1}]


def no_list(model: nn.Module, params: dict[str, Any]) -> Any:
    return model.parameters()


class TestNoDecay:
    def test_weights_decay_and_biases_and_norms_do_not(self) -> None:
        model = normed({})
        optimizer = make_optimizer(model, {"lr": 0.1, "weight_decay": 0.5, "no_decay": True})
        decayed, rest = optimizer.param_groups
        assert [tuple(p.shape) for p in decayed["params"]] == [(8, 4), (3, 8)]
        assert [tuple(p.shape) for p in rest["params"]] == [(8,), (8,), (8,), (3,)]
        assert (decayed["weight_decay"], rest["weight_decay"]) == (0.5, 0.0)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), old * 0.95 if p.ndim == 2 else old)

    def test_without_it_or_without_a_decay_there_is_one_group(self) -> None:
        for params in ({"no_decay": False}, {"no_decay": True, "optimizer": "rprop"}, {}):
            (group,) = make_optimizer(normed({}), {"weight_decay": 0.5, **params}).param_groups
            assert len(group["params"]) == 6

    def test_what_is_frozen_is_in_no_group_and_no_group_is_empty(self) -> None:
        model = nn.Linear(4, 2)
        model.weight.requires_grad_(False)
        (group,) = make_optimizer(model, {"weight_decay": 0.5, "no_decay": True}).param_groups
        assert group["params"] == [model.bias]
        assert group["weight_decay"] == 0.0

    def test_it_acts_in_a_search(self) -> None:
        space = {"lr": 0.2, "weight_decay": 0.5, "no_decay": Choice([False, True])}
        found = cases.tuner(normed, space, sampler="grid", n_trials=None, refit=False).fit(cases.blobs())
        first, second = (record.folds[0].metrics["loss"] for record in found.records_)
        assert first != second

    def test_where_nothing_decays_it_is_refused_before_training(self) -> None:
        space = {"optimizer": "rprop", "lr": 0.01, "no_decay": True}
        with pytest.raises(ValueError, match="'no_decay' acts in no trial: the optimizer takes no"):
            cases.tuner(space=space).fit(cases.blobs())


class TestFunction:
    def test_its_groups_are_those_of_the_optimizer(self) -> None:
        params = {"lr": 0.1, "lr_share": 0.25, "momentum": 0.9, "param_groups": layerwise}
        model = normed({})
        slow, fast = make_optimizer(model, params).param_groups
        assert (slow["lr"], fast["lr"], slow["momentum"]) == (0.025, 0.1, 0.9)
        assert [len(slow["params"]), len(fast["params"])] == [2, 4]

    @pytest.mark.parametrize("clipped", [False, True])
    def test_parameters_that_it_alone_reads_are_known_and_act(self, clipped: bool) -> None:
        space = {"lr": 0.1, "lr_share": Choice([0.0, 1.0]), "param_groups": layerwise, "max_norm": 1.0}
        found = cases.tuner(
            normed, space, sampler="grid", n_trials=None, refit=False, search_clipped=clipped
        ).fit(cases.blobs())
        assert [record.status for record in found.records_] == [Verdict.OK, Verdict.OK]
        first, second = (record.folds[0].metrics["loss"] for record in found.records_)
        assert first != second

    def test_a_search_is_not_resumed_with_another(self, tmp_path) -> None:
        options = {"n_trials": 1, "refit": False, "output_dir": tmp_path / "run"}
        space = {"lr": Float(0.05, 0.1), "lr_share": 0.5, "param_groups": layerwise}
        cases.tuner(normed, space, **options).fit(cases.blobs())
        other = {**space, "param_groups": lambda model, params: [*layerwise(model, params)]}
        with pytest.raises(ResumeError, match="changed: space"):
            cases.tuner(normed, other, resume=True, **options).fit(cases.blobs())

    @pytest.mark.parametrize(
        ("function", "error", "message"),
        [
            (forgetful, ValueError, r"0\.bias is in 0 groups; expected one for each parameter"),
            (doubled, ValueError, r"0\.weight is in 2 groups; expected one"),
            (no_list, TypeError, r"group 0 is a Parameter without params; expected dicts"),
            ("all", TypeError, r"param_groups='all'; expected a function"),
        ],
    )
    def test_wrong_groups_are_named(self, function: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            make_optimizer(normed({}), {"param_groups": function})

    def test_both_kinds_are_refused(self) -> None:
        with pytest.raises(ValueError, match="both param_groups and no_decay are given"):
            make_optimizer(normed({}), {"param_groups": layerwise, "no_decay": True})

    def test_a_threshold_of_its_own_needs_search_clipped(self) -> None:
        params = {"lr": 1.0, "param_groups": limited}
        data, options = cases.blobs(), {"cv": 2, "max_epochs": 4}
        assert "expected search_clipped=True" in cross_validate(normed, params, data, **options)["message"][0]
        result = cross_validate(normed, params, data, search_clipped=True, **options)
        assert result["status"].tolist() == ["ok", "ok"]
        assert result["clip_fraction"].tolist() == [1.0, 1.0]
