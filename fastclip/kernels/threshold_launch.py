"""The one launch by which a strategy learns from a step. Nothing here synchronizes with the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastclip.kernels.launch import Blocks
from fastclip.kernels.thresholds import (
    ema_kernel,
    median_mad_kernel,
    norm_stabilised_kernel,
    percentile_kernel,
    percentile_of_all_kernel,
    quantile_servo_kernel,
    skip_kernel,
    zscore_kernel,
)

LARGEST_WINDOW = 1024
"""That one program is to sort; above, torch sorts."""

NORMS_PER_PROGRAM = 128
HISTORY_PER_PROGRAM = 1024

OF_STATE = Blocks(rows=0, threads=128, programs_per_unit=1)


def median_mad(
    norm: Tensor,
    skipped: Tensor | None,
    window: Tensor,
    threshold: Tensor,
    k: float,
    warmup: int,
    factor: float,
) -> None:
    """Learn as `strategies.MedianMAD` does."""
    length = window.numel()
    median_mad_kernel[(1,)](
        *(norm, _byte(skipped), window, threshold, length, warmup, k, factor),
        BLOCK=_block(length),
        **OF_STATE.options(),
    )


def percentile(
    norm: Tensor, skipped: Tensor | None, window: Tensor, threshold: Tensor, share: float, warmup: int
) -> None:
    """Learn as `strategies.Percentile` with a window does."""
    length = window.numel()
    percentile_kernel[(1,)](
        *(norm, _byte(skipped), window, threshold, length, warmup, share),
        BLOCK=_block(length),
        **OF_STATE.options(),
    )


def percentile_of_all(
    norm: Tensor,
    skipped: Tensor | None,
    history: Tensor,
    longer: Tensor,
    size: Tensor,
    threshold: Tensor,
    share: float,
    warmup: int,
) -> None:
    """Learn as `strategies.Percentile` without a window does; `longer` is the history from then on."""
    length = history.numel()
    percentile_of_all_kernel[(-(-length // HISTORY_PER_PROGRAM),)](
        *(norm, _byte(skipped), history, longer, size, threshold, length, warmup, share),
        BLOCK=HISTORY_PER_PROGRAM,
        **OF_STATE.options(),
    )


def quantile_servo(
    norm: Tensor, skipped: Tensor | None, threshold: Tensor, quantile: float, eta: float
) -> None:
    """Learn as `strategies.QuantileServo` does."""
    quantile_servo_kernel[(1,)](norm, _byte(skipped), threshold, quantile, eta, **OF_STATE.options())


def skip(norm: Tensor, threshold: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Decide as `strategies.Skip` does.

    Returns:
        A copy of the threshold and the coefficient, 0-dim float64, and whether to leave the step out, bool.
    """
    limit, coefficient = torch.empty(2, dtype=torch.float64, device=norm.device).unbind()
    outlier = torch.empty((), dtype=torch.bool, device=norm.device)
    skip_kernel[(1,)](norm, threshold, limit, coefficient, _byte(outlier), factor, **OF_STATE.options())
    return limit, coefficient, outlier


def zscore(
    norm: Tensor, first: Tensor, moments: Tensor, settings: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """Learn from a norm as `strategies.ZScore` does; `settings` are decay, z_threshold and warmup_factor.

    Returns:
        The threshold for this norm and its coefficient, 0-dim float64.
    """
    warmup = first.numel()
    threshold, coefficient = torch.empty(2, dtype=torch.float64, device=norm.device).unbind()
    zscore_kernel[(1,)](
        *(norm, first, moments, threshold, coefficient, warmup, *settings),
        BLOCK=_block(warmup),
        **OF_STATE.options(),
    )
    return threshold, coefficient


def ema(
    norms: Tensor,
    total_norm: Tensor,
    average: Tensor,
    seen: Tensor,
    settings: tuple[float, float, int, float],
) -> tuple[Tensor, Tensor]:
    """Learn from norms as `strategies.Ema` does; settings are ratio, decay, warmup and warmup_max_norm.

    Returns:
        Coefficients and thresholds, (n,) float64.
    """
    count = norms.numel()
    coefs, limits = torch.empty(2, count, dtype=torch.float64, device=norms.device).unbind()
    ema_kernel[(-(-count // NORMS_PER_PROGRAM),)](
        *(norms, total_norm, average, seen, coefs, limits, count, *settings),
        BLOCK=NORMS_PER_PROGRAM,
        **OF_STATE.options(),
    )
    return coefs, limits


def norm_stabilised(
    norms: Tensor,
    total_norm: Tensor,
    averages: tuple[Tensor, Tensor, Tensor],
    settings: tuple[float, float, float],
) -> Tensor:
    """Learn from norms as `strategies.NormStabilised` does.

    Args:
        norms: Of the gradients, (n,).
        total_norm: Of all together.
        averages: Of the norms, of their squares, and how many those are; each (n,) float64.
        settings: beta1, beta2 and eps.

    Returns:
        The coefficients, (n,) float64.
    """
    count = norms.numel()
    coefs = torch.empty(count, dtype=torch.float64, device=norms.device)
    norm_stabilised_kernel[(-(-count // NORMS_PER_PROGRAM),)](
        *(norms, total_norm, *averages, coefs, count, *settings),
        BLOCK=NORMS_PER_PROGRAM,
        **OF_STATE.options(),
    )
    return coefs


def _byte(skipped: Tensor | None) -> Tensor | None:
    """Return a bool as what is in its memory: Triton has no bool there."""
    return None if skipped is None else skipped.view(torch.uint8)


def _block(length: int) -> int:
    return int(triton.next_power_of_2(max(length, 2)))
