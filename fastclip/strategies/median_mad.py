"""Median and median absolute deviation of the latest norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastclip.strategies import windows
from fastclip.strategies.base import Global, count, positive

_NORMAL = 1.4826
"""Times the median absolute deviation is the standard deviation, where norms are normally distributed."""


class MedianMAD(Global):
    """threshold = median + k * 1.4826 * MAD of the last norms, where MAD = median |norm - median|.

    Half of the window has to be outliers before they move it: what masks itself to a mean and a sigma is
    seen here. Norms count as they were before clipping. A median is the lower of two middle values.

    Args:
        k: Standard deviations above the median.
        window: Norms that count.
        warmup: Norms to see before the deviation counts.
        warmup_factor: Until then, from the second norm on, threshold = this times the median; inf clips
            nothing.

    Source:
        Own; Rousseeuw and Croux, Alternatives to the Median Absolute Deviation, 1993.
    """

    def __init__(
        self, k: float = 4.0, window: int = 128, warmup: int = 20, warmup_factor: float = 4.0
    ) -> None:
        super().__init__()
        self.k = positive("MedianMAD", "k", k)
        self.window = count("MedianMAD", "window", window, 2)
        self.warmup = count("MedianMAD", "warmup", warmup, 1)
        self.warmup_factor = positive("MedianMAD", "warmup_factor", warmup_factor)
        if warmup > window:
            raise ValueError(f"MedianMAD: warmup={warmup} with window={window}; expected warmup <= window.")

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        return {
            "window": windows.empty(self.window, like),
            "threshold": like.new_full((), math.inf),
        }

    def threshold(self, norm: Tensor) -> Tensor:
        """Return what the norms before this one give."""
        return self._on(norm)["threshold"]

    def _learn_by(self, kernels: Any, norm: Tensor, skipped: Tensor | None) -> bool:
        if self.window > kernels.LARGEST_WINDOW:
            return False
        state = self._on(norm.new_empty((), dtype=torch.float64))
        settings = self.k, self.warmup, self.warmup_factor
        kernels.median_mad(norm, skipped, state["window"], state["threshold"], *settings)
        return True

    def observe(self, norm: Tensor) -> None:
        """Put the norm into the window."""
        state = self._on(norm)
        window = state["window"]
        windows.push(window, norm)
        median = window.nanmedian()
        mad = (window - median).abs_().nanmedian()
        limit = torch.add(median, mad, alpha=self.k * _NORMAL)
        early = windows.while_few(median, self.warmup_factor)
        state["threshold"].copy_(windows.once_full(window, self.warmup, limit, early))
