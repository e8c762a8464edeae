"""A threshold for the norm of each gradient."""

from __future__ import annotations

from fastclip.backends.eager import clip_coefficient
from fastclip.strategies.base import Decision, Gradients, Strategy, positive


class PerTensor(Strategy):
    """Each gradient is scaled by min(1, c / (its norm + 1e-6)).

    Args:
        max_norm: c > 0, the largest norm of a gradient to leave.

    Source:
        `clipnorm` of Keras' optimizers.
    """

    of_each = True  # as `Strategy.of_each`

    def __init__(self, max_norm: float = 1.0) -> None:
        super().__init__()
        self.max_norm = positive("PerTensor", "max_norm", max_norm)

    def decide(self, gradients: Gradients) -> Decision:
        """Return a coefficient for each parameter."""
        return Decision(clip_coefficient(self.max_norm, gradients.norms))
