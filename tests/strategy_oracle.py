"""The strategies' formulas once more, in plain Python floats: one function per strategy and kind.

Each takes the norms of all steps so far and returns what the strategy is to leave of the latest one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

EPSILON = 1e-6


def seen(norms: Sequence[float]) -> list[float]:
    """The norms that count: all but the latest, and none that is not finite."""
    return [n for n in norms[:-1] if math.isfinite(n)]


def percentile(p: float, window: int | None, warmup: int = 1) -> Callable[[Sequence[float]], float]:
    def threshold(norms: Sequence[float]) -> float:
        known = seen(norms)
        if len(known) < warmup:
            return math.inf
        return float(np.percentile(known[-window:] if window else known, p))

    return threshold


def early(known: list[float], factor: float) -> float:
    """Of a warm-up."""
    return factor * statistics.median_low(known) if known else math.inf


def median_mad(k: float, window: int, warmup: int, factor: float = 4.0) -> Callable[[Sequence[float]], float]:
    def threshold(norms: Sequence[float]) -> float:
        known = seen(norms)
        if len(known) < warmup:
            return early(known, factor)
        latest = known[-window:]
        median = statistics.median_low(latest)
        mad = statistics.median_low([abs(n - median) for n in latest])
        return median + k * 1.4826 * mad

    return threshold


def zscore(
    decay: float, z_threshold: float, warmup: int, factor: float = 4.0
) -> Callable[[Sequence[float]], float]:
    def threshold(norms: Sequence[float]) -> float:
        known = seen(norms)[:warmup]
        if len(known) < warmup:
            return early(known, factor)
        first = [min(norm, early(known[:i], factor)) for i, norm in enumerate(known)]
        mean = statistics.fmean(first)
        variance = statistics.fmean([(n - mean) ** 2 for n in first])

        def limit(norm: float) -> float:
            sigma = math.sqrt(variance)
            z = (norm - mean) / (sigma + EPSILON)
            return mean + sigma * z_threshold**2 / z if z > z_threshold else math.inf

        for norm in seen(norms)[warmup:]:
            clipped = min(norm, limit(norm))
            mean = decay * mean + (1 - decay) * clipped
            variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
        return limit(norms[-1])

    return threshold


def quantile_servo(quantile: float, eta: float) -> Callable[[Sequence[float]], float]:
    def threshold(norms: Sequence[float]) -> float:
        limit = math.inf
        for norm in seen(norms):
            if limit == math.inf:
                limit = norm
            else:
                limit *= math.exp(-eta * ((norm <= limit) - quantile))
        return limit

    return threshold


def ema(
    ratio: float, decay: float, warmup: int, warmup_max_norm: float
) -> Callable[[Sequence[float]], float]:
    """Of the total norm, or of each of several with a warm-up that leaves them as they are."""

    def threshold(norms: Sequence[float]) -> float:
        average = math.inf
        for number, norm in enumerate(seen(norms)):
            if number < warmup:
                average = min(average, norm * min(1.0, warmup_max_norm / (norm + EPSILON)))
            else:
                clipped = norm * min(1.0, ratio * average / (norm + EPSILON))
                average = decay * average + (1 - decay) * clipped
        return ratio * average if len(seen(norms)) >= warmup else warmup_max_norm

    return threshold


def norm_stabilised(
    beta1: float, beta2: float, eps: float, limit: float
) -> Callable[[Sequence[float]], float]:
    """The coefficient of one gradient with these norms."""

    def coefficient(norms: Sequence[float]) -> float:
        mean = square = 0.0
        known = [*seen(norms), norms[-1]]
        for number, norm in enumerate(known):
            if square > 0:
                norm = min(norm, limit * math.sqrt(square / (1 - beta2**number)))
            mean = beta1 * mean + (1 - beta1) * norm
            square = beta2 * square + (1 - beta2) * norm**2
        mean /= 1 - beta1 ** len(known)
        square /= 1 - beta2 ** len(known)
        return mean / (math.sqrt(square) + eps) / (norms[-1] + eps)

    return coefficient
