"""A threshold for each element."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastclip.strategies.base import Decision, Gradients, Strategy, positive
from fastclip.strategies.within import Elements


class Value(Strategy):
    """Each element is clamped to [-c, c]; nan stays nan.

    Folded into the step of fastclip's kernels, where it costs nothing; else in `.grad` itself.

    Args:
        clip_value: c > 0.

    Source:
        torch.nn.utils.clip_grad_value_.
    """

    def __init__(self, clip_value: float = 1.0) -> None:
        super().__init__()
        self.clip_value = positive("Value", "clip_value", clip_value)

    def within(self, parameters: Sequence[Tensor], names: Sequence[str] | None) -> Elements:
        """Return the bound of each element."""
        return Elements(self.clip_value)

    def decide(self, gradients: Gradients) -> Decision:
        """Leave the gradients as they are, but for their elements."""
        return Decision(
            gradients.total_norm.new_ones(1), within=self.within(gradients.parameters, gradients.names)
        )
