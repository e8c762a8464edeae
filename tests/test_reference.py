"""The oracle, against numbers worked out by hand."""

import math

import pytest
import torch

from fastclip import reference


@pytest.mark.parametrize(
    ("values", "norm_type", "norm"),
    [
        ([3.0, 4.0], 2, 5.0),
        ([1.0, 2.0, 2.0], 2, 3.0),
        ([-1.0, 2.0, -3.0], 1, 6.0),
        ([-1.0, 2.0, -7.0, 3.0], math.inf, 7.0),
        ([1.0, 4.0], 0.5, 9.0),  # (1 + 2)^2
        ([3.0, -4.0, 5.0], 3, 6.0),  # 27 + 64 + 125 = 216
        ([4.0, 4.0, 4.0, 4.0], 2.5, 4 * 4**0.4),
        ([2.0], 100, 2.0),
        ([-0.0, 0.0], 2, 0.0),
        ([], 2, 0.0),
    ],
)
def test_norms_by_hand(values: list[float], norm_type: float, norm: float) -> None:
    got = reference.total_norm([torch.tensor(values, dtype=torch.float64)], norm_type)
    assert got == pytest.approx(norm, rel=1e-15)


def test_several_tensors_are_one_vector() -> None:
    tensors = [torch.tensor([[2.0], [3.0]]), torch.tensor(6.0), torch.empty(0, 4)]
    assert reference.total_norm(tensors) == 7.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_beyond_float32(dtype: torch.dtype) -> None:
    value = torch.tensor(6e31, dtype=dtype)
    assert reference.total_norm([value.expand(4)]) == 2 * value.double().item()


@pytest.mark.parametrize("value", [1e200, 1e-200, 2.0**1021, 5e-324, 2.0**-1022])
@pytest.mark.parametrize("norm_type", [1, 2, 100])
def test_powers_beyond_float64(value: float, norm_type: float) -> None:
    got = reference.total_norm([torch.full((4,), value, dtype=torch.float64)], norm_type)
    want = value * 4 ** (1 / norm_type)
    if want < 2.0**-1022:
        want = round(want / 5e-324) * 5e-324
    assert got == pytest.approx(want, rel=1e-13, abs=0)


def test_a_norm_beyond_float64_is_inf() -> None:
    assert (
        reference.total_norm([torch.full((4,), torch.finfo(torch.float64).max, dtype=torch.float64)])
        == math.inf
    )


@pytest.mark.parametrize("norm_type", [1, 2, math.inf, 0.5, 3])
@pytest.mark.parametrize(
    ("values", "norm"),
    [
        ([1.0, math.inf], math.inf),
        ([-math.inf, 0.0], math.inf),
        ([math.nan, 1.0], math.nan),
        ([math.inf, math.nan], math.nan),
    ],
)
def test_nonfinite(values: list[float], norm: float, norm_type: float) -> None:
    got = reference.total_norm([torch.tensor([2.0]), torch.tensor(values)], norm_type)
    assert got == norm or (math.isnan(got) and math.isnan(norm))


@pytest.mark.parametrize(
    ("norm", "max_norm", "coefficient"),
    [
        (4.0, 2.0, 2.0 / (4.0 + 1e-6)),
        (1.0, 2.0, 1.0),
        (0.0, 0.0, 0.0),
        (5.0, 0.0, 0.0),
        (math.inf, 1.0, 0.0),
        (1.0, -2.0, -2.0 / (1.0 + 1e-6)),
    ],
)
def test_coefficient_by_hand(norm: float, max_norm: float, coefficient: float) -> None:
    assert reference.clip_coefficient(norm, max_norm) == coefficient


@pytest.mark.parametrize(("norm", "max_norm"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, math.inf)])
def test_coefficient_of_nan(norm: float, max_norm: float) -> None:
    assert math.isnan(reference.clip_coefficient(norm, max_norm))


def test_clipped_by_hand() -> None:
    first, second = reference.clipped([torch.tensor([3.0]), torch.tensor([[-4.0]])], max_norm=1.0)
    assert first.tolist() == [3.0 / (5.0 + 1e-6)]
    assert second.tolist() == [[-4.0 / (5.0 + 1e-6)]] or second.item() == pytest.approx(
        -4 / (5 + 1e-6), rel=1e-15
    )


def test_clipped_below_the_threshold_is_unchanged() -> None:
    assert reference.clipped([torch.tensor([3.0, 4.0])], max_norm=5.1)[0].tolist() == [3.0, 4.0]


def test_infinite_max_norm_asks_for_the_norm_alone() -> None:
    (kept,) = reference.clipped([torch.tensor([math.inf, 1.0])], max_norm=math.inf)
    assert kept.tolist() == [math.inf, 1.0]
