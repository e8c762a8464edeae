import pytest
import torch
import tuner_cases as cases
from torch import nn

from fastclip.tuner import WarmupExplodedError, cross_validate, suggest_clip_range


def test_threshold_clips_many_steps_and_the_top_of_the_range_few():
    found = suggest_clip_range(cases.mlp, cases.blobs(), params={"lr": 0.01, "batch_size": 10}, steps=90)
    assert found.low == 0.1 * found.max_norm < found.max_norm == found.quantiles[0.5] < found.high
    assert list(found.quantiles.values()) == sorted(found.quantiles.values())
    assert (found.dimension.low, found.dimension.high, found.dimension.log) == (found.low, found.high, True)
    shares = [
        cross_validate(
            cases.mlp,
            {"lr": 0.01, "batch_size": 10, "max_norm": max_norm},
            cases.blobs(),
            cv=3,
            max_epochs=10,
        )["clip_fraction"].mean()
        for max_norm in (found.max_norm, found.high)
    ]
    assert shares[0] > 0.5 > shares[1]


def test_norms_are_those_of_the_gradients():
    # A constant gradient: loss = 2 * w for inputs of 2, so each norm is 2.
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return self.w * x

    X = torch.full((20, 1), 2.0)  # noqa: N806
    found = suggest_clip_range(
        lambda params: Constant(), X, torch.zeros(20), steps=7, loss=lambda outputs, targets: outputs.mean()
    )
    assert found.quantiles == pytest.approx(dict.fromkeys(found.quantiles, 2.0))
    assert found.steps == 7


def test_max_norm_does_not_clip_the_warm_up():
    free, clipped = (
        suggest_clip_range(cases.mlp, cases.blobs(), params={"max_norm": max_norm}, steps=20)
        for max_norm in (None, 1e-6)
    )
    assert free == clipped


def test_exploding_warm_up_is_refused_with_a_rate_to_try():
    def steep(params):
        return nn.Linear(4, 1)

    X, y = cases.line()  # noqa: N806
    with pytest.raises(
        WarmupExplodedError, match=r"lr=10 exploded at step .* It stays finite at lr=0\.1: try"
    ) as e:
        suggest_clip_range(steep, X, y, params={"lr": 10.0}, steps=50)
    assert e.value.lr_to_try == pytest.approx(0.1)
    assert suggest_clip_range(steep, X, y, params={"lr": e.value.lr_to_try}, steps=50).max_norm > 0


def test_rate_that_is_not_to_blame_is_not_blamed():
    with pytest.raises(WarmupExplodedError, match="the rate is not the cause: look at init") as e:
        suggest_clip_range(cases.always_nan, cases.blobs())
    assert e.value.lr_to_try is None


def test_steps_must_be_positive():
    with pytest.raises(ValueError, match="steps=0"):
        suggest_clip_range(cases.mlp, cases.blobs(), steps=0)
