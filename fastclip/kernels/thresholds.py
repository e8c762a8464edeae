"""Finalize, for a strategy: from the norm of a step to the threshold of the next, in one program.

Math        that of the class in fastclip/strategies that has the kernel's name; in float64.
Grid        one program; of what has many norms, one for each BLOCK of them.
Traffic     the state twice: 16 bytes per norm of a window or a history.
Order       no sum is shared by programs; windows are sorted by a fixed network.
Requires    nothing else reads or writes the state meanwhile; a window of at most BLOCK norms.
Range       a norm that is nan or inf, or of a step that was skipped, changes nothing.
Scratch     none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.blocks import Blocks
from fastclip.kernels.norm import clip_coefficient

LARGEST_WINDOW = 1024
"""That one program is to sort; above, torch sorts."""

NORMS_PER_PROGRAM = 128
HISTORY_PER_PROGRAM = 1024

OF_STATE = Blocks(rows=0, threads=128, programs_per_unit=1)

NORMAL = tl.constexpr(1.4826)
EPSILON = tl.constexpr(1e-6)


def _byte(skipped: Tensor | None) -> Tensor | None:
    """Return a bool as what is in its memory: Triton has no bool there."""
    return None if skipped is None else skipped.view(torch.uint8)


def _block(length: int) -> int:
    return int(triton.next_power_of_2(max(length, 2)))


@triton.jit
def _seen(norm, skipped):
    """Return the norm as a float64, and whether it counts."""
    x = tl.load(norm).to(tl.float64)
    counts = x < float("inf")  # False of nan
    if skipped is not None:
        counts = counts & (tl.load(skipped) == 0)
    return x, counts


@triton.jit
def _pushed(window, length, x, counts, BLOCK: tl.constexpr):
    """Put a norm behind the others, if it counts; return the window and how many norms are in it.

    An empty place is nan, and inf in what is returned; the latest norm stands last.
    """
    place = tl.arange(0, BLOCK)
    here = tl.load(window + place, place < length, other=float("nan"))
    after = tl.load(window + place + 1, place < length - 1, other=float("nan"))
    # Every load has to be done before a thread stores.
    tl.debug_barrier()
    moved = tl.where(place == length - 1, x, after)
    values = tl.where(counts, moved, here)
    tl.store(window + place, values, place < length)
    filled = (values == values) & (place < length)
    return tl.where(filled, values, float("inf")), tl.sum(filled.to(tl.int32), axis=0)


@triton.jit
def _at(ordered, rank, BLOCK: tl.constexpr):
    """Return the element of this rank, a whole number."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == rank, ordered, 0.0), axis=0)


