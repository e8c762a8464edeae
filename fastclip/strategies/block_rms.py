"""A threshold for the root mean square of each gradient's elements."""

from __future__ import annotations

import math

from fastclip.backends.eager import clip_coefficient
from fastclip.strategies.base import Decision, Gradients, Strategy, positive


class BlockRMS(Strategy):
    """Each gradient is scaled by min(1, c / rms), rms = sqrt(mean of its squared elements).

    Args:
        max_rms: c > 0, the largest root mean square to leave.

    Source:
        `clip_by_block_rms` of optax; Shazeer and Stern, Adafactor, 2018.
    """

    of_each = True  # as `Strategy.of_each`

    def __init__(self, max_rms: float = 1.0) -> None:
        super().__init__()
        self.max_rms = positive("BlockRMS", "max_rms", max_rms)

    def decide(self, gradients: Gradients) -> Decision:
        """Return a coefficient for each parameter."""
        norms = gradients.norms
        roots = norms.new_tensor([math.sqrt(max(p.numel(), 1)) for p in gradients.parameters])
        return Decision(clip_coefficient(self.max_rms, norms / roots))
