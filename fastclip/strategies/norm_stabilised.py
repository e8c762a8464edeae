"""Each gradient gets the length that its norm has had of late."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastclip.strategies import on_device
from fastclip.strategies.base import Decision, Gradients, Strategy, positive, share


class NormStabilised(Strategy):
    """Each gradient g becomes g / norm * m / (sqrt(v) + eps).

    m and v are moving averages of its norm and of the square of that, without their bias towards 0. The
    length is about 1 while norms are steady, whatever they are, and short where they vary: small gradients
    are made longer, too. Parameters must be the same in every step, each with a gradient.

    As it comes, an outlier is averaged in whole, and for 1 / (1 - beta2) steps or so afterwards gradients are
    all but left out. The source clips elements before; here `limit` keeps the averages from such norms.

    Args:
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Added to the root.
        limit: The largest norm that is averaged in, in roots of v before this step; inf: any.

    Source:
        Huang et al., Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam, 2025 (AdaGN).
    """

    of_each = True  # as `Strategy.of_each`

    def __init__(
        self, beta1: float = 0.7, beta2: float = 0.9, eps: float = 1e-6, limit: float = math.inf
    ) -> None:
        super().__init__()
        self.beta1 = share("NormStabilised", "beta1", beta1)
        self.beta2 = share("NormStabilised", "beta2", beta2)
        self.eps = positive("NormStabilised", "eps", eps)
        self.limit = positive("NormStabilised", "limit", limit)

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(like) for name in ("mean", "square", "seen")}

    def decide(self, gradients: Gradients) -> Decision:
        """Return a coefficient for each parameter, which may be above 1."""
        norms = gradients.norms
        state = self._of_norms(norms, gradients.at)
        if (kernels := on_device.kernels(norms)) is not None:
            averages = state["mean"], state["square"], state["seen"]
            settings = self.beta1, self.beta2, self.eps, self.limit
            return Decision(kernels.norm_stabilised(norms, gradients.total_norm, averages, settings))
        finite = gradients.total_norm.isfinite()
        # 0 of norms of 0, nan before the first norm: nothing is limited by those.
        before = (state["square"] / (1 - self.beta2 ** state["seen"])).sqrt()
        limit = torch.where(before > 0, self.limit * before, math.inf)
        known = torch.where(finite, norms.minimum(limit), 0.0)
        weight = finite.to(norms.dtype)
        seen = state["seen"].add_(weight)
        mean = state["mean"].lerp_(known, weight * (1 - self.beta1))
        square = state["square"].lerp_(known * known, weight * (1 - self.beta2))
        first = mean / (1 - self.beta1**seen)
        second = square / (1 - self.beta2**seen)
        return Decision(first / (second.sqrt() + self.eps) / (norms + self.eps))
