"""How far a result may be from the oracle, from the number of roundings on the longest path to it.

Notation: u = 2^-53 is the unit roundoff of float64, v = 2^-24 that of float32. k roundings of relative size u
cost at most k * u to first order (Higham, Accuracy and Stability of Numerical Algorithms, ch. 3 and 4); all
the bounds here are below 1e-3, where the terms of second order do not matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT64_UNIT = 2.0**-53
FLOAT32_UNIT = 2.0**-24

ACCEPTED_NORM_ERROR = 2e-7
"""What is promised for float32, bfloat16 and float16 at every size; every bound for 2-norms is near or
below."""

RUN = 8
"""float32 additions in a row of 16-bit elements, before the sum is widened; see csrc/cpu/norm.inl.h."""

DEVICE_RUN_ROUNDINGS = 4
"""float32 roundings that an element of 32 bits or fewer meets before the sum is widened on a GPU; see
csrc/cuda/accumulators.cuh."""

LOG_OF_LARGEST = 1024 * math.log(2)
"""|ln| of any float64: what the rounding of the exponent 1/p is multiplied by when the root is taken."""


def unit(dtype: torch.dtype) -> float:
    """Half the spacing of the numbers of this dtype just above 1."""
    return torch.finfo(dtype).eps / 2


def norm(dtype: torch.dtype, numel: int, norm_type: float, device: torch.device | str = "cpu") -> float:
    """Relative bound for the p-norm of `numel` elements, all of `dtype`.

    The inf-norm is exact. Otherwise at most `numel` float64 additions follow each other, in whatever order,
    each after a power (1 u); the oracle does no more, so twice that. Before, there are RUN additions in
    float32 for 16-bit types, and on a GPU DEVICE_RUN_ROUNDINGS for those and float32. The root divides the
    error of the sum by p and adds LOG_OF_LARGEST * u for the rounding of 1/p and one rounding of its own. The
    result is rounded to float32 unless the gradients are float64.
    """
    if norm_type == math.inf:
        return 0.0
    sum_error = 2 * (numel + 1) * FLOAT64_UNIT
    if torch.device(device).type == "cuda" and dtype != torch.float64:
        sum_error += DEVICE_RUN_ROUNDINGS * FLOAT32_UNIT
    elif dtype.itemsize == 2:
        sum_error += (RUN - 1) * FLOAT32_UNIT
    root_error = (LOG_OF_LARGEST + 2) * FLOAT64_UNIT
    returned = FLOAT64_UNIT if dtype == torch.float64 else FLOAT32_UNIT
    return sum_error / norm_type + root_error + returned


def scaled(dtype: torch.dtype, norm_bound: float) -> float:
    """Relative bound for an element times the coefficient of a norm with relative bound `norm_bound`.

    The coefficient has the error of the norm, an addition and a division, and is rounded to the type of
    the product (float64 for float64, else float32); then the product and its narrowing round.
    """
    if dtype == torch.float64:
        return norm_bound + 4 * FLOAT64_UNIT
    return norm_bound + 2 * FLOAT64_UNIT + 2 * FLOAT32_UNIT + unit(dtype)


def assert_norm(got: Tensor, want: float, bound: float, what: str = "norm") -> None:
    """Compare a norm with the oracle's; an infinite or undefined one must be so too."""
    wanted = torch.tensor(want, dtype=torch.float64)
    # A norm beyond the returned dtype is rounded to inf, and one below its normal range is spaced absolutely.
    if torch.isinf(wanted.to(got.dtype)) or math.isnan(want):
        wanted = wanted.to(got.dtype)
        assert got.cpu().numpy().tobytes() == wanted.numpy().tobytes() or (
            got.isnan() and math.isnan(want)
        ), f"{what}: {got.item()}, oracle {want}"
        return
    error = abs(got.item() - want)
    allowed = bound * abs(want) + half_subnormal(got.dtype)
    assert error <= allowed, (
        f"{what}: {got.item()!r}, oracle {want!r}: off by {error:.3g}, allowed {allowed:.3g}"
    )


def assert_scaled(got: Tensor, before: Tensor, want: Tensor, relative: float) -> None:
    """Compare scaled elements with the oracle's unrounded float64 ones; nan, inf and zeros must be where
    they are.

    A float32 coefficient below the normal range has the absolute error of its spacing, which the element
    multiplies;
    a result below the normal range of its dtype has the error of its own spacing.
    """
    assert got.shape == want.shape
    values, before = got.detach().to("cpu", torch.float64), before.detach().to("cpu", torch.float64)
    rounded = want.to(got.dtype).to(torch.float64)
    special = ~torch.isfinite(rounded)
    torch.testing.assert_close(values[special], rounded[special], rtol=0, atol=0, equal_nan=True)
    coefficient = half_subnormal(torch.float64 if got.dtype == torch.float64 else torch.float32)
    allowed = want.abs() * relative + before.abs() * coefficient + half_subnormal(got.dtype)
    excess = ((values - want).abs() - allowed)[~special]
    assert not bool((excess > 0).any()), f"off by {excess.max().item():.3g} more than allowed"
    assert not bool(excess.isnan().any())


def half_subnormal(dtype: torch.dtype) -> float:
    """Half the smallest positive number: the rounding error below the normal range; 0 for float64's own."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps / 2
