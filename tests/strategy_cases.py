"""The strategies, ready to be tried, and norms to try them on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from fastclip import strategies
from fastclip.strategies import Gradients, Strategy


def halving(step: int) -> float:
    return 8.0 / (1 + step)


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fixed": lambda: strategies.Fixed(0.7),
    "schedule": lambda: strategies.Schedule(halving),
    "percentile": lambda: strategies.Percentile(10),
    "percentile_window": lambda: strategies.Percentile(40, window=16, warmup=3),
    "zscore": lambda: strategies.ZScore(warmup=5),
    "median_mad": lambda: strategies.MedianMAD(window=16, warmup=5),
    "quantile_servo": lambda: strategies.QuantileServo(),
    "ema": lambda: strategies.Ema(warmup=5),
    "ema_per_tensor": lambda: strategies.Ema(warmup=5, per_tensor=True),
    "agc": lambda: strategies.AGC(),
    "per_tensor": lambda: strategies.PerTensor(0.5),
    "value": lambda: strategies.Value(0.05),
    "block_rms": lambda: strategies.BlockRMS(0.05),
    "norm_stabilised": lambda: strategies.NormStabilised(),
    "norm_stabilised_limit": lambda: strategies.NormStabilised(limit=3.0),
    "skip": lambda: strategies.Skip(strategies.MedianMAD(window=16, warmup=5)),
}
"""With windows and warm-ups that are short enough for a few steps to be beyond them."""

REMEMBERING = [
    name for name in STRATEGIES if name not in ("fixed", "agc", "per_tensor", "value", "block_rms")
]

OF_EACH = ("ema_per_tensor", "per_tensor", "block_rms", "norm_stabilised", "norm_stabilised_limit")
"""Those with a coefficient for each parameter."""


def norms(count: int = 500, seed: int = 0) -> list[float]:
    """Lognormal norms whose level wanders, with outliers, zeros, nan and inf."""
    draw = np.random.default_rng(seed)
    level = np.cumsum(draw.normal(0, 0.05, count))
    found = np.exp(level + draw.normal(0, 0.3, count))
    for value, share in ((math.nan, 0.02), (math.inf, 0.02), (0.0, 0.01)):
        found[draw.random(count) < share] = value
    found[draw.random(count) < 0.03] *= 1e4
    return [float(norm) for norm in found]


def of_norm(norm: float, names: list[str] | None = None) -> Gradients:
    """One gradient of one element, with this norm."""
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    param.grad = torch.tensor([norm], dtype=torch.float64)
    return Gradients([param], torch.tensor(norm, dtype=torch.float64), names=names)


def gradients(params: list[torch.nn.Parameter], step: int) -> list[torch.Tensor]:
    """Gradients whose size varies from step to step, with an outlier now and then."""
    generator = torch.Generator().manual_seed(step)
    size = 10.0 ** float(torch.randn((), generator=generator)) * (100 if step % 9 == 8 else 1)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) * size for p in params]
