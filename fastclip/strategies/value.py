"""A threshold for each element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
        limit, scale = self.clip_value, gradients.scale
        if scale is not None and scale.device.type != "cpu" and gradients.shards is None:
            self._clamp_scaled(gradients.parameters, scale)  # which the host does not know
            return Decision(gradients.total_norm.new_ones(1))
        if scale is not None:
            limit *= float(scale)
        if gradients.shards is not None:
            gradients.shards.clamp(limit)
        elif gradients.parameters:
            backends.run("clip_grad_value_", list(gradients.parameters), limit)
        return Decision(gradients.total_norm.new_ones(1))

    def _clamp_scaled(self, parameters: Sequence[Tensor], scale: Tensor) -> None:
        """Clamp to scale * c, which is on the device; a launch for each gradient."""
        with torch.no_grad():
            for param in parameters:
                grad = param.grad
                assert grad is not None  # `Gradients` holds no others
                limit = (scale * self.clip_value).to(grad.dtype)
                grad.clamp_(-limit, limit)
