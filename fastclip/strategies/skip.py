"""Leave out a step that is an outlier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclip.backends.eager import clip_coefficient
from fastclip.strategies import on_device
from fastclip.strategies.base import Decision, Global, Gradients, Strategy, positive


class Skip(Strategy):
    """Leave out a step whose norm is above factor * threshold; clip any other as the strategy says.

    Parameters and state stay as they are, and the step counts among the skipped ones. The strategy sees
    every finite norm: it gets used to norms that stay large.

    Args:
        strategy: Sets the threshold: one with a threshold for the total norm.
        factor: With 1 nothing is clipped: a step is taken as it is or not at all.

    Source:
        The rule of OLMo 2 (OLMo et al., 2 OLMo 2 Furious, 2024) and of llm.c, there with mean and sigma.
    """

    def __init__(self, strategy: Strategy, factor: float = 1.0) -> None:
        super().__init__()
        if not isinstance(strategy, Global):
            raise TypeError(
                f"Skip: expected a strategy that sets one threshold from what it sees, such as MedianMAD(), "
                f"not {strategy!r}."
            )
        self.strategy = strategy
        self.factor = positive("Skip", "factor", factor)

    def decide(self, gradients: Gradients) -> Decision:
        """Return the strategy's coefficient, and whether the norm is beyond it."""
        norm = gradients.total_norm
        if self.strategy.predicts:
            limit, coef, outlier = self._decide(norm, self.strategy.threshold(norm))
            self.strategy.learn(norm)
        else:
            found = self.strategy.decide(gradients)
            assert found.threshold is not None  # of a Global
            limit, coef, outlier = self._decide(norm, found.threshold)
        return Decision(coef.reshape(1), limit, outlier)

    def _decide(self, norm: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a copy of the threshold, the coefficient, and whether the norm is an outlier."""
        if (kernels := on_device.kernels(norm)) is not None:
            found: tuple[Tensor, Tensor, Tensor] = kernels.skip(norm, threshold, self.factor)
            return found
        limit = threshold.clone()
        outlier = ~((norm <= limit * self.factor) & norm.isfinite())
        return limit, torch.where(outlier, 1.0, clip_coefficient(limit, norm)), outlier

    @property
    def grows(self) -> bool:
        """Whether the strategy in it does."""
        return self.strategy.grows

    def begin(self, norms: Tensor) -> None:
        """Let the strategy in it begin."""
        self.strategy.begin(norms)

    def state_dict(self) -> dict[str, Any]:
        """Return the class and the state of the strategy in it."""
        return {"strategy": "Skip", "inner": self.strategy.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where another run was."""
        if state_dict.get("strategy") != "Skip":
            name = state_dict.get("strategy")
            raise ValueError(f"Skip.load_state_dict: this is the state of {name}; expected that of Skip.")
        self.strategy.load_state_dict(state_dict["inner"])
