"""A threshold that is steered to a quantile of the norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastclip.strategies.base import Global, positive, share


class QuantileServo(Global):
    """threshold = threshold * exp(-eta * ([norm <= threshold] - quantile)), from the first norm on.

    In the long run this share of norms is below the threshold; the others are clipped. One number is all it
    remembers.

    Args:
        quantile: Share of norms to leave as they are.
        eta: Step length, in the logarithm of the threshold.

    Source:
        Andrew, Thakkar, McMahan and Ramaswamy, Differentially Private Learning with Adaptive Clipping, 2021.
    """

    def __init__(self, quantile: float = 0.5, eta: float = 0.2) -> None:
        super().__init__()
        self.quantile = share("QuantileServo", "quantile", quantile)
        self.eta = positive("QuantileServo", "eta", eta)

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        return {"threshold": like.new_full((), math.inf)}

    def threshold(self, norm: Tensor) -> Tensor:
        """Return what the norms before this one have steered it to; inf before the first."""
        return self._on(norm)["threshold"]

    def _learn_by(self, kernels: Any, norm: Tensor, skipped: Tensor | None) -> bool:
        state = self._on(norm.new_empty((), dtype=torch.float64))
        kernels.quantile_servo(norm, skipped, state["threshold"], self.quantile, self.eta)
        return True

    def observe(self, norm: Tensor) -> None:
        """Move the threshold towards the quantile."""
        threshold = self._on(norm)["threshold"]
        factor = torch.exp(-self.eta * ((norm <= threshold).to(norm.dtype) - self.quantile))
        moved = torch.where(threshold.isinf(), norm, threshold * factor)
        # From a norm of 0 no factor leads anywhere.
        torch.where((norm < math.inf) & (moved > 0), moved, threshold, out=threshold)
