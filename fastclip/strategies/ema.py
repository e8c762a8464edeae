"""A multiple of the moving average of the clipped norms, of all gradients or of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastclip.backends.eager import clip_coefficient
from fastclip.strategies import on_device
from fastclip.strategies.base import Decision, Gradients, Strategy, checked, count, positive, share


class Ema(Strategy):
    """threshold = ratio * average, average = decay * average + (1 - decay) * clipped norm.

    In the first `warmup` steps the total norm is clipped to `warmup_max_norm`, and the average is the
    smallest clipped norm so far.

    Args:
        ratio: How much longer than the average a gradient may be.
        decay: Of the moving average.
        warmup: Norms to see before the average counts.
        warmup_max_norm: The largest total norm to leave until then; inf leaves all.
        per_tensor: An average and a threshold for each parameter, as the source has it. Parameters must then
            be the same in every step, each with a gradient.

    Source:
        Wang et al., AdaGC: Improving Training Stability for Large Language Model Pretraining, 2025.
    """

    def __init__(
        self,
        ratio: float = 1.05,
        decay: float = 0.98,
        warmup: int = 100,
        warmup_max_norm: float = 1.0,
        per_tensor: bool = False,
    ) -> None:
        super().__init__()
        self.ratio = checked("Ema", "ratio", ratio, lambda x: x >= 1, "a number >= 1")
        self.decay = share("Ema", "decay", decay)
        self.warmup = count("Ema", "warmup", warmup, 1)
        self.warmup_max_norm = positive("Ema", "warmup_max_norm", warmup_max_norm)
        self.per_tensor = per_tensor

    @property
    def of_each(self) -> bool:
        """Whether each gradient has an average of its own."""
        return self.per_tensor

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        return {"average": torch.full_like(like, math.inf), "seen": torch.zeros_like(like)}

    def _unlike(self, state: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
        of_one = state["average"].numel() == 1
        if self.per_tensor or of_one:
            return None
        return f"the state has averages of {state['average'].numel()} parameters"

    def decide(self, gradients: Gradients) -> Decision:
        """Return a coefficient for all, or one for each parameter."""
        total = gradients.total_norm
        norms = gradients.norms if self.per_tensor else total.reshape(1)
        state = self._of_norms(norms, gradients.at if self.per_tensor else None)
        average, seen = state["average"], state["seen"]
        if (kernels := on_device.kernels(norms)) is not None:
            settings = self.ratio, self.decay, self.warmup, self.warmup_max_norm
            coefs, limits = kernels.ema(norms, total, average, seen, settings)
            return Decision(coefs, None if self.per_tensor else limits.reshape(()))
        in_warmup = seen < self.warmup
        limit = average * self.ratio
        coefs = torch.where(
            in_warmup, clip_coefficient(self.warmup_max_norm, total), clip_coefficient(limit, norms)
        )
        clipped = norms * coefs
        updated = torch.where(
            in_warmup, torch.minimum(average, clipped), torch.lerp(clipped, average, self.decay)
        )
        finite = total < math.inf
        torch.where(finite, updated, average, out=average)
        limits = torch.where(in_warmup, self.warmup_max_norm, limit)
        seen.add_(finite)
        if self.per_tensor:
            return Decision(coefs)
        return Decision(coefs, limits.reshape(()))