@triton.jit
def _median(values, number, BLOCK: tl.constexpr):
    """Return the lower of two middle values; 0 of none."""
    return _at(tl.sort(values), (number - 1) // 2, BLOCK)


@triton.jit
def _early(median, number, factor):
    return tl.where(number > 0, median * factor, float("inf"))


@triton.jit(do_not_specialize=["length", "warmup"])
def median_mad_kernel(
    norm, skipped, window, threshold, length, warmup, k: tl.float64, factor: tl.float64, BLOCK: tl.constexpr
):
    """Put a norm into the window and write the next threshold; what there is to know is in the header."""
    k = tl.full([], k, tl.float64)
    factor = tl.full([], factor, tl.float64)
    x, counts = _seen(norm, skipped)
    values, number = _pushed(window, length, x, counts, BLOCK)
    median = _median(values, number, BLOCK)
    away = tl.where(values < float("inf"), tl.abs(values - median), float("inf"))
    limit = median + k * NORMAL * _median(away, number, BLOCK)
    tl.store(threshold, tl.where(number < warmup, _early(median, number, factor), limit))


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


@triton.jit(do_not_specialize=["length", "warmup"])
def percentile_kernel(
    norm, skipped, window, threshold, length, warmup, share: tl.float64, BLOCK: tl.constexpr
):
    """Put a norm into the window and write the next threshold; what there is to know is in the header."""
    share = tl.full([], share, tl.float64)
    x, counts = _seen(norm, skipped)
    values, number = _pushed(window, length, x, counts, BLOCK)
    ordered = tl.sort(values)
    rank = share * tl.maximum(number - 1, 0).to(tl.float64)
    below = tl.floor(rank)
    low = _at(ordered, below.to(tl.int32), BLOCK)
    high = _at(ordered, tl.ceil(rank).to(tl.int32), BLOCK)
    limit = low + (high - low) * (rank - below)
    tl.store(threshold, tl.where(number < warmup, float("inf"), limit))


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


@triton.jit
def _place_in(ordered, length, x):
    """Return how many elements are below x."""
    low = 0
    high = length
    while low < high:
        middle = (low + high) // 2
        if tl.load(ordered + middle) < x:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def _with(ordered, place, x, index):
    """Return what stands at an index once x is put in its place."""
    before = tl.load(ordered + tl.maximum(index - 1, 0))
    return tl.where(index < place, tl.load(ordered + index), tl.where(index == place, x, before))


@triton.jit(do_not_specialize=["length", "warmup"])
def percentile_of_all_kernel(
    norm,
    skipped,
    history,
    longer,
    size,
    threshold,
    length,
    warmup,
    share: tl.float64,
    BLOCK: tl.constexpr,
):
    """Copy the sorted history with the norm in its place, BLOCK places per program; write the threshold.

    Unused places are inf, and there is one at least.
    """
    share = tl.full([], share, tl.float64)
    x, counts = _seen(norm, skipped)
    # Behind everything, where it is one more unused place.
    x = tl.where(counts, x, float("inf"))
    place = _place_in(history, length, x)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < length
    here = tl.load(history + index, mask, other=0.0)
    before = tl.load(history + index - 1, mask & (index > 0), other=0.0)
    values = tl.where(index < place, here, tl.where(index == place, x, before))
    tl.store(longer + index, values, mask)
    if tl.program_id(0) == 0:
        number = tl.load(size) + tl.where(counts, 1.0, 0.0)
        rank = share * tl.maximum(number - 1.0, 0.0)
        below = tl.floor(rank)
        low = _with(history, place, x, below.to(tl.int32))
        high = _with(history, place, x, tl.ceil(rank).to(tl.int32))
        limit = tl.where(high > low, low + (high - low) * (rank - below), low)
        tl.store(threshold, tl.where(number < warmup, float("inf"), limit))
        tl.store(size, number)


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


@triton.jit
def quantile_servo_kernel(norm, skipped, threshold, quantile: tl.float64, eta: tl.float64):
    """Move the threshold towards the quantile; what there is to know is in the header."""
    quantile = tl.full([], quantile, tl.float64)
    eta = tl.full([], eta, tl.float64)
    x, counts = _seen(norm, skipped)
    limit = tl.load(threshold)
    share = tl.where(x <= limit, 1.0, 0.0).to(tl.float64)
    moved = tl.where(limit == float("inf"), x, limit * tl.exp(-eta * (share - quantile)))
    tl.store(threshold, tl.where(counts & (moved > 0.0), moved, limit))


def quantile_servo(
    norm: Tensor, skipped: Tensor | None, threshold: Tensor, quantile: float, eta: float
) -> None:
    """Learn as `strategies.QuantileServo` does."""
    quantile_servo_kernel[(1,)](norm, _byte(skipped), threshold, quantile, eta, **OF_STATE.options())


@triton.jit
def skip_kernel(norm, threshold, limit, coefficient, outlier, factor: tl.float64):
    """Write threshold and coefficient for this norm, and whether it is beyond; not finite is beyond."""
    factor = tl.full([], factor, tl.float64)
    x = tl.load(norm).to(tl.float64)
    bound = tl.load(threshold).to(tl.float64)
    within = x <= bound * factor  # False of nan
    tl.store(limit, bound)
    tl.store(coefficient, tl.where(within, clip_coefficient(x, bound), 1.0))
    tl.store(outlier, tl.where(within & (x < float("inf")), 0, 1).to(tl.uint8))


def skip(norm: Tensor, threshold: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Decide as `strategies.Skip` does.

    Returns:
        A copy of the threshold and the coefficient, 0-dim float64, and whether to leave the step out, bool.
    """
    limit, coefficient = torch.empty(2, dtype=torch.float64, device=norm.device).unbind()
    outlier = torch.empty((), dtype=torch.bool, device=norm.device)
    skip_kernel[(1,)](norm, threshold, limit, coefficient, _byte(outlier), factor, **OF_STATE.options())
    return limit, coefficient, outlier


@triton.jit(do_not_specialize=["warmup"])
def zscore_kernel(
    norm,
    first,
    moments,
    threshold,
    coefficient,
    warmup,
    decay: tl.float64,
    z_threshold: tl.float64,
    factor: tl.float64,
    BLOCK: tl.constexpr,
):
    """Write threshold and coefficient for this norm, then average it in; the rest is in the header."""
    decay = tl.full([], decay, tl.float64)
    z_threshold = tl.full([], z_threshold, tl.float64)
    factor = tl.full([], factor, tl.float64)
    x, counts = _seen(norm, None)
    mean = tl.load(moments)
    variance = tl.load(moments + 1)
    seen = tl.load(moments + 2)
    in_warmup = seen < warmup
    sigma = tl.sqrt(variance)
    z = (x - mean) / (sigma + EPSILON)
    limit = tl.where(z > z_threshold, mean + sigma * (z_threshold * z_threshold / z), float("inf"))
    if in_warmup:
        place = tl.arange(0, BLOCK)
        known = tl.load(first + place, place < warmup, other=float("nan"))
        filled = known == known
        number = tl.sum(filled.to(tl.int32), axis=0)
        median = _median(tl.where(filled, known, float("inf")), number, BLOCK)
        limit = _early(median, number, factor)
        _pushed(first, warmup, x, counts, BLOCK)
    tl.store(threshold, limit)
    tl.store(coefficient, clip_coefficient(x, limit))
    clipped = tl.where(x < limit, x, limit)
    weight = tl.where(in_warmup, 1.0 / (seen + 1.0), 1.0 - decay)
    after = mean + weight * (clipped - mean)
    square = (clipped - after) * tl.where(in_warmup, clipped - mean, clipped - after)
    tl.store(moments, tl.where(counts, after, mean))
    tl.store(moments + 1, tl.where(counts, variance + weight * (square - variance), variance))
    tl.store(moments + 2, tl.where(counts, seen + 1.0, seen))


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


@triton.jit(do_not_specialize=["count", "warmup"])
def ema_kernel(
    norms,
    total_norm,
    average,
    seen,
    coefficients,
    limits,
    count,
    ratio: tl.float64,
    decay: tl.float64,
    warmup,
    warmup_max_norm: tl.float64,
    BLOCK: tl.constexpr,
):
    """Write coefficient and threshold of each norm, then average it in; BLOCK of them per program."""
    ratio = tl.full([], ratio, tl.float64)
    decay = tl.full([], decay, tl.float64)
    early = tl.full([], warmup_max_norm, tl.float64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    x = tl.load(norms + place, mask, other=0.0).to(tl.float64)
    total = tl.load(total_norm).to(tl.float64)
    mean = tl.load(average + place, mask, other=0.0)
    number = tl.load(seen + place, mask, other=0.0)
    in_warmup = number < warmup
    limit = mean * ratio
    coefficient = tl.where(in_warmup, clip_coefficient(total, early), clip_coefficient(x, limit))
    clipped = x * coefficient
    # Of nan the comparison is False, and nothing is stored.
    updated = tl.where(in_warmup, tl.where(clipped < mean, clipped, mean), clipped + decay * (mean - clipped))
    counts = total < float("inf")
    tl.store(coefficients + place, coefficient, mask)
    tl.store(limits + place, tl.where(in_warmup, early, limit), mask)
    tl.store(average + place, tl.where(counts, updated, mean), mask)
    tl.store(seen + place, tl.where(counts, number + 1.0, number), mask)


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


@triton.jit(do_not_specialize=["count"])
def norm_stabilised_kernel(
    norms,
    total_norm,
    mean,
    square,
    seen,
    coefficients,
    count,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    limit: tl.float64,
    BLOCK: tl.constexpr,
):
    """Average each norm in, up to the limit, and write its coefficient; BLOCK of them per program."""
    beta1 = tl.full([], beta1, tl.float64)
    beta2 = tl.full([], beta2, tl.float64)
    eps = tl.full([], eps, tl.float64)
    limit = tl.full([], limit, tl.float64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    x = tl.load(norms + place, mask, other=0.0).to(tl.float64)
    counts = tl.load(total_norm).to(tl.float64) < float("inf")  # False of nan
    first = tl.load(mean + place, mask, other=0.0)
    second = tl.load(square + place, mask, other=0.0)
    number = tl.load(seen + place, mask, other=0.0)
    before = tl.sqrt(second / (1.0 - tl.exp(number * tl.log(beta2))))
    known = tl.where((before > 0.0) & (x > limit * before), limit * before, x)  # before is nan at first
    first = tl.where(counts, known + beta1 * (first - known), first)
    second = tl.where(counts, known * known + beta2 * (second - known * known), second)
    number = tl.where(counts, number + 1.0, number)
    tl.store(mean + place, first, mask)
    tl.store(square + place, second, mask)
    tl.store(seen + place, number, mask)
    first /= 1.0 - tl.exp(number * tl.log(beta1))
    second /= 1.0 - tl.exp(number * tl.log(beta2))
    tl.store(coefficients + place, first / (tl.sqrt(second) + eps) / (x + eps), mask)


def norm_stabilised(
    norms: Tensor,
    total_norm: Tensor,
    averages: tuple[Tensor, Tensor, Tensor],
    settings: tuple[float, float, float, float],
) -> Tensor:
    """Learn from norms as `strategies.NormStabilised` does.

    Args:
        norms: Of the gradients, (n,).
        total_norm: Of all together.
        averages: Of the norms, of their squares, and how many those are; each (n,) float64.
        settings: beta1, beta2, eps and limit.

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
