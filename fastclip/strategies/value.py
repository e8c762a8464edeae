"""A threshold for each element."""

from __future__ import annotations

from fastclip import backends
from fastclip.strategies.base import Decision, Gradients, Strategy, positive


class Value(Strategy):
    """Each element is clamped to [-c, c], in `.grad` itself; nan stays nan.

    Args:
        clip_value: c > 0.

    Source:
        torch.nn.utils.clip_grad_value_.
    """

    def __init__(self, clip_value: float = 1.0) -> None:
        super().__init__()
        self.clip_value = positive("Value", "clip_value", clip_value)

    def decide(self, gradients: Gradients) -> Decision:
        """Clamp the gradients; what is left of them stays as it is."""
        limit = self.clip_value
        if gradients.scale is not None:
            limit *= float(gradients.scale)
        if gradients.shards is not None:
            gradients.shards.clamp(limit)
        elif gradients.parameters:
            backends.run("clip_grad_value_", list(gradients.parameters), limit)
        return Decision(gradients.total_norm.new_ones(1))
