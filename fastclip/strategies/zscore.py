"""Mean and variance of the norms, as moving averages."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fastclip.strategies import on_device, windows
from fastclip.strategies.base import Decision, Global, Gradients, count, positive, share

_EPSILON = 1e-6


class ZScore(Global):
    """threshold = mean + z_threshold^2 / z * sigma where z = (norm - mean) / sigma is above z_threshold.

    So the farther out a norm is, the shorter it gets. Mean and variance are moving averages of the norms
    after clipping; of the first `warmup` norms they are those of the sample.

    Args:
        decay: Of the moving averages.
        z_threshold: Standard deviations above the mean from which on a norm is clipped.
        warmup: Norms to see before mean and variance count.
        warmup_factor: Until then, from the second norm on, threshold = this times the median of the norms so
            far. The source clips nothing then, inf: one outlier among these hides all later ones.

    Source:
        Kumar, Owen, Chowdhury and Güra, ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025.
    """

    predicts: ClassVar[bool] = False

    def __init__(
        self,
        decay: float = 0.97,
        z_threshold: float = 2.5,
        warmup: int = 25,
        warmup_factor: float = 4.0,
    ) -> None:
        super().__init__()
        self.decay = share("ZScore", "decay", decay)
        self.z_threshold = positive("ZScore", "z_threshold", z_threshold)
        self.warmup = count("ZScore", "warmup", warmup, 2)
        self.warmup_factor = positive("ZScore", "warmup_factor", warmup_factor)

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        # Moments: mean, variance, and how many norms were seen.
        return {"moments": like.new_zeros(3), "first": windows.empty(self.warmup, like)}

    def decide(self, gradients: Gradients) -> Decision:
        """Return min(1, threshold / (norm + 1e-6)) for all; on a device in one launch, if it can be."""
        norm = gradients.total_norm
        if (kernels := on_device.kernels(norm)) is None or self.warmup > kernels.LARGEST_WINDOW:
            return super().decide(gradients)
        state = self._on(norm)
        settings = self.decay, self.z_threshold, self.warmup_factor
        limit, coef = kernels.zscore(norm, state["first"], state["moments"], settings)
        return Decision(coef.reshape(1), limit)

    def threshold(self, norm: Tensor) -> Tensor:
        """Return what mean and variance before this norm give for it."""
        state = self._on(norm)
        mean, variance, seen = state["moments"].unbind()
        sigma = variance.sqrt()
        z = (norm - mean) / (sigma + _EPSILON)
        limit = mean + sigma * (self.z_threshold**2 / z)
        early = windows.while_few(state["first"].nanmedian(), self.warmup_factor)
        return torch.where(seen < self.warmup, early, torch.where(z > self.z_threshold, limit, math.inf))

    def observe(self, norm: Tensor) -> None:
        """Average in the norm as it is after clipping."""
        state = self._on(norm)
        moments = state["moments"]
        mean, variance, seen = moments.unbind()
        clipped = torch.minimum(norm, self.threshold(norm))
        in_warmup = seen < self.warmup
        weight = torch.where(in_warmup, 1 / (seen + 1), 1 - self.decay)
        after = torch.lerp(mean, clipped, weight)
        # Welford's update of a sample; ZClip's moving average measures from the new mean alone.
        square = (clipped - after) * torch.where(in_warmup, clipped - mean, clipped - after)
        first = state["first"]
        windows.push(first, torch.where(in_warmup, norm, math.nan))
        updated = torch.stack((after, torch.lerp(variance, square, weight), seen + 1))
        torch.where(norm < math.inf, updated, moments, out=moments)
