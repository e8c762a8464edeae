"""The float64 definitions of what fastclip computes: slow, plain, and the oracle of the tests.

Works on tensors of any device and float dtype by copying them to float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

NORM_EPSILON = 1e-6
"""Added to the norm before dividing, as torch does."""


def total_norm(tensors: Iterable[Tensor], norm_type: float = 2.0) -> float:
    """Return the p-norm, p > 0 or inf, of all elements together.

    The elements are scaled by a power of two near the largest, so nothing over- or underflows, and summed by
    torch in float64, pairwise. nan if any element is nan, else inf if any is infinite or if the norm is
    beyond float64.
    """
    vectors = [t.detach().to("cpu", torch.float64).reshape(-1) for t in tensors]
    vectors = [v for v in vectors if v.numel()]
    if any(bool(v.isnan().any()) for v in vectors):
        return math.nan
    largest = max((float(v.abs().max()) for v in vectors), default=0.0)
    if largest in (0.0, math.inf) or norm_type == math.inf:
        return largest
    # Two factors: the inverse of the smallest subnormal is itself out of range.
    exponent = math.frexp(largest)[1]
    first, second = 2.0 ** -(exponent // 2), 2.0 ** -(exponent - exponent // 2)
    power_sum = math.fsum(float(((v * first) * second).abs().pow(norm_type).sum()) for v in vectors)
    try:
        return math.ldexp(power_sum ** (1.0 / norm_type), exponent)
    except OverflowError:
        return math.inf


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Return min(1, max_norm / (norm + 1e-6)); nan if either is nan."""
    coefficient = max_norm / (norm + NORM_EPSILON)
    return 1.0 if coefficient > 1.0 else coefficient


def clipped(tensors: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> list[Tensor]:
    """Return what each tensor becomes, in float64 and unrounded."""
    listed = list(tensors)
    asks_for_norm_only = max_norm == math.inf
    coefficient = 1.0 if asks_for_norm_only else clip_coefficient(total_norm(listed, norm_type), max_norm)
    return [t.detach().to("cpu", torch.float64) * coefficient for t in listed]
